"""The C++ path of training: forward and backward of all experts of a layer in the wheel `moestro-native`.

Optional: without the wheel, without vector units it knows, or for other dtypes than float32, torch's own products do
the work (`segments`). What it saves over them: no call for each expert, gathers and activations inside the products'
panels, and every thread of torch's own team on another expert. Bits do not depend on the number of threads. The
environment variable MOESTRO_NATIVE=0 switches it off.
"""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.ops.activation import Activation
from moestro.ops.loop import loop_gradients
from moestro.ops.pool import POOL, gradient_for
from moestro.ops.weights import FFNWeights


_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_oss")  # in the order of the wheel
_NAMES = ("x", "weight", "up", "down", "up_bias", "down_bias")


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


@cache
def is_fast() -> bool:
    """Does the wheel have vector kernels for this processor? Its plain loops are slower than torch's products."""
    native = wheel()
    return native is not None and native.train_features()["isa"] != "scalar"


def training_backend() -> str:
    """What `auto` takes for float32 on the CPU: "native", or "segments" where that is not to be had."""
    return "native" if is_fast() else "segments"


def fits(*tensors: Tensor | None) -> bool:
    """Can the wheel read these? Dense float32 of the CPU, and no tensor of another kind than torch's own."""
    return all(t is None or (t.dtype == torch.float32 and _is_plain(t)) for t in tensors)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def native_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
) -> Tensor:
    """The same function as `loop_ffn`. Raises ConfigError without the wheel and for dtypes other than float32."""
    tensors = (weights.up_EJD, weights.down_EOI, weights.up_bias_EJ, weights.down_bias_EO)
    if wheel() is None:
        raise ConfigError("backend 'native' needs the wheel moestro-native (pip install ./native); use 'segments'")
    if not fits(x_TD, *tensors):
        raise ConfigError(
            f"backend 'native' takes float32 on the CPU; got {weights.up_EJD.dtype} on {x_TD.device}; use 'segments'"
        )
    extras = ((weights.gated, weights.interleaved), activation, token_N, expert_N)
    inputs = (x_TD, weight_N, *tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        y_TO: Tensor = _NativeFFN.apply(*inputs, *extras)  # type: ignore[no-untyped-call]
        return y_TO
    return _Call(x_TD, weight_N, weights, activation, token_N, expert_N).forward(keep=False)[0]


class _Call:
    """One layer's experts and one routing, as addresses; the tensors behind them are kept alive here."""

    def __init__(
        self,
        x_TD: Tensor,
        weight_N: Tensor | None,
        weights: FFNWeights,
        activation: Activation,
        token_N: Tensor,
        expert_N: Tensor,
        route: Any = None,
    ) -> None:
        up, down = weights.up_EJD, weights.down_EOI
        self.x_TD = x_TD.contiguous()
        self.weight_N = None if weight_N is None else weight_N.to(torch.float32).contiguous()
        self.biases = [None if b is None else b.contiguous() for b in (weights.up_bias_EJ, weights.down_bias_EO)]
        self.weights, self.tokens, self.assignments = weights, len(x_TD), len(expert_N)
        self.threads = torch.get_num_threads()
        self.bank = wheel().Bank(
            up.shape[0],
            up.shape[2],
            down.shape[2],
            down.shape[1],
            _ACTIVATIONS.index(activation),
            weights.gated,
            weights.interleaved,
            _strided(up),
            _strided(down),
            *map(_address, self.biases),
        )
        if route is None:
            token_N, expert_N = token_N.to(torch.int64).contiguous(), expert_N.to(torch.int64).contiguous()
            route = wheel().Route(_address(token_N), _address(expert_N), len(expert_N), up.shape[0], self.tokens)
        self.route = route

    def _rows(self, width: int) -> Tensor:
        return POOL.empty((self.route.rows, width), torch.float32)

    def _scratch(self, *, backward: bool) -> Tensor:
        return POOL.empty((self.bank.scratch(self.threads, backward),), torch.float32)

    def forward(self, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """y [T, O] and, to keep for backward, pre-activations [N', J]: gate's half first, in the order of rows."""
        out = self.weights.out_dim
        pre_NJ = self._rows(self.weights.up_EJD.shape[1]) if keep else None
        rows_NO, y_TO = self._rows(out), POOL.empty((self.tokens, out), torch.float32)
        scratch = self._scratch(backward=False)
        given = (_address(self.x_TD), _address(self.weight_N))
        self.bank.forward(self.route, *given, *map(_address, (pre_NJ, rows_NO, y_TO, scratch)), self.threads)
        return y_TO, pre_NJ

    def backward(self, grad_TO: Tensor, pre_NJ: Tensor, needs: set[str]) -> dict[str, Tensor]:
        """Gradients of those inputs that are named."""
        weights, dim = self.weights, self.x_TD.shape[1]
        grads: dict[str, Tensor] = {}
        if "x" in needs:
            grads["x"] = POOL.empty((self.tokens, dim), torch.float32, exact=True)
        if "weight" in needs:
            grads["weight"] = torch.empty(self.assignments)
        stacked = {"up": weights.up_EJD, "down": weights.down_EOI}
        stacked |= {name: b for name, b in zip(("up_bias", "down_bias"), self.biases, strict=True) if b is not None}
        for name in needs & stacked.keys():
            grads[name] = gradient_for(stacked[name])
        rows_ND = self._rows(dim) if "x" in needs else None
        grad_TO, scratch = grad_TO.contiguous(), self._scratch(backward=True)
        self.bank.backward(
            self.route,
            _address(self.x_TD),
            _address(self.weight_N),
            self.assignments,
            *map(_address, (grad_TO, pre_NJ, rows_ND, grads.get("x"), grads.get("weight"))),
            *(_strided(grads.get(name)) for name in ("up", "down")),
            *(_address(grads.get(name)) for name in ("up_bias", "down_bias")),
            _address(scratch),
            self.threads,
        )
        return grads


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strided(stacked: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if stacked is None else (stacked.data_ptr(), *stacked.stride())  # type: ignore[return-value]


class _NativeFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x_TD, weight_N, up, down, up_bias, down_bias, (gated, interleaved), activation, token_N, expert_N = args
        weights = FFNWeights(up, down, gated, up_bias, down_bias, interleaved)
        call = _Call(x_TD, weight_N, weights, activation, token_N, expert_N)
        y_TO, pre_NJ = call.forward(keep=True)
        ctx.save_for_backward(*args[:6], pre_NJ, token_N, expert_N)
        ctx.layout, ctx.activation, ctx.route = (gated, interleaved), activation, call.route
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, pre_NJ, token_N, expert_N = ctx.saved_tensors
        x_TD, weight_N, up, down, up_bias, down_bias = inputs
        gated, interleaved = ctx.layout
        weights = FFNWeights(up, down, gated, up_bias, down_bias, interleaved)
        needs = {name for name, needed in zip(_NAMES, ctx.needs_input_grad, strict=False) if needed}
        if torch.is_grad_enabled():  # create_graph=True: derivatives of derivatives come from the reference
            grads = loop_gradients(x_TD, token_N, expert_N, weight_N, weights, ctx.activation, grad_TO, needs)
        else:
            call = _Call(x_TD, weight_N, weights, ctx.activation, token_N, expert_N, ctx.route)
            grads = call.backward(grad_TO, pre_NJ, needs)
            if "weight" in grads:
                grads["weight"] = grads["weight"].to(weight_N.dtype)
        return (*(grads.get(name) for name in _NAMES), *[None] * 4)
