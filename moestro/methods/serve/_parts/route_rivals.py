"""Forecasts of routing that need no training, and how well any forecast names what is used.

A forecast is float [T, C]: for every token a rank of every expert of every layer, larger is likelier.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from moestro.methods.serve._parts.route_file import Floats, LayerShape
from moestro.methods.serve._parts.route_paths import Bools, Ints, Paths
from moestro.methods.serve._parts.route_predictor import RoutePredictor


def by_frequency(taught: Paths, asked: Paths) -> Floats:
    """The experts that are used most, whatever the token."""
    rate = taught.used.mean(0, dtype=np.float32)
    found: Floats = np.broadcast_to(rate, asked.used.shape)
    return found


def by_token(taught: Paths, asked: Paths, vocabulary: int) -> Floats:
    """The experts that this token id used most; where it was seldom met, the frequency of all tokens decides."""
    table = np.zeros((vocabulary, taught.used.shape[1]), np.float32)
    np.add.at(table, taught.tokens, taught.used.astype(np.float32))
    count = np.bincount(taught.tokens, minlength=vocabulary)[:, None]
    found: Floats = ((table + taught.used.mean(0, dtype=np.float32)) / (count + 1))[asked.tokens].astype(np.float32)
    return found


def by_previous(taught: Paths, asked: Paths) -> Floats:
    """What the token before used, then by frequency; a first token goes by frequency alone."""
    before = np.zeros(asked.used.shape, np.float32)
    before[1:] = asked.used[:-1]
    before[asked.start[:-1]] = 0
    found: Floats = before + taught.used.mean(0, dtype=np.float32)
    return found


def by_predictor(predictor: RoutePredictor, asked: Paths, chunk: int = 256) -> Floats:
    """The predictor's logits, sequence by sequence."""
    found = np.empty(asked.used.shape, np.float32)
    for number, (start, stop) in enumerate(zip(asked.start[:-1], asked.start[1:], strict=True)):
        for at in range(int(start), int(stop), chunk):
            rows = np.arange(at, min(at + chunk, int(stop)))
            found[rows] = predictor.step(asked.tokens[rows], rows - start, np.full(len(rows), number))
        predictor.forget(number)
    return found


def columns(layers: Sequence[LayerShape]) -> Iterator[tuple[LayerShape, slice]]:
    """Each layer with its place in C."""
    at = 0
    for shape in layers:
        yield shape, slice(at, at + shape.experts)
        at += shape.experts


def top(scores: Floats, layers: Sequence[LayerShape], factor: float = 1.0) -> Bools:
    """The ``ceil(factor k)`` likeliest experts of every layer, bool [T, C]; of equal ones the lower id."""
    found = np.zeros(scores.shape, dtype=bool)
    for shape, part in columns(layers):
        count = min(int(np.ceil(factor * shape.top_k - 1e-9)), shape.experts)
        best = np.argsort(-scores[:, part], axis=1, kind="stable")[:, :count]
        np.put_along_axis(found[:, part], best, True, axis=1)
    return found


def recall(predicted: Bools, used: Bools) -> float:
    """Share of what was used that was predicted."""
    return float((predicted & used).sum() / max(1, used.sum()))


def precision(predicted: Bools, used: Bools) -> float:
    """Share of what was predicted that was used."""
    return float((predicted & used).sum() / max(1, predicted.sum()))


def merged(marks: Bools, groups: Ints) -> Bools:
    """Marks of tokens that run together, joined: bool [groups, C]."""
    found = np.zeros((int(groups.max()) + 1, marks.shape[1]), dtype=bool)
    np.logical_or.at(found, groups, marks)
    return found
