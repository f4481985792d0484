"""The recurrent router on given inputs: its cell by hand, what passes between layers, every switch, what is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.context import RoutingContext, open_stack
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.routing import Scores
from moestro.core.session import Session
from moestro.core.site import Shared, Site
from moestro.core.tokens import Tokens
from moestro.methods.train.rmoe import RecurrentRouter, cosine_logits
from tests.methods.train.helpers import DIM, build, context


RMOE = method("train.rmoe")
SIZE, EXPERTS = 5, 4


class Tower(nn.Module):
    """Recurrent routers of one stack, on inputs that are given: what a layer computes does not come into it."""

    def __init__(self, depth: int = 3, *, std: float = 0.7, **config: object) -> None:
        super().__init__()
        shared = Shared()
        settings = RMOE.configure({"num_experts": EXPERTS, "state_size": SIZE, **config})
        sites = [Site(path=f"layers.{i}.mlp", kind="mlp", module=nn.Identity(), dim=DIM) for i in range(depth)]
        self.routers = nn.ModuleList([RMOE.build(site, settings, shared) for site in sites])
        self.parts = shared.modules
        draw = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std, generator=draw)

    def forward(self, inputs: list[Tensor], ctx: RoutingContext | None = None) -> list[Scores]:
        ctx = ctx or context(1, len(inputs[0]))
        return [router.score(x, None, ctx) for router, x in zip(self.routers, inputs, strict=True)]

    def cell(self) -> nn.RNNCellBase:
        (part,) = [part.cell for name, part in self.parts.items() if "projector" not in name]
        return part


def inputs(tokens: int = 7, depth: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randn(tokens, DIM, generator=draw) for _ in range(depth)]


def logits(tower: Tower, given: list[Tensor]) -> list[Tensor]:
    return [scores.logits_TC.detach() for scores in tower(given)]


def gru(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    """The equations for one token, with two matrices in the candidate."""
    w_s, w_z, w_n = cell.weight_ih.chunk(3)
    u_s, u_z, u_n = cell.weight_hh.chunk(3)
    (b_s, b_z, b_1), (c_s, c_z, b_2) = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    s = torch.sigmoid(w_s @ x + u_s @ h + b_s + c_s)
    z = torch.sigmoid(w_z @ x + u_z @ h + b_z + c_z)
    n = torch.tanh(w_n @ x + b_1 + s * (u_n @ h + b_2))
    return (1 - z) * n + z * h


# -- the recurrence -----------------------------------------------------------------------------------------------


def test_states_and_logits_are_the_equations_token_by_token() -> None:
    tower, given = Tower(), inputs()
    found = logits(tower, given)
    for token in range(7):
        h = torch.zeros(SIZE)
        for layer, router in enumerate(tower.routers):
            h = gru(tower.cell(), router.projector.weight @ given[layer][token], h)
            torch.testing.assert_close(found[layer][token], router.weight @ h, atol=1e-5, rtol=0)


def test_one_step_worked_out_by_hand() -> None:
    """R = 1, all matrices 1, biases 0, x' = 1: s = z = sigmoid(1), n = tanh(1), h_1 = (1 - z) tanh(1)."""
    tower = Tower(2, state_size=1)
    for parameter in tower.parameters():
        nn.init.ones_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    x = torch.full((1, DIM), 1 / DIM)
    z = 1 / (1 + math.exp(-1))
    first = (1 - z) * math.tanh(1)
    z = 1 / (1 + math.exp(-1 - first))
    second = (1 - z) * math.tanh(1 + z * first) + z * first
    for scores, h in zip(tower([x, x]), (first, second), strict=True):
        torch.testing.assert_close(scores.logits_TC, torch.full((1, EXPERTS), h), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "torch_cell"), [("gru", nn.GRUCell), ("rnn", nn.RNNCell), ("lstm", nn.LSTMCell)])
def test_the_cell_is_torchs_cell(kind: str, torch_cell: type[nn.RNNCellBase]) -> None:
    tower, given = Tower(cell=kind), inputs()
    plain = torch_cell(SIZE, SIZE)
    plain.load_state_dict(tower.cell().state_dict())
    state = None
    for router, x, found in zip(tower.routers, given, logits(tower, given), strict=True):
        state = plain(x @ router.projector.weight.T, state)
        h = state[0] if kind == "lstm" else state
        assert float(h.detach().abs().max()) >= 0.3
        torch.testing.assert_close(found, h @ router.weight.T, atol=1e-6, rtol=1e-6)


def test_without_projection_and_biases_the_state_is_exactly_0_and_routing_uniform() -> None:
    tower = Tower()
    for router in tower.routers:
        nn.init.zeros_(router.projector.weight)
    nn.init.zeros_(tower.cell().bias_ih)
    nn.init.zeros_(tower.cell().bias_hh)
    ctx = context(1, 7)
    for router, scores in zip(tower.routers, tower(inputs(), ctx), strict=True):
        assert torch.equal(ctx.get(router.site, "rmoe_state").state_TX, torch.zeros(7, SIZE))
        assert torch.equal(scores.probabilities(), torch.full((7, EXPERTS), 1 / EXPERTS))


def test_tokens_do_not_meet() -> None:
    """Permuted tokens give permuted scores; another token changes nobody else."""
    tower, given = Tower(), inputs()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    plain, moved = logits(tower, given), logits(tower, [x[order] for x in given])
    changed = [x.clone() for x in given]
    for x in changed:
        x[2] += 5.0
    others = torch.arange(7) != 2
    for one, permuted, other in zip(plain, moved, logits(tower, changed), strict=True):
        torch.testing.assert_close(permuted, one[order], atol=1e-6, rtol=0)
        torch.testing.assert_close(other[others], one[others], atol=1e-6, rtol=0)
        assert float((other[2] - one[2]).abs().max()) > 0.1


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm", "none"])
@pytest.mark.parametrize("pass_state", [True, False])
def test_the_first_projection_reaches_the_third_layer_only_when_state_is_passed(cell: str, pass_state: bool) -> None:
    tower, given = Tower(cell=cell, pass_state=pass_state, residual_logits=0.5 * (cell == "none")), inputs()
    before = logits(tower, given)
    with torch.no_grad():
        tower.routers[0].projector.weight.mul_(-1.5)
    after = logits(tower, given)
    assert float((after[0] - before[0]).abs().max()) > 0.1
    gap = float((after[2] - before[2]).abs().max())
    assert gap > 1e-2 if pass_state else gap == 0


def test_without_passing_every_layer_starts_at_0_with_the_same_parameters() -> None:
    passing, starting, given = Tower(), Tower(pass_state=False), inputs()
    assert {n: p.shape for n, p in passing.named_parameters()} == {n: p.shape for n, p in starting.named_parameters()}
    assert torch.equal(logits(passing, given)[0], logits(starting, given)[0])
    for layer, found in enumerate(logits(starting, given)):
        h = torch.stack([gru(starting.cell(), starting.routers[layer].projector.weight @ x, torch.zeros(SIZE))
                         for x in given[layer]])  # fmt: skip
        torch.testing.assert_close(found, h @ starting.routers[layer].weight.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm", "none"])
def test_a_detached_state_informs_but_brings_no_gradient(cell: str) -> None:
    settings = {"cell": cell, "residual_logits": 0.5 * (cell == "none")}
    towers, given = [Tower(**settings), Tower(**settings, detach_state=True)], inputs()
    found = [tower(given)[2].logits_TC for tower in towers]
    assert torch.equal(*found)
    first, third = (
        [torch.autograd.grad(loss.square().sum(), tower.routers[layer].projector.weight, retain_graph=True,
                             allow_unused=True)[0] for loss, tower in zip(found, towers, strict=True)]
        for layer in (0, 2)
    )  # fmt: skip
    assert float(first[0].abs().max()) > 1e-3
    assert first[1] is None
    torch.testing.assert_close(third[0], third[1], atol=0, rtol=0)
    assert float(third[1].abs().max()) > 1e-3


def test_a_forward_leaves_nothing_behind() -> None:
    tower, given = Tower(), inputs()
    first = logits(tower, given)
    logits(tower, [x + 1 for x in given])
    for before, after in zip(first, logits(tower, given), strict=True):
        assert torch.equal(before, after)
    assert all(not isinstance(value, Tensor) for router in tower.routers for value in vars(router).values())
    assert not [name for name, _ in tower.named_buffers()]


# -- switches -----------------------------------------------------------------------------------------------------


def test_residual_logits_add_the_logits_below_times_a() -> None:
    tower, given = Tower(cell="none", residual_logits=0.5), inputs()
    own = [x @ r.projector.weight.T @ r.weight.T for x, r in zip(given, tower.routers, strict=True)]
    found = logits(tower, given)
    torch.testing.assert_close(found[0], own[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], own[1] + 0.5 * own[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], own[2] + 0.5 * own[1] + 0.25 * own[0], atol=1e-5, rtol=0)
    assert not list(tower.parts.parameters())


def test_parameters_by_switch() -> None:
    """L (h p + N p) + 6 p^2 + 6 p for the GRU; a third of the cell for a plain one, four thirds for an LSTM."""
    own = 3 * (DIM * SIZE + EXPERTS * SIZE)
    cell = 2 * SIZE * SIZE + 2 * SIZE
    count = {kind: sum(p.numel() for p in Tower(cell=kind).parameters()) for kind in ("gru", "rnn", "lstm")}
    assert count == {"gru": own + 3 * cell, "rnn": own + cell, "lstm": own + 4 * cell}
    assert 3 * cell == 6 * SIZE**2 + 6 * SIZE
    one = Tower(shared_projector=True)
    assert sum(p.numel() for p in one.parameters()) == own + 3 * cell - 2 * DIM * SIZE
    assert len({id(router.projector.module) for router in one.routers}) == 1


def test_a_shared_projector_is_the_same_function_as_equal_projectors() -> None:
    one, many, given = Tower(shared_projector=True), Tower(), inputs()
    for router, other in zip(many.routers, one.routers, strict=True):
        router.projector.load_state_dict(other.projector.module.state_dict())
        router.load_state_dict(other.state_dict(), strict=False)
    many.cell().load_state_dict(one.cell().state_dict())
    for found, expected in zip(logits(one, given), logits(many, given), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_cosine_scores_by_hand() -> None:
    """cos((3, 4), .) of (1, 0), (0, 2), (-3, -4) is 0.6, 0.8, -1; over tau = 0.3."""
    weight, log_tau = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, -4.0]]), torch.tensor([math.log(0.3)])
    found = cosine_logits(torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]]), weight, log_tau)
    torch.testing.assert_close(found[0], torch.tensor([2.0, 0.8 / 0.3, -1 / 0.3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    assert torch.equal(found[2], torch.zeros(3))
    zero = torch.zeros(1, 2, requires_grad=True)
    cosine_logits(zero, weight, log_tau)[0, 0].backward()
    torch.testing.assert_close(zero.grad, torch.tensor([[1e4 / 0.3, 0.0]]))  # bounded, and towards the expert


@pytest.mark.parametrize("embedding", [None, 3])
def test_cosine_scores_of_the_state(embedding: int | None) -> None:
    tower, linear, given = Tower(base="cosine", embedding_size=embedding), Tower(), inputs()
    h, found = None, logits(tower, given)
    linear.cell().load_state_dict(tower.cell().state_dict())
    for router, x, scores in zip(tower.routers, given, found, strict=True):
        h = linear.cell()(x @ router.projector.weight.T, h)
        e = h if embedding is None else h @ router.embedding.weight.T
        expected = nn.functional.cosine_similarity(e[:, None], router.weight[None], dim=-1) / router.log_tau.exp()
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    tower(given)[2].logits_TC.square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in tower.routers[2].parameters())


# -- choice and weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_are_probabilities_over_all_and_perhaps_sum_to_1(renormalise: bool) -> None:
    router = Tower(1, renormalise=renormalise, top_k=2).routers[0]
    scores = Scores(*[torch.tensor([[0.1, 0.4, 0.2, 0.3]])] * 3)
    routing = router.choose(scores, context(1, 1))
    assert routing.expert_TK.tolist() == [[1, 3]]
    expected = [4 / 7, 3 / 7] if renormalise else [0.4, 0.3]
    assert routing.weight_TK[0].tolist() == pytest.approx(expected)


def test_scores_are_the_softmax_over_all_experts() -> None:
    (scores,) = Tower(1)(inputs(depth=1))
    expected = scores.logits_TC.exp() / scores.logits_TC.exp().sum(-1, keepdim=True)
    for found in (scores.gate_TC, scores.select_TC, scores.probabilities()):
        torch.testing.assert_close(found, expected)
    assert not scores.select_TC.requires_grad


def test_one_normalised_expert_a_token_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    build("train.rmoe", top_k=1, renormalise=False)
    assert not caplog.records
    build("train.rmoe", top_k=1)
    assert "no gradient" in caplog.text


# -- gradients ----------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Three mixtures with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()
        sites = [router.site for router in self.tower.routers]
        banks = [StackedFFN(EXPERTS, DIM, 4) for _ in sites]
        for bank in banks:
            for parameter in bank.parameters():
                nn.init.normal_(parameter, std=0.5)
        self.layers = nn.ModuleList(
            [MoELayer(r, b, site=s) for r, b, s in zip(self.tower.routers, banks, sites, strict=True)]
        )

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        return inputs_embeds


def loop(stack: Stack, x: Tensor) -> Tensor:
    """One token through the stack, every step written out."""
    h = torch.zeros(SIZE)
    for layer, router in zip(stack.layers, stack.tower.routers, strict=True):
        h = gru(stack.tower.cell(), router.projector.weight @ x, h)
        probability = (router.weight @ h).softmax(-1)
        known = probability.tolist()
        best = sorted(range(EXPERTS), key=lambda i, known=known: -known[i])[:2]
        y = torch.zeros(DIM)
        for expert in best:
            gate, up, down = (layer.bank.weight(expert, name) for name in ("gate", "up", "down"))
            y = y + probability[expert] / probability[best].sum() * (down @ (nn.functional.silu(gate @ x) * (up @ x)))
        x = x + y
    return x


def test_outputs_and_gradients_are_those_of_a_plain_loop() -> None:
    stack = Stack()
    open_stack(stack, "model")
    x = torch.randn(2, 4, DIM, requires_grad=True)
    out = stack(inputs_embeds=x)
    out.square().sum().backward()
    ours = {name: p.grad.clone() for name, p in stack.named_parameters()} | {"x": x.grad.clone()}
    stack.zero_grad()
    x.grad = None
    expected = torch.stack([loop(stack, token) for token in x.view(8, DIM)]).view_as(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    expected.square().sum().backward()
    for name, parameter in [*stack.named_parameters(), ("x", x)]:
        assert float(parameter.grad.abs().max()) > 1e-2, name
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


# -- precision ----------------------------------------------------------------------------------------------------


def test_the_router_stays_float32_under_autocast() -> None:
    tower, given = Tower(), inputs()
    plain = logits(tower, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = logits(tower, given)
    for one, other in zip(plain, mixed, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_bfloat16_router_computes_like_its_float32_copy(cell: str) -> None:
    low, given = Tower(cell=cell).to(torch.bfloat16), [x.to(torch.bfloat16) for x in inputs()]
    found = logits(low, given)
    for one, other in zip(found, logits(low.float(), [x.float() for x in given]), strict=True):
        assert torch.equal(one, other)


# -- some tokens only ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm"])
def test_in_a_subset_tokens_go_on_from_their_state_and_the_others_keep_theirs(cell: str) -> None:
    """Tokens 4 and 1, in this order, take part in the second layer: their third state follows from the second."""
    tower, given = Tower(cell=cell), inputs(6)
    ctx = context(1, 6)
    first, second, third = tower.routers
    first.score(given[0], None, ctx)
    with ctx.subset(torch.tensor([4, 1])):
        inner = second.score(given[1][[4, 1]], None, ctx).logits_TC
    outer = third.score(given[2], None, ctx).logits_TC.detach()
    every = logits(tower, given)
    torch.testing.assert_close(inner.detach(), every[1][[4, 1]], atol=1e-6, rtol=0)
    plain = context(1, 6)
    first.score(given[0], None, plain)
    skipped = third.score(given[2], None, plain).logits_TC.detach()
    took = torch.tensor([False, True, False, False, True, False])
    assert float((skipped - every[2]).abs().max(-1).values.min()) > 1e-3
    torch.testing.assert_close(outer, torch.where(took[:, None], every[2], skipped), atol=1e-6, rtol=0)


def test_gradients_pass_through_a_subset() -> None:
    tower, given = Tower(), inputs(6)
    ctx = context(1, 6)
    for router, x in zip(tower.routers, given, strict=True):
        index = torch.tensor([4, 1]) if router is tower.routers[1] else torch.arange(6)
        with ctx.subset(index):
            out = router.score(x[index], None, ctx).logits_TC
    (mine,) = torch.autograd.grad(out[4].sum(), tower.routers[0].projector.weight, retain_graph=True)
    (whole,) = torch.autograd.grad(tower(given)[2].logits_TC[4].sum(), tower.routers[0].projector.weight)
    torch.testing.assert_close(mine, whole, atol=1e-6, rtol=0)
    past, none = torch.autograd.grad(out[0].sum(), [router.projector.weight for router in tower.routers[:2]])
    assert not none.any()
    ctx = context(1, 6)
    tower.routers[0].score(given[0], None, ctx)
    alone = tower.routers[2].score(given[2], None, ctx).logits_TC
    (expected,) = torch.autograd.grad(alone[0].sum(), tower.routers[0].projector.weight)
    torch.testing.assert_close(past, expected, atol=1e-6, rtol=0)
    assert float(past.abs().max()) > 1e-3


def sub(tokens: Tokens, position: list[int]) -> Tokens:
    return Tokens(tokens.row_T, torch.tensor(position), tokens.valid_T, None, tokens.num_rows, tokens.width)


@pytest.mark.parametrize(
    ("writer", "reader", "message"),
    [
        ([0, 1], [0, 1, 2, 3], r"layers.1.mlp: there are 4 tokens, the state has 2"),
        ([0, 1], [2, 3], "2 of 2 tokens are not among the 2 of the state"),
        ([0, 2, 3], [1, 2], "1 of 2 tokens are not among the 3 of the state"),
    ],
)
def test_a_state_of_other_tokens_is_refused(writer: list[int], reader: list[int], message: str) -> None:
    tower, (first, second, _) = Tower(), inputs(4)
    ctx = context(1, 4)
    with ctx.subset(torch.tensor(writer)):
        tower.routers[0].score(first[writer], None, ctx)
    with ctx.subset(torch.tensor(reader)), pytest.raises(ContextError, match=message):
        tower.routers[1].score(second[reader], None, ctx)


def test_a_position_behind_the_last_of_the_state_is_not_taken_for_the_next_row() -> None:
    tower, x, ctx = Tower(), inputs(6)[0], context(2, 3)
    with ctx.subset(torch.tensor([0, 1, 3, 4])):  # positions 0 and 1 of both rows
        tower.routers[0].score(x[[0, 1, 3, 4]], None, ctx)
    with ctx.subset(torch.tensor([2])), pytest.raises(ContextError, match="1 of 1 tokens are not among the 4"):
        tower.routers[1].score(x[[2]], None, ctx)


def test_an_input_of_another_token_count_is_refused() -> None:
    tower, ctx = Tower(), context(1, 4)
    tower.routers[0].score(inputs(4)[0], None, ctx)
    for count in (1, 3):  # one row would broadcast
        with pytest.raises(ContextError, match=f"has 4 tokens but a layer got {count}"):
            tower.routers[1].score(inputs(count)[0], None, ctx)


def test_tokens_that_share_a_position_are_told_apart_only_as_a_whole() -> None:
    """Packed rows start positions anew: the whole forward works, a subset of it cannot be found."""
    tower, given = Tower(), inputs(4)
    ctx = context(1, 4)
    ctx.tokens = sub(ctx.tokens, [0, 1, 0, 1])
    for found, expected in zip(tower(given, ctx), logits(tower, given), strict=True):
        assert torch.equal(found.logits_TC, expected)
    ctx = RoutingContext("test", Session(), ctx.tokens)
    tower.routers[0].score(given[0], None, ctx)
    with ctx.subset(torch.tensor([1, 2])), pytest.raises(ContextError, match="two tokens of a row have one position"):
        tower.routers[1].score(given[1][[1, 2]], None, ctx)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "above", "message"),
    [
        ({"cell": "gru"}, {"cell": "rnn"}, "5 values by cell 'gru' arrives, but this router has cell 'rnn' with 5"),
        ({"state_size": 3}, {"state_size": 5}, "a state of 3 values"),
        (
            {"cell": "none", "residual_logits": 1.0, "num_experts": 4},
            {"cell": "none", "residual_logits": 1.0, "num_experts": 6},
            "a state of 4 values by cell 'none' arrives, but this router has cell 'none' with 6",
        ),
    ],
)
def test_a_state_of_another_kind_or_size_is_refused(below: dict, above: dict, message: str) -> None:
    ctx = context(1, 7)
    Tower(1, **below).routers[0].score(inputs()[0], None, ctx)
    with pytest.raises(ContextError, match=message):
        Tower(2, **above).routers[1].score(inputs()[1], None, ctx)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"state_size": 0}, "state_size=0"),
        ({"state_size": -4}, "state_size=-4"),
        ({"num_experts": 2, "top_k": 3}, "top_k=3 but num_experts=2"),
        ({"detach_state": True, "pass_state": False}, "leave one of them out"),
        ({"residual_logits": 0.5}, "residual_logits=0.5 with cell='gru'"),
        ({"residual_logits": -0.5, "cell": "none"}, "residual_logits=-0.5"),
        ({"residual_logits": math.inf, "cell": "none"}, "residual_logits=inf"),
        ({"cell": "none"}, "cell='none' with residual_logits=0 passes nothing on"),
        ({"embedding_size": 8}, "embedding_size=8 with base='linear'"),
        ({"cell": "transformer"}, "cell='transformer'"),
        ({"state": 8}, "did you mean 'state_size'"),
    ],
)
def test_settings_that_cannot_be(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RMOE.configure(config)


def test_fresh_weights_are_small_and_every_one_is_set() -> None:
    torch.manual_seed(0)
    router = build("train.rmoe", state_size=400, num_experts=50)
    assert isinstance(router, RecurrentRouter)
    for weight in (router.projector.weight, router.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for parameter in router.cell.module.parameters():
        assert 0 < float(parameter.detach().abs().max()) <= 1 / math.sqrt(400)
    cosine = build("train.rmoe", base="cosine", embedding_size=300, state_size=200)
    assert float(cosine.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(cosine.log_tau.detach().exp()) == pytest.approx(0.3)
