"""Routers of a model as a packed one has them: their dialects, and the tensors that go with them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from moestro.engine.dialect import RouterSpec, TokenRouterSpec
from moestro.engine.pack_bank import READ_ME


if TYPE_CHECKING:
    from moestro.core.layer import MoELayer
    from moestro.surgery.disk import Folder


class NotNative(Exception):
    """Why the native forward cannot run a model; one clause."""


class Routers:
    """Part of the reader of a native model.

    Attributes:
        token_router: that of token ids, once a layer needs it. hand_on: layers so far whose input later routers may
            read. take: holds a tensor of the checkpoint.
    """

    folder: "Folder"
    token_router: TokenRouterSpec | None
    hand_on: list[int]
    take: Callable[..., None]

    def router(self, name: str, path: str, layer: "MoELayer") -> RouterSpec:
        """The dialect of a router, and its tensors."""
        router, where = layer.router, f"{path}.router"
        method = _method_of(router)
        if method == READ_ME:
            return self.decoupled(router)
        common: dict[str, Any] = {}
        if method == "train.pre_gated":
            common["ahead"] = self.ahead(name, router)
            router, where = cast("Any", router).gate, f"{where}.gate"
            method = _method_of(router)
        if method not in ("train.softmax_topk", "train.sigmoid_bias"):
            raise NotNative(f"the router of {path} is a {type(router).__name__}")
        config: Any = cast("Any", router).config
        self.take(f"{name}.router", f"{where}.weight", layout="f32")
        common |= {"top_k": config.top_k, "scale": float(config.scale)}
        if config.renorm_eps > 1e-20:
            raise NotNative(f"the router of {path} adds {config.renorm_eps} before it divides")
        if method == "train.sigmoid_bias":
            self.take(f"{name}.select_bias", f"{where}.selection_bias")
            groups = {"groups": config.num_groups, "top_groups": config.groups_kept}
            return RouterSpec(kind="sigmoid_bias", renormalise=config.renormalise, **groups, **common)
        if config.num_groups > 1:
            raise NotNative(f"the router of {path} ranks groups of a softmax by their best member")
        if config.bias:
            self.take(f"{name}.router_bias", f"{where}.bias")
        chosen = config.softmax == "chosen"
        kind = "topk_softmax" if chosen else "softmax_topk"
        return RouterSpec(kind=kind, bias=config.bias, renormalise=config.renormalise and not chosen, **common)

    def decoupled(self, router: Any) -> RouterSpec:
        """A router that borrows the model's router of token ids; its tensors are taken once."""
        gate = router.gate.module
        if self.token_router is None:
            vocab, dim = gate.embedding.weight.shape
            path = next(path for path, module in self.folder.model.named_modules() if module is gate)
            self.token_router = TokenRouterSpec(vocab=vocab, dim=dim, heads=gate.heads, experts=gate.head.out_features)
            for name, shape in self.token_router.tensors().items():
                self.take(f"token_router.{name}", f"{path}.{name}.weight", layout=None if len(shape) == 1 else "f32")
        return RouterSpec(kind="decoupled", top_k=1)

    def ahead(self, name: str, router: Any) -> int:
        """How many layers before its own the input of a pre-gated router is; the walk goes up through the layers."""
        layer, distance = int(name.rpartition(".")[2]), int(router.distance)
        if not distance:
            return 0
        self.hand_on.append(layer)
        if router.own_gate or len(self.hand_on) <= distance:
            return 0
        return layer - self.hand_on[-1 - distance]


def _method_of(router: Any) -> str:
    made = getattr(router, "made_by", None)
    return "" if made is None else str(made.method)
