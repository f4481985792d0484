"""The command-line shell: exit statuses, one-line errors, light start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import moestro.cli
from moestro.cli import main
from moestro.core.errors import ConfigError, NonFiniteError


HEAVY = {"torch", "transformers", "scipy", "pyarrow", "matplotlib"}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """An application with one verb `act` that raises what the test puts into the dictionary."""
    raised: dict[str, BaseException] = {}
    build = moestro.cli.app

    def app() -> typer.Typer:
        root = build()

        @root.command()
        def act(number: int = typer.Argument(0), name: str = typer.Option("x", "--name")) -> None:
            if "error" in raised:
                raise raised["error"]
            print(f"number {number}")

        return root

    monkeypatch.setattr(moestro.cli, "app", app)
    return raised


def test_a_verb_runs(verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["act", "7"]) == 0
    assert capsys.readouterr().out == "number 7\n"


@pytest.mark.parametrize("error", [ConfigError("lr=-1\nmust be positive"), NonFiniteError("loss is nan at step 3")])
def test_a_users_error_is_one_line_and_status_two(
    error: BaseException, verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    verb["error"] = error
    assert main(["act"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["nothing", "moestro --help"]),
        (["act", "--nmae", "y"], ["--nmae", "--name"]),
        (["act", "seven"], ["number", "integer"]),
        (["study"], ["KEY", "moestro study --help"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(
    arguments: list[str], words: list[str], verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    for word in words:
        assert word.lower() in told.lower()


def test_an_interrupt_is_one_line_and_status_130(
    verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    verb["error"] = KeyboardInterrupt()
    assert main(["act"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_of_ours_keeps_its_traceback(verb: dict[str, BaseException]) -> None:
    verb["error"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["act"])


def test_a_closed_pipe_brings_no_message() -> None:
    # In a process of its own: what is done about it replaces the process's standard output.
    for verb in ("papers --json", "--version"):
        run = subprocess.run(
            f"{sys.executable} -m moestro {verb} | true", shell=True, capture_output=True, text=True, check=False
        )
        assert run.stderr == ""


def test_help_lists_every_verb_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    for word in ("doctor", "papers", "methods", "study", "--version"):
        assert word in told
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moestro {moestro.__version__}\n"


def test_every_verb_file_registers_something() -> None:
    folder = Path(moestro.cli.__file__).parent
    for path in folder.glob("*.py"):
        if not path.stem.startswith("_"):
            assert "def register(app: typer.Typer) -> None:" in path.read_text(), path.name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["papers", "--json"],
        ["methods", "--json"],
        ["catalog", "list", "--json"],
        ["convert", "--help"],
        ["study", "--help"],
        ["doctor", "--quick", "--json"],
    ],
    ids=" ".join,
)
def test_listing_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, json; from moestro.cli import main; "
        f"status = main({arguments!r}); "
        f"print(json.dumps([status, sorted({HEAVY!r} & set(sys.modules))]), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stderr.splitlines()[-1]) == [0, []]
