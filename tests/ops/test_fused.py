"""Every path of `fused_ffn` against the loop; the loop against worked numbers and finite differences."""

from dataclasses import replace

import pytest
import torch

from moestro import ops
from moestro.core.errors import ConfigError
from moestro.ops import FFNWeights, fused_ffn, workers


ROUTINGS = ["topk", "ragged", "one_expert", "some_empty", "none"]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "swiglu_oss"]
FAST = ["segments", "grouped"]


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        if tensor is not None:
            torch.testing.assert_close(
                found[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_loop_on_numbers_worked_by_hand():
    # Experts of width 1, relu(g) * u: expert 0 has g = x, u = 2x, down 3; expert 1 has g = -x, u = x, down 10.
    weights = FFNWeights(torch.tensor([[[1.0], [2.0]], [[-1.0], [1.0]]]), torch.tensor([[[3.0]], [[10.0]]]))
    x = torch.tensor([[2.0], [-1.0], [5.0]])
    token, expert = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    y = fused_ffn(x, token, expert, torch.tensor([0.5, 2.0, 9.0]), 3, weights, "relu", backend="loop")
    # token 0: 0.5 * 3 * (2 * 4) = 12; token 1: 2 * 10 * (1 * -1) + 9 * 3 * 0 = -20; token 2 has no expert.
    assert y.tolist() == [[12.0], [-20.0], [0.0]]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_fast_paths_equal_the_loop(make_case, backend, routing, bias):
    case = make_case(40, 6, 3, routing=routing, bias=bias, dtype=torch.float32, out=12)
    with ops.counting(backend) as calls:
        found = case.gradients(backend)
    assert calls == 1
    assert_same(found, case.gradients("loop"), 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_activation_equals_the_loop(make_case, activation, gated):
    if activation == "swiglu_oss" and not gated:
        with pytest.raises(ConfigError, match="needs gated experts"):
            make_case(gated=False, activation="swiglu_oss").run("auto")
        return
    case = make_case(30, 4, 2, activation=activation, gated=gated, bias=True)
    # Large pre-activations, so that the clamps of swiglu_oss are met on both sides.
    case.x.data.mul_(4)
    expected = case.gradients("loop")
    if activation == "swiglu_oss":
        wide = torch.einsum("td,ejd->tej", case.x, case.weights.up_EJD)
        assert (wide > 7).any()
        assert (wide < -7).any()
    assert_same(case.gradients("segments"), expected, 1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gradients_against_finite_differences(make_case, weighted, activation):
    case = make_case(5, 3, 2, dim=3, inner=2, routing="ragged", bias=True, weighted=weighted, activation=activation)
    names = list(case.inputs())

    def run(*tensors):
        t = dict(zip(names, tensors, strict=True))
        weights = FFNWeights(t["up"], t["down"], True, t["up_bias"], t["down_bias"])
        return replace(case, x=t["x"], weight=t.get("weight"), weights=weights).run("segments")

    assert torch.autograd.gradcheck(run, tuple(case.inputs().values()))
    assert torch.autograd.gradgradcheck(run, tuple(case.inputs().values()), atol=1e-4)


def test_weight_none_means_one(make_case):
    case = make_case(weighted=False, dtype=torch.float32)
    ones = replace(case, weight=torch.ones(len(case.token)))
    for backend in ("loop", *FAST):
        torch.testing.assert_close(case.run(backend), ones.run(backend), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_ids_past_the_last_expert_are_left_out(make_case, backend):
    case = make_case(20, 5, 3, dtype=torch.float32)
    padded = replace(case, expert=torch.where(torch.arange(60) % 4 == 0, 5, case.expert))
    real = padded.expert < 5
    kept = replace(case, token=case.token[real], expert=case.expert[real], weight=case.weight.detach()[real])
    torch.testing.assert_close(padded.run(backend), kept.run(backend), rtol=0, atol=1e-6)
    gradient = padded.gradients(backend)["weight"]
    assert (gradient[~real] == 0).all()
    assert (gradient[real] != 0).all()


@pytest.mark.parametrize("frozen", [("up", "down", "up_bias", "down_bias"), ("x",), ("x", "weight", "up"), ("weight",)])
def test_frozen_inputs_get_no_gradient(make_case, frozen):
    case = make_case(20, 4, bias=True)
    for name in frozen:
        case.inputs()[name].requires_grad_(False)
    found = case.gradients("segments")
    assert {name for name, grad in found.items() if grad is None} == set(frozen)
    assert_same(found, case.gradients("loop"), 1e-10)


def test_frozen_experts_lease_no_gradient_storage(make_case, monkeypatch):
    case = make_case(64, 4, bias=True)
    for name in ("up", "down", "up_bias", "down_bias"):
        case.inputs()[name].requires_grad_(False)
    leased = []
    empty = ops.POOL.empty
    monkeypatch.setattr(
        ops.POOL,
        "empty",
        lambda shape, dtype, *, exact=False: leased.append(exact) or empty(shape, dtype, exact=exact),
    )
    case.gradients("segments")
    assert leased
    assert not any(leased)  # `exact` storages are those that become gradients


def test_no_gradients_without_grad_mode(make_case):
    case = make_case(16, 4)
    with torch.no_grad():
        assert not case.run("segments").requires_grad
    with torch.inference_mode():
        y = case.run("segments")
    torch.testing.assert_close(y.clone(), case.run("loop").detach())


def test_empty_experts_get_exact_zero_gradients_from_dirty_storage(make_case):
    case = make_case(200, 6, 2, dim=64, inner=32, routing="some_empty", bias=True, dtype=torch.float32)
    ops.POOL.clear()
    for shape in (case.weights.up_EJD.shape, case.weights.down_EOI.shape):
        ops.POOL.empty(shape, torch.float32, exact=True).fill_(torch.nan)  # back in the pool at once
    found = case.gradients("segments")
    for name in ("up", "down", "up_bias", "down_bias"):
        assert (found[name][::2] == 0).all(), name
        assert torch.isfinite(found[name]).all(), name
        assert (found[name][1::2] != 0).any(), name


def test_no_tokens(make_case):
    case = make_case(0, 4, routing="none", dtype=torch.float32)
    for backend in ("loop", *FAST):
        found = case.gradients(backend)
        assert found["y"].shape == (0, 8)
        assert (found["up"] == 0).all()


def test_accumulates_into_an_existing_gradient(make_case):
    case = make_case(30, 4)
    once = case.gradients("segments")["up"]
    twice = case.fresh()
    for _ in range(2):
        y = twice.run("segments")
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    torch.testing.assert_close(twice.weights.up_EJD.grad, 2 * once)


def test_blocks_of_a_busy_expert_add_up(make_case, monkeypatch):
    case = make_case(50, 4, 2, bias=True)
    expected = case.gradients("loop")
    monkeypatch.setattr(workers, "BLOCK", 7)
    assert_same(case.gradients("segments"), expected, 1e-10)


def test_half_precision(make_case):
    exact = make_case(24, 4, 2, bias=True)
    for dtype in (torch.bfloat16, torch.float16):
        half = make_case(24, 4, 2, bias=True, dtype=dtype)
        for backend in ("loop", "segments"):
            found = half.gradients(backend)
            for name, tensor in exact.gradients("loop").items():
                assert found[name].dtype == dtype
                error = (found[name].double() - tensor).abs().max() / tensor.abs().max()
                assert error < 0.05, (backend, name)  # 8 bits of mantissa and a sum of a few dozen terms


def test_mixed_precision_keeps_the_dtype_of_x(make_case):
    case = make_case(10, 4, dtype=torch.float32)
    case.x = case.x.detach().to(torch.bfloat16).requires_grad_()
    case.weight = case.weight.detach().double().requires_grad_()
    for backend in ("loop", *FAST):
        found = case.gradients(backend)
        assert (found["y"].dtype, found["x"].dtype, found["weight"].dtype) == (
            torch.bfloat16,
            torch.bfloat16,
            torch.float64,
        )


def test_auto_chooses_by_shape_and_grad_mode(make_case):
    many, one = make_case(16, 4), make_case(1, 4)
    with ops.counting("segments") as segments, ops.counting("one_token") as one_token:
        many.run("auto")
        one.run("auto")
        with torch.no_grad():
            one.run("auto")
    assert (segments, one_token) == (2, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_token_equals_the_loop(make_case, activation, bias, weighted):
    case = make_case(1, 8, 4, bias=bias, weighted=weighted, activation=activation, grad=False)
    case.expert[1] = 8  # a padded slot
    torch.testing.assert_close(case.run("one_token"), case.run("loop"), atol=1e-12, rtol=1e-12)


def test_refusals(make_case):
    case = make_case()
    with pytest.raises(ConfigError, match="backend 'fast' is unknown; known: auto, loop"):
        case.run("fast")
    with pytest.raises(ConfigError, match="activation 'tanh' is unknown; known: silu"):
        replace(case, activation="tanh").run("auto")
    with pytest.raises(ConfigError, match=r"got torch.float64 and widths \[4, 8\]"):
        case.run("grouped")
    with pytest.raises(ConfigError, match="takes 1 token; got 12"):
        case.run("one_token")
    with pytest.raises(ConfigError, match=r"x must be \[12, 8\]; got \[12, 7\]"):
        replace(case, x=case.x[:, :7]).run("auto")
    with pytest.raises(ConfigError, match="equally long"):
        replace(case, token=case.token[1:]).run("auto")
    with pytest.raises(ConfigError, match="down projection is"):
        FFNWeights(torch.zeros(2, 6, 4), torch.zeros(2, 4, 6))
    with pytest.raises(ConfigError, match="even number"):
        FFNWeights(torch.zeros(2, 7, 4), torch.zeros(2, 4, 3))
    with pytest.raises(ConfigError, match="cast one"):
        FFNWeights(torch.zeros(2, 6, 4), torch.zeros(2, 4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be >= 0"):
        replace(case, expert=case.expert - 5).run("auto")
