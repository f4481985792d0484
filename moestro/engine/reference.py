"""The reference forward: Transformers' modules over paged keys and values.

Each sequence runs by itself, so a row is computed the same whatever runs beside it. Slow and general: any causal model
that Moestro loads and whose state is keys and values. Everything that needs PyTorch is imported when one is opened.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.decoding import Route
from moestro.core.errors import ConfigError
from moestro.engine.sequences import Batch, Floats, Forward, OnRoute


if TYPE_CHECKING:
    import torch

PAGE = 16


class ReferenceForward(Forward):
    """A forward over a Transformers model.

    Args:
        model: a causal language model as ``moestro.models.load`` returns it, in evaluation mode.
        memory: bytes for keys and values. pages: their number instead.

    Attributes:
        overrides: routes that rows may ask for by index; index 0 is the model's own.

    Raises:
        ConfigError: the model keeps other state than keys and values, or the memory holds no page.
    """

    page = PAGE

    def __init__(self, model: Any, *, memory: int | None = None, pages: int | None = None) -> None:
        import torch

        self.model = model
        self.vocab = int(model.get_output_embeddings().weight.shape[0])
        self.mixtures = _mixtures(model)
        self.layers = int(model.config.get_text_config().num_hidden_layers)
        self.experts = tuple(
            layer.router.num_experts if (layer := self.mixtures.get(i)) is not None else 0 for i in range(self.layers)
        )
        self.on_route: OnRoute | None = None
        self.overrides: list[Any] = [None]
        shapes = self._shapes()
        self.page_bytes = sum(PAGE * heads * (k + v) * item for heads, k, v, _, item in shapes)
        self.pages = pages if pages is not None else (memory or 0) // self.page_bytes
        if self.pages < 1:
            raise ConfigError(f"{memory} bytes hold no page of keys and values ({self.page_bytes} bytes each)")
        self._keys = [torch.zeros(self.pages, heads, PAGE, k, dtype=kind) for heads, k, _, kind, _ in shapes]
        self._values = [torch.zeros(self.pages, heads, PAGE, v, dtype=kind) for heads, _, v, kind, _ in shapes]

    def override(self, route: Route) -> Any:
        """A route as an edit of the router's choice."""
        return _edit(route, {layer.site: index for index, layer in self.mixtures.items()})

    def step(self, batch: Batch) -> Floats:
        """Logits float32 [L, vocab]; see ``Forward``."""
        import torch

        logits: dict[int, Floats] = {}
        wanted = set(batch.want.tolist())
        with torch.inference_mode():
            for number in range(len(batch.sequences)):
                rows = np.nonzero(batch.rows_of == number)[0]
                if not len(rows):
                    continue
                keep = [at for at, row in enumerate(rows.tolist()) if row in wanted]
                found = self._run(batch, number, rows, keep)
                logits.update(zip(rows[keep].tolist(), found, strict=True))
        if not len(batch.want):
            return np.zeros((0, self.vocab), dtype=np.float32)
        return np.stack([logits[row] for row in batch.want.tolist()])

    def _run(self, batch: Batch, number: int, rows: Any, keep: list[int]) -> Floats:
        """One sequence: gather its pages, run its rows, write their keys and values back."""
        import torch
        from transformers import DynamicCache

        from moestro.core.session import session

        start, count = int(batch.positions[rows[0]]), len(rows)
        pages = torch.from_numpy(batch.tables[number, : -(-(start + count) // PAGE)].astype(np.int64))
        cache = DynamicCache()
        if start:
            for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
                cache.update(_gathered(keys, pages)[:, :, :start], _gathered(values, pages)[:, :, :start], layer)
        edit = self.overrides[0 if batch.routes is None else int(batch.routes[rows[0]])]
        if edit is not None:
            edit.positions = batch.positions[rows]
        recorder = None if self.on_route is None else _Recorder(self.on_route, self.mixtures)
        position = torch.arange(start, start + count)[None]
        tokens = torch.from_numpy(batch.tokens[rows].astype(np.int64))[None]
        with session(edits=[] if edit is None else [edit], recorder=recorder):
            output = self.model(
                input_ids=tokens,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(keep, dtype=torch.long) if keep else 1,
            )
        at = torch.arange(start, start + count)
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            held = cache.layers[layer]
            keys[pages[at // PAGE], :, at % PAGE] = held.keys[0, :, start:].transpose(0, 1)
            values[pages[at // PAGE], :, at % PAGE] = held.values[0, :, start:].transpose(0, 1)
        found: Floats = output.logits[0, -len(keep) :].float().numpy() if keep else np.zeros((0, self.vocab))
        return found

    def forget(self, sequence: int) -> None:
        """Nothing is kept but pages."""

    def copy_page(self, src: int, dst: int) -> None:
        """Keys and values of one page, all layers."""
        for part in (*self._keys, *self._values):
            part[dst] = part[src]

    def _shapes(self) -> list[tuple[int, int, int, Any, int]]:
        """(heads, width of keys, of values, type, bytes) of each layer, from a forward over one token."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        with torch.inference_mode():
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        shapes = []
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            plain = keys is not None and values is not None and keys.ndim == values.ndim == 4
            if not plain or keys.shape[2] != 1 or values.shape[2] != 1:
                raise ConfigError(
                    f"{type(self.model).__name__} keeps other state than keys and values; it cannot be served yet"
                )
            shapes.append((keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.element_size()))
        return shapes


def _gathered(part: "torch.Tensor", pages: "torch.Tensor") -> "torch.Tensor":
    """[pages, H, 16, D] -> [1, H, positions, D] of one sequence."""
    return part[pages].transpose(0, 1).reshape(1, part.shape[1], -1, part.shape[3])


def _mixtures(model: Any) -> dict[int, Any]:
    """Index of the decoder layer -> its mixture layer."""
    import re

    found = {}
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", f"{name}.")
        if getattr(module, "is_mixture", False) and number is not None:
            found[int(number[1])] = module
    return found


class _Recorder:
    """Tells ``on_route`` what routers chose."""

    def __init__(self, tell: OnRoute, mixtures: dict[int, Any]) -> None:
        self.tell = tell
        self.layer_of = {layer.site: index for index, layer in mixtures.items()}

    def record(self, site: str, routing: Any, ctx: Any) -> None:
        """One layer's routing; ragged ones are told assignment by assignment."""
        if site not in self.layer_of:
            return
        real = routing.real()
        shape = (-1, 1) if real.top_k is None else (real.num_tokens, real.top_k)
        ids = real.expert_N.reshape(shape).numpy().astype(np.int32)
        self.tell(self.layer_of[site], ids, real.weight_N.reshape(shape).float().numpy())


def _edit(route: Route, layer_of: dict[str, int]) -> Any:
    """An edit that chooses by the route from what the router ranks and what it weighs."""
    from moestro.core.session import Edit

    class Follow(Edit):
        positions: Any = None

        def on_routing(self, site: str, routing: Any, router: Any, ctx: Any) -> Any:
            if route.layers is not None and layer_of.get(site) not in route.layers:
                return routing
            if route.kind == "ratio":
                return _thinned(route, layer_of.get(site, -1), routing, router, self.positions)
            return _followed(route, routing, router)

    return Follow()


def _thinned(route: Route, layer: int, routing: Any, router: Any, positions: Any) -> Any:
    import torch

    if routing.top_k is None or routing.scores is None:
        raise ConfigError(f"the route {route} needs a router with scores that gives every token as many experts")
    ratio_K = torch.from_numpy(route.ratios_of(layer, routing.top_k))
    drop_TK = routing.weight_TK < ratio_K * routing.weight_TK[:, :1]
    if route.first and positions is not None:
        drop_TK &= torch.from_numpy(positions >= route.first)[:, None]
    return routing.without(drop_TK, router.weigh)


def _followed(route: Route, routing: Any, router: Any) -> Any:
    import torch

    from moestro.core.router import topk_indices
    from moestro.engine.decoding import hash_of

    scores = routing.scores
    if scores is None:
        raise ConfigError(f"the route {route} needs a router that scores its experts")
    experts = routing.num_experts
    select, gate = scores.select_TC[:, :experts], scores.gate_TC[:, :experts]
    chosen = topk_indices(select, route.k if route.kind in ("rank", "topk") else experts)
    if route.kind == "rank":
        chosen = chosen[:, -1:]
    elif route.kind == "random":
        chosen = torch.tensor([[hash_of(row) % experts] for row in chosen.numpy()])
    gates = gate.gather(1, chosen)
    if route.kind == "threshold":
        share = gates / gates.sum(-1, keepdim=True)
        count_T = (share.cumsum(-1) - share < route.threshold).sum(-1)
        weights = torch.zeros_like(gates)
        for count in count_T.unique().tolist():  # the router weighs rows of equal length together
            rows = count_T == count
            weights[rows, :count] = router.weigh(gates[rows, :count])
        if route.weight == "one":
            weights = weights / weights.sum(-1, keepdim=True)
        open_TE = torch.zeros_like(gate, dtype=torch.bool)
        open_TE.scatter_(1, chosen, torch.arange(experts) < count_T[:, None])
        dense = torch.zeros_like(gate).scatter(1, chosen, weights)
        return type(routing).from_mask(open_TE, dense, num_experts=experts, scores=scores)
    weights = router.weigh(gates)
    if route.weight == "one":
        weights = weights / weights.sum(-1, keepdim=True)
    return type(routing).from_topk(chosen, weights, num_experts=experts, scores=scores)
