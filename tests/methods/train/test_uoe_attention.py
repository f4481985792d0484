"""Union of experts: heads of an attention as slices; a head attends among the tokens that were routed to it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.cost import RowCounter, Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train.uoe import UnionAttention, recompose


DIM, HEAD = 12, 6


class Dense(nn.Module):
    """A dense attention of its own, by the textbook."""

    def __init__(self, heads: int, key_heads: int, *, causal: bool, bias: bool) -> None:
        super().__init__()
        self.head_dim, self.is_causal, self.readers = HEAD, causal, heads // key_heads
        self.q_proj = nn.Linear(DIM, heads * HEAD, bias=bias)
        self.k_proj = nn.Linear(DIM, key_heads * HEAD, bias=bias)
        self.v_proj = nn.Linear(DIM, key_heads * HEAD, bias=bias)
        self.o_proj = nn.Linear(heads * HEAD, DIM, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (p(x).unflatten(-1, (-1, HEAD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        key, value = (part.repeat_interleave(self.readers, 2) for part in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * HEAD**-0.5
        if self.is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return self.o_proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2))


def dense_of(heads: int = 4, key_heads: int = 4, *, causal: bool = True, bias: bool = False) -> Dense:
    torch.manual_seed(0)
    made = Dense(heads, key_heads, causal=causal, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def union_of(dense: nn.Module, **config: object) -> UnionAttention:
    use = method("train.uoe")
    site = Site(path="attention", kind="attention", module=dense, dim=DIM, out=DIM)
    layer = use.build(site, use.configure(dict(config)), Shared())
    assert isinstance(layer, UnionAttention)
    with torch.no_grad():
        layer.router.weight.normal_(std=1.0)
        layer.router.bias.normal_(std=0.3)
    return layer


def x_of(rows: int = 2, width: int = 7) -> Tensor:
    return torch.randn(rows, width, DIM, generator=torch.Generator().manual_seed(3))


def routed(layer: UnionAttention, x: Tensor, **call: object) -> tuple[Tensor, Routing]:
    with session(collect=True) as opened:
        y, weights = layer(x, **call)
    assert weights is None
    routing = opened.take()[0].routings["attention"]
    assert routing is not None
    return y, routing


def turned(head: Tensor, angle: Tensor) -> Tensor:
    """A head [6] with its halves turned against each other by the angles [3]."""
    left, right = head[:3], head[3:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin])


def loop(dense: Dense, x: Tensor, routing: Routing, group: int, angles: Tensor | None = None) -> Tensor:
    """Head by head and query by query, from the tokens of each expert; angles [S, 3] at original positions."""
    width = x.shape[1]
    bias = torch.zeros(DIM) if dense.o_proj.bias is None else dense.o_proj.bias
    rows = [[bias for _ in range(width)] for _ in range(len(x))]
    for b in range(len(x)):
        for e in range(routing.num_experts):
            mine = {
                int(t) - b * width: w
                for t, i, w in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True)
                if i == e and b * width <= t < (b + 1) * width
            }
            for h in range(e * group, (e + 1) * group):
                kv = h // dense.readers
                parts = {}
                for t in sorted(mine):
                    q, k, v = (
                        p(x[b, t])[i * HEAD : (i + 1) * HEAD]
                        for p, i in ((dense.q_proj, h), (dense.k_proj, kv), (dense.v_proj, kv))
                    )
                    if angles is not None:
                        q, k = turned(q, angles[t]), turned(k, angles[t])
                    parts[t] = (q, k, v)
                for t in parts:
                    seen = [s for s in parts if s <= t or not dense.is_causal]
                    score = torch.stack([parts[t][0] @ parts[s][1] for s in seen]) * HEAD**-0.5
                    out = sum(a * parts[s][2] for a, s in zip(score.softmax(0), seen, strict=True))
                    rows[b][t] = rows[b][t] + mine[t] * (dense.o_proj.weight[:, h * HEAD : (h + 1) * HEAD] @ out)
    return torch.stack([torch.stack(row) for row in rows])


SHAPES = {
    "one head a slice": (4, 4, 1),
    "two heads a slice": (4, 4, 2),
    "slices share key heads": (4, 2, 1),
    "slices own key heads": (8, 4, 4),
    "one key head for all": (4, 1, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_all_heads_for_all_tokens_are_the_dense_attention(shape: str, causal: bool) -> None:
    heads, key_heads, group = SHAPES[shape]
    dense = dense_of(heads, key_heads, causal=causal, bias=True)
    layer = union_of(dense, heads_per_expert=group, top_k=heads // group)
    torch.testing.assert_close(layer(x_of())[0], dense(x_of()), atol=1e-5, rtol=1e-5)
    if not causal:
        kept = union_of(dense, heads_per_expert=group, mode="expert_choice", keep_ratio=1.0)
        torch.testing.assert_close(kept(x_of())[0], dense(x_of()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_equal_a_plain_loop(shape: str, causal: bool) -> None:
    heads, key_heads, group = SHAPES[shape]
    dense = dense_of(heads, key_heads, causal=causal, bias=True)
    layer = union_of(dense, heads_per_expert=group, top_k=1, combine="gate" if heads == 8 else "sum")
    x = x_of(2, 5)
    wish = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    y, routing = routed(layer, x)
    assert len(set(routing.expert_N.tolist())) > 1
    expected = loop(dense, x, routing, group)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    parameters = list(dense.parameters())
    ours, theirs = (torch.autograd.grad((z * wish).sum(), parameters, retain_graph=True) for z in (y, expected))
    for (name, _), one, two in zip(dense.named_parameters(), ours, theirs, strict=True):
        if name != "k_proj.bias":  # adds the same to all scores of a query
            assert two.abs().max() > 1e-3, name
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("combine", ["straight_through", "gate", "sum"])
def test_the_gate_learns_by_the_heads_answers(combine: str) -> None:
    dense = dense_of()
    layer = union_of(dense, top_k=2, combine=combine)
    x = x_of(1, 4)
    wish = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    y, routing = routed(layer, x)
    if combine == "straight_through":
        assert torch.equal(routing.weight_N, torch.ones(8))
    (y * wish).sum().backward()
    if combine == "sum":
        assert layer.router.weight.grad is None
        return
    g = (x[0] @ layer.router.weight.T + layer.router.bias).softmax(-1)
    objective = torch.zeros(())
    for n in range(8):
        alone = Routing(*(part[n : n + 1] for part in (routing.token_N, routing.expert_N)), torch.ones(1), 4, 4)
        t, e = int(alone.token_N), int(alone.expert_N)
        members = routing.expert_N == e
        whole = Routing(routing.token_N[members], routing.expert_N[members], torch.ones(int(members.sum())), 4, 4)
        answer = loop(dense, x, whole, 1)[0, t].detach()
        chosen = routing.expert_N[routing.token_N == t]
        objective = objective + 2 * g[t, e] / g[t, chosen].sum() * (answer @ wish[0, t])
    (expected,) = torch.autograd.grad(objective, layer.router.weight)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(layer.router.weight.grad, expected, atol=1e-4, rtol=1e-4)


def test_rotary_positions_are_those_of_the_sequence() -> None:
    dense = dense_of(4, 2)
    layer = union_of(dense, top_k=2)
    angles = torch.arange(7)[:, None] * torch.tensor([1.0, 0.3, 0.05])
    table = torch.cat([angles, angles], -1)[None]
    y, routing = routed(layer, x_of(), position_embeddings=(table.cos(), table.sin()))
    torch.testing.assert_close(y, loop(dense, x_of(), routing, 1, angles), atol=1e-5, rtol=1e-5)
    plain, _ = routed(layer, x_of())
    assert (y - plain).abs().max() > 0.05


def test_slices_are_views_and_the_attention_comes_back_bit_for_bit() -> None:
    dense = dense_of(8, 4, bias=True)
    before = {name: (value.clone(), value.data_ptr()) for name, value in dense.named_parameters()}
    layer = union_of(dense, heads_per_expert=4)
    for name, linear in layer.bank.linears.items():
        cut = [layer.bank.weight(i, name) for i in range(2)]
        assert {part.untyped_storage().data_ptr() for part in cut} == {linear.weight.untyped_storage().data_ptr()}
        assert torch.equal(torch.cat(cut, 1 if name == "output" else 0), linear.weight)
    assert set(layer.state_dict()) == {*dense.state_dict(), "router.weight", "router.bias"}
    assert recompose(layer) is dense
    for name, value in dense.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.data_ptr() == before[name][1]
    shared = union_of(dense_of(4, 2))
    assert torch.equal(shared.bank.weight(2, "key"), shared.bank.weight(3, "key"))
    assert torch.equal(shared.bank.weight(3, "key"), shared.bank.linears["key"].weight[HEAD:])


def test_shared_key_heads_are_computed_once_for_the_tokens_of_any_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = union_of(dense_of(4, 2), top_k=2), x_of(1, 9)
    rows: dict[str, int] = {}
    project = layer.bank.project

    def spy(name: str, rows_ND: Tensor, segments: object) -> Tensor:
        rows[name] = rows.get(name, 0) + len(rows_ND)
        return project(name, rows_ND, segments)

    monkeypatch.setattr(layer.bank, "project", spy)
    _, routing = routed(layer, x)
    units = {(int(t), int(e) // 2) for t, e in zip(routing.token_N, routing.expert_N, strict=True)}
    assert len(units) < 18, "some token is read by both heads of a key head"
    assert rows == {"query": 18, "output": 18, "key": len(units), "value": len(units)}


MODES = {
    "token_choice": {"top_k": 2},
    "expert_choice": {"mode": "expert_choice", "keep_ratio": 0.4},
    "sequence": {"mode": "sequence", "sequence_length": 7, "top_k": 1},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_alone_equals_its_row_in_a_batch_of_eight(mode: str) -> None:
    layer, x = union_of(dense_of(causal=False), **MODES[mode]), x_of(8)
    together = layer(x)[0]
    for row in range(8):
        torch.testing.assert_close(layer(x[row : row + 1])[0][0], together[row], atol=1e-5, rtol=1e-5)


def test_a_later_token_changes_nothing_before_it() -> None:
    layer, x = union_of(dense_of(4, 2)), x_of()
    other = x.clone()
    other[:, 4:] += 3.0
    before, after = layer(x)[0], layer(other)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-6, rtol=1e-6)
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 0.1


def test_a_token_without_heads_gets_the_output_bias_once() -> None:
    dense = dense_of(causal=False, bias=True)
    x = x_of(2, 12)
    y, routing = routed(union_of(dense, mode="expert_choice", keep_ratio=0.1), x)
    alone = [t for t in range(24) if t not in routing.token_N]
    assert alone
    assert torch.equal(y.flatten(0, 1)[alone], dense.o_proj.bias.expand(len(alone), -1))
    torch.testing.assert_close(y, loop(dense, x, routing, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["additive", "boolean"])
def test_a_mask_of_the_call_rules_over_the_order(kind: str) -> None:
    """A mask that hides key 2 from all others equals a loop over the tokens without it."""
    dense = dense_of()
    layer, x = union_of(dense, top_k=2), x_of(1, 6)
    see = torch.ones(6, 6).tril().bool()
    see[3:, 2] = False
    mask = see if kind == "boolean" else torch.zeros(6, 6).masked_fill(~see, torch.finfo(torch.float32).min)
    y, routing = routed(layer, x, attention_mask=mask[None, None])
    kept = routing.token_N != 2
    without = Routing(routing.token_N[kept], routing.expert_N[kept], routing.weight_N[kept], 6, 4)
    torch.testing.assert_close(y[:, 3:], loop(dense, x, without, 1)[:, 3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[:, :3], loop(dense, x, routing, 1)[:, :3], atol=1e-5, rtol=1e-5)
    with pytest.raises(ContextError, match=r"a mask \[B, 1, S, L\] is needed"):
        layer(x, attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize("hiding", [-1e4, -1e9, float("-inf")])
def test_whatever_hides_is_hidden_and_biases_are_refused(hiding: float) -> None:
    layer, x = union_of(dense_of(), top_k=2), x_of(1, 6)
    mask = torch.zeros(6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), hiding)[None, None]
    torch.testing.assert_close(layer(x, attention_mask=mask)[0], layer(x)[0])
    mask[0, 0, 4, 2] = -0.5
    with pytest.raises(ContextError, match=r"attention: the mask adds -0.5 to a score.*leave this attention dense"):
        layer(x, attention_mask=mask)


def test_a_query_that_may_see_nothing_sees_itself() -> None:
    dense = dense_of()
    layer, x = union_of(dense, top_k=4), x_of(1, 4)
    mask = torch.ones(4, 4).tril().bool()
    mask[1] = False
    alone = mask.clone()
    alone[1, 1] = True
    found, expected = (layer(x, attention_mask=m[None, None])[0] for m in (mask, alone))
    assert torch.equal(found, expected)
    torch.testing.assert_close(found[:, 1], dense(x[:, 1:2])[:, 0], atol=1e-5, rtol=1e-5)


def test_scores_are_scaled_as_in_the_dense_attention() -> None:
    """Scores twice as large are queries twice as large."""
    dense = dense_of()
    dense.scaling = 2 * HEAD**-0.5
    layer = union_of(dense, top_k=4)
    twice = dense_of()
    with torch.no_grad():
        twice.q_proj.weight *= 2
    torch.testing.assert_close(layer(x_of())[0], twice(x_of()), atol=1e-5, rtol=1e-5)
    assert (twice(x_of()) - dense_of()(x_of())).abs().max() > 0.1


def test_attention_weights_are_dropped_while_training_only() -> None:
    dense = dense_of(bias=True)
    dense.attention_dropout = 1.0
    layer, x = union_of(dense, top_k=4), x_of()
    torch.testing.assert_close(layer(x)[0], dense.o_proj.bias.expand_as(x), atol=0, rtol=0)
    torch.testing.assert_close(layer.eval()(x)[0], dense_of(bias=True)(x), atol=1e-5, rtol=1e-5)


def test_slices_weigh_their_own_rows_and_the_key_heads_they_read() -> None:
    layer = union_of(dense_of(4, 2, bias=True))
    query, unit = HEAD * (DIM + 1), HEAD * (DIM + 1)  # rows of a matrix and their bias
    assert [layer.bank.nbytes(i) for i in range(4)] == [4 * (query + 2 * unit + HEAD * DIM)] * 4


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_operations_of_a_run_are_those_of_the_formula(keep: float) -> None:
    """Equal numbers of tokens a head and no causal mask: kernels compute nothing that is not counted."""
    layer, x = union_of(dense_of(causal=False), mode="expert_choice", keep_ratio=keep), x_of(3, 8)
    with FlopCounterMode(display=False) as run, sdpa_kernel(SDPBackend.MATH):  # torch counts no fused one on a CPU
        layer(x)
    said = 24 * cost(layer, Work(8))
    assert run.get_total_flops() == said
    tokens, gate = keep * 8, 2 * 4 * DIM * 8
    assert said / 3 == 4 * (tokens * 4 * 2 * DIM * HEAD + 4 * HEAD * tokens**2) + gate


def test_causal_pairs_and_shared_key_heads_are_counted() -> None:
    layer = union_of(dense_of(4, 2), top_k=2)
    rows = RowCounter()
    with session(recorder=rows):
        layer(x_of(4, 8))
    per_token = rows.per_token()["attention"]
    held = [8 * share for share in per_token]
    pairs = sum(n * (n + 1) / 2 for n in held) / 8
    read = sum(1 - (1 - per_token[i]) * (1 - per_token[i + 1]) for i in (0, 2))
    matrix = 2 * DIM * HEAD
    expected = 2 * 2 * matrix + read * 2 * matrix + 4 * HEAD * pairs + 2 * 4 * DIM
    assert cost(layer, Work(8, rows={"attention": per_token})) == pytest.approx(expected, rel=1e-6)


def test_attentions_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads_per_expert=3 does not cut 4 heads evenly"):
        union_of(dense_of(), heads_per_expert=3)
    with pytest.raises(ConfigError, match="divide 3 or be a multiple of it"):
        union_of(dense_of(6, 2), heads_per_expert=2)
    with pytest.raises(ConfigError, match="num_slices=3, but heads_per_expert=1 makes 4"):
        union_of(dense_of(), num_slices=3)
    for mode in ("expert_choice", "sequence"):
        with pytest.raises(ConfigError, match="reads later tokens; a causal model needs token_choice"):
            union_of(dense_of(causal=True), **MODES[mode])
    with pytest.raises(ConfigError, match="position_ids='compacted' needs rotary positions"):
        union_of(dense_of(), position_ids="compacted")
