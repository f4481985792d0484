"""Made-up routing for tests of what foresees it: experts that go by the token or by the one before."""

import numpy as np

from moestro.methods.serve._parts.route_file import Header, LayerShape
from moestro.methods.serve._parts.route_paths import Paths
from moestro.methods.serve._parts.route_predictor import RoutePredictor


LAYERS = (LayerShape(layer=1, experts=8, top_k=2), LayerShape(layer=3, experts=6, top_k=1))


def header(**changes: object) -> Header:
    values = {
        "layers": LAYERS,
        "vocabulary": 30,
        "dim": 16,
        "heads": 2,
        "inner": 24,
        "depth": 2,
        "window": 6,
        "trace": "t",
    }
    return Header(**{**values, **changes})  # type: ignore[arg-type]


def random_predictor(seed: int = 0, **changes: object) -> RoutePredictor:
    draw, made = np.random.default_rng(seed), header(**changes)
    weights = {
        name: (np.ones(shape) if "norm" in name else draw.normal(size=shape)).astype(np.float32)
        for name, shape in made.shapes().items()
    }
    return RoutePredictor(made, weights)


def planted(seed: int, sequences: int = 24, length: int = 40, vocabulary: int = 12) -> Paths:
    """Layer 1 goes by the token, layer 3 by the one before it, which no table of tokens knows."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(vocabulary, size=(sequences, length))
    before = np.concatenate([np.zeros((sequences, 1), np.int64), tokens[:, :-1]], axis=1)
    used = np.zeros((sequences, length, 14), dtype=bool)
    np.put_along_axis(used, (tokens % 8)[..., None], True, -1)
    np.put_along_axis(used, ((tokens + 3) % 8)[..., None], True, -1)
    np.put_along_axis(used, 8 + (before % 6)[..., None], True, -1)
    start = np.arange(sequences + 1) * length
    return Paths(LAYERS, tokens.ravel(), used.reshape(-1, 14), start, ("",) * sequences)
