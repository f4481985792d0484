"""Single files that are written whole or left as they were."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from moestro.core.errors import SaveError


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a name beside ``path``; what the block writes there becomes ``path`` in one step once it is on disk.

    Raises:
        SaveError: a folder or a device stands there, or the disk refuses; ``path`` is then what it was before.
    """
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{target.name[:100]}.tmp-{secrets.token_hex(8)}")
    try:
        if target.exists() and not target.is_file():
            raise SaveError(f"{path}: exists and is not a file; give another name")
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        raise SaveError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole. Raises SaveError as ``whole_file`` does."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return Path(path)


def cache_root() -> Path:
    """Where what is made once is kept: `$MOESTRO_CACHE`, or `~/.cache/moestro`."""
    return Path(os.environ.get("MOESTRO_CACHE") or "~/.cache/moestro").expanduser()
