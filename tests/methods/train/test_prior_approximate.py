"""Prior-approximate routing: labels, losses and fit against the formulas written out; who gets a gradient from what."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, DataError
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.planning import make_plan
from moestro.methods.train._parts.prior import fit_linear_router, least_squares_scale
from moestro.methods.train.prior_approximate import (
    balance,
    fit_routers,
    hard_layers,
    labels_of_errors,
    pa_pseudo_labels,
    prior_approximate_loss,
    slice_errors,
)
from moestro.testing.tiny import tiny_model
from moestro.training.objectives import Causal, MethodObjective
from tests.surgery.helpers import ids, layers_of, logits


PRIOR = method("train.prior_approximate")


def pair(experts: int = 4, top_k: int = 2, **changes: Any) -> tuple[Any, Any]:
    """A cut model and the dense model it was."""
    model, dense = tiny_model("llama", **changes), tiny_model("llama", **changes)
    surgery.apply(model, make_plan("convert.factorllm", model, {"num_experts": experts, "top_k": top_k}))
    return model.train(), dense.requires_grad_(False)


def objective(**config: Any) -> MethodObjective:
    return MethodObjective(Causal(), PRIOR.entry("objective"), PRIOR.configure(config))


def batch(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Rows [B, S] with labels; the last row's second half is without targets."""
    ids_BS = ids(rows, length)
    labels_BS = ids_BS.clone()
    labels_BS[-1, length // 2 :] = -100
    return {"input_ids": ids_BS, "labels": labels_BS}


def random_logits(tokens: int = 6, experts: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


# -- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_labels_are_the_nearest_slices_by_a_plain_loop(top_k: int) -> None:
    draw = torch.Generator().manual_seed(1)
    outputs, dense = torch.randn(5, 4, 3, generator=draw), torch.randn(5, 3, generator=draw)
    found = pa_pseudo_labels(outputs, dense, top_k, 1.5)
    for token in range(5):
        errors = [
            sum((float(outputs[token, e, d]) - float(dense[token, d]) / 1.5) ** 2 for d in range(3)) for e in range(4)
        ]
        best = sorted(range(4), key=errors.__getitem__)[:top_k]
        assert found[token].nonzero().flatten().tolist() == sorted(best)
    assert found.sum(1).tolist() == [top_k] * 5


def test_a_slice_that_gives_the_scaled_dense_output_is_a_label() -> None:
    outputs, dense = torch.randn(20, 4, 8), torch.randn(20, 8)
    outputs[:, 2] = dense / 2.0
    assert pa_pseudo_labels(outputs, dense, 1, 2.0)[:, 2].tolist() == [1.0] * 20
    assert labels_of_errors(torch.zeros(3, 4), 2).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 3  # ties to the lower


@torch.no_grad()
def test_errors_of_a_layer_are_those_of_its_slices_computed_alone() -> None:
    model, dense = pair()
    layer, x = layers_of(model)[0], torch.randn(9, 32)
    outputs = []
    for expert in range(4):
        gate, up, down = (layer.bank.weight(expert, name) for name in ("gate", "up", "down"))
        outputs.append((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    stacked, t = torch.stack(outputs, 1), dense.model.layers[0].mlp(x)
    torch.testing.assert_close(stacked.sum(1), t, atol=1e-5, rtol=1e-5)
    expected = (stacked - t[:, None] / 2).square().mean(-1)
    torch.testing.assert_close(slice_errors(layer.bank, x, t / 2), expected, atol=1e-6, rtol=1e-4)


# -- losses ---------------------------------------------------------------------------------------------------------


def test_the_target_of_the_mask_is_its_softmax() -> None:
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    at_target = labels.clone()  # softmax of the mask itself
    assert float(at_target.softmax(-1)[0, 0]) == pytest.approx(0.3655, abs=1e-4)
    assert float(at_target.softmax(-1)[0, 2]) == pytest.approx(0.1345, abs=1e-4)
    assert float(prior_approximate_loss(at_target, labels)) == pytest.approx(0.0, abs=1e-6)
    assert float(prior_approximate_loss(10 * labels, labels)) > 0.3  # a peaked router is punished
    uniform = {"target": "uniform", "direction": "label||router"}
    assert float(prior_approximate_loss(20 * labels, labels, **uniform)) == pytest.approx(0.0, abs=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["router||label", "label||router"])
@pytest.mark.parametrize("target", ["softmax-mask", "uniform"])
def test_the_loss_is_the_formula_written_out(target: Any, direction: Any) -> None:
    raw = random_logits()
    labels = labels_of_errors(random_logits(seed=1), 2)
    total = 0.0
    for r, m in zip(raw.tolist(), labels.tolist(), strict=True):
        p = [math.exp(v) / sum(math.exp(w) for w in r) for v in r]
        q = [math.exp(v) / sum(math.exp(w) for w in m) for v in m] if target == "softmax-mask" else [v / 2 for v in m]
        p, q = ([min(max(v, 1e-7), 1 - 1e-7) for v in one] for one in (p, q))
        first, second = (p, q) if direction == "router||label" else (q, p)
        total += sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
    found = prior_approximate_loss(raw, labels, target=target, direction=direction)
    assert float(found) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("direction", ["router||label", "label||router"])
def test_a_certain_router_s_loss_is_clipped_and_finite(direction: Any) -> None:
    labels, clip = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 1e-7
    raw = torch.tensor([[200.0, 0.0, 0.0, 0.0]])  # all on what is no label
    p, q = [1 - clip, clip, clip, clip], [clip, clip, clip, 1 - clip]
    wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))  # either way: p and q trade places
    found = prior_approximate_loss(raw, labels, target="uniform", direction=direction)
    assert float(found) == pytest.approx(wanted, rel=1e-3)


def test_the_balance_term_is_the_mass_of_the_chosen_and_flattens() -> None:
    raw = random_logits().requires_grad_()
    expected = sum(sum(sorted(row)[-2:]) / 4 for row in raw.softmax(-1).tolist())
    found = balance(raw, 2)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    stepped = (raw - 0.5 * raw.grad).softmax(-1)  # type: ignore[operator]
    assert (stepped.amax(1) < raw.softmax(-1).amax(1)).all()


# -- the router and the objective -----------------------------------------------------------------------------------


def test_without_the_prior_no_gradient_reaches_a_router_and_with_it_one_does() -> None:
    model, dense = pair()
    terms = objective()(model, batch(), {"dense": dense})
    terms["causal"].total.backward(retain_graph=True)
    routers = [layer.router for layer in layers_of(model)]
    assert all(p.grad is None or not p.grad.any() for router in routers for p in router.parameters())
    assert all(layer.bank.down_proj.grad is not None for layer in layers_of(model))
    model.zero_grad()
    (0.05 * terms["prior_approximate"].total).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for router in routers for p in router.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if ".router." not in name)


def written_out(
    model: Any, dense: Any, given: dict[str, Tensor], chained: bool, **settings: Any
) -> tuple[float, float]:
    """Both router losses by a loop over layers on inputs taken by hooks."""
    entered: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
        for layer in layers_of(model)
    ]
    logits(model, given["input_ids"])
    for hook in hooks:
        hook.remove()
    live = torch.cat([given["labels"][:, 1:] != -100, torch.zeros(3, 1, dtype=torch.bool)], 1)
    prior = flat = 0.0
    t: Tensor | None = None
    for layer, block, x in zip(layers_of(model), dense.model.layers, entered, strict=True):
        x = t if chained and t is not None else x[live]
        t = block.mlp(x)
        labels = labels_of_errors(slice_errors(layer.bank, x, t / float(layer.router.scale)), 2)
        r = (x @ layer.router.weight.T + layer.router.bias).detach()
        prior += float(prior_approximate_loss(r, labels, **settings))
        flat += float(balance(r, 2))
    return prior, flat


@pytest.mark.parametrize("mode", ["same", "chained"])
def test_the_objective_is_the_loop_over_layers_and_target_tokens(mode: str) -> None:
    model, dense = pair()
    given = batch()
    terms = objective(teacher_input=mode)(model, given, {"dense": dense})
    prior, flat = written_out(model, dense, given, mode == "chained")
    assert float(terms["prior_approximate"].total.detach()) == pytest.approx(prior, rel=1e-4)
    assert float(terms["prior_balance"].total.detach()) == pytest.approx(flat, rel=1e-4)
    plain = Causal()(model, given, {})["causal"].total
    torch.testing.assert_close(terms["causal"].total, plain)
    other = objective(teacher_input="same" if mode == "chained" else "chained")(model, given, {"dense": dense})
    assert float(other["prior_approximate"].total.detach()) != pytest.approx(prior, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "softmax-mask", "direction": "label||router"},
        {"target": "uniform", "direction": "router||label"},
    ],
)
def test_the_objective_takes_its_settings_and_a_fitted_scale(settings: dict[str, Any]) -> None:
    model, dense = pair()
    plain = objective(**settings)(model, batch(), {"dense": dense})["prior_approximate"].total
    for layer, scale in zip(layers_of(model), (0.25, 0.5), strict=True):
        layer.router.scale.fill_(scale)
    found = objective(**settings)(model, batch(), {"dense": dense})["prior_approximate"].total
    prior, _ = written_out(model, dense, batch(), False, **settings)
    assert float(found.detach()) == pytest.approx(prior, rel=1e-4)
    assert float(found.detach()) != pytest.approx(float(plain.detach()), rel=1e-3)  # other labels


def test_padding_counts_in_no_loss_and_rows_add_up() -> None:
    model, dense = pair()
    model.eval()
    given = batch()
    padded = {
        "input_ids": torch.nn.functional.pad(given["input_ids"], (0, 3)),
        "labels": torch.nn.functional.pad(given["labels"], (0, 3), value=-100),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(given["input_ids"]), (0, 3)),
    }
    found, more = (objective()(model, one, {"d": dense}) for one in (given, padded))
    alone = [objective()(model, {k: v[i : i + 1] for k, v in given.items()}, {"d": dense}) for i in range(3)]
    for name, term in found.items():
        torch.testing.assert_close(more[name].total, term.total, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(sum(one[name].total for one in alone), term.total, atol=1e-4, rtol=1e-5)


def test_checkpointed_gradients_are_the_plain_ones() -> None:
    found = []
    for checkpointed in (False, True):
        model, dense = pair()
        if checkpointed:
            moestro.checkpoint(model)
        with session(collect=True):
            terms = objective()(model, batch(), {"d": dense})
        torch.stack([term.total for term in terms.values()]).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_bfloat16_and_a_single_token() -> None:
    model, dense = pair()
    given = {"input_ids": ids(1, 2), "labels": ids(1, 2)}
    for dtype in (torch.float32, torch.bfloat16):
        terms = objective()(model.to(dtype), given, {"d": dense.to(dtype)})
        assert all(bool(torch.isfinite(term.total)) for term in terms.values())
        assert terms["prior_approximate"].total.dtype == torch.float32


def test_the_scale_is_not_rounded_in_a_narrow_model() -> None:
    model, dense = pair(top_k=3)
    model.to(torch.bfloat16)
    routers = [layer.router for layer in layers_of(model)]
    dense.to(torch.bfloat16)
    surgery.apply(dense, make_plan("convert.factorllm", dense, {"num_experts": 4, "top_k": 3}))
    for router in (*routers, *(layer.router for layer in layers_of(dense))):
        assert router.weight.dtype == torch.bfloat16
        assert router.scale.dtype == torch.float32
        assert float(router.scale) == pytest.approx(4 / 3, rel=1e-6)


def test_the_scale_is_the_quotient_or_what_is_asked_for() -> None:
    site = Site(path="x", kind="mlp", module=torch.nn.Identity(), dim=8)
    for scale, wanted in ((None, 4 / 3), (1.5, 1.5)):
        config = PRIOR.configure({"num_experts": 4, "top_k": 3, "scale": scale})
        assert float(PRIOR.build(site, config, Shared()).scale) == pytest.approx(wanted, rel=1e-6)


def test_wrong_teachers_and_models_are_named() -> None:
    model, dense = pair()
    with pytest.raises(ConfigError, match="one teacher, given: none"):
        objective()(model, batch(), {})
    with pytest.raises(ConfigError, match="one teacher, given: a, b"):
        objective()(model, batch(), {"a": dense, "b": dense})
    with pytest.raises(ConfigError, match=r"has no layer under train\.prior_approximate"):
        objective()(dense, batch(), {"d": dense})
    with pytest.raises(ConfigError, match=r"has nothing at model\.layers\.0\.mlp"):
        objective()(model, batch(), {"d": torch.nn.Linear(2, 2)})
    dense.model.layers[0].mlp = torch.nn.Linear(32, 16)
    with pytest.raises(ConfigError, match="the teacher gives 16 numbers a token and the slices 32"):
        objective()(model, batch(), {"d": dense})


@pytest.mark.parametrize("values", [{"scale": 0.0}, {"top_k": 5}, {"target": "mask"}, {"direction": "both"}])
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        PRIOR.configure(values)


# -- layer by layer -------------------------------------------------------------------------------------------------


def test_a_linear_rule_is_learned_and_the_loss_falls_by_more_than_half() -> None:
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    rule = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    labels = labels_of_errors(-(x @ rule.T), 2)
    start = torch.zeros(4, 16), torch.zeros(4)
    weight, bias, losses = fit_linear_router(*start, x, labels, epochs=20, lr=1e-2, rows=60, seed=0)  # 200 steps
    assert losses[-1] < float(prior_approximate_loss(torch.zeros(600, 4), labels)) / 600 / 2  # of where it started
    assert not start[0].any()
    chosen = labels_of_errors(-(x @ weight.T + bias), 2)
    assert float((chosen * labels).sum() / labels.sum()) > 0.9
    again = fit_linear_router(*start, x, labels, epochs=20, lr=1e-2, rows=60, seed=0)
    assert torch.equal(again[0], weight)
    with pytest.raises(DataError, match="no tokens to fit a router on"):
        fit_linear_router(*start, x[:0], labels[:0], epochs=1, lr=1e-2, rows=60, seed=0)


def test_steps_of_a_fit_are_adam_s_on_means_over_their_tokens() -> None:
    """Of 20 tokens in steps of 8 the last holds 4, and counts no less for it."""
    x, labels = random_logits(20, 6), labels_of_errors(random_logits(20, 4, seed=1), 2)
    weight, bias = torch.nn.Parameter(random_logits(4, 6, seed=2)), torch.nn.Parameter(torch.zeros(4))
    found = fit_linear_router(weight, bias, x, labels, epochs=2, lr=1e-2, rows=8, seed=5)
    optimizer, draw = torch.optim.Adam([weight, bias], lr=1e-2), torch.Generator().manual_seed(5)
    means = []
    for _ in range(2):
        order, losses = torch.randperm(20, generator=draw), []
        for at in (0, 8, 16):
            place = order[at : at + 8]
            p, q = (x[place] @ weight.T + bias).softmax(-1), labels[place].softmax(-1)
            each = (p * (p / q).log()).sum(-1)
            optimizer.zero_grad()
            each.mean().backward()
            optimizer.step()
            losses += each.tolist()
        means.append(sum(losses) / 20)
    torch.testing.assert_close(found[0], weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], bias.detach(), atol=1e-5, rtol=1e-4)
    assert found[2] == pytest.approx(means, rel=1e-4)


def test_fitting_changes_routers_alone_and_leaves_padding_out() -> None:
    model, dense = pair()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    padded = torch.nn.functional.pad(ids(6, 8), (0, 4))
    mask = (torch.arange(12) < 8).long().expand(6, -1)
    fits = fit_routers(model, dense, [{"input_ids": padded, "attention_mask": mask}], epochs=5, lr=1e-2)
    assert [fit.tokens for fit in fits.values()] == [48, 48]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{site}.router.{name}" for site in hard_layers(model) for name in ("weight", "bias")}
    plain, _ = pair()
    same = fit_routers(plain, dense, [{"input_ids": ids(6, 8)}], epochs=5, lr=1e-2)
    for one, other in zip(fits.values(), same.values(), strict=True):
        torch.testing.assert_close(one.losses, other.losses, atol=1e-5, rtol=1e-4)
        assert float(one.label_share_E.sum()) == pytest.approx(2.0)
        assert one.losses[-1] < one.losses[0]
        assert one.agreement > 0.5  # of a coin
        assert one.scale == 2.0


def test_a_fit_is_that_of_a_linear_router_to_the_layer_s_labels() -> None:
    """With a scale that is not E / K, batches of other padding, and settings that are not the first ones."""
    settings: dict[str, Any] = {
        "epochs": 2, "lr": 1e-2, "rows": 16, "seed": 3, "target": "uniform", "direction": "label||router",
    }  # fmt: skip
    masks = [(torch.arange(8) < width).long().expand(3, -1) for width in (5, 7)]
    batches = [{"input_ids": ids(6, 8)[3 * i : 3 * i + 3], "attention_mask": mask} for i, mask in enumerate(masks)]
    model, dense = pair()
    entered: list[Tensor] = []
    hook = dense.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    for one in batches:
        dense(**one)
    hook.remove()
    x = torch.cat([one[mask.bool()] for one, mask in zip(entered, masks, strict=True)])
    layer = layers_of(model)[0]
    layer.router.scale.fill_(0.25)
    labels = labels_of_errors(slice_errors(layer.bank, x, dense.model.layers[0].mlp(x) / 0.25), 2)
    assert not torch.equal(labels, labels_of_errors(slice_errors(layer.bank, x, dense.model.layers[0].mlp(x) / 2), 2))
    weight, bias, losses = fit_linear_router(layer.router.weight, layer.router.bias, x, labels, **settings)
    fit = fit_routers(model, dense, batches, **settings)["model.layers.0.mlp"]
    torch.testing.assert_close(layer.router.weight.detach(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.router.bias.detach(), bias, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fit.losses, losses, atol=1e-5, rtol=1e-4)
    assert fit.tokens == 36
    other = fit_linear_router(layer.router.weight, layer.router.bias, x, labels, **{**settings, "seed": 0})
    assert not torch.equal(other[0], weight)


def test_a_fitted_scale_is_the_best_one() -> None:
    chosen, dense = torch.randn(50, 6), torch.randn(50, 6)
    best = least_squares_scale(chosen, 1.3 * chosen)
    assert best == pytest.approx(1.3)
    s = least_squares_scale(chosen, dense)
    errors = [float((dense - (s + move) * chosen).square().sum()) for move in (-1e-2, 0.0, 1e-2)]
    assert min(errors) == errors[1]
    assert least_squares_scale(torch.zeros(2, 2), torch.ones(2, 2)) == 0.0
    model, teacher = pair()
    fits = fit_routers(model, teacher, [{"input_ids": ids(6, 8)}], epochs=2, fit_scale=True)
    for site, layer in hard_layers(model).items():
        assert float(layer.router.get_buffer("scale")) == pytest.approx(fits[site].scale) != 2.0
    layer = layers_of(model)[0]
    entered: list[Tensor] = []
    hook = teacher.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    teacher(input_ids=ids(6, 8))
    hook.remove()
    t = teacher.model.layers[0].mlp(entered[0])
    unit = layer(entered[0]).detach() / layer.router.scale
    assert float(layer.router.scale) == pytest.approx(least_squares_scale(unit, t), rel=1e-4)


def test_a_scale_that_is_not_positive_is_told_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, teacher = pair()
    with torch.no_grad():
        layers_of(model)[0].bank.down_proj.zero_()
        layers_of(model)[1].bank.down_proj.neg_()
    with caplog.at_level(logging.WARNING, logger="moestro"):
        fits = fit_routers(model, teacher, [{"input_ids": ids(6, 8)}], epochs=1, fit_scale=True)
    assert "model.layers.0.mlp: the best scale of the chosen slices is 0; it stays 2" in caplog.text
    assert "model.layers.1.mlp: the best scale of the chosen slices is -" in caplog.text
    assert [fit.scale for fit in fits.values()] == [2.0, 2.0]


def test_labels_that_do_not_look_at_the_token_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    model, dense = pair()
    down = layers_of(model)[0].bank.down_proj
    with torch.no_grad():
        down[1] *= 50.0  # far from every target, so that the others are nearer
        down[2] *= 50.0
    with caplog.at_level(logging.WARNING, logger="moestro"):
        fits = fit_routers(model, dense, [{"input_ids": ids(6, 8)}], epochs=1)
    assert "is a label of 100 % of the tokens" in caplog.text
    assert float(fits["model.layers.0.mlp"].label_share_E[1]) == 0.0
    caplog.clear()
    whole, _ = pair(top_k=4)
    fit_routers(whole, dense, [{"input_ids": ids(6, 8)}], epochs=1)
    assert not caplog.records  # with all slices on there is nothing to choose


def test_chosen_weights_are_the_scale_and_a_slice_may_stay_empty() -> None:
    model, _ = pair()
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.tensor([1.0, 2.0, -5.0, -5.0]))

    class Seen:
        def record(self, site: str, routing: Routing, ctx: Any) -> None:
            if site == layer.site:
                assert set(routing.expert_N.tolist()) == {0, 1}
                assert set(routing.weight_N.tolist()) == {2.0}
                assert not routing.weight_N.requires_grad

    with session(recorder=Seen()):
        model(input_ids=ids()).logits.sum().backward()
    assert not layer.bank.down_proj.grad[2:].any()
    assert layer.bank.down_proj.grad[:2].any()
