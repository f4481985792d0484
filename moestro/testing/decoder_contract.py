"""Checks of policies that decode: each joins rows of random logits."""

from typing import Any

import numpy as np

from moestro.core.decoding import Floats
from moestro.core.registry import Method
from moestro.testing.contracts import example_config
from moestro.testing.contracts import settings_round_trip as settings_round_trip


VOCAB, ROWS = 50, 40


def fresh(method: Method) -> Any:
    """A decoder by the example settings."""
    return method.entry("policy")(example_config(method))


def logits(passes: int, count: int = ROWS) -> list[Floats]:
    """Random logits float32 [passes, V], some with closed tokens; the same at every call."""
    draw = np.random.Generator(np.random.PCG64(0))
    found = [(draw.normal(size=(passes, VOCAB)) * 4).astype(np.float32) for _ in range(count)]
    for row in found[::3]:
        row[:, draw.integers(0, VOCAB, 5)] = -np.inf
    return found


def a_row_of_logits(method: Method) -> None:
    """One float32 row, no NaN, at least one open token; the argument is left alone."""
    decoder = fresh(method)
    for given in logits(len(decoder.routes)):
        kept = given.copy()
        row = decoder.combine(given)
        assert row.shape == (VOCAB,), f"{len(decoder.routes)} passes over {VOCAB} tokens became {row.shape}"
        assert row.dtype == np.float32, f"a row of {row.dtype}"
        assert not np.isnan(row).any(), "a NaN"
        assert np.isfinite(row).any(), "no token is open"
        assert np.array_equal(given, kept), "the passes' logits were changed"


def rows_are_independent(method: Method) -> None:
    """A decoder that joined other rows before joins the next one alike."""
    used = fresh(method)
    for given in logits(len(used.routes)):
        assert np.array_equal(used.combine(given), fresh(method).combine(given)), "earlier rows change later ones"


def equal_passes_are_the_model(method: Method) -> None:
    """All passes alike: the likeliest token is theirs."""
    decoder = fresh(method)
    for given in logits(1):
        row = decoder.combine(np.repeat(given, len(decoder.routes), axis=0))
        assert row.argmax() == given[0].argmax(), "passes that agree are overruled"


def exact_is_exact(method: Method) -> None:
    """``exact`` promises the first pass's logits, by the model's own routing."""
    decoder = fresh(method)
    if decoder.exact:
        assert decoder.routes[0] is None, "exact, with another routing than the model's"
    for given in logits(len(decoder.routes)):
        same = np.array_equal(decoder.combine(given), given[0])
        assert same or not decoder.exact, "exact, and yet other logits"


def it_is_named(method: Method) -> None:
    """Its name in answers is its id."""
    assert fresh(method).name == method.id, f"{method.id} calls itself {fresh(method).name}"
