"""Expert compute: a reference loop and fast paths with one contract."""

from moestro.ops.activation import ACTIVATIONS, Activation, apply_activation
from moestro.ops.counters import calls, counting
from moestro.ops.fused import BACKENDS, Backend, fused_ffn
from moestro.ops.linear import grouped_linear
from moestro.ops.native import training_backend
from moestro.ops.pool import POOL, StoragePool
from moestro.ops.rows import Segments, scatter_rows, sort_rows
from moestro.ops.weights import FFNWeights


__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "POOL",
    "Activation",
    "Backend",
    "FFNWeights",
    "Segments",
    "StoragePool",
    "apply_activation",
    "calls",
    "counting",
    "fused_ffn",
    "grouped_linear",
    "scatter_rows",
    "sort_rows",
    "training_backend",
]
