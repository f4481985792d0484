"""Expert-diversify: what makes the copies differ, what they keep of their parent, and what the optimiser keeps."""

from typing import Any

import pytest
import torch

from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.registry import method
from moestro.core.session import session
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, layers_of, logits
from tests.surgery.test_optimizer import moment, trained


DIVERSIFY = method("convert.diversify")


def spawned(seed: int = 0, model: Any = None, optimizer: Any = None, **config: Any) -> Any:
    """A tiny model with every feed-forward made into experts."""
    model = tiny_model("llama") if model is None else model
    plan = DIVERSIFY.plan(PlanInputs(subject=OpenModel(model), seed=seed), DIVERSIFY.configure(config))
    surgery.apply(model, plan, optimizer=optimizer)
    return model


def test_a_mask_zeroes_its_share_of_each_matrix_and_moves_nothing_else() -> None:
    dense = OpenModel(tiny_model("llama"))
    model = spawned(rate=0.3)
    patterns = set()
    for index, layer in enumerate(layers_of(model)):
        for name in ("gate", "up", "down"):
            parent = dense.tensor(index, None, name)
            gone = torch.stack([layer.bank.weight(expert, name) == 0 for expert in range(8)])
            assert gone.double().mean().item() == pytest.approx(0.3, abs=0.015)  # 4 sigma of 12288 draws
            for expert in range(8):
                kept = ~gone[expert]
                assert torch.equal(layer.bank.weight(expert, name)[kept], parent[kept])
                patterns.add((name, tuple(gone[expert].flatten().tolist())))
    assert len(patterns) == 2 * 8 * 3  # no two copies, layers or matrices share a pattern


def test_the_seed_decides() -> None:
    first, again, other = (spawned(seed=seed, num_experts=2) for seed in (1, 1, 2))
    for one, two, three in zip(layers_of(first), layers_of(again), layers_of(other), strict=True):
        assert torch.equal(one.bank.down_proj, two.bank.down_proj)
        assert torch.equal(one.router.weight, two.router.weight)
        assert not torch.equal(one.bank.down_proj, three.bank.down_proj)


def test_noise_is_relative_to_the_matrix() -> None:
    dense = OpenModel(tiny_model("llama"))
    for index, layer in enumerate(layers_of(spawned(spawn="noise", rate=0.05))):
        for name in ("gate", "up", "down"):
            parent = dense.tensor(index, None, name)
            gaps = torch.stack([layer.bank.weight(expert, name) - parent for expert in range(8)])
            assert gaps.std().item() == pytest.approx(0.05 * parent.std().item(), rel=0.05)


def test_a_cut_unit_says_nothing_and_can_learn_to_speak_again() -> None:
    dense = OpenModel(tiny_model("llama"))
    model = spawned(spawn="neuron", rate=0.25)
    sets = set()
    for index, layer in enumerate(layers_of(model)):
        for expert in range(8):
            down, parent = layer.bank.weight(expert, "down"), dense.tensor(index, None, "down")
            cut = (down == 0).all(0)
            assert int(cut.sum()) == 12  # a quarter of 48
            assert torch.equal(down[:, ~cut], parent[:, ~cut])
            assert torch.equal(layer.bank.weight(expert, "up"), dense.tensor(index, None, "up"))
            sets.add(tuple(cut.tolist()))
    assert len(sets) == 16
    model.train()
    with session(values={"dts_stage": 0}):
        model(input_ids=ids(), labels=ids()).loss.backward()
    for layer in layers_of(model):
        silent = (layer.bank.down_proj == 0).all(1)
        grad_EI = layer.bank.down_proj.grad.abs().sum(1)
        assert bool((grad_EI[silent] > 0).all())


def test_without_difference_the_mixture_of_all_is_the_single_expert_model() -> None:
    """The switch of phases keeps the function: weights of a dense gate sum to 1, noisy ones (gumbel) as well."""
    before = logits(tiny_model("llama"))
    use = {"method": "train.evomoe", "config": {"stage": "soft", "progress": 0.3, "threshold": 0, "combine": "gumbel"}}
    model = spawned(rate=0.0, router=use)
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.router.weight, std=1.0)
    torch.manual_seed(4)
    torch.testing.assert_close(logits(model.train()), before, atol=1e-5, rtol=0)
    with session(values={"dts_stage": 0}):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    with session(values={"dts_stage": 2}):  # one expert that weighs its probability: not the same function
        assert (logits(model) - before).abs().max() > 1e-2


def test_masked_copies_are_near_their_parent_and_a_higher_rate_is_further() -> None:
    before = logits(tiny_model("llama"))
    gaps = []
    for rate in (0.01, 0.1, 0.5):
        with session(values={"dts_stage": 0}):
            gaps.append((logits(spawned(rate=rate)) - before).abs().mean().item())
    assert 0 < gaps[0] < gaps[1] < gaps[2]


@pytest.mark.parametrize("spawn", ["mask", "neuron"])
def test_copies_take_the_moments_masked_like_their_weights_and_the_gate_has_none(spawn: str) -> None:
    model = tiny_model("llama")
    optimizer = trained(model)
    parent = model.model.layers[1].mlp.down_proj.weight
    moments = {key: moment(optimizer, parent, key).clone() for key in ("exp_avg", "exp_avg_sq")}
    spawned(model=model, optimizer=optimizer, num_experts=3, spawn=spawn, rate=0.3)
    layer = layers_of(model)[1]
    for key, wanted in moments.items():
        found = moment(optimizer, layer.bank.down_proj, key)
        for expert in range(3):
            gone = layer.bank.weight(expert, "down") == 0
            assert 0.2 < gone.double().mean().item() < 0.4
            assert torch.equal(found[expert], wanted.masked_fill(gone, 0.0))
        assert not moment(optimizer, layer.router.weight, key).any()


def test_any_router_and_losses_stand_there() -> None:
    losses = {"balance": {"method": "train.dts_balance_loss"}}
    model = spawned(router={"method": "train.softmax_topk"}, top_k=3, losses=losses, layers="last:1")
    (layer,) = layers_of(model)
    assert layer.site == "model.layers.1.mlp"
    assert layer.router.top_k == 3
    assert list(layer.losses) == ["balance"]
    assert type(layers_of(spawned())[0].router).__module__ == "moestro.methods.train.evomoe"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rate": 1.0}, "rate=1.0"),
        ({"rate": -0.1}, "rate=-0.1"),
        ({"spawn": "dropout"}, "spawn='dropout'"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"top_k": 2}, "top_k=2, but train.evomoe has no such setting"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DIVERSIFY.configure(config)


def test_a_layer_that_is_a_mixture_already_is_refused() -> None:
    model = spawned(layers="first:1")
    with pytest.raises(PlanError, match="layer 0 is a mixture; dense layers are \\[1\\]"):
        spawned(model=model, layers=[0])
