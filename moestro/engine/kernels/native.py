"""The steps in C++ (wheel ``moestro-native``)."""

from typing import Any

import numpy as np

from moestro.core.errors import ConfigError
from moestro.engine.kernels.interface import (
    ACTIVATIONS,
    LAYOUTS,
    ROUTERS,
    Addresses,
    Description,
    Ffn,
    Floats,
    Layer,
    Matrix,
    Steps,
)


QK_NORMS = ("none", "head", "all")


class NativeKernels:
    """Kernels of ``moestro_native``.

    Args:
        isa: one of ``features()["available"]``; None takes the best.

    Raises:
        ImportError: the wheel is not installed.
    """

    name = "native"

    def __init__(self, isa: str | None = None) -> None:
        import moestro_native

        self.module = moestro_native
        known = moestro_native.features()["available"]
        if isa is not None and isa not in known:
            raise ConfigError(f"instruction set {isa!r} does not run here; {', '.join(known)} do")
        self.isa = isa or known[0]

    def features(self) -> dict[str, Any]:
        """What runs: {"isa": ..., "available": [...]}."""
        return {**self.module.features(), "isa": self.isa}

    def linear(self, matrix: Matrix, x: Floats) -> Floats:
        """x [R, K] -> x W^T [R, N], one thread."""
        self.module.choose(self.isa)
        return self.module.linear(self._matrix(matrix), np.ascontiguousarray(x, dtype=np.float32))

    def build(
        self, description: Description, *, pages: int, threads: int, slabs: dict[int, Addresses] | None = None
    ) -> Steps:
        """Steps over a cache of ``pages`` pages.

        Raises:
            ConfigError: matrices that do not fit one another.
        """
        self.module.choose(self.isa)
        keep: list[Any] = [description]
        spec = self.module.ModelSpec()
        for name in ("hidden", "heads", "kv_heads", "head_dim", "vocab", "rotary", "rope_interleaved", "norm_add"):
            setattr(spec, name, getattr(description, name))
        for name in ("embed_scale", "residual_scale", "logit_scale", "logit_softcap", "rope_factor"):
            setattr(spec, name, getattr(description, name))
        spec.pages = pages
        spec.eps = description.norm_eps
        spec.layer_norm = description.norm == "layer"
        spec.embedding, spec.head = self._matrix(description.embedding), self._matrix(description.head)
        spec.final_norm = _vector(description.final_norm, keep)
        spec.final_norm_bias = _vector(description.final_norm_bias, keep)
        spec.inv_freq = [[float(v) for v in table] for table in description.inv_freq]
        layers = []
        for index, layer in enumerate(description.layers):
            native = self._layer(layer, keep)
            if slabs is not None and index in slabs:
                native.slabs = [int(address) for address in slabs[index]]
            layers.append(native)
        spec.layers = layers
        try:
            model = self.module.Model(spec, threads)
        except ValueError as error:
            raise ConfigError(f"the packed model does not fit together: {error}") from None
        return _Kept(model, keep)

    def _matrix(self, matrix: Matrix | None) -> Any:
        if matrix is None:
            return self.module.Matrix()
        table = 0 if matrix.words is None else int(matrix.words.ctypes.data)
        return self.module.Matrix(
            LAYOUTS.index(matrix.layout), matrix.n, matrix.k, matrix.address, size=matrix.size, words=table
        )

    def _ffn(self, ffn: Ffn) -> Any:
        native = self.module.Ffn()
        native.gate, native.up, native.down = self._matrix(ffn.gate), self._matrix(ffn.up), self._matrix(ffn.down)
        native.act = ACTIVATIONS.index(ffn.activation)
        return native

    def _layer(self, layer: Layer, keep: list[Any]) -> Any:
        native, attention = self.module.LayerSpec(), layer.attention
        for name in ("attention_norm", "attention_norm_bias", "ffn_norm", "ffn_norm_bias"):
            setattr(native, name, _vector(getattr(layer, name), keep))
        for name in ("q", "k", "v", "o"):
            setattr(native, name, self._matrix(getattr(attention, name)))
            setattr(native, f"{name}_bias", _vector(getattr(attention, f"{name}_bias"), keep))
        native.q_norm, native.k_norm = _vector(attention.q_norm, keep), _vector(attention.k_norm, keep)
        native.qk_norm = QK_NORMS.index(attention.qk_norm)
        native.window, native.rope = attention.window, attention.rope
        native.attention_scale, native.attention_softcap = attention.scale, attention.softcap
        if layer.router is not None and layer.expert is not None:
            router = layer.router
            native.experts, native.expert, native.router = (
                layer.experts,
                self._ffn(layer.expert),
                self._matrix(router.weight),
            )
            native.kinds = [self._ffn(kind) for kind in layer.kinds]
            native.kind_of = [int(kind) for kind in layer.kind_of]
            native.router_bias, native.select_bias = _vector(router.bias, keep), _vector(router.select_bias, keep)
            native.router_kind, native.top_k = ROUTERS.index(router.kind), router.top_k
            native.groups, native.top_groups = router.groups, router.top_groups
            native.renormalise, native.route_scale = router.renormalise, router.scale
            if router.ahead:
                if not hasattr(native, "ahead"):
                    _too_old()
                native.ahead = router.ahead
        if layer.shared is not None:
            native.shared = self._ffn(layer.shared)
        native.shared_gate = self._matrix(layer.shared_gate)
        return native


def _vector(values: Floats | None, keep: list[Any]) -> int:
    """Address of a float32 copy that stays alive in ``keep``; 0 for None."""
    if values is None:
        return 0
    array = np.ascontiguousarray(values, dtype=np.float32)
    keep.append(array)
    return int(array.ctypes.data)


def _too_old(*given: Any) -> Any:
    raise ConfigError("the installed native kernels are older than this package; run pip install ./native")


class _Kept:
    """The native steps and the arrays whose addresses they hold."""

    def __init__(self, model: Any, keep: list[Any]) -> None:
        self._keep = keep
        self._model = model
        self.page_bytes: int = model.page_bytes
        for name in (
            "begin",
            "attention",
            "chosen",
            "scores",
            "thin",
            "routes",
            "experts",
            "finish",
            "run",
            "logits",
            "copy_page",
        ):
            setattr(self, name, getattr(model, name))
        self.hidden = model.hidden
        self.peek = getattr(model, "peek", _too_old)
