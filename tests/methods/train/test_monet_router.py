"""Product keys: what lies at the threshold, probabilities, causality, and which layers make a group."""

import pytest
import torch
from torch import nn

from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.product_keys import AxisRouter, keep, router_of_group
from tests.methods.train.helpers import context, site


SHAPE = (6, 4, 2, 1, 3)  # dim, axis, heads, top_k, group_size


def test_a_choice_at_the_threshold_stays_and_one_below_goes() -> None:
    normal = torch.tensor([[[0.5, 0.4999, 0.52, -3.0], [0.1, 0.1, 0.0999, -1.0]]])
    assert keep(normal, 0.5).tolist() == [[[True, False, True, False], [True, True, False, False]]]


def test_probabilities_are_those_of_each_head_and_sum_to_one() -> None:
    torch.manual_seed(0)
    router, x = AxisRouter(6, 4, 2, 1), torch.randn(5, 6)
    with torch.no_grad():
        scores = router.score(x, None, context(1, 5))
    expected = (x @ router.weight.detach().T).view(5, 2, 4).softmax(-1).flatten(1) / 2
    torch.testing.assert_close(scores.probabilities(), expected)


def test_a_choice_by_the_statistics_of_a_batch_is_not_causal() -> None:
    router, x, ctx = AxisRouter(6, 4, 2, 1), torch.randn(5, 6), context(1, 5)
    for training in (True, False):
        router.train(training)
        assert router.choose(router.score(x, None, ctx), ctx).causal is not training


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 1]),
        ([0, 2, 5], [0, 0, 0]),  # dense layers may stand between
        ([3, 1, 2], [0, 1, 1]),  # a layer below cannot use the scores of one above
        ([1, 1], [0, 1]),
        ([None, None], [0, 1]),
    ],
)
def test_a_group_is_of_layers_that_come_one_after_the_other(layers: list[int | None], groups: list[int]) -> None:
    shared = Shared()
    routers = [
        router_of_group(
            Site(path=f"layers.{layer}.mlp", kind="mlp", module=nn.Identity(), dim=6, layer=layer), shared, *SHAPE
        )
        for layer in layers
    ]
    found = list(dict.fromkeys(map(id, routers)))
    assert [found.index(id(router)) for router in routers] == groups


@pytest.mark.parametrize("kind", ["vertical", "horizontal"])
def test_fresh_matrices_are_small_and_biases_zero(kind: str) -> None:
    torch.manual_seed(0)
    use = method("train.monet")
    layer = use.build(
        site(dim=64), use.configure({"axis": 32, "expert_size": 8, "top_k": 4, "decompose": kind}), Shared()
    )
    for name, parameter in [*layer.experts.named_parameters(), *layer.router.module.named_parameters()]:
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05), name
