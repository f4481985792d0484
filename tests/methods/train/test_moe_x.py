"""MoE-X: scores against pre-activations, the wide layer, ties, what is remembered, models."""

import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro import surgery
from moestro.core.bank import HeterogeneousBank, StackedFFN
from moestro.core.errors import ConfigError, NonFiniteError
from moestro.core.inputs import PlanInputs
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.train import moe_x
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.surgery import plans
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import DIM, Shared, build, context, site
from tests.surgery.helpers import ids, layers_of, logits


INNER = 5


def bank_of(experts: int = 4, dim: int = DIM, inner: int = INNER, **form: Any) -> StackedFFN:
    """Random ReLU experts."""
    torch.manual_seed(2)
    bank = StackedFFN(experts, dim, inner, **{"activation": "relu", "gated": False, **form})
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.7)
    return bank


def layer_of(experts: int = 4, top_k: int = 2, bias: bool = True, **config: Any) -> MoELayer:
    """The whole layer with random weights."""
    made = build("train.moe_x", num_experts=experts, top_k=top_k, expert_size=INNER, bias=bias, **config)
    assert isinstance(made, MoELayer)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.7)
    return made


def rows(count: int = 7, dim: int = DIM, seed: int = 5) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def scores_of(router: nn.Module, bank: nn.Module, x_TD: Tensor) -> Tensor:
    logits_TC: Tensor = router.score(x_TD, bank, context(1, len(x_TD))).logits_TC
    return logits_TC


def pre_activations(bank: StackedFFN, x_TD: Tensor) -> Tensor:
    """[T, E, I]."""
    bias = 0.0 if bank.up_bias is None else bank.up_bias
    return torch.einsum("td,eid->tei", x_TD, bank.up_proj) + bias


def reference(layer: MoELayer, x_TD: Tensor, eps: float = 1e-6) -> Tensor:
    """Token by token, expert by expert, unit by unit, with torch's own moments."""
    up, down, bias, out = (getattr(layer.bank, n) for n in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias"))
    result = []
    for x in x_TD:
        score = []
        for expert in range(len(up)):
            mean = up[expert].mean(0) @ x + bias[expert].mean()
            variance = up[expert].var(0, correction=0) @ x.square() + bias[expert].var(correction=0)
            score.append(-torch.erf(mean / (math.sqrt(2) * torch.sqrt(variance + eps))))
        table = torch.stack(score)
        ranked = table.tolist()
        chosen = sorted(range(len(up)), key=lambda e: (-ranked[e], e))[: layer.router.top_k]
        weight = table[chosen].exp() / table[chosen].exp().sum()
        parts = [w * (down[e] @ (up[e] @ x + bias[e]).relu() + out[e]) for w, e in zip(weight, chosen, strict=True)]
        result.append(torch.stack(parts).sum(0))
    return torch.stack(result)


# -- the score ----------------------------------------------------------------------------------------------------


def test_a_score_by_hand() -> None:
    """Rows (1, 0) and (3, 2): mu = (2, 1), v = (1, 1). x = (1, -1): m = 1, s^2 = 2. Biases 1 and -1 add variance 1."""
    rows_EID = torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])
    x = torch.tensor([[1.0, -1.0]])
    plain = moe_x.sparsity_scores(x, moe_x.moments(rows_EID), 1e-9)
    assert plain.item() == pytest.approx(-math.erf(1 / math.sqrt(2 * 2)), abs=1e-6)
    biased = moe_x.sparsity_scores(x, moe_x.moments(rows_EID, torch.tensor([[1.0, -1.0]])), 1e-9)
    assert biased.item() == pytest.approx(-math.erf(1 / math.sqrt(2 * 3)), abs=1e-6)
    moved = moe_x.sparsity_scores(x, moe_x.moments(rows_EID, torch.tensor([[0.5, 0.5]])), eps=1.0)
    assert moved.item() == pytest.approx(-math.erf(1.5 / math.sqrt(2 * (2 + 1))), abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_mean_is_the_mean_of_the_pre_activations(bias: bool) -> None:
    bank = bank_of(bias=bias)
    found = moe_x.moments_of(bank)
    mean_TE = rows() @ found.mean_ED.T + found.mean_E
    torch.testing.assert_close(mean_TE, pre_activations(bank, rows()).mean(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_along_one_coordinate_the_variance_is_exact_too(bias: bool) -> None:
    """A one-hot token meets no correlation between coordinates, but with biases the one between row and bias."""
    bank = bank_of(inner=4000, bias=bias)
    found = moe_x.moments_of(bank)
    x = 1.5 * torch.eye(DIM)
    variance_TE = x.square() @ found.variance_ED.T + found.variance_E
    exact = pre_activations(bank, x).var(-1, correction=0)
    torch.testing.assert_close(variance_TE, exact, atol=0.1 if bias else 1e-5, rtol=0)
    torch.testing.assert_close(found.variance_ED, bank.up_proj.var(1, correction=0), atol=1e-6, rtol=1e-5)


def test_the_expected_share_of_active_units_is_the_measured_one() -> None:
    torch.manual_seed(0)
    bank = bank_of(experts=3, dim=32, inner=4096)
    with torch.no_grad():
        bank.up_proj.normal_(std=0.3).add_(torch.tensor([-0.05, 0.0, 0.08]).view(3, 1, 1))
    x = rows(20, 32).abs()
    score_TE = scores_of(build("train.moe_x", num_experts=3), bank, x)
    measured_TE = (pre_activations(bank, x) > 0).float().mean(-1)
    assert measured_TE.min() < 0.35
    assert measured_TE.max() > 0.65
    torch.testing.assert_close((1 - score_TE) / 2, measured_TE, atol=0.02, rtol=0)


@pytest.mark.parametrize("factor", [0.2, 3.0, 40.0])
def test_scaling_an_expert_leaves_its_score(factor: float) -> None:
    router, bank = build("train.moe_x", num_experts=4), bank_of(bias=True)
    before = scores_of(router, bank, rows())
    with torch.no_grad():
        bank.up_proj[1] *= factor
        bank.up_bias[1] *= factor
    torch.testing.assert_close(scores_of(router, bank, rows()), before, atol=2e-5, rtol=0)


def test_negating_an_expert_flips_its_score_and_no_other() -> None:
    router, bank = build("train.moe_x", num_experts=4), bank_of(bias=True)
    before = scores_of(router, bank, rows())
    with torch.no_grad():
        bank.up_proj[2] *= -1
        bank.up_bias[2] *= -1
    assert before.abs().min() > 1e-4
    torch.testing.assert_close(scores_of(router, bank, rows()), before * torch.tensor([1, 1, -1, 1]), atol=1e-6, rtol=0)


def test_a_token_of_zeros_scores_zero_and_goes_to_the_first() -> None:
    router = build("train.moe_x", num_experts=4)
    ctx = context(1, 1)
    scores = router.score(torch.zeros(1, DIM), bank_of(), ctx)
    assert torch.equal(scores.logits_TC, torch.zeros(1, 4))
    routing = router.choose(scores, ctx)
    assert routing.expert_TK.tolist() == [[0, 1]]
    assert routing.weight_TK.tolist() == [[0.5, 0.5]]


def test_the_sparsest_experts_are_chosen_and_weighed_by_a_bounded_softmax() -> None:
    """Expert e has the mean row c_e (1, 0, ...): for x = e_1 the lower the mean, the sparser the expert."""
    bank = bank_of(experts=3, inner=64)
    with torch.no_grad():
        bank.up_proj.sub_(bank.up_proj.mean(1, keepdim=True))
        bank.up_proj[:, :, 0] += torch.tensor([50.0, -50.0, 0.0])[:, None]
    router = build("train.moe_x", num_experts=3)
    ctx = context(1, 1)
    routing = router.choose(router.score(torch.eye(DIM)[:1], bank, ctx), ctx)
    assert routing.expert_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[1.0, 0.0]]).softmax(-1), atol=1e-5, rtol=0)
    far = router.weigh(torch.tensor([[1.0, -1.0]]))
    assert far[0].tolist() == pytest.approx([0.8808, 0.1192], abs=1e-4)  # no chosen expert can be shut out


def test_gated_experts_are_scored_by_their_gate() -> None:
    gated = bank_of(gated=True, bias=True)
    plain = bank_of(bias=True)
    with torch.no_grad():
        plain.up_proj.copy_(gated.stacked("gate"))
        plain.up_bias.copy_(gated.up_bias[:, :INNER])
    router = build("train.moe_x", num_experts=4)
    assert torch.equal(scores_of(router, gated, rows()), scores_of(router, plain, rows()))


def test_experts_of_other_banks_are_read_one_by_one() -> None:
    narrow, wide = bank_of(2, bias=True), bank_of(1, inner=9)
    router = build("train.moe_x", num_experts=3)
    together = scores_of(router, HeterogeneousBank([narrow, wide]), rows())
    apart = [moe_x.sparsity_scores(rows(), moe_x.moments_of(bank), 1e-6) for bank in (narrow, wide)]
    torch.testing.assert_close(together, torch.cat(apart, 1))

    class Listed(nn.Module):
        num_experts = 2
        projections = ("up", "down")

        def weight(self, expert: int, projection: str) -> Tensor:
            return wide.weight(0, projection) if expert else narrow.weight(1, projection)

    found = moe_x.moments_of(Listed())  # type: ignore[arg-type]
    torch.testing.assert_close(found.mean_ED[0], narrow.up_proj[1].mean(0))
    torch.testing.assert_close(found.variance_ED[1], wide.up_proj[0].var(0, correction=0))


def test_small_bfloat16_weights_keep_their_variance() -> None:
    """Squares of 1e-3 with a mean of 0.1 drown in bfloat16; the moments are taken in float32."""
    bank = bank_of(experts=2, inner=512)
    with torch.no_grad():
        bank.up_proj.mul_(1e-2).add_(0.01)
    bank = bank.to(torch.bfloat16)
    found = moe_x.moments_of(bank)
    assert found.variance_ED.dtype == torch.float32
    exact = bank.up_proj.double().var(1, correction=0)
    torch.testing.assert_close(found.variance_ED.double(), exact, rtol=1e-4, atol=0)
    router = build("train.moe_x", num_experts=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = scores_of(router, bank, rows().bfloat16())
    assert torch.equal(under, scores_of(router, bank, rows().bfloat16()))


# -- gradients ----------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_moments() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(moe_x.RowMoments.apply, torch.randn(3, 4, 2).double().requires_grad_())


def test_outputs_and_gradients_of_a_plain_loop() -> None:
    """Routing gradients reach the experts' first matrix through the scores of chosen experts."""
    layer = layer_of()
    x = rows(9).requires_grad_()
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(layer(x[None])[0], reference(layer, x), atol=1e-5, rtol=1e-5)
    mine = torch.autograd.grad(layer(x[None])[0].square().sum(), leaves)
    theirs = torch.autograd.grad(reference(layer, x).square().sum(), leaves)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-4)


def test_detached_statistics_keep_routing_gradients_from_the_experts_only() -> None:
    found = {}
    for detach in (False, True):
        router, bank = build("train.moe_x", num_experts=4, detach_stats=detach), bank_of()
        x = rows().requires_grad_()
        scores_of(router, bank, x)[:, 0].sum().backward()
        found[detach] = (x.grad, bank.up_proj.grad)
    torch.testing.assert_close(found[True][0], found[False][0])
    assert found[True][1] is None
    assert found[False][1][0].abs().min() > 0
    assert torch.equal(found[False][1][1:], torch.zeros(3, INNER, DIM))
    assert torch.equal(layer_of(detach_stats=True)(rows()[None]), layer_of()(rows()[None]))
    assert layer_of(detach_stats=True).router.config.detach_stats


# -- the layer ----------------------------------------------------------------------------------------------------


def test_the_layer_is_one_wide_layer_with_a_block_sparse_code() -> None:
    layer = layer_of(bias=False)
    x = rows(12)
    with session(collect=True) as opened:
        y = layer(x[None])[0]
        (ctx,) = opened.take()
    routing = ctx.routings[layer.site]
    weight_TE = torch.zeros(12, 4).index_put((routing.token_N, routing.expert_N), routing.weight_N)
    wide = layer.bank.up_proj.reshape(4 * INNER, DIM)
    code_TF = weight_TE.repeat_interleave(INNER, 1) * (x @ wide.T).relu()
    down = layer.bank.down_proj.permute(1, 0, 2).reshape(DIM, 4 * INNER)
    torch.testing.assert_close(y, code_TF @ down.T, atol=1e-5, rtol=0)
    blocks = code_TF.view(12, 4, INNER)
    assert torch.equal(blocks[weight_TE == 0], torch.zeros(24, INNER))  # exactly 0, not small
    assert (blocks[weight_TE > 0] > 0).any(-1).float().mean() > 0.5
    assert layer.bank.activation == "relu"
    assert not layer.bank.gated


def test_all_of_equal_experts_are_the_dense_layer() -> None:
    layer = layer_of(experts=3, top_k=3)
    with torch.no_grad():
        for parameter in layer.bank.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    bank, x = layer.bank, rows()
    dense = (x @ bank.up_proj[0].T + bank.up_bias[0]).relu() @ bank.down_proj[0].T + bank.down_proj_bias[0]
    torch.testing.assert_close(layer(x[None])[0], dense, atol=1e-5, rtol=0)


def test_the_layer_carries_a_balance_loss_unless_told_otherwise() -> None:
    assert layer_of().losses["balance"].config.scope == "batch"
    assert not layer_of(losses={}).losses
    other = layer_of(losses={"even": {"method": "train.balance_loss", "config": {"scope": "sequence"}}})
    assert list(other.losses) == ["even"]
    assert list(layer_of().router.state_dict()) == []


# -- ties, and what is remembered ---------------------------------------------------------------------------------


def upcycled(noise: float) -> Any:
    model = tiny_model("llama")
    use = method("convert.upcycle")
    config = use.configure({"noise": noise, "router": {"method": "train.moe_x"}})
    surgery.apply(model, use.plan(PlanInputs(subject=OpenModel(model), seed=0), config))
    return model


def used_while_training(model: Any, steps: int) -> Tensor:
    """Assignments to each expert of the first layer over some steps of training."""
    optimizer, count = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.zeros(8, dtype=torch.int64)
    for step in range(steps):
        batch = ids(2, 12, seed=step)
        with session(collect=True) as opened:
            model(input_ids=batch, labels=batch).loss.backward()
            for ctx in opened.take():
                count += next(iter(ctx.routings.values())).counts_C()
        optimizer.step()
        optimizer.zero_grad()
    return count


def test_copies_told_apart_by_noise_are_used() -> None:
    used = used_while_training(upcycled(0.01).train(), 50)
    assert int((used > 0).sum()) >= 4
    assert used.max() < used.sum() / 2


def test_exact_copies_tie_and_the_user_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moestro"):
        used = used_while_training(upcycled(0.0).train(), 1)
    assert used.tolist() == [24, 24, 0, 0, 0, 0, 0, 0]
    told = [record.message for record in caplog.records if "equal experts" in record.message]
    assert len(told) == 2, "once a layer"
    assert "noise=0.01" in told[0]
    assert "layers.0.mlp (layer 0)" in told[0]


def test_moments_are_remembered_until_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(moe_x, "moments_of", lambda bank, real=moe_x.moments_of: taken.append(1) or real(bank))
    router, bank = build("train.moe_x", num_experts=4).eval(), bank_of(bias=True)

    def right(times: int) -> None:
        """Scores are those of a router that remembers nothing; the moments were taken so many times."""
        taken.clear()
        with torch.no_grad():
            mine = [scores_of(router, bank, rows()) for _ in range(3)][-1]
            assert len(taken) == times
            assert torch.equal(mine, scores_of(build("train.moe_x", num_experts=4), bank, rows()))

    right(1)
    right(0)
    with torch.no_grad():
        bank.up_bias.add_(1.0)
    right(1)
    bank.load_state_dict({name: value * 0.5 - 0.1 for name, value in bank.state_dict().items()})
    right(1)
    bank.to(torch.bfloat16).to(torch.float32)
    right(1)
    bank.up_proj = nn.Parameter(bank.up_proj.detach().flip(0).clone())
    right(1)
    bank.up_proj.data.mul_(-1.0)  # changes no version
    router.eval()
    right(1)
    right(0)
    assert torch.equal(scores_of(pickle.loads(pickle.dumps(router)), bank, rows()), scores_of(router, bank, rows()))
    router.train()
    right(3)
    with torch.inference_mode():
        inside = bank_of()
        assert torch.equal(scores_of(router.eval(), inside, rows()), scores_of(router, bank_of(), rows()))


# -- models -------------------------------------------------------------------------------------------------------


def swapped() -> Any:
    """A tiny Llama with random MoE-X layers."""
    model = adopt(tiny_model("llama"))
    swap(model, "train.moe_x", {"num_experts": 5, "top_k": 2, "expert_size": 20, "bias": True, "eps": 1e-5})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def test_saved_and_loaded_it_is_the_same_router_and_generates_the_same(tmp_path: Path) -> None:
    model = swapped()
    moestro.save(model, tmp_path / "own")
    again = moestro.load(tmp_path / "own")
    assert torch.equal(logits(again), logits(model))
    routers = [layer.router for layer in layers_of(again)]
    assert all(isinstance(router, moe_x.SparsityRouter) and router.config.eps == 1e-5 for router in routers)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        cached = again.generate(ids(), use_cache=True, **options)
        assert torch.equal(cached, again.generate(ids(), use_cache=False, **options))
        whole = again(cached).logits[:, :-1].argmax(-1)
    assert torch.equal(whole[:, 6:], cached[:, 7:]), "each new token is the best one of a whole forward"


def test_padding_changes_nothing() -> None:
    model, batch = swapped(), ids(2, 7)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)], 1)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), batch], 1)
    torch.testing.assert_close(
        logits(model, padded, attention_mask=mask)[:, 3:], logits(model, batch), atol=1e-5, rtol=0
    )


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointed in (False, True):
        model = swapped().train()
        if checkpointed:
            moestro.checkpoint(model)
        model(input_ids=ids(), labels=ids()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_agrees() -> None:
    model = swapped()
    compiled = torch.compile(model.model, backend="eager")
    with torch.no_grad():
        hidden = model.model(input_ids=ids()).last_hidden_state
        torch.testing.assert_close(compiled(input_ids=ids()).last_hidden_state, hidden, atol=1e-6, rtol=0)


def test_pruned_experts_leave_the_scores_of_the_others() -> None:
    model = swapped()
    x = rows(6, 32)
    before = scores_of(layers_of(model)[0].router, layers_of(model)[0].bank, x)
    surgery.apply(model, plans.prune(OpenModel(model).shape, {0: [4, 1, 2]}, method="test"))
    layer = layers_of(model)[0]
    torch.testing.assert_close(scores_of(layer.router, layer.bank, x), before[:, [4, 1, 2]], atol=1e-6, rtol=0)
    assert logits(model).isfinite().all()


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k=5 but num_experts=4"),
        ({"eps": 0.0}, "eps"),
        ({"expert_size": 1}, "expert_size"),
        ({"bias": True}, "give expert_size"),
        ({"losses": {}}, "give expert_size"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method("train.moe_x").configure(config)


def test_banks_that_cannot_be_scored_are_refused() -> None:
    router = build("train.moe_x", num_experts=4)
    with pytest.raises(ConfigError, match="at least 2 inner units"):
        scores_of(router, bank_of(inner=1), rows())
    with pytest.raises(ConfigError, match="scores 4 experts by their weights, but the bank here holds 3"):
        scores_of(router, bank_of(experts=3), rows())
    with pytest.raises(ConfigError, match="6 wide and it is 8"):
        scores_of(router, bank_of(), rows(dim=8))
    odd = nn.Module()
    odd.num_experts, odd.projections = 4, ("keys",)
    with pytest.raises(ConfigError, match="those of Module have none"):
        scores_of(router, odd, rows())


def test_a_token_that_is_not_finite_is_named_unless_it_is_padding() -> None:
    use = method("train.moe_x")
    router = use.build(site(layer=3), use.configure({"num_experts": 4}), Shared())
    x = rows(4)
    for odd in ("nan", "inf"):
        x[2, 1] = float(odd)
        with pytest.raises(NonFiniteError, match=r"layer 3\).* 1 of 4 tokens, first in token 2"):
            router.score(x, bank_of(), context(1, 4))
    padded = router.score(x, bank_of(), context(1, 4, valid=[True, True, False, True]))
    assert padded.logits_TC[[0, 1, 3]].isfinite().all()
    broken = bank_of()
    broken.up_proj.data[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="first matrix of expert 1 holds a NaN"):
        router.score(rows(4), broken, context(1, 4))


def test_one_expert_a_token_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moestro"):
        build("train.moe_x", num_experts=4, top_k=1)
    assert "top_k=1" in caplog.text
