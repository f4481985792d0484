"""Tokens a second of decoding one text with everything in memory, 4 and 8 bit; see ``_resident``."""

from pathlib import Path

from moestro.testing.bench._resident import compare
from moestro.testing.bench.harness import Row


def run(rounds: int, model: Path | None = None) -> list[Row]:
    """Rows against llama.cpp and Transformers; ``model``: folder of the reference model, built when missing."""
    return compare("decode", rounds, model)
