"""What `moestro compress` cannot do is one line, before the costly step, and nothing is written."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moestro
from moestro.cli import main
from moestro.data.tokens import byte_tokenizer
from moestro.methods.planning import make_plan
from moestro.testing.tiny import tiny_folder


CALIBRATING = ("prune_experts", "merge_experts", "uncurl", "mc_moe")
PACKING = ("mc_moe", "finequant", "qmoe")
ALL = ("prune_experts", "merge_experts", "uncurl", "compressed_experts", *PACKING)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    tiny_folder("qwen3_moe", tmp_path / "parent", vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    (tmp_path / "texts.txt").write_text("Some words to calibrate on. " * 40)
    return tmp_path / "parent"


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is measured, rounded or written."""

    def costly(*_: Any, **__: Any) -> None:
        pytest.fail("the costly step began")

    from moestro.methods import planning

    monkeypatch.setitem(planning.MEASURES, "experts", costly)
    monkeypatch.setattr("moestro.surgery.bits.pack_layer", costly)
    monkeypatch.setattr("moestro.surgery.bits_disk.pack_layer", costly)


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; status 2, and no file is new."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    assert sorted(folder.rglob("*")) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def compress(method: str, parent: Path, *flags: str) -> list[str]:
    data = ["--data", str(parent.parent / "texts.txt"), "--tokens", "600"]
    groups = ["--group-size", "16"] if method in ("mc_moe", "finequant") else []
    return ["compress", method, str(parent), str(parent.parent / "out"), *groups, *flags, *data]


def edit(folder: Path, change: Any) -> None:
    """Change the tensors of a checkpoint."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        ("mc_moe", ["--avg-bits", "1.2"], "layer 1: a budget of 6 for 5 experts cannot be kept"),
        ("mc_moe", ["--layer-bytes", "100"], "layer 1: a budget of 100 for 5 experts cannot be kept"),
        ("prune_experts", ["--keep", "1"], "keep=1 leaves 1 of 5 experts, but each token chooses 2; keep at least 2"),
        ("prune_experts", ["--keep", "9"], "keep=9, but it has 5 experts; give at most 5, or a share"),
        ("merge_experts", ["--keep", "1", "--router", "mean"], "keep at least 2, or use router=remap"),
        ("uncurl", ["--keep", "7"], "keep=7, but it has 5 experts"),
        ("finequant", ["--group-size", "64"], "group_size=64 is wider than rows of 32 inputs"),
    ],
)
def test_wishes_that_no_measurement_can_save(
    method: str, flags: list[str], words: str, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(compress(method, parent, *flags), parent.parent, capsys)


def starve(tensors: dict[str, torch.Tensor]) -> None:
    """Let every token choose experts 0 and 1 of five in layer 1: the router sees one channel, and that is positive."""
    tensors["model.embed_tokens.weight"][:, 0] = 5.0
    norm = tensors["model.layers.1.post_attention_layernorm.weight"]
    norm.copy_(torch.eye(len(norm))[0])
    router = tensors["model.layers.1.mlp.gate.weight"]
    router.zero_()
    router[:2, 0] = torch.tensor([4.0, 3.0])


@pytest.mark.parametrize("method", [*CALIBRATING, "qmoe"])
def test_data_that_starves_half_of_a_layer(
    method: str, parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(parent, starve)
    kept = ["--keep", "4"] if method in ("prune_experts", "merge_experts", "uncurl") else []
    with monkeypatch.context() as patches:
        patches.setattr("moestro.surgery.bits_disk.pack_layer", lambda *_: pytest.fail("packing began"))
        told = refused(compress(method, parent, *kept), parent.parent, capsys)
    assert "gives 3 of 5 experts of model.layers.1.mlp fewer than 1 tokens" in told
    assert "allow_starved=true" in told
    assert main([*compress(method, parent, *kept), "--allow-starved"]) == 0
    (receipt,) = json.loads((parent.parent / "out" / "receipt.json").read_text())["surgery"]
    listed = receipt["layers"][0] if method == "qmoe" else receipt["notes"]["calibration"]["layers"][0]
    assert listed["starved"] == [2, 3, 4]
    with torch.no_grad():
        assert moestro.load(parent.parent / "out")(torch.arange(20)[None]).logits.isfinite().all()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", ALL)
def test_weights_that_are_nan(method: str, parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "layers.2.mlp.experts" in name and "down_proj" in name)
        tensors[name].view(-1)[:3] = torch.nan

    edit(parent, spoil)
    told = refused(compress(method, parent), parent.parent, capsys)
    assert "3 of" in told
    assert "weights are NaN or infinite; repair the checkpoint first" in told
    assert "layers.2.mlp" in told or "layer 2 expert 0 projection down" in told


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", ALL)
def test_a_checkpoint_that_another_tool_has_quantised(
    method: str, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    told = refused(compress(method, parent), parent.parent, capsys)
    assert "the weights are packed by gptq; Moestro opens floating-point checkpoints and its own formats" in told


def test_float_weights_that_have_been_in_four_bits(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as those of a GGUF file: they can be packed again, and the receipt says what that does."""
    assert main(compress("finequant", parent)) == 0
    assert "have been in 4 bits" not in capsys.readouterr().out
    shutil.rmtree(parent.parent / "out")

    def coarsen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.2.mlp.experts" in name and "down" not in name:
                scale = tensor.abs().amax(-1, keepdim=True) / 7
                tensor.copy_((tensor / scale).round() * scale)

    edit(parent, coarsen)
    assert main(compress("finequant", parent)) == 0
    told = capsys.readouterr().out
    assert "warning: the weights of 2/gate, 2/up have been in 4 bits or fewer before" in told
    (receipt,) = json.loads((parent.parent / "out" / "receipt.json").read_text())["surgery"]
    assert any("start from the float checkpoint" in text for text in receipt["warnings"])


def packed(parent: Path, layers: list[int]) -> None:
    """Pack some layers of a checkpoint in its place."""
    model = moestro.load(parent)
    plan = make_plan("compress.finequant", model, {"group_size": 16})
    wide = [layer for layer in (1, 2) if layer not in layers]
    keep = {key: value for key, value in plan.bits.items() if int(key.split("/")[0]) in layers}
    formats = {key: plan.formats[key] for key in keep}
    moestro.apply(model, plan.model_copy(update={"bits": keep, "formats": formats, "wide": wide}))
    moestro.save(model, parent.parent / "packed")
    shutil.rmtree(parent)
    (parent.parent / "packed").rename(parent)
    byte_tokenizer().save_pretrained(parent)


@pytest.mark.parametrize("layers", [[1, 2], [2]])
def test_a_checkpoint_of_ours_that_is_packed_already(
    layers: list[int], parent: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    packed(parent, layers)
    request.getfixturevalue("unmeasured")
    for method in ALL:
        told = refused(compress(method, parent), parent.parent, capsys)
        assert "PackedFFN" in told, method
        assert len(told) < 300


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", ALL)
def test_a_family_that_nobody_knows(method: str, parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    assert "opt" in refused(compress(method, parent), parent.parent, capsys)


@pytest.mark.parametrize("method", ALL)
def test_a_model_larger_than_the_disk(
    method: str, parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noticed before anything is measured where even what stays is too large, else before anything changes."""
    shared = sum(p.numel() * 4 for n, p in moestro.load(parent).named_parameters() if ".mlp." not in n)
    touched: list[str] = []
    monkeypatch.setattr("moestro.surgery.bits_disk.pack_layer", lambda *_: pytest.fail("packing began"))
    monkeypatch.setattr("moestro.surgery.apply", lambda *_, **__: touched.append("apply"), raising=True)
    if method not in ("finequant", "qmoe"):
        for free in (shared // 2, shared + 100):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**12, 0, free))
            told = refused(compress(method, parent), parent.parent, capsys)
            assert f"{free:,} are free; name a place on a larger disk" in told
        assert not touched
    monkeypatch.undo()
    monkeypatch.setattr("moestro.surgery.bits_disk.pack_layer", lambda *_: pytest.fail("packing began"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 1000))
    told = refused(compress(method, parent), parent.parent, capsys)
    assert "1,000 are free; name a place on a larger disk" in told


def test_a_conversion_larger_than_the_disk(
    parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way a model is written, the room is known before the first tensor is."""
    dense = parent.parent / "dense"
    tiny_folder("llama", dense, vocab_size=300)
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, size + 100))
    monkeypatch.setattr("moestro.models.writer.write_file", lambda *_, **__: pytest.fail("writing began"))
    arguments = ["convert", "upcycle", str(dense), str(parent.parent / "out"), "--num-experts", "4", "--top-k", "2"]
    assert f"{size + 100:,} are free" in refused(arguments, parent.parent, capsys)
    model = moestro.load(dense)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 100))
    with pytest.raises(moestro.MoestroError, match="100 are free; name a place on a larger disk"):
        moestro.save(model, parent.parent / "copy")
    assert not (parent.parent / "copy").exists()


def test_donors_of_another_shape(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Joined by the verb for conversions; other tokenizers are refused with the tests of that method."""
    other = parent.parent / "other"
    tiny_folder("qwen3_moe", other, vocab_size=300, moe_intermediate_size=32)
    byte_tokenizer().save_pretrained(other)
    arguments = ["convert", "aggregate_experts", str(parent), str(other), str(parent.parent / "out")]
    told = refused(arguments, parent.parent, capsys)
    assert "inner" in told
