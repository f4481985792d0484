"""From logits to a token: greedy, temperature, top-p, top-k, penalties, biases, log-probabilities, seeds.

A request draws from a generator of its own, one number a token, so that its text depends on its seed and on nothing
that runs beside it. Equal logits: the lower id is the better one.
"""

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moestro.core.errors import MoestroError
from moestro.engine.sequences import Floats


Doubles = npt.NDArray[np.float64]
_FEW = 1024


class LogitsError(MoestroError):
    """The model's logits hold a NaN, or no token is left to choose."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request chooses its tokens; the values are checked where the request comes in.

    Attributes:
        temperature: 0 is greedy. top_p: the likeliest tokens that carry this much probability. top_k: so many at
            most, 0: all. seed: None draws one. min_tokens: no end before so many. ignore_eos: never end by oneself.
        logprobs: None: none; else so many alternatives a token. bias: token id -> what is added to its logit.
        presence, frequency: subtracted from the logit of a token that was written, once and for each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0


@dataclass(frozen=True)
class Choice:
    """A chosen token; log-probabilities are of the decoder's distribution, before temperature and truncation.

    Attributes:
        logprob: of the token, None when none were asked for. top: (token, log-probability), best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The choices of one sequence.

    Args:
        ends: tokens that end a text; closed while fewer than ``min_tokens`` are written, or always.
    """

    def __init__(self, sampling: Sampling, ends: frozenset[int] = frozenset()) -> None:
        self.sampling = sampling
        self.ends = sorted(ends)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.random = np.random.Generator(np.random.PCG64(seed))
        self.written: Counter[int] = Counter()

    def choose(self, logits: Floats) -> Choice:
        """The next token from logits float32 [V].

        Raises:
            LogitsError: a NaN, or every token is at minus infinity.
        """
        peak = float(logits.max())
        if not np.isfinite(peak):
            raise LogitsError(f"the largest logit is {peak}; the model's output is damaged")
        shaped = self._shaped(logits)
        token = int(shaped.argmax()) if self.sampling.temperature == 0 else self._draw(shaped)
        if not np.isfinite(shaped[token]):
            raise LogitsError("no token is left to choose; the request closes all that the model could say")
        self.written[token] += 1
        if self.sampling.logprobs is None:
            return Choice(token)
        logs = logits.astype(np.float64) - peak
        logs -= np.log(np.exp(logs).sum())
        best = _best(logits, self.sampling.logprobs)
        return Choice(token, float(logs[token]), tuple((int(i), float(logs[i])) for i in best))

    def _shaped(self, logits: Floats) -> Floats:
        """Logits after biases, penalties and closed ends; the argument itself when there are none."""
        s = self.sampling
        closed = s.ignore_eos or self.written.total() < s.min_tokens
        penalised = bool(s.presence or s.frequency) and bool(self.written)
        if not (s.bias or penalised or (closed and self.ends)):
            return logits
        shaped = logits.copy()
        for token, value in s.bias.items():
            shaped[token] += value
        if penalised:
            ids = np.fromiter(self.written.keys(), dtype=np.int64)
            times = np.fromiter(self.written.values(), dtype=np.float32)
            shaped[ids] -= np.float32(s.presence) + np.float32(s.frequency) * times
        if closed and self.ends:
            shaped[self.ends] = -np.inf
        return shaped

    def _draw(self, logits: Floats) -> int:
        """One draw from softmax(logits / temperature), cut to top-k and then to top-p."""
        s = self.sampling
        uniform = self.random.random()
        # The largest first: a tiny temperature then gives 0 and -inf, never inf - inf.
        with np.errstate(over="ignore"):
            weights = np.exp((logits.astype(np.float64) - float(logits.max())) / s.temperature)
        if s.top_k == 0 and s.top_p >= 1:
            return _pick(weights, uniform, None)
        order = self._candidates(logits, weights)
        return _pick(weights[order], uniform, order)

    def _candidates(self, logits: Floats, weights: Doubles) -> npt.NDArray[np.int64]:
        """Ids that may be drawn, best first. Sorting all of a large vocabulary is avoided where a few carry enough."""
        s = self.sampling
        if s.top_k:
            order = _best(logits, s.top_k)
            goal = s.top_p * float(weights[order].sum())
        else:
            goal = s.top_p * float(weights.sum())
            order = _best(logits, _FEW)
            if weights[order].sum() < goal:
                order = _best(logits, len(logits))
        count = int(np.searchsorted(np.cumsum(weights[order]), goal)) + 1
        return order[:count]


def _best(logits: Floats, count: int) -> npt.NDArray[np.int64]:
    """Ids of the ``count`` largest, best first, equal ones by id."""
    count = min(count, len(logits))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    if count < len(logits):
        edge = np.partition(logits, len(logits) - count)[len(logits) - count]
        ids = np.nonzero(logits >= edge)[0]
    else:
        ids = np.arange(len(logits))
    return ids[np.lexsort((ids, -logits[ids]))][:count].astype(np.int64)


def _pick(weights: Doubles, uniform: float, ids: npt.NDArray[np.int64] | None) -> int:
    """Index drawn in proportion to weights; a weight of 0 is never drawn."""
    sums = np.cumsum(weights)
    index = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    if index == len(sums):  # the product was rounded up to the sum
        index = int(np.nonzero(weights)[0][-1])
    return index if ids is None else int(ids[index])
