"""The arithmetic behind a trace's queries: pure functions on streams of row blocks.

A block is the rows of one row group, as ``{column: array}``, in execution order. Blocks arrive one by one and only sums
are kept, so a query needs memory for one block and its own answer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moestro.core.errors import TraceError
from moestro.core.trace_format import LayerInfo


MAX_MATRIX: Final = 8192
_INTERLEAVED: Final = (
    16  # nested stacks may interleave their forwards by a few numbers; older tokens will not come back
)
_CELLS: Final = 1 << 21

Array = NDArray[Any]
Ints = NDArray[np.int64]
Block = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Membership:
    """Which real experts each token of one layer used.

    Attributes:
        key_T3: int64 [T, 3], (forward, sequence, position) of each token. used_TE: sparse 0/1 matrix [T, E].
    """

    key_T3: Ints
    used_TE: Any

    def where(self, keep_T: Array) -> "Membership":
        """The tokens at ``keep_T`` (mask or indices)."""
        return Membership(self.key_T3[keep_T], self.used_TE[keep_T])


def membership(block: Block, layer: int, num_experts: int) -> Membership:
    """The tokens of ``layer`` in a block with the experts they used; nulls and "no expert" leave an empty row."""
    rows_N = np.flatnonzero(block["layer"] == layer)
    key_N3 = np.stack([block[name][rows_N] for name in ("forward", "sequence", "position")], axis=1).astype(np.int64)
    starts_N = np.ones(rows_N.size, dtype=bool)
    starts_N[1:] = (key_N3[1:] != key_N3[:-1]).any(1)
    token_N = np.cumsum(starts_N) - 1
    expert_N = block["expert"][rows_N]
    real_N = (expert_N >= 0) & (expert_N < num_experts)
    num_tokens = int(starts_N.sum())
    ones_N = np.ones(int(real_N.sum()), dtype=np.int64)
    used_TE = sparse.csr_array((ones_N, (token_N[real_N], expert_N[real_N])), shape=(num_tokens, num_experts))
    used_TE.sum_duplicates()
    used_TE.data[:] = 1
    return Membership(key_N3[starts_N], used_TE)


@dataclass(slots=True)
class _Pair:
    """One matrix in the making: tokens of either side that still wait for the other."""

    left: int
    right: int
    counts: Ints
    waiting: tuple[list[Membership], list[Membership]] = field(default_factory=lambda: ([], []))

    def add(self, left: Membership, right: Membership, oldest: int) -> None:
        for side, new in zip(self.waiting, (left, right), strict=True):
            if new.key_T3.size:
                side.append(new)
        if not (self.waiting[0] and self.waiting[1]):
            self._forget(oldest)
            return
        a, b = (_join(side) for side in self.waiting)
        at_a, at_b = _matches(a.key_T3, b.key_T3)
        self.counts += (a.used_TE[at_a].T @ b.used_TE[at_b]).toarray()
        for side, whole, matched in zip(self.waiting, (a, b), (at_a, at_b), strict=True):
            rest_T = np.ones(len(whole.key_T3), dtype=bool)
            rest_T[matched] = False
            side[:] = [whole.where(rest_T)] if rest_T.any() else []
        self._forget(oldest)

    def _forget(self, oldest: int) -> None:
        for side in self.waiting:
            side[:] = [part for part in side if part.key_T3[:, 0].max() >= oldest]


def _join(parts: Sequence[Membership]) -> Membership:
    if len(parts) == 1:
        return parts[0]
    used_TE = sparse.vstack([part.used_TE for part in parts], format="csr")
    return Membership(np.concatenate([part.key_T3 for part in parts]), used_TE)


def _matches(a_T3: Ints, b_T3: Ints) -> tuple[Ints, Ints]:
    """Indices of equal keys in both lists; keys are unique within a list."""
    if a_T3.shape == b_T3.shape and (a_T3 == b_T3).all():
        same = np.arange(len(a_T3))
        return same, same
    both = np.concatenate([a_T3, b_T3])
    side = np.repeat([0, 1], [len(a_T3), len(b_T3)])
    order = np.lexsort((side, both[:, 2], both[:, 1], both[:, 0]))
    equal = (both[order[1:]] == both[order[:-1]]).all(1)
    return order[:-1][equal], order[1:][equal] - len(a_T3)


def pair_counts(
    blocks: Iterable[Block], pairs: Sequence[tuple[int, int]], infos: Mapping[int, LayerInfo]
) -> list[Ints]:
    """For each pair of layers, how many tokens used expert i in the first and j in the second, int64 [E_a, E_b].

    Args:
        pairs: layer numbers; (a, a) gives co-activation, with each expert's tokens on the diagonal.
    """
    making = [_Pair(a, b, np.zeros((_side(infos[a]), _side(infos[b])), dtype=np.int64)) for a, b in pairs]
    layers = {layer for pair in pairs for layer in pair}
    for block in blocks:
        if block["layer"].size == 0:
            continue
        oldest = int(block["forward"].min()) - _INTERLEAVED
        known = {layer: membership(block, layer, infos[layer].num_experts) for layer in layers}
        for pair in making:
            if pair.left == pair.right:
                used_TE = known[pair.left].used_TE
                pair.counts += (used_TE.T @ used_TE).toarray()
            else:
                pair.add(known[pair.left], known[pair.right], oldest)
    return [pair.counts for pair in making]


def _side(info: LayerInfo) -> int:
    if info.num_experts > MAX_MATRIX:
        raise TraceError(
            f"layer {info.layer} has {info.num_experts} experts; a matrix of pairs is made for up to {MAX_MATRIX}"
        )
    return info.num_experts


def groups(values: Array) -> Iterator[tuple[int, Array]]:
    """Each distinct value, ascending, with the places it stands at in order."""
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    stops = np.append(first, values.size)[1:]
    for value, start, stop in zip(distinct, first, stops, strict=True):
        yield int(value), order[start:stop]


def load_counts(blocks: Iterable[Block], infos: Sequence[LayerInfo], num_tags: int) -> dict[int, Ints]:
    """Counts of every layer in one pass: layer -> int64 [2 (chosen, ran), tags, 2 (prefill, decode), C]."""
    found = {info.layer: np.zeros((2, max(num_tags, 1), 2, info.num_choices), dtype=np.int64) for info in infos}
    for block in blocks:
        for layer, rows in groups(block["layer"]):
            expert_N, tag_N, decode_N = (block[name][rows].astype(np.int64) for name in ("expert", "tag", "decode"))
            counts = found[layer]
            for which, mask_N in enumerate((expert_N >= 0, (expert_N >= 0) & block["kept"][rows])):
                place_N = np.ravel_multi_index((tag_N[mask_N], decode_N[mask_N], expert_N[mask_N]), counts.shape[1:])
                counts[which] += np.bincount(place_N, minlength=counts[which].size).reshape(counts.shape[1:])
    return found


def entropy(counts_E: Ints) -> float:
    """Shannon entropy of counts in nats; 0 for no counts."""
    total = counts_E.sum()
    share = counts_E[counts_E > 0] / max(int(total), 1)
    return float(-(share * np.log(share)).sum()) + 0.0


class ReuseCounter:
    """Least-recently-used stack distances, streamed.

    The distance of an access is the number of *other* experts used since the last access to the same expert: a cache of
    c experts with least-recently-used replacement holds it exactly when the distance is below c.
    """

    def __init__(self, num_experts: int) -> None:
        self.histogram = np.zeros(num_experts + 1, dtype=np.int64)
        self._last: dict[int, Ints] = {}
        self._clock = 0
        self._chunk = max(1, _CELLS // num_experts)

    def add(self, owner: int, expert_N: Ints) -> None:
        """Accesses in order. ``owner`` names the cache: one a sequence, or one for all."""
        experts = self.histogram.size - 1
        last_E = self._last.setdefault(owner, np.full(experts, -1, dtype=np.int64))
        for start in range(0, expert_N.size, self._chunk):
            part = expert_N[start : start + self._chunk]
            seen = np.full((part.size + 1, experts), -1, dtype=np.int64)
            seen[0] = last_E
            seen[np.arange(1, part.size + 1), part] = self._clock + np.arange(part.size)
            np.maximum.accumulate(seen, axis=0, out=seen)
            own_N = seen[np.arange(part.size), part]
            distance_N = (seen[:-1] > own_N[:, None]).sum(1)
            distance_N[own_N < 0] = experts
            self.histogram += np.bincount(distance_N, minlength=experts + 1)
            last_E[:] = seen[-1]
            self._clock += part.size
