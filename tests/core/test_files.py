"""Single files appear whole or not at all."""

import os
from pathlib import Path

import pytest
import torch

from moestro.core.errors import SaveError
from moestro.core.files import whole_file, write_text
from moestro.core.plan import BitPlan
from moestro.core.report import Report


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", "old\n")

    def cut() -> None:
        with whole_file(path) as draft:
            draft.write_text("half")
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        cut()
    assert path.read_text() == "old\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert write_text(path, "new\n").read_text() == "new\n"


def test_a_link_keeps_pointing_at_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a").read_text() == "x"


def test_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    plan, report = BitPlan(method="m", bits={}), Report(method="m")
    for path, words in (
        (tmp_path / "nowhere" / "p.json", "No such file"),
        (tmp_path / "file" / "p.json", "Not a directory"),
        (tmp_path, "is not a file"),
        (tmp_path / ("n" * 300), "name too long"),
        (tmp_path / "pipe", "is not a file"),
    ):
        for save in (plan.save, report.save):
            with pytest.raises(SaveError, match=words) as caught:
                save(path)
            assert str(caught.value).startswith(f"{path}: ")
            assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_full_disk_leaves_neither_half_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    plan = BitPlan(method="m", bits={})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, kept[1]))
        for tensors in (None, {"big": torch.zeros(4096)}):
            with pytest.raises(SaveError, match="cannot be written"):
                plan.save(tmp_path / "p.json", tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert list(tmp_path.iterdir()) == []
