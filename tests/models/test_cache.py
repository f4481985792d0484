"""The cache: made once, never out of date, repaired when damaged, shared by processes."""

import os
import threading
import time
from pathlib import Path

import pytest

from moestro.core.errors import LoadError
from moestro.models import cache
from moestro.models.atomic import atomic_folder, verify_folder
from moestro.models.cache import cache_root, cached_folder, file_key


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Build:
    """Counts how often it had to work."""

    def __init__(self, seconds: float = 0) -> None:
        self.calls, self.seconds = 0, seconds

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        time.sleep(self.seconds)
        (folder / "data").write_text("made")


def test_the_cache_is_where_the_variable_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root() == root
    monkeypatch.setenv("MOESTRO_CACHE", "~/elsewhere")
    assert cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("MOESTRO_CACHE")
    assert cache_root() == Path.home() / ".cache" / "moestro"


def test_an_entry_is_made_once_and_named_for_people(root: Path) -> None:
    build = Build()
    folder = cached_folder("../My model (v2).gguf", "0123456789abcdef99", build)
    assert folder == root / "My-model-v2-.gguf-0123456789abcdef"
    assert cached_folder("../My model (v2).gguf", "0123456789abcdef99", build) == folder
    assert build.calls == 1
    verify_folder(folder, deep=True)
    cached_folder("../My model (v2).gguf", "f" * 64, build)
    assert build.calls == 2


def test_a_damaged_entry_is_made_again(root: Path) -> None:
    build = Build()
    folder = cached_folder("x", "k" * 16, build)
    os.truncate(folder / "data", 2)
    assert (cached_folder("x", "k" * 16, build) / "data").read_text() == "made"
    (folder / "data").unlink()
    cached_folder("x", "k" * 16, build)
    assert build.calls == 3
    verify_folder(folder, deep=True)


def test_threads_that_want_one_entry_make_it_once(root: Path) -> None:
    build, found = Build(seconds=0.3), []
    threads = [threading.Thread(target=lambda: found.append(cached_folder("x", "k" * 16, build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_build_that_fails_leaves_nothing_and_its_own_error(root: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise LoadError("x.gguf: is damaged")

    with pytest.raises(LoadError, match=r"^x\.gguf: is damaged$"):
        cached_folder("x", "k" * 16, build)
    assert list(root.iterdir()) == []


def test_too_little_room_is_told_before_any_work(root: Path) -> None:
    build = Build()
    with pytest.raises(LoadError, match=r"1000000000000000000 bytes are needed and \d+ are free .*MOESTRO_CACHE"):
        cached_folder("x", "k" * 16, build, nbytes=10**18)
    assert build.calls == 0


def test_a_folder_that_is_not_ours_is_not_replaced(root: Path) -> None:
    (root / "x-kkkkkkkkkkkkkkkk").mkdir(parents=True)
    (root / "x-kkkkkkkkkkkkkkkk" / "thesis.txt").write_text("mine")
    with pytest.raises(LoadError, match="did not save"):
        cached_folder("x", "k" * 16, Build())
    assert (root / "x-kkkkkkkkkkkkkkkk" / "thesis.txt").read_text() == "mine"


def test_a_cache_that_cannot_be_written_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "file").write_text("")
    monkeypatch.setenv("MOESTRO_CACHE", str(root.parent / "file" / "cache"))
    with pytest.raises(LoadError, match=r"cannot be made .*MOESTRO_CACHE"):
        cached_folder("x", "k" * 16, Build())


def test_an_entry_under_way_is_waited_for(root: Path) -> None:
    target, build = root / "x-kkkkkkkkkkkkkkkk", Build()
    entered, found = threading.Event(), []

    def other() -> None:
        with atomic_folder(target) as folder:
            (folder / "data").write_text("by another")
            entered.set()
            time.sleep(0.5)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    found.append(cached_folder("x", "k" * 16, build))
    thread.join()
    assert (found[0] / "data").read_text() == "by another"
    assert build.calls == 0


def test_the_key_of_a_file_follows_size_time_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(3 << 20))
    os.utime(path, ns=(10, 10))
    keys = [file_key(path)]
    assert file_key(path) == keys[0]
    os.utime(path, ns=(11, 11))
    keys.append(file_key(path))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(11, 11))
    keys.append(file_key(path))
    path.write_bytes(bytes((3 << 20) + 1))
    os.utime(path, ns=(11, 11))
    keys.append(file_key(path))
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    keys.append(file_key(path))
    assert len(set(keys)) == 5
    path.write_bytes(b"tiny")
    file_key(path)
