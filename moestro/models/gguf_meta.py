"""Typed reading of GGUF metadata: sizes, head widths and rotary settings, or a `LoadError` that names the
key.
"""

import math
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from moestro.core.errors import LoadError
from moestro.models.gguf_header import GGUFHeader
from moestro.models.headers import shown


# Keys that would change the mathematics in a way that no family here carries; what they say when harmless.
_MUST_BE = {
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "logit_scale": 0.0,
    "expert_weights_scale": 0.0,
    "expert_gating_func": 1,
    "expert_group_count": 0,
    "leading_dense_block_count": 0,
    "interleave_moe_layer_step": 0,
    "nextn_predict_layers": 0,
    "use_parallel_residual": False,
}


class Metadata:
    """Typed access to a header's metadata under its architecture's prefix. Raises `LoadError` that names the
    key.
    """

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.values = header, header.metadata
        self.arch = str(self.values.get("general.architecture"))
        for key, harmless in _MUST_BE.items():
            if self.has(key) and self.values[f"{self.arch}.{key}"] != harmless:
                self.fail(key, f"is not supported for this architecture other than {harmless}")

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        """A whole number of at least ``low``."""
        value = self.values.get(f"{self.arch}.{key}", default)
        if type(value) is not int or not low <= value < 1 << 31:
            self.fail(key, f"must be one whole number >= {low}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.values.get(f"{self.arch}.{key}", default)
        if type(value) is not float or not 0 < value < math.inf:
            self.fail(key, "must be a number > 0")
        # Files hold float32: 1e-05 reads as 9.99999974e-06. The shortest decimal is what the author wrote.
        return float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return f"{self.arch}.{key}" in self.values

    def fail(self, key: str, message: str) -> NoReturn:
        """Raise `LoadError` about a key, with what the file says."""
        found = shown(self.values[f"{self.arch}.{key}"]) if self.has(key) else "missing"
        raise LoadError(f"{self.header.path}: metadata {self.arch}.{key} is {found}; it {message}")


def head_dim(meta: Metadata) -> int:
    """Width of an attention head; keys and values must agree."""
    if meta.has("attention.key_length"):
        length = meta.integer("attention.key_length")
        if meta.integer("attention.value_length", length) != length:
            meta.fail("attention.value_length", f"must equal attention.key_length ({length})")
        return length
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    if hidden % heads:
        meta.fail("attention.head_count", f"must divide embedding_length ({hidden})")
    return hidden // heads


def rows_of(meta: Metadata, name: str) -> int:
    """Rows of a matrix, 1 for a vector."""
    if name not in meta.header.tensors:
        raise LoadError(f"{meta.header.path}: tensor {shown(name)} is missing")
    shape = meta.header.tensors[name].shape
    return shape[-2] if len(shape) > 1 else 1


def rope(meta: Metadata) -> dict[str, Any]:
    """Rotary settings as Transformers' `rope_parameters`: plain, linear, YaRN or Llama 3's."""
    if meta.integer("rope.dimension_count", head_dim(meta)) != head_dim(meta):
        meta.fail("rope.dimension_count", f"must equal the head width ({head_dim(meta)})")
    theta = meta.real("rope.freq_base", 10000.0)
    kind = meta.values.get(f"{meta.arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in meta.header.tensors:
        return _llama3_rope(meta, theta)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        meta.fail("rope.scaling.type", "must be none, linear or yarn")
    scaled = {"rope_type": kind, "rope_theta": theta, "factor": meta.real("rope.scaling.factor")}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length")
    return scaled


def _llama3_rope(meta: Metadata, theta: float) -> dict[str, Any]:
    """Llama 3's scaling is not in the metadata: the file holds the factor of each frequency, from which it is
    told.
    """
    tensor = meta.header.tensors["rope_freqs.weight"]
    if tensor.type_name != "F32" or tensor.shape != (head_dim(meta) // 2,):
        raise LoadError(f"{meta.header.path}: rope_freqs.weight must be F32 of shape [{head_dim(meta) // 2}]")
    found = np.fromfile(meta.header.path, "<f4", head_dim(meta) // 2, offset=tensor.start)
    scaling = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(np.round(found.max(), 3)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(found, llama3_factors(head_dim(meta), scaling), rtol=1e-4, atol=0):
        raise LoadError(f"{meta.header.path}: rope_freqs.weight is not Llama 3's scaling by {scaling['factor']}")
    return scaling


def llama3_factors(dim: int, scaling: dict[str, Any]) -> NDArray[np.float64]:
    """Llama 3's divisor of each rotary frequency, [dim / 2]: 1 for short waves, `factor` for long ones,
    between else.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (
        2 * math.pi * scaling["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    )
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors
