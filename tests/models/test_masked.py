"""Unequal layers in a stock format: fillers that no token can choose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moestro
from moestro import surgery
from moestro.core.errors import SaveError
from moestro.core.layer import mixture_layers
from moestro.core.plan import ExpertPlan
from moestro.testing.tiny import tiny_folder
from tests.surgery.helpers import ids, keep, logits


def unequal(family: str, folder: Path, kept: list[int], **options: Any) -> Any:
    """A stock model whose last layer lost experts."""
    tiny_folder(family, folder / "stock", **options)
    model = moestro.load(folder / "stock")
    last = int(list(mixture_layers(model))[-1].split(".")[2])
    surgery.apply(model, ExpertPlan(method="test", layers=[keep(last, kept)]))
    return model


@pytest.mark.parametrize(("family", "options"), [("gpt_oss", {}), ("deepseek_v3", {"n_group": 1, "topk_group": 1})])
def test_fillers_are_never_chosen(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = unequal(family, tmp_path, [0, 2, 3, 4], **options)
    before = logits(model)
    counts = [layer.bank.num_experts for layer in mixture_layers(model).values()]
    modules = [id(module) for module in model.modules()]
    moestro.export(model, tmp_path / "out")
    assert [id(module) for module in model.modules()] == modules, "the model is given back as it was"
    assert torch.equal(logits(model), before)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    torch.testing.assert_close(logits(stock), before, rtol=1e-4, atol=1e-4)
    draw = torch.randint(3, 97, (40, 9), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(logits(stock, draw), logits(model, draw), rtol=1e-4, atol=1e-4)
    again = moestro.load(tmp_path / "out")
    assert {layer.bank.num_experts for layer in mixture_layers(again).values()} == {max(counts)}
    assert min(counts) == 4
    assert not torch.isnan(logits(again, ids())).any()


def test_what_cannot_be_switched_off_is_refused_by_name(tmp_path: Path) -> None:
    equal = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]  # three of each group of four
    cases: list[tuple[str, list[int], dict[str, Any], str]] = [
        ("qwen3_moe", [0, 2, 3, 4], {}, r"mlp\.router\.weight has no bias beside it that could switch off filler"),
        ("deepseek_v3", equal, {"n_routed_experts": 16}, r"fillers would change the groups its router chooses among"),
    ]
    for family, kept, options, words in cases:
        model = unequal(family, tmp_path / family, kept, **options)
        with pytest.raises(SaveError, match=words):
            moestro.export(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
