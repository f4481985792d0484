"""The study of FineQuant: the change keeps the function, and equal bytes are equal."""

import copy

import torch

from moestro.core.layer import mixture_layers
from moestro.studies._framework import BUDGETS
from moestro.studies._mixture import corpus_of, rows_of, trained
from moestro.studies.finequant import UNITS, column_more, fitted, nbytes, outlie, plan_of, scale


BUDGET = BUDGETS["ci"]


def test_the_change_makes_outliers_and_keeps_the_function() -> None:
    size = scale(BUDGET)
    model = trained(size, 0)
    changed = copy.deepcopy(model)
    outlie(changed, 0)
    batch = rows_of(corpus_of(size).heldout, size)[0]
    with torch.no_grad():
        torch.testing.assert_close(changed(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    for before, after in zip(mixture_layers(model).values(), mixture_layers(changed).values(), strict=True):
        for expert in range(before.bank.num_experts):
            ratio = (after.bank.weight(expert, "down") / before.bank.weight(expert, "down")).abs().mean(0)
            assert int((ratio > 49).sum()) == int((ratio < 0.03).sum()) == UNITS


def test_whole_rows_get_the_bytes_of_adaptive_groups() -> None:
    model = trained(scale(BUDGET), 0)
    outlie(model, 0)
    adaptive = nbytes(plan_of("adaptive", model, BUDGET), model)
    plain = nbytes(plan_of("column", model, BUDGET), model)
    more = nbytes(column_more(model, BUDGET, 0), model)
    assert sum(plain.values()) < sum(adaptive.values()) <= sum(more.values())
    largest = max(more[key] - plain[key] for key in more)
    assert sum(more.values()) - sum(adaptive.values()) < largest


def test_the_upper_reference_has_the_bytes_of_the_finest_groups_and_is_close() -> None:
    model = trained(scale(BUDGET), 0)
    packed = copy.deepcopy(model)
    taken = fitted(packed, BUDGET)
    fixed = plan_of("fixed", model, BUDGET)
    down = [size for key, size in nbytes(fixed, model).items() if key.endswith("down")]
    banks = [(layer.bank, other.bank) for layer, other in zip(
        mixture_layers(model).values(), mixture_layers(packed).values(), strict=True
    )]  # fmt: skip
    halves = sum(bank.weight(e, "up").numel() for bank, _ in banks for e in range(bank.num_experts))
    # By hand: half a byte a weight, and 4 bytes for each group of 24, in three matrices of one size.
    assert taken == 3 * (halves // 2 + 4 * halves // 24)
    assert sum(down) == taken // 3
    for before, after in banks:
        for name in before.projections:
            gap = (after.weight(0, name) - before.weight(0, name)).detach()
            assert 0 < gap.norm().item() < 0.15 * before.weight(0, name).norm().item()
