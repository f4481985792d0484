"""Layers of a method by themselves against dense feed-forwards of as many operations: no attention, no optimiser.

For methods whose layers make no assignments that top-k could replay. A step is forward with routing losses, backward,
and clearing of the gradients; the layers stand around a residual stream in one routing context, so that those that
share a router do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.context import open_stack
from moestro.core.cost import Work, cost
from moestro.core.registry import method
from moestro.core.router import Router
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.testing.bench.harness import Arm, Row, interleave, time_rows


DENSE = "dense of equal operations"


def spread(model: Any) -> Any:
    """Give the routers of a fresh model logits of standard deviation 1: clear choices and a nearly even load."""
    for router in model.modules():
        if isinstance(router, Router):
            for parameter in router.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@dataclass(frozen=True)
class Layers:
    """``count`` layers of a method; ``note`` says which, for the report."""

    id: str
    note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    count: int = 4
    hidden: int = 256
    rows: int = 8
    length: int = 128

    def chain(self) -> "Chain":
        """The layers, with fresh weights."""
        torch.manual_seed(0)
        made: Chain = spread(Chain(self))
        return made

    def step(self, shape: object = None) -> "Pass":
        """What is timed; the shape of the other arms of the benchmark does not matter here."""
        return Pass(self)

    def flops(self) -> float:
        """Operations of a forward for one token and layer."""
        with torch.device("meta"):
            layers = Chain(self).layers
        return sum(cost(layer, Work(self.length)) for layer in layers) / self.count

    def twin(self) -> "Layers":
        """As many gated dense feed-forwards, as wide as gives them the same operations."""
        size = max(1, round(self.flops() / (6 * self.hidden)))
        return replace(self, id="train.dense", config={"size": size})

    def time(self, rounds: int) -> list[Row]:
        """Ours against the twin."""
        arms: dict[str, Arm] = {"ours": self.step(), DENSE: self.twin().step()}
        return time_rows(self.words(), "forward+backward", interleave(arms, rounds))

    def words(self) -> str:
        """What is compared."""
        flops = [arm.flops() / 1e6 for arm in (self, self.twin())]
        tokens = self.rows * self.length
        return (
            f"{self.id}, {self.count} layers of width {self.hidden} alone, {self.note}, {tokens} tokens: "
            f"{flops[0]:.2f} MFLOP a token and layer against {flops[1]:.2f}"
        )


class Chain(nn.Module):
    """The layers, each behind a norm and around a residual stream."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        use, shared, dim = method(layers.id), Shared(), layers.hidden
        settings = use.configure(dict(layers.config))
        sites = [
            Site(path=f"layers.{number}.mlp", kind="mlp", module=nn.Identity(), dim=dim, layer=number)
            for number in range(layers.count)
        ]
        self.layers = nn.ModuleList(use.build(site, settings, shared) for site in sites)
        self.shared = shared.modules
        open_stack(self, "model")

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        for layer in self.layers:
            normed = nn.functional.rms_norm(inputs_embeds, inputs_embeds.shape[-1:])
            inputs_embeds = inputs_embeds + layer(normed)
        return inputs_embeds


class Pass:
    """Forward and backward on one batch; the gradient of the output is drawn once."""

    def __init__(self, layers: Layers) -> None:
        self.chain = layers.chain().train()
        shape = (layers.rows, layers.length, layers.hidden)
        self.x_BSD, self.grad_BSD = torch.randn(shape), torch.randn(shape)

    def __call__(self) -> None:
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.chain.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """A number whose gradient in the output is the drawn one, and lightly the losses of the routers."""
        with session(collect=True) as opened:
            y_BSD: Tensor = self.chain(inputs_embeds=self.x_BSD)
            loss = (y_BSD * self.grad_BSD).sum()
            for ctx in opened.take():
                for term in ctx.losses.values():
                    loss = loss + 0.01 / len(self.x_BSD) * term.total
        return loss


def cases() -> list[Layers]:
    """Monet's layers with 512 first and 512 second halves, in both decompositions; all else is as the method has it."""
    return [
        Layers("train.monet", f"512 x 512 = 262144 experts, {kind}", {"axis": 512, "decompose": kind})
        for kind in ("vertical", "horizontal")
    ]
