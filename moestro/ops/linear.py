"""A linear layer per expert on sorted rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.errors import ConfigError
from moestro.ops import workers
from moestro.ops.counters import count
from moestro.ops.pool import POOL
from moestro.ops.rows import Segments
from moestro.ops.workers import Group


def grouped_linear(rows_NI: Tensor, weight_EOI: Tensor, segments: Segments, bias_EO: Tensor | None = None) -> Tensor:
    """rows_n W_e^T + b_e for every sorted row n of expert e.

    rows_NI: [N, I], rows already in the order of `segments`. weight_EOI: [E, O, I]. Returns [N, O] in the
    rows' dtype. Gradients to rows, weight (one stacked tensor, zero for experts without rows) and bias, any
    number of times. Raises ConfigError when rows, weights and segments do not fit together.
    """
    if len(rows_NI) != segments.num_rows or len(weight_EOI) != segments.num_experts:
        raise ConfigError(
            f"{len(rows_NI)} rows and {len(weight_EOI)} weights for segments of {segments.num_rows} rows "
            f"and {segments.num_experts} experts; sort the rows with the same Segments"
        )
    return _eager(rows_NI, weight_EOI, segments, bias_EO)  # type: ignore[no-any-return]


def _grouped_linear(rows_NI: Tensor, weight_EOI: Tensor, segments: Segments, bias_EO: Tensor | None) -> Tensor:
    count("grouped_linear")
    if rows_NI.device.type != "cpu" or rows_NI.dtype.itemsize < 4:
        return _loop(rows_NI, weight_EOI, segments, bias_EO)
    rows_NO: Tensor = _GroupedLinear.apply(rows_NI, weight_EOI, bias_EO, segments)  # type: ignore[no-untyped-call]
    return rows_NO


# Sizes of the groups are data: a graph break under torch.compile.
_eager = torch.compiler.disable(_grouped_linear)  # type: ignore[no-untyped-call]


def _loop(rows_NI: Tensor, weight_EOI: Tensor, segments: Segments, bias_EO: Tensor | None) -> Tensor:
    outputs = [
        F.linear(rows_NI[segments.slice(expert)], weight_EOI[expert], None if bias_EO is None else bias_EO[expert])
        for expert in segments.hit or [0]
    ]
    return torch.cat(outputs)


def _pieces(groups: Sequence[Group]) -> Iterator[tuple[int, slice]]:
    for group in groups:
        start = group.start
        for expert, size in zip(group.experts, group.sizes, strict=True):
            yield expert, slice(start, start + size)
            start += size


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        rows_NI, weight_EOI, bias_EO, segments = args
        out_NO: Tensor = rows_NI.new_empty(len(rows_NI), weight_EOI.shape[1])

        def work(groups: Sequence[Group]) -> None:
            for expert, rows in _pieces(groups):
                torch.mm(rows_NI[rows], weight_EOI[expert].t(), out=out_NO[rows])
                if bias_EO is not None:
                    out_NO[rows].add_(bias_EO[expert])

        workers.run(work, segments, weight_EOI[0].numel())
        ctx.save_for_backward(rows_NI, weight_EOI, bias_EO)
        ctx.segments = segments
        return out_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        rows_NI, weight_EOI, bias_EO = ctx.saved_tensors
        segments: Segments = ctx.segments
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: derivatives of derivatives come from the plain loop
            inputs = [t for t, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if wanted]
            out_NO = _loop(rows_NI, weight_EOI, segments, bias_EO)
            grads = iter(torch.autograd.grad(out_NO, inputs, grad_NO, create_graph=True, materialize_grads=True))
            return (*(next(grads) if wanted else None for wanted in ctx.needs_input_grad[:3]), None)
        grad_rows = torch.empty_like(rows_NI) if wants_rows else None
        grad_weight = POOL.empty(weight_EOI.shape, weight_EOI.dtype, exact=True) if wants_weight else None
        grad_bias = torch.zeros_like(bias_EO) if wants_bias else None

        def work(groups: Sequence[Group]) -> None:
            for expert, rows in _pieces(groups):
                if grad_rows is not None:
                    torch.mm(grad_NO[rows], weight_EOI[expert], out=grad_rows[rows])
                if grad_weight is not None:
                    beta = float(rows.start > segments.expert_offsets[expert])  # a later block of a busy expert adds
                    target = grad_weight[expert]
                    torch.addmm(target, grad_NO[rows].t(), rows_NI[rows], beta=beta, out=target)
                if grad_bias is not None:
                    grad_bias[expert].add_(grad_NO[rows].sum(0))

        workers.run(work, segments, 2 * weight_EOI[0].numel())
        if grad_weight is not None:
            for expert in set(range(segments.num_experts)).difference(segments.hit):
                grad_weight[expert].zero_()
        return grad_rows, grad_weight, grad_bias, None
