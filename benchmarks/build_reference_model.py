"""Reference model R in the files of both sides, from one seed: packed folders for Moestro, GGUF files for llama.cpp.

R has the shape of Qwen3-MoE: vocabulary 49152, hidden 1024, 12 layers, 16/4 heads of 64, 64 experts of 512, top-8, tied
embeddings (1.29 B parameters, random). Its weights say nothing; its sizes and speeds do. Writes

    OUT/checkpoint   safetensors, bfloat16        OUT/packed-4, OUT/packed-8
    OUT/q4_0.gguf, OUT/q8_0.gguf

and keeps what is there already.

    python benchmarks/build_reference_model.py OUT [--seed 0]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro.engine.pack import pack_model


LAYERS, EXPERTS = 12, 64
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


def checkpoint(folder: Path, seed: int) -> None:
    """The model as Transformers initialises it, in bfloat16."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, float32 values) of every tensor; the order of the axes is numpy's."""

    def values(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().float().numpy()

    yield "token_embd.weight", values(model.model.embed_tokens.weight)
    yield "output_norm.weight", values(model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        state = layer.state_dict()
        for ours, theirs in NAMES.items():
            yield f"blk.{index}.{theirs}.weight", values(state[f"{ours}.weight"])
        fused = values(state["mlp.experts.gate_up_proj"])
        inner = fused.shape[1] // 2
        yield f"blk.{index}.ffn_gate_exps.weight", fused[:, :inner]
        yield f"blk.{index}.ffn_up_exps.weight", fused[:, inner:]
        yield f"blk.{index}.ffn_down_exps.weight", values(state["mlp.experts.down_proj"])


def write_gguf(model: Any, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices in ``kind``, norms and routers in float32, no vocabulary: token ids go in and out."""
    four = kind == gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_value_length(CONFIG["head_dim"])
    writer.add_rope_freq_base(CONFIG["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CONFIG["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(CONFIG["moe_intermediate_size"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if four else gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, value in tensors(model):
        if value.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, np.ascontiguousarray(value))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = given.out / "checkpoint"
    if not (source / "config.json").exists():
        checkpoint(source, given.seed)
    for bits in (4, 8):
        if not (given.out / f"packed-{bits}").exists():
            pack_model(source, given.out / f"packed-{bits}", bits=bits, progress=print)
    kinds = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    missing = [name for name in kinds if not (given.out / f"{name}.gguf").exists()]
    if missing:
        model = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        for name in missing:
            write_gguf(model, given.out / f"{name}.gguf", kinds[name])


if __name__ == "__main__":
    main()
