"""What a model's experts see and do, summed while it runs.

    with observe.statistics(model, gram=True) as stats:
        for batch in batches:
            model(**batch)
    stats["model.layers.3.mlp"].gated_norm.mean     # [E]

Padding, nulls, dropped assignments and checkpoint replays are left out of everything but ``chosen_C``; the model's
outputs do not change by a bit.
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
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.observe.moments import GroupMoments, SecondMoments


_CHUNK: Final = 4096  # rows of one bank call when expert outputs are wanted one by one


@dataclass
class LayerStats:
    """Statistics of one mixture layer.

    Attributes:
        chosen_C: int64, assignments by choice: nulls and dropped ones count.
        weight: routing weights of what ran, by expert. gate: gates before renormalisation.
        input_norm: lengths of the rows that reach each expert.
        output_norm, gated_norm: lengths of expert outputs f_e(x), and of weight times f_e(x); None unless asked.
        input_mean: moments of the rows themselves, [E, D]; None unless asked.
        input_gram, hidden_gram: X^T X by expert of the input [D, D] and of the input of the down projection [I, I];
            None unless asked.
    """

    num_experts: int
    chosen_C: Tensor
    weight: GroupMoments
    gate: GroupMoments
    input_norm: GroupMoments
    output_norm: GroupMoments | None = None
    gated_norm: GroupMoments | None = None
    input_mean: GroupMoments | None = None
    input_gram: SecondMoments | None = None
    hidden_gram: SecondMoments | None = None

    @property
    def count_E(self) -> Tensor:
        """Rows that reached each expert, int64 [E]."""
        return self.weight.count_G

    def merge(self, other: "LayerStats") -> None:
        """Join another run's statistics of the same layer, collected with the same wishes."""
        self.chosen_C = self.chosen_C + other.chosen_C
        for name in _PARTS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ConfigError(f"{name} was collected in one run only; collect both with the same wishes")
            if mine is not None:
                mine.merge(theirs)


_PARTS: Final = (
    "weight", "gate", "input_norm", "output_norm", "gated_norm", "input_mean", "input_gram", "hidden_gram",
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
    dtype: torch.dtype = torch.float32,
) -> Iterator[ModelStats]:
    """Collect statistics of every forward inside the block.

    Args:
        outputs: lengths of expert outputs; runs the experts a second time, one assignment a row.
        means: moments of the rows each expert gets, [E, D].
        gram: X^T X of the rows each expert gets. hidden_gram: the same of its down projection's input.
        dtype: of the gram matrices.

    Raises:
        ConfigError: no mixture layer, or ``hidden_gram`` with a bank whose inner rows are not known.
    """
    layers = mixture_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no mixture layer to observe; load it with moestro.load")
    watchers = {}
    stats = ModelStats()
    for site, layer in layers.items():
        watcher = _Watcher(layer, outputs=outputs, means=means, gram=gram, hidden=hidden_gram, dtype=dtype)
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
        stats, valid_T = watcher.stats, ctx.tokens.valid_T
        stats.chosen_C = stats.chosen_C + routing.counts_C(valid_T).cpu()
        if routing.scores is not None:
            real = _valid(routing.real(), valid_T)
            stats.gate.add(real.expert_N, routing.scores.gate_TC[real.token_N, real.expert_N])


class _Watcher:
    """The hook on one layer's bank."""

    def __init__(
        self, layer: MoELayer, *, outputs: bool, means: bool, gram: bool, hidden: bool, dtype: torch.dtype
    ) -> None:
        experts = layer.bank.num_experts
        self._dtype = dtype
        self._wants = {"input_mean": means, "input_gram": gram, "hidden_gram": hidden}
        if hidden and not isinstance(layer.bank, StackedFFN):
            raise ConfigError(f"{layer.site}: the inner rows of a {type(layer.bank).__name__} are not known")
        self.stats = LayerStats(
            num_experts=experts,
            chosen_C=torch.zeros(layer.router.num_experts + layer.router.num_null, dtype=torch.int64),
            weight=GroupMoments(experts),
            gate=GroupMoments(experts),
            input_norm=GroupMoments(experts),
            output_norm=GroupMoments(experts) if outputs else None,
            gated_norm=GroupMoments(experts) if outputs else None,
        )

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
        live = _valid(routing.real(), ctx.tokens.valid_T)
        stats = self.stats
        stats.weight.add(live.expert_N, live.weight_N)
        stats.input_norm.add(live.expert_N, x_TD.float().norm(dim=-1)[live.token_N])
        if stats.output_norm is not None and stats.gated_norm is not None:
            for part, y_NO in one_by_one(bank, x_TD, live):
                norm_N = y_NO.float().norm(dim=-1)
                stats.output_norm.add(part.expert_N, norm_N)
                stats.gated_norm.add(part.expert_N, norm_N * part.weight_N.float().abs())
        self._rows(bank, x_TD, live)

    def _rows(self, bank: Bank, x_TD: Tensor, live: Routing) -> None:
        stats = self.stats
        if not any(self._wants.values()):
            return
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


def one_by_one(bank: Bank, x_TD: Tensor, routing: Routing) -> Iterator[tuple[Routing, Tensor]]:
    """The unweighted output f_e(x) of every assignment on its own.

    Yields:
        (the assignments of a chunk, their outputs [n, O]).
    """
    for start in range(0, routing.token_N.numel(), _CHUNK):
        at = slice(start, start + _CHUNK)
        part = routing.replace(
            token_N=routing.token_N[at], expert_N=routing.expert_N[at], weight_N=routing.weight_N[at],
            kept_N=None, top_k=None,
        )  # fmt: skip
        count = part.token_N.numel()
        alone = Routing(
            torch.arange(count, device=x_TD.device),
            part.expert_N,
            torch.ones_like(part.weight_N),
            count,
            routing.num_experts,
            top_k=1,
        )
        # not bank(...): the hook that asked must not see this call
        yield part, bank.forward(x_TD[part.token_N], alone)


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
