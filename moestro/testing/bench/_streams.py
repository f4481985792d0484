"""Recorded streams for the benchmarks of the engine: real text in tokens, and routings that are replayed with it.

near-uniform   every token draws its experts anew, all alike; k / E of them repeat by chance
Zipf           popularity by Zipf's law (exponent 1, another order of experts in each layer), and a share of the
               experts of the token before stays
trained        what a trained mixture of the same shape did, token by token (``_trained``)
own            the model's own routing; random weights route degenerately, so this one flatters a cache
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError
from moestro.testing.bench._reference import EXPERTS, LAYERS, TOP_K


Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def uniform(tokens: int, seed: int = 0) -> Ints:
    """Int32 [tokens, LAYERS, TOP_K], distinct in each row."""
    draw = np.random.default_rng(seed).random((tokens, LAYERS, EXPERTS))
    return np.argsort(draw, axis=-1)[..., :TOP_K].astype(np.int32)


def zipf(tokens: int, repeats: float, exponent: float = 1.0, seed: int = 0) -> Ints:
    """Int32 [tokens, LAYERS, TOP_K]: each expert of the token before stays with probability ``repeats``.

    The rest is drawn without replacement, with Zipf's weights (Gumbel's trick).
    """
    draw = np.random.default_rng(seed)
    order = np.argsort(draw.random((LAYERS, EXPERTS)), axis=-1)
    weight = -exponent * np.log(1 + order)  # order[l, e]: rank of e by popularity
    found = np.zeros((tokens, LAYERS, TOP_K), dtype=np.int32)
    for token in range(tokens):
        score = weight + draw.gumbel(size=(LAYERS, EXPERTS))
        if token:
            stay = draw.random((LAYERS, TOP_K)) < repeats
            rows, places = np.nonzero(stay)
            score[rows, found[token - 1][rows, places]] += 1e6
        found[token] = np.argsort(-score, axis=-1)[:, :TOP_K]
    return found


def even(ids: Ints) -> Floats:
    """Equal weights that sum to 1."""
    return np.full(ids.shape, 1 / ids.shape[-1], dtype=np.float32)


def recorded(trace: Any) -> dict[str, npt.NDArray[Any]]:
    """``tokens`` and ``positions`` [T], ``ids`` [T, LAYERS, TOP_K] and ``weights`` of a trace, sequence by sequence.

    Raises:
        ConfigError: the traced model has another number of layers, experts or choices than the reference model.
    """
    shape = [(info.num_experts, info.top_k) for info in trace.header.layers]
    if shape != [(EXPERTS, TOP_K)] * LAYERS:
        raise ConfigError(
            f"trace {trace.path}: {len(shape)} layers of (experts, choices) {sorted(set(shape))}; a replay needs "
            f"{LAYERS} of ({EXPERTS}, {TOP_K}), as the reference model"
        )
    names = ("sequence", "position", "layer", "rank", "expert", "weight", "token_id")
    blocks = [{name: np.asarray(block[name]) for name in names} for block in trace.scan(names)]
    rows = {name: np.concatenate([block[name] for block in blocks]) for name in names}
    order = np.lexsort([rows[name] for name in ("rank", "layer", "position", "sequence")])
    cells = {
        name: rows[name][order].reshape(-1, LAYERS, TOP_K) for name in ("expert", "weight", "token_id", "position")
    }
    return {
        "tokens": cells["token_id"][:, 0, 0].astype(np.int32),
        "positions": cells["position"][:, 0, 0].astype(np.int32),
        "ids": cells["expert"].astype(np.int32),
        "weights": cells["weight"].astype(np.float32),
    }


def repeats(ids: Ints) -> float:
    """Share of the experts of a token that the token before had, too."""
    same = (ids[1:, :, :, None] == ids[:-1, :, None, :]).any(-1)
    return float(same.mean())


def store(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Write a stream for an arm; its path as text."""
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)
