"""The command line: one file a verb, found by walking this package.

A verb file `moestro/cli/<verb>.py` defines `register(app)`, which adds one or more commands to the Typer application.
Verb files import nothing heavy at module level (no torch, no transformers): `moestro --help` answers at once.
"""

import contextlib
import errno
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import typer

from moestro.core.errors import MoestroError


__all__ = ["app", "main"]

INTERRUPTED = 130
# What a disk, a name or a permission can refuse; other errors of the operating system are bugs, with their traceback.
_USERS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "EMFILE",
                                            "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP")}  # fmt: skip


def app() -> typer.Typer:
    """The application with every verb of this package registered, in order of file name."""
    root = typer.Typer(
        name="moestro",
        help="One toolkit for mixture-of-experts models: train, convert, adapt, compress, place, serve, "
        "compose, inspect, simulate.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @root.callback(invoke_without_command=True)
    def options(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    ) -> None:
        if version:
            from moestro import __version__

            print(f"moestro {__version__}")
            raise typer.Exit
        if context.invoked_subcommand is None:
            print(context.get_help())

    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}").register(root)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for anything the user can mend, 130 when interrupted.

    A user's error is one line on stderr; a traceback means a bug of ours.
    """
    try:
        command = typer.main.get_command(app())
        status = command.main(args=arguments, prog_name="moestro", standalone_mode=False)
        sys.stdout.flush()
    except MoestroError as error:
        return _fail(str(error), error.exit_status)
    except typer.TyperException as error:
        return _fail(error.format_message() + _hint(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:  # the reader left (`moestro papers | head`): no message
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in _USERS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _drop_output()
        return _fail(f"{where}{error.strerror}", 2)
    if status == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """Print what can still be printed, and nothing more at exit: that would raise where nobody catches it."""
    with contextlib.suppress(OSError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see: {context.command_path} --help)" if context is not None else ""
