"""Methods against replayed top-k: what is found by itself, and that both arms do the same work in every round."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config
from moestro.core.cost import cost_inside
from moestro.core.errors import ConfigError
from moestro.core.layer import mixture_layers
from moestro.core.registry import Method, MethodInfo, infos
from moestro.models.sites import sites
from moestro.testing.bench import methods
from moestro.testing.bench.methods import Case, Replayed, Shape, Step, find, peer_of


TINY = Shape(layers=2, hidden=16, experts=6, inner=8, top_k=2, heads=2, vocabulary=40, rows=2, length=12)
CARD = MethodCard(title="t", year=2024, summary="s", taxonomy="gating/sparse")


class Settings(Config):
    width: int = Field(ge=1, examples=[5])


def known(monkeypatch: pytest.MonkeyPatch, name: str, build: Any, settings: type[Config] = Settings) -> str:
    """A method that is not in the tree."""
    module: Any = SimpleNamespace(Config=settings, CARD=CARD, build=build)
    real = methods.method
    for place in ("moestro.testing.bench.methods.method", "moestro.models.swap.method_by_id"):
        monkeypatch.setattr(place, lambda key: Method(key, module) if key == name else real(key))
    return name


def both(method_id: str, shape: Shape = TINY) -> tuple[Case, Step, Step]:
    case = find(method_id, shape)
    assert case is not None
    ours = Step(case.model(shape), shape)
    seen, rows = ours.look()
    peer = peer_of(case, ours.model, seen, rows, shape)
    return case, ours, Step(peer.model(shape), shape, (Replayed(peer.assignments),))


@pytest.mark.parametrize(
    "method_id", ["train.softmax_topk", "train.expert_choice", "train.random_router", "train.deepseekmoe"]
)
def test_the_peer_makes_the_same_assignments_on_equal_experts(method_id: str) -> None:
    _, ours, theirs = both(method_id)
    for _ in range(2):  # a step leaves weights and draws as they were
        mine, other = ours.look()[0].assignments, theirs.look()[0].assignments
        assert mine.keys() == other.keys() == set(mixture_layers(ours.model))
        for site, pairs in mine.items():
            assert all((one == two).all() for one, two in zip(pairs, other[site], strict=True))
            one, two = (mixture_layers(step.model)[site].bank for step in (ours, theirs))
            assert (one.num_experts, one.flops_per_row(0)) == (two.num_experts, two.flops_per_row(0))
        ours()
        theirs()


def test_replayed_weights_sum_to_one_and_carry_gradient() -> None:
    _, _, theirs = both("train.expert_choice")
    theirs.loss().backward()
    for layer in mixture_layers(theirs.model).values():
        assert layer.router.weight.grad.abs().sum() > 0
    seen: list[Tensor] = []
    recorder = SimpleNamespace(record=lambda site, routing, ctx: seen.append(routing))
    with methods.session(recorder=recorder):
        theirs.loss()
    for routing in seen:
        total_T = torch.zeros(TINY.tokens).index_add(0, routing.token_N, routing.weight_N.detach())
        torch.testing.assert_close(total_T, (torch.bincount(routing.token_N, minlength=TINY.tokens) > 0).float())


def test_sizes_are_the_benchmarks_where_the_method_takes_them() -> None:
    assert find("train.softmax_topk", TINY).config == {"num_experts": 6, "top_k": 2}
    assert find("train.hash_router", TINY).config == {"num_experts": 6, "top_k": 2}
    assert find("train.deepseekmoe", TINY).config == {"num_experts": 6, "top_k": 2, "expert_size": 8}
    assert find("train.z_loss", TINY) is None
    # 4 segments do not divide 6: the example of the settings stands in
    odd = find("train.deepseekmoe", replace(TINY, inner=6))
    assert odd.config == {"num_experts": 6, "top_k": 2, "expert_size": 32}


def test_every_builder_of_the_stage_is_measured(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    new = MethodInfo("train.new", CARD, ("build",))
    monkeypatch.setattr(methods, "infos", lambda: {**infos(), "train.new": new})
    asked: list[str] = []

    def compare(method_id: str, shape: Shape, rounds: int) -> list[Any]:
        asked.append(method_id)
        if method_id == "train.new":
            raise ConfigError("train.new: cannot stand in the benchmark")
        return [method_id]

    monkeypatch.setattr(methods, "compare", compare)
    monkeypatch.setattr(methods, "measure", lambda part, shape, rounds: [(part.id, part.note)])
    monkeypatch.setattr(methods, "measure_layers", lambda part, shape, rounds: [(part.id, part.note)])
    assert methods.run(1) == [*asked[:-1], *((part.id, part.note) for part in methods.further(Shape()))]
    assert set(asked) == {i for i, m in infos().items() if m.stage == "train" and "build" in m.entries} | {"train.new"}
    assert "left out: train.new" in caplog.text


@pytest.mark.parametrize(("stage", "least", "most"), [("soft", 1.05, 4.0), ("hard", 1.0, 1.0)])
def test_sparse_phases_of_a_gate_meet_as_many_replayed(
    stage: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "memory", lambda part, shape: 1e6)
    (case,) = (case for case in methods.further(TINY) if isinstance(case, Case) and case.config["stage"] == stage)
    rows = methods.measure(case, TINY, 1)
    assert rows[0].peer_name == methods.REPLAYED
    found = re.fullmatch(
        r"train\.evomoe in stage .*: 6 experts, (.*) a token, (.*) MFLOP .* against (.*)", rows[0].case
    )
    assert found is not None
    assert least <= float(found[1]) <= most
    assert found[2] == found[3]


def test_layers_of_pairs_meet_dense_ones_of_their_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "memory", lambda part, shape: 1e6)
    cases = [part for part in methods.further(TINY) if not isinstance(part, Case)]
    assert [method_of.config["axis"] ** 2 for method_of in cases] == [262_144, 262_144]
    for layers in cases:
        assert layers.twin().flops() == pytest.approx(layers.flops(), rel=1e-3)
        small = {"axis": 8, "heads": 2, "expert_size": 4, "top_k": 2, "group_size": 2}
        layers = replace(layers, config={**layers.config, **small}, count=3, hidden=16, rows=2, length=5)
        chain = layers.chain()
        assert len(chain.shared) == 2
        rows = methods.measure_layers(layers, TINY, 1)
        assert {(row.peer_name, row.case) for row in rows} == {("dense of equal operations", layers.words())}
        assert rows[0].metric == "forward+backward"


def test_a_pass_trains_routers_too_and_leaves_no_gradients() -> None:
    layers = replace(methods.cases()[0], config={"axis": 8, "heads": 2, "expert_size": 4, "top_k": 2}, hidden=16)
    step = layers.step()
    step.loss().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in step.chain.parameters())
    step()
    assert all(parameter.grad is None for parameter in step.chain.parameters())


class Unrouted(nn.Module):
    """A feed-forward of another kind, which answers for its own operations."""

    def __init__(self, site: Any, config: Settings) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(site.dim, config.width), nn.Linear(config.width, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) + self.down(self.up(x))

    def flops_per_token(self, work: Any) -> float:
        return 2 * cost_inside(self, work)


def test_a_layer_without_assignments_meets_top_k_of_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    name = known(monkeypatch, "train.unrouted", lambda site, config, shared: Unrouted(site, config))
    wide = replace(TINY, hidden=96)
    _, _, theirs = both(name, wide)
    mine = 2 * 2 * 2 * 96 * 5
    layers = mixture_layers(theirs.model)
    assert [layer.bank.flops_per_row(0) * 2 for layer in layers.values()] == pytest.approx([mine] * 2, rel=0.25)
    monkeypatch.setattr(methods, "memory", lambda part, shape: 1e6)
    rows = methods.compare(name, wide, 1)
    assert rows[0].case.startswith("train.unrouted: no assignments, ")
    assert rows[0].ratio == pytest.approx(rows[0].peer / rows[0].ours)
    assert rows[0].peer_name == methods.EQUAL


def test_a_method_of_many_times_the_operations_gets_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(Settings):
        expert_size: int = 3

    def build(site: Any, config: Wide, shared: Any) -> nn.Module:
        return Unrouted(site, Settings(width=200 * config.expert_size))

    shape = replace(TINY, rows=32)
    case = find(known(monkeypatch, "train.wide", build, Wide), shape)
    assert case.config == {"width": 5}  # 3 as the method has it is nearer to top-k than the benchmark's 8
    times = [methods.flops_of(part.model(TINY), TINY) for part in (case, methods.Peer(TINY.mixture))]
    assert case.rows_of_batch == int(32 * 4 * times[1] / times[0])
    assert 1 < case.rows_of_batch < 32


class Halved(nn.Module):
    """An attention whose output is halved."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, *rest = self.inner(*args, **kwargs)
        return (y / 2, *rest)


def test_what_stands_elsewhere_meets_the_model_it_is_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(site: Any, config: Settings, shared: Any) -> nn.Module:
        if site.kind != "attention":
            raise ConfigError(f"{site.path}: only an attention can be halved")
        return Halved(site.module)

    name = known(monkeypatch, "train.halved", build)
    case, ours, theirs = both(name)
    assert case.kind == "attention"
    assert isinstance(sites(ours.model, "attention")[0].module, Halved)
    assert [layer.bank.num_experts for layer in mixture_layers(theirs.model).values()] == [6, 6]
    monkeypatch.setattr(methods, "memory", lambda part, shape: 1e6)
    rows = methods.compare(name, TINY, 1)
    assert rows[0].case.startswith("train.halved at the attention: 6 experts, 2.00 a token")
    assert rows[0].peer_name == methods.ALONE


def test_a_method_that_fits_nowhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(site: Any, config: Settings, shared: Any) -> nn.Module:
        raise ConfigError(f"no {site.kind} for me")

    with pytest.raises(ConfigError, match=r"nowhere: cannot stand in the benchmark: no stack for me"):
        find(known(monkeypatch, "train.nowhere", build), TINY)


@pytest.mark.slow  # a process that imports Transformers' models
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_whole_step() -> None:
    shape = replace(TINY, hidden=128, experts=16, inner=128)
    case = find("train.softmax_topk", shape)
    assert case is not None
    held = 16 * sum(p.numel() for p in case.model(shape).parameters())  # weights, gradients and two moments in float32
    found = methods.memory(case, shape)
    assert held < found < held + 20e6
