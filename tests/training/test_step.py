"""One optimiser step: totals over units, independent of how the step is cut."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moestro.core.context import LossTerm
from moestro.core.errors import ConfigError, TrainError
from moestro.core.layer import mixture_layers
from moestro.core.session import session
from moestro.testing.training import TinyMixture, packed
from moestro.training.objectives import Batch, Causal
from moestro.training.step import Stepper


LOSSES = {"train.balance_loss": {"scope": "sequence"}, "train.z_loss": {}}
WEIGHTS = {"balance": 0.3, "z": 0.2}


def batches(parts: int, rows: int = 8) -> list[Batch]:
    data = packed().sources["data"]
    size = rows // parts
    rng = np.random.default_rng(0)
    return [Causal().collate([data[i] for i in range(at, at + size)], [rng] * size) for at in range(0, rows, size)]


def gradients(model: TinyMixture, parts: int, weights: dict[str, float]) -> tuple[dict[str, torch.Tensor], Any]:
    """Gradients of one step with learning rate 0, read before the optimiser clears them."""
    found: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    stepper = Stepper(model, Causal(), Keep(model.parameters(), lr=0.0), clip=0.0)
    model.train()
    report = stepper.run(0, batches(parts), weights=weights)
    return found, report


def test_gradient_is_the_documented_formula() -> None:
    """Against autograd on the formula written out by hand, without contexts or the loop."""
    model = TinyMixture(losses=LOSSES)
    found, report = gradients(model, 4, WEIGHTS)

    batch = batches(1)[0]
    ids, labels = batch["input_ids"], batch["labels"]
    twin = TinyMixture(losses={})
    hidden = twin.embed(ids)
    layer = mixture_layers(twin)["blocks.0"]
    logits_TC = F.linear(hidden.reshape(-1, 8), layer.router.weight)
    top = logits_TC.topk(2).indices
    picked = F.one_hot(top, 4).sum(1).float().view(8, 6, 4).mean(1) / 2
    probability = logits_TC.softmax(-1).view(8, 6, 4).mean(1)
    balance = (4 * (picked * probability).sum(-1)).mean()
    z = logits_TC.logsumexp(-1).square().mean()
    out = twin(ids)
    causal = F.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    total = causal + 0.3 * balance + 0.2 * z
    wanted = dict(zip(dict(twin.named_parameters()), torch.autograd.grad(total, list(twin.parameters())), strict=True))

    assert report.loss == pytest.approx(total.item(), rel=1e-6)
    assert report.terms["balance"] == pytest.approx(balance.item(), rel=1e-6)
    assert report.targets == int((labels[:, 1:] != -100).sum())
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["sequence", "global"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_changes_nothing(scope: str, parts: int) -> None:
    losses = {"train.balance_loss": {"scope": scope}, "train.z_loss": {}}
    whole, one = gradients(TinyMixture(losses=losses, layers=2), 1, WEIGHTS)
    cut, many = gradients(TinyMixture(losses=losses, layers=2), parts, WEIGHTS)
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-8)
    assert {k: v.tolist() for k, v in one.load.items()} == {k: v.tolist() for k, v in many.load.items()}


def test_batch_scope_depends_on_the_cut_and_is_a_mean_over_forwards() -> None:
    losses = {"train.balance_loss": {"scope": "batch"}}
    model = TinyMixture(losses=losses)
    _, cut = gradients(model, 4, {"balance": 1.0})
    alone = [gradients(model, 1, {"balance": 1.0})[1].terms["balance"]]
    parts = []
    for batch in batches(4):
        stepper = Stepper(model, Causal(), torch.optim.SGD(model.parameters(), lr=0.0))
        parts.append(stepper.run(0, [batch], weights={"balance": 1.0}).terms["balance"])
    assert cut.terms["balance"] == pytest.approx(sum(parts) / 4, rel=1e-6)
    assert cut.terms["balance"] != pytest.approx(alone[0], rel=1e-4)


def test_global_count_leaves_random_numbers_and_buffers_alone() -> None:
    """The counting pass draws the same noise as the real one and moves no generator."""
    losses = {"train.balance_loss": {"scope": "global"}}

    def run(scope_losses: dict[str, dict[str, Any]], weights: dict[str, float]) -> tuple[torch.Tensor, Any]:
        model = TinyMixture(router="train.noisy_topk", losses=scope_losses)
        torch.manual_seed(5)
        _, report = gradients(model, 4, weights)
        return torch.rand(3), report

    after, counted = run(losses, {"balance": 0.0})
    plain, uncounted = run({}, {})
    torch.testing.assert_close(after, plain, rtol=0, atol=0)
    assert counted.load["blocks.0"].tolist() == uncounted.load["blocks.0"].tolist()


def test_counts_are_exact() -> None:
    model = TinyMixture(losses={})
    _, report = gradients(model, 2, {})
    layer = mixture_layers(model)["blocks.0"]
    ids = batches(1)[0]["input_ids"]
    top = F.linear(model.embed(ids).reshape(-1, 8), layer.router.weight).topk(2).indices
    assert report.load["blocks.0"].tolist() == torch.bincount(top.flatten(), minlength=4).tolist()
    assert report.tokens == ids.numel()


def test_bias_update_gets_the_whole_steps_counts_once() -> None:
    model = TinyMixture(router="train.sigmoid_bias")
    seen: list[list[int]] = []
    layer = mixture_layers(model)["blocks.0"]
    layer.router.after_step = lambda load: seen.append(load.tolist())  # type: ignore[method-assign]
    _, report = gradients(model, 4, {})
    assert seen == [report.load["blocks.0"].tolist()]
    assert sum(seen[0]) == 8 * 6 * 2


def test_a_frozen_router_gets_no_bias_update() -> None:
    model = TinyMixture(router="train.sigmoid_bias")
    before = mixture_layers(model)["blocks.0"].router.selection_bias.clone()
    stepper = Stepper(model, Causal(), torch.optim.SGD(model.parameters(), lr=0.0))
    stepper.run(0, batches(1), weights={}, still=frozenset({"blocks.0"}))
    torch.testing.assert_close(mixture_layers(model)["blocks.0"].router.selection_bias, before, rtol=0, atol=0)
    stepper.run(0, batches(1), weights={})
    assert not torch.equal(mixture_layers(model)["blocks.0"].router.selection_bias, before)


def test_a_loss_without_weight_and_a_weight_without_loss_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"'z'.*no weight"):
        gradients(TinyMixture(losses=LOSSES), 1, {"balance": 0.1})
    with pytest.raises(ConfigError, match=r"'balanc'.*balance, causal"):
        gradients(TinyMixture(losses={"train.balance_loss": {}}), 1, {"balance": 0.1, "balanc": 0.1})


def test_a_teachers_mixture_is_neither_counted_nor_penalised() -> None:
    teacher = TinyMixture(losses=LOSSES, seed=3).eval()

    class Distil(Causal):
        def __call__(self, model: Any, batch: Batch, teachers: Any) -> dict[str, LossTerm]:
            teachers["big"](batch["input_ids"])
            return super().__call__(model, batch, teachers)

    plain = TinyMixture(losses=LOSSES)
    _, wanted = gradients(plain, 2, WEIGHTS)
    model = TinyMixture(losses=LOSSES)
    stepper = Stepper(model, Distil(), torch.optim.SGD(model.parameters(), lr=0.0), {"big": teacher})
    report = stepper.run(0, batches(2), weights=WEIGHTS)
    assert report.loss == wanted.loss
    assert report.load["blocks.0"].tolist() == wanted.load["blocks.0"].tolist()


def test_tokens_the_objective_cannot_count_are_refused_when_cut() -> None:
    class Blind(Causal):
        def tokens(self, batch: Batch, *, decoder: bool) -> int | None:
            return None

    model = TinyMixture(losses={"train.z_loss": {}})
    stepper = Stepper(model, Blind(), torch.optim.SGD(model.parameters(), lr=0.0))
    whole = stepper.run(0, batches(1), weights={"z": 1.0})
    assert whole.terms["z"] > 0
    with pytest.raises(TrainError, match="accumulation 1"):
        stepper.run(0, batches(2), weights={"z": 1.0})


def test_a_step_without_target_is_refused() -> None:
    batch = {**batches(1)[0], "labels": torch.full((8, 6), -100)}
    model = TinyMixture()
    with pytest.raises(TrainError, match="no target"):
        Stepper(model, Causal(), torch.optim.SGD(model.parameters(), lr=0.0)).run(0, [batch], weights={})


def test_values_reach_the_forward_and_the_bias_update() -> None:
    model = TinyMixture(router="train.sigmoid_bias")
    stepper = Stepper(model, Causal(), torch.optim.SGD(model.parameters(), lr=0.0))
    before = mixture_layers(model)["blocks.0"].router.selection_bias.clone()
    stepper.run(0, batches(1), weights={}, values={"bias_speed": 0.0})
    torch.testing.assert_close(mixture_layers(model)["blocks.0"].router.selection_bias, before, rtol=0, atol=0)


def test_evaluation_tokens_do_not_count() -> None:
    from moestro.training.monitor import LoadCounter

    counter = LoadCounter()
    model = TinyMixture()
    with session(recorder=counter):
        model.eval()(batches(1)[0]["input_ids"])
        assert counter.load == {}
        model.train()(batches(1)[0]["input_ids"])
    assert int(counter.load["blocks.0"].sum()) == 8 * 6 * 2
