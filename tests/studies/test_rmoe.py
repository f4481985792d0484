"""What the study of recurrent routers measures, on choices whose ties are known, and that its arms are comparable."""

import math

import pytest
import torch
from torch import Tensor, nn

from moestro.core.layer import mixture_layers
from moestro.core.session import session
from moestro.studies import rmoe
from moestro.studies._framework import BUDGETS, Measured
from moestro.studies._language import batches, text
from moestro.studies.rmoe import BYTES, EXPERTS, STUDY, Times, information, measure, scale, shuffled, spread, tie
from moestro.training.objectives import Causal


ARMS = [arm.name for arm in STUDY.arms]
CI = scale(BUDGETS["ci"])
MANY = 20_000


def draws(count: int = 2, high: int = EXPERTS, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(high, (MANY,), generator=draw) for _ in range(count)]


def router_parameters(model: nn.Module) -> int:
    routers = [*(layer.router for layer in mixture_layers(model).values()), model.shared]
    return sum(p.numel() for part in routers for p in part.parameters())


# -- ties ---------------------------------------------------------------------------------------------------------


def test_information_by_hand() -> None:
    """Counts 3, 1, 1, 3 of 8: one bit less the entropy of a quarter, 0.8113 bits."""
    first, second = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([5, 5, 5, 2, 2, 2, 2, 5])
    assert information(first, second) == pytest.approx(1 - 0.811278, abs=1e-6)
    assert information(second, first) == pytest.approx(1 - 0.811278, abs=1e-6)
    assert information(first, torch.zeros_like(first)) == pytest.approx(0, abs=1e-12)
    every = torch.arange(EXPERTS)
    assert information(every, every.flip(0)) == pytest.approx(math.log2(EXPERTS))


def test_shuffling_keeps_every_group_and_mixes_within_it() -> None:
    group, value = torch.arange(600) % 3, torch.arange(600)
    found = shuffled(value, group, torch.Generator().manual_seed(0))
    for one in range(3):
        assert torch.equal(found[group == one].sort().values, value[group == one])
        assert int((found[group == one] == value[group == one]).sum()) <= 10
    whole = shuffled(value, torch.zeros_like(group), torch.Generator().manual_seed(0))
    assert torch.equal(whole.sort().values, value)
    assert 150 <= int((whole % 3 == group).sum()) <= 250  # a third stays in its old group by chance


def test_a_tie_is_free_of_what_few_tokens_feign() -> None:
    """Independent choices of 200 tokens feign 49 / (2 * 200 ln 2) = 0.18 bits."""
    pairs = [(one[:200], two[:200]) for one, two in (draws(seed=seed) for seed in range(30))]
    alike = torch.zeros(200, dtype=torch.int64)
    assert sum(information(*pair) for pair in pairs) / 30 == pytest.approx(0.177, abs=0.03)
    assert sum(tie(*pair, alike) for pair in pairs) / 30 == pytest.approx(0, abs=0.03)


def test_a_tie_beyond_the_byte_leaves_out_what_the_byte_explains() -> None:
    """Choices that both follow the byte are tied by it alone; a copied choice is tied beyond it."""
    byte, free = draws()
    alike = torch.zeros_like(byte)
    by_byte = (byte + 3) % EXPERTS
    assert tie(byte, by_byte, alike) == pytest.approx(3, abs=0.02)
    assert tie(byte, by_byte, byte) == 0
    assert tie(free, free, byte) == pytest.approx(3, abs=0.05)
    assert tie(free, free, alike) == pytest.approx(3, abs=0.02)


def test_measures_of_layers_by_hand() -> None:
    """Layers 0 and 1 agree, 2 and 3 do not: one of three near pairs is tied, the one far pair is not."""
    first, third, fourth = draws(3)
    best_LT = torch.stack([first, first, third, fourth])
    second_LT = (best_LT + 1) % EXPERTS
    flat = torch.full((4, MANY, EXPERTS), 0.1 / (EXPERTS - 2))
    probability = flat.scatter(-1, best_LT[..., None], 0.6).scatter(-1, second_LT[..., None], 0.3)
    found = measure(probability, torch.zeros(MANY, dtype=torch.int64))
    assert found["tie_near"] == pytest.approx(1, abs=0.02)
    assert found["tie_far"] == pytest.approx(0, abs=0.01)
    assert found["tie_near_beyond"] == pytest.approx(found["tie_near"], abs=0.01)
    assert found["inner_balance"] == pytest.approx(2)
    assert found["outer_balance"] == pytest.approx(0.9)
    entropy = -(0.6 * math.log2(0.6) + 0.3 * math.log2(0.3) + 0.1 * math.log2(0.1 / (EXPERTS - 2)))
    assert found["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert found["load_variation"] < 0.05
    same = probability[:, :1].expand(-1, MANY, -1)
    # All tokens on 2 of 8 experts: loads 1, 1, 0 x 6 have mean 1/4 and deviation sqrt(3)/4.
    assert measure(same, torch.zeros(MANY, dtype=torch.int64))["load_variation"] == pytest.approx(math.sqrt(3))


def test_probabilities_are_those_of_each_layer_and_held_out_token() -> None:
    data = text(BYTES, CI.length, CI.heldout, limit=6)
    model = rmoe.build("linear", CI, 0)
    found, ids = rmoe.look(model, data.heldout, CI)
    (rows,) = data.heldout.sources.values()
    for row, example in enumerate(rows):
        here = slice(row * CI.length, (row + 1) * CI.length)
        batch = Causal().collate([example], [])
        assert torch.equal(ids[here], batch.pop("labels").new_tensor(example["input_ids"]).reshape(-1))
        with torch.no_grad(), session(collect=True, keeps=["input"]) as opened:
            model(**batch)
        (ctx,) = opened.take()
        for layer, (site, mixture) in enumerate(mixture_layers(model).items()):
            expected = (ctx.kept[site, "input"] @ mixture.router.weight.T).softmax(-1)
            torch.testing.assert_close(found[layer, here], expected.detach(), atol=1e-6, rtol=1e-5)


# -- arms ---------------------------------------------------------------------------------------------------------


def test_all_but_routers_starts_alike_in_every_arm() -> None:
    own = {
        arm: {
            name: value
            for name, value in rmoe.build(arm, CI, 3).state_dict().items()
            if ".router." not in name and not name.startswith("shared.")
        }
        for arm in ARMS
    }
    for arm in ARMS:
        assert own[arm].keys() == own["linear"].keys(), arm
        assert all(torch.equal(value, own["linear"][name]) for name, value in own[arm].items()), arm
    other = rmoe.build("linear", CI, 4).state_dict()
    assert not torch.equal(other["model.embed_tokens.weight"], own["linear"]["model.embed_tokens.weight"])


def test_recurrent_arms_start_with_the_same_routers() -> None:
    first, *others = (rmoe.build(arm, CI, 0).state_dict() for arm in rmoe.RECURRENT)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in other.items())


@pytest.mark.parametrize("name", ["micro", "full"])
def test_the_mlp_has_as_many_router_parameters(name: str) -> None:
    size = scale(BUDGETS[name])
    count = {arm: router_parameters(rmoe.build(arm, size, 0)) for arm in ("recurrent", "not_passed", "mlp")}
    layers, dim, state = size.layers, size.dim, size.dim // 2
    assert count["recurrent"] == layers * (dim + EXPERTS) * state + 6 * state**2 + 6 * state
    assert count["mlp"] == count["recurrent"] == count["not_passed"]


def test_a_frozen_router_stays_as_it_is_and_a_linear_one_does_not() -> None:
    data = text(BYTES, CI.length, CI.heldout, limit=6)
    for arm, stays in (("random", True), ("linear", False)):
        model = rmoe.build(arm, CI, 0)
        before = {site: layer.router.weight.clone() for site, layer in mixture_layers(model).items()}
        rmoe.train(model, data.train, CI, 0, losses={} if stays else {"balance": rmoe.BALANCE})
        for site, layer in mixture_layers(model).items():
            assert torch.equal(layer.router.weight, before[site]) == stays, (arm, site)
            assert len(layer.losses) == (0 if stays else 1)


def test_the_cosine_router_scores_by_cosine_over_its_temperature() -> None:
    model = rmoe.build("cosine", CI, 0)
    layer = next(iter(mixture_layers(model).values()))
    router, x = layer.router, torch.randn(5, CI.dim)
    nn.init.normal_(router.inner.parametrizations.weight.original)
    rows = router.inner.parametrizations.weight.original
    embedded = x @ router.first.weight.T
    expected = nn.functional.cosine_similarity(embedded[:, None], rows[None], dim=-1) / 0.3
    torch.testing.assert_close(router.score(x, layer.bank, None).logits_TC, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", rmoe.SPREAD)
def test_logits_behind_a_hidden_layer_start_as_far_apart_as_a_linear_routers(arm: str) -> None:
    """Deviation over tokens, mean over experts: 0.02 times the length of the input's, as rows of N(0, 0.02) give."""
    size = CI.model_copy(update={"dim": 64, "length": 64, "heads": 4})
    batch = batches(text(BYTES, size.length, size.heldout, limit=6).train, size, 0)(0)

    def deviations(model: nn.Module) -> Tensor:
        with torch.no_grad(), session(collect=True) as opened:
            model(input_ids=batch["input_ids"])
        (ctx,) = opened.take()
        return torch.stack([one.scores.logits_TC.var(0).mean().sqrt() for one in ctx.routings.values()])

    linear, model = deviations(rmoe.build("linear", size, 0)), rmoe.build(arm, size, 0)
    assert float((deviations(model) / linear).max()) < 0.4
    spread(model, batch)
    ratio = deviations(model) / linear
    assert float(ratio.min()) > 0.6
    assert float(ratio.max()) < 1.7


# -- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "control", "verdict", "mean"),
    [
        ((0.4, 0.6), (0.2, 0.2), "shown", 2.5),
        ((0.4, 0.39), (0.2, 0.2), "partly", 1.975),
        ((0.9, 0.19), (0.2, 0.2), "not_shown", 2.725),
        ((0.4,), (0.1,), "partly", 4),  # one seed shows nothing
        ((0.0015, 0.0015), (-0.002, 0.0), "partly", 1.5),  # next to nothing is not twice less than nothing
        ((-0.1, -0.1), (-0.2, -0.2), "not_shown", -100),
    ],
)
def test_at_least_twice_on_every_seed(ours: tuple, control: tuple, verdict: str, mean: float) -> None:
    values = {"a": {"m": dict(enumerate(ours))}, "b": {"m": dict(enumerate(control))}}
    judged = Times(method="a", control="b", factor=2)(Measured(values), "m")
    assert judged.verdict == verdict
    assert judged.measured == pytest.approx(mean)
