"""Opening checkpoints: names, types, heads, shards, old spellings."""

import json
from inspect import isfunction

import pytest
import torch
from safetensors.torch import load_file, save_file

import moestro
from moestro.core.errors import FamilyError, LoadError
from moestro.core.layer import mixture_layers
from moestro.testing.tiny import tiny_folder


WEIGHTS = "model.safetensors"
IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


def rename(folder, change):
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return tensors


def test_every_tensor_is_read_exactly_once(tmp_path, monkeypatch):
    from moestro.models.source import SafetensorsSource

    tiny_folder("qwen2_moe", tmp_path)
    read = []
    get = SafetensorsSource.get
    monkeypatch.setattr(SafetensorsSource, "get", lambda self, key: (read.append(key), get(self, key))[1])
    moestro.load(tmp_path)
    assert sorted(read) == sorted(load_file(tmp_path / WEIGHTS))


def test_the_model_is_of_the_transformers_class_with_one_method_of_its_own(tmp_path):
    plain = tiny_folder("mixtral", tmp_path)
    model = moestro.load(tmp_path)
    assert isinstance(model, type(plain))
    assert type(model).__name__ == type(plain).__name__
    assert [name for name, value in vars(type(model)).items() if isfunction(value)] == ["save_pretrained"]
    assert model.config.to_dict()["model_type"] == "mixtral"
    assert not model.training


@pytest.mark.parametrize("layout", ["stacked", "split"])
def test_both_packings_of_a_family(tmp_path, layout):
    plain = tiny_folder("mixtral", tmp_path)
    if layout == "stacked":
        plain.save_pretrained(tmp_path, save_original_format=False)
        assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / WEIGHTS)
    model = moestro.load(tmp_path)
    layer = mixture_layers(model)["model.layers.1.mlp"]
    stock = plain.model.layers[1].mlp
    assert torch.equal(layer.bank.gate_up_proj, stock.experts.gate_up_proj)
    assert torch.equal(layer.bank.down_proj, stock.experts.down_proj)
    assert torch.equal(layer.router.weight, stock.gate.weight)


def test_gpt_oss_is_turned_round(tmp_path):
    plain = tiny_folder("gpt_oss", tmp_path)
    bank = mixture_layers(moestro.load(tmp_path))["model.layers.0.mlp"].bank
    stock = plain.model.layers[0].mlp.experts
    assert torch.equal(bank.weight(2, "gate"), stock.gate_up_proj[2, :, ::2].T)
    assert torch.equal(bank.weight(2, "up"), stock.gate_up_proj[2, :, 1::2].T)
    assert torch.equal(bank.weight(2, "down"), stock.down_proj[2].T)
    assert torch.equal(bank.gate_up_proj_bias[2, :48], stock.gate_up_proj_bias[2, ::2])


@pytest.mark.parametrize("size", ["4KB", "30KB"])
def test_shards(tmp_path, size):
    plain = tiny_folder("mixtral", tmp_path / "a")
    plain.save_pretrained(tmp_path / "b", max_shard_size=size)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert (moestro.load(tmp_path / "b")(IDS).logits - plain(IDS).logits).abs().max() <= 1e-5


def test_a_checkpoint_of_the_bare_stack(tmp_path):
    plain = tiny_folder("bert", tmp_path / "a", cls="BertModel")
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "a" / WEIGHTS)
    model = moestro.load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], plain(IDS)[0])


def test_old_names_of_norms(tmp_path):
    plain = tiny_folder("bert", tmp_path)

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    assert any("gamma" in name for name in rename(tmp_path, old))
    with torch.no_grad():
        assert torch.equal(moestro.load(tmp_path)(IDS).logits, plain(IDS).logits)


def test_tensors_that_transformers_leaves_out_too(tmp_path):
    tiny_folder("llama", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / WEIGHTS)
    moestro.load(tmp_path)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
        ("torch.float32", torch.float32),
    ],
)
def test_types(tmp_path, asked, found):
    from moestro.testing.tiny import tiny_model

    tiny_model("deepseek_v3").to(torch.bfloat16).save_pretrained(tmp_path)
    model = moestro.load(tmp_path, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {found}
    assert model.dtype == model.config.dtype == found
    layer = next(iter(mixture_layers(model).values()))
    assert layer.router.selection_bias.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_no_such_type(tmp_path):
    tiny_folder("llama", tmp_path)
    with pytest.raises(LoadError, match="dtype='int8'"):
        moestro.load(tmp_path, dtype="int8")


def test_type_of_the_tensors_where_the_config_has_none(tmp_path):
    tiny_folder("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert moestro.load(tmp_path).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "task", "shape"),
    [
        ("bert", "question-answering", (2, 6)),
        ("bert", "sequence-classification", (2, 4)),
        ("bert", "base", (2, 6, 32)),
        ("mixtral", "base", (2, 6, 32)),
        ("mixtral", "sequence-classification", (2, 4)),
    ],
)
def test_another_head(tmp_path, family, task, shape):
    plain = tiny_folder(family, tmp_path)
    overrides = {"num_labels": 4} if task == "sequence-classification" else None
    model = moestro.load(tmp_path, task=task, overrides=overrides)
    with torch.no_grad():
        out = model(IDS)[0]
    assert out.shape == shape
    assert out.isfinite().all()
    if task == "base":
        with torch.no_grad():
            assert (out - plain.base_model(IDS)[0]).abs().max() <= 1e-5


def test_a_missing_tensor_of_the_body_is_missed_with_another_head_too(tmp_path):
    tiny_folder("bert", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=r"layer 1, output\.dense\.weight"):
        moestro.load(tmp_path, task="question-answering")


def test_no_such_task(tmp_path):
    tiny_folder("mixtral", tmp_path)
    with pytest.raises(LoadError, match="no task 'poetry'"):
        moestro.load(tmp_path, task="poetry")
    with pytest.raises(LoadError, match="no mixtral class for masked-lm"):
        moestro.load(tmp_path, task="masked-lm")


def test_generation_config_is_taken_over(tmp_path):
    tiny_folder("mixtral", tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3, "do_sample": False}))
    model = moestro.load(tmp_path)
    assert model.generation_config.max_new_tokens == 3
    assert model.generate(IDS).shape[1] <= 9


def test_nothing_there(tmp_path):
    with pytest.raises(LoadError, match="no such file or folder"):
        moestro.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match=r"config\.json"):
        moestro.load(tmp_path / "empty")


def test_unknown_family(tmp_path):
    tiny_folder("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mamba2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FamilyError, match="'mamba2' is not a family"):
        moestro.load(tmp_path)


def test_swapped_folders_need_swapping(tmp_path):
    from moestro.models.swap import swap

    tiny_folder("llama", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    swap(model, "train.deepseekmoe", {"expert_size": 12}, layers=[0])
    moestro.save(model, tmp_path / "b")
    with pytest.raises(LoadError, match=r"train\.deepseekmoe.*swap=True"):
        moestro.load(tmp_path / "b", swap=False)


def test_the_file_can_go_once_the_model_is_open(tmp_path):
    plain = tiny_folder("mixtral", tmp_path)
    model = moestro.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with torch.no_grad():
        assert (model(IDS).logits - plain(IDS).logits).abs().max() <= 1e-5


def test_training_never_writes_to_the_file(tmp_path):
    tiny_folder("llama", tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    model = moestro.load(tmp_path)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    assert (tmp_path / WEIGHTS).read_bytes() == before
