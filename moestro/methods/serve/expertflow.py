"""A small transformer reads the tokens and says which experts every layer will use, before the model runs.

Predictor (`serve._parts.route_predictor`): logits_t [C] of a token from its own and the W - 1 ids before it. At the
beginning of a step with rows r, per layer l

    S_r = the ceil(factor k) highest of logits_r,l      pattern_l = union over rows of S_r      D_l = |pattern_l|
    need_e = 1 - prod over r of (1 - sigmoid(logit_r,l,e)),  by which pattern_l is ordered, the likeliest first

Slots of the cache are shared by demand, earlier layers first: of C slots for layers l .. L

    q_l = min(D_l, ceil(C D_l / sum of D_l .. D_L)),   C <- C - q_l,   next layer

and the q_l likeliest experts of each layer are wished for. When a layer has been routed its share goes to the later
ones. Who leaves the cache: whoever is in no pattern of a layer to come, the least recently used first; then, of those
in one, what its layer's share does not cover, the latest layer first, the least likely first. What was not foreseen is
read when it is needed, before anything else; outputs never change.

Scheduling (`order`): of the sequences that wait for their next token, the 2 T that wait longest are split into two
groups by `_parts.token_split`, on the same patterns; T is the width of a step. A serving plan that names this method
as forecast and, with the same settings, as order has texts written so.

The predictor is learned from a trace (`learn`, the verb `moestro learn expertflow TRACE OUT`) and named by the setting
``predictor``; without one it is taught by whoever shows the forecast a recorded past.

Source: ExpertFlow (2410.17954): routing path predictor, predictive locality-aware expert caching, token scheduler.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import CachePolicy, Key
from moestro.core.forecast import Floats, Forecast, Ints, Peek, Recorded, Wish
from moestro.core.inputs import MeterInputs
from moestro.methods.serve._parts import route_predictor, token_split
from moestro.methods.serve._parts.route_file import NOT_TAUGHT, LayerShape, check_heads, check_model


class Config(BaseConfig):
    """Settings.

    Attributes:
        predictor: folder that `moestro learn` wrote. factor: experts expected of a token, as a multiple of k.
        slots: experts that the cache holds; None: as many as were in it when one had to leave.
        width: T, sequences that run together, for the order.
        dim, heads, inner, depth, window: of a predictor that is learned. epochs: passes over the tokens; steps: updates
            at most. batch: rows of 256 tokens an update. lr, head_lr: peaks. held: share of sequences to measure on.
    """

    predictor: str | None = None
    factor: float = Field(default=1.0, gt=0, le=64)
    slots: int | None = Field(default=None, ge=1)
    width: int = Field(default=8, ge=1)
    dim: int = Field(default=64, ge=2)
    heads: int = Field(default=4, ge=1)
    inner: int = Field(default=256, ge=1)
    depth: int = Field(default=2, ge=1)
    window: int = Field(default=64, ge=1)
    epochs: int = Field(default=12, ge=1)
    steps: int = Field(default=2000, ge=1)
    batch: int = Field(default=8, ge=1)
    lr: float = Field(default=5e-3, gt=0)
    head_lr: float = Field(default=5e-3, gt=0)
    held: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        check_heads(self.dim, self.heads)
        return self


def shared_slots(demand: Sequence[int], slots: int) -> list[int]:
    """Slots of each layer in order, q_l at the top of the file; in all min(slots, sum of the demand)."""
    left, found = sum(demand), []
    for wanted in demand:
        share = min(wanted, -(-slots * wanted // left)) if left else 0
        found.append(share)
        slots, left = slots - share, left - wanted
    return found


def pattern(logits: Floats, layers: Sequence[LayerShape], factor: float) -> list[npt.NDArray[np.int64]]:
    """The experts of each layer that rows [R, C] are expected to need, the likeliest first, equal ones by id."""
    found, at = [], 0
    for (experts, top_k), alike in itertools.groupby(layers, key=lambda shape: (shape.experts, shape.top_k)):
        many = len(list(alike))
        part = logits[:, at : at + many * experts].reshape(len(logits), many, experts)
        at += many * experts
        count = min(math.ceil(factor * top_k - 1e-9), experts)
        need = np.logaddexp(0, part).sum(0)  # -log of the chance that no row needs it
        if count < experts:
            bar = np.partition(part, experts - count, axis=2)[:, :, experts - count, None]
            need = np.where((part >= bar).any(0), need, -1)
        order, size = np.argsort(-need, axis=1, kind="stable"), np.count_nonzero(need >= 0, axis=1)
        found += [ids[:length] for ids, length in zip(order, size, strict=True)]
    return found


class ExpertFlow(CachePolicy, Forecast):
    """See CachePolicy, Forecast and Student. One object does both; ``order`` is for the scheduler."""

    name = "serve.expertflow"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.predictor = None if config.predictor is None else route_predictor.load(config.predictor)
        self.last: dict[Key, int] = {}
        self.resident: set[Key] = set()
        self.full: int | None = config.slots
        self._pattern: dict[int, list[int]] = {}  # of the layers to come
        self._rank: dict[Key, int] = {}
        self._shares: dict[int, tuple[int, int]] = {}  # layer to come -> (its place, its slots)

    @property
    def policy(self) -> CachePolicy:
        """Itself."""
        return self

    @property
    def width(self) -> int:
        """T."""
        return self.config.width

    # -- what is foreseen ------------------------------------------------------------------------------------------

    def meet(self, experts: Sequence[int]) -> None:
        """See Forecast.

        Raises:
            ConfigError: the predictor was taught on another model.
        """
        if self.predictor is not None:
            check_model(self.predictor.header, experts)

    def ready(self, experts: Sequence[int], choices: Sequence[int]) -> None:
        """See Forecast."""
        if self.predictor is None:
            raise ConfigError(NOT_TAUGHT)
        check_model(self.predictor.header, experts, choices)

    def study(self, past: Recorded) -> None:
        """See Student; what was learned before stays."""
        if self.predictor is None:
            from moestro.methods.serve._parts.route_paths import paths_of_past
            from moestro.methods.serve._parts.route_training import taught

            self.predictor = taught(paths_of_past(past), self.config)

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        """See Forecast.

        Raises:
            ConfigError: nobody has taught it.
        """
        if self.predictor is None:
            raise ConfigError(NOT_TAUGHT)
        logits = self.predictor.step(tokens, positions, sequences)
        layers = self.predictor.header.layers
        found = pattern(logits, layers, self.config.factor)
        self._pattern = {shape.layer: ids.tolist() for shape, ids in zip(layers, found, strict=True)}
        self._shares = {}
        self._rank = {(layer, e): place for layer, ids in self._pattern.items() for place, e in enumerate(ids)}
        return self._share(self.full)

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast. The layer's share goes to later ones; its experts in use take room."""
        self._pattern = {later: experts for later, experts in self._pattern.items() if later > layer}
        return self._share(None if self.full is None else max(0, self.full - len(np.unique(ids[ids >= 0]))))

    def forget(self, sequence: int) -> None:
        """See Forecast."""
        if self.predictor is not None:
            self.predictor.forget(sequence)

    def _share(self, slots: int | None) -> list[Wish]:
        """Wishes for those layers to come whose shares have changed."""
        demand = [len(experts) for experts in self._pattern.values()]
        shares = demand if slots is None else shared_slots(demand, slots)
        new = {layer: (place, share) for place, (layer, share) in enumerate(zip(self._pattern, shares, strict=True))}
        changed = [layer for layer, (_, share) in new.items() if self._shares.get(layer, (0, -1))[1] != share]
        self._shares = new
        return [Wish(layer, tuple(self._pattern[layer][: new[layer][1]]), new[layer][0] + 1) for layer in changed]

    # -- who leaves ------------------------------------------------------------------------------------------------

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last[key] = time

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last[key] = max(time, self.last.get(key, -1))
        self.resident.add(key)

    def on_evict(self, key: Key) -> None:
        """See CachePolicy."""
        del self.last[key]
        self.resident.discard(key)

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy."""
        if self.config.slots is None:
            self.full = max(self.full or 0, len(self.resident))
        rank, shares = self._rank, self._shares
        loose = [key for key in candidates if key[0] not in shares or key not in rank]
        if loose:
            return min(loose, key=lambda key: (self.last[key], key))

        def later(key: Key) -> tuple[bool, int, int]:
            place, share = shares[key[0]]
            return rank[key] >= share, place, rank[key]

        return max(candidates, key=later)

    # -- who runs together -----------------------------------------------------------------------------------------

    def order(self, requests: list[Any]) -> list[Any]:
        """Requests that wait for a token, oldest first -> the same, so that the first T touch few experts."""
        together = 2 * min(self.config.width, len(requests) // 2)
        if self.predictor is None or together < 2:
            return requests
        head = requests[:together]
        paths = np.stack([self._path(request) for request in head])
        return [*(head[place] for place in token_split.split(paths)), *requests[together:]]

    def _path(self, request: Any) -> npt.NDArray[np.bool_]:
        """The experts that a request's next step is expected to touch, bool [C]."""
        assert self.predictor is not None
        header, sequence = self.predictor.header, request.lanes[0].table.id
        tokens = np.asarray(request.tokens)
        first = max(self.predictor.last(sequence) + 1, len(tokens) - header.window, 0)
        places = np.arange(min(first, len(tokens) - 1), len(tokens))
        logits = self.predictor.step(tokens[places], places, np.full(len(places), sequence))[-1:]
        found, at = np.zeros(header.choices, dtype=bool), 0
        for shape, ids in zip(header.layers, pattern(logits, header.layers, self.config.factor), strict=True):
            found[at + ids] = True
            at += shape.experts
        return found


def order(config: Config, plan: Any = None) -> Any:
    """The order of a scheduler, with a predictor of its own; better that of the object that also forecasts.

    Raises:
        ConfigError: no predictor is named.
    """
    if config.predictor is None:
        raise ConfigError(NOT_TAUGHT)
    return ExpertFlow(config).order


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy; without a forecast beside it, nothing is foreseen and it is LRU."""
    return ExpertFlow(config)


def forecast(config: Config, plan: Any = None) -> Forecast:
    """The forecast, which is the policy too."""
    return ExpertFlow(config)


def learn(subject: MeterInputs, config: Config, out: Path) -> dict[str, float]:
    """Teach a predictor from a trace and write it.

    Returns:
        What it scores on the sequences held back, beside forecasts that need no training.

    Raises:
        TraceError: no token ids. ConfigError: too few sequences. SaveError: ``out`` exists.
    """
    from moestro.methods.serve._parts.route_training import learned

    return learned(subject, config, out)


CARD = MethodCard(
    title="ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient Mixture-of-Experts Inference",
    year=2024,
    arxiv="2410.17954",
    paper="expertflow",
    summary="A small transformer foresees every layer's experts from token ids; slots are shared by demand.",
    taxonomy="inference/system/offloading/prefetching",
    needs=("trace",),
    deviations=(
        "the predictor is a causal transformer over a window of ids, where the paper has T5's encoder and decoder",
        "every prefix is a training example, so nothing is cut at random",
        "the next batch is foreseen when it begins, not while the one before it runs",
        "keys and values stand on pages, so that moving a sequence to another batch moves nothing",
    ),
)
