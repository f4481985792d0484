"""Damaged checkpoints are refused before a tensor is read, with layer, expert, projection and file in the message."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import moestro
from moestro.core.errors import LoadError, MoestroError
from moestro.models.checkpoint import open_checkpoint
from moestro.models.families import families
from moestro.models.load import dressed
from moestro.models.matching import match
from moestro.models.sizing_read import read_size
from moestro.models.skeleton import config_from, model_class
from moestro.testing.tiny import tiny_folder


TRIALS = 500
WEIGHTS = "model.safetensors"


class Headers:
    """Names and shapes of a checkpoint, to be damaged."""

    def __init__(self, shapes):
        self.shapes = dict(shapes)

    def keys(self):
        return list(self.shapes)

    def shape(self, key):
        return self.shapes[key]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ("mixtral", "qwen2_moe", "deepseek_v3", "switch_transformers"):
        made[name] = tmp_path_factory.mktemp(name)
        tiny_folder(name, made[name])
    return made


def opened_skeleton(folder):
    opened = open_checkpoint(folder)
    spec = families()[opened.config["model_type"]]
    config = config_from(opened.config, "config.json")
    return opened, dressed(model_class(config, None), config, spec, []), spec


EXPERT = re.compile(r"\.(?P<layer>\d+)\.(?:\w+\.)*?experts\.(?:expert_)?(?P<expert>\d+)\.(?P<projection>\w+)\.weight$")


def damage(kind, shapes, key, rng):
    """Damage one expert's tensor; returns the headers, and the name a message must speak of."""
    shapes = dict(shapes)
    if kind == "transpose":
        shapes[key] = shapes[key][::-1]
        return shapes, key
    shape = shapes[key]
    if kind in ("drop", "rename"):
        del shapes[key]
    if kind == "rename":
        found = EXPERT.search(key)
        start, end = found.span("projection")
        other = rng.choice([f"{found['projection']}x", f"{found['projection']}_2", found["projection"].upper()])
        shapes[key[:start] + other + key[end:]] = shape
    if kind == "duplicate":
        found = EXPERT.search(key)
        start, end = found.span("expert")
        extra = key[:start] + str(100 + rng.randrange(50)) + key[end:]
        shapes[extra] = shape
        return shapes, extra
    return shapes, key


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "switch_transformers"])
def test_any_damage_to_any_expert_is_found(folders, name):
    opened, model, spec = opened_skeleton(folders[name])
    keys = opened.source.keys()
    shapes = {key: opened.source.shape(key) for key in keys}
    experts = [key for key in shapes if EXPERT.search(key)]
    assert len(experts) >= 20
    match(model, replace(opened, source=Headers(shapes)), spec)  # the sound one passes
    rng = random.Random(name)
    for _ in range(TRIALS // 4):
        kind = rng.choice(["drop", "rename", "duplicate", "transpose"])
        damaged, guilty = damage(kind, shapes, rng.choice(experts), rng)
        with pytest.raises(LoadError) as error:
            match(model, replace(opened, source=Headers(damaged)), spec)
        message, where = str(error.value), EXPERT.search(guilty)
        words = f"layer {where['layer']}, expert {where['expert']}, {where['projection']}"
        assert words in message, f"{kind}: {message}"
        assert guilty in message
        assert "\n" not in message
        if kind == "transpose":
            assert "transposed" in message
            assert WEIGHTS in message


@pytest.mark.parametrize("kind", ["drop", "rename", "duplicate", "transpose"])
def test_damage_in_a_real_file(folders, tmp_path, kind):
    tensors = load_file(folders["mixtral"] / WEIGHTS)
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    if kind == "duplicate":
        tensors[key.replace("experts.3", "experts.5")] = tensors[key].clone()
    elif kind == "transpose":
        tensors[key] = tensors[key].T.contiguous()
    else:
        moved = tensors.pop(key)
        if kind == "rename":
            tensors[key.replace("w2", "w4")] = moved
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((folders["mixtral"] / "config.json").read_text())
    number = 5 if kind == "duplicate" else 3
    with pytest.raises(LoadError, match=rf"layer 1, expert {number}, w2.*{WEIGHTS if kind != 'drop' else ''}"):
        moestro.load(tmp_path)


def test_one_tensor_in_two_shards(folders, tmp_path):
    tensors = load_file(folders["mixtral"] / WEIGHTS)
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    save_file({key: tensors[key]}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    index = {"weight_map": weight_map | {key: "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((folders["mixtral"] / "config.json").read_text())
    with pytest.raises(LoadError, match=re.escape(key)):
        moestro.load(tmp_path)


def changed_config(folder, target, **changes):
    """The same weights under a config with other values."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    (target / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    return target


def test_more_experts_in_the_config_than_in_the_file(folders, tmp_path):
    folder = changed_config(folders["mixtral"], tmp_path, num_local_experts=6)
    with pytest.raises(LoadError, match=r"router.* 6 rows, the tensor has 5"):
        moestro.load(folder)


def test_fewer_experts_in_the_config_than_in_the_file(folders, tmp_path):
    folder = changed_config(folders["mixtral"], tmp_path, num_local_experts=4)
    with pytest.raises(LoadError, match=r"router.* 4 rows, the tensor has 5"):
        moestro.load(folder)


def test_top_k_above_the_number_of_experts(folders, tmp_path):
    folder = changed_config(folders["mixtral"], tmp_path, num_experts_per_tok=9)
    with pytest.raises(LoadError, match=r"config\.json.*top_k=9.*5"):
        moestro.load(folder)


def test_groups_that_do_not_divide(folders, tmp_path):
    folder = changed_config(folders["deepseek_v3"], tmp_path, n_group=3)
    with pytest.raises(LoadError, match=r"num_groups=3.*8"):
        moestro.load(folder)


def test_packed_weights_are_refused(folders, tmp_path):
    folder = changed_config(folders["mixtral"], tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(LoadError, match="packed by fp8"):
        moestro.load(folder)


def test_remote_code_is_refused(folders, tmp_path):
    folder = changed_config(folders["mixtral"], tmp_path, auto_map={"AutoModel": "evil.py"})
    with pytest.raises(LoadError, match="auto_map"):
        moestro.load(folder)


@pytest.mark.parametrize("name", ["AutoModel", "os", "../x", "MixtralConfig", "LlamaForCausalLM"])
def test_architectures_that_are_not_the_familys(folders, tmp_path, name):
    folder = changed_config(folders["mixtral"], tmp_path, architectures=[name])
    with pytest.raises(LoadError, match="architecture"):
        moestro.load(folder)


def test_values_that_transformers_refuses(folders, tmp_path):
    folder = changed_config(folders["mixtral"], tmp_path, hidden_size="wide")
    with pytest.raises(LoadError, match="hidden_size"):
        moestro.load(folder)


def test_tied_tensors_that_differ(tmp_path):
    tiny_folder("llama", tmp_path / "a", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert "lm_head.weight" not in tensors
    same = tensors["model.embed_tokens.weight"].clone()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    save_file({**tensors, "lm_head.weight": same}, tmp_path / "b" / WEIGHTS)
    model = moestro.load(tmp_path / "b")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same[3, 3] += 1
    save_file({**tensors, "lm_head.weight": same}, tmp_path / "b" / WEIGHTS)
    with pytest.raises(LoadError, match="tie_word_embeddings"):
        moestro.load(tmp_path / "b")


def test_a_tied_tensor_under_its_other_name(tmp_path):
    plain = tiny_folder("llama", tmp_path / "a", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    model = moestro.load(tmp_path / "a")
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)


def test_a_square_expert_transposed_is_caught_by_the_manifest_only(tmp_path):
    """Shapes cannot tell a transposed square matrix; the hashes of a folder that Moestro wrote can."""
    tiny_folder("mixtral", tmp_path / "a", intermediate_size=32)
    moestro.save(moestro.load(tmp_path / "a"), tmp_path / "own")
    tensors = load_file(tmp_path / "own" / WEIGHTS)
    key = "model.layers.0.mlp.bank.down_proj"
    tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "own" / WEIGHTS, metadata={"format": "pt"})
    from moestro.models.atomic import verify_folder

    with pytest.raises(LoadError, match=r"sha256|bytes but"):
        verify_folder(tmp_path / "own", deep=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ["mixtral"]}, "not a family"),
        ({"architectures": 7}, "architectures=7 must be a list"),
        ({"hidden_act": "zilu"}, "cannot be built from these values .*zilu"),
        ({"rope_parameters": {"rope_type": "wobble"}}, "cannot be built from these values .*wobble"),
        ({"hidden_size": 2**40}, "cannot be built from these values"),
        ({"hidden_size": 0}, "hidden_size=0; must be at least 1"),
        ({"hidden_size": -4}, "hidden_size=-4"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ],
)
def test_a_config_that_makes_no_model(folders, tmp_path, changes, words):
    folder = changed_config(folders["mixtral"], tmp_path, **changes)
    with pytest.raises(MoestroError, match=words) as caught:
        moestro.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swaps": None}, "needs a list of swaps, it has None"),
        ({"swaps": {"a": 1}}, "needs a list of swaps"),
        ({"swaps": ["x"]}, r"swaps\[0\]: expected a mapping"),
        ({"schema": 99}, "schema 99, this version of Moestro reads 1"),
    ],
)
def test_a_damaged_config_of_ours(folders, tmp_path, changes, words):
    moestro.save(moestro.load(folders["mixtral"]), tmp_path / "own")
    (tmp_path / "own" / "manifest.json").unlink()
    config = tmp_path / "own" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    for read in (moestro.load, read_size):
        with pytest.raises(MoestroError, match=words):
            read(tmp_path / "own")


def test_a_damaged_manifest_of_ours_is_not_passed_over(folders, tmp_path):
    moestro.save(moestro.load(folders["mixtral"]), tmp_path / "own")
    (tmp_path / "own" / "manifest.json").write_text("{")
    for read in (moestro.load, read_size):
        with pytest.raises(LoadError, match=r"manifest\.json: is not valid JSON"):
            read(tmp_path / "own")
    (tmp_path / "own" / "receipt.json").unlink()  # other tools have a manifest.json of their own
    moestro.load(tmp_path / "own")


def test_sizes_of_a_folder_that_lost_a_file(folders, tmp_path):
    moestro.save(moestro.load(folders["mixtral"]), tmp_path / "own")
    (tmp_path / "own" / WEIGHTS).unlink()
    with pytest.raises(LoadError, match="missing, though manifest"):
        read_size(tmp_path / "own")
