"""Pre-gated routers: whose input decides, what crosses layers and what does not, gradients, models, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoModelForCausalLM

import moestro
from moestro.core.bank import StackedFFN
from moestro.core.context import checkpoint_contexts, open_stack
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train.pre_gated import PreGated
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import DIM, build, context


PRE_GATED = method("train.pre_gated")
TOP1: dict[str, Any] = {"method": "train.softmax_topk", "config": {"top_k": 1, "renormalise": False}}
EXPERTS, DEPTH = 4, 4


class Stack(nn.Module):
    """Mixtures with residual connections, on given hidden states."""

    def __init__(
        self, *, replay: bool = False, depth: int = DEPTH, owners: tuple[int, ...] = (), **config: Any
    ) -> None:
        super().__init__()
        self.replay = replay
        layers = []
        for index in range(depth):
            place = Site(path=f"layers.{index}.mlp", kind="mlp", module=nn.Identity(), dim=DIM)
            settings = PRE_GATED.configure(
                {"num_experts": EXPERTS, "gate": TOP1, "own_gate": index in owners, **config}
            )
            layers.append(MoELayer(PRE_GATED.build(place, settings, Shared()), StackedFFN(EXPERTS, DIM, 5),
                                   site=place.path))  # fmt: skip
        self.layers = nn.ModuleList(layers)
        draw = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.45, generator=draw)
        open_stack(self, "model")

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for layer in self.layers:
            if self.replay:
                x = x + recompute(layer, x, use_reentrant=False, context_fn=checkpoint_contexts)
            else:
                x = x + layer(x)
        return x


def hidden(tokens: int = 6, rows: int = 2) -> Tensor:
    return torch.randn(rows, tokens, DIM, generator=torch.Generator().manual_seed(5))


def by_hand(stack: Stack, x: Tensor, distance: int, owners: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
    """The stack token by token: outputs, and the expert of each token in each layer."""
    seen: list[Tensor] = []
    chosen = []
    for index, layer in enumerate(stack.layers):
        flat = x.reshape(-1, DIM)
        seen.append(flat)
        read = flat if index < distance or index in owners else seen[index - distance]
        p = (read @ layer.router.tensor("weight").T).softmax(-1)
        expert = p.argmax(-1)
        rows = []
        for token in range(len(flat)):
            gate, up, down = (layer.bank.weight(int(expert[token]), name) for name in ("gate", "up", "down"))
            y = down @ (nn.functional.silu(gate @ flat[token]) * (up @ flat[token]))
            rows.append(p[token, expert[token]] * y)
        x = x + torch.stack(rows).view_as(x)
        chosen.append(expert)
    return x, chosen


@pytest.mark.parametrize("owners", [(), (2,), (3,)])
@pytest.mark.parametrize("distance", [0, 1, 2, 3])
def test_outputs_choices_and_gradients_are_those_of_a_plain_loop(distance: int, owners: tuple[int, ...]) -> None:
    stack, x = Stack(distance=distance, owners=owners), hidden()
    with session(collect=True) as opened:
        out = stack(inputs_embeds=x)
    (ctx,) = opened.take()
    out.square().sum().backward()
    ours = {name: p.grad.clone() for name, p in stack.named_parameters()}
    stack.zero_grad()
    expected, chosen = by_hand(stack, x, distance, owners)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for index, expert in enumerate(chosen):
        assert ctx.routings[f"layers.{index}.mlp"].expert_TK[:, 0].tolist() == expert.tolist()
    expected.square().sum().backward()
    for name, parameter in stack.named_parameters():
        assert bool(parameter.grad.any()), name
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_distances_differ() -> None:
    outs = [Stack(distance=d)(inputs_embeds=hidden()) for d in range(DEPTH)]
    for index, one in enumerate(outs):
        for other in outs[index + 1 :]:
            assert float((one - other).abs().max().detach()) > 1e-2


def test_the_last_inputs_reach_no_gate() -> None:
    """No gate belongs to the last block's input: the choices of all blocks are made before it."""
    stack = Stack(distance=1)
    last = stack.layers[-1]
    with session(collect=True) as opened:
        stack(inputs_embeds=hidden())
        with torch.no_grad():
            stack.layers[-2].bank.down_proj.mul_(-3)  # changes the last block's input and nothing before
        stack(inputs_embeds=hidden())
    before, after = (ctx.routings[last.site] for ctx in opened.take())
    assert torch.equal(before.expert_N, after.expert_N)
    assert torch.equal(before.weight_N, after.weight_N)


def test_replay_gives_the_same_gradients_and_one_write_a_slot() -> None:
    found = []
    for replay in (False, True):
        stack = Stack(distance=2, replay=replay)
        x = hidden().requires_grad_()
        stack(inputs_embeds=x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in stack.parameters())])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_nothing_crosses_forwards() -> None:
    stack = Stack(distance=2)
    first = stack(inputs_embeds=hidden())
    stack(inputs_embeds=hidden() * 2 + 1)
    assert torch.equal(stack(inputs_embeds=hidden()), first)
    assert not [name for name, _ in stack.named_buffers()]
    assert all(not isinstance(value, Tensor) for layer in stack.layers for value in vars(layer.router).values())


def test_only_the_inputs_that_are_still_read_are_kept() -> None:
    routers = [layer.router for layer in Stack(distance=2).layers]
    ctx = context(1, 6)
    for router in routers:
        router.score(hidden(6, 1)[0], None, ctx)
        assert len(ctx.get(router.site, "pre_gated_inputs").inputs) <= 2


def test_a_gradient_reaches_the_gate_through_top_1_weights_unless_they_are_renormalised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    live = Stack(distance=1)
    live(inputs_embeds=hidden()).square().sum().backward()
    assert not caplog.records
    dead = {"method": "train.softmax_topk", "config": {"top_k": 1, "renormalise": True}}
    stack = Stack(distance=1, gate=dead)
    assert "no gradient" in caplog.text
    stack(inputs_embeds=hidden()).square().sum().backward()
    found, other = (one.layers[2].router.gate.weight.grad.abs().max() for one in (stack, live))
    assert found < 1e-6 * other, "what is left is rounding"


def test_biases_of_another_gate_move_with_it() -> None:
    """DeepSeek-V3's selection bias and its step stand with the experts that it balances."""
    gate = {"method": "train.sigmoid_bias", "config": {"top_k": 2}}
    router = build("train.pre_gated", num_experts=EXPERTS, gate=gate)
    assert isinstance(router, PreGated)
    assert router.top_k == 2
    assert set(router.choice_rows) == {"weight", "bias", "selection_bias"}
    assert router.tensor("selection_bias") is router.gate.selection_bias
    before = router.gate.selection_bias.clone()
    router.after_step(torch.tensor([10, 0, 0, 0]))
    assert router.gate.selection_bias[0] < before[0]
    assert router.gate.selection_bias[1] > before[1]


def test_one_gate_a_mixture_and_no_more_parameters_than_its_own() -> None:
    assert (
        sum(p.numel() for layer in Stack(distance=2).layers for p in layer.router.parameters()) == DEPTH * EXPERTS * DIM
    )


def test_what_a_gate_is_shows_through() -> None:
    """Null experts, what they leave to compute, who is causal, and how experts weigh when others are dropped."""
    nulls = build("train.pre_gated", gate={"method": "train.adamoe", "config": {"top_k": 3, "num_null": 4}})
    assert isinstance(nulls, PreGated)
    assert (nulls.top_k, nulls.num_null) == (3, 4)
    assert nulls.real_per_token(9) == nulls.gate.real_per_token(9) != 3
    chosen = build("train.pre_gated", gate={"method": "train.expert_choice"})
    assert isinstance(chosen, PreGated)
    assert not chosen.gate.causal
    assert not chosen.causal
    assert chosen.real_per_token(64) == chosen.gate.real_per_token(64)
    assert chosen.gate.real_per_token(64) is not None
    router = build("train.pre_gated", gate={"method": "train.softmax_topk", "config": {"top_k": 2}})
    assert isinstance(router, PreGated)
    assert router.causal
    left = torch.tensor([[0.3, 0.0], [0.2, 0.6]])
    torch.testing.assert_close(router.weigh(left), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


# -- models ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, **changes: Any) -> Any:
    """A tiny Llama with pre-gated mixtures, saved and opened again by Transformers' own class."""
    model = tiny_model("llama", num_hidden_layers=3, **changes)
    adopt(model)
    router = {"method": "train.pre_gated", "config": {"gate": TOP1}}
    swap(model, "train.moe", {"num_experts": EXPERTS, "router": router, "expert_size": 16})
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "bank" in name or "router" in name:
                parameter.normal_(0, 0.3, generator=draw)
    moestro.save(model, folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 97, (2, 7), generator=draw)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    return again.eval()


def test_generation_with_a_cache_is_that_without(tmp_path: Path) -> None:
    model = trained(tmp_path / "m")
    ids = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(2))
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    whole = model(input_ids=cached).logits[0, 5:-1]
    assert whole.argmax(-1).tolist() == cached[0, 6:].tolist()


def test_padding_changes_nothing(tmp_path: Path) -> None:
    model = trained(tmp_path / "m")
    ids = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    got = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_bfloat16_scores_in_float32_and_one_token_runs(tmp_path: Path) -> None:
    model = trained(tmp_path / "m").bfloat16()
    with session(collect=True) as opened:
        assert torch.isfinite(model(input_ids=torch.tensor([[5]])).logits).all()
    for routing in opened.take()[0].routings.values():
        assert routing.scores.logits_TC.dtype == torch.float32


# -- what is refused ------------------------------------------------------------------------------------------------


def test_a_distance_that_leaves_nothing_ahead_is_refused() -> None:
    with pytest.raises(ContextError, match=r"distance=4 in a stack of 4 mixtures.*at most 3"):
        Stack(distance=4)(inputs_embeds=hidden())


def test_two_distances_in_a_stack_are_refused() -> None:
    stack = Stack(distance=1)
    stack.layers[2].router.distance = 2
    with pytest.raises(ContextError, match="distance=2, but the mixture before has 1"):
        stack(inputs_embeds=hidden())


def test_other_tokens_are_refused() -> None:
    routers = [layer.router for layer in Stack(distance=1).layers]
    ctx = context(2, 3)
    routers[0].score(hidden(6, 1)[0], None, ctx)
    with ctx.subset(torch.tensor([0, 1, 4])), pytest.raises(ContextError, match=r"3 tokens arrive.*had 6"):
        routers[1].score(hidden(3, 1)[0], None, ctx)
    with ctx.subset(torch.arange(5, -1, -1)), pytest.raises(ContextError, match="must pass all"):
        routers[1].score(hidden(6, 1)[0], None, ctx)
    with ctx.subset(torch.tensor([0, 2, 1, 3, 4, 5])), pytest.raises(ContextError, match="must pass all"):
        routers[1].score(hidden(6, 1)[0], None, ctx)  # the same rows, two of their tokens the other way round


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": {"method": "train.pre_gated"}}, "a pre-gated router around another"),
        ({"gate": {"method": "train.balance_loss"}}, "builds no router"),
        (
            {"gate": {"method": "train.softmax_topk", "config": {"num_experts": 3}}},
            "num_experts=3, but the layer has 8",
        ),
        ({"distance": -1}, "distance"),
        ({"gate": {"method": "train.read_me", "config": {"vocabulary": 20}}}, "an objective of its own"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("train.pre_gated", **settings)
