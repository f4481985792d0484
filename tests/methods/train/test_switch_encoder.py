"""The head's gate: places, second experts and the loss by hand; the mixtures against loops over tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.routing import Routing, Scores
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.top_two import TopTwo, places, second_asked, served
from moestro.methods.train.switch_encoder import Config
from tests.methods.train.helpers import context, route


DIM = 8
FREE = {"capacity_factor": None, "eval_capacity_factor": None}


def head(**config: Any) -> MoELayer:
    """The mixture of a head, with random weights large enough for experts to differ."""
    use = method("train.switch_encoder")
    site = Site(path="layer.0", kind="block", module=nn.Identity(), dim=DIM, layer=0, num_layers=1)
    settings = {"placement": "head", "num_experts": 4, "expert_size": 6, **config}
    top = use.build(site, use.configure(settings), Shared()).top
    assert isinstance(top, MoELayer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in top.parameters():
            parameter.normal_(std=0.7, generator=generator)
    return top


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(5))


def expert(layer: MoELayer, number: int, x: Tensor) -> Tensor:
    return layer.bank.weight(number, "down") @ torch.relu(layer.bank.weight(number, "up") @ x)


def loop(layer: MoELayer, x_TD: Tensor, *, residual: bool = True) -> Tensor:
    """The unlimited top-2 mixture, token by token."""
    found = []
    for x in x_TD:
        p = (layer.router.weight @ x).softmax(-1)
        first = int(p.argmax())
        second = int(p.masked_fill(torch.arange(len(p)) == first, -1).argmax())
        total = p[first] + p[second]
        y = p[first] / total * expert(layer, first, x) + p[second] / total * expert(layer, second, x)
        found.append(x + y if residual else y)
    return torch.stack(found)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("limit", [{**FREE}, {"capacity_factor": 4.0, "eval_capacity_factor": 8.0}])
def test_with_places_for_all_it_is_the_unlimited_mixture_of_two(residual: bool, limit: dict[str, Any]) -> None:
    layer = head(residual=residual, second_policy="all", **limit)
    x, wish = rows(2, 9).requires_grad_(), torch.randn(18, DIM)
    for mode in (True, False):
        found, expected = layer.train(mode)(x).flatten(0, 1), loop(layer, x.flatten(0, 1), residual=residual)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((y * wish).sum(), wanted, retain_graph=True) for y in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("residual", [True, False])
def test_one_expert_without_a_limit_is_the_dense_head(residual: bool) -> None:
    layer = head(num_experts=1, residual=residual, **FREE)
    dense = nn.Sequential(nn.Linear(DIM, 6, bias=False), nn.ReLU(), nn.Linear(6, DIM, bias=False))
    with torch.no_grad():
        dense[0].weight.copy_(layer.bank.weight(0, "up"))
        dense[2].weight.copy_(layer.bank.weight(0, "down"))
    x = rows(2, 7)
    for mode in (True, False):
        expected = dense(x) + (x if residual else 0)
        torch.testing.assert_close(layer.train(mode)(x), expected, atol=1e-6, rtol=1e-6)


def collapse(layer: MoELayer) -> None:
    """Everyone wants expert 0 first, expert 1 second."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = 2.0
        layer.router.weight[1] = 1.0


@pytest.mark.parametrize("residual", [True, False])
def test_a_token_without_a_place_keeps_its_input_to_the_bit(residual: bool) -> None:
    layer = head(residual=residual, eval_capacity_factor=1.0, min_capacity=1).eval()
    collapse(layer)
    x = rows(2, 12).abs()  # 12 * 1 / 4 = 3 places in each sequence
    y = layer(x)
    assert torch.equal(y[:, 3:], x[:, 3:] if residual else torch.zeros_like(x[:, 3:]))
    assert ((y[:, :3] - (x[:, :3] if residual else 0)).abs().amax(-1) > 1e-3).all()
    torch.testing.assert_close(y[0, :3], loop(layer, x[0, :3], residual=residual), atol=1e-5, rtol=1e-5)


def test_places_by_hand() -> None:
    counts = torch.tensor([0, 3, 10, 64, 384])
    assert places(counts, 16, 1.25, 4).tolist() == [4, 4, 4, 5, 30]
    assert places(counts, 16, 2.0, 1).tolist() == [1, 1, 1, 8, 48]
    assert places(counts, 2, 4.0, 1).tolist() == [1, 3, 10, 64, 384]  # never more than there are tokens
    assert places(torch.tensor([10]), 1, 1.1, 1).tolist() == [10]
    assert places(torch.tensor([100]), 11, 1.1, 1).tolist() == [10]  # of the factor as written, not as rounded


def test_first_choices_are_served_before_second_ones_and_padding_never() -> None:
    expert_TK = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1], [0, 2], [0, 1]])
    asked = torch.ones_like(expert_TK, dtype=torch.bool)
    asked[2] = False  # padding
    row = torch.tensor([0, 0, 0, 0, 1, 1])
    kept = served(expert_TK, asked, row, 2, 3, torch.tensor([2, 1]))
    # Sequence 0, 2 places: expert 0 takes tokens 0 and 3 (first choices) and not 1's second; expert 1 takes 1 and 0's.
    # Sequence 1, 1 place: expert 0 takes token 4; 5's second choice is the first to ask expert 1.
    assert kept.tolist() == [[True, True], [True, False], [False, False], [True, False], [True, True], [False, True]]


def test_second_experts_by_policy() -> None:
    share = torch.tensor([0.01, 0.05, 0.1, 0.2, 0.4]).repeat(4000)
    assert second_asked(share, "all", 0.2).all()
    assert not second_asked(share, "none", 0.2).any()
    assert second_asked(share, "threshold", 0.1)[:5].tolist() == [False, False, False, True, True]
    asked = second_asked(share, "random", 0.2).view(4000, 5).double().mean(0)
    # min(1, share / threshold), four standard errors
    torch.testing.assert_close(asked, torch.tensor([0.05, 0.25, 0.5, 1.0, 1.0]).double(), atol=0.032, rtol=0)


def test_a_second_expert_is_asked_by_its_share_of_the_two() -> None:
    p = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.85, 0.05, 0.05, 0.05]])  # shares 0.333 and 0.056
    router = head(eval_second_policy="threshold", second_threshold=0.3, **FREE).eval().router
    routing = router.choose(Scores(p.log(), p, p, p), context(1, 2))
    assert routing.token_N.tolist() == [0, 0, 1]
    torch.testing.assert_close(routing.weight_N, torch.tensor([2 / 3, 1 / 3, 0.85 / 0.9]))


def test_a_second_expert_that_is_not_asked_takes_no_place_and_leaves_the_weight_of_the_first() -> None:
    layer = head(eval_second_policy="none", second_policy="none", **FREE).eval()
    x = rows(6)
    wide, ctx = route(head(**FREE).eval().router, x, context(1, 6)), context(1, 6)
    alone = route(layer.router, x, ctx)
    assert alone.token_N.tolist() == list(range(6))
    torch.testing.assert_close(alone.weight_N, wide.weight_TK[:, 0])
    assert (alone.weight_N < 1).all()


def test_the_random_policy_draws_while_training_and_evaluation_repeats_its_bits() -> None:
    layer = head(eval_capacity_factor=1.0, second_threshold=1.0)
    x = rows(2, 30)
    evaluated = [layer.eval()(x) for _ in range(2)]
    assert torch.equal(*evaluated)
    trained = [layer.train()(x) for _ in range(2)]
    assert not torch.equal(*trained)


def test_places_follow_the_mode() -> None:
    layer = head(capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=1)
    collapse(layer)
    x = rows(2, 12).abs()
    for mode, kept in ((True, 3), (False, 6)):  # 12 f / 4
        moved = (layer.train(mode)(x) != x).any(-1)
        assert moved.tolist() == [[True] * kept + [False] * (12 - kept)] * 2


def test_a_limit_is_not_causal_and_what_runs_is_told_where_settings_say_it() -> None:
    free, only, none = head(**FREE).router, head(capacity_factor=None).router, head(eval_second_policy="none", **FREE)
    assert (free.causal, only.causal) == (True, False)
    assert [r.train(False).real_per_token(9) for r in (free, only, none.router)] == [2, None, 1]
    assert [r.train(True).real_per_token(9) for r in (free, only)] == [None, None]  # drawn
    assert route(free.eval(), rows(9), context(1, 9)).causal
    assert not route(only.eval(), rows(9), context(1, 9)).causal


def test_padding_takes_no_place_and_changes_no_place() -> None:
    layer = head(eval_capacity_factor=1.0, min_capacity=1).eval()
    collapse(layer)
    x = rows(1, 8).abs()
    plain = route(layer.router, x[0], context(1, 8))
    wide = torch.cat([x.new_ones(5, DIM), x[0], x.new_ones(3, DIM)])
    valid = [False] * 5 + [True] * 8 + [False] * 3
    padded = route(layer.router, wide, context(1, 16, valid=valid))
    assert plain.kept_N is not None
    assert padded.kept_N is not None
    assert plain.kept_N.sum() == 4  # 8 * 1 / 4 = 2 places of two experts
    assert torch.equal(padded.kept_N.view(16, 2)[5:13], plain.kept_N.view(8, 2))
    assert not padded.kept_N.view(16, 2)[[*range(5), 13, 14, 15]].any()


# -- the loss ----------------------------------------------------------------------------------------------------


def loss_of(logits_BSE: Tensor, *, valid: list[bool] | None = None) -> float:
    """The head's loss for given logits, divided by its sequences."""
    batch, width, experts = logits_BSE.shape
    layer = head(num_experts=experts)
    logits = logits_BSE.reshape(-1, experts)
    p = logits.softmax(-1)
    scores = Scores(logits, p, p, p)
    ctx: RoutingContext = context(batch, width, valid=valid)
    routing: Routing = layer.eval().router.choose(scores, ctx)
    loss = layer.losses["balance"]
    assert loss.unit == "sequence"
    return float(loss("site", routing, ctx)) / batch


def test_the_loss_is_the_released_formula_over_first_choices() -> None:
    logits = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(-1)
    f = nn.functional.one_hot(p.argmax(-1), 4).float().mean(1)  # [B, E]
    expected = 4**2 * (f * p.mean(1)).mean()
    assert loss_of(logits) == pytest.approx(float(expected), rel=1e-5)
    padded = torch.cat([logits, torch.full((3, 2, 4), 9.0)], 1)
    assert loss_of(padded, valid=([True] * 10 + [False] * 2) * 3) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_is_one_for_uniform_gates_or_balanced_choice_and_e_at_collapse() -> None:
    assert loss_of(torch.zeros(2, 8, 4)) == pytest.approx(1.0)  # uniform gates, whatever is chosen
    balanced = torch.eye(4).repeat(2, 1)[None] * 3.0
    assert loss_of(balanced) == pytest.approx(1.0)
    assert loss_of(balanced.log_softmax(-1) * 50) == pytest.approx(1.0)
    collapsed = torch.zeros(1, 6, 4)
    collapsed[..., 2] = 100.0
    assert loss_of(collapsed) == pytest.approx(4.0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_elsewhere_the_loss_is_of_first_choices_over_the_batch(top_k: int) -> None:
    use = method("train.switch_encoder")
    site = Site(path="layer.0.mlp", kind="mlp", module=nn.Identity(), dim=DIM, layer=0, num_layers=1)
    weight = "straight" if top_k == 1 else "normalised"
    settings = {"placement": "replace", "num_experts": 4, "top_k": top_k, "weight": weight, "expert_size": 6}
    layer = use.build(site, use.configure(settings), Shared())
    x = rows(2, 9) * 30
    valid = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    ctx = context(2, 9, valid=valid.flatten().tolist())
    routing = route(layer.router, x.flatten(0, 1), ctx)
    p = (x @ layer.router.weight.detach().T).softmax(-1)[valid]
    f = nn.functional.one_hot(p.argmax(-1), 4).float().mean(0)
    assert layer.losses["balance"].unit == "batch"
    loss = layer.losses["balance"]("site", routing, ctx)
    assert loss.requires_grad
    assert float(loss.detach()) == pytest.approx(float(4 * (f * p.mean(0)).sum()))


def test_one_is_no_bound_of_the_loss() -> None:
    """Expert 0 is first choice of one token of three, and nearly that of the others."""
    p = torch.tensor([[0.9, 0.1], [0.49, 0.51], [0.49, 0.51]])
    by_hand = 2 * (1 / 3 * p[:, 0].mean() + 2 / 3 * p[:, 1].mean())
    assert loss_of(p.log()[None]) == pytest.approx(float(by_hand))
    assert float(by_hand) < 0.92


def test_an_update_by_the_loss_alone_evens_out_first_choices() -> None:
    layer = head(num_experts=4, **FREE).train()
    x = rows(4, 32) + 1.5
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.3)
    seen = []
    for _ in range(60):
        with session(collect=True) as opened:
            layer(x)
        (ctx,) = opened.take()
        term = ctx.losses[("layer.0.top", "balance")]
        seen.append(float(term.total.detach()) / 4)
        optimizer.zero_grad()
        (term.total / 4).backward()
        optimizer.step()
    assert seen[0] > 1.5
    assert seen[-1] < 1.1


# -- weights and settings ----------------------------------------------------------------------------------------


def top_one(weight: str) -> TopTwo:
    router = TopTwo(DIM, Config(num_experts=3, weight=weight).gate)
    nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return router


def test_weights_of_a_single_expert_and_their_gradients() -> None:
    x = rows(5)
    found = {}
    for weight in ("normalised", "probability", "straight"):
        router = top_one(weight)
        routing = route(router, x, context(1, 5))
        (gradient,) = torch.autograd.grad(routing.weight_N.sum(), router.weight)
        found[weight] = (routing.weight_N.detach(), gradient)
    p = (x @ router.weight.detach().T).softmax(-1)
    assert torch.equal(found["normalised"][0], torch.ones(5))
    assert torch.equal(found["straight"][0], torch.ones(5))
    torch.testing.assert_close(found["probability"][0], p.amax(-1))
    assert found["normalised"][1].abs().max() < 1e-6
    router.weight.grad = None
    log = (x @ router.weight.T).log_softmax(-1).amax(-1).sum()
    (expected,) = torch.autograd.grad(log, router.weight)
    torch.testing.assert_close(found["straight"][1], expected)
    assert expected.abs().max() > 0.1


def test_defaults_follow_the_placement() -> None:
    found = {name: Config(placement=name) for name in ("replace", "stack", "head")}
    assert [config.top_k for config in found.values()] == [1, 1, 2]
    assert [config.weight for config in found.values()] == ["straight", "probability", "normalised"]
    assert (found["head"].capacity_factor, found["head"].eval_capacity_factor) == (1.25, 2.0)
    assert (found["head"].second_policy, found["head"].eval_second_policy) == ("random", "all")
    assert Config(placement="head", num_experts=1).top_k == 1
    assert Config(placement="head", capacity_factor=None).capacity_factor is None
    weight = TopTwo(512, found["head"].gate).weight.detach()
    assert 0.018 < float(weight.std()) < 0.022  # and not the 1 that saturates the softmax
    assert float((torch.randn(200, 512) * 0.5 @ weight.T).softmax(-1).max()) < 0.5


def test_experts_of_a_head_start_uniform() -> None:
    use = method("train.switch_encoder")
    site = Site(path="b", kind="block", module=nn.Identity(), dim=64, layer=1, num_layers=2)
    bank = use.build(site, use.configure({"placement": "head", "num_experts": 2}), Shared()).top.bank
    assert bank.inner == 256
    for matrix, bound in ((bank.up_weight, 256**-0.5), (bank.down_proj, 64**-0.5)):
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert float(matrix.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"placement": "head", "top_k": 1}, True),
        ({"placement": "head"}, False),
        ({"placement": "head", "num_experts": 1}, False),
        ({"placement": "stack", "weight": "normalised", "layers": 1}, True),
        ({"placement": "stack", "layers": 1}, False),
    ],
)
def test_a_router_that_would_learn_nothing_is_told(
    settings: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    use = method("train.switch_encoder")
    site = Site(path="b", kind="block", module=nn.Identity(), dim=DIM, layer=0, num_layers=1)
    use.build(site, use.configure(settings), Shared())
    assert ("gives the router no gradient" in caplog.text) == said
