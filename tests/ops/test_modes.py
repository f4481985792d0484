"""Activation checkpointing, torch.compile, autocast, and bits that do not depend on a token's company."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moestro import ops
from moestro.ops.route import Route


def functional(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(make_case, reentrant):
    plain = make_case(40, 5, 2, bias=True).fresh()
    replayed = plain.fresh()
    functional(plain.run("segments")).backward()
    with ops.counting("segments") as calls:
        loss = functional(checkpoint(lambda x: replayed.run("segments"), replayed.x, use_reentrant=reentrant))
        loss.backward()
    assert calls == 2  # forward, and once more in backward
    for name, tensor in plain.inputs().items():
        assert torch.equal(tensor.grad, replayed.inputs()[name].grad), name


def test_checkpointing_keeps_no_activations(make_case):
    case = make_case(500, 4, 2, dim=32, inner=64, dtype=torch.float32).fresh()
    ops.POOL.clear()
    y = checkpoint(lambda x: case.run("segments"), case.x, use_reentrant=False)
    assert ops.POOL.nbytes(idle=True) == ops.POOL.nbytes()
    functional(y).backward()


def test_two_forwards_before_one_backward(make_case):
    case = make_case(30, 4).fresh()
    first = case.run("segments")
    second = case.run("segments")
    assert torch.equal(first, second)
    functional(first).backward()
    alone = {name: tensor.grad.clone() for name, tensor in case.inputs().items()}
    functional(second).backward()
    for name, tensor in case.inputs().items():
        torch.testing.assert_close(tensor.grad, 2 * alone[name])


# Dynamo itself looks at `.grad` of the tensors it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile_breaks_the_graph_and_agrees(make_case):
    case = make_case(20, 4, dtype=torch.float32)

    def layer(x):
        return torch.tanh(ops.fused_ffn(x * 2, case.token, case.expert, case.weight, 20, case.weights, "silu"))

    compiled = torch.compile(layer, backend="eager")
    with ops.counting(ops.training_backend()) as calls:
        y = compiled(case.x)
    assert calls == 1
    torch.testing.assert_close(y, layer(case.x))
    gradients = torch.autograd.grad(functional(compiled(case.x)), case.x)
    torch.testing.assert_close(gradients, torch.autograd.grad(functional(layer(case.x)), case.x))


def test_autocast_leaves_the_path_in_float32(make_case):
    case = make_case(20, 4, dtype=torch.float32)
    expected = case.gradients("segments")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.gradients("segments")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dim", [8, 64, 200])
def test_combining_a_token_alone_gives_the_bits_it_has_in_a_batch(make_case, dim):
    case = make_case(64, 16, 4, dim=dim, dtype=torch.float32, routing="ragged", grad=False)
    segments = ops.sort_rows(case.expert, 16)
    rows = torch.randn(segments.num_rows, dim)
    weight = case.weight[segments.order_N]
    batch = Route.of(segments, case.token, 64)
    together = batch.combine(rows, weight)
    scattered = ops.scatter_rows(rows, batch.token_N, weight, 64)
    for token in range(64):
        mine = batch.token_N == token
        alone_segments = ops.sort_rows(case.expert[case.token == token], 16)
        alone = Route.of(alone_segments, torch.zeros(int(mine.sum()), dtype=torch.int64), 1)
        assert torch.equal(alone.combine(rows[mine], weight[mine])[0], together[token])
        zeros = torch.zeros(int(mine.sum()), dtype=torch.int64)
        assert torch.equal(ops.scatter_rows(rows[mine], zeros, weight[mine], 1)[0], scattered[token])
    assert (together[~torch.isin(torch.arange(64), case.token)] == 0).all()


def test_the_order_of_assignments_changes_no_bit(make_case):
    case = make_case(50, 8, 4, dim=16, dtype=torch.float32)
    expected = case.gradients("segments")
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    by_token = torch.argsort(case.token[shuffle], stable=True)
    shuffle = shuffle[by_token]  # other slots within each token, the same tokens in every expert's rows
    case.expert, case.weight = case.expert[shuffle], case.weight.detach()[shuffle].requires_grad_()
    found = case.gradients("segments")
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["up"], expected["up"])
    assert torch.equal(found["weight"], expected["weight"][shuffle])
