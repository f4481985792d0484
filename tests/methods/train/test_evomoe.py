"""The dense-to-sparse gate: dense, soft and hard stages, its temperature, and a schedule that survives a cut."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro import surgery
from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, session
from moestro.methods.planning import make_plan
from moestro.methods.train._parts.noise import gumbel_like
from moestro.methods.train.evomoe import Config, active_experts, temperature
from moestro.testing.tiny import tiny_model
from moestro.training.build import open_model
from moestro.training.checkpoint import latest_checkpoint
from moestro.training.log import read_metrics
from moestro.training.phases import moment_at
from moestro.training.recipe import Recipe
from moestro.training.run import train
from tests.methods.train.helpers import DIM, build, context, layer
from tests.surgery.helpers import ids, logits


TAUS = (2.0, 1.0, 0.5, 0.3, 0.2, 0.1)


def router(logit_std: float = 1.0, **config: Any) -> Any:
    """A router in training mode whose logits of normal inputs are normal with about that deviation."""
    made = build("train.evomoe", **{"stage": "soft", "progress": 0.0, **config}).train()
    with torch.no_grad():
        made.weight.normal_(std=logit_std / DIM**0.5)
    return made


def routed(made: Any, x_TD: Tensor, **values: float) -> Routing:
    """What a router decides under a phase's values; without a bank, whose weights would draw before the noise."""
    torch.manual_seed(7)
    with session(values=values) as opened:
        ctx = context(1, len(x_TD), session=opened)
        return made.choose(made.score(x_TD, None, ctx), ctx)


def noisy(logits_TC: Tensor, tau: float) -> Tensor:
    """g with the noise that ``routed`` drew, from the formula."""
    torch.manual_seed(7)
    exponential_TC = torch.empty_like(logits_TC).exponential_()
    return torch.softmax((logits_TC - exponential_TC.log()) / tau, -1)


# -- the temperature --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "half"), [("linear", 1.1), ("exponential", 0.4**0.5)])
def test_the_temperature_falls_from_tau_max_to_tau_min_and_stays(decay: Any, half: float) -> None:
    config = Config(stage="soft", progress=0, tau_max=2.0, tau_min=0.2, decay=decay)
    assert temperature(0.0, config) == 2.0
    assert temperature(0.5, config) == pytest.approx(half)
    assert temperature(1.0, config) == pytest.approx(0.2)
    assert temperature(3.0, config) == temperature(1.0, config) >= 0.2
    curve = [temperature(step / 40, config) for step in range(41)]
    assert all(later < earlier for earlier, later in itertools.pairwise(curve))


def phases_recipe(**changes: Any) -> Recipe:
    """A dense phase, five steps of decay, then top-1: what ``recipes/evomoe.yaml`` does, in twelve steps."""
    gate = {"method": "train.evomoe", "config": {"stage": "hard", "progress": 1.0}}
    losses = {"balance": {"method": "train.dts_balance_loss"}}
    spawn = {"num_experts": 4, "layers": "last:1", "rate": 0.2, "router": gate, "losses": losses}
    return Recipe.parse(
        {
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "max_position_embeddings": 32,
                }
            },
            "data": {"source": "builtin:german", "tokenizer": "bpe:300", "sequence_length": 16},
            "optimizer": {"lr": 0.01},
            "precision": "float32",
            "steps": 12,
            "batch_size": 4,
            "monitor": {"every": 1},
            "phases": [
                {"name": "diversify", "steps": 3},
                {
                    "name": "sparsify",
                    "steps": 6,
                    "on_enter": {"method": "convert.diversify", "config": spawn},
                    "losses": {"balance": 0.01},
                    "values": {"dts_stage": 1, "dts_progress": {"start": 0, "end": 1}},
                },
                {"name": "sparse", "losses": {"balance": 0.01}, "values": {"dts_stage": 2, "dts_progress": 1}},
            ],
            **changes,
        }
    )


def test_the_phases_of_a_run_carry_the_schedule() -> None:
    """D = 5 steps of decay take a phase of 6: progress t / D, so tau_max at its first step and tau_min at its last."""
    recipe, config = phases_recipe(), Config(stage="hard", progress=1)
    values = [moment_at(recipe, step).values for step in range(3, 12)]
    taus = [temperature(value["dts_progress"], config) for value in values]
    assert taus[:6] == pytest.approx([2.0 - t * (2.0 - 0.2) / 5 for t in range(6)])
    assert taus[6:] == [temperature(1.0, config)] * 3
    assert [value["dts_stage"] for value in values] == [1] * 6 + [2] * 3


# -- noise and the active set -----------------------------------------------------------------------------------


def test_the_noise_is_gumbel_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    draws = gumbel_like(torch.empty(400_000))
    assert bool(draws.isfinite().all())
    for at in (-1.0, 0.0, 1.0, 3.0):  # P(G <= g) = exp(-exp(-g))
        wanted = torch.exp(-torch.exp(torch.tensor(-at)))
        assert (draws <= at).double().mean().item() == pytest.approx(wanted.item(), abs=0.003)
    with torch.random.fork_rng():
        assert not torch.equal(gumbel_like(draws), gumbel_like(draws))
    monkeypatch.setattr(Tensor, "exponential_", Tensor.zero_)  # the rare draw of 0, whose logarithm is -inf
    assert bool(gumbel_like(draws).isfinite().all())


@pytest.mark.parametrize(
    ("std", "wanted"), [(0.0, (8.0, 7.9, 6.4, 4.1, 2.8, 1.8)), (2.0, (8.0, 7.0, 4.1, 2.6, 2.0, 1.5))]
)
def test_how_many_of_eight_experts_are_active_at_a_temperature(std: float, wanted: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    logits_TC = std * torch.randn(20_000, 8)
    for tau, count in zip(TAUS, wanted, strict=True):
        gate_TC = ((logits_TC + gumbel_like(logits_TC)) / tau).softmax(-1)
        assert active_experts(gate_TC, 1e-3).double().sum(-1).mean().item() == pytest.approx(count, abs=0.1)


def test_the_active_set_by_hand_and_never_empty() -> None:
    gate_TC = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.34, 0.33, 0.33]])
    assert active_experts(gate_TC, 0.3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert active_experts(gate_TC, 0.5).tolist() == [[True, False, False]] * 3  # the best stays; ties to the lower id
    torch.manual_seed(0)
    gates = (3 * torch.randn(500, 8)).softmax(-1)
    below = active_experts(gates, 1 / 8 - 1e-3)
    assert torch.equal(below, gates > 1 / 8 - 1e-3), "below 1/N the threshold alone leaves nobody empty"
    counts = [active_experts(gates, c).sum(-1) for c in (0.0, 1e-3, 0.05, 0.2, 0.9, 0.999)]
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(counts))
    assert bool((counts[-1] == 1).all())


def test_the_soft_stage_by_the_formula() -> None:
    made, x = router(num_experts=5, threshold=0.05), torch.randn(40, DIM)
    z = x @ made.weight.T
    routing = routed(made, x, dts_progress=0.8)
    g, p = noisy(z, 2.0 - 0.8 * 1.8), z.softmax(-1)
    active = (g > 0.05) | (g == g.max(1, keepdim=True).values)
    assert 40 < int(active.sum()) < 200
    assert routing.top_k is None
    assert torch.equal(torch.stack([routing.token_N, routing.expert_N]), active.nonzero().T)
    torch.testing.assert_close(routing.weight_N, p[active])  # neither noise nor temperature nor renormalised
    torch.testing.assert_close(routing.scores.logits_TC, z)
    made = router(num_experts=5, threshold=0.05, combine="gumbel")
    torch.testing.assert_close(routed(made, x, dts_progress=0.8).weight_N, noisy(x @ made.weight.T, 0.56)[active])


@pytest.mark.parametrize("combine", ["softmax", "gumbel"])
def test_the_hard_stage_has_one_expert_the_best_under_noise(combine: str) -> None:
    made, x = router(num_experts=5, combine=combine), torch.randn(60, DIM)
    z = x @ made.weight.T
    routing = routed(made, x, dts_stage=2, dts_progress=1)
    g = noisy(z, 0.2)
    assert torch.equal(routing.expert_TK, g.argmax(1, keepdim=True))
    assert not torch.equal(routing.expert_TK, z.argmax(1, keepdim=True)), "the noise must matter here"
    weight = z.softmax(-1) if combine == "softmax" else g
    torch.testing.assert_close(routing.weight_TK, weight.gather(1, routing.expert_TK))


def plain_mixture(bank: StackedFFN, x_TD: Tensor, weight_TC: Tensor) -> Tensor:
    """Sum of weight * expert, an expert at a time and without the layer."""
    total = torch.zeros_like(x_TD)
    for expert in range(bank.num_experts):
        gate, up, down = (bank.weight(expert, name) for name in ("gate", "up", "down"))
        y = (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
        total = total + weight_TC[:, expert : expert + 1] * y
    return total


def gradients(module: nn.Module, y: Tensor, wanted: Tensor) -> list[Tensor]:
    module.zero_grad()
    ((y - wanted) ** 2).sum().backward()
    found = [parameter.grad for parameter in module.parameters()]
    assert all(grad is not None and bool(grad.any()) for grad in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("stage", ["gumbel", "dense", "soft", "hard"])
def test_outputs_and_gradients_against_a_plain_loop(stage: str) -> None:
    """gumbel: threshold 0 and gumbel weights are the dense softmax mixture under the same noise."""
    wish = {"combine": "gumbel", "threshold": 0.0} if stage == "gumbel" else {"stage": stage, "threshold": 0.1}
    mixture = layer(router(num_experts=4, **wish)).train()
    nn.init.normal_(mixture.bank.gate_up_proj)
    nn.init.normal_(mixture.bank.down_proj)
    x, wanted = torch.randn(30, DIM), torch.randn(30, DIM)
    torch.manual_seed(7)
    y = mixture(x[None])[0]
    found = gradients(mixture, y, wanted)
    z = x @ mixture.router.weight.T
    g, p = noisy(z, 2.0), z.softmax(-1)
    best = nn.functional.one_hot(g.argmax(1), 4)
    weight = {"gumbel": g, "dense": p, "soft": p * ((g > 0.1) | best.bool()), "hard": p * best}[stage]
    loop = plain_mixture(mixture.bank, x, weight)
    torch.testing.assert_close(y, loop)
    for one, two in zip(found, gradients(mixture, loop, wanted), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_only_active_experts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = router(num_experts=4)
    mixture, x = layer(made).train(), torch.randn(1, 50, DIM)
    rows = []
    monkeypatch.setattr(mixture.bank, "forward", lambda x_TD, routing: rows.append(len(routing.token_N)) or x_TD)
    for progress in (0.0, 0.9, 1.0):
        with session(values={"dts_progress": progress}):
            mixture(x)
    with session(values={"dts_stage": 2}):
        mixture(x)
    assert 200 >= rows[0] > rows[1] > rows[2] > rows[3] == 50


# -- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["softmax", "gumbel"])
def test_evaluation_is_top_1_without_noise(combine: str) -> None:
    made, x = router(num_experts=5, combine=combine).eval(), torch.randn(30, DIM)
    z = x @ made.weight.T
    for values in ({}, {"dts_stage": 1, "dts_progress": 0.5}, {"dts_stage": 2, "dts_progress": 1.0}):
        torch.manual_seed(7)
        state = torch.get_rng_state()
        routing = routed(made, x, **values)
        assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
        assert torch.equal(routing.expert_TK[:, 0], z.argmax(1))
        tau = temperature(values.get("dts_progress", 0.0), made.config) if combine == "gumbel" else 1.0
        torch.testing.assert_close(routing.weight_TK[:, 0], (z / tau).softmax(-1).max(1).values)


def test_a_switch_for_all_opens_every_expert() -> None:
    made, x = router(num_experts=5).eval(), torch.randn(30, DIM)
    for found in (routed(made, x, dts_stage=0), routed(router(num_experts=5, stage="dense").eval(), x)):
        torch.testing.assert_close(found.weight_N.view(30, 5), (x @ made.weight.T).softmax(-1))


class Close(Edit):
    """Takes the first experts out of the choice."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_scores(self, site: str, scores: Scores, ctx: Any) -> Scores:
        select = scores.select_TC.clone()
        select[:, : self.count] = float("-inf")
        return scores.replace(select_TC=select)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_an_edit_closes_stays_closed(stage: int) -> None:
    mixture = layer(router(num_experts=4)).train()
    with session(edits=[Close(2)], values={"dts_stage": stage}) as opened:
        routing = mixture.route(torch.randn(20, DIM), context(1, 20, session=opened))
    assert set(routing.expert_N.tolist()) == {2, 3}
    with session(edits=[Close(4)], values={"dts_stage": stage}), pytest.raises(ContextError, match="among 0 experts"):
        mixture(torch.randn(1, 3, DIM))


# -- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"progress": 0.0}, "stage is missing"),
        ({"stage": "soft"}, "progress is missing"),
        ({"stage": "soft", "progress": 1.5}, "progress=1.5"),
        ({"stage": "warm", "progress": 0.0}, "stage='warm'"),
        ({"stage": "soft", "progress": 0.0, "tau_min": 0.0}, "tau_min=0.0"),
        ({"stage": "soft", "progress": 0.0, "tau_max": -1.0}, "tau_max=-1.0"),
        ({"stage": "soft", "progress": 0.0, "tau_max": float("inf")}, "tau_max=inf"),
        ({"stage": "soft", "progress": 0.0, "tau_min": 3.0}, "tau_min=3.0 is above tau_max=2.0"),
        ({"stage": "soft", "progress": 0.0, "threshold": 1.0}, "threshold=1.0"),
        ({"stage": "soft", "progress": 0.0, "threshold": -0.1}, "threshold=-0.1"),
        ({"stage": "soft", "progress": 0.0, "decay": "cosine"}, "decay='cosine'"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method("train.evomoe").configure(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dts_stage": 0.5}, "dts_stage=0.5; expected 0"),
        ({"dts_stage": 3}, "dts_stage=3"),
        ({"dts_progress": -0.1}, "dts_progress=-0.1"),
        ({"dts_progress": float("nan")}, "dts_progress=nan"),
    ],
)
def test_phase_values_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(ContextError, match=message):
        routed(router(), torch.randn(3, DIM), **values)


def test_a_hard_stage_cannot_come_before_the_copies_do() -> None:
    """The hard stage is a phase after the one that spawns; a run too short for its phases is refused."""
    with pytest.raises(ConfigError, match="phases need at least 10 steps but the run has 8"):
        phases_recipe(steps=8)


# -- in a model -------------------------------------------------------------------------------------------------


def evolved(**config: Any) -> Any:
    """A tiny Llama model with this gate over four masked copies in both layers, and routers that decide."""
    gate = {"method": "train.evomoe", "config": {"stage": "soft", "progress": 0.6, **config}}
    losses = {"balance": {"method": "train.dts_balance_loss"}}
    model = tiny_model("llama")
    surgery.apply(model, make_plan("convert.diversify", model, {"num_experts": 4, "router": gate, "losses": losses}))
    torch.manual_seed(3)
    for mixture in mixture_layers(model).values():
        nn.init.normal_(mixture.router.weight, std=1.0)
    return model


def test_it_saves_reopens_and_generates_alike(tmp_path: Path) -> None:
    model = evolved(tau_min=0.3)
    moestro.save(model, tmp_path / "model")
    again = moestro.load(str(tmp_path / "model"))
    assert mixture_layers(again)["model.layers.1.mlp"].router.config.tau_min == 0.3
    assert torch.equal(logits(again), logits(model))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    ask = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        said = model.generate(ids(), use_cache=True, **ask)
        assert torch.equal(model.generate(ids(), use_cache=False, **ask), said)
        assert torch.equal(again.generate(ids(), use_cache=True, **ask), said)
        padded = model(input_ids=ids(), attention_mask=mask).logits[0, 3:]
        torch.testing.assert_close(padded, model(input_ids=ids()[:1, 3:]).logits[0], atol=1e-5, rtol=0)


def training_step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training forward with the balance loss, always under the same noise."""
    torch.manual_seed(5)
    model.train()
    with session(collect=True) as opened:
        loss = model(input_ids=ids(), labels=ids()).loss
        loss = loss + sum(term.total for ctx in opened.take() for term in ctx.losses.values())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", ["soft", "hard"])
def test_a_checkpointed_backward_replays_the_noise(stage: str) -> None:
    model = evolved(stage=stage)
    again = copy.deepcopy(model)
    moestro.checkpoint(again)
    (loss, plain), (other, replayed) = training_step(model), training_step(again)
    assert torch.equal(loss, other)
    for name, grad in plain.items():
        assert torch.equal(grad, replayed[name]), name
    assert all(bool(grad.any()) for name, grad in plain.items() if ".router." in name)


def test_the_compiled_model_says_the_same() -> None:
    model = evolved()
    wanted = logits(model)
    compiled = torch.compile(model.model, backend="eager")
    with torch.no_grad():
        found = model.lm_head(compiled(input_ids=ids()).last_hidden_state)
    torch.testing.assert_close(found, wanted)


def test_two_models_of_a_process_have_schedules_of_their_own() -> None:
    x = torch.randn(1, 40, DIM)
    early, late = (layer(router(num_experts=4, progress=progress)).train() for progress in (0.0, 1.0))
    counts = {}
    for name, mixture in (("early", early), ("late", late), ("early again", early)):
        counts[name] = len(mixture.route(x[0], context(1, 40)).token_N)
    assert counts["early"] == counts["early again"] == 160 > counts["late"]


# -- cut and resumed --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncut")
    train(phases_recipe(), out, silent=True)
    return out


def test_a_run_goes_through_its_stages(uncut: Path) -> None:
    rows = [row for row in read_metrics(uncut) if "loss" in row]
    assert [row["phase"] for row in rows] == ["diversify"] * 3 + ["sparsify"] * 6 + ["sparse"] * 3
    assert all("router" not in row for row in rows[:3])
    active = [row["router"]["model.layers.1.mlp"]["assignments"] / (4 * 16) for row in rows[3:]]
    assert active[0] == 4
    assert 1 < active[5] < 2.5
    assert active[6:] == [1, 1, 1]
    (made,) = mixture_layers(open_model(uncut / "model")).values()
    assert isinstance(made, MoELayer)
    assert made.router.config.stage == "hard"


@pytest.mark.parametrize("cut", [2, 3, 4, 7, 9, 11])
def test_a_run_cut_in_any_phase_resumes_bit_for_bit(cut: int, uncut: Path, tmp_path: Path) -> None:
    """Cut in the dense phase, on its last step, in the middle of the decay, at the hard switch and after it."""
    recipe = phases_recipe(steps=12)
    stopping = recipe.model_copy(update={"steps": cut})  # same phases, ended early, as a signal would
    train(stopping, tmp_path, silent=True)
    torch.manual_seed(999)  # whatever a new process did before
    train(recipe, tmp_path, silent=True)
    wanted, found = (latest_checkpoint(out / "checkpoints")[0] for out in (uncut, tmp_path))
    assert wanted is not None
    assert found is not None
    assert wanted.step == found.step == 12
    assert (found.model / "model.safetensors").read_bytes() == (wanted.model / "model.safetensors").read_bytes()
    for part in ("optimizer", "rng"):
        one, two = wanted.tensors(part), found.tensors(part)
        assert one.keys() == two.keys()
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    before, after = ([row["loss"] for row in read_metrics(out) if "loss" in row] for out in (uncut, tmp_path))
    assert after[-(12 - cut) :] == before[cut:]
