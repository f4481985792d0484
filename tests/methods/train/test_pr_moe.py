"""The pyramid-residual mixture: two branches, how they join, and expert counts that grow with depth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train.pr_moe import LearnedMix, mix, pyramid
from moestro.models.swap import state_of, swap
from moestro.testing.tiny import tiny_folder
from tests.methods.train.helpers import DIM, build


COUNTS = [3, 6]


def spread(layer: nn.Module, std: float = 0.5) -> Any:
    """Random weights large enough for experts to differ and routers to disagree."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=std, generator=generator)
    return layer


def made(**config: Any) -> MoELayer:
    layer = spread(build("train.pr_moe", **{"num_experts": 4, "expert_size": 5, **config}))
    assert isinstance(layer, MoELayer)
    return layer


def ffn(bank: Any, expert: int, row_D: Tensor) -> Tensor:
    gate, up = bank.weight(expert, "gate") @ row_D, bank.weight(expert, "up") @ row_D
    return bank.weight(expert, "down") @ (nn.functional.silu(gate) * up)


def by_hand(layer: Any, x_TD: Tensor, residual: str) -> Tensor:
    """The formula, token by token."""
    rows = []
    for row_D in x_TD:
        probability = (layer.router.weight @ row_D).softmax(0)
        expert = int(probability.argmax())
        routed = probability[expert] * ffn(layer.bank, expert, row_D)
        if residual == "none":
            rows.append(routed)
            continue
        dense = ffn(layer.shared.bank, 0, row_D)
        first, second = 1.0, 1.0
        if residual == "learned":
            first, second = (layer.combine.weight @ row_D + layer.combine.bias).softmax(0)
        rows.append(first * routed + second * dense)
    return torch.stack(rows)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(9, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("residual", ["learned", "sum", "none"])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(residual: str, x: Tensor) -> None:
    layer = made(residual=residual).double()
    leaf = x.double().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    y, expected = layer(leaf), by_hand(layer, leaf, residual)
    # Routers and mixes compute in float32 whatever the model's type.
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_sum_with_silent_experts_is_the_fixed_branch(x: Tensor) -> None:
    layer = made(residual="sum")
    with torch.no_grad():
        layer.bank.down_proj.zero_()
    assert torch.equal(layer(x), layer.shared(x))


def test_learned_shares_are_a_convex_pair(x: Tensor) -> None:
    """With branches of ones and zeros the mix gives the shares themselves."""
    layer = made()
    one, zero = torch.ones(9, DIM), torch.zeros(9, DIM)
    logits = x @ layer.combine.weight.T + layer.combine.bias
    routed, dense = mix(one, zero, logits), mix(zero, one, logits)
    assert ((routed > 0) & (routed < 1) & (dense > 0) & (dense < 1)).all()
    torch.testing.assert_close(routed + dense, one, atol=1e-6, rtol=0)
    # Logits 0 and ln 3: shares 1/4 and 3/4.
    mixed = mix(torch.tensor([[8.0]]), torch.tensor([[4.0]]), torch.tensor([[1.0, 3.0]]).log())
    assert mixed.item() == pytest.approx(8 / 4 + 3)
    assert (routed.std(0) > 0.05).all(), "the shares are a token's own"


def test_shares_are_computed_in_float32_of_a_narrower_model(x: Tensor) -> None:
    combine, narrow = made().combine.bfloat16(), x.bfloat16()
    logits = narrow.float() @ combine.weight.float().T + combine.bias.float()
    assert not torch.equal(logits, logits.bfloat16().float())
    one, zero = torch.ones_like(narrow), torch.zeros_like(narrow)
    found = combine(one, zero, narrow, None)
    assert torch.equal(found, logits.softmax(-1)[:, :1].bfloat16().expand_as(found))


def test_by_default_balance_is_asked_of_the_whole_batch() -> None:
    """Each of two rows asks one expert only: the batch is in balance, no row is."""
    layer = made(num_experts=2)
    with torch.no_grad():
        layer.router.weight.copy_(100 * torch.eye(2, DIM))
    rows = torch.eye(2, DIM)[:, None].expand(2, 3, DIM)
    with session(collect=True) as opened:
        layer(rows)
        (ctx,) = opened.take()
    assert {name: term.total.item() for name, term in ctx.losses.items()} == {
        ("block.mlp", "balance"): pytest.approx(1.0)
    }


def test_with_one_expert_that_equals_the_fixed_branch_any_mix_is_that_branch(x: Tensor) -> None:
    """One expert has p = 1, and c_0 + c_1 = 1: the layer as it is built is the feed-forward."""
    layer = build("train.pr_moe", num_experts=1, expert_size=5)
    assert layer.shared(x).abs().max() > 0
    torch.testing.assert_close(layer(x), layer.shared(x), atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        layer.combine.bias.copy_(torch.tensor([5.0, -1.0]))
    torch.testing.assert_close(layer(x), layer.shared(x), atol=1e-6, rtol=1e-6)


def test_one_expert_alone_is_a_dense_layer_with_gate_one(x: Tensor) -> None:
    layer = made(num_experts=1, residual="none")
    assert layer.shared is None
    torch.testing.assert_close(layer(x), torch.stack([ffn(layer.bank, 0, row) for row in x]), atol=1e-5, rtol=1e-5)


def test_experts_and_fixed_branch_start_as_copies_and_part_by_routing(x: Tensor) -> None:
    layer = build("train.pr_moe", num_experts=3, expert_size=5, residual="sum", gated=False, activation="relu")
    for name, parameter in layer.bank.named_parameters():
        own = layer.shared.bank.get_parameter(name)[0]
        assert own.std() > 0.005
        assert all(torch.equal(expert, own) for expert in parameter), name
    with torch.no_grad():
        layer.router.weight.normal_()
        for parameter in (*layer.bank.parameters(), *layer.shared.parameters()):
            parameter.mul_(20)
    layer(x).square().sum().backward()
    first, second = layer.bank.down_proj.grad[:2]
    assert first.abs().max() > 0
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("residual", ["learned", "sum"])
def test_a_dropped_token_keeps_its_share_of_the_fixed_branch(residual: str, x: Tensor) -> None:
    layer = made(
        residual=residual, num_experts=2, router={"method": "train.switch", "config": {"capacity": 2}}, losses={}
    )
    with torch.no_grad():
        layer.router.weight.zero_()  # a tie: every token asks expert 0
    y = layer(x[None])[0]
    dense = layer.shared(x)
    share = (x @ layer.combine.weight.T + layer.combine.bias).softmax(-1)[:, 1:] if residual == "learned" else 1.0
    torch.testing.assert_close(y[2:], (share * dense)[2:], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(y[:2], (share * dense)[:2], atol=1e-3)
    if residual == "learned":
        assert not torch.allclose(y[2:], dense[2:], atol=1e-3)


def test_without_a_residual_and_with_two_experts_it_is_the_plain_mixture(x: Tensor) -> None:
    two = {"method": "train.softmax_topk", "config": {"top_k": 2, "renormalise": True}}
    layer = made(residual="none", router=two)
    probability = (x @ layer.router.weight.T).softmax(-1)
    best = probability.topk(2)
    weight = best.values / best.values.sum(-1, keepdim=True)
    expected = torch.stack(
        [sum(weight[t, k] * ffn(layer.bank, int(best.indices[t, k]), x[t]) for k in range(2)) for t in range(len(x))]
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_the_pyramid_of_the_paper() -> None:
    assert pyramid(32, 12) == [32] * 10 + [64] * 2
    assert pyramid(64, 12) == [64] * 10 + [128] * 2
    assert pyramid(4, 2, wide=1) == [4, 8]
    assert pyramid(5, 3, wide=3, factor=4) == [20, 20, 20]
    for wrong in ({"wide": 4}, {"wide": -1}, {"factor": 0}):
        with pytest.raises(ConfigError, match=r"no pyramid of 4 experts in 3 layers"):
            pyramid(4, 3, **wrong)


def test_parameters_are_counted_by_hand() -> None:
    """E (3 D I) experts, one more for the fixed branch, E D of the router, 2 D + 2 of the mix."""

    def count(**config: Any) -> int:
        return sum(p.numel() for p in build("train.pr_moe", num_experts=4, expert_size=5, **config).parameters())

    expert = 3 * DIM * 5
    assert count(residual="none") == 4 * expert + 4 * DIM
    assert count(residual="sum") == 5 * expert + 4 * DIM
    assert count(residual="learned") == 5 * expert + 4 * DIM + 2 * DIM + 2
    assert count(residual="sum", bias=True) == 5 * (expert + 2 * 5 + DIM) + 4 * DIM


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"residual": "mean"}, "residual='mean'"),
        ({"expert_size": 0}, "expert_size=0"),
        ({"num_experts": [2, 4]}, "num_experts="),
        ({"experts": 3}, "did you mean 'num_experts'"),
        ({"router": {"method": "train.z_loss"}}, "builds no router"),
        ({"num_experts": 2, "router": {"method": "train.softmax_topk", "config": {"top_k": 3}}}, "top_k=3"),
        ({"losses": {"x": {"method": "train.switch"}}}, "builds no routing loss"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("train.pr_moe", **{"expert_size": 5, **config})


def test_sites_that_do_not_fit_are_refused(x: Tensor) -> None:
    use = method("train.pr_moe")
    wide = Site(path="a.mlp", kind="mlp", module=nn.Identity(), dim=DIM, out=DIM + 1)
    with pytest.raises(ConfigError, match=r"a\.mlp: 6 in, 7 out"):
        use.build(wide, use.configure({"expert_size": 5}), Shared())
    layer = made()
    layer.shared = None
    with pytest.raises(ConfigError, match="lost its fixed one"):
        layer(x)


# -- in a model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Any:
    tiny_folder("llama", tmp_path / "plain")
    opened = moestro.load(tmp_path / "plain")
    swap(opened, "train.pr_moe", {"num_experts": {"per_layer": COUNTS}})
    for layer in mixture_layers(opened).values():
        spread(layer, 0.3)
    return opened.eval()


IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))


def test_one_count_a_layer_and_a_list_of_another_length_is_refused(model: Any, tmp_path: Path) -> None:
    assert [layer.bank.num_experts for layer in mixture_layers(model).values()] == COUNTS
    plain = moestro.load(tmp_path / "plain")
    with pytest.raises(ConfigError, match="num_experts lists 3 values per layer for 2 sites"):
        swap(plain, "train.pr_moe", {"num_experts": {"per_layer": [3, 3, 6]}})


def test_saved_and_opened_again_it_is_the_same_model(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        before = model(IDS).logits
        moestro.save(model, tmp_path / "saved")
        again = moestro.load(tmp_path / "saved")
        assert [layer.router.num_experts for layer in mixture_layers(again).values()] == COUNTS
        assert all(isinstance(layer.combine, LearnedMix) for layer in mixture_layers(again).values())
        assert state_of(again).swaps == state_of(model).swaps
        assert (again(IDS).logits - before).abs().max() <= 1e-6


def test_generation_with_a_cache_and_from_padded_prompts(model: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached, whole = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, whole)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
        mask = (torch.arange(10) >= 3).long().expand(2, -1)
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        assert (beside[:, 3:] - model(IDS).logits).abs().max() <= 1e-5
        assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 10:], cached[:, 7:])


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    with session(collect=True) as opened:
        loss = model.train()(IDS, labels=IDS).loss
        loss = loss + sum(term.total for ctx in opened.take() for term in ctx.losses.values())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_backward_gives_the_same_bits(model: Any) -> None:
    plain = gradients(model)
    moestro.checkpoint(model)
    replayed = gradients(model)
    assert plain.keys() == replayed.keys()
    assert {name for name in plain if "combine" in name} == {
        f"model.layers.{layer}.mlp.combine.{part}" for layer in (0, 1) for part in ("weight", "bias")
    }
    for name, gradient in plain.items():
        assert torch.equal(gradient, replayed[name]), name


def test_a_compiled_base_model_gives_the_same(model: Any) -> None:
    with torch.no_grad():
        compiled = torch.compile(model.model, backend="eager")(IDS).last_hidden_state
        torch.testing.assert_close(compiled, model.model(IDS).last_hidden_state, atol=1e-6, rtol=1e-6)
