"""References: folder, hub id, GGUF file, wheel; and each way in which one can be wrong."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from moestro.core.errors import LoadError
from moestro.models.atomic import atomic_folder
from moestro.models.refs import resolve


REVISION = "c0ffee" + "0" * 34


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))


def fill(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model")
    for ref in (tmp_path / "model", str(tmp_path / "model")):
        files = resolve(ref)
        assert (files.kind, files.folder, files.config) == (
            "folder",
            tmp_path / "model",
            {"model_type": "llama"},
        )
        assert files.source().get("w").tolist() == [1, 1, 1]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").folder == tmp_path / "model"


def test_a_folder_of_our_own_must_be_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        fill(folder)
    assert resolve(tmp_path / "model").kind == "folder"
    os.truncate(tmp_path / "model" / "model.safetensors", 20)
    with pytest.raises(LoadError, match=r"model\.safetensors: has 20 bytes but manifest\.json says"):
        resolve(tmp_path / "model")


def test_a_swap_that_was_cut_is_put_back(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        fill(folder)
    (tmp_path / "model").rename(tmp_path / ".model.old-0123456789abcdef")
    assert resolve(tmp_path / "model").folder == tmp_path / "model"


def test_a_manifest_of_another_tool_is_none_of_ours(tmp_path: Path) -> None:
    fill(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text('{"name": "a web page"}')
    assert resolve(tmp_path / "model").kind == "folder"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", r"missing\.gguf: no such file"),
        ("./a/b/c", "no such file or folder, and not a hub id"),
        ("/no/such/folder", "no such file"),
        ("pytorch_model.bin", "no such file"),
        ("-x", "not a hub id"),
        ("", "neither a model folder|no config.json"),
    ],
)
def test_what_is_not_there_is_told_apart(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=message):
        resolve(name)


def test_files_that_are_no_models_say_what_to_do(tmp_path: Path) -> None:
    for name, message in (
        ("model.safetensors", "give the folder"),
        ("model.bin", "pickled checkpoint .* convert it to safetensors"),
        ("model.pt", "pickled"),
        ("notes.txt", "neither a model folder nor a .gguf file"),
        ("noise.gguf", "not a GGUF file"),
    ):
        (tmp_path / name).write_bytes(b"\x80\x04 something that is long enough")
        with pytest.raises(LoadError, match=message):
            resolve(tmp_path / name)


def test_folders_that_are_no_models_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match=r"no config\.json"):
        resolve(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(LoadError, match="pickled"):
        resolve(tmp_path / "empty")
    fill(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(LoadError, match="pickled"):
        resolve(tmp_path / "pickled").source()


def test_remote_code_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    fill(tmp_path / "model", {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Evil"}})
    with pytest.raises(LoadError, match="auto_map"):
        resolve(tmp_path / "model")


def hub_cache(folder: Path, repository: str, config: dict[str, Any] | None = None) -> Path:
    """A repository as the hub's client leaves it: snapshots of links into blobs."""
    base = folder / f"models--{repository.replace('/', '--')}"
    snapshot = base / "snapshots" / REVISION
    fill(base / "blobs", config)
    snapshot.mkdir(parents=True)
    for blob in (base / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(REVISION)
    return snapshot


def test_a_hub_id_goes_through_the_hubs_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path / "hub", "org/name")
    asked = []

    def offline(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return real(repository, cache_dir=tmp_path / "hub", local_files_only=True, **options)

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    files = resolve("org/name")
    assert (files.kind, files.folder) == ("hub", snapshot)
    assert files.source().get("w").tolist() == [1, 1, 1]
    assert resolve(f"org/name@{REVISION}").folder == snapshot
    assert [options["revision"] for _, options in asked] == [None, REVISION]
    # Code and pickles are not even fetched.
    patterns = asked[0][1]["allow_patterns"]
    assert not any("py" in pattern or "bin" in pattern or pattern == "*" for pattern in patterns)
    with pytest.raises(LoadError, match=r"'org/other': not a local path, and the hub did not give it \("):
        resolve("org/other")
    # A local folder of the same spelling wins.
    fill(tmp_path / "org" / "name")
    assert resolve("org/name").kind == "folder"


def test_a_hub_model_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path / "hub", "org/evil", {"auto_map": {"AutoModel": "x"}})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(LoadError, match="auto_map"):
        resolve("org/evil")


def test_a_hub_that_fails_in_any_way_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for error in (OSError("no route\nto host"), RuntimeError(""), ValueError("x" * 1000)):

        def fail(*_: Any, error: Exception = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(LoadError) as caught:
            resolve("org/name")
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 400
