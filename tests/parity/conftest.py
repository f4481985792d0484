"""One tiny checkpoint of each family, written by Transformers itself and shared by all tests of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.testing.tiny import VOCAB, tiny_folder


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """The plain model of a family and the folder it was saved to. Tests must not change either."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = (tiny_folder(family, folder), folder)
        return made[family]

    return make


def inputs(model: Any, rows: int = 2, width: int = 7, *, pad: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Random ids for a model; ``pad`` left or right hides some positions of the second row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, width), generator=generator)
    batch = {"input_ids": ids}
    if pad is not None:
        mask = torch.ones_like(ids)
        hidden = slice(0, 3) if pad == "left" else slice(width - 3, width)
        mask[1, hidden] = 0
        ids[mask == 0] = 0
        batch["attention_mask"] = mask
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, max(1, width - 2)), generator=generator)
    return batch


@pytest.fixture(name="inputs")
def _inputs() -> Callable[..., dict[str, Any]]:
    return inputs
