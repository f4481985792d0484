"""Folders that are either complete or not there: checkpoints, saved models, the cache.

A save writes into a hidden temporary folder beside the target, syncs every file, hashes them into
`manifest.json`, syncs again and renames. `manifest.json` in the target is the mark of completeness: readers
accept a folder that has it and whose files match. Beside a target `out` there can be

    .out.lock            held (flock) while a process saves; the loser of two savers is told at once
    .out.tmp-<16 hex>    a save under way, or one that was killed
    .out.old-<16 hex>    the former folder, between the two renames of a swap

A kill at any point leaves the old folder, the new folder, or (between the two renames) the old one under its
`.old-` name, from where `recover` puts it back. Leftovers of killed saves are swept by the next save and are
never fatal. Only names of these shapes are ever deleted: a folder without a manifest is somebody else's.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moestro.core.errors import LoadError, SaveError
from moestro.models.headers import MAX_JSON_BYTES, parse_json_object, read_safetensors_header, shown


MANIFEST = "manifest.json"
FORMAT = "moestro-folder"
VERSION = 1
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


class BusyError(SaveError):
    """Another process is saving to the same target."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of a folder."""

    size: int
    sha256: str


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends without an exception it becomes `target`, whole.

    With `overwrite` an existing folder that this function wrote is replaced: it stays in place until the new
    one is complete on disk. A folder with files but without our manifest is never replaced. On an exception,
    `target` is as it was and the temporary folder is gone. Raises `SaveError`: target exists, another process
    saves to it, disk full or failing (the message names the file and the free space), a safetensors file that
    was written short.
    """
    target = Path(os.path.realpath(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{target.parent}: cannot be made ({error.strerror})") from None
    with _locked(target):
        _settle(target)
        _check_replaceable(target, overwrite)
        temporary = target.parent / f".{target.name}.tmp-{secrets.token_hex(8)}"
        try:
            temporary.mkdir()
            yield temporary
            _seal(temporary)
            _swap(temporary, target)
        except OSError as error:
            _explain(error, temporary, target)
        except Exception as error:
            # The safetensors writer hides the operating system's error in the text of a type of its own.
            if match := re.search(r"\(os error (\d+)\)", str(error)):
                _explain(OSError(int(match[1]), os.strerror(int(match[1]))), temporary, target, error)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_room(target: str | Path, nbytes: int) -> None:
    """Raise SaveError where a folder of so many bytes does not fit on the disk that ``target`` would be on."""
    target = Path(target)
    there = next(parent for parent in (target.absolute(), *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if nbytes > free:
        raise SaveError(f"{target}: the model takes {nbytes:,} bytes, {free:,} are free; name a place on a larger disk")


def verify_folder(path: str | Path, *, deep: bool = False) -> dict[str, FileEntry]:
    """Check that a folder is complete: its manifest is there and every file in it has its size (`deep`: and
    its sha256).

    Returns relative file name -> entry. Raises `LoadError` that names the file. Files the manifest does not
    list are left alone. A target that a kill left between two renames must be put back by `recover` first.
    """
    path = Path(path)
    entries = read_manifest(path)
    for name, entry in entries.items():
        file = path / name
        try:
            size = file.stat().st_size if file.is_file() else -1
        except OSError as error:
            raise LoadError(f"{file}: cannot be read ({error.strerror})") from None
        if size < 0:
            raise LoadError(f"{file}: missing, though {MANIFEST} lists it; the folder was changed after it was saved")
        if size != entry.size:
            raise LoadError(
                f"{file}: has {size} bytes but {MANIFEST} says {entry.size}; the folder was changed after it "
                "was saved "
                f"(put the file back, or delete {MANIFEST} to load the folder unchecked)"
            )
        if deep and hash_file(file) != entry.sha256:
            raise LoadError(f"{file}: its content does not have the sha256 that {MANIFEST} says; the file is damaged")
    return entries


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """Parse a folder's manifest. Raises `LoadError` when it is missing or malformed."""
    file = path / MANIFEST
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise LoadError(f"{file}: too large for a manifest")
        raw = file.read_bytes()
    except FileNotFoundError:
        state = "is not complete: it has no" if path.is_dir() else "does not exist: no"
        raise LoadError(f"{path}: {state} {MANIFEST}; was the save cut? use another checkpoint") from None
    except OSError as error:
        raise LoadError(f"{file}: cannot be read ({error.strerror})") from None
    content = parse_json_object(raw, str(file))
    if (
        content.get("format") != FORMAT
        or content.get("version") != VERSION
        or not isinstance(content.get("files"), dict)
    ):
        raise LoadError(f"{file}: is not a manifest of format {FORMAT} version {VERSION}")
    return {name: _checked_entry(name, entry, file) for name, entry in content["files"].items()}


def has_manifest(path: str | Path) -> bool:
    """Whether a folder carries one of our manifests (other tools write a `manifest.json` too)."""
    try:
        read_manifest(Path(path))
    except LoadError:
        return False
    return True


def check_complete(folder: Path) -> None:
    """Raise `LoadError` for a folder that Moestro saved and that is not whole. Folders of others are not judged."""
    if has_manifest(folder):
        verify_folder(folder)
    elif (folder / MANIFEST).exists() and (folder / "receipt.json").exists():
        read_manifest(folder)  # ours, and damaged: says how


def recover(target: str | Path) -> None:
    """Put back what a killed save left between its two renames, and sweep its leftovers. Does nothing while
    one saves.
    """
    target = Path(os.path.realpath(target))
    if not leftovers(target):
        return
    with contextlib.suppress(SaveError, OSError), _locked(target):
        _settle(target)


def leftovers(target: str | Path) -> list[Path]:
    """Temporary and former folders that killed saves to `target` left beside it, sorted by name."""
    target = Path(os.path.realpath(target))
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-[0-9a-f]{{16}}")
    if not target.parent.is_dir():
        return []
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def hash_file(path: Path) -> str:
    """The sha256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_entry(name: str, entry: Any, file: Path) -> FileEntry:
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\\" in name or ":" in name:
        raise LoadError(f"{file}: {shown(name)} is not a relative file name")
    if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("sha256"), str):
        raise LoadError(f"{file}: the entry of {shown(name)} needs a size and a sha256")
    return FileEntry(entry["size"], entry["sha256"])


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock file; another holder is a `SaveError` at once, since it may save for minutes."""
    path = target.parent / f".{target.name}.lock"
    descriptor = _acquire(path, target)
    try:
        yield
    finally:
        # Removed while held: whoever waits for this inode notices below that the name has gone.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, target: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SaveError(f"{target}: cannot be written ({error.strerror}: {path})") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except FileNotFoundError:
            pass  # the former holder removed the name between our open and our lock: try again
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise BusyError(
                f"{target}: another process (pid {holder}) is saving there; save to another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise SaveError(f"{target}: cannot be locked ({error.strerror}: {path})") from None
        os.close(descriptor)


def _settle(target: Path) -> None:
    """Under the lock: undo a half-done swap and delete what killed saves left."""
    former = [path for path in leftovers(target) if f"{target.name}.old-" in path.name]
    if former and not target.exists():
        newest = max(former, key=lambda path: path.stat().st_mtime_ns)
        former.remove(newest)
        newest.rename(target)
        _sync_folder(target.parent)
    keep = former if former and not has_manifest(target) else []
    for path in leftovers(target):
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SaveError(f"{target}: exists and is not a folder; choose another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise SaveError(f"{target}: exists already; choose another name or allow overwriting")
    if not has_manifest(target):
        raise SaveError(
            f"{target}: holds files that Moestro did not save (no {MANIFEST}); choose another name or empty it"
        )


def _seal(folder: Path) -> None:
    """Sync all files, write the manifest last, sync the folders. A safetensors file that was written short is
    an error.
    """
    entries: dict[str, dict[str, Any]] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            folders.append(path)
            continue
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or name == MANIFEST:
            raise SaveError(
                f"{path}: a saved folder holds plain files only, and {MANIFEST} is written last by the save"
            )
        if path.suffix == ".safetensors":
            try:
                read_safetensors_header(path)
            except LoadError as error:
                raise SaveError(f"{error} (written short?)") from None
        _sync_file(path)
        entries[name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "version": VERSION, "files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in reversed(folders):
        _sync_folder(path)


def _swap(temporary: Path, target: Path) -> None:
    """Rename into place. Where a folder stands, it goes to its `.old-` name first and is deleted last."""
    former = None
    if target.exists():
        former = target.parent / f".{target.name}.old-{secrets.token_hex(8)}"
        target.rename(former)
    try:
        temporary.rename(target)
    except OSError:
        if former is not None:
            former.rename(target)
        raise
    _sync_folder(target.parent)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, temporary: Path, target: Path, raised: Exception | None = None) -> NoReturn:
    """Turn a failing disk into one line; an error that has nothing to do with the save goes on as it is."""
    if error.errno not in _DISK_ERRORS:
        raise raised or error
    written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()) if temporary.exists() else 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(target.parent).free
        raise SaveError(
            f"{target}: saving failed after {written} bytes ({error.strerror}; {free} bytes free); "
            "nothing half-written is left; free space or choose another disk"
        ) from None
    raise SaveError(f"{target}: saving failed after {written} bytes ({error.strerror})") from None
