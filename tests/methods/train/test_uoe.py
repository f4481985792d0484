"""Union of experts: slices of a feed-forward are views that sum to it, and only the chosen ones run."""

import math

import pytest
import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.cost import RowCounter, Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.router import Router
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.methods.train.uoe import Config, UnionLayer, combined, recompose
from moestro.testing.tiny import tiny_config


DIM, INNER = 6, 24
ALL = {"top_k": 4}


class Dense(nn.Module):
    """A feed-forward of its own, gated or not."""

    def __init__(self, activation: str, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        if gated:
            self.gate_proj = nn.Linear(DIM, INNER, bias=bias)
        self.up_proj = nn.Linear(DIM, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, DIM, bias=bias)

    def act(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) if self.activation == "silu" else nn.functional.gelu(x)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act(self.gate_proj(x)) * up if hasattr(self, "gate_proj") else self.act(up))


def dense_of(form: str) -> Dense:
    torch.manual_seed(0)
    made = Dense("silu" if form == "swiglu" else "gelu", gated=form == "swiglu", bias=form == "gelu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.6)
    return made


def union_of(dense: nn.Module, **config: object) -> UnionLayer:
    use = method("train.uoe")
    site = Site(path="mlp", kind="mlp", module=dense, dim=DIM, out=DIM)
    layer = use.build(site, use.configure(dict(config)), Shared())
    assert isinstance(layer, UnionLayer)
    with torch.no_grad():
        layer.router.weight.normal_(std=1.0)
        assert layer.router.bias is not None
        layer.router.bias.normal_(std=0.3)
    return layer


def x_of(rows: int = 2, width: int = 7) -> Tensor:
    return torch.randn(rows, width, DIM, generator=torch.Generator().manual_seed(3))


def slice_outputs(dense: Dense, x_TD: Tensor, count: int) -> list[Tensor]:
    """What each slice gives for every token, cut by hand."""
    inner = INNER // count
    found = []
    for i in range(count):
        units = slice(i * inner, (i + 1) * inner)

        def first(linear: nn.Linear, units: slice = units) -> Tensor:
            bias = None if linear.bias is None else linear.bias[units]
            return nn.functional.linear(x_TD, linear.weight[units], bias)

        hidden = first(dense.up_proj)
        hidden = dense.act(first(dense.gate_proj)) * hidden if hasattr(dense, "gate_proj") else dense.act(hidden)
        found.append(hidden @ dense.down_proj.weight[:, units].T)
    return found


@pytest.mark.parametrize("form", ["gelu", "swiglu"])
@pytest.mark.parametrize("count", [1, 3, 4, 24])
def test_all_slices_together_are_the_dense_block(form: str, count: int) -> None:
    dense = dense_of(form)
    layer = union_of(dense, num_slices=count, top_k=count)
    torch.testing.assert_close(layer(x_of()), dense(x_of()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("combine", ["straight_through", "sum"])
def test_keeping_every_position_is_the_dense_block(combine: str) -> None:
    dense = dense_of("gelu")
    layer = union_of(dense, mode="expert_choice", keep_ratio=1.0, combine=combine)
    torch.testing.assert_close(layer(x_of()), dense(x_of()), atol=1e-5, rtol=1e-5)


def test_gate_weights_are_the_dense_block_for_equal_gates_only() -> None:
    dense = dense_of("swiglu")
    layer = union_of(dense, combine="gate", **ALL)
    assert (layer(x_of()) - dense(x_of())).abs().max() > 0.1
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.zero_()
    torch.testing.assert_close(layer(x_of()), dense(x_of()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["gelu", "swiglu"])
def test_slices_are_views_and_the_block_comes_back_bit_for_bit(form: str) -> None:
    dense = dense_of(form)
    before = {name: (value.clone(), value.data_ptr()) for name, value in dense.named_parameters()}
    layer = union_of(dense)
    for name, linear in layer.bank.linears.items():
        cut = [layer.bank.weight(i, name) for i in range(4)]
        assert {part.untyped_storage().data_ptr() for part in cut} == {linear.weight.untyped_storage().data_ptr()}
        assert torch.equal(torch.cat(cut, 1 if name == "down" else 0), linear.weight)
    back = recompose(layer)
    assert back is dense
    after = {name: (value, value.data_ptr()) for name, value in back.named_parameters()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name][0], old) and after[name][1] == at for name, (old, at) in before.items())
    assert layer.bank.state_dict() == {}, "a bank saves nothing of its own"
    names = set(layer.state_dict())
    assert names == {*dense.state_dict(), "router.weight", "router.bias"}


def test_training_moves_the_dense_weights_themselves() -> None:
    dense = dense_of("swiglu")
    layer = union_of(dense)
    layer(x_of()).square().sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.01 * parameter.grad
    full = union_of(dense, **ALL)
    torch.testing.assert_close(full(x_of()), recompose(layer)(x_of()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["gelu", "swiglu"])
@pytest.mark.parametrize("combine", ["straight_through", "sum", "gate"])
def test_outputs_and_gradients_equal_a_plain_loop(form: str, combine: str) -> None:
    """The gradient of the gate is worked out by hand: v = k g / sum g, dL/dv_i = <dL/dy, f_i(x)>."""
    dense = dense_of(form)
    layer = union_of(dense, combine=combine)
    x_TD, wish = x_of().flatten(0, 1), torch.randn(14, DIM, generator=torch.Generator().manual_seed(5))
    f = slice_outputs(dense, x_TD, 4)
    g = (x_TD @ layer.router.weight.T + layer.router.bias).softmax(-1)
    bias = 0.0 if dense.down_proj.bias is None else dense.down_proj.bias
    rows, gate_objective = [], torch.zeros(())
    for t in range(14):
        chosen = g[t].topk(2).indices.tolist()
        v = {i: 2 * g[t, i] / sum(g[t, j] for j in chosen) for i in chosen}
        weight = {i: v[i].detach() if combine == "gate" else torch.ones(()) for i in chosen}
        rows.append(bias + sum(weight[i] * f[i][t] for i in chosen))
        gate_objective = gate_objective + sum(v[i] * (wish[t] @ f[i][t]).detach() for i in chosen)
    found = layer(x_TD[None])[0]
    torch.testing.assert_close(found, torch.stack(rows), atol=1e-5, rtol=1e-5)
    (found * wish).sum().backward()
    names = [name for name, _ in dense.named_parameters()]
    theirs = torch.autograd.grad((torch.stack(rows) * wish).sum(), list(dense.parameters()), retain_graph=True)
    for name, expected in zip(names, theirs, strict=True):
        torch.testing.assert_close(dense.get_parameter(name).grad, expected, atol=1e-4, rtol=1e-4, msg=name)
    gates = torch.autograd.grad(gate_objective, [layer.router.weight, layer.router.bias])
    for ours, expected in zip((layer.router.weight.grad, layer.router.bias.grad), gates, strict=True):
        assert expected.abs().max() > 1e-2
        if combine == "sum":
            assert ours is None
        else:
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_straight_through_weighs_exactly_one_and_learns_nothing_from_a_single_slice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate_TK = torch.tensor([[0.3, 0.1], [0.02, 0.9]], requires_grad=True)
    assert torch.equal(combined(gate_TK, 2, "straight_through"), torch.ones(2, 2))
    torch.testing.assert_close(combined(gate_TK, 2, "gate"), torch.tensor([[1.5, 0.5], [0.04 / 0.92, 1.8 / 0.92]]))
    (single,) = torch.autograd.grad(combined(gate_TK[:, :1], 1, "straight_through").sum(), gate_TK)
    assert torch.equal(single, torch.zeros(2, 2))
    union_of(dense_of("gelu"), top_k=1)
    assert "train.uoe: top_k=1" in caplog.text
    caplog.clear()
    union_of(dense_of("gelu"), top_k=1, combine="sum")
    assert caplog.text == ""


MODES = {
    "token_choice": {"top_k": 2},
    "expert_choice": {"mode": "expert_choice", "keep_ratio": 0.4},
    "sequence": {"mode": "sequence", "sequence_length": 7},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_alone_equals_its_row_in_a_batch_of_eight(mode: str) -> None:
    layer, x = union_of(dense_of("gelu"), **MODES[mode]), x_of(8)
    together = layer(x)
    for row in range(8):
        torch.testing.assert_close(layer(x[row : row + 1])[0], together[row], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_a_later_token_changes_nothing_before_it() -> None:
    layer, x = union_of(dense_of("swiglu")), x_of()
    other = x.clone()
    other[:, 4] += 3.0
    before, after = layer(x), layer(other)
    others = [0, 1, 2, 3, 5, 6]
    torch.testing.assert_close(before[:, others], after[:, others], atol=1e-6, rtol=1e-6)
    chosen = union_of(dense_of("swiglu"), **MODES["expert_choice"])
    gap = (chosen(x)[:, :4] - chosen(other)[:, :4]).abs().max()
    assert gap > 0.1, "expert choice reads later tokens, and says so"
    with session(collect=True) as opened:
        chosen(x)
        layer(x)
    first, second = (ctx.routings["mlp"] for ctx in opened.take())
    assert first is not None
    assert second is not None
    assert (first.causal, second.causal) == (False, True)


def test_expert_choice_takes_the_positions_with_the_largest_gates_of_each_sequence() -> None:
    dense = dense_of("gelu")
    layer, x = union_of(dense, mode="expert_choice", keep_ratio=0.2), x_of()
    count = math.ceil(0.2 * 7)
    g = (x @ layer.router.weight.T + layer.router.bias).softmax(-1)
    expected = torch.zeros(2, 7, DIM)
    picks = torch.zeros(2, 7)
    for b in range(2):
        f = slice_outputs(dense, x[b], 4)
        for i in range(4):
            for t in g[b, :, i].topk(count).indices.tolist():
                expected[b, t] += f[i][t]
                picks[b, t] += 1
    assert (picks == 0).any(), "some token is chosen by no slice"
    y = layer(x)
    torch.testing.assert_close(y, expected + dense.down_proj.bias, atol=1e-5, rtol=1e-5)
    assert torch.equal(y[picks == 0], dense.down_proj.bias.expand(int((picks == 0).sum()), -1)), "the bias, once"


def test_expert_choice_weights_follow_the_number_of_slices_that_chose_a_token() -> None:
    layer, x = union_of(dense_of("gelu"), combine="gate", **MODES["expert_choice"]), x_of()
    with session(collect=True) as opened:
        layer(x)
    routing = opened.take()[0].routings["mlp"]
    assert routing is not None
    g = (x.flatten(0, 1) @ layer.router.weight.T + layer.router.bias).softmax(-1)
    for t in range(14):
        mine = routing.expert_N[routing.token_N == t]
        expected = len(mine) * g[t, mine] / g[t, mine].sum()
        torch.testing.assert_close(routing.weight_N[routing.token_N == t], expected)


def test_keep_ratio_is_taken_as_written_and_never_gives_no_token() -> None:
    """0.1 * 3 slices * 10 tokens / 3 is just above 1 in floating point; ceil must not see 2."""
    for width, ratio, wanted in ((10, 0.1, 1), (7, 0.01, 1), (8, 0.5, 4), (7, 0.5, 4)):
        layer = union_of(dense_of("gelu"), num_slices=3, mode="expert_choice", keep_ratio=ratio)
        with session(collect=True) as opened:
            layer(x_of(1, width))
        routing = opened.take()[0].routings["mlp"]
        assert routing is not None
        assert routing.counts_C().tolist() == [wanted] * 3
        assert layer.router.real_per_token(width) == wanted * 3 / width
    assert union_of(dense_of("gelu"), mode="expert_choice", top_k=1).router.real_per_token(8) == 1


class Close(Edit):
    """Slice 2 may not take the tokens 1 to 3."""

    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        select_TC = scores.select_TC.clone()
        select_TC[1:4, 2] = float("-inf")
        return scores.replace(select_TC=select_TC)


def test_a_slice_takes_no_position_that_was_closed() -> None:
    layer = union_of(dense_of("gelu"), mode="expert_choice", keep_ratio=1.0)
    with session(edits=[Close()], collect=True) as opened:
        layer(x_of(1))
    routing = opened.take()[0].routings["mlp"]
    assert routing is not None
    assert routing.token_N[routing.expert_N == 2].tolist() == [0, 4, 5, 6]
    assert routing.counts_C().tolist() == [7, 7, 4, 7]


def test_one_gate_chooses_for_the_whole_sequence() -> None:
    dense = dense_of("gelu")
    layer, x = union_of(dense, **MODES["sequence"]), x_of()
    assert layer.router.weight.shape == (4, 7 * DIM)
    expected = []
    for b in range(2):
        g = (layer.router.weight @ x[b].flatten() + layer.router.bias).softmax(-1)
        f = slice_outputs(dense, x[b], 4)
        expected.append(dense.down_proj.bias + sum(f[i] for i in g.topk(2).indices.tolist()))
    torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(ContextError, match=r"a sequence of 6 for sequence_length=7; pad it"):
        layer(x[:, :6])


def test_dropout_of_the_hidden_units_is_the_blocks_own() -> None:
    """All of it dropped, so that nothing is left to chance: the output bias alone, and while training only."""
    dense = dense_of("gelu")
    dense.dropout = nn.Dropout(1.0)
    layer, x = union_of(dense, **ALL), x_of()
    assert torch.equal(layer(x), dense.down_proj.bias.expand_as(x))
    torch.testing.assert_close(layer.eval()(x), dense_of("gelu")(x), atol=1e-5, rtol=1e-5)
    assert not recompose(layer).training
    assert recompose(layer.train()).training


@pytest.mark.parametrize("form", ["gelu", "swiglu"])
def test_slices_weigh_together_what_the_block_weighs_without_its_output_bias(form: str) -> None:
    dense = dense_of(form)
    layer = union_of(dense)
    total = 4 * (sum(p.numel() for p in dense.parameters()) - (DIM if form == "gelu" else 0))
    assert [layer.bank.nbytes(i) for i in range(4)] == [total / 4] * 4


class Only(Edit):
    """Token 0 keeps the first of its slices, token 1 none."""

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        first_N = torch.ones(len(routing.token_N), dtype=torch.bool)
        first_N[1::2] = routing.token_N[1::2] != 0
        keep_N = first_N & (routing.token_N != 1)
        parts = (part[keep_N] for part in (routing.token_N, routing.expert_N, routing.weight_N))
        return Routing(*parts, routing.num_tokens, routing.num_experts, scores=routing.scores)


def test_the_output_bias_is_added_once_whatever_is_chosen() -> None:
    dense = dense_of("gelu")
    layer, x = union_of(dense), x_of(1, 3)
    with session(edits=[Only()], collect=True) as opened:
        y = layer(x)[0]
    routing = opened.take()[0].routings["mlp"]
    assert routing is not None
    f = slice_outputs(dense, x[0], 4)
    torch.testing.assert_close(y[0], dense.down_proj.bias + f[int(routing.expert_N[0])][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(y[1], dense.down_proj.bias)


def test_the_balance_loss_is_switch_over_slices() -> None:
    layer, x = union_of(dense_of("gelu")), x_of()
    with session(collect=True) as opened:
        layer(x)
    term = opened.take()[0].losses[("mlp", "balance")]
    g = (x.flatten(0, 1) @ layer.router.weight.T + layer.router.bias).softmax(-1)
    share = torch.bincount(g.topk(2).indices.flatten(), minlength=4) / 28
    expected = 4 * (share * g.mean(0)).sum()
    torch.testing.assert_close(term.total, expected)
    ours, theirs = (torch.autograd.grad(loss, layer.router.weight)[0] for loss in (term.total, expected))
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs)
    assert not union_of(dense_of("gelu"), losses={}).losses


def test_half_the_slices_cost_half_the_block_and_the_gate() -> None:
    layer = union_of(dense_of("swiglu"))
    rows = RowCounter()
    with session(recorder=rows):
        layer(x_of())
    assert cost(layer, Work(7, rows=rows.per_token())) == 2 * 3 * DIM * INNER / 2 + 2 * 4 * DIM
    whole = union_of(dense_of("swiglu"), **MODES["sequence"])
    assert cost(whole, Work(7)) == 2 * 3 * DIM * INNER / 2 + 2 * 4 * 7 * DIM / 7, "one gate a sequence"


REFUSED = {
    "top_k=5 of 4 slices": {"num_slices": 4, "top_k": 5},
    "keep_ratio=0.0": {"mode": "expert_choice", "keep_ratio": 0.0},
    "keep_ratio=1.5": {"mode": "expert_choice", "keep_ratio": 1.5},
    "it is for expert_choice": {"keep_ratio": 0.5},
    "in place of top_k": {"mode": "expert_choice", "keep_ratio": 0.5, "top_k": 2},
    "mode='sequence' with sequence_length=None": {"mode": "sequence"},
    "mode='token_choice' with sequence_length=8": {"sequence_length": 8},
    "num_slices=0": {"num_slices": 0},
    "heads_per_expert=0": {"heads_per_expert": 0},
    "combine='mean'": {"combine": "mean"},
}


@pytest.mark.parametrize("told", REFUSED)
def test_impossible_settings_are_refused_when_built(told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**REFUSED[told])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sites_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_slices=5 does not divide the 24 hidden units"):
        union_of(dense_of("gelu"), num_slices=5)
    with pytest.raises(ConfigError, match="top_k=9 of 4 slices"):
        union_of(dense_of("gelu"), top_k=9)
    with pytest.raises(ConfigError, match="a Linear has no linear layer 'up_proj'"):
        union_of(nn.Linear(DIM, DIM))
    use, config = method("train.uoe"), tiny_config("llama")
    causal = Site(
        path="model.layers.0.mlp", kind="mlp", module=nn.Identity(), dim=32, model_config=config, family="llama"
    )
    for mode in ("expert_choice", "sequence"):
        with pytest.raises(ConfigError, match="reads later tokens; a causal model needs token_choice") as caught:
            use.build(causal, use.configure(MODES[mode]), Shared())
        assert "\n" not in str(caught.value)
    norm = Site(path="norm", kind="norm", module=nn.Identity(), dim=DIM)
    with pytest.raises(ConfigError, match="a site of kind norm is no sum of slices"):
        use.build(norm, use.configure({}), Shared())
