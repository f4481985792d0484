"""The control of adaptive depth: as many experts on average, drawn by chance."""

import pytest
import torch

from moestro.core.errors import ConfigError, ContextError
from moestro.core.session import session
from moestro.methods.train.adamoe import RandomDepth, real_per_token
from tests.methods.train.helpers import DIM, build, context, layer, route


def test_random_depth_keeps_the_best_and_weighs_them_anew() -> None:
    router = build("train.softmax_topk", num_experts=6, top_k=3)
    x, ctx = torch.randn(3000, DIM) * 20, context(1, 3000)
    whole = route(router, x, ctx)
    torch.manual_seed(0)
    found = RandomDepth({"s": 1.3}).on_routing("s", whole, router, ctx)
    count_T = torch.bincount(found.token_N, minlength=3000)
    assert set(count_T.tolist()) == {1, 2}
    assert float(count_T.double().mean()) == pytest.approx(1.3, abs=0.03)
    ahead = RandomDepth(1.3).on_routing("s", whole.replace(causal=False), router, ctx)
    assert (found.causal, ahead.causal) == (True, False)
    probability = (x @ router.weight.T).softmax(-1)
    start = 0
    for token, count in enumerate(count_T.tolist()[:50]):
        mine = slice(start, start + count)
        assert found.expert_N[mine].tolist() == whole.expert_TK[token, :count].tolist()
        kept = probability[token, found.expert_N[mine]]
        torch.testing.assert_close(found.weight_N[mine], kept / kept.sum(), atol=1e-5, rtol=0)
        start += count


@pytest.mark.parametrize(("mean", "counts"), [(0.0, {0}), (0.5, {0, 1}), (2.0, {2}), (3.0, {3})])
def test_random_depth_at_its_ends(mean: float, counts: set[int]) -> None:
    made = layer(build("train.softmax_topk", num_experts=6, top_k=3))
    x = torch.randn(1, 40, DIM)
    with session(collect=True, edits=[RandomDepth(mean)]) as opened:
        y = made(x)
    (ctx,) = opened.take()
    count_T = real_per_token(ctx.routings["block.mlp"])
    assert set(count_T.tolist()) == counts
    assert (y[0, count_T == 0] == 0).all()
    assert mean < 3 or torch.equal(y, made(x))


def test_random_depth_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="a mean of -1"):
        RandomDepth(-1)
    plain, nulls = layer(build("train.softmax_topk", top_k=2)), layer(build("train.adamoe", num_experts=4, num_null=4))
    for made, mean, message in (
        (plain, 2.5, "draws 2.5 experts a token"),
        (nulls, 1.0, "chose 3 with 4 nulls"),
        (plain, {"a": 1.0}, "no mean for this site"),
    ):
        with session(edits=[RandomDepth(mean)]), pytest.raises(ContextError, match=message):
            made(torch.randn(1, 4, DIM))
