"""The C++ path of training against the loop in float64, on every instruction set that runs here."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError
from moestro.ops import FFNWeights, fused, native


wheel = native.wheel()
pytestmark = pytest.mark.skipif(wheel is None, reason="the wheel moestro-native is not here, or cannot train")
KERNELS = {"avx512": ("amx", "avx512vnni"), "avx2": ("avxvnni", "avx2"), "plain": ("scalar", "neon", "neondot")}


@pytest.fixture(params=list(KERNELS))
def kernels(request):
    """Each kind of kernels that this processor has."""
    before = wheel.features()
    here = [name for name in before["available"] if name in KERNELS[request.param]]
    if not here:
        pytest.skip(f"no {request.param} here")
    wheel.choose(here[0])
    yield request.param
    wheel.choose(before["isa"])


def in_float32(case):
    """The same call in float32, every tensor a leaf again."""

    def cast(tensor):
        if tensor is None:
            return None
        copy = torch.empty_like(tensor, dtype=torch.float32)  # keeps the strides of dense tensors
        return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    w = case.weights
    biases = {"up_bias_EJ": cast(w.up_bias_EJ), "down_bias_EO": cast(w.down_bias_EO)}
    weights = replace(w, up_EJD=cast(w.up_EJD), down_EOI=cast(w.down_EOI), **biases)
    return replace(case, x=cast(case.x), weight=cast(case.weight), weights=weights)


def gradients(case, backend):
    """Output and gradients of one linear functional, of the tensors of the case themselves."""
    y = case.run(backend)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    wanted = {name: tensor for name, tensor in case.inputs().items() if tensor.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), direction)
    return {"y": y.detach()} | dict(zip(wanted, found, strict=True))


def assert_parity(case):
    expected = gradients(case, "loop")
    with ops.counting("native") as calls:
        found = gradients(in_float32(case), "native")
    assert calls == 1
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        torch.testing.assert_close(
            found[name].double(), tensor, atol=1e-5 * scale, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("routing", ["topk", "ragged", "one_expert", "some_empty", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_routings(make_case, kernels, routing, bias):
    assert_parity(make_case(40, 6, 3, routing=routing, bias=bias, out=12))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(make_case, kernels, activation, gated):
    if activation == "swiglu_oss" and not gated:
        return
    case = make_case(30, 4, 2, activation=activation, gated=gated, bias=True, inner=19)
    case.x.data.mul_(4)  # past the clamps of swiglu_oss on both sides
    assert_parity(case)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 15, 16, 17, 33, 100])
def test_every_number_of_rows_of_an_expert(make_case, kernels, rows):
    assert_parity(make_case(rows, 1, 1, dim=37, inner=23, out=35, bias=True))


def test_widths_beyond_a_block_and_more_rows_than_one(make_case, kernels, two_threads):
    case = make_case(1100, 2, 1, routing="one_expert", dim=530, inner=20, out=40)
    case.x.data.mul_(530**-0.5)
    assert_parity(case)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_that_leave_past_the_caches(make_case, kernels, two_threads, interleaved):
    case = make_case(1100, 3, 2, dim=512, inner=32 if kernels == "plain" else 264, bias=True)
    case.x.data.mul_(512**-0.5)
    assert 2200 * 512 * 4 > 2**22
    assert_parity(replace(case, weights=replace(case.weights, interleaved=interleaved)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "slices", "every_second"])
def test_strides_of_the_weights(make_case, kernels, interleaved, layout):
    case = make_case(50, 4, 2, dim=24, inner=17, out=33, bias=True)
    w = case.weights

    def laid_out(tensor):
        with torch.no_grad():
            if layout == "transposed":
                return tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            wide = torch.cat([tensor, tensor], -1) if layout == "slices" else tensor.repeat_interleave(2, -1)
            part = wide[..., : tensor.shape[-1]] if layout == "slices" else wide[..., ::2]
        return part.requires_grad_()

    weights = replace(w, up_EJD=laid_out(w.up_EJD), down_EOI=laid_out(w.down_EOI), interleaved=interleaved)
    case = replace(case, weights=weights)
    expected = gradients(case, "loop")
    single = in_float32(case)
    if layout != "transposed":
        strided = {n: laid_out(getattr(single.weights, n).detach()) for n in ("up_EJD", "down_EOI")}
        single = replace(single, weights=replace(single.weights, **strided))
    assert single.weights.up_EJD.stride() == weights.up_EJD.stride()
    found = gradients(single, "native")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, atol=1e-4, rtol=1e-5)


def test_bits_do_not_depend_on_threads(make_case):
    case = in_float32(make_case(600, 5, 2, dim=64, inner=48, bias=True))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(case, "native"))
    torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
        assert torch.equal(tensor, found[2][name]), name


def test_ids_past_the_last_expert_are_left_out_and_negative_ones_refused(make_case):
    case = make_case(20, 5, 3)
    padded = replace(case, expert=torch.where(torch.arange(60) % 4 == 0, 5, case.expert))
    assert_parity(padded)
    assert (gradients(in_float32(padded), "native")["weight"][::4] == 0).all()
    with pytest.raises(ValueError, match="must be >= 0; got -"):
        in_float32(replace(case, expert=case.expert - 5)).run("native")
    with pytest.raises(ValueError, match="token 25 of 20"):
        in_float32(replace(case, token=case.token + 25)).run("native")


@pytest.mark.parametrize("frozen", [("up", "down", "up_bias", "down_bias"), ("x",), ("x", "weight", "up"), ("weight",)])
def test_frozen_inputs_get_no_gradient_and_lease_no_storage(make_case, frozen, monkeypatch):
    case = make_case(70, 4, bias=True, dim=64, inner=32)
    for name in frozen:
        case.inputs()[name].requires_grad_(False)
    single, leased, empty = in_float32(case), [], ops.POOL.empty
    monkeypatch.setattr(
        ops.POOL, "empty", lambda shape, dtype, *, exact=False: leased.append(exact) or empty(shape, dtype, exact=exact)
    )
    assert frozen[0] not in gradients(single, "native")
    wanted = {"y"} | single.inputs().keys() - set(frozen)
    assert leased.count(True) == len(wanted)  # exact storages are handed out
    monkeypatch.undo()
    assert_parity(case)


def test_empty_experts_get_exact_zeros_in_dirty_storage_and_a_step_reuses_it(make_case):
    case = in_float32(make_case(200, 6, 2, dim=64, inner=32, routing="some_empty", bias=True))
    ops.POOL.clear()
    for shape in (case.weights.up_EJD.shape, case.weights.down_EOI.shape):
        ops.POOL.empty(shape, torch.float32, exact=True).fill_(torch.nan)
    for name, gradient in gradients(case, "native").items():
        assert torch.isfinite(gradient).all(), name
        if "up" in name or "down" in name:
            assert (gradient[::2] == 0).all(), name
            assert (gradient[1::2] != 0).any(), name
    gradient = None
    held = ops.POOL.nbytes()
    for _ in range(3):
        gradients(case, "native")
    assert ops.POOL.nbytes() == held


def test_gradients_add_up(make_case):
    case = in_float32(make_case(30, 4))
    once = gradients(case, "native")["up"]
    direction = torch.randn(30, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
    for _ in range(2):
        case.run("native").backward(direction)
    torch.testing.assert_close(case.weights.up_EJD.grad, 2 * once)


def test_derivatives_of_derivatives(make_case):
    def second(case, backend):
        inputs = list(case.inputs().values())
        first = torch.autograd.grad(case.run(backend).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    case = make_case(8, 3, 2, bias=True)
    for mine, reference in zip(second(in_float32(case), "native"), second(case, "loop"), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(make_case, reentrant):
    plain, replayed = (in_float32(make_case(40, 5, 2, bias=True)) for _ in range(2))
    plain.run("native").square().sum().backward()
    with ops.counting("native") as calls:
        checkpoint(lambda x: replayed.run("native"), replayed.x, use_reentrant=reentrant).square().sum().backward()
    assert calls == 2  # forward, and once more in backward
    for name, tensor in plain.inputs().items():
        assert torch.equal(tensor.grad, replayed.inputs()[name].grad), name


def test_inference_mode(make_case):
    case = in_float32(make_case(1, 4))
    with torch.inference_mode():
        y = case.run("native")
    torch.testing.assert_close(y.clone(), case.run("loop").detach())


@pytest.mark.skipif(not native.is_fast(), reason="plain loops are not chosen by themselves")
def test_auto_takes_it_for_float32_alone(make_case):
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "segments"), (torch.bfloat16, "segments")):
        with ops.counting(backend) as calls:
            make_case(16, 4, dtype=dtype).run("auto")
        assert calls == 1, dtype
    with pytest.raises(ConfigError, match=r"takes float32 on the CPU; got torch.float64 on cpu"):
        make_case(16, 4).run("native")


def test_without_the_wheel(make_case, monkeypatch):
    case = make_case(16, 4, dtype=torch.float32)
    monkeypatch.setattr(native, "wheel", lambda: None)
    monkeypatch.setattr(fused, "is_fast", native.is_fast.__wrapped__)
    with ops.counting("segments") as calls:
        case.run("auto")
    assert calls == 1
    with pytest.raises(ConfigError, match="needs the wheel moestro-native"):
        case.run("native")


def test_switched_off_by_the_environment():
    code = "from moestro.ops import native; assert native.wheel() is None and not native.is_fast()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MOESTRO_NATIVE": "0"})


def test_threads_are_those_of_torch():
    if not torch.backends.openmp.is_available() or not sys.platform.startswith("linux"):
        pytest.skip("torch has no OpenMP here")
    assert wheel.train_features()["threads"] == "openmp"


def curve(backend):
    """Losses of a small mixture that learns a fixed random function."""
    torch.manual_seed(0)
    bank, router = StackedFFN(8, 32, 48), torch.nn.Linear(32, 8)
    x, target = torch.randn(256, 32), torch.randn(256, 32)
    torch.nn.init.normal_(bank.up_weight, std=32**-0.5)
    torch.nn.init.normal_(bank.down_proj, std=48**-0.5)
    optimizer = torch.optim.AdamW([*bank.parameters(), *router.parameters()], lr=3e-3)
    token, losses = torch.arange(256).repeat_interleave(2), []
    for _ in range(60):
        weight, expert = router(x).softmax(-1).topk(2)
        chosen = (token, expert.flatten(), weight.flatten())
        weights: FFNWeights = bank.weights()
        loss = (ops.fused_ffn(x, *chosen, 256, weights, "silu", backend=backend) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_equal_loss_curves():
    mine, reference = curve("native"), curve("segments")
    assert reference[-1] < 0.7 * reference[0]
    torch.testing.assert_close(mine, reference, rtol=2e-3, atol=0)
