"""The study of QMoE: what arms store, and what they are calibrated on."""

import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies import qmoe
from moestro.studies._framework import BUDGETS
from moestro.studies._mixture import trained


BUDGET = BUDGETS["ci"]


def test_a_template_stands_in_front_and_has_no_labels() -> None:
    ids = torch.arange(24).view(2, 12)
    (batch,) = qmoe.with_template([{"input_ids": ids}], token=7)
    assert batch["input_ids"].tolist() == [[7, 7, 7, *range(9)], [7, 7, 7, *range(12, 21)]]
    assert batch["labels"].tolist() == [[-100, -100, -100, *range(9)], [-100, -100, -100, *range(12, 21)]]


def test_a_template_left_out_changes_codes() -> None:
    found = [qmoe.packed(arm, 0, BUDGET) for arm in ("gptq_template", "gptq_template_skipped")]
    banks = [next(iter(mixture_layers(model).values())).bank for model in found]
    assert any(not torch.equal(*(bank.weight(expert, "up") for bank in banks)) for expert in range(8))


def test_pruning_keeps_the_experts_that_are_used_most() -> None:
    model = trained(qmoe.scale(BUDGET), 0)
    before = next(iter(mixture_layers(model).values()))
    rows = qmoe.calibration(0, BUDGET)
    from moestro.observe import collect

    count = next(iter(collect(model, rows).values())).count_E
    whole = [before.bank.weight(expert, "up").detach().clone() for expert in range(8)]
    qmoe.prune(model, rows, 4)
    bank = next(iter(mixture_layers(model).values())).bank
    assert bank.num_experts == 2
    kept = sorted(count.argsort(descending=True)[:2].tolist())
    assert [torch.equal(bank.weight(place, "up"), whole[expert]) for place, expert in enumerate(kept)] == [True, True]


def test_bits_are_those_of_a_file() -> None:
    source = trained(qmoe.scale(BUDGET), 0)
    model = qmoe.packed("nearest_ternary", 0, BUDGET)
    held = sum(layer.bank.nbytes(e) for layer in mixture_layers(model).values() for e in range(8))
    header = qmoe.file_bytes(model) - held
    assert 0 < header < 150 * sum(len(dict(layer.bank.named_buffers())) for layer in mixture_layers(model).values())
    bits = qmoe.run("nearest_ternary", 0, BUDGET)["bits"]
    assert bits == pytest.approx(8 * (held + header) / qmoe.weights_of(source))


@pytest.mark.parametrize("arm", sorted(qmoe.CODES))
def test_codes_are_exact(arm: str) -> None:
    found = qmoe.run(arm, 3, BUDGET)
    assert found["wrong"] == 0
    assert 1 < found["times_entropy"] < (2.6 if arm == "code_trits" else 1.3)
