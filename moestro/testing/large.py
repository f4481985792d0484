"""Synthetic mixtures of any size on disk, written layer by layer: for measuring what surgery and loading need."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.models.source import MemorySource
from moestro.models.writer import write_file, write_index


def write_mixture(
    folder: str | Path,
    *,
    layers: int,
    experts: int,
    dim: int,
    inner: int,
    vocabulary: int = 1024,
    heads: int = 8,
    dtype: torch.dtype = torch.float32,
    layout: Literal["stacked", "split"] = "split",
    seed: int = 0,
) -> int:
    """Write a Qwen3-MoE checkpoint of random weights, one shard a layer.

    Args:
        layout: ``split`` as on the hub, one matrix an expert; ``stacked`` as Transformers saves its own modules.

    Returns:
        Bytes of all tensors.

    Raises:
        ConfigError: a model width that the heads do not divide.
    """
    if dim % heads:
        raise ConfigError(f"{heads} heads do not divide a width of {dim}")
    (folder := Path(folder)).mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=draw) * 0.02).to(dtype)

    (folder / "config.json").write_text(json.dumps(_config(layers, experts, dim, inner, vocabulary, heads, dtype)))
    where: dict[str, str] = {}
    total = 0

    def shard(name: str, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        write_file(MemorySource(tensors), folder / name, list(tensors))
        where.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(layers):
        start = f"model.layers.{layer}."
        tensors = {f"{start}self_attn.{name}_proj.weight": normal(dim, dim) for name in "qkvo"}
        tensors |= {f"{start}self_attn.{name}_norm.weight": torch.ones(dim // heads, dtype=dtype) for name in "qk"}
        tensors |= {f"{start}{n}_layernorm.weight": torch.ones(dim, dtype=dtype) for n in ("input", "post_attention")}
        tensors[f"{start}mlp.gate.weight"] = normal(experts, dim)
        if layout == "stacked":
            tensors[f"{start}mlp.experts.gate_up_proj"] = normal(experts, 2 * inner, dim)
            tensors[f"{start}mlp.experts.down_proj"] = normal(experts, dim, inner)
        else:
            for expert in range(experts):
                for name, shape in (("gate", (inner, dim)), ("up", (inner, dim)), ("down", (dim, inner))):
                    tensors[f"{start}mlp.experts.{expert}.{name}_proj.weight"] = normal(*shape)
        shard(f"layer-{layer:05}.safetensors", tensors)
    rest = {"model.embed_tokens.weight": normal(vocabulary, dim), "model.norm.weight": torch.ones(dim, dtype=dtype)}
    shard("rest.safetensors", rest)
    write_index(folder, where, total)
    return total


def _config(
    layers: int, experts: int, dim: int, inner: int, vocabulary: int, heads: int, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": vocabulary,
        "hidden_size": dim, "intermediate_size": inner, "moe_intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": dim // heads, "num_experts": experts,
        "num_experts_per_tok": min(2, experts), "norm_topk_prob": True, "tie_word_embeddings": True,
        "max_position_embeddings": 256, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
