"""Sizes from folders, headers and GGUF files equal those of the models they hold, and nothing but headers is read."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from moestro.core.errors import FamilyError, LoadError
from moestro.models.load import load
from moestro.models.save import save
from moestro.models.sizing import ModelSize
from moestro.models.sizing_build import size_of_config
from moestro.models.sizing_read import read_size
from moestro.models.swap import swap
from moestro.testing.tiny import TINY, tiny_folder


def of_model(model: Any) -> ModelSize:
    model.config.architectures = [type(model).__name__]
    return size_of_config(model.config)


@pytest.mark.parametrize("family", TINY)
def test_a_folder_as_transformers_saves_it(family: str, tmp_path: Path) -> None:
    model = tiny_folder(family, tmp_path)
    size = read_size(tmp_path)
    assert size.parts() == of_model(model).parts()
    assert [layer.mixtures for layer in size.layers] == [layer.mixtures for layer in of_model(model).layers]
    assert size.whole.nbytes == 4 * size.whole.parameters
    (tmp_path / "model.safetensors").unlink()
    config_alone = read_size(tmp_path)
    assert config_alone.parts() == size.parts()
    assert config_alone.head_matrix == size.head_matrix


def test_stored_types_count(tmp_path: Path) -> None:
    from moestro.testing.tiny import tiny_model

    tiny_model("qwen3_moe").bfloat16().save_pretrained(tmp_path)
    size = read_size(tmp_path)
    assert size.whole.nbytes == 2 * size.whole.parameters
    assert size.itemsize == 2
    (tmp_path / "model.safetensors").unlink()
    assert read_size(tmp_path).whole == size.whole


def test_a_moestro_folder_with_swaps(tmp_path: Path) -> None:
    tiny_folder("llama", tmp_path / "dense")
    model = load(tmp_path / "dense")
    swap(model, "train.deepseekmoe", {"num_experts": 4, "top_k": 2, "expert_size": 20, "segments": 2}, layers=[1])
    save(model, tmp_path / "ours")
    size = read_size(tmp_path / "ours")
    assert size.whole.parameters == sum(p.numel() for p in model.parameters())
    assert size.whole.nbytes == 4 * size.whole.parameters
    assert [(m.num_experts, m.top_k) for m in size.mixtures] == [(7, 3)]
    assert size.mixtures[0].slab.matrix == 3 * 32 * 10
    assert size.parts()["shared"].matrix == 3 * 32 * 10


def sparse_mixtral(folder: Path, *, layers: int = 4, dtype: str = "BF16") -> int:
    """A folder whose one shard has a true header for Mixtral-8x7B's widths and no data: a sparse file."""
    hidden, inner, vocabulary = 4096, 14336, 32000
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden]}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", 1024), ("v", 1024), ("o", hidden)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = [rows, hidden]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = [hidden]
        shapes[f"{at}block_sparse_moe.gate.weight"] = [8, hidden]
        for expert in range(8):
            for name in ("w1", "w3", "w2"):
                shape = [hidden, inner] if name == "w2" else [inner, hidden]
                shapes[f"{at}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_many_gigabytes_are_sized_without_reading_them(tmp_path: Path) -> None:
    nbytes = sparse_mixtral(tmp_path)
    assert nbytes > 11e9
    blocks = (tmp_path / "model.safetensors").stat().st_blocks
    before = resource.getrusage(resource.RUSAGE_SELF)
    size = read_size(tmp_path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert size.whole.nbytes == nbytes
    assert size.mixtures[3].slab.parameters == 3 * 4096 * 14336
    # Reading or mapping any of it would show as memory or as page faults; a slab alone is 352 MB.
    assert (after.ru_maxrss - before.ru_maxrss) * 1024 < size.mixtures[0].slab.nbytes
    assert (tmp_path / "model.safetensors").stat().st_blocks == blocks


def write_gguf(path: Path) -> dict[str, int]:
    """A Qwen3-MoE GGUF file with Q8_0 experts; returns the bytes of each tensor."""
    hidden, inner, experts, vocabulary = 64, 32, 4, 40
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_feed_forward_length(96)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(inner)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    for layer in range(2):
        rows = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": hidden, "ffn_gate_inp": experts}
        shapes |= {f"blk.{layer}.{name}.weight": (count, 64) for name, count in rows.items()}
        shapes |= {f"blk.{layer}.{name}.weight": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}_norm.weight": (16,) for name in ("attn_q", "attn_k")}
        shapes |= {f"blk.{layer}.ffn_{name}_exps.weight": (experts, inner, hidden) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down_exps.weight"] = (experts, hidden, inner)
    sizes = {}
    for name, shape in shapes.items():
        data = np.zeros(shape, np.float32)
        packed = gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0) if "exps" in name else data
        kind = gguf.GGMLQuantizationType.Q8_0 if "exps" in name else None
        writer.add_tensor(name, packed, raw_dtype=kind)
        sizes[name] = packed.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sizes


def test_gguf_bytes_are_the_files(tmp_path: Path) -> None:
    sizes = write_gguf(tmp_path / "tiny.gguf")
    size = read_size(tmp_path / "tiny.gguf")
    assert size.whole.nbytes == sum(sizes.values())
    assert sum(m.experts.nbytes for m in size.mixtures) == sum(n for name, n in sizes.items() if "exps" in name)
    assert [(m.num_experts, m.top_k) for m in size.mixtures] == [(4, 2), (4, 2)]
    assert size.mixtures[0].slab.parameters == 3 * 64 * 32
    assert size.mixtures[0].slab.nbytes == 3 * 64 * 32 // 32 * 34
    assert size.head_matrix == 40 * 64, "the embedding is tied and multiplies at the head"


def damage(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "asks for 3 decoder layers, the tensors are those of 2; first difference: layer 2"),
        ({"num_local_experts": 6}, "layer 0: the config asks for 6 experts, the tensors are those of 5"),
        ({"num_experts_per_tok": 9}, "9 of 5 experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "packed by gptq"),
        ({"auto_map": {"AutoModel": "x.y"}}, "never runs remote code"),
    ],
)
def test_disagreement_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    tiny_folder("mixtral", tmp_path)
    damage(tmp_path, change)
    with pytest.raises(LoadError) as caught:
        read_size(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file or folder"):
        read_size(tmp_path / "nothing")
    with pytest.raises(LoadError, match=r"no config\.json"):
        read_size(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(FamilyError, match="mamba"):
        read_size(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match="never opened"):
        read_size(tmp_path)
    with pytest.raises(LoadError, match=r"neither a model folder nor a \.gguf"):
        read_size(tmp_path / "config.json")
