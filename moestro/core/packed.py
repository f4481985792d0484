"""A bank whose matrices are packed: small codes with scales, a format for every expert and projection."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import Bank, StackedFFN
from moestro.core.errors import ConfigError
from moestro.core.routing import Routing
from moestro.ops.formats import (
    Packing,
    Parts,
    check_packing,
    dequantise,
    format_named,
    packed_linear,
    packed_nbytes,
    packing,
)


Formats = Mapping[str, str | Sequence[str]]
"""Projection -> the packing of all experts, or one for each expert, spelled as in ``ops.formats``."""


class PackedFFN(Bank):
    """Feed-forward experts as in ``StackedFFN`` whose matrices are packed, each in a format of its own.

    Experts with the same packing of a projection share buffers: the n-th packing among the up projections has
    ``up_<n>_codes`` [E_n, ...] and so on, see docs/formats.md. They are buffers, not parameters: nothing trains them,
    and they keep their types when the model changes its own. Biases are float parameters under StackedFFN's names.

    Args:
        dim: D. inner: I. out: O, D when None. formats: see Formats. activation, gated, bias: as in StackedFFN.

    Raises:
        ConfigError: a projection without packings, not one packing an expert, or a packing that does not fit.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        inner: int,
        formats: Formats,
        *,
        activation: ops.Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        out: int | None = None,
    ) -> None:
        super().__init__(num_experts)
        self.dim, self.inner, self.out = dim, inner, dim if out is None else out
        self.activation: ops.Activation = activation
        self.gated = gated
        self.projections = ("gate", "up", "down") if gated else ("up", "down")
        rows = 2 * inner if gated else inner
        self.register_parameter(self._up_bias_name, nn.Parameter(torch.zeros(num_experts, rows)) if bias else None)
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, self.out)) if bias else None
        if set(formats) != set(self.projections):
            raise ConfigError(f"packings for {', '.join(formats)}; these experts have {', '.join(self.projections)}")
        self.packings: dict[str, list[Packing]] = {}
        self._where: dict[str, list[tuple[int, int]]] = {}  # projection -> expert -> (number of its stack, place in it)
        for name in self.projections:
            self._add(name, formats[name])

    @property
    def _up_bias_name(self) -> str:
        return "gate_up_proj_bias" if self.gated else "up_proj_bias"

    def _add(self, name: str, spelled: str | Sequence[str]) -> None:
        """Make the buffers of one projection."""
        each = [spelled] * self.num_experts if isinstance(spelled, str) else list(spelled)
        if len(each) != self.num_experts:
            raise ConfigError(f"{len(each)} packings of {name} for {self.num_experts} experts")
        shape = self.shape(name)
        known = {word: check_packing(packing(word), shape[1]) for word in dict.fromkeys(each)}
        used = [known[word] for word in each]
        stacks = list(dict.fromkeys(used))
        counts = [0] * len(stacks)
        self.packings[name], self._where[name] = used, []
        for one in used:
            number = stacks.index(one)
            self._where[name].append((number, counts[number]))
            counts[number] += 1
        for number, (one, count) in enumerate(zip(stacks, counts, strict=True)):
            for part, (size, kind) in format_named(one.format).parts(shape, one).items():
                self.register_buffer(f"{name}_{number}_{part}", torch.zeros(count, *size, dtype=kind))

    def shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of a projection."""
        return (self.out, self.inner) if projection == "down" else (self.inner, self.dim)

    @property
    def up_bias(self) -> Tensor | None:
        """Bias of gate and up [E, J], or None."""
        bias: Tensor | None = getattr(self, self._up_bias_name)
        return bias

    def take_biases(self, bank: StackedFFN) -> None:
        """Hold the very biases of a float bank of the same form."""
        setattr(self, self._up_bias_name, bank.up_bias)
        self.down_proj_bias = bank.down_proj_bias

    @torch.no_grad()
    def put(self, expert: int, projection: str, parts: Parts) -> None:
        """Store one matrix: tensors as its packing's format packs them, without a leading [E]."""
        for name, part in self.parts(expert, projection).items():
            part.copy_(parts[name])

    def formats(self) -> dict[str, str | list[str]]:
        """The packings as ``formats`` takes them, a single one where all experts have the same."""
        found: dict[str, str | list[str]] = {}
        for name, used in self.packings.items():
            each = [str(one) for one in used]
            found[name] = each[0] if len(set(each)) == 1 else each
        return found

    def parts(self, expert: int, projection: str) -> Parts:
        """The stored tensors of one matrix; views."""
        self.check(projection, expert)
        used = self.packings[projection][expert]
        number, place = self._where[projection][expert]
        names = format_named(used.format).parts(self.shape(projection), used)
        return {part: self.get_buffer(f"{projection}_{number}_{part}")[place] for part in names}

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See Bank. Experts run one after another over their rows; some rows of a matrix are floats at a time."""
        segments = ops.sort_rows(routing.expert_N, self.num_experts)
        token_N = routing.token_N[segments.order_N]
        outputs = [x_TD.new_zeros(0, self.out)]
        for expert in segments.hit:
            hidden_NI = self.hidden(expert, x_TD[token_N[segments.slice(expert)]])
            y_NO = self._product(hidden_NI, expert, "down")
            outputs.append(y_NO if self.down_proj_bias is None else y_NO + self.down_proj_bias[expert])
        return ops.scatter_rows(torch.cat(outputs), token_N, routing.weight_N[segments.order_N], routing.num_tokens)

    def hidden(self, expert: int, rows_ND: Tensor) -> Tensor:
        """What enters the down projection of one expert, [N, I], for its input rows [N, D]."""
        pre_NJ = torch.cat([self._product(rows_ND, expert, name) for name in self.projections[:-1]], -1)
        if self.up_bias is not None:
            pre_NJ = pre_NJ + self.up_bias[expert]
        return ops.apply_activation(pre_NJ, self.activation, self.gated)

    def _product(self, rows: Tensor, expert: int, projection: str) -> Tensor:
        used = self.packings[projection][expert]
        return packed_linear(rows, self.parts(expert, projection), self.shape(projection), used)

    def weight(self, expert: int, projection: str) -> Tensor:
        """See Bank. Dequantised float32, a fresh tensor at every call."""
        parts = self.parts(expert, projection)
        return dequantise(parts, self.shape(projection), self.packings[projection][expert])

    def nbytes(self, expert: int) -> int:
        """See Bank. Codes, scales, zero points and biases as they are stored."""
        self.check("down", expert)
        packed = sum(packed_nbytes(self.shape(name), used[expert]) for name, used in self.packings.items())
        biases = [b[expert] for b in (self.up_bias, self.down_proj_bias) if b is not None]
        return packed + sum(b.numel() * b.element_size() for b in biases)

    def flops_per_row(self, expert: int) -> int:
        """See Bank. Products only: dequantising costs no matrix product."""
        return sum(2 * self.shape(name)[0] * self.shape(name)[1] for name in self.projections)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """Devices change as asked; buffers keep their types, or ``model.bfloat16()`` would round scales in silence."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self
