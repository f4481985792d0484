"""Sparse upcycling: the parent's logits on every dense family, and what makes the copies differ."""

from typing import Any

import pytest
import torch

from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, layers_of, logits


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "cohere", "bert")
UPCYCLE = method("convert.upcycle")

# Routers whose weights sum to 1 for every token.
SUM_TO_ONE: dict[str, dict[str, Any]] = {
    "train.softmax_topk": {"renormalise": True},
    "train.sigmoid_bias": {"renormalise": True},
    "train.noisy_topk": {},
    "train.hash_router": {},
    "train.random_router": {},
}


def upcycled(family: str, seed: int = 0, model: Any = None, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny model and the receipt of its upcycling."""
    model = tiny_model(family) if model is None else model
    plan = UPCYCLE.plan(PlanInputs(subject=OpenModel(model), seed=seed), UPCYCLE.configure(config))
    return model, surgery.apply(model, plan, calib=[ids(), ids(1, 5)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dense_family_keeps_its_logits(family: str) -> None:
    before = logits(tiny_model(family))
    model, receipt = upcycled(family)
    assert len(mixture_layers(model)) == 2
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert receipt["parity"]["as_routed"]["max_abs_diff"] <= 1e-5
    assert receipt["parity"]["as_routed"]["max_abs_before"] > 0.1
    assert receipt["parity"]["as_routed"]["rows"] == 19


@pytest.mark.parametrize("router", SUM_TO_ONE)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_logits_are_kept_under_any_router_whose_weights_sum_to_one(family: str, router: str) -> None:
    before = logits(tiny_model(family))
    use = {"method": router, "config": SUM_TO_ONE[router]}
    model, _ = upcycled(family, router=use, num_experts=5, top_k=3)
    for layer in layers_of(model):
        for name, parameter in layer.router.named_parameters():
            if name == "weight":
                torch.nn.init.normal_(parameter, std=2.0)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("router", "top_k"),
    [({"method": "train.switch"}, 1), ({"method": "train.softmax_topk", "config": {"renormalise": False}}, 2)],
)
def test_for_other_routers_the_receipt_tells_the_difference(router: dict[str, Any], top_k: int) -> None:
    before = logits(tiny_model("llama"))
    model, receipt = upcycled("llama", router=router, top_k=top_k)
    measured = (logits(model) - before).abs().max().item()
    assert measured > 1e-2
    told = receipt["parity"]["as_routed"]["max_abs_diff"]
    assert told >= measured * (1 - 1e-6)  # over two batches, one of them this one
    assert receipt["parity"]["all_on"]["max_abs_diff"] <= 1e-5


def test_padding_and_generation_see_the_parent_too() -> None:
    plain = tiny_model("llama")
    batch = ids()
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    with torch.no_grad():
        before = plain(input_ids=batch, attention_mask=mask).logits
        said = plain.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
        model, _ = upcycled("llama")
        after = model(input_ids=batch, attention_mask=mask).logits
        torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=1e-5, rtol=0)
        assert torch.equal(model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False), said)


@pytest.mark.parametrize("shared", [0.25, 0.5])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_shared_copy_carries_its_part(family: str, shared: float) -> None:
    before = logits(tiny_model(family))
    model, _ = upcycled(family, shared=shared)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    dense = OpenModel(tiny_model(family))
    layer = layers_of(model)[0]
    down = dense.tensor(0, None, "down")
    torch.testing.assert_close(layer.shared.bank.weight(0, "down"), shared * down)
    torch.testing.assert_close(layer.bank.weight(2, "down"), (1 - shared) * down)


def test_copies_are_bit_for_bit_and_noise_makes_them_differ() -> None:
    dense = OpenModel(tiny_model("llama"))
    same, _ = upcycled("llama")
    noisy, _ = upcycled("llama", noise=0.05)
    for index, (plain, loud) in enumerate(zip(layers_of(same), layers_of(noisy), strict=True)):
        for name in ("gate", "up", "down"):
            parent = dense.tensor(index, None, name)
            assert all(torch.equal(plain.bank.weight(e, name), parent) for e in range(8))
            gaps = torch.stack([loud.bank.weight(e, name) - parent for e in range(8)])
            assert gaps.std().item() == pytest.approx(0.05 * parent.std().item(), rel=0.1)
            assert len({gap.sum().item() for gap in gaps}) == 8


def test_drop_upcycling_redraws_its_share_of_each_expert() -> None:
    dense = OpenModel(tiny_model("llama"))
    model, receipt = upcycled("llama", redraw=0.5)
    inner = dense.shape.layers[0].inner
    sets = set()
    for index, layer in enumerate(layers_of(model)):
        for expert in range(8):
            changed = (layer.bank.weight(expert, "up") != dense.tensor(index, None, "up")).any(1)
            assert int(changed.sum()) == inner // 2
            assert torch.equal(changed, (layer.bank.weight(expert, "down") != dense.tensor(index, None, "down")).any(0))
            sets.add(tuple(changed.tolist()))
    assert len(sets) == 16
    assert receipt["parity"]["as_routed"]["max_abs_diff"] > 1e-2


def test_the_seed_decides_and_layers_differ() -> None:
    first, again, other = (upcycled("llama", seed=seed, redraw=0.5)[0] for seed in (1, 1, 2))
    assert torch.equal(layers_of(first)[0].bank.down_proj, layers_of(again)[0].bank.down_proj)
    assert torch.equal(layers_of(first)[0].router.weight, layers_of(again)[0].router.weight)
    assert not torch.equal(layers_of(first)[0].bank.down_proj, layers_of(other)[0].bank.down_proj)
    assert not torch.equal(layers_of(first)[0].router.weight, layers_of(other)[0].router.weight)
    assert not torch.equal(layers_of(first)[0].router.weight, layers_of(first)[1].router.weight)


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [("all", [0, 1, 2, 3, 4]), ("last:2", [3, 4]), ("first:2", [0, 1]), ("every:2", [1, 3]), ([4, 0], [0, 4])],
)
def test_layers_are_chosen(choice: Any, chosen: list[int]) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    plan = UPCYCLE.plan(PlanInputs(subject=OpenModel(model)), UPCYCLE.configure({"layers": choice}))
    assert [entry.layer for entry in plan.layers] == chosen


def test_a_second_upcycling_takes_the_layers_that_are_still_dense() -> None:
    model, _ = upcycled("llama", layers="last:1", num_experts=3)
    before = logits(model)
    upcycled("llama", model=model, num_experts=5)
    assert [layer.bank.num_experts for layer in layers_of(model)] == [5, 3]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    with pytest.raises(PlanError, match="layer 1 is a mixture; dense layers are none"):
        upcycled("llama", model=model, layers=[1])


def test_losses_stand_in_the_new_layers() -> None:
    loss = {"method": "train.balance_loss", "config": {"scope": "sequence"}}
    model, _ = upcycled("llama", losses={"balance": loss})
    assert [list(layer.losses) for layer in layers_of(model)] == [["balance"], ["balance"]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"top_k": 9}, "top_k=9 but num_experts=8"),
        ({"layers": "lost:2"}, "must be all, first:N"),
        ({"layers": []}, "at least one index"),
        ({"layers": [1, 1]}, "none twice"),
        ({"redraw": 1.2}, "redraw=1.2"),
        ({"shared": 1.0}, "shared=1.0"),
        ({"router": {"method": "train.switch"}}, "top_k=2, but train.switch has no such setting"),
        ({"router": {"method": "train.softmax_topk", "config": {"top_k": 3}}}, "router.config.top_k=3"),
        ({"expertz": 3}, "unknown key 'expertz'"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UPCYCLE.configure(config)


@pytest.mark.parametrize(
    ("layers", "message"), [("last:3", "has 2 dense layers"), ([7], "layer 7"), ("every:3", "no layer")]
)
def test_layers_that_are_not_there(layers: Any, message: str) -> None:
    inputs = PlanInputs(subject=OpenModel(tiny_model("llama")))
    with pytest.raises(PlanError, match=message):
        UPCYCLE.plan(inputs, UPCYCLE.configure({"layers": layers}))
