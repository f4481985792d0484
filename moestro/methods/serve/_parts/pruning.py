"""Dropping a token's lesser experts in a Transformers model: how much later tokens attend to each, and the edit.

Attention maps are not kept: an attention function of our own computes some rows of the map at a time, takes its output
from them, and adds the rows to a sum over queries.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.decoding import Route
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import mixture_layers
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.models.sites import sites_by_layer


NAME: Final = "moestro_column_sums"
ROWS: Final = 128
"""Queries whose attention is computed at a time."""
UNTOLD: Final = -100
"""Label of a token that no loss counts, as Transformers has it."""


class Sums:
    """Attention that keys receive, by layer of the last forward.

    Attributes:
        taken: index of the layer -> (sums over queries of the head-averaged attention [B, L], valid tokens [B, L]).
    """

    def __init__(self) -> None:
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}


_OPEN: list[Sums] = []


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention [B, L, H, D] of queries [B, H, L, D] as Transformers' eager one, and its column sums on the way."""
    if s_aux is not None:
        raise ConfigError(f"{type(module).__name__} has attention sinks, whose column sums are not defined here")
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length, width = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        seen = torch.ones(length, width, dtype=torch.bool, device=query.device).tril(width - length)
        mask: Tensor = torch.zeros(1, 1, length, width, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(~seen, torch.finfo(query.dtype).min)
    else:
        mask = attention_mask[..., :width]
    closed = mask <= torch.finfo(mask.dtype).min / 2
    # Who may not even see itself is padding. Queries are the last `length` keys.
    valid_BL = ~closed[:, 0].diagonal(width - length, 1, 2).expand(query.shape[0], length)
    outputs = []
    sum_BK = torch.zeros(query.shape[0], width, dtype=torch.float32, device=query.device)
    for first in range(0, length, ROWS):
        rows = slice(first, first + ROWS)
        score = query[:, :, rows] @ keys.transpose(2, 3) * scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        weight = (score + mask[:, :, rows]).softmax(-1, dtype=torch.float32)
        outputs.append(weight.to(query.dtype) @ values)
        sum_BK += (weight.mean(1) * valid_BL[:, rows, None]).sum(1)
    if _OPEN:
        _OPEN[-1].taken[int(module.layer_idx)] = (sum_BK[:, width - length :], valid_BL)  # type: ignore[arg-type]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


@contextmanager
def column_sums(model: Any) -> Iterator[Sums]:
    """Run a model with this attention; the model's own comes back afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _OPEN.append(Sums())
    try:
        yield _OPEN[-1]
    finally:
        _OPEN.pop()
        model.set_attn_implementation(before)


def scores(sum_BL: Tensor, valid_BL: Tensor, size_BL: Tensor, kind: str) -> Tensor:
    """Importance [B, L]: see ``dynamic_pruning``; -1 for padding, which nobody asks for."""
    later_BL = valid_BL.flip(1).cumsum(1).flip(1).clamp(min=1)
    paid = sum_BL if kind == "attention" else torch.ones_like(sum_BL)
    return (size_BL * paid / later_BL).masked_fill(~valid_BL, -1.0)


class PruningEdit(Edit):
    """The rule within a session: ``with pruning(model, route) as edit: model(...)``.

    Attributes:
        asked, dropped: assignments of experts behind the first, of tokens that are no padding, in layers that prune.
        experts: all assignments of such tokens in all layers.
    """

    def __init__(self, model: nn.Module, route: Route, protect: float, importance: str, sums: Sums | None) -> None:
        self.route, self.protect, self.importance, self.sums = route, protect, importance, sums
        self.layer_of = {site: index for index, site in _sites(model).items()}
        self.asked = self.dropped = self.experts = 0

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        layer = self.layer_of.get(site, -1)
        if routing.top_k is None:
            raise ContextError(f"{site}: experts are dropped from routers that give every token as many")
        prunes = self.route.layers is None or layer in self.route.layers
        valid_T = torch.ones(routing.num_tokens, dtype=torch.bool) if ctx.tokens is None else ctx.tokens.valid_T
        keep_T = torch.zeros_like(valid_T)
        if self.sums is not None and layer in self.sums.taken:
            valid_T, keep_T = self._spared(site, layer, ctx)
        elif self.protect and prunes:
            raise ContextError(
                f"{site}: protect={self.protect:g} needs the attention of its own block, which has none that can be "
                "watched; use protect=0, or name the layers that drop experts in `layers`"
            )
        self.experts += int(valid_T.sum()) * routing.top_k
        if not prunes:
            return routing
        ratio_K = torch.from_numpy(self.route.ratios_of(layer, routing.top_k))
        drop_TK = (routing.weight_TK < ratio_K * routing.weight_TK[:, :1]) & ~keep_T[:, None]
        self.asked += int(valid_T.sum()) * (routing.top_k - 1)
        self.dropped += int(drop_TK[valid_T].sum())
        return routing.without(drop_TK, router.weigh)

    def _spared(self, site: str, layer: int, ctx: RoutingContext) -> tuple[Tensor, Tensor]:
        """Which of the T tokens are no padding, and which keep all their experts."""
        assert self.sums is not None
        sum_BL, valid_BL = self.sums.taken[layer]
        keep_BL = torch.zeros_like(valid_BL)
        if valid_BL.shape[1] > 1:
            size_BL = ctx.kept[site, "input"].detach().float().abs().sum(-1).view(valid_BL.shape)
            score_BL = scores(sum_BL, valid_BL, size_BL, self.importance)
            count_B = (self.protect * valid_BL.sum(1).double() - 1e-9).ceil()
            rank_BL = score_BL.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            keep_BL = (rank_BL < count_B[:, None]) & valid_BL
        return valid_BL.reshape(-1), keep_BL.reshape(-1)


def _sites(model: nn.Module) -> Mapping[int, str]:
    """Index of a block -> site of its mixture."""
    found = sites_by_layer(model, "mlp")
    return {index: there.path for index, there in found.items() if there.path in mixture_layers(model)}


@contextmanager
def pruning(
    model: Any, route: Route, *, protect: float = 0.0, importance: str = "attention", watch: bool = True
) -> Iterator[PruningEdit]:
    """Forwards inside drop experts.

    Args:
        route: of kind ``ratio``. protect: share of the tokens of a text that keep all experts. importance: what ranks
            them. watch: know attention, which puts an attention of our own into the model; without it nothing can be
            protected.

    Raises:
        ConfigError: the model has attention that column sums are not defined for. ContextError, in a forward: a layer
            drops experts whose block has no such attention, and tokens shall be protected.
    """
    if not watch and not protect:
        edit = PruningEdit(model, route, 0.0, importance, None)
        with session(edits=[edit]):
            yield edit
        return
    with column_sums(model) as sums:
        edit = PruningEdit(model, route, protect, importance, sums)
        with session(edits=[edit], keeps=["input"]):
            yield edit


@torch.no_grad()
def loss_of_layers(
    model: Any,
    batches: Iterable[Mapping[str, Any] | Tensor],
    routes: Mapping[int, Route],
    protect: float,
    importance: str = "attention",
) -> dict[int, float]:
    """Mean loss in nats a token on calibration data under each route, which lets one layer drop experts.

    Every token that is foretold counts alike, whatever batch it stands in; padding is not foretold.

    Raises:
        ConfigError: there is no token to foretell.
    """
    rows = [_labelled(batch if isinstance(batch, Mapping) else {"input_ids": batch}) for batch in batches]
    counts = [int((row["labels"][:, 1:] != UNTOLD).sum()) for row in rows]
    rows = [row for row, count in zip(rows, counts, strict=True) if count]
    counts = [count for count in counts if count]
    if not counts:
        raise ConfigError("the calibration data holds no token that follows another: no loss can be measured")
    found = {}
    for layer, route in routes.items():
        with pruning(model, route, protect=protect, importance=importance):
            losses = [float(model(**row).loss) for row in rows]
        found[layer] = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    return found


def _labelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with labels: its own, else its ids, but for padding and what stands right behind it."""
    if row.get("labels") is not None:
        return dict(row)
    ids_BS, mask = row["input_ids"], row.get("attention_mask")
    if mask is None:
        return {**row, "labels": ids_BS}
    padding_BS = mask == 0
    return {**row, "labels": ids_BS.masked_fill(padding_BS | padding_BS.roll(1, dims=1), UNTOLD)}
