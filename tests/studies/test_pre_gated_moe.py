"""What the study of pre-gated mixtures paces and counts, and that its arms are comparable."""

import os
import time
from pathlib import Path

import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies._framework import BUDGETS
from moestro.studies._paced import Pace, Tier, experts_of, reads_ahead, token_seconds, work
from moestro.studies._pre_gated import TUNED, _pretrained, agreement, choices_of, converted, parent, shape_of
from moestro.studies.pre_gated_moe import RATES, STUDY, SYSTEM, pace_of, packed, ran, resident


def test_formulas_by_hand() -> None:
    """Six blocks of 8 ms, 32 experts read in 4 ms each."""
    found = {
        way: 1e3 * token_seconds(way, 6, 8e-3, 4e-3, 32)
        for way in ("resident", "on_demand", "pre_gated", "prefetch_all")
    }
    assert found == pytest.approx({"resident": 48, "on_demand": 72, "pre_gated": 52, "prefetch_all": 12 + 5 * 128})
    assert token_seconds("pre_gated", 6, 8e-3, 20e-3, 8) == pytest.approx(28e-3 + 5 * 20e-3)


def test_a_tier_gives_no_more_than_its_rate_and_the_bytes_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(200)))
    file = os.open(tmp_path / "f", os.O_RDONLY)
    tier, into, started = Tier(Pace(4e5, 1e-3), 1e8), bytearray(100), time.monotonic()
    for at in (0, 100, 50):
        assert tier(file, [into], at) == 100
    assert time.monotonic() - started >= 3 * 4e-3
    assert into == bytes(range(50, 150))
    assert tier.reads == 3
    os.close(file)


@pytest.mark.parametrize("busy", [False, True])
def test_work_takes_its_time(busy: bool) -> None:
    started = time.perf_counter()
    work(3e-3, busy)
    assert time.perf_counter() - started >= 3e-3


def test_paces_are_those_of_the_setting() -> None:
    pace = pace_of(BUDGETS["full"])
    assert [pace.nominal / rate / pace.compute_s for rate in RATES.values()] == pytest.approx([2.5, 1.0, 0.5])


def test_arms_differ_in_what_they_say_only() -> None:
    """Equal parameters, the same experts, the same first values; a blind gate alone does not learn."""
    starts = {top_k: {name: p.clone() for name, p in parent(0, "ci", top_k).named_parameters()} for top_k in (1, 2)}
    for arm in TUNED:
        model, start = converted(arm, 0, "ci"), starts[choices_of(arm)]
        assert {layer.router.top_k for layer in mixture_layers(model).values()} == {choices_of(arm)}
        found = dict(model.named_parameters())
        assert sum(p.numel() for p in found.values()) == sum(p.numel() for p in start.values())
        assert all(torch.equal(p, start[name]) for name, p in found.items() if "router" not in name)
        learns = {p.requires_grad for name, p in found.items() if "router" in name}
        assert learns == {arm != "blind"}
        assert all(p.requires_grad for name, p in found.items() if "router" not in name)
        read = [getattr(layer.router, "distance", 0) for layer in mixture_layers(model).values()]
        settings = TUNED[arm]
        assert set(read) == {0 if settings is None else settings["distance"]}


def test_an_early_gate_agrees_where_the_stream_stands_still() -> None:
    _pretrained.cache_clear()
    found = agreement(0, "ci")  # which trains the model it needs, where no other arm has
    model = parent(0, "ci")
    assert len(found) == shape_of(BUDGETS["ci"]).layers - 1
    assert all(0 <= share <= 1 for share in found)
    assert min(found) < 1, "a stream that moves is not all foreseen"
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
            elif "norm" in name:
                grows = torch.linspace(0.5, 2, parameter.numel())
                parameter.copy_(grows if "layers.1." in name else grows.flip(0))
    try:
        assert min(agreement(0, "ci")) == 1.0
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])


def test_reads_of_a_token_by_arm() -> None:
    """On demand and pre-gated read what is needed, a whole layer reads more; bits are those of the resident run."""
    layers = shape_of(BUDGETS["ci"]).layers
    tokens = len(resident("ahead_1", 0, "ci").logits)
    assert experts_of(packed("ahead_1", 0, "ci")[0]) == layers * shape_of(BUDGETS["ci"]).experts
    for arm in ("on_demand", "pre_gated"):
        found = ran(arm, 0, "ci", "10")
        assert found.reads <= layers * tokens
        assert (found.wasted, found.peak) == (0, 2)
    assert ran("prefetch_all", 0, "ci", "10").reads > found.reads
    assert set(SYSTEM) < {arm.name for arm in STUDY.arms}


def test_forecasts_by_id() -> None:
    assert reads_ahead(None) is None
    found = reads_ahead("serve.next_gate", factor=2.0)
    assert found is not None
    assert found.name == "serve.next_gate"
