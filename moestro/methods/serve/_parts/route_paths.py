"""Who went where, as arrays: the paths of token sequences through the experts of every layer."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError, TraceError
from moestro.core.forecast import Recorded
from moestro.methods.serve._parts.route_file import LayerShape


Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Paths:
    """Token ids and the experts they used, a sequence after another.

    Attributes:
        layers: the routed layers. tokens: int64 [T]. used: bool [T, C], layers side by side. start: where sequences
            begin, and the end of the last. tags: of each sequence.
    """

    layers: tuple[LayerShape, ...]
    tokens: Ints
    used: Bools
    start: Ints
    tags: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.start) - 1

    def take(self, sequences: npt.ArrayLike) -> "Paths":
        """Some sequences."""
        which = np.asarray(sequences, dtype=np.int64)
        spans = [np.arange(self.start[item], self.start[item + 1]) for item in which]
        rows = np.concatenate([np.empty(0, np.int64), *spans])
        start = np.cumsum([0, *map(len, spans)])
        return Paths(self.layers, self.tokens[rows], self.used[rows], start, tuple(self.tags[item] for item in which))


def paths_of(trace: Any) -> Paths:
    """The paths of a trace; an assignment that capacity dropped, or to a null expert, uses nothing.

    Raises:
        TraceError: no token ids, or no assignment.
    """
    infos = trace.header.layers
    width = sum(info.num_experts for info in infos)
    tokens, used, lengths, tags = [], [], [], []
    for batch in trace.batches(64):
        valid = batch.valid_BS.numpy()
        hot = np.zeros((*valid.shape, width), dtype=bool)
        at = 0
        for info in infos:
            expert = batch.expert[info.layer].numpy()
            real = batch.kept[info.layer].numpy() & (expert >= 0) & (expert < info.num_experts)
            row, place, rank = np.nonzero(real)
            hot[row, place, at + expert[row, place, rank]] = True
            at += info.num_experts
        tokens.append(batch.token_BS.numpy()[valid])
        used.append(hot[valid])
        lengths += valid.sum(1).tolist()
        tags += [labels[0] if labels else "" for labels in batch.tags]
    if not tokens or not any(part.any() for part in used):
        raise TraceError("the trace holds no assignment of a token to an expert; record one with `moestro trace`")
    ids, hot = np.concatenate(tokens), np.concatenate(used)
    if ids.min() < 0:
        raise TraceError("the trace holds no token ids: the model was given embeddings; record it with ids")
    layers, at = [], 0
    for info in infos:
        most = int(hot[:, at : at + info.num_experts].sum(1).max())
        layers.append(LayerShape(layer=info.layer, experts=info.num_experts, top_k=info.top_k or max(1, most)))
        at += info.num_experts
    return Paths(tuple(layers), ids, hot, np.cumsum([0, *lengths]), tuple(tags))


def trace_hash(trace: Any) -> str:
    """SHA-256 over who went where: the same for a trace on disk and in memory."""
    digest = hashlib.sha256()
    names = ("sequence", "position", "token_id", "layer", "expert")
    for block in trace.scan(names):
        for name in names:
            digest.update(np.ascontiguousarray(block[name], dtype="<i8").tobytes())
    return digest.hexdigest()


def split_heldout(paths: Paths, share: float, seed: int) -> tuple[Paths, Paths]:
    """Sequences to learn from, and a share held back (at least one of each).

    Raises:
        ConfigError: fewer than two sequences.
    """
    count = len(paths)
    if count < 2:
        raise ConfigError(f"the trace holds {count} sequence; learning holds some back, record two or more")
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(round(share * count), 1), count - 1)
    return paths.take(np.sort(order[held:])), paths.take(np.sort(order[:held]))


def paths_of_past(past: Recorded) -> Paths:
    """The paths of a recorded past."""
    order = np.lexsort((past.positions, past.sequences))
    layers, hot = [], []
    for layer, count in enumerate(past.experts):
        if not count:
            continue
        ids = past.routes[layer][order]
        used = np.zeros((len(order), count + 1), dtype=bool)
        np.put_along_axis(used, np.where(ids < 0, count, ids).astype(np.int64), True, axis=1)
        layers.append(LayerShape(layer=layer, experts=count, top_k=max(1, int(used[:, :-1].sum(1).max()))))
        hot.append(used[:, :-1])
    start = np.flatnonzero(np.diff(past.sequences[order], prepend=-1))
    bounds = np.append(start, len(order))
    tags = tuple("" for _ in start)
    return Paths(tuple(layers), past.tokens[order].astype(np.int64), np.concatenate(hot, axis=1), bounds, tags)
