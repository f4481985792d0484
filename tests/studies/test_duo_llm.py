"""What the study of Duo-LLM compares: equal shares, and routers that depend on the seed alone."""

import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies._framework import BUDGETS
from moestro.studies._language import llama
from moestro.studies.duo_llm import at_share, evaluate, route, routed, scale


def test_a_share_between_whole_layers_is_interpolated() -> None:
    table = tuple((float(b), 1.0, 5.0 - b * b) for b in range(3))
    assert at_share(table, 2, 0.5) == 4.0
    assert at_share(table, 2, 0.75) == pytest.approx(2.5)  # half way from 4 to 1
    assert at_share(table, 2, 1.0) == 1.0


@pytest.mark.parametrize(("fixed", "share"), [("big", 1.0), ("small", 0.0)])
def test_the_share_is_that_of_big_modules(fixed: str, share: float) -> None:
    budget = BUDGETS["ci"]
    size = scale(budget)
    model = route(llama(size, 0), size, route="fixed", fixed=fixed).eval()
    assert evaluate(model, size, budget)[1] == share


def test_routers_depend_on_the_seed_and_not_on_what_ran_before() -> None:
    size = scale(BUDGETS["ci"])
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = routed(0, "ci", size, 0.5)
        found.append([layer.router.weight.detach().clone() for layer in mixture_layers(model).values()])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
