"""The experts of the wheel `moestro-native` as operators of torch: `torch.ops.moestro.experts_forward`, `_backward`.

As operators they are seen by all that watches what torch runs: counters of operations, profilers, selective
checkpointing. Their formulas give torch's counter the matrix products that they stand for, those of `segments`. They
have no derivatives of their own; `native_ffn` gives them some.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moestro.ops.loop import NAMES
from moestro.ops.pool import POOL, gradient_for
from moestro.ops.weights import FFNWeights


_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_oss")  # in the order of the wheel
_INPUTS = (
    "Tensor x, Tensor? weight, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor token, "
    "Tensor expert, str activation, bool gated, bool interleaved"
)


@cache
def wheel() -> Any:
    """The module `moestro_native` if it is here and knows training, or None."""
    if os.environ.get("MOESTRO_NATIVE") == "0":
        return None
    try:
        import moestro_native  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return moestro_native if hasattr(moestro_native, "train_features") else None


class Call:
    """One layer's experts and one routing, as addresses; the tensors behind them are kept alive here."""

    def __init__(
        self,
        x_TD: Tensor,
        weight_N: Tensor | None,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        token_N: Tensor,
        expert_N: Tensor,
        activation: str,
        gated: bool,
        interleaved: bool,
    ) -> None:
        self.weights = weights = FFNWeights(up, down, gated, up_bias, down_bias, interleaved)
        assert x_TD.dtype == up.dtype == torch.float32
        assert x_TD.shape[1] == up.shape[2]
        assert len(token_N) == len(expert_N) == (len(expert_N) if weight_N is None else len(weight_N))
        self.x_TD = x_TD.contiguous()
        self.weight_N = None if weight_N is None else weight_N.to(torch.float32).contiguous()
        self.biases = [None if b is None else b.contiguous() for b in (up_bias, down_bias)]
        token_N, expert_N = token_N.to(torch.int64).contiguous(), expert_N.to(torch.int64).contiguous()
        self.threads = torch.get_num_threads()
        self.bank = wheel().Bank(
            weights.num_experts,
            up.shape[2],
            down.shape[2],
            weights.out_dim,
            _ACTIVATIONS.index(activation),
            gated,
            interleaved,
            _strided(up),
            _strided(down),
            *map(_address, self.biases),
        )
        self.route = wheel().Route(_address(token_N), _address(expert_N), len(expert_N), weights.num_experts, len(x_TD))

    def _rows(self, width: int) -> Tensor:
        return POOL.empty((self.route.rows, width), torch.float32)

    def _scratch(self, *, backward: bool) -> Tensor:
        return POOL.empty((self.bank.scratch(self.threads, backward),), torch.float32)

    def forward(self, *, keep: bool) -> tuple[Tensor, Tensor]:
        weights = self.weights
        pre_NJ = self._rows(weights.up_EJD.shape[1] if keep else 0)
        rows_NO = self._rows(weights.out_dim)
        y_TO = POOL.empty((len(self.x_TD), weights.out_dim), torch.float32, exact=True)
        given = (_address(self.x_TD), _address(self.weight_N), _address(pre_NJ) if keep else 0)
        scratch = self._scratch(backward=False)
        self.bank.forward(self.route, *given, *map(_address, (rows_NO, y_TO, scratch)), self.threads)
        return y_TO, pre_NJ

    def backward(self, grad_TO: Tensor, pre_NJ: Tensor, needs: Sequence[bool]) -> dict[str, Tensor]:
        """Gradients of the inputs that need one, by name; that of the weights of the routing in float32."""
        assert grad_TO.shape == (len(self.x_TD), self.weights.out_dim)
        assert pre_NJ.shape == (self.route.rows, self.weights.up_EJD.shape[1])
        inputs = (self.x_TD, self.weight_N, self.weights.up_EJD, self.weights.down_EOI, *self.biases)
        grads = _gradients(inputs, needs, gradient_for)
        grad_TO, pre_NJ, scratch = grad_TO.contiguous(), pre_NJ.contiguous(), self._scratch(backward=True)
        rows_ND = self._rows(self.x_TD.shape[1]) if "x" in grads else None
        self.bank.backward(
            self.route,
            _address(self.x_TD),
            _address(self.weight_N),
            0 if self.weight_N is None else len(self.weight_N),
            *map(_address, (grad_TO, pre_NJ, rows_ND, grads.get("x"), grads.get("weight"))),
            *(_strided(grads.get(name)) for name in ("up", "down")),
            *(_address(grads.get(name)) for name in ("up_bias", "down_bias")),
            _address(scratch),
            self.threads,
        )
        return grads


def _gradients(
    inputs: Sequence[Tensor | None], needs: Sequence[bool], room_for: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Room for the gradients of the inputs that need one, in their order."""
    named = zip(NAMES, inputs, needs, strict=True)
    return {name: room_for(tensor) for name, tensor, needed in named if needed and tensor is not None}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strided(stacked: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if stacked is None else (stacked.data_ptr(), *stacked.stride())  # type: ignore[return-value]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *given, keep = args
    return Call(*given).forward(keep=keep)


def _backward(grad_TO: Tensor, pre_NJ: Tensor, *args: Any) -> list[Tensor]:
    *given, needs = args
    grads = Call(*given).backward(grad_TO, pre_NJ, needs)
    if "weight" in grads:
        grads["weight"] = grads["weight"].to(given[1].dtype)
    return list(grads.values())


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    x_TD, _, up, down, *_, keep = args
    rows = torch.library.get_ctx().new_dynamic_size()
    return x_TD.new_empty(x_TD.shape[0], down.shape[1]), x_TD.new_empty(rows, up.shape[1] if keep else 0)


def _fake_backward(grad_TO: Tensor, pre_NJ: Tensor, *args: Any) -> list[Tensor]:
    *given, needs = args
    fresh = partial(gradient_for, empty=lambda shape, dtype, *, exact: grad_TO.new_empty(shape, dtype=dtype))
    return list(_gradients(given[:6], needs, fresh).values())


def _macs(up_EJD: Sequence[int], down_EOI: Sequence[int]) -> tuple[int, int]:
    """Multiply-adds of one row through the two projections."""
    return up_EJD[1] * up_EJD[2], down_EOI[1] * down_EOI[2]


def _forward_flops(x: Any, weight: Any, up: Any, down: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    rows: int = out_shape[1][0]
    return 2 * rows * sum(_macs(up, down))


def _backward_flops(grad: Any, pre: Any, x: Any, weight: Any, up: Any, down: Any, *rest: Any, **_: Any) -> int:
    """Gradients of the hidden rows where anything before them needs one, of x, and of the stacked weights."""
    rows: int = pre[0]
    needs: dict[str, bool] = dict(zip(NAMES, rest[-1], strict=True))
    up_macs, down_macs = _macs(up, down)
    hidden = needs["x"] or needs["weight"] or needs["up"] or needs["up_bias"]
    return 2 * rows * (up_macs * (needs["x"] + needs["up"]) + down_macs * (hidden + needs["down"]))


_LIBRARY: Any = torch.library.Library("moestro", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"experts_forward({_INPUTS}, bool keep) -> (Tensor y, Tensor pre)")
_LIBRARY.define(f"experts_backward(Tensor grad, Tensor pre, {_INPUTS}, bool[] needs) -> Tensor[]")
_LIBRARY.impl("experts_forward", _forward, "CPU")
_LIBRARY.impl("experts_backward", _backward, "CPU")
torch.library.register_fake("moestro::experts_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("moestro::experts_backward", _fake_backward, lib=_LIBRARY)
register_flop_formula(torch.ops.moestro.experts_forward)(_forward_flops)
register_flop_formula(torch.ops.moestro.experts_backward)(_backward_flops)

experts_forward: Any = torch.ops.moestro.experts_forward.default
"""(x, weight, up, down, up_bias, down_bias, token, expert, activation, gated, interleaved, keep) -> (y, pre).

The arguments are those of `fused_ffn` and `FFNWeights`. pre: pre-activations [N', J] of the N' assignments to real
experts, gate's half first, sorted by expert; without `keep` [N', 0].
"""

experts_backward: Any = torch.ops.moestro.experts_backward.default
"""(gradient of y, pre, the arguments of `experts_forward` without `keep`, needs) -> gradients.

needs: six booleans, which of `NAMES` need a gradient; one is returned for each that does and is there, in this order.
"""
