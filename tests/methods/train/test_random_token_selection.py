"""Top-1 routing with places: how many, who gets them, and that chance treats the tokens of an expert alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import moestro
from moestro.core.errors import ConfigError
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared
from moestro.methods.train._parts.capacity import within_capacity
from moestro.methods.train.random_token_selection import places, priority
from moestro.models.swap import state_of, swap
from moestro.testing.tiny import tiny_folder
from tests.methods.train.helpers import DIM, build, context, layer, route, site


ORDERS = ("random", "position", "probability")


def router(**config: Any) -> Any:
    """A router in training mode with clear choices."""
    made = build("train.random_token_selection", **{"num_experts": 4, "min_capacity": 0, **config}).train()
    with torch.no_grad():
        made.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(2))
    return made


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def probabilities(made: Any, x_TD: Tensor) -> Tensor:
    return (x_TD @ made.weight.T).softmax(-1)


# -- how many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "least", "found"),
    [
        (32, 4, 1.0, 4, 8),
        (33, 4, 1.0, 4, 9),  # rounded up
        (32, 4, 1.25, 4, 10),
        (8, 4, 1.0, 4, 4),  # the floor
        (3, 4, 1.0, 4, 3),  # no more places than tokens
        (1, 64, 2.0, 4, 1),
        (32, 4, 0.01, 0, 1),
        (0, 4, 1.0, 4, 0),
        (100, 10, 1.1, 0, 11),  # 1.1 * 100 is above 110 in floating point
        (1000, 10, 1.1, 0, 110),  # and so is 100 * 1.1
    ],
)
def test_places_by_hand(tokens: int, experts: int, factor: float, least: int, found: int) -> None:
    assert places(tokens, experts, factor, least) == found


@pytest.mark.parametrize("order", ORDERS)
def test_each_expert_keeps_as_many_as_asked_or_as_it_has_places(order: str) -> None:
    made, x = router(order=order), inputs(50)
    demand = torch.bincount(probabilities(made, x).argmax(1), minlength=4)
    assert demand.max() > 13 > demand.min(), "some experts overflow, some do not"
    routing = route(made, x, context(2, 25))
    assert torch.equal(routing.counts_C(), demand), "a dropped token is demand all the same"
    served = routing.real()
    assert torch.equal(torch.bincount(served.expert_N, minlength=4), demand.clamp(max=13))


def test_factors_of_training_and_evaluation_are_apart() -> None:
    made, x = router(capacity_factor=1.0, eval_capacity_factor=None), inputs(50)
    training = route(made, x, context(2, 25))
    evaluation = route(made.eval(), x, context(2, 25))
    assert int(training.kept_N.sum()) < 50
    assert evaluation.kept_N is None
    assert (training.causal, evaluation.causal) == (False, True)
    assert not made.causal
    assert router(capacity_factor=None, eval_capacity_factor=None).causal
    half = router(capacity_factor=None, eval_capacity_factor=0.5)
    assert route(half, x, context(2, 25)).kept_N is None
    counts = torch.bincount(route(half.eval(), x, context(2, 25)).real().expert_N, minlength=4)
    assert int(counts.max()) == 7


@pytest.mark.parametrize("order", ORDERS)
def test_with_places_for_all_every_order_gives_the_same_bits(order: str) -> None:
    """A factor of E gives every expert as many places as there are tokens."""
    x = inputs(20).view(2, 10, DIM)
    full, free = (layer(router(order=order, capacity_factor=factor)) for factor in (4.0, None))
    assert torch.equal(full(x), free(x))
    probability = probabilities(full.router, x.view(20, DIM))
    routing = route(full.router, x.view(20, DIM), context(2, 10))
    torch.testing.assert_close(routing.weight_TK[:, 0], probability.max(1).values)
    assert torch.equal(routing.expert_TK[:, 0], probability.argmax(1))


# -- who ----------------------------------------------------------------------------------------------------------


def test_position_and_probability_by_hand() -> None:
    """Tokens 0, 1, 3, 4 ask expert 0, which has two places; token 2 asks expert 1."""
    expert, row = torch.tensor([0, 0, 1, 0, 0]), torch.zeros(5, dtype=torch.int64)
    probability = torch.tensor([0.5, 0.6, 0.4, 0.9, 0.6])

    def kept(order: Any) -> list[bool]:
        return within_capacity(expert, row, 1, 2, 2, priority(order, probability)).tolist()

    assert kept("position") == [True, True, True, False, False]
    assert kept("probability") == [False, True, True, True, False]  # of the two with 0.6 the earlier one
    torch.manual_seed(5)
    drawn = torch.rand(5)
    torch.manual_seed(5)
    best = drawn[[0, 1, 3, 4]].topk(2).values
    assert kept("random") == [bool(i == 2 or drawn[i] in best) for i in range(5)]


def test_chance_is_the_same_for_all_tokens_of_an_expert() -> None:
    """2000 draws: which of an expert's n tokens are dropped is a uniform sample each time."""
    made, x = router(), inputs(40)
    expert_T = probabilities(made, x).argmax(1)
    torch.manual_seed(0)
    dropped_T = sum((~route(made, x, context(4, 10)).kept_N).double() for _ in range(2000))
    tested = 0
    for expert in range(4):
        mine = dropped_T[expert_T == expert]
        demand = len(mine)
        assert float(mine.sum()) == 2000 * max(demand - 10, 0)
        if demand > 10:
            share = (demand - 10) / demand
            # Drops without replacement: their variance is a binomial's, less the factor (n - 1) / n of the fixed sum.
            statistic = ((mine - 2000 * share) ** 2).sum() / (2000 * share * (1 - share)) * (demand - 1) / demand
            assert stats.chi2.sf(float(statistic), demand - 1) > 0.01
            tested += 1
    assert tested >= 1


def test_by_position_the_late_tokens_of_a_batch_are_dropped() -> None:
    made, x = router(order="position"), inputs(40)
    expert_T = probabilities(made, x).argmax(1)
    kept_T = route(made, x, context(4, 10)).kept_N
    for expert in range(4):
        mine = kept_T[expert_T == expert].tolist()
        assert mine == [True] * min(len(mine), 10) + [False] * (len(mine) - 10)


def test_draws_follow_the_seed_and_not_the_names_of_the_experts() -> None:
    made, x, seen = router(), inputs(40), []
    swapped = router()
    with torch.no_grad():
        swapped.weight.copy_(made.weight.flip(0))
    for one in (made, made, swapped):
        torch.manual_seed(11)
        seen.append(route(one, x, context(4, 10)))
    assert torch.equal(seen[0].kept_N, seen[1].kept_N)
    assert torch.equal(seen[0].kept_N, seen[2].kept_N), "the same tokens stay whichever order experts stand in"
    assert torch.equal(3 - seen[0].expert_N, seen[2].expert_N)
    assert not torch.equal(seen[0].kept_N, route(made, x, context(4, 10)).kept_N)


def test_evaluation_draws_nothing() -> None:
    made, x = router(jitter=0.3, gumbel=True).eval(), inputs(40)
    by_position = router(order="position").eval()
    state = torch.get_rng_state()
    routing, expected = route_plain(made, x), route_plain(by_position, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(routing.kept_N, expected.kept_N)
    assert torch.equal(routing.expert_N, expected.expert_N)


def route_plain(made: Any, x_TD: Tensor) -> Any:
    """As ``route``, without a bank, whose weights would draw."""
    ctx = context(1, len(x_TD))
    return made.choose(made.score(x_TD, None, ctx), ctx)


@pytest.mark.parametrize("order", ORDERS)
def test_padding_takes_no_place_and_is_not_counted(order: str) -> None:
    made, x = router(order=order), inputs(24)
    valid = ([False] * 3 + [True] * 9) * 2
    torch.manual_seed(0)
    padded = route_plain_with(made, x, valid)
    kept = padded.kept_N[torch.tensor(valid)]
    real = inputs(24)[torch.tensor(valid)]
    demand = torch.bincount(probabilities(made, real).argmax(1), minlength=4)
    assert demand.max() > 5
    assert int(kept.sum()) == int(demand.clamp(max=5).sum()), "ceil(18 / 4) places"
    assert not padded.kept_N[~torch.tensor(valid)].any()
    if order != "random":
        assert torch.equal(kept, route_plain(made, real).kept_N)


def route_plain_with(made: Any, x_TD: Tensor, valid: list[bool]) -> Any:
    ctx = context(2, len(x_TD) // 2, valid=valid)
    return made.choose(made.score(x_TD, None, ctx), ctx)


# -- noise --------------------------------------------------------------------------------------------------------


def test_jitter_is_uniform_on_the_routers_input_only() -> None:
    made = router(jitter=0.25, capacity_factor=None, num_experts=6)
    with torch.no_grad():
        made.weight.copy_(torch.eye(6))
    noisy = made.score(torch.ones(20_000, 6), None, context(1, 20_000)).logits_TC
    assert 0.75 <= noisy.min() < 0.7505
    assert 1.2495 < noisy.max() <= 1.25
    assert noisy.var().item() == pytest.approx(0.5**2 / 12, rel=0.02)
    # In bfloat16 there are four numbers between 0.99 and 1.01: the noise is drawn in the router's float32.
    made.noise.size = 0.01
    narrow = made.score(torch.ones(20_000, 6, dtype=torch.bfloat16), None, context(1, 20_000)).logits_TC
    assert narrow.var().item() == pytest.approx(0.02**2 / 12, rel=0.02)
    assert 0.99 <= narrow.min() < narrow.max() <= 1.01
    mixture = layer(made)
    sizes = []
    mixture.bank.register_forward_pre_hook(lambda module, args: sizes.append(args[0]))
    mixture(torch.ones(1, 5, DIM))
    assert torch.equal(sizes[0], torch.ones(5, DIM)), "the experts see the clean input"


def test_gumbel_noise_samples_from_the_probabilities_and_weighs_by_them() -> None:
    made = router(gumbel=True, capacity_factor=None)
    x = inputs(1).expand(40_000, DIM)
    probability = probabilities(made, x[:1])[0]
    routing = route_plain(made, x)
    share = routing.counts_C() / 40_000
    torch.testing.assert_close(share, probability.detach(), atol=0.01, rtol=0)
    torch.testing.assert_close(routing.weight_TK[:, 0], probability[routing.expert_TK[:, 0]])
    torch.testing.assert_close(routing.scores.logits_TC, x @ made.weight.T)


# -- the mixture --------------------------------------------------------------------------------------------------


def test_output_and_gradients_are_those_of_a_loop_over_served_tokens() -> None:
    mixture = layer(router()).double()
    with torch.no_grad():
        for parameter in mixture.bank.parameters():
            parameter.normal_(std=0.5)
    leaf = inputs(30).double().requires_grad_()
    torch.manual_seed(4)
    y = mixture(leaf.view(3, 10, DIM)).view(30, DIM)
    torch.manual_seed(4)
    kept_T = route_plain(mixture.router, leaf).kept_N
    assert 0 < int((~kept_T).sum()) < 15
    rows = []
    for token, row_D in enumerate(leaf):
        probability = (mixture.router.weight @ row_D).softmax(0)
        expert = int(probability.argmax())
        gate, up, down = (mixture.bank.weight(expert, name) for name in ("gate", "up", "down"))
        out = down @ (torch.nn.functional.silu(gate @ row_D) * (up @ row_D))
        rows.append(probability[expert] * out if kept_T[token] else torch.zeros(DIM, dtype=torch.float64))
    expected = torch.stack(rows)
    assert torch.equal(y[~kept_T], torch.zeros_like(y[~kept_T])), "dropped tokens get exact zeros"
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    wanted = [leaf, *mixture.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def balance(weight_CD: Tensor, x: Tensor) -> float:
    made = router(num_experts=len(weight_CD))
    with torch.no_grad():
        made.weight.copy_(weight_CD)
    use = method("train.balance_loss")
    loss = use.build(site(), use.configure({"scope": "batch"}), Shared())
    ctx = context(1, len(x))
    routing = made.choose(made.score(x, None, ctx), ctx)
    assert not routing.kept_N.all()
    return loss("block.mlp", routing, ctx).item()


def test_the_balance_loss_is_one_when_uniform_and_e_when_collapsed() -> None:
    """Counted before dropping: a collapsed router drops most tokens and pays for all of them."""
    assert balance(torch.zeros(4, DIM), inputs(40)) == pytest.approx(1.0)
    collapsed = torch.zeros(4, DIM)
    collapsed[2] = 100.0
    assert balance(collapsed, torch.ones(40, DIM)) == pytest.approx(4.0)


def test_by_default_it_is_the_gate_that_was_released() -> None:
    config = method("train.random_token_selection").configure({}).model_dump(exclude={"num_experts"})
    assert config == {
        "order": "random",
        "capacity_factor": 1.0,
        "eval_capacity_factor": 1.0,
        "min_capacity": 4,
        "jitter": 0.0,
        "gumbel": False,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"capacity_factor": 0}, "capacity_factor=0"),
        ({"eval_capacity_factor": -1.0}, "eval_capacity_factor=-1"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf"),
        ({"min_capacity": -1}, "min_capacity=-1"),
        ({"jitter": 1.0}, "jitter=1"),
        ({"order": "prob"}, "order='prob'"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"capacity": 3}, "unknown key 'capacity'"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method("train.random_token_selection").configure(config)


# -- in a model ---------------------------------------------------------------------------------------------------


IDS = torch.randint(3, 97, (3, 8), generator=torch.Generator().manual_seed(0))


def opened(tmp_path: Path, **config: Any) -> Any:
    tiny_folder("mixtral", tmp_path / "plain")
    model = moestro.load(tmp_path / "plain")
    swap(model, "train.random_token_selection", {"num_experts": 5, "min_capacity": 0, **config})
    with torch.no_grad():
        for mixture in mixture_layers(model).values():
            mixture.router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


def test_saved_and_opened_again_it_is_the_same_model(tmp_path: Path) -> None:
    model = opened(tmp_path, order="probability", jitter=0.1)
    with torch.no_grad():
        before = model(IDS).logits
        moestro.save(model, tmp_path / "saved")
        again = moestro.load(tmp_path / "saved")
        assert (again(IDS).logits - before).abs().max() <= 1e-6
    assert state_of(again).swaps == state_of(model).swaps
    assert {m.router.config.order for m in mixture_layers(again).values()} == {"probability"}
    assert {m.router.noise.size for m in mixture_layers(again).values()} == {0.1}


def test_generation_without_a_capacity_is_the_same_with_and_without_a_cache(tmp_path: Path) -> None:
    model = opened(tmp_path, eval_capacity_factor=None)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached, whole = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, whole)
        padded = torch.cat([torch.zeros(3, 2, dtype=torch.int64), IDS], 1)
        mask = (torch.arange(10) >= 2).long().expand(3, -1)
        assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 10:], cached[:, 8:])


def test_padding_changes_nothing_while_places_are_short(tmp_path: Path) -> None:
    model = opened(tmp_path, eval_capacity_factor=0.6)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.int64), IDS], 1)
    mask = (torch.arange(10) >= 2).long().expand(3, -1)
    places_BS = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), session(collect=True) as seen:
        plain = model(IDS).logits
        beside = model(padded, attention_mask=mask, position_ids=places_BS).logits[:, 2:]
        contexts = seen.take()
    assert all(not routing.kept_N.all() for routing in contexts[0].routings.values())
    assert (beside - plain).abs().max() <= 1e-5


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(9)
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_replay_draws_what_its_first_run_drew(tmp_path: Path) -> None:
    model = opened(tmp_path, jitter=0.2, gumbel=True)
    plain = gradients(model)
    moestro.checkpoint(model)
    replayed = gradients(model)
    assert plain.keys() == replayed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, replayed[name]), name
    torch.manual_seed(10)
    assert model(IDS, labels=IDS).loss != model(IDS, labels=IDS).loss, "every forward draws anew"


def test_a_compiled_base_model_gives_the_same(tmp_path: Path) -> None:
    model = opened(tmp_path)
    with torch.no_grad():
        compiled = torch.compile(model.model, backend="eager")(IDS).last_hidden_state
        torch.testing.assert_close(compiled, model.model(IDS).last_hidden_state, atol=1e-6, rtol=1e-6)
