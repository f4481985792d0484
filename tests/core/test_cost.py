"""Operations by shape and routing against counted runs: what varies by token, what surrounds experts, what is lent."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.bank import Bank, HeterogeneousBank, StackedFFN
from moestro.core.context import RoutingContext, open_stack
from moestro.core.cost import RowCounter, Work, cost, cost_inside
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.remap import RemapRouter
from moestro.core.router import LinearRouter, exact_linear
from moestro.core.routing import Routing, Scores
from moestro.core.session import session
from moestro.core.site import Borrowed, Shared, Site
from moestro.methods.train._parts.dense import DenseFFN


DIM, INNER, LENGTH, BATCH = 12, 20, 16, 3


class TopP(LinearRouter):
    """As many experts as it takes to collect 0.7 of the probability; nulls are choices like others."""

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        logits_TC = self.logits(x_TD)
        return Scores(logits_TC, logits_TC.detach(), logits_TC.softmax(-1))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        sorted_TC, index_TC = scores.gate_TC.sort(-1, descending=True)
        chosen_TC = torch.zeros_like(scores.gate_TC, dtype=torch.bool)
        chosen_TC.scatter_(1, index_TC, sorted_TC.cumsum(-1) - sorted_TC < 0.7)
        counts = {"num_experts": self.num_experts, "num_null": self.num_null}
        return Routing.from_mask(chosen_TC, scores.gate_TC, scores=scores, **counts)


class Recurrent(TopP):
    """Logits from a state that a cell, shared by all layers, makes of a projection."""

    def __init__(self, shared: Shared, state: int) -> None:
        super().__init__(state, 4, top_k=None)
        self.project = nn.Linear(DIM, state, bias=False)
        self.cell = Borrowed(shared("cell", lambda: nn.GRUCell(state, state)))

    def logits(self, x_TD: Tensor) -> Tensor:
        state_TR = self.project(x_TD)
        return super().logits(self.cell(state_TR, state_TR))


class Mix(nn.Module):
    """Weighs the branches token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, DIM))

    def forward(self, routed_TO: Tensor, shared_TO: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
        share_T2 = exact_linear(x_TD, self.weight).softmax(-1)
        return share_T2[:, :1] * routed_TO + share_T2[:, 1:] * shared_TO


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module, shared: Shared | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, DIM)
        self.layers = nn.ModuleList(layers)
        self.shared = (shared or Shared()).modules
        open_stack(self, "stack")

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def bank(experts: int = 4, inner: int = INNER, dim: int = DIM, **more: bool) -> StackedFFN:
    return StackedFFN(experts, dim, inner, **more)


def by_method(method_id: str, **config: object) -> nn.Module:
    site = Site(path="mlp", kind="mlp", module=nn.Identity(), dim=DIM)
    use = method(method_id)
    return use.build(site, use.configure(config), Shared())


def top_p(nulls: int = 0) -> TopP:
    return TopP(DIM, 4, top_k=None, num_null=nulls)


def mixture(router: nn.Module, held: Bank | None = None, site: str = "mlp", **parts: object) -> MoELayer:
    return MoELayer(router, held or bank(), site=site, **parts)


def recurrent() -> Stack:
    shared = Shared()
    layers = [mixture(Recurrent(shared, 8), site=f"layers.{place}") for place in range(2)]
    return Stack(*layers, shared=shared)


def narrow() -> MoELayer:
    pre, post = nn.Linear(DIM, 6), nn.Linear(6, DIM)
    return mixture(top_p(), bank(dim=6), pre=pre, post=post, shared=DenseFFN(DIM, 10, bias=True), combine=Mix())


SUBJECTS: dict[str, Callable[[], Stack]] = {
    "top-k": lambda: Stack(mixture(by_method("train.softmax_topk", num_experts=4, bias=True), bank(bias=True))),
    "not gated": lambda: Stack(mixture(top_p(), bank(gated=False))),
    "top-p": lambda: Stack(mixture(top_p())),
    "nulls": lambda: Stack(mixture(top_p(nulls=3))),
    "expert choice": lambda: Stack(mixture(by_method("train.expert_choice", num_experts=4, capacity_factor=1.1))),
    "capacity": lambda: Stack(mixture(by_method("train.switch", num_experts=4, capacity=3))),
    "merged": lambda: Stack(mixture(RemapRouter(by_method("train.softmax_topk", num_experts=6), [0, 1, 2, 3, 0, 1]))),
    "all around": lambda: Stack(narrow()),
    "recurrent": recurrent,
    "uneven experts": lambda: Stack(mixture(top_p(), HeterogeneousBank([bank(3, 8), bank(1, 64)]))),
    "uneven layers": lambda: Stack(
        mixture(by_method("train.switch", num_experts=2), bank(2), site="a"),
        mixture(by_method("train.softmax_topk", num_experts=9, top_k=3), bank(9), site="b"),
    ),
}  # fmt: skip


def run(stack: Stack, mode: bool) -> tuple[float, float, RowCounter]:
    """Operations of a forward, of forward and backward, and the rows of each site."""
    torch.manual_seed(1)
    rows = RowCounter()
    ids = torch.randint(50, (BATCH, LENGTH))
    stack.train(mode)
    with session(recorder=rows), FlopCounterMode(display=False) as counter:
        y = stack(ids)
        forward = counter.get_total_flops()
        y.square().mean().backward()
    return forward, counter.get_total_flops(), rows


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("mode", [False, True], ids=["evaluation", "training"])
def test_what_is_counted_is_what_runs(name: str, mode: bool) -> None:
    torch.manual_seed(0)
    stack = SUBJECTS[name]()
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.5)
    forward, both, rows = run(stack, mode)
    said = cost(stack, Work(LENGTH, mode, rows.per_token()))
    assert said * BATCH * LENGTH == pytest.approx(forward, rel=1e-9)
    assert both == 3 * forward
    with torch.device("meta"):
        assert cost(SUBJECTS[name](), Work(LENGTH, mode, rows.per_token())) == said


def test_a_varying_number_is_measured_or_noted() -> None:
    work = Work(LENGTH)
    assert work.rows_of("mlp", top_p()) == [1.0] * 4
    assert work.rows_of("nulls", TopP(DIM, 4, top_k=3, num_null=2)) == [0.5] * 4
    assert work.rows_of("fixed", by_method("train.softmax_topk", num_experts=4, top_k=2)) == [0.5] * 4
    assert work.guessed == {"mlp", "nulls"}
    measured = Work(LENGTH, rows={"mlp": [0.1, 0.2, 0.3, 0.4]})
    assert measured.rows_of("mlp", top_p()) == [0.1, 0.2, 0.3, 0.4]
    assert measured.guessed == set()


def test_what_settings_alone_say() -> None:
    assert by_method("train.switch").real_per_token(LENGTH) == 1
    assert by_method("train.switch", capacity_factor=2.0).real_per_token(LENGTH) is None
    choice = by_method("train.expert_choice", num_experts=4, capacity_factor=1.1)
    assert choice.real_per_token(LENGTH) == 5 * 4 / LENGTH  # ceil(1.1 * 16 / 4) = 5 places an expert
    _, _, rows = run(Stack(mixture(choice)), mode=False)
    assert sum(rows.per_token()["mlp"]) == choice.real_per_token(LENGTH)
    assert RemapRouter(by_method("train.softmax_topk", num_experts=2), [0, 0]).real_per_token(LENGTH) is None


def test_dropped_and_null_assignments_are_no_rows() -> None:
    torch.manual_seed(0)
    capacity = Stack(mixture(by_method("train.switch", num_experts=4, capacity=3)))
    nulls = Stack(mixture(top_p(nulls=3)))
    for stack, most in ((capacity, 4 * 3 / LENGTH), (nulls, 7)):
        _, _, rows = run(stack, mode=False)
        assert rows.tokens == {"mlp": BATCH * LENGTH}
        assert len(rows.per_token()["mlp"]) == 4
        assert 0 < sum(rows.per_token()["mlp"]) <= most


class HalfOfTheTokens(nn.Module):
    """Depth routing: the block runs for every other token; so do scores of all pairs among them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.gate = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        some = x[:, ::2] * self.gate(x)[:, ::2].sigmoid()
        y = self.block(some)
        y = (y @ some.transpose(1, 2)) @ some
        return torch.zeros_like(x).index_copy(1, torch.arange(0, x.shape[1], 2), y)

    def flops_per_token(self, work: Work) -> float:
        pairs = 2 * 2 * DIM * work.length / 2
        return cost(self.gate, work) + (cost(self.block, work) + pairs) / 2


def test_a_module_answers_for_itself_and_asks_about_its_parts() -> None:
    torch.manual_seed(0)
    stack = Stack(HalfOfTheTokens(DenseFFN(DIM, 30)))
    forward, _, _ = run(stack, mode=True)
    assert cost(stack, Work(LENGTH)) * BATCH * LENGTH == forward
    assert cost_inside(stack.layers[0], Work(LENGTH)) == 2 * (DIM + 3 * DIM * 30)  # the general rule knows no halves


def test_the_experts_of_one_rank_stand_for_all() -> None:
    torch.manual_seed(0)
    layer = mixture(top_p())
    whole = cost(layer, Work(LENGTH, rows={"mlp": [0.1, 0.2, 0.3, 0.4]}))
    layer.bank = bank(2)
    assert cost(layer, Work(LENGTH, rows={"mlp": [0.1, 0.2, 0.3, 0.4]})) == pytest.approx(whole)
