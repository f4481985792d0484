"""The checks themselves: a correct router passes all of them, each kind of broken router fails the one meant for it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config
from moestro.core.losses import RoutingLoss
from moestro.core.registry import Method
from moestro.core.router import LinearRouter, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.methods.train._contract import KEEPS
from moestro.testing import module_contract


class Settings(Config):
    top_k: int = 2


class Good(LinearRouter):
    """Softmax top-2 of four experts; the broken ones below change one thing each."""

    def __init__(self) -> None:
        super().__init__(16, 4, top_k=2)

    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        logits_TC = self.logits(x_TD)
        probability_TC = logits_TC.softmax(-1)
        return Scores(logits_TC, probability_TC, probability_TC)

    def choose(self, scores: Scores, ctx: Any) -> Routing:
        expert_TK = topk_indices(scores.select_TC, 2)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=4, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        return gate_TK / gate_TK.sum(-1, keepdim=True)


class SameTwice(Good):
    def choose(self, scores: Scores, ctx: Any) -> Routing:
        expert_TK = topk_indices(scores.select_TC, 1).repeat(1, 2)
        return Routing.from_topk(expert_TK, torch.ones(expert_TK.shape), num_experts=4, scores=scores)


class NotFinite(Good):
    def weigh(self, gate_TK: Tensor) -> Tensor:
        return gate_TK / (gate_TK - gate_TK)


class NoGradient(Good):
    def weigh(self, gate_TK: Tensor) -> Tensor:
        return super().weigh(gate_TK.detach())


class Unseeded(Good):
    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        scores = super().score(x_TD, bank, ctx)
        return scores.replace(select_TC=torch.rand(scores.select_TC.shape))


class SeesPadding(Good):
    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        scores = super().score(x_TD, bank, ctx)
        return scores.replace(gate_TC=scores.gate_TC + 0.01 * ctx.tokens.width * torch.arange(4))


class SeesTheBatch(Good):
    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        scores = super().score(x_TD, bank, ctx)
        return scores.replace(gate_TC=scores.gate_TC + 0.1 * ctx.tokens.num_rows * torch.arange(4))


class LooksAhead(Good):
    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        last_T = ctx.tokens.row_T * ctx.tokens.width + ctx.tokens.width - 1
        return super().score(x_TD + x_TD[last_T], bank, ctx)


class HiddenState(Good):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(4), persistent=False)

    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        scores = super().score(x_TD, bank, ctx)
        return scores.replace(gate_TC=(scores.logits_TC + self.offset).softmax(-1))


class LowPrecision(Good):
    def logits(self, x_TD: Tensor) -> Tensor:
        return nn.functional.linear(x_TD, self.weight)


class CountsForwards(Good):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        if self.training:
            self.seen += 1
        return super().score(x_TD * (1 + self.seen), bank, ctx)


class StepsWeights(Good):
    def after_step(self, load_C: Tensor) -> None:
        with torch.no_grad():
            self.weight += 1


class HiddenProduct(Good):
    def score(self, x_TD: Tensor, bank: Any, ctx: Any) -> Scores:
        return super().score(x_TD @ torch.eye(x_TD.shape[1]), bank, ctx)


class MeanLoss(RoutingLoss):
    unit = "token"

    def forward(self, site: str, routing: Routing, ctx: Any) -> Tensor:
        assert routing.scores is not None
        return routing.scores.logits_TC[ctx.tokens.valid_T].logsumexp(-1).square().mean()


class PaddedLoss(RoutingLoss):
    unit = "token"

    def forward(self, site: str, routing: Routing, ctx: Any) -> Tensor:
        assert routing.scores is not None
        return routing.scores.logits_TC.logsumexp(-1).square().sum()


def as_method(make: Callable[[], nn.Module], **card: Any) -> Method:
    facts: dict[str, Any] = {"title": "t", "year": 2024, "summary": "s", "taxonomy": "gating/sparse"}
    module: Any = SimpleNamespace(
        Config=Settings, CARD=MethodCard(**(facts | card)), build=lambda site, config, shared: make()
    )
    return Method("train.fake", module)


@pytest.mark.parametrize("name", KEEPS["build"])
def test_a_correct_router_keeps_every_invariant(name: str) -> None:
    getattr(module_contract, name)(as_method(Good))


BROKEN: list[tuple[type[nn.Module], str, str]] = [
    (SameTwice, "tokens_conserved", "has a choice twice"),
    (HiddenProduct, "costs_are_counted", "define flops_per_token"),
    (NotFinite, "finite", "not finite"),
    (NoGradient, "gradients_arrive", "weight got no gradient"),
    (Unseeded, "repeatable", "declare stochastic=True"),
    (SeesPadding, "padding_is_nothing", "padding"),
    (SeesTheBatch, "rows_are_apart", "alone and in a batch"),
    (LooksAhead, "no_look_ahead", "after the last tokens changed"),
    (HiddenState, "state_is_complete", "does not hold everything"),
    (LowPrecision, "logits_are_float32", "bfloat16"),
    (CountsForwards, "replay_is_exact", "a replay changes a gradient"),
    (StepsWeights, "after_step_moves_buffers", "moved the trainable parameter weight"),
    (MeanLoss, "sums_over_units", "together and one by one"),
    (PaddedLoss, "padding_is_nothing", "loss loss beside right padding"),
]


@pytest.mark.parametrize(("make", "name", "words"), BROKEN, ids=[make.__name__ for make, _, _ in BROKEN])
def test_each_fault_is_found(make: type[nn.Module], name: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        getattr(module_contract, name)(as_method(make))


def test_every_invariant_has_a_fault_that_it_finds() -> None:
    assert {name for _, name, _ in BROKEN} == set(KEEPS["build"]) - {"settings_round_trip"}


def test_settings_that_take_anything_are_found() -> None:
    class Loose(Config):
        model_config = Config.model_config | {"extra": "ignore"}

    fake = as_method(Good)
    fake.module.Config = Loose  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="unknown setting was accepted"):
        module_contract.settings_round_trip(fake)


def test_a_card_that_hides_a_leak_is_found() -> None:
    with pytest.raises(AssertionError, match="card says causal=False, the routing says True"):
        module_contract.no_look_ahead(as_method(Good, causal=False))


def test_a_hard_router_gets_no_gradient_and_has_an_objective() -> None:
    class Hard(NoGradient):
        hard = True

    class Lies(Good):
        hard = True

    with pytest.raises(AssertionError, match="give it an objective"):
        module_contract.gradients_arrive(as_method(Hard))
    for router, lies in ((Hard, False), (Lies, True)):
        subject = as_method(router)
        subject.module.objective = lambda: None  # type: ignore[attr-defined]
        if lies:
            with pytest.raises(AssertionError, match=r"says hard=True, and \['weight'\] got a gradient"):
                module_contract.gradients_arrive(subject)
        else:
            module_contract.gradients_arrive(subject)
