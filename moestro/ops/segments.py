"""The CPU training path: experts one by one over sorted rows, the whole feed-forward network as one autograd
node.

What it saves over the plain loop: nothing but the up-projection's output is kept for backward (gathers and
activations are recomputed); every matrix product writes into reused storage; the gradients of all experts go
straight into one stacked tensor, which autograd takes over as `.grad`; experts run side by side, one thread
each.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.errors import ConfigError
from moestro.ops import workers
from moestro.ops.activation import Activation, gate_and_up, gate_derivative, gate_value, multiply_up, up_derivative
from moestro.ops.loop import NAMES, loop_gradients
from moestro.ops.pool import POOL, gradient_for
from moestro.ops.route import Route, compute_dtype
from moestro.ops.rows import sort_rows
from moestro.ops.weights import FFNWeights
from moestro.ops.workers import Group


_LEAST_ROWS = 4  # rows from which on a matrix product gives a row the same bits whatever stands beside it


def segments_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
    *,
    exact: bool = False,
) -> Tensor:
    """The same function as `loop_ffn`. Half precisions are computed in float32. `exact`: see `reproducible_ffn`."""
    segments = sort_rows(expert_N, weights.num_experts)
    route = Route.of(segments, token_N, x_TD.shape[0])
    tensors = (x_TD, weight_N, weights.up_EJD, weights.down_EOI, weights.up_bias_EJ, weights.down_bias_EO)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        extras = ((weights.gated, weights.interleaved), activation, route, exact, token_N, expert_N)
        y_TO: Tensor = _SegmentFFN.apply(*tensors, *extras)  # type: ignore[no-untyped-call]
        return y_TO
    return _Forward(x_TD, weight_N, weights, activation, route, keep=False, exact=exact).run()


def reproducible_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
) -> Tensor:
    """`segments_ffn` whose outputs have the same bits whatever other tokens run with a token, and on any thread count.

    Matrix products pick their kernel by the number of rows: with MKL a row's bits change at 3 rows and fewer and never
    above (for outputs at least 4 wide), and threads that share a product cut it into pieces that small. So short
    products are padded to 4 rows, every product runs in one thread, and the activation's vector loops start anew in
    each row. Gradients are right, but not reproducible in this sense. Raises ConfigError for widths below 4.
    """
    narrow = min(weights.up_EJD.shape[1], weights.out_dim)
    if narrow < _LEAST_ROWS:
        raise ConfigError(f"backend 'reproducible' needs outputs at least {_LEAST_ROWS} wide; got {narrow}")
    return segments_ffn(x_TD, token_N, expert_N, weight_N, weights, activation, exact=True)


class _Pass:
    """What the forward and the backward pass share: dtypes, views of single experts, scratch."""

    def __init__(
        self, x_TD: Tensor, weight_N: Tensor | None, weights: FFNWeights, activation: Activation, route: Route
    ):
        self.dtype = compute_dtype(weights.up_EJD.dtype)
        self.x_TD, self.weights, self.activation, self.route = x_TD.to(self.dtype), weights, activation, route
        self.segments = route.segments
        self.weight_N = None if weight_N is None else weight_N[self.segments.order_N].to(self.dtype)
        self.rows, self.inner = weights.up_EJD.shape[1], weights.down_EOI.shape[2]
        self.up_JD, self.down_OI = self.per_expert(weights.up_EJD), self.per_expert(weights.down_EOI)

    def empty(self, *shape: int) -> Tensor:
        return POOL.empty(shape, self.dtype)

    def scratch(self, groups: Sequence[Group], *widths: int) -> list[Tensor]:
        """Buffers [rows of the largest group, width]."""
        most = max((group.stop - group.start for group in groups), default=0)
        return [self.empty(most, width) for width in widths]

    def per_expert(self, stacked: Tensor) -> Sequence[Tensor]:
        """Views of single experts, in the dtype of the computation."""
        views = stacked.unbind(0)
        return views if stacked.dtype == self.dtype else _Cast(views, self.dtype)

    def gather(self, tensor_TD: Tensor, group: Group, out: Tensor) -> Tensor:
        return torch.index_select(
            tensor_TD, 0, self.route.token_N[group.start : group.stop], out=out[: group.stop - group.start]
        )

    def halves(self, pre_NJ: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up; without a gate both are the whole, and the second is unused."""
        return gate_and_up(pre_NJ, self.weights.interleaved) if self.weights.gated else (pre_NJ, pre_NJ)


class _Cast(Sequence[Tensor]):
    """Tensors cast when looked at, one at a time: a whole stack in float32 would double its memory."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tensors, dtype

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        return self.tensors[index].to(self.dtype)


class _Forward(_Pass):
    def __init__(self, *args: Any, keep: bool, exact: bool) -> None:
        super().__init__(*args)
        self.exact = exact
        self.pre_NJ = self._pre(self.segments.num_rows) if keep else None
        self.rows_NO = self.empty(self.segments.num_rows, self.weights.out_dim)

    def run(self) -> Tensor:
        workers.run(self._groups, self.segments, self.weights.macs_per_row, alone=self.exact)
        return self.route.combine(self.rows_NO, self.weight_N)

    def _pre(self, rows: int) -> Tensor:
        """Room for pre-activations. `exact`: with a spare row and column, see `_activate`."""
        return self.empty(rows + self.exact, self.rows + self.exact)[:, : self.rows]

    def _groups(self, groups: Sequence[Group]) -> None:
        weights, most = self.weights, max((group.stop - group.start for group in groups), default=0)
        rows_ND = self.empty(most, self.x_TD.shape[1])
        hidden_NI = self.empty(most + self.exact, self.inner + self.exact)[:, : self.inner]
        pre_NJ = self._pre(most) if self.pre_NJ is None else None
        up_bias_J, down_bias_O = self._biases(weights.up_bias_EJ), self._biases(weights.down_bias_EO)
        for group in groups:
            rows, count = slice(group.start, group.stop), group.stop - group.start
            pre = self.pre_NJ[group.start :] if self.pre_NJ is not None else pre_NJ
            assert pre is not None
            self._linear(group, self.gather(self.x_TD, group, rows_ND), self.up_JD, up_bias_J, pre[:count])
            self._activate(pre, hidden_NI, count)
            self._linear(group, hidden_NI[:count], self.down_OI, down_bias_O, self.rows_NO[rows])

    def _activate(self, pre_NJ: Tensor, hidden_NI: Tensor, count: int) -> None:
        """Hidden rows of the first `count` rows.

        `exact`: torch's loops must start anew in each row, and take the kernel for strided tensors. So neither tensor
        is contiguous, and there are at least 2 rows, since a single one always is; what the spare row holds is unused.
        """
        count = max(count, 2) if self.exact else count
        gate, up = self.halves(pre_NJ[:count])
        hidden = gate_value(gate, self.activation, hidden_NI[:count])
        if self.weights.gated:
            multiply_up(hidden, up, self.activation, hidden)

    def _biases(self, bias_EO: Tensor | None) -> Sequence[Tensor] | None:
        return None if bias_EO is None else self.per_expert(bias_EO)

    def _linear(
        self,
        group: Group,
        rows_NI: Tensor,
        weights_OI: Sequence[Tensor],
        biases_O: Sequence[Tensor] | None,
        out: Tensor,
    ) -> None:
        for expert, rows, target in _pieces(group, rows_NI, out):
            weight_IO = weights_OI[expert].t()
            if self.exact and len(rows) < _LEAST_ROWS:
                padded = F.pad(rows, (0, 0, 0, _LEAST_ROWS - len(rows)))
                target.copy_(torch.mm(padded, weight_IO)[: len(rows)])
                if biases_O is not None:
                    target.add_(biases_O[expert])
            elif biases_O is None or self.exact:
                torch.mm(rows, weight_IO, out=target)
                if biases_O is not None:
                    target.add_(biases_O[expert])
            else:
                torch.addmm(biases_O[expert], rows, weight_IO, out=target)


def _pieces(group: Group, first: Tensor, second: Tensor) -> Iterable[tuple[int, Tensor, Tensor]]:
    """Expert by expert: its id and its rows of two tensors."""
    sizes = group.sizes
    return zip(group.experts, torch.split_with_sizes(first, sizes), torch.split_with_sizes(second, sizes), strict=True)


class _Backward(_Pass):
    """Gradients of one layer; `needs` names those wanted: x, weight, up, down, up_bias, down_bias."""

    def __init__(self, *args: Any, grad_TO: Tensor, pre_NJ: Tensor, needs: frozenset[str]) -> None:
        super().__init__(*args)
        self.grad_TO = grad_TO.to(self.dtype).contiguous()
        self.pre_NJ, self.needs = pre_NJ, needs
        self.grads: dict[str, Tensor] = {}
        stacked = {"up": "up_EJD", "down": "down_EOI", "up_bias": "up_bias_EJ", "down_bias": "down_bias_EO"}
        for name in needs & stacked.keys():
            self.grads[name] = gradient_for(getattr(self.weights, stacked[name]))
            for expert in set(range(self.segments.num_experts)).difference(self.segments.hit):
                self.grads[name][expert].zero_()
        self.weight_grad_N = self.empty(self.segments.num_rows) if "weight" in needs else None
        self.rows_ND = self.empty(self.segments.num_rows, self.x_TD.shape[1]) if "x" in needs else None
        self.wants_pre = not needs.isdisjoint({"x", "up", "up_bias"})

    def run(self, like_TD: Tensor, like_N: Tensor | None) -> dict[str, Tensor]:
        """Gradients by name; those of x and weight in the dtype and order of the tensors given."""
        workers.run(self._groups, self.segments, 2 * self.weights.macs_per_row)
        if self.rows_ND is not None:
            self.grads["x"] = self.route.combine(self.rows_ND, None).to(like_TD.dtype)
        if self.weight_grad_N is not None and like_N is not None:
            grad_N = torch.zeros_like(like_N)
            grad_N[self.segments.order_N] = self.weight_grad_N.to(like_N.dtype)
            self.grads["weight"] = grad_N
        return self.grads

    def _groups(self, groups: Sequence[Group]) -> None:
        wide, out, inner = self.x_TD.shape[1], self.weights.out_dim, self.inner
        buffers = self.scratch(groups, max(wide, out), self.rows, inner, inner, inner)
        for group in groups:
            _, *views = (buffer[: group.stop - group.start] for buffer in buffers)
            self._group(group, buffers[0].view(-1), *views)

    def _group(
        self, group: Group, flat: Tensor, grad_pre: Tensor, value: Tensor, hidden: Tensor, grad_hidden: Tensor
    ) -> None:
        """One group of rows. All tensors are scratch: `flat` for gathered rows, the others [rows, width]."""
        weights, activation, count = self.weights, self.activation, group.stop - group.start
        gate, up = self.halves(self.pre_NJ[group.start : group.stop])
        grad = flat[: count * weights.out_dim].view(count, -1)
        self.gather(self.grad_TO, group, grad)
        gate_value(gate, activation, value)
        if weights.gated:
            multiply_up(value, up, activation, hidden)
        else:
            hidden = value
        if self.wants_pre or self.weight_grad_N is not None:
            _products(group, grad, self.down_OI, grad_hidden)
        self._weigh(group, grad, hidden, grad_hidden, grad_pre)
        self._accumulate("down", group, grad, hidden)
        self._accumulate_bias("down_bias", group, grad)
        if not self.wants_pre:
            return
        gate_grad, up_grad = self.halves(grad_pre)
        if weights.gated:
            up_derivative(grad_hidden, value, up, activation, up_grad)
            multiply_up(grad_hidden, up, activation, grad_hidden)
        gate_derivative(grad_hidden, gate, activation, gate_grad)
        if "up" in self.needs:
            rows = flat[: count * self.x_TD.shape[1]].view(count, -1)
            self._accumulate("up", group, grad_pre, self.gather(self.x_TD, group, rows))
        self._accumulate_bias("up_bias", group, grad_pre)
        if self.rows_ND is not None:
            _products(group, grad_pre, self.up_JD, self.rows_ND[group.start : group.stop])

    def _weigh(self, group: Group, grad: Tensor, hidden: Tensor, grad_hidden: Tensor, spare: Tensor) -> None:
        """The gradient of the routing weights, <grad, expert output>, and the gradients times the weights, in place."""
        rows = slice(group.start, group.stop)
        if self.weight_grad_N is not None:
            product = spare[:, : self.inner]
            torch.mul(grad_hidden, hidden, out=product)
            weight_grad = torch.sum(product, 1, out=self.weight_grad_N[rows])
            if self.weights.down_bias_EO is not None:
                biases = self.per_expert(self.weights.down_bias_EO)
                parts = zip(
                    group.experts,
                    torch.split_with_sizes(weight_grad, group.sizes),
                    torch.split_with_sizes(grad, group.sizes),
                    strict=True,
                )
                for expert, target, grad_NO in parts:
                    target.addmv_(grad_NO, biases[expert])
        if self.weight_N is not None:
            weight_N1 = self.weight_N[rows].unsqueeze(-1)
            grad.mul_(weight_N1)
            grad_hidden.mul_(weight_N1)

    def _accumulate(self, name: str, group: Group, grad_NO: Tensor, rows_NI: Tensor) -> None:
        """Write (or, after an expert's first block, add) grad^T rows into the stacked gradient."""
        if name not in self.grads:
            return
        stacked = self.grads[name]
        parts = zip(
            group.experts,
            torch.split_with_sizes(grad_NO.t(), group.sizes, 1),
            torch.split_with_sizes(rows_NI, group.sizes),
            strict=True,
        )
        for expert, grad_ON, rows in parts:
            target_OI = stacked[expert]
            if stacked.dtype != self.dtype:
                product_OI = torch.mm(grad_ON, rows)
                target_OI.copy_(product_OI if group.first else product_OI.add_(target_OI))
            elif group.first:
                torch.mm(grad_ON, rows, out=target_OI)
            else:
                torch.addmm(target_OI, grad_ON, rows, out=target_OI)  # torch's counter knows no addmm_

    def _accumulate_bias(self, name: str, group: Group, grad_NO: Tensor) -> None:
        if name in self.grads:
            for expert, grad in zip(group.experts, torch.split_with_sizes(grad_NO, group.sizes), strict=True):
                target_O, total_O = self.grads[name][expert], grad.sum(0)
                target_O.copy_(total_O if group.first else total_O.add_(target_O))


def _products(group: Group, rows_NO: Tensor, weights_OI: Sequence[Tensor], out_NI: Tensor) -> None:
    for expert, rows, target in _pieces(group, rows_NO, out_NI):
        torch.mm(rows, weights_OI[expert], out=target)


def _weights(up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, layout: Any) -> FFNWeights:
    gated, interleaved = layout
    return FFNWeights(up, down, gated, up_bias, down_bias, interleaved)


class _SegmentFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x_TD, weight_N, up, down, up_bias, down_bias, layout, activation, route, exact, token_N, expert_N = args
        weights = _weights(up, down, up_bias, down_bias, layout)
        work = _Forward(x_TD, weight_N, weights, activation, route, keep=True, exact=exact)
        y_TO = work.run().to(x_TD.dtype)
        ctx.save_for_backward(x_TD, weight_N, up, down, up_bias, down_bias, work.pre_NJ, token_N, expert_N)
        ctx.layout, ctx.activation, ctx.route = layout, activation, route
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, pre_NJ, token_N, expert_N = ctx.saved_tensors
        x_TD, weight_N, up, down, up_bias, down_bias = inputs
        weights = _weights(up, down, up_bias, down_bias, ctx.layout)
        needs = frozenset(name for name, needed in zip(NAMES, ctx.needs_input_grad, strict=False) if needed)
        if torch.is_grad_enabled():  # create_graph=True: derivatives of derivatives come from the reference
            grads = loop_gradients(x_TD, token_N, expert_N, weight_N, weights, ctx.activation, grad_TO, needs)
        else:
            work = _Backward(
                x_TD,
                weight_N,
                weights,
                ctx.activation,
                ctx.route,
                grad_TO=grad_TO,
                pre_NJ=pre_NJ,
                needs=needs,
            )
            grads = work.run(x_TD, weight_N)
        return (*(grads.get(name) for name in NAMES), *[None] * 6)
