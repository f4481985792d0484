"""Monet's layer with every pair of halves open and a(u) = max(u, 0)^2, a block of tokens at a time.

Written plainly, a step of the layer is a dozen passes over tensors of all tokens and all halves, which are too large
for a cache and freshly allocated each time: they take as long as the matrix products. Here a block of tokens goes
through the whole layer before the next one comes, and the backward pass is written out, so that what passes between two
products is small, stays in the cache and is changed in place. Kept for the backward pass are max(u, 0) and the sums of
each routing head; the rest is made again. The sums are those of ``monet.HalfExperts``, in its notation: for an axis a
and the other one b, with p_a = max(U_a x + b_a, 0), u_a = p_a^2 and s_a,h = sum_i g_a,hi,

    r_a = g_a u_a [H, m']    M_a = g_a^T r_b [n, m']    P_a = g_a^T s_b [n]
    y_a = M_a X_a + (P_a u_a) W_a + P_a c_a

where ``cross`` X_a and ``own`` W_a are the rows of an axis's down matrix that take the other's half and its own.
Horizontal experts have u_0 and y_1 only, and no W. Two axes answer in two halves of the output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


BLOCK = 128  # tokens: few enough to stay in a cache, enough for a matrix product


def mix(from_THC: Tensor, value_TCI: Tensor, to_THC: Tensor, open_CC: Tensor | None = None) -> Tensor:
    """M_j = sum_h to_hj sum_i open_ij from_hi value_i, [T, n, m]; ``open_CC`` None: all pairs are open."""
    if open_CC is None:
        return torch.einsum("thj,thm->tjm", to_THC, torch.einsum("thi,tim->thm", from_THC, value_TCI))
    open_CC = open_CC.to(value_TCI.dtype)
    total_TCI = torch.zeros_like(value_TCI)
    for head in range(from_THC.shape[1]):  # one at a time: [T, H, n, m] would be H times the layer's activations
        reached_TCI = torch.einsum("ij,tim->tjm", open_CC, from_THC[:, head, :, None] * value_TCI)
        total_TCI = total_TCI + to_THC[:, head, :, None] * reached_TCI
    return total_TCI


def used(own_THC: Tensor, other_THC: Tensor, open_CC: Tensor | None = None) -> Tensor:
    """P_i = sum_h own_hi sum_j open_ij other_hj, [T, n]."""
    if open_CC is None:
        return torch.einsum("thi,th->ti", own_THC, other_THC.sum(-1))
    return (own_THC * (other_THC @ open_CC.to(other_THC.dtype).T)).sum(1)


def fits(experts: nn.Module, *inputs: Tensor) -> bool:
    """Whether ``paired_halves`` may: one type of numbers, and gradients are wanted of all weights or of none."""
    parameters = list(experts.parameters())
    learn = {parameter.requires_grad and torch.is_grad_enabled() for parameter in parameters}
    cast = torch.is_autocast_enabled(inputs[0].device.type)
    return not cast and len(learn) == 1 and len({tensor.dtype for tensor in (*parameters, *inputs)}) == 1


def paired_halves(
    x_TD: Tensor, weights_THC: Sequence[Tensor], ups: Sequence[Tensor], downs: Sequence[Tensor]
) -> Tensor:
    """y [T, O] with gradient.

    Args:
        weights_THC: of both axes.
        ups: matrix [n, m', d] and bias [n, m'] of the only or the first axis, then of the second.
        downs: matrix and bias likewise: [n, m, O] and [n, O], or of each axis [n, m, O / 2] and [n, O / 2].
    """
    y_TO: Tensor = _PairedHalves.apply(x_TD, *weights_THC, *ups, *downs)  # type: ignore[no-untyped-call]
    return y_TO


class _Parts:
    """The parameters as matrices of n m' rows, by axis; ``sources`` have an up matrix, ``targets`` a down matrix."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        ups, downs = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        self.vertical = len(ups) == 4
        self.sources: tuple[int, ...] = (0, 1) if self.vertical else (0,)
        self.targets: tuple[int, ...] = (0, 1) if self.vertical else (1,)
        self.axis, self.size, _ = ups[0].shape
        self.up = {a: (ups[2 * i].flatten(0, 1), ups[2 * i + 1].flatten()) for i, a in enumerate(self.sources)}
        self.bias = {a: downs[2 * i + 1] for i, a in enumerate(self.targets)}
        down = {a: downs[2 * i] for i, a in enumerate(self.targets)}
        self.own: dict[int, Tensor] = {}
        if self.vertical:  # u stands in the first rows of both, v in the others
            halves = {a: [half.flatten(0, 1) for half in down[a].chunk(2, 1)] for a in self.targets}
            self.own = {a: halves[a][a] for a in self.targets}
            self.cross = {a: halves[a][1 - a] for a in self.targets}
        else:
            self.cross = {a: down[a].flatten(0, 1) for a in self.targets}

    def halves(self, rows_TX: Tensor) -> Tensor:
        """[T, n m'] as [T, n, m']."""
        return rows_TX.view(len(rows_TX), self.axis, self.size)

    def join_down(self, own: dict[int, Tensor], cross: dict[int, Tensor], a: int) -> Tensor:
        """``own`` and ``cross`` of an axis as its down matrix."""
        if not self.vertical:
            return cross[a].view(self.axis, self.size, -1)
        order = (own[a], cross[a]) if a == 0 else (cross[a], own[a])
        return torch.cat([half.view(self.axis, self.size, -1) for half in order], 1)


def _used(g: Sequence[Tensor], total: Sequence[Tensor]) -> list[Tensor]:
    """P_a [T, n] of both axes; total: s_a [T, H]."""
    return [torch.bmm(total[1 - a][:, None], g[a])[:, 0] for a in (0, 1)]


class _PairedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, first_THC: Tensor, second_THC: Tensor, *parameters: Tensor) -> Tensor:
        parts, (tokens, heads, _) = _Parts(parameters), first_THC.shape
        positive = {a: x_TD.new_empty(tokens, parts.axis * parts.size) for a in parts.sources}
        summed = {a: x_TD.new_empty(tokens, heads, parts.size) for a in parts.sources}
        y = {a: x_TD.new_empty(tokens, parts.bias[a].shape[1]) for a in parts.targets}
        for start in range(0, tokens, BLOCK):
            at = slice(start, start + BLOCK)
            g = [first_THC[at], second_THC[at]]
            used = _used(g, [part.sum(-1) for part in g])
            u = {}
            for a in parts.sources:
                up, bias = parts.up[a]
                p = torch.addmm(bias, x_TD[at], up.T, out=positive[a][at]).relu_()
                u[a] = parts.halves(p.square())
                torch.bmm(g[a], u[a], out=summed[a][at])
            for a in parts.targets:
                torch.mm(used[a], parts.bias[a], out=y[a][at])
                if parts.vertical:
                    y[a][at].addmm_(u[a].mul_(used[a][..., None]).flatten(1), parts.own[a])
                mixed = torch.bmm(g[a].transpose(1, 2), summed[1 - a][at])
                y[a][at].addmm_(mixed.flatten(1), parts.cross[a])
        ctx.save_for_backward(x_TD, first_THC, second_THC, *positive.values(), *summed.values(), *parameters)
        return torch.cat(list(y.values()), 1) if parts.vertical else y[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, ...]:
        x_TD, first_THC, second_THC, *kept = ctx.saved_tensors
        count = 2 if len(kept) == 12 else 1  # axes with parameters: each keeps two tensors and has four
        parts = _Parts(kept[2 * count :])
        positive, summed = (dict(zip(parts.sources, kept[i * count :], strict=False)) for i in (0, 1))
        whole = _Grads(parts, x_TD, first_THC)
        for start in range(0, len(x_TD), BLOCK):
            at = slice(start, start + BLOCK)
            g, x, dg = [first_THC[at], second_THC[at]], x_TD[at], [part[at] for part in whole.weights]
            total = [part.sum(-1) for part in g]
            used = _used(g, total)
            u = {a: parts.halves(positive[a][at].square()) for a in parts.sources}
            du, dr = {}, {}
            for a, dy in zip(parts.targets, grad_TO[at].chunk(len(parts.targets), 1), strict=True):
                turned, r = g[a].transpose(1, 2), summed[1 - a][at]
                whole.cross[a].addmm_(torch.bmm(turned, r).flatten(1).T, dy)
                whole.bias[a].addmm_(used[a].T, dy)
                dmixed = parts.halves(dy @ parts.cross[a].T)
                dused = dy @ parts.bias[a].T
                if parts.vertical:
                    down = parts.halves(dy @ parts.own[a].T)
                    scaled = u[a] * used[a][..., None]
                    whole.own[a].addmm_(scaled.flatten(1).T, dy)
                    dused += torch.mul(down, u[a], out=scaled).sum(-1)
                    du[a] = down.mul_(used[a][..., None])
                dr[1 - a] = torch.bmm(g[a], dmixed)
                dg[a].baddbmm_(r, dmixed.transpose(1, 2))
                dg[a].baddbmm_(total[1 - a][..., None], dused[:, None])
                dg[1 - a].add_(torch.bmm(g[a], dused[..., None]))
            for a in parts.sources:
                dg[a].baddbmm_(dr[a], u[a].transpose(1, 2))
                turned = g[a].transpose(1, 2)
                du[a] = du[a].baddbmm_(turned, dr[a]) if a in du else torch.bmm(turned, dr[a])
                half = du[a].flatten(1).mul_(positive[a][at])  # the gradient of u before the activation is twice this
                whole.up[a].addmm_(half.T, x, alpha=2)
                whole.up_bias[a].add_(half.sum(0), alpha=2)
                whole.x[at].addmm_(half, parts.up[a][0], alpha=2)
        return whole.of_inputs(parts)


class _Grads:
    """Where the blocks add up their gradients."""

    def __init__(self, parts: _Parts, x_TD: Tensor, weight_THC: Tensor) -> None:
        self.x = torch.zeros_like(x_TD)
        self.weights = [torch.zeros_like(weight_THC) for _ in (0, 1)]
        self.up, self.up_bias = ({a: torch.zeros_like(both[i]) for a, both in parts.up.items()} for i in (0, 1))
        self.own, self.cross, self.bias = (
            {a: torch.zeros_like(part) for a, part in named.items()} for named in (parts.own, parts.cross, parts.bias)
        )

    def of_inputs(self, parts: _Parts) -> tuple[Tensor, ...]:
        """In the order and shapes of the function's inputs."""
        shape = (parts.axis, parts.size)
        ups = [(self.up[a].view(*shape, -1), self.up_bias[a].view(shape)) for a in parts.sources]
        downs = [(parts.join_down(self.own, self.cross, a), self.bias[a]) for a in parts.targets]
        return self.x, *self.weights, *(grad for pair in (*ups, *downs) for grad in pair)
