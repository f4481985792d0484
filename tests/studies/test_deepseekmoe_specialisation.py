"""Arms spend what the study says they spend, and its readings are those of the meter."""

import pytest
import torch
from torch import nn

from moestro.core.inputs import MeterInputs
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.studies import deepseekmoe_specialisation as subject
from moestro.studies._framework import BUDGETS
from moestro.studies._language import heldout, text


CI = BUDGETS["ci"]
SIZE = subject.scale(CI)


def layers(arm: str) -> list[MoELayer]:
    return list(mixture_layers(subject.build(SIZE, subject.FORMS[arm], 0)).values())


def weights(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def spent(arm: str) -> tuple[int, int]:
    """Parameters of experts, and those that a token uses."""
    found = layers(arm)
    each = [weights(layer.bank) // layer.bank.num_experts for layer in found]
    total = sum(weights(layer.bank) + weights(layer.shared) for layer in found)
    pairs = zip(found, each, strict=True)
    return total, sum((layer.router.top_k or 0) * size + weights(layer.shared) for layer, size in pairs)


def test_arms_have_equal_experts_and_the_large_one_half_as_much_again() -> None:
    coarse = spent("coarse")
    for arm in ("deepseekmoe", "segmented", "isolated"):
        assert spent(arm) == coarse
    assert spent("coarse_large") == (1.5 * coarse[0], 1.5 * coarse[1])


@pytest.mark.parametrize(
    ("arm", "routed", "active", "shared"),
    [
        ("deepseekmoe", 31, 7, True),
        ("segmented", 32, 8, False),
        ("isolated", 7, 1, True),
        ("coarse", 8, 2, False),
        ("coarse_large", 8, 2, False),
    ],
)
def test_forms_are_what_their_texts_say(arm: str, routed: int, active: int, shared: bool) -> None:
    for layer in layers(arm):
        assert (layer.bank.num_experts, layer.router.top_k, layer.shared is not None) == (routed, active, shared)


def test_arms_close_comparable_shares() -> None:
    meter = method("inspect.expert_redundancy").module
    for arm in subject.FORMS:
        there = mixture_layers(subject.build(SIZE, subject.FORMS[arm], 0))
        for share in subject.SHARES:
            for site, count in meter.closed_counts(there, share).items():
                assert count / there[site].router.num_experts == pytest.approx(share, abs=0.036)


@pytest.mark.parametrize("arm", ["deepseekmoe", "coarse"])
def test_readings_are_the_meters_on_the_held_out_rows(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def enlarged(model: nn.Module, *_: object, **__: object) -> None:
        torch.manual_seed(1)
        with torch.no_grad():  # experts and routers that matter, without the steps
            for layer in mixture_layers(model).values():
                for parameter in layer.parameters():
                    parameter.normal_(std=0.3)

    monkeypatch.setattr(subject, "train", enlarged)
    found = subject.run(arm, 5, CI)
    model = subject.build(SIZE, subject.FORMS[arm], 5).eval()
    enlarged(model)
    data = text(SIZE.vocabulary, SIZE.length, SIZE.heldout, limit=4)
    (rows,) = data.heldout.sources.values()
    ids = torch.stack([torch.as_tensor(rows[i]["input_ids"]).long() for i in range(SIZE.heldout)])
    meter = method("inspect.expert_redundancy")
    inputs = MeterInputs(model=model, batches=[{"input_ids": part} for part in ids.split(SIZE.batch)], seed=5)
    seen = meter.entry("measure")(inputs, meter.configure({"shares": subject.SHARES})).numbers
    assert found["heldout_loss"] == pytest.approx(heldout(model, data.heldout, SIZE))
    assert found["top_slope"] == pytest.approx(seen["slope: top"])
    assert abs(found["top_slope"]) > 1e-4
    assert found["top_excess"] == pytest.approx(seen["slope: top"] - seen["slope: random"])
    assert ("shared_excess" in found) == (arm == "deepseekmoe")


def test_the_shared_experts_harm_is_the_lesser_of_two_trades() -> None:
    rises = {
        "slope: top": 0.5, "slope: top, weight kept": 0.4, "slope: random": 0.1, "rise: no routed": 0.2,
        "rise: top 0.25": 0.15, "rise: no shared": 0.3, "rise: no shared, full weight": 0.25,
        "rise: no shared, none added": 0.4, "rise: chosen swap": 0.05, "rise: best swap": 0.08,
    }  # fmt: skip
    found = subject.readings(rises)
    assert found["shared_traded"] == 0.25
    assert found["shared_excess"] == pytest.approx(0.25 - 3 * 0.05)
    assert found["shared_over_best"] == pytest.approx(0.17)
    assert found["top_part"] == pytest.approx(0.75)
    assert found["top_excess"] == pytest.approx(0.4)
    assert subject.readings({**rises, "rise: no routed": -0.1})["top_part"] == pytest.approx(0.15 / 1e-4)
    without = subject.readings({name: value for name, value in rises.items() if "shared" not in name})
    assert not any(name.startswith("shared") for name in without)
