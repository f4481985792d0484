"""Top-p routing: prefixes by hand and against the released algorithm, p at run time, whole models."""

import logging
import math

import pytest
import torch
from torch import nn

import moestro
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.routing import Routing, Scores
from moestro.core.session import Session
from moestro.methods.train import dynamic_moe
from moestro.methods.train.dynamic_moe import prefix_lengths, running_mass
from moestro.models.load import adopt
from moestro.models.swap import state_of, swap
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import DIM, build, context, layer, route


def scores_of(probability: list[list[float]] | torch.Tensor) -> Scores:
    p = torch.as_tensor(probability)
    return Scores(p.log(), p, p, p)


def chosen(routing: Routing) -> list[dict[int, float]]:
    """Expert -> weight of each token, in the order they are listed."""
    table: list[dict[int, float]] = [{} for _ in range(routing.num_tokens)]
    for token, expert, weight in zip(
        routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True
    ):
        table[token][expert] = weight
    return table


def pick(probability: list[list[float]] | torch.Tensor, *, session: Session | None = None, **config: object) -> Routing:
    scores = scores_of(probability)
    router = build("train.dynamic_moe", num_experts=scores.logits_TC.shape[1], **config)
    return router.choose(scores, context(1, len(scores.logits_TC), session=session))


def spread(router: nn.Module, std: float = 0.7) -> nn.Module:
    """A router whose tokens differ in certainty."""
    nn.init.normal_(router.weight, std=std, generator=torch.Generator().manual_seed(3))
    return router


def mixture_of(router: nn.Module) -> nn.Module:
    """A layer whose outputs are of the size of its inputs."""
    made = layer(router)
    for parameter in made.bank.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(11))
    return made


def inputs(tokens: int = 60) -> torch.Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(4))


# -- the choice ---------------------------------------------------------------------------------------------------


def test_a_case_worked_out_by_hand() -> None:
    """p = 0.4: 0.5 crosses alone; 0.3 + 0.28 cross; 0.4 does not exceed 0.4, so a second one comes in."""
    routing = pick([[0.2, 0.5, 0.3], [0.28, 0.3, 0.42 - 1e-3], [0.35, 0.25, 0.4]], p=0.4)
    assert [list(token) for token in chosen(routing)] == [[1], [2], [2, 0]]
    routing = pick([[0.28, 0.3, 0.22, 0.2]], p=0.4)
    assert list(chosen(routing)[0]) == [1, 0]
    torch.testing.assert_close(routing.weight_N, torch.tensor([0.3, 0.28]))
    assert routing.top_k is None
    assert routing.causal


def released(x: torch.Tensor, weight: torch.Tensor, p: float) -> list[dict[int, float]]:
    """The released algorithm, token by token: mask what lies above p, let the first of it in again, drop the rest."""
    found = []
    for row in x.double() @ weight.detach().double().T:
        sorted_p, order = torch.sort(row.softmax(-1), descending=True, stable=True)
        masked = (sorted_p.cumsum(-1) > p).tolist()
        if True in masked:
            masked[masked.index(True)] = False
        found.append({int(i): float(v) for i, v, m in zip(order, sorted_p, masked, strict=True) if not m})
    return found


@pytest.mark.parametrize("p", [0.0, 0.15, 0.4, 0.7, 0.97])
def test_choice_and_weights_are_those_of_the_released_algorithm(p: float) -> None:
    router = spread(build("train.dynamic_moe", num_experts=9, p=p))
    x = inputs()
    ours, theirs = chosen(route(router, x, context(1, 60))), released(x, router.weight, p)
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine) == list(other)
        assert all(abs(weight - other[expert]) <= 1e-6 for expert, weight in mine.items())


@pytest.mark.parametrize("p", [0.25, 0.4, 0.8])
def test_the_last_member_of_a_prefix_is_needed(p: float) -> None:
    router = spread(build("train.dynamic_moe", num_experts=9, p=p), 0.4)
    routing = route(router, inputs(), context(1, 60))
    counts = set()
    for token, picked in enumerate(chosen(routing)):
        probability = routing.scores.prob_TC[token].detach()
        order = sorted(range(9), key=lambda i: (-float(probability[i]), i))
        assert list(picked) == order[: len(picked)], "not a prefix of the sorted order"
        mass = [float(probability[i]) for i in picked]
        assert sum(mass) > p - 1e-6
        assert sum(mass[:-1]) <= p + 1e-6
        counts.add(len(picked))
    assert len(counts) >= 2, "all tokens use as many experts: nothing was tested"


def test_p_0_is_top_1_with_its_probability_as_weight() -> None:
    router = spread(build("train.dynamic_moe", num_experts=6, p=0.0))
    x = inputs()
    routing = route(router, x, context(1, 60))
    best = (x @ router.weight.T).softmax(-1).max(-1)
    assert torch.equal(routing.token_N, torch.arange(60))
    assert torch.equal(routing.expert_N, best.indices)
    torch.testing.assert_close(routing.weight_N, best.values)


@pytest.mark.parametrize("std", [0.05, 0.7, 12.0])
def test_p_1_is_the_dense_mixture_of_all_experts(std: float) -> None:
    router = spread(build("train.dynamic_moe", num_experts=7, p=1.0), std)
    mixture, x = mixture_of(router), inputs()
    with torch.no_grad():
        assert route(router, x, context(1, 60)).token_N.numel() == 60 * 7
        probability, expected = (x @ router.weight.T).softmax(-1), torch.zeros(60, DIM)
        for expert in range(7):
            gate, up, down = (mixture.bank.weight(expert, name) for name in ("gate", "up", "down"))
            expected += probability[:, expert : expert + 1] * (nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T)
        assert expected.abs().mean() >= 0.1
        torch.testing.assert_close(mixture(x[None])[0], expected, atol=1e-5, rtol=0)


def test_rounding_of_the_sums_drops_no_expert_at_p_1() -> None:
    """These probabilities add up to more than 1 in float32 long before the last of them."""
    probability = torch.tensor([0.5, 0.25, 0.25, *[2e-8] * 5])[None]
    assert float(probability.double().sum()) > 1
    assert pick(probability, p=1.0).token_N.numel() == 8


def test_more_p_never_means_fewer_experts() -> None:
    logits = 2 * torch.randn(200, 12, generator=torch.Generator().manual_seed(5))
    mass = running_mass(logits.softmax(-1).sort(descending=True).values)
    lengths = torch.stack([prefix_lengths(mass, p / 50) for p in range(51)])
    assert bool((lengths[1:] >= lengths[:-1]).all())
    assert bool((lengths[0] == 1).all())
    assert bool((lengths[-1] == 12).all())
    assert len(lengths.unique()) == 12


@pytest.mark.parametrize(
    ("p", "experts", "count"), [(0.4, 16, 7), (0.05, 16, 1), (0.3, 5, 2), (0.99, 12, 12), (0.5, 3, 2)]
)
def test_an_undecided_router_uses_floor_p_n_plus_1(p: float, experts: int, count: int) -> None:
    assert p * experts != int(p * experts)
    assert count == math.floor(p * experts) + 1
    router = build("train.dynamic_moe", num_experts=experts, p=p)
    nn.init.zeros_(router.weight)
    routing = route(router, inputs(4), context(1, 4))
    assert chosen(routing) == [dict.fromkeys(range(count), pytest.approx(1 / experts))] * 4
    entropy = build("train.entropy_loss")("s", routing, context(1, 4))
    torch.testing.assert_close(entropy / 4, torch.tensor(math.log(experts)))


def test_ties_go_to_the_lowest_id_at_every_call() -> None:
    rows = torch.tensor([[0.2, 0.3, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.4, 0.1]]).repeat(400, 1)
    for _ in range(3):
        picked = [list(token) for token in chosen(pick(rows, p=0.7))]
        assert picked == [[1, 3, 0], [0, 1, 2], [1, 2]] * 400


def test_the_order_of_experts_does_not_matter() -> None:
    router = spread(build("train.dynamic_moe", num_experts=8, p=0.5))
    mixture, x = mixture_of(router), inputs()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        before, routing = mixture(x[None]), route(router, x, context(1, 60))
        for parameter in mixture.parameters():
            parameter.copy_(parameter[order].clone())
        moved = route(router, x, context(1, 60))
        torch.testing.assert_close(mixture(x[None]), before, atol=1e-6, rtol=0)
    assert torch.equal(order[moved.expert_N], routing.expert_N)
    assert torch.equal(moved.token_N, routing.token_N)


def test_bounds_on_the_number_of_experts() -> None:
    probability = [[0.9, 0.05, 0.03, 0.02], [0.26, 0.25, 0.25, 0.24]]
    counts = [len(token) for token in chosen(pick(probability, p=0.8, min_experts=2, max_experts=3))]
    assert counts == [2, 3]
    assert [len(token) for token in chosen(pick(probability, p=0.8))] == [1, 4]


def test_renormalised_weights_sum_to_1_over_the_chosen() -> None:
    routing = pick([[0.3, 0.5, 0.2], [0.45, 0.1, 0.45]], p=0.6, renormalise=True)
    first, second = chosen(routing)
    assert first == {1: pytest.approx(0.625), 0: pytest.approx(0.375)}
    assert second == {0: pytest.approx(0.5), 2: pytest.approx(0.5)}


@pytest.mark.parametrize("renormalise", [False, True])
def test_gradients_are_those_of_a_plain_loop(renormalise: bool) -> None:
    router = spread(build("train.dynamic_moe", num_experts=5, p=0.6, renormalise=renormalise))
    mixture, x = mixture_of(router), inputs(12).requires_grad_()
    mixture(x[None]).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in mixture.named_parameters()} | {"x": x.grad.clone()}
    mixture.zero_grad()
    x.grad = None
    total = torch.zeros(())
    for token in x:
        probability = (router.weight @ token).softmax(-1)
        known = probability.tolist()
        y, mass, weight = torch.zeros(DIM), 0.0, torch.zeros(())
        for expert in sorted(range(5), key=lambda i: -known[i]):
            if mass > 0.6:
                break
            mass, weight = mass + known[expert], weight + probability[expert]
            gate, up, down = (mixture.bank.weight(expert, name) for name in ("gate", "up", "down"))
            y = y + probability[expert] * (down @ (nn.functional.silu(gate @ token) * (up @ token)))
        total = total + (y / weight if renormalise else y).square().sum()
    total.backward()
    for name, parameter in [*mixture.named_parameters(), ("x", x)]:
        assert float(parameter.grad.abs().max()) >= 0.1
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_closed_choice_is_not_taken_even_when_mass_is_missing() -> None:
    router = build("train.dynamic_moe", num_experts=3, p=0.9)
    scores = scores_of([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    closed = scores.replace(select_TC=torch.tensor([[-math.inf, 0.3, 0.1], [0.2, 0.2, 0.6]]))
    assert [list(token) for token in chosen(router.choose(closed, context(1, 2)))] == [[1, 2], [2, 0, 1]]
    none = scores.replace(select_TC=torch.full((2, 3), -math.inf))
    with pytest.raises(ContextError, match="token 0 may choose among 0 experts"):
        router.choose(none, context(1, 2))


def test_uniform_load_costs_1_for_any_number_of_experts() -> None:
    """Token t is undecided between experts t and t + 1 of 4: f = P = 1/4 with two experts a token."""
    probability = torch.zeros(8, 4)
    for token in range(8):
        probability[token, [token % 4, (token + 1) % 4]] = 0.5
    routing = pick(probability, p=0.5)
    assert routing.counts_C().tolist() == [4] * 4
    torch.testing.assert_close(build("train.balance_loss")("s", routing, context(1, 8)), torch.tensor(1.0))


# -- p at run time ------------------------------------------------------------------------------------------------


def test_a_session_sets_p_and_another_than_trained_is_told_once(caplog) -> None:
    dynamic_moe._warn_once.cache_clear()
    rows = [[0.4, 0.3, 0.2, 0.1]]
    other = Session(values={"top_p": 0.8})
    with caplog.at_level(logging.WARNING, logger="moestro"):
        router = build("train.dynamic_moe", num_experts=4, p=0.3)
        router.train()
        assert len(chosen(router.choose(scores_of(rows), context(1, 1, session=other)))[0]) == 3
        assert len(chosen(router.eval().choose(scores_of(rows), context(1, 1)))[0]) == 1
        assert caplog.text == ""
        for _ in range(2):
            assert len(chosen(router.choose(scores_of(rows), context(1, 1, session=other)))[0]) == 3
    assert caplog.text.count("top_p=0.8, but the router was trained with p=0.3") == 1
    with pytest.raises(ContextError, match="between 0"):
        pick(rows, session=Session(values={"top_p": 1.5}))


def test_nan_logits_are_refused_except_on_padding() -> None:
    router, x = spread(build("train.dynamic_moe", num_experts=4)), inputs(3)
    for lost in (math.nan, math.inf, 1e38):
        x[1] = lost
        with pytest.raises(ContextError, match="token 1 are NaN or infinite"):
            route(router, 100 * x, context(1, 3))
    routing = route(router, x, context(1, 3, valid=[True, False, True]))
    assert bool(routing.weight_N[routing.token_N != 1].isfinite().all())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"p": 1.01}, "p=1.01"),
        ({"p": -0.1}, "p=-0.1"),
        ({"p": math.nan}, "p=nan"),
        ({"num_experts": 8, "max_experts": 9}, "max_experts=9 but num_experts=8"),
        ({"min_experts": 3, "max_experts": 2}, "min_experts=3 is more than the 2"),
        ({"num_experts": 4, "min_experts": 5}, "min_experts=5 is more than the 4"),
        ({"max_experts": 0}, "max_experts=0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        method("train.dynamic_moe").configure(wrong)


# -- whole models -------------------------------------------------------------------------------------------------

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(9))


def whole(p: float = 0.5) -> nn.Module:
    """A tiny Llama whose second layer is a mixture, with tokens of every degree of certainty."""
    model = adopt(tiny_model("llama"))
    losses = {"balance": {"method": "train.balance_loss"}, "entropy": {"method": "train.entropy_loss"}}
    router = {"method": "train.dynamic_moe", "config": {"p": p}}
    swap(model, "train.moe", {"num_experts": 6, "expert_size": 20, "router": router, "losses": losses}, layers=[1])
    draw = torch.Generator().manual_seed(10)
    for name, parameter in model.model.layers[1].mlp.named_parameters():
        nn.init.normal_(parameter, std=0.15 if "router" in name else 0.2, generator=draw)
    return model


def run(model: nn.Module, ids: torch.Tensor, **call: object) -> tuple[torch.Tensor, Routing, dict[str, float]]:
    """Logits, the mixture's routing and its losses."""
    with torch.no_grad(), moestro.session(collect=True) as opened:
        logits = model(ids, **call).logits
    (ctx,) = opened.take()
    return (
        logits,
        next(iter(ctx.routings.values())),
        {name: float(term.total) for (_, name), term in ctx.losses.items()},
    )


def test_saved_loaded_and_p_comes_along(tmp_path) -> None:
    model = whole()
    logits, routing, losses = run(model, IDS)
    assert len({len(token) for token in chosen(routing)}) >= 3
    moestro.save(model, tmp_path / "saved")
    again = moestro.load(tmp_path / "saved")
    after, now, terms = run(again, IDS)
    assert (after - logits).abs().max() <= 1e-6
    assert chosen(now) == chosen(routing)
    assert terms == pytest.approx(losses)
    (mixture,) = mixture_layers(again).values()
    assert mixture.router.config.p == 0.5
    assert [name for name, _ in mixture.router.state_dict().items()] == ["weight"]
    assert state_of(again).swaps[0].config["router"]["config"]["p"] == 0.5


def test_generation_with_a_cache_is_generation_without() -> None:
    model = whole()
    ask = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **ask), model.generate(IDS, use_cache=False, **ask))


def test_prefill_is_decoding_step_by_step() -> None:
    model = whole()
    logits, routing, _ = run(model, IDS[:1])
    cache, lines, steps = None, [], []
    for place in range(IDS.shape[1]):
        with torch.no_grad(), moestro.session(collect=True) as opened:
            out = model(IDS[:1, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        lines.append(out.logits)
        steps += chosen(next(iter(opened.take()[0].routings.values())))
    torch.testing.assert_close(torch.cat(lines, 1), logits, atol=1e-5, rtol=0)
    for one, other in zip(steps, chosen(routing), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_choices_nor_losses(side: str) -> None:
    model = whole()
    logits, routing, losses = run(model, IDS)
    pad, ones = torch.zeros(2, 4, dtype=torch.long), torch.ones_like(IDS)
    parts = ([pad, IDS], [pad, ones]) if side == "left" else ([IDS, pad], [ones, pad])
    ids, mask = (torch.cat(part, 1) for part in parts)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    after, wide, terms = run(model, ids, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(after[mask.bool()].view_as(logits), logits, atol=1e-5, rtol=0)
    kept = [token for token, real in zip(chosen(wide), mask.reshape(-1).tolist(), strict=True) if real]
    for one, other in zip(kept, chosen(routing), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert terms == pytest.approx(losses, rel=1e-5)


def test_a_checkpointed_backward_is_the_plain_one() -> None:
    gradients = []
    for replayed in (False, True):
        model = whole().train()
        if replayed:
            moestro.checkpoint(model)
        with moestro.session(collect=True) as opened:
            loss = model(IDS, labels=IDS).loss
        total = loss + sum(term.total for ctx in opened.take() for term in ctx.losses.values())
        total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, replay = gradients
    assert float(plain["model.layers.1.mlp.router.weight"].abs().max()) > 0
    for name, grad in plain.items():
        torch.testing.assert_close(replay[name], grad, atol=0, rtol=0, msg=name)


def test_training_brings_the_number_of_experts_down() -> None:
    """From floor(0.4 * 6) + 1 = 3 experts a token; the entropy loss brings it lower than the model's loss does."""
    ids, ends = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(12)), {}
    for entropy in (0.0, 1.0):
        model, course = whole(0.4).train(), []
        nn.init.normal_(model.model.layers[1].mlp.router.weight, std=1e-3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(30):
            with moestro.session(collect=True) as opened:
                loss = model(ids, labels=ids).loss
            (ctx,) = opened.take()
            (routing,) = ctx.routings.values()
            counts = torch.bincount(routing.token_N, minlength=routing.num_tokens)
            assert 1 <= int(counts.min()) <= int(counts.max()) <= 6
            course.append(float(counts.double().mean()))
            terms = {name: term.total / routing.num_tokens for (_, name), term in ctx.losses.items()}
            (loss + 0.01 * terms["balance"] + entropy * terms["entropy"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert course[0] == pytest.approx(3, abs=0.05)
        ends[entropy] = course[-1]
    assert ends[0.0] <= 0.75 * 3
    assert ends[1.0] <= ends[0.0] - 0.2


def test_the_compiled_base_model_computes_the_same() -> None:
    model = whole()
    logits, _, _ = run(model, IDS)
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
    compiled, _, _ = run(model, IDS)
    torch.testing.assert_close(compiled, logits, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_a_model_in_bfloat16_chooses_by_float32_sums() -> None:
    """The same bfloat16 input through a float32 router gives the same choice: nothing was rounded on the way."""
    router = spread(build("train.dynamic_moe", num_experts=16, p=0.4), 0.3).to(torch.bfloat16)
    x = inputs(400).to(torch.bfloat16)
    low = route(router, x, context(1, 400))
    assert chosen(route(router.float(), x.float(), context(1, 400))) == chosen(low)
    rounded = low.scores.prob_TC.to(torch.bfloat16).sort(-1, descending=True).values.cumsum(-1)
    lengths = 1 + (rounded[:, :-1] <= 0.4).sum(-1)
    assert lengths.tolist() != [len(token) for token in chosen(low)], "sums in bfloat16 would have done as well"
