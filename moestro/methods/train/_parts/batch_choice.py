"""What stands beside a choice over the whole batch: routers that make it causal, and slots for the tokens it took.

Auxiliary routers learn token by token what the choice did:

    a(x) = sigmoid(SiLU(x A_1) A_2)      A_1 [D, bottleneck], A_2 [bottleneck, C]

trained by binary cross entropy against the choice that the main router made over the batch. At inference a choice is
taken iff a > threshold, without a limit; the main router only supplies its weight. A_2 begins at zero, where every
answer is 1/2: a router counts as trained once A_2 is anything else, and until then nothing causal can be had.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.cost import Work
from moestro.core.errors import ContextError
from moestro.core.losses import RoutingLoss
from moestro.core.router import exact_linear
from moestro.core.routing import Routing
from moestro.core.site import Borrowed


AUXILIARY = "auxiliary"  # the loss, its slot, and the session's value that switches it off (0)
BATCH = "batch_selection"  # session's value: 1 chooses over the batch in evaluation although routers are trained
MOMENTUM = 0.1


class AuxiliaryRouters(nn.Module):
    """One auxiliary router for each group of choices.

    Parameters: ``narrow`` [groups, bottleneck, D]; ``out`` [C, bottleneck], group after group, zero at first. Buffer
    ``threshold`` [C]: in logits; with ``calibrated`` the moving average of where as many tokens lie above it as the
    main router chose.

    Args:
        dim: D. sizes: choices of each group. bottleneck: None for D / 2. threshold: of a, or ``calibrated``.
    """

    threshold: Tensor

    def __init__(
        self, dim: int, sizes: Sequence[int], bottleneck: int | None, threshold: float | Literal["calibrated"]
    ) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.narrow = nn.Parameter(torch.empty(len(sizes), bottleneck or max(1, dim // 2), dim))
        self.out = nn.Parameter(torch.zeros(sum(sizes), self.narrow.shape[1]))
        if not self.narrow.is_meta:
            nn.init.normal_(self.narrow, std=dim**-0.5)
        self.calibrated = threshold == "calibrated"
        start = 0.0 if isinstance(threshold, str) else math.log(threshold / (1 - threshold))
        self.register_buffer("threshold", torch.full((sum(sizes),), start))

    def trained(self, members: Sequence[Tensor] | None = None) -> bool:
        """Whether some group's router has left its start; with ``members`` those of all groups that have any."""
        moved = [bool(out_CI.any()) for out_CI in torch.split(self.out.detach(), self.sizes)]
        if members is None:
            return any(moved)
        return all(known or not len(index_M) for known, index_M in zip(moved, members, strict=True))

    def forward(self, x_TD: Tensor, members: Sequence[Tensor]) -> Tensor:
        """Logits [T, C]; -inf for the choices of a group that a token is no member of. No gradient reaches x.

        Args:
            members: for each group int64 indices of its tokens.
        """
        logits_TC = torch.full((x_TD.shape[0], sum(self.sizes)), float("-inf"), device=x_TD.device)
        first = 0
        for narrow_ID, out_CI, index_M in zip(self.narrow, torch.split(self.out, self.sizes), members, strict=True):
            columns_C = torch.arange(first, first + len(out_CI), device=x_TD.device)
            inner_MI = nn.functional.silu(exact_linear(x_TD.detach()[index_M], narrow_ID))
            logits_TC = logits_TC.index_put((index_M[:, None], columns_C), exact_linear(inner_MI, out_CI))
            first += len(out_CI)
        return logits_TC

    @torch.no_grad()
    def calibrate(self, logits_TC: Tensor, chosen_TC: Tensor) -> None:
        """Move the thresholds towards where they part as many tokens from the rest as were chosen."""
        if self.calibrated:
            level_C, known_C = parting_level(logits_TC, chosen_TC)
            new_C = torch.lerp(self.threshold.float(), level_C, MOMENTUM)
            self.threshold.copy_(torch.where(known_C, new_C, self.threshold.float()))

    def flops_per_token(self, work: Work) -> float:
        """Mean over the groups: a token runs through one of them, and in evaluation only through trained ones."""
        if not (work.training or self.out.is_meta or self.trained()):
            return 0.0
        return 2 * (self.narrow.numel() + self.out.numel()) / len(self.sizes)


def parting_level(logits_TC: Tensor, chosen_TC: Tensor) -> tuple[Tensor, Tensor]:
    """For each choice the logit midway between its n-th and next highest token, n being how many were chosen.

    Args:
        logits_TC: -inf where a token is no member. chosen_TC: bool.

    Returns:
        Levels [C], one under the lowest where all members were chosen; bool [C], whether any was.
    """
    count_C = chosen_TC.sum(0)
    member_C = (logits_TC > float("-inf")).sum(0)
    sorted_TC = logits_TC.detach().float().sort(0, descending=True).values
    last_C = sorted_TC.gather(0, (count_C - 1).clamp(min=0)[None])[0]
    next_C = sorted_TC.gather(0, count_C.clamp(max=len(sorted_TC) - 1)[None])[0]
    level_C = torch.where(count_C < member_C, (last_C + next_C) / 2, last_C - 1)
    known_C = count_C > 0
    return torch.where(known_C, level_C, torch.zeros_like(level_C)), known_C


def selection_loss(logits_TC: Tensor, chosen_TC: Tensor) -> Tensor:
    """Binary cross entropy of a(x) against the choice: mean over a token's open choices, sum over tokens.

    Args:
        logits_TC: -inf where a token is no member; such choices do not count. chosen_TC: bool.
    """
    open_TC = logits_TC > float("-inf")
    each_TC = nn.functional.binary_cross_entropy_with_logits(
        logits_TC.masked_fill(~open_TC, 0.0), chosen_TC.float(), reduction="none"
    )
    return (each_TC * open_TC / open_TC.sum(-1, keepdim=True).clamp(min=1)).sum()


class SelectionLoss(RoutingLoss):
    """The routers' loss, from the logits that the main router left in the slot; 0 where there are none."""

    unit = "token"

    def __init__(self, routers: AuxiliaryRouters) -> None:
        super().__init__()
        self.routers = Borrowed(routers)

    def flops_per_token(self, work: Work) -> float:
        """Nothing of its own."""
        return 0.0

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss."""
        logits_TC = ctx.get(site, AUXILIARY)
        if logits_TC is None:
            return routing.weight_N.new_zeros(())
        chosen_TC = torch.zeros_like(logits_TC, dtype=torch.bool)
        chosen_TC[routing.token_N, routing.expert_N] = True
        routers = self.routers.module
        if not ctx.replaying and isinstance(routers, AuxiliaryRouters):
            routers.calibrate(logits_TC, chosen_TC)
        return selection_loss(logits_TC, chosen_TC)


def whole_share(tokens: int, share: Fraction) -> int:
    """A share of the tokens as a number of tokens: halves go up, at least 1 of any, at most all."""
    return min(tokens, max(1, math.floor(share * tokens + Fraction(1, 2))))


def logistic_like(x: Tensor) -> Tensor:
    """G' - G'' for independent Gumbel(0, 1) samples: -log of an exponential sample is one."""
    first, second = (torch.empty_like(x).exponential_().log() for _ in range(2))
    return second - first


def chooses_over_batch(
    routers: AuxiliaryRouters, members: Sequence[Tensor], allow_noncausal: bool, site: str, ctx: RoutingContext
) -> bool:
    """Whether this forward chooses over its batch; else each token asks the auxiliary routers.

    Inside a depth-routed block a group may never have had a token to learn from: there no choice takes its tokens, if
    the others are trained. Elsewhere a token of an untrained group has nobody to ask.

    Args:
        members: for each group int64 indices of its tokens.

    Raises:
        ContextError: there is a cache, that is, text is being generated, and no trained auxiliary router to ask.
    """
    if routers.training:
        return True
    trained = routers.trained() and (routers.trained(members) or not (ctx.tokens is None or ctx.tokens.whole))
    if trained and not ctx.value(BATCH, 0.0):
        return False
    first = ctx.tokens is None or ctx.tokens.cached == 0
    if ctx.cache is not None and not (allow_noncausal and first):
        why = f"{BATCH}=1 is set" if trained else "its auxiliary routers are not trained"
        way = "leave it out" if trained else "train them, or set allow_noncausal for a prompt without decoding"
        raise ContextError(f"{site}: cannot generate, tokens are chosen over the whole batch because {why}; {way}")
    return True


class Witness:
    """Recorder: whether every choice of a forward was made token by token, so that its loss may be called causal."""

    def __init__(self) -> None:
        self.causal = True

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """Take one layer's routing."""
        self.causal = self.causal and routing.causal


@dataclass(frozen=True)
class Picked:
    """Tokens of each row that a block runs on, chosen ones first, rows filled up to the longest.

    Attributes:
        place_BM: int64, place in the row; chosen ones ascend. real_BM: bool, False where a row was filled up.
        width: S.
    """

    place_BM: Tensor
    real_BM: Tensor
    width: int

    @classmethod
    def of(cls, chosen_BS: Tensor, least: int = 0) -> "Picked":
        """The chosen tokens of each row.

        Args:
            least: take so many a row at any rate.
        """
        most = max(least, int(chosen_BS.sum(1).max()))
        place_BM = torch.sort(~chosen_BS, dim=1, stable=True).indices[:, :most]
        return cls(place_BM, chosen_BS.gather(1, place_BM), chosen_BS.shape[1])

    @property
    def token_X(self) -> Tensor:
        """Index of every slot among the B * S tokens, row by row."""
        row_B = torch.arange(len(self.place_BM), device=self.place_BM.device)
        return (row_B[:, None] * self.width + self.place_BM).reshape(-1)

    def take(self, value: Any) -> Any:
        """What belongs to the slots, of a tensor [B or 1, S, ...] or a tuple of such."""
        if isinstance(value, tuple):
            return tuple(self.take(part) for part in value)
        rows = value.expand(len(self.place_BM), *value.shape[1:])
        index = self.place_BM.view(*self.place_BM.shape, *[1] * (value.ndim - 2))
        return rows.gather(1, index.expand(*self.place_BM.shape, *value.shape[2:]))

    def mask(self, given: Tensor | None, key_BL: Tensor, cached: int, causal: bool) -> Tensor:
        """Attention mask [B, 1 or H, M, L] over L keys, of the kind that was given (bool when none was).

        Args:
            given: mask [B or 1, 1 or H, S, L] of the whole forward, bool or additive. key_BL: whether a key is there.
            cached: keys before this forward. causal: whether to look back only when no mask says so.

        A slot may always see itself: rows of nothing would give NaN.
        """
        rows, length = key_BL.shape
        own_BM = self.place_BM + cached
        position_L = torch.arange(length, device=key_BL.device)
        own_BML = position_L == own_BM[:, :, None]
        open_BML = (key_BL[:, None, :] | own_BML) & (
            (position_L <= own_BM[:, :, None]) if causal and given is None else own_BML.new_ones(())
        )
        if given is None:
            return open_BML[:, None]
        index = self.place_BM[:, None, :, None].expand(-1, given.shape[1], -1, length)
        rows_BHML = given[..., :length].expand(rows, -1, -1, -1).gather(2, index)
        if given.dtype == torch.bool:
            return (rows_BHML & open_BML[:, None]) | own_BML[:, None]
        closed = torch.finfo(given.dtype).min
        return rows_BHML.masked_fill(~open_BML[:, None], closed).masked_fill(own_BML[:, None], 0.0)


class Spread:
    """A cache as a block on some of a forward's positions sees it: what it writes goes to the original places."""

    def __init__(self, cache: Any, picked: Picked) -> None:
        self.cache, self.picked = cache, picked

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, H, M, d]; all that the cache then holds."""
        found: tuple[Tensor, Tensor] = self.cache.update(
            self._spread(keys), self._spread(values), layer_idx, *more, **named
        )
        return found

    def _spread(self, part: Tensor) -> Tensor:
        index = self.picked.place_BM[:, None, :, None].expand_as(part)
        return part.new_zeros(*part.shape[:2], self.picked.width, part.shape[3]).scatter(2, index, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
