"""Recipes: typed, checked before anything runs; schedules and phases as functions of the step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.testing.training import TinyMixture, recipe
from moestro.training.optimizer import follow, is_undecayed, make_optimizer, optimizer_tensors, set_lr
from moestro.training.phases import ever_trained, freeze, frozen_names, moment_at, phase_at
from moestro.training.recipe import OptimizerConfig, PhaseConfig, Recipe, load_recipe
from moestro.training.schedule import Ramp, ScheduleConfig


BASE: dict[str, Any] = {"model": {"load": "x"}, "data": {"source": "x"}, "steps": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, r"unknown key 'stpes'; did you mean 'steps'\?"),
        ({"optimizer": {"lrr": 1}}, r"optimizer: unknown key 'lrr'; did you mean 'lr'\?"),
        ({"data": {"sources": {"a": {"sourc": "x"}}}}, r"data: sources\.a: unknown key 'sourc'; did you mean 'source'"),
        ({"phases": [{"name": "a", "lr": {"start": 1, "end": 0, "curv": "cosine"}}]}, "did you mean 'curve'"),
        ({"optimizer": {"lr": -1}}, "lr=-1: Input should be greater than 0"),
        ({"optimizer": {"betas": [1.5, 0.9]}}, r"betas\.0=1\.5: Input should be less than 1"),
        ({"optimizer": {"betas": [0.9, -1]}}, r"betas\.1=-1: Input should be greater than or equal to 0"),
        ({"steps": None}, "give either steps or tokens"),
        ({"tokens": 5}, "give either steps or tokens"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size=6 is not a multiple of accumulation=4"),
        ({"model": {}}, "give either load: REFERENCE or config"),
        ({"model": {"config": {"hidden_size": 3}}}, "config needs model_type"),
        ({"model": {"load": "x", "plan": {"file": "a", "method": "b"}}}, r"either file: PLAN\.json or method"),
        ({"phases": [{"name": "a"}, {"name": "b"}]}, "phase 'a' needs steps"),
        ({"phases": [{"name": "a", "steps": 2}, {"name": "a"}]}, "two phases are called 'a'"),
        ({"phases": [{"name": "a", "steps": 11}]}, "need at least 11 steps but the run has 10"),
        ({"phases": [{"name": "a", "steps": 3}]}, "end after 3 of 10 steps"),
        ({"eval": {"data": {"source": "./x"}}}, r"eval source 'data' is training source 'data' \(\./x, split all\)"),
        ({"schedule": {"kind": "cosin"}}, "'constant', 'linear', 'cosine' or 'wsd'"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.parse({**BASE, **change}, where="r.yaml")
    assert str(caught.value).startswith("r.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_builtin_corpus_is_evaluated_on_its_heldout_part() -> None:
    text = {"source": "builtin:german"}
    found = Recipe.parse({**BASE, "data": text, "eval": {"data": {**text, "sequence_length": 8}}})
    assert found.data.sources["data"].part == "train"
    assert found.eval is not None
    assert found.eval.data.sources["data"].part == "heldout"
    assert found.eval.data.model_fields_set >= {"sequence_length"}
    assert Recipe.parse(found.model_dump(exclude={"eval": {"data": {"tokenizer"}}})) == found
    with pytest.raises(ConfigError, match=r"is training source 'data' \(builtin:german, split train\)"):
        Recipe.parse({**BASE, "data": text, "eval": {"data": {**text, "split": "train"}}})
    with pytest.raises(ConfigError, match="split heldout"):
        Recipe.parse({**BASE, "data": {**text, "split": "heldout"}, "eval": {"data": text}})


def test_reading_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {load: x}\ndata: {source: x}\nsteps: 3\nobjective: masked\n")
    assert load_recipe(path).objective.method == "masked"
    path.write_text("model: {load: x\n")
    with pytest.raises(ConfigError, match=r"r\.yaml, line 2: not YAML"):
        load_recipe(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="expected a mapping, got list"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file"):
        load_recipe(path)
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nsteps: 5\noptimizer: {lr: 0.1}\nsteps: 7\n")
    with pytest.raises(ConfigError, match=r"r\.yaml, line 4: not YAML \(key 'steps' twice\)"):
        load_recipe(path)
    path.write_text("optimizer: {lr: 0.1, lr: 0.2}\n")
    with pytest.raises(ConfigError, match="key 'lr' twice"):
        load_recipe(path)


def test_tokens_are_rounded_up_to_steps() -> None:
    found = Recipe.parse(
        {**BASE, "steps": None, "tokens": 1000, "batch_size": 4, "data": {"source": "x", "sequence_length": 64}}
    )
    assert found.total_steps == 4


def shipped() -> list[Path]:
    return sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_there_are_shipped_recipes() -> None:
    assert len(shipped()) >= 2


# -- schedules: against torch's own schedulers ------------------------------------------------------------------


def torch_factors(make: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_and_linear_are_torchs() -> None:
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

    cosine = ScheduleConfig(kind="cosine", floor=0.1)
    wanted = torch_factors(lambda o: CosineAnnealingLR(o, 20, eta_min=0.1), 20)
    assert [cosine.factor(step, 20) for step in range(20)] == pytest.approx(wanted)
    linear = ScheduleConfig(kind="linear")
    wanted = torch_factors(lambda o: LinearLR(o, 1.0, 1e-9, total_iters=20), 20)
    assert [linear.factor(step, 20) for step in range(20)] == pytest.approx(wanted, abs=1e-6)


def test_warmup_and_wsd_by_hand() -> None:
    wsd = ScheduleConfig(kind="wsd", warmup=4, decay=0.5, floor=0.2)
    found = [wsd.factor(step, 12) for step in range(12)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:7] == [1.0, 1.0, 1.0]
    assert found[7:] == pytest.approx([1 - 0.8 * i / 6 for i in range(1, 6)])
    assert ScheduleConfig(warmup=0.25).warmup_steps(12) == 3
    assert [ScheduleConfig(warmup=0.25).factor(step, 12) for step in (0, 2, 3, 11)] == [1 / 3, 1, 1, 1]


def test_ramps() -> None:
    assert [Ramp(start=4, end=1, curve="exponential").at(x) for x in (0, 0.5, 1)] == [4, 2, 1]
    assert [Ramp(start=0, end=2).at(x) for x in (-1, 0.25, 2)] == [0, 0.5, 2]
    assert Ramp(start=1, end=3, curve="cosine").at(0.25) == pytest.approx(3 - 2 * 0.5 * (1 + math.cos(math.pi / 4)))
    with pytest.raises(ConfigError, match="exponential ramp needs values > 0"):
        Ramp(start=1, end=0, curve="exponential")


# -- phases -----------------------------------------------------------------------------------------------------


def phased() -> Recipe:
    return recipe(
        steps=9,
        losses={"a": 1.0, "b": 2.0},
        phases=[
            {"name": "x", "steps": 3, "losses": {"a": {"start": 0, "end": 4}}, "values": {"t": 5}, "lr": 0.5},
            {"name": "y", "values": {"t": {"start": 1, "end": 0}}, "lr": {"start": 1, "end": 0}},
        ],
    )


def test_values_over_time() -> None:
    moments = [moment_at(phased(), step) for step in range(9)]
    assert [moment.phase for moment in moments] == ["x"] * 3 + ["y"] * 6
    assert [moment.weights["a"] for moment in moments] == [0, 2, 4, 1, 1, 1, 1, 1, 1]
    assert {moment.weights["b"] for moment in moments} == {2.0}
    assert [moment.values["t"] for moment in moments] == pytest.approx([5, 5, 5, 1, 0.8, 0.6, 0.4, 0.2, 0])
    assert [moment.lr for moment in moments] == pytest.approx([0.5] * 3 + [1, 0.8, 0.6, 0.4, 0.2, 0])
    assert moment_at(recipe(losses={"a": 1.0}), 2).weights == {"a": 1.0}
    assert phase_at(recipe(), 0) == (None, 0.0)


def test_freezing_by_pattern() -> None:
    model = TinyMixture(router="train.sigmoid_bias", layers=2)
    still = freeze(model, PhaseConfig(name="p", freeze=["blocks.0.router.*", "embed.*"]))
    assert still == {"blocks.0"}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embed.weight", "blocks.0.router.weight"}
    # Parameters alone are not the whole router: its bias buffer may still move.
    assert freeze(model, PhaseConfig(name="p", freeze=["blocks.0.router.weight"])) == frozenset()
    assert freeze(model, PhaseConfig(name="p", train=["*.bank.*"])) == {"blocks.0", "blocks.1"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"blocks.{i}.bank.{part}" for i in (0, 1) for part in ("gate_up_proj", "down_proj")
    }
    assert freeze(model, PhaseConfig(name="p")) == frozenset()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match=r"pattern 'nothing\.\*' matches no parameter"):
        freeze(model, PhaseConfig(name="p", freeze=["nothing.*"]))
    with pytest.raises(ConfigError, match=r"the nearest is called blocks\.1\.router\.weight"):
        freeze(model, PhaseConfig(name="p", freeze=["blocks.1.routr.*"]))
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(model, PhaseConfig(name="p", freeze=["*"]))


def test_what_is_ever_trained() -> None:
    names = ["a.w", "b.w", "c.w"]
    two = recipe(phases=[{"name": "1", "steps": 1, "train": ["a.*"]}, {"name": "2", "freeze": ["a.*", "c.*"]}])
    assert ever_trained(names, two) == {"a.w", "b.w"}
    assert ever_trained(names, recipe()) == set(names)
    assert frozen_names(names, None) == set()


# -- optimiser --------------------------------------------------------------------------------------------------


def test_groups_decay_and_learning_rates() -> None:
    model = TinyMixture()
    config = OptimizerConfig.parse(
        {
            "lr": 0.1,
            "weight_decay": 0.5,
            "groups": [{"match": ["*.router.*"], "lr": 0.3}, {"match": ["head.*"], "weight_decay": 0.0}],
        }
    )
    optimizer = make_optimizer(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "embed.weight": (0.1, 0.5),
        "blocks.0.router.weight": (0.3, 0.5),
        "blocks.0.bank.gate_up_proj": (0.1, 0.5),
        "blocks.0.bank.down_proj": (0.1, 0.5),
        "head.weight": (0.1, 0.0),
        "head.bias": (0.1, 0.0),
    }
    set_lr(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.05, 0.15}
    with pytest.raises(ConfigError, match="matches no parameter"):
        make_optimizer(model, OptimizerConfig.parse({"groups": [{"match": ["x.*"]}]}))
    assert is_undecayed("bank.down_proj_bias", torch.zeros(3, 4))
    assert not is_undecayed("bank.down_proj", torch.zeros(3, 4, 2))


def test_the_optimiser_follows_a_changed_model() -> None:
    model = TinyMixture()
    config = OptimizerConfig(lr=0.1)
    optimizer = make_optimizer(model, config)
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    kept = optimizer.state[model.embed.weight]["exp_avg"].clone()
    model.head = torch.nn.Linear(8, 5)
    follow(optimizer, model, config)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert torch.equal(optimizer.state[model.embed.weight]["exp_avg"], kept)
    assert not any(name.startswith("head.") for name in optimizer_tensors(optimizer, model))
    optimizer.zero_grad()
    before = model.head.weight.clone()
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)
