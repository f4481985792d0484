"""What GGUF files call things, as data: one `GGUFFamily` per llama.cpp architecture.

A family lists its tensors as rows `(GGUF name, Hugging Face name, shape, op)` and builds the Hugging Face
config from the metadata. Names on the Hugging Face side are those of hub checkpoints, one tensor per expert.
Shapes are strings of sizes: V vocabulary, D hidden, Q all query heads, K all key/value heads, H one head, I
inner of the dense FFN, M inner of an expert, S inner of the shared expert, E experts. Ops undo what
llama.cpp's converter did:

    copy        nothing
    unpermute   rows of each head were interleaved for its rotary embedding
    minus_one   norms are stored as 1 + w
    unsqueeze   a row vector [D] is a matrix [1, D] in Transformers

Sources: convert_hf_to_gguf.py and src/llama-model.cpp of llama.cpp (what the metadata means and what is not
in it).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moestro.core.errors import FamilyError, LoadError
from moestro.models.gguf_header import GGUFHeader
from moestro.models.gguf_meta import Metadata, head_dim, rope, rows_of
from moestro.models.headers import shown


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of tensor. `{l}` in a name is the layer, `{e}` the expert (then the GGUF tensor stacks all
    experts).
    """

    gguf: str
    hf: str
    shape: str
    op: str = "copy"
    optional: bool = False


@dataclass(frozen=True, slots=True)
class GGUFFamily:
    """`rows`, and `extra(meta)`: the config fields that only this family has."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    extra: Callable[[Metadata], dict[str, Any]]


_ATTENTION = (
    Row("blk.{l}.attn_norm.weight", "model.layers.{l}.input_layernorm.weight", "D"),
    Row("blk.{l}.attn_q.weight", "model.layers.{l}.self_attn.q_proj.weight", "QD"),
    Row("blk.{l}.attn_k.weight", "model.layers.{l}.self_attn.k_proj.weight", "KD"),
    Row("blk.{l}.attn_v.weight", "model.layers.{l}.self_attn.v_proj.weight", "KD"),
    Row("blk.{l}.attn_output.weight", "model.layers.{l}.self_attn.o_proj.weight", "DQ"),
    Row("blk.{l}.ffn_norm.weight", "model.layers.{l}.post_attention_layernorm.weight", "D"),
)
_QKV_BIAS = (
    Row("blk.{l}.attn_q.bias", "model.layers.{l}.self_attn.q_proj.bias", "Q"),
    Row("blk.{l}.attn_k.bias", "model.layers.{l}.self_attn.k_proj.bias", "K"),
    Row("blk.{l}.attn_v.bias", "model.layers.{l}.self_attn.v_proj.bias", "K"),
)
_LLAMA_BIAS = tuple(
    Row(row.gguf, row.hf, row.shape, optional=True)
    for row in (*_QKV_BIAS, Row("blk.{l}.attn_output.bias", "model.layers.{l}.self_attn.o_proj.bias", "D"))
)
_QK_NORM = (
    Row("blk.{l}.attn_q_norm.weight", "model.layers.{l}.self_attn.q_norm.weight", "H"),
    Row("blk.{l}.attn_k_norm.weight", "model.layers.{l}.self_attn.k_norm.weight", "H"),
)
_ENDS = (
    Row("token_embd.weight", "model.embed_tokens.weight", "VD"),
    Row("output_norm.weight", "model.norm.weight", "D"),
    Row("output.weight", "lm_head.weight", "VD", optional=True),
)
_FFN = (
    Row("blk.{l}.ffn_gate.weight", "model.layers.{l}.mlp.gate_proj.weight", "ID"),
    Row("blk.{l}.ffn_up.weight", "model.layers.{l}.mlp.up_proj.weight", "ID"),
    Row("blk.{l}.ffn_down.weight", "model.layers.{l}.mlp.down_proj.weight", "DI"),
)
_EXPERTS = (
    Row("blk.{l}.ffn_gate_inp.weight", "model.layers.{l}.mlp.gate.weight", "ED"),
    Row("blk.{l}.ffn_gate_exps.weight", "model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "EMD"),
    Row("blk.{l}.ffn_up_exps.weight", "model.layers.{l}.mlp.experts.{e}.up_proj.weight", "EMD"),
    Row("blk.{l}.ffn_down_exps.weight", "model.layers.{l}.mlp.experts.{e}.down_proj.weight", "EDM"),
)
_SHARED_EXPERT = (
    Row(
        "blk.{l}.ffn_gate_inp_shexp.weight",
        "model.layers.{l}.mlp.shared_expert_gate.weight",
        "D",
        "unsqueeze",
    ),
    Row("blk.{l}.ffn_gate_shexp.weight", "model.layers.{l}.mlp.shared_expert.gate_proj.weight", "SD"),
    Row("blk.{l}.ffn_up_shexp.weight", "model.layers.{l}.mlp.shared_expert.up_proj.weight", "SD"),
    Row("blk.{l}.ffn_down_shexp.weight", "model.layers.{l}.mlp.shared_expert.down_proj.weight", "DS"),
)
_MIXTRAL_EXPERTS = (
    Row("blk.{l}.ffn_gate_inp.weight", "model.layers.{l}.block_sparse_moe.gate.weight", "ED"),
    Row("blk.{l}.ffn_gate_exps.weight", "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "EID"),
    Row("blk.{l}.ffn_up_exps.weight", "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "EID"),
    Row("blk.{l}.ffn_down_exps.weight", "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "EDI"),
)
_GEMMA3 = tuple(
    Row(row.gguf, row.hf, row.shape, "minus_one" if "norm" in row.gguf else row.op, row.optional)
    for row in (
        *_ENDS,
        *(row for row in _ATTENTION if row.gguf != "blk.{l}.ffn_norm.weight"),
        *_QK_NORM,
        *_FFN,
        Row("blk.{l}.post_attention_norm.weight", "model.layers.{l}.post_attention_layernorm.weight", "D"),
        Row("blk.{l}.ffn_norm.weight", "model.layers.{l}.pre_feedforward_layernorm.weight", "D"),
        Row("blk.{l}.post_ffw_norm.weight", "model.layers.{l}.post_feedforward_layernorm.weight", "D"),
    )
)


def _llama_rows(*ffn: Row) -> tuple[Row, ...]:
    """llama.cpp permutes the query and key rows of this architecture (and their biases)."""
    rows = (*_ENDS, *_ATTENTION, *ffn)
    permuted = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
    return tuple(
        Row(row.gguf, row.hf, row.shape, "unpermute", row.optional) if row.gguf.endswith(permuted) else row
        for row in rows
    )


def _llama_extra(meta: Metadata) -> dict[str, Any]:
    # Transformers has one switch for four biases.
    found = [row.gguf.format(l=0) in meta.header.tensors for row in _LLAMA_BIAS]
    bias = any(found)
    if bias and not all(found):
        missing = _LLAMA_BIAS[found.index(False)].gguf.format(l=0)
        raise LoadError(f"{meta.header.path}: tensor {shown(missing)} is missing, though other biases are there")
    return {"head_dim": head_dim(meta), "hidden_act": "silu", "attention_bias": bias, "mlp_bias": False}


def _mistral_extra(meta: Metadata) -> dict[str, Any]:
    window = meta.integer("attention.sliding_window")
    return {"head_dim": head_dim(meta), "hidden_act": "silu", "sliding_window": window}


def _mixtral_extra(meta: Metadata) -> dict[str, Any]:
    return {
        "head_dim": head_dim(meta),
        "hidden_act": "silu",
        "num_local_experts": meta.integer("expert_count", low=2),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "sliding_window": None,
    }


def _qwen2_extra(meta: Metadata) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3_extra(meta: Metadata) -> dict[str, Any]:
    return {**_qwen2_extra(meta), "head_dim": head_dim(meta), "attention_bias": False}


def _experts_extra(meta: Metadata) -> dict[str, Any]:
    return {
        "num_experts": meta.integer("expert_count", low=2),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "moe_intermediate_size": meta.integer(
            "expert_feed_forward_length", rows_of(meta, "blk.0.ffn_gate_exps.weight")
        ),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe_extra(meta: Metadata) -> dict[str, Any]:
    shared = meta.integer("expert_shared_feed_forward_length", rows_of(meta, "blk.0.ffn_gate_shexp.weight"))
    # llama.cpp does not renormalise the chosen weights of this architecture.
    return (
        _qwen2_extra(meta) | _experts_extra(meta) | {"norm_topk_prob": False, "shared_expert_intermediate_size": shared}
    )


def _qwen3moe_extra(meta: Metadata) -> dict[str, Any]:
    # llama.cpp always renormalises the chosen weights of this architecture.
    return _qwen3_extra(meta) | _experts_extra(meta) | {"norm_topk_prob": True}


def _gemma3_extra(meta: Metadata) -> dict[str, Any]:
    layers, heads = meta.integer("block_count"), meta.integer("attention.head_count")
    width = head_dim(meta)
    # Not in the file: llama.cpp scales queries by the head width, the 27B (62 layers) by hidden / heads.
    scalar = meta.integer("embedding_length") // heads if layers == 62 else width
    return {
        "head_dim": width,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": meta.integer("attention.sliding_window"),
        # Not in the file either: every sixth layer sees everything, the others rotate with a base of 10000.
        "layer_types": ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(layers)],
        "rope_parameters": {
            "full_attention": rope(meta),
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "attention_bias": False,
    }


FAMILIES = {
    "llama": GGUFFamily("llama", "LlamaForCausalLM", _llama_rows(*_FFN, *_LLAMA_BIAS), _llama_extra),
    "mistral": GGUFFamily("mistral", "MistralForCausalLM", _llama_rows(*_FFN), _mistral_extra),
    "mixtral": GGUFFamily("mixtral", "MixtralForCausalLM", _llama_rows(*_MIXTRAL_EXPERTS), _mixtral_extra),
    "qwen2": GGUFFamily("qwen2", "Qwen2ForCausalLM", (*_ENDS, *_ATTENTION, *_QKV_BIAS, *_FFN), _qwen2_extra),
    "qwen3": GGUFFamily("qwen3", "Qwen3ForCausalLM", (*_ENDS, *_ATTENTION, *_QK_NORM, *_FFN), _qwen3_extra),
    "gemma3": GGUFFamily("gemma3_text", "Gemma3ForCausalLM", _GEMMA3, _gemma3_extra),
    "qwen2moe": GGUFFamily(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        (*_ENDS, *_ATTENTION, *_QKV_BIAS, *_EXPERTS, *_SHARED_EXPERT),
        _qwen2moe_extra,
    ),
    "qwen3moe": GGUFFamily(
        "qwen3_moe", "Qwen3MoeForCausalLM", (*_ENDS, *_ATTENTION, *_QK_NORM, *_EXPERTS), _qwen3moe_extra
    ),
}


def family_of(header: GGUFHeader) -> GGUFFamily:
    """The family of a file. Raises `FamilyError` for an architecture that is not in the table."""
    arch = header.metadata.get("general.architecture")
    # llama.cpp has one name for three families.
    if arch == "llama" and header.metadata.get("llama.expert_count", 0):
        arch = "mixtral"
    elif arch == "llama" and header.metadata.get("llama.attention.sliding_window", 0):
        arch = "mistral"
    if not isinstance(arch, str) or arch not in FAMILIES:
        raise FamilyError(f"{header.path}: GGUF architecture {shown(arch)} is not known (known: {', '.join(FAMILIES)})")
    return FAMILIES[arch]
