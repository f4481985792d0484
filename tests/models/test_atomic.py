"""Atomic folders: a save ends with a whole folder or with the one that stood there before."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moestro.core.errors import LoadError, SaveError
from moestro.models import atomic
from moestro.models.atomic import atomic_folder, leftovers, recover, verify_folder


def save(target: Path, text: str = "one", **options: bool) -> None:
    with atomic_folder(target, **options) as folder:
        (folder / "sub").mkdir()
        (folder / "config.json").write_text(text)
        (folder / "sub" / "more.bin").write_bytes(b"\0" * 1000)


def cut(target: Path, error: BaseException) -> None:
    """A save over `target` that ends with `error` in the middle of its block."""
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("partial")
        raise error


def save_short(target: Path) -> None:
    with atomic_folder(target) as folder:
        save_file({"w": torch.zeros(100)}, folder / "model.safetensors")
        os.truncate(folder / "model.safetensors", 200)


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_save_leaves_the_folder_its_manifest_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path / "a" / "out")
    assert siblings(tmp_path / "a" / "out") == ["out"]
    entries = verify_folder(tmp_path / "a" / "out", deep=True)
    assert {name: entry.size for name, entry in entries.items()} == {"config.json": 3, "sub/more.bin": 1000}
    # sha256 of b"one", from `printf one | sha256sum`
    assert entries["config.json"].sha256 == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


def test_the_block_writes_outside_the_target_until_it_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "x"


def test_overwriting_is_asked_for_and_replaces_only_our_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out)
    with pytest.raises(SaveError, match="exists already"):
        save(out, "two")
    save(out, "two", overwrite=True)
    assert (out / "config.json").read_text() == "two"
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(SaveError, match="did not save"):
        save(home, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"
    with pytest.raises(SaveError, match="not a folder"):
        save(home / "thesis.txt", overwrite=True)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    assert siblings(out) == ["empty", "home", "out"]


def test_an_exception_in_the_block_keeps_the_former_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out)
    for error in (ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "gone")):
        with pytest.raises(type(error)):
            cut(out, error)
        assert verify_folder(out, deep=True).keys() == {"config.json", "sub/more.bin"}
        assert siblings(out) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_or_failing_disk_is_one_line_and_the_former_folder_stays(tmp_path: Path, code: int) -> None:
    out = tmp_path / "out"
    save(out)
    with pytest.raises(SaveError, match=r"out: saving failed after 7 bytes") as caught:
        cut(out, OSError(code, os.strerror(code)))
    assert "\n" not in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert (out / "config.json").read_text() == "one"
    assert siblings(out) == ["out"]


def test_an_error_at_any_system_call_of_the_commit_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC at the n-th fsync or rename, for every n: the old or the new folder is whole, never a mix."""
    out = tmp_path / "out"
    save(out, "old")
    state = {"left": 0}

    def failing(real):
        def call(*args, **kwargs):
            state["left"] -= 1
            if state["left"] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(atomic.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    outcomes = []
    for n in range(1, 20):
        state["left"] = n
        try:
            save(out, "new", overwrite=True)
            outcomes.append("saved")
        except SaveError:
            outcomes.append("failed")
        # The directory sync after the swap can fail too: then the new folder stands, and the save says so.
        verify_folder(out, deep=True)
        assert (out / "config.json").read_text() in ("old", "new")
        assert len(siblings(out)) <= 2
    assert outcomes[:8] == ["failed"] * 8
    assert outcomes[-1] == "saved"


def test_the_safetensors_writers_own_error_is_explained_too(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="saving failed"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="os error 2"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("no such file (os error 2)")
    assert siblings(tmp_path / "out") == []


LIMITED = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from moestro.core.errors import SaveError
from moestro.models.atomic import atomic_folder
from moestro.models.source import MemorySource
from moestro.models.writer import write_source

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {"w": torch.ones(100_000)}
writers = {
    "plain": lambda folder: (folder / "x").write_bytes(bytes(400_000)),
    "library": lambda folder: save_file(tensors, folder / "model.safetensors"),
    "ours": lambda folder: write_source(MemorySource(tensors), folder),
}
for write in writers.values():
    try:
        with atomic_folder(sys.argv[1], overwrite=True) as folder:
            write(folder)
    except SaveError as error:
        print(error)
"""


def test_a_real_refusal_of_the_system_in_mid_write(tmp_path: Path) -> None:
    """A limit on file sizes stops three kinds of writers after a part, as a full disk does."""
    save(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    for line in done.stdout.splitlines():
        assert line.startswith(f"{tmp_path / 'out'}: saving failed after")
        assert "File too large" in line
    verify_folder(tmp_path / "out", deep=True)
    assert siblings(tmp_path / "out") == ["out"]


def test_a_short_write_is_found_before_the_folder_is_shown(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="written short"):
        save_short(tmp_path / "out")
    assert siblings(tmp_path / "out") == []


def test_links_and_a_manifest_of_the_callers_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="plain files"), atomic_folder(tmp_path / "out") as folder:
        (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(SaveError, match="plain files"), atomic_folder(tmp_path / "out") as folder:
        (folder / "manifest.json").write_text("{}")


def test_readers_refuse_what_is_missing_short_or_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out)
    (out / "config.json").write_text("two")
    verify_folder(out)  # same size: the quick look cannot see it
    with pytest.raises(LoadError, match=r"config\.json: its content does not have the sha256"):
        verify_folder(out, deep=True)
    (out / "config.json").write_text("three")
    with pytest.raises(LoadError, match=r"has 5 bytes but manifest\.json says 3"):
        verify_folder(out)
    (out / "config.json").unlink()
    with pytest.raises(LoadError, match=r"config\.json: missing"):
        verify_folder(out)
    (out / "manifest.json").unlink()
    with pytest.raises(LoadError, match="is not complete"):
        verify_folder(out)
    with pytest.raises(LoadError, match="does not exist"):
        verify_folder(tmp_path / "never")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"format": "other"}',
        '{"format": "moestro-folder", "version": 1, "files": 3}',
        '{"format": "moestro-folder", "version": 1, "files": {"../x": {"size": 1, "sha256": ""}}}',
        '{"format": "moestro-folder", "version": 1, "files": {"/etc/passwd": {"size": 1, "sha256": ""}}}',
        '{"format": "moestro-folder", "version": 1, "files": {"a": {"size": true, "sha256": ""}}}',
        '{"format": "moestro-folder", "version": 1, "files": {"a": [1]}}',
    ],
)
def test_a_damaged_manifest_is_a_load_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(LoadError, match="manifest"):
        verify_folder(tmp_path)


def test_leftovers_are_listed_and_swept_but_look_alikes_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ours = tmp_path / ".out.tmp-0123456789abcdef"
    for folder in (
        ours,
        tmp_path / ".out.tmp-notours",
        tmp_path / ".other.tmp-0123456789abcdef",
        tmp_path / "out.tmp",
    ):
        folder.mkdir()
        (folder / "x").write_text("x")
    assert leftovers(out) == [ours]
    save(out)
    assert siblings(out) == [".other.tmp-0123456789abcdef", ".out.tmp-notours", "out", "out.tmp"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, "old")
    out.rename(tmp_path / ".out.old-0123456789abcdef")
    (tmp_path / ".out.tmp-0123456789abcdef").mkdir()
    recover(out)
    assert (out / "config.json").read_text() == "old"
    verify_folder(out, deep=True)
    assert siblings(out) == ["out"]


def test_the_former_folder_is_kept_when_the_new_one_was_damaged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, "old")
    former = out.rename(tmp_path / ".out.old-0123456789abcdef")
    out.mkdir()
    (out / "config.json").write_text("torn")
    recover(out)
    assert (former / "config.json").read_text() == "old"


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", "two", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "manifest.json").read_text())["files"]["config.json"]["size"] == 3
    assert (tmp_path / "real" / "config.json").read_text() == "two"


def _hold(target: Path, ready, release) -> None:
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text("winner")
        ready.set()
        release.wait(30)


def test_of_two_savers_one_wins_and_the_other_is_told_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(out, ready, release))
    other.start()
    try:
        assert ready.wait(30)
        start = time.monotonic()
        with pytest.raises(SaveError, match=rf"another process \(pid {other.pid}\) is saving there"):
            save(out, "loser", overwrite=True)
        assert time.monotonic() - start < 2
        recover(out)  # must not sweep the living save away
    finally:
        release.set()
        other.join(30)
    assert other.exitcode == 0
    assert (out / "config.json").read_text() == "winner"
    save(out, "next", overwrite=True)
    assert siblings(out) == ["out"]


def test_two_threads_exclude_each_other_as_well(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out"), pytest.raises(SaveError, match="another process"):
        save(tmp_path / "out")
