"""What a model's experts see and do, summed while it runs.

    with observe.statistics(model, gram=True) as stats:
        for batch in batches:
            model(**batch)
    stats["model.layers.3.mlp"].gated_norm.mean     # [E]

Padding, nulls, dropped assignments and checkpoint replays are left out of everything but ``chosen_C``; the model's
outputs do not change by a bit, whichever policy says whom a token counts for (``moestro.observe.policy``).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import Bank, StackedFFN
from moestro.core.context import RoutingContext, current_context
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.routing import Routing, Scores
from moestro.core.session import session
from moestro.observe.moments import GroupMoments, JointMoments, RankRatios, SecondMoments
from moestro.observe.policy import Policy, check_policy, counted
from moestro.observe.sample import BlockSample, every_expert, one_by_one


@dataclass
class LayerStats:
    """Statistics of one mixture layer.

    Attributes:
        chosen_C: int64, assignments by choice: nulls and dropped ones count.
        natural_E: int64, rows that reached each expert. top_E: int64, tokens whose largest weight is the expert's.
        ratios: w_r / w_0 of the weights of a token by rank. logits: joint moments of the C raw router logits of all
            tokens; None for a router without scores. These five are the router's own, whatever the policy.
        weight: routing weights of what is counted, by expert. gate: gates before renormalisation, see ``gates_TC``.
        input_norm: lengths of the rows that reach each expert.
        output_norm, gated_norm: lengths of expert outputs f_e(x), and of weight times f_e(x); None unless asked.
        input_mean: moments of the rows themselves, [E, D]; None unless asked.
        input_gram, hidden_gram: X^T X by expert of the input [D, D] and of the input of the down projection [I, I];
            None unless asked.
        output_gram_EE: sum over tokens of <f_e(x), f_f(x)>, every expert on every token, float64; None unless asked.
        sample: some tokens with all experts' outputs against each other; None unless asked.
    """

    num_experts: int
    chosen_C: Tensor
    natural_E: Tensor
    top_E: Tensor
    ratios: RankRatios
    weight: GroupMoments
    gate: GroupMoments
    input_norm: GroupMoments
    output_norm: GroupMoments | None = None
    gated_norm: GroupMoments | None = None
    input_mean: GroupMoments | None = None
    input_gram: SecondMoments | None = None
    hidden_gram: SecondMoments | None = None
    logits: JointMoments | None = None
    output_gram_EE: Tensor | None = None
    sample: BlockSample | None = None

    @property
    def count_E(self) -> Tensor:
        """Rows that count for each expert, int64 [E]; those that reached it under the policy ``natural``."""
        return self.weight.count_G

    def merge(self, other: "LayerStats") -> None:
        """Join another run's statistics of the same layer, collected with the same wishes."""
        self.chosen_C = self.chosen_C + other.chosen_C
        self.natural_E = self.natural_E + other.natural_E
        self.top_E = self.top_E + other.top_E
        if (self.output_gram_EE is None) != (other.output_gram_EE is None):
            raise ConfigError("output_gram_EE was collected in one run only; collect both with the same wishes")
        if self.output_gram_EE is not None and other.output_gram_EE is not None:
            self.output_gram_EE = self.output_gram_EE + other.output_gram_EE
        for name in _PARTS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ConfigError(f"{name} was collected in one run only; collect both with the same wishes")
            if mine is not None:
                mine.merge(theirs)


_PARTS: Final = (
    "ratios", "weight", "gate", "input_norm", "output_norm", "gated_norm", "input_mean", "input_gram", "hidden_gram",
    "logits", "sample",
)  # fmt: skip


@dataclass
class ModelStats(Mapping[str, LayerStats]):
    """Statistics by site. ``num_tokens``: valid tokens of all forwards."""

    layers: dict[str, LayerStats] = field(default_factory=dict)
    num_tokens: int = 0

    def __getitem__(self, site: str) -> LayerStats:
        return self.layers[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def merge(self, other: "ModelStats") -> None:
        """Join another run's, for example another rank's."""
        if list(other) != list(self):
            raise ConfigError(f"statistics of {len(other)} layers do not join those of {len(self)} other layers")
        self.num_tokens += other.num_tokens
        for site, stats in self.layers.items():
            stats.merge(other[site])


@contextmanager
def statistics(
    model: nn.Module,
    *,
    outputs: bool = False,
    means: bool = False,
    gram: bool = False,
    hidden_gram: bool = False,
    output_gram: bool = False,
    sample: int = 0,
    policy: Policy = "natural",
    raise_to: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[ModelStats]:
    """Collect statistics of every forward inside the block.

    Args:
        outputs: lengths of expert outputs; runs the experts a second time, one assignment a row.
        means: moments of the rows each expert gets, [E, D].
        gram: X^T X of the rows each expert gets. hidden_gram: the same of its down projection's input.
        output_gram: inner products of the experts' outputs, all on every token: costs E experts a token.
        sample: tokens to keep a ``BlockSample`` of.
        policy: whom a token counts for, see ``moestro.observe.policy``; the forward stays as it is. raise_to: choices
            a token under the policy ``raised``.
        dtype: of the gram matrices.

    Raises:
        ConfigError: no mixture layer, ``hidden_gram`` with a bank whose inner rows are not known, or a policy that a
            router cannot follow.
    """
    layers = mixture_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no mixture layer to observe; load it with moestro.load")
    watchers = {}
    stats = ModelStats()
    wishes = {"output_norm": outputs, "input_mean": means, "input_gram": gram, "hidden_gram": hidden_gram}
    for site, layer in layers.items():
        check_policy(site, layer.router, policy, raise_to)
        watcher = _Watcher(layer, {**wishes, "output_gram": output_gram}, sample, (policy, raise_to), dtype)
        watchers[site] = watcher
        stats.layers[site] = watcher.stats
    counter = _Counter(watchers, stats)
    with ExitStack() as hooks:
        for site, layer in layers.items():
            handle = layer.bank.register_forward_hook(watchers[site].after_bank)
            hooks.callback(handle.remove)
        hooks.enter_context(session(recorder=counter))
        yield stats


def collect(model: nn.Module, batches: Iterable[Mapping[str, Any]], **wishes: Any) -> ModelStats:
    """``statistics`` over batches: each is run as ``model(**batch)`` without gradients."""
    with statistics(model, **wishes) as stats, torch.no_grad():
        for batch in batches:
            model(**batch)
    return stats


class _Counter:
    """The recorder: what only the full routing tells (nulls, dropped demand, gates)."""

    def __init__(self, watchers: Mapping[str, "_Watcher"], stats: ModelStats) -> None:
        self._watchers, self._stats = watchers, stats
        self._last: RoutingContext | None = None

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        watcher = self._watchers.get(site)
        if watcher is None or ctx.tokens is None:
            return
        if ctx is not self._last:
            self._stats.num_tokens += int(ctx.tokens.valid_T.sum())
            self._last = ctx
        watcher.decided(routing, ctx.tokens.valid_T)


class _Watcher:
    """What one layer's routing and the hook on its bank tell."""

    def __init__(
        self,
        layer: MoELayer,
        wants: Mapping[str, bool],
        sample: int,
        policy: tuple[Policy, int | None],
        dtype: torch.dtype,
    ) -> None:
        experts = layer.bank.num_experts
        self._layer, self._wants, self._policy, self._dtype = layer, wants, policy, dtype
        if wants["hidden_gram"] and not isinstance(layer.bank, StackedFFN):
            raise ConfigError(f"{layer.site}: the inner rows of a {type(layer.bank).__name__} are not known")
        outputs = wants["output_norm"]
        self.stats = LayerStats(
            num_experts=experts,
            chosen_C=torch.zeros(layer.router.num_experts + layer.router.num_null, dtype=torch.int64),
            natural_E=torch.zeros(experts, dtype=torch.int64),
            top_E=torch.zeros(experts, dtype=torch.int64),
            ratios=RankRatios(),
            weight=GroupMoments(experts),
            gate=GroupMoments(experts),
            input_norm=GroupMoments(experts),
            output_norm=GroupMoments(experts) if outputs else None,
            gated_norm=GroupMoments(experts) if outputs else None,
            output_gram_EE=torch.zeros(experts, experts, dtype=torch.float64) if wants["output_gram"] else None,
            sample=BlockSample(layer.router, sample) if sample else None,
        )

    @torch.no_grad()
    def decided(self, routing: Routing, valid_T: Tensor) -> None:
        """Take the router's natural decision."""
        stats = self.stats
        stats.chosen_C = stats.chosen_C + routing.counts_C(valid_T).cpu()
        real = _valid(routing.real(), valid_T)
        stats.natural_E = stats.natural_E + torch.bincount(real.expert_N, minlength=stats.num_experts).cpu()
        order_N, rank_N = ranked(real)
        first_N = order_N[rank_N == 0]
        stats.top_E = stats.top_E + torch.bincount(real.expert_N[first_N], minlength=stats.num_experts).cpu()
        largest_T = real.weight_N.new_zeros(real.num_tokens).index_copy(
            0, real.token_N[first_N], real.weight_N[first_N]
        )
        above_N = largest_T[real.token_N[order_N]]
        lesser_N = (rank_N > 0) & (above_N > 0)
        stats.ratios.add(rank_N[lesser_N], real.weight_N[order_N][lesser_N] / above_N[lesser_N])
        if routing.scores is not None:
            logits_TC = routing.scores.logits_TC
            if stats.logits is None:
                stats.logits = JointMoments(logits_TC.shape[-1])
            stats.logits.add(logits_TC[valid_T])

    @torch.no_grad()
    def after_bank(self, bank: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        ctx = current_context()
        if ctx is None or ctx.replaying or ctx.tokens is None or not isinstance(bank, Bank):
            return
        x_TD, routing = args
        if len(x_TD) != ctx.tokens.count:
            raise ContextError(
                f"the bank got {len(x_TD)} rows of {ctx.tokens.count} tokens; observe before experts move to ranks"
            )
        valid_T, site = ctx.tokens.valid_T, self._layer.site
        live = _valid(counted(site, self._layer.router, routing, *self._policy), valid_T)
        stats = self.stats
        stats.weight.add(live.expert_N, live.weight_N)
        if routing.scores is not None:
            stats.gate.add(live.expert_N, gates_TC(routing.scores)[live.token_N, live.expert_N])
        stats.input_norm.add(live.expert_N, x_TD.float().norm(dim=-1)[live.token_N])
        if stats.output_norm is not None and stats.gated_norm is not None:
            for part, y_NO in one_by_one(bank, x_TD, live):
                norm_N = y_NO.float().norm(dim=-1)
                stats.output_norm.add(part.expert_N, norm_N)
                stats.gated_norm.add(part.expert_N, norm_N * part.weight_N.float().abs())
        self._rows(bank, x_TD, live)
        if stats.output_gram_EE is not None:
            for _, y_TEO in every_expert(bank, x_TD[valid_T]):
                flat = y_TEO.double().transpose(0, 1).flatten(1)
                stats.output_gram_EE += (flat @ flat.T).cpu()
        if stats.sample is not None:
            stats.sample.take(site, bank, x_TD, routing, valid_T)

    def _rows(self, bank: Bank, x_TD: Tensor, live: Routing) -> None:
        stats = self.stats
        width = x_TD.shape[-1]
        if self._wants["input_mean"] and stats.input_mean is None:
            stats.input_mean = GroupMoments(bank.num_experts, (width,))
        if self._wants["input_gram"] and stats.input_gram is None:
            stats.input_gram = SecondMoments(bank.num_experts, width, self._dtype)
        if self._wants["hidden_gram"] and stats.hidden_gram is None:
            assert isinstance(bank, StackedFFN)
            stats.hidden_gram = SecondMoments(bank.num_experts, bank.inner, self._dtype)
        if stats.input_mean is not None:
            stats.input_mean.add(live.expert_N, x_TD[live.token_N])
        for expert in sorted(set(live.expert_N.tolist())):
            rows_ND = x_TD[live.token_N[live.expert_N == expert]]
            if stats.input_gram is not None:
                stats.input_gram.add(expert, rows_ND)
            if stats.hidden_gram is not None:
                assert isinstance(bank, StackedFFN)
                stats.hidden_gram.add(expert, hidden_rows(bank, expert, rows_ND))


def gates_TC(scores: Scores) -> Tensor:
    """Gates before renormalisation, [T, C], none negative.

    A router whose softmax runs over the choice alone hands over logits; its gates are the softmax over all choices.
    """
    return scores.probabilities() if torch.equal(scores.gate_TC, scores.logits_TC) else scores.gate_TC


def ranked(routing: Routing) -> tuple[Tensor, Tensor]:
    """Assignments by token and falling weight: their places [N], and the rank of each within its token, from 0.

    Equal weights go to the lower id, as choices do.
    """
    order_N = torch.argsort(routing.expert_N, stable=True)
    order_N = order_N[torch.argsort(routing.weight_N[order_N], descending=True, stable=True)]
    order_N = order_N[torch.argsort(routing.token_N[order_N], stable=True)]
    count_T = torch.bincount(routing.token_N, minlength=routing.num_tokens)
    begin_T = count_T.cumsum(0) - count_T
    rank_N = torch.arange(len(order_N), device=order_N.device) - begin_T[routing.token_N[order_N]]
    return order_N, rank_N


def hidden_rows(bank: StackedFFN, expert: int, rows_ND: Tensor) -> Tensor:
    """What enters the down projection of one expert, [N, I], for its input rows [N, D]."""
    bias = None if bank.up_bias is None else bank.up_bias[expert]
    pre_NJ = nn.functional.linear(rows_ND, bank.up_weight[expert], bias)
    return ops.apply_activation(pre_NJ, bank.activation, bank.gated)


def _valid(routing: Routing, valid_T: Tensor) -> Routing:
    """Only the assignments of valid tokens."""
    if bool(valid_T.all()):
        return routing
    live_N = valid_T[routing.token_N]
    kept_N = None if routing.kept_N is None else routing.kept_N[live_N]
    return routing.replace(
        token_N=routing.token_N[live_N], expert_N=routing.expert_N[live_N], weight_N=routing.weight_N[live_N],
        kept_N=kept_N, top_k=None,
    )  # fmt: skip
