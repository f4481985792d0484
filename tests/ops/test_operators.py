"""The native operators as torch's machinery sees them: schemas, fake tensors, selective checkpointing, odd inputs."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moestro.core.errors import ConfigError
from moestro.ops import operators


pytestmark = pytest.mark.skipif(operators.wheel() is None, reason="the wheel moestro-native is not here")
LAYOUTS = ["plain", "transposed"]


class Seen(TorchDispatchMode):
    """Names of our operators in the order they ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moestro":
            self.names.append(func.name())
        return func(*args, **kwargs or {})


def arguments(case):
    w = case.weights
    tensors = (case.x, case.weight, w.up_EJD, w.down_EOI, w.up_bias_EJ, w.down_bias_EO, case.token, case.expert)
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    return (*detached, case.activation, w.gated, w.interleaved)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_operators_keep_to_their_schemas_and_fakes(make_case, layout, bias, keep):
    args = list(arguments(make_case(20, 4, 2, bias=bias, weighted=bias, dtype=torch.float32)))
    if layout == "transposed":
        args[2:4] = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in args[2:4]]
        args[1] = args[1].double() if bias else None
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operators.experts_forward, (*args, keep), test_utils=checks)
    y, pre = operators.experts_forward(*args, True)
    assert pre.shape == (40, 8)
    needs = [True, bias, True, True, bias, bias]
    torch.library.opcheck(operators.experts_backward, (torch.ones_like(y), pre, *args, needs), test_utils=checks)


def test_every_pass_is_seen(make_case):
    case = make_case(20, 4, dtype=torch.float32)
    with Seen() as seen:
        with torch.no_grad():
            case.run("native")
        case.run("native").sum().backward()
    assert seen.names == ["moestro::experts_forward"] * 2 + ["moestro::experts_backward"]


@pytest.mark.parametrize("saved", [False, True])
def test_selective_checkpointing_may_keep_the_experts(make_case, saved):
    """Where the policy keeps what the operator returned, the replay takes it from there."""
    expected = make_case(40, 5, 2, bias=True, dtype=torch.float32).gradients("native")
    case, runs = make_case(40, 5, 2, bias=True, dtype=torch.float32), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators.Call, "forward", spied(runs, operators.Call.forward))
        kept = [operators.experts_forward] if saved else []
        y = checkpoint(
            lambda x: case.run("native"),
            case.x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(kept),
        )
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        y.backward(direction.float())
    assert len(runs) == (1 if saved else 2)
    for name, tensor in case.inputs().items():
        assert torch.equal(tensor.grad, expected[name]), name


def spied(runs, function):
    def call(*args, **kwargs):
        runs.append(1)
        return function(*args, **kwargs)

    return call


def every_second(tensor):
    """The same numbers with gaps between them."""
    return tensor.detach().repeat_interleave(2, -1)[..., ::2]


def negated_view(tensor):
    """The same numbers in a view that only says it is negated."""
    return torch.complex(torch.zeros_like(tensor), -tensor.detach()).conj().imag


@pytest.mark.parametrize("view", [every_second, negated_view, lambda t: t.detach().t().contiguous().t()])
def test_views(make_case, view):
    case = make_case(30, 4, 2, bias=True, dtype=torch.float32)
    expected, w = case.gradients("native"), case.weights
    biases = {"up_bias_EJ": view(w.up_bias_EJ), "down_bias_EO": view(w.down_bias_EO)}
    seen = replace(case, x=view(case.x), weights=replace(w, **biases), token=every_second(case.token))
    seen = replace(seen, expert=every_second(case.expert))
    y = seen.run("native")
    assert torch.equal(y, expected["y"])
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
    found = torch.autograd.grad(y, [w.up_EJD, w.down_EOI], view(direction))
    assert torch.equal(found[0], expected["up"])
    assert torch.equal(found[1], expected["down"])


def test_experts_that_share_one_matrix(make_case):
    case = make_case(30, 4, 2, dtype=torch.float32)
    w = case.weights
    shared = [tensor[:1].detach().expand(4, -1, -1).requires_grad_() for tensor in (w.up_EJD, w.down_EOI)]
    case = replace(case, weights=replace(w, up_EJD=shared[0], down_EOI=shared[1]))
    for mine, reference in zip(
        *(torch.autograd.grad(case.run(b).square().sum(), shared) for b in ("native", "loop")), strict=True
    ):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def test_backward_twice_gives_the_same_bits(make_case):
    case = make_case(30, 4, 2, bias=True, dtype=torch.float32)
    y, inputs = case.run("native"), list(case.inputs().values())
    first = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), inputs)
    assert all(map(torch.equal, first, again))


def test_saved_tensors_may_travel_and_must_not_change(make_case):
    case = make_case(30, 4, 2, bias=True, dtype=torch.float32)
    expected = case.gradients("native")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        found = case.gradients("native")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    y = case.run("native")
    case.expert.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_are_handed_over_without_a_copy_and_outputs_own_their_storage(make_case):
    case, addresses = make_case(300, 4, 2, dim=64, inner=32, dtype=torch.float32), []
    up = case.weights.up_EJD
    up.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    y = case.run("native")
    y.sum().backward()
    assert addresses == [up.grad.data_ptr()]
    for tensor in (y, up.grad, case.x.grad):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


class Marked(torch.Tensor):
    pass


def test_other_kinds_of_tensors_take_torchs_own_products(make_case):
    case = make_case(20, 4, dtype=torch.float32, grad=False)
    for field in ("x", "weight"):
        marked = replace(case, **{field: getattr(case, field).as_subclass(Marked)})
        torch.testing.assert_close(marked.run("auto").as_subclass(torch.Tensor), case.run("loop"))
        with pytest.raises(ConfigError, match=r"float32 on cpu \(Marked, Tensor\); use 'segments'"):
            marked.run("native")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on its first dual tensor
def test_forward_derivatives_are_refused_rather_than_dropped(make_case):
    case = make_case(20, 4, dtype=torch.float32, grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.x, torch.ones_like(case.x))
        with pytest.raises(NotImplementedError, match="jvp"):
            replace(case, x=dual).run("native")
