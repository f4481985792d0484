"""Prose and images in one sequence of tokens: what studies of several modalities train on.

An image is one of scikit-learn's digits, 64 pixels in 17 levels between two marks. Its tokens are control characters,
which prose does not have, so that a byte tokenizer gives each modality ids of its own.

    python -m moestro.studies._pixels FOLDER     writes the texts as JSON lines, as recipes/moma.yaml reads them
"""

import functools
import sys
from pathlib import Path

import numpy as np

from moestro.core.errors import ConfigError
from moestro.data.corpora import corpus
from moestro.data.sources import Split
from moestro.data.tokens import byte_tokenizer, encode
from moestro.studies._files import command, write_lines


FIRST_LEVEL, LEVELS, BEGIN, END = 0x0E, 17, "\x02", "\x03"  # ASCII: shift out .. record separator, STX, ETX
HELDOUT_OF = 8


@functools.cache
def images() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """scikit-learn's digits as text, one character a pixel between marks: to train on, and one in eight held out.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("this study needs scikit-learn; pip install 'moestro[studies]'") from None
    levels = load_digits().data.astype(int)
    lines = [BEGIN + "".join(chr(FIRST_LEVEL + level) for level in row) + END for row in levels]
    order = np.random.default_rng(0).permutation(len(lines))
    cut = -(-len(lines) // HELDOUT_OF)
    return tuple(lines[i] for i in order[cut:]), tuple(lines[i] for i in order[:cut])


def documents(split: Split, characters: int, source: str = "stdlib-docs", seed: int = 0) -> list[str]:
    """Documents of eight pieces of prose, each followed by an image as long: half of all tokens each.

    Args:
        split: train or heldout; prose is split by file, images by image, which come round again. characters: of prose.
        source: the built-in corpus of the prose.
    """
    prose = " ".join(corpus(source, split))[:characters]
    prose = "".join(c for c in prose if c.isprintable() or c in "\n\t").encode("ascii", "ignore").decode()
    pool = images()[split == "heldout"]
    rng, width = np.random.default_rng(seed), len(pool[0])
    places: list[int] = []
    found = []
    for at in range(0, len(prose) - 8 * width + 1, 8 * width):
        while len(places) < 8:
            places += rng.permutation(len(pool)).tolist()
        pieces = [prose[at + n * width : at + (n + 1) * width] for n in range(8)]
        found.append("".join(piece + pool[places.pop()] for piece in pieces))
    return found


def image_ids() -> tuple[int, int]:
    """First and last token id of a pixel; the marks count as text."""
    first, last = (encode(byte_tokenizer(), [chr(FIRST_LEVEL + level)])[0][0] for level in (0, LEVELS - 1))
    assert last - first == LEVELS - 1
    return first, last


def write(folder: Path, characters: int = 1_000_000, source: str = "stdlib-docs") -> list[Path]:
    """The texts as JSON lines, ``train`` and ``heldout``; returns the files. Arguments as of ``documents``."""
    lengths: dict[Split, int] = {"train": characters, "heldout": max(6000, characters // HELDOUT_OF)}
    texts = {split: documents(split, length, source) for split, length in lengths.items()}
    return write_lines(folder, {split: [{"text": text} for text in found] for split, found in texts.items()})


if __name__ == "__main__":
    command("_pixels", write, sys.argv[1:])
