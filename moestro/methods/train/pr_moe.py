"""Pyramid-residual mixture: a fixed feed-forward beside one routed expert, and more experts in the last layers.

For x [D], routed branch r(x) = sum over chosen of p_i FFN_i(x) and a feed-forward MLP(x) of an expert's form that
every token runs through:

    residual="learned":  (c_0, c_1) = softmax(W_c x + b_c),   y = c_0 r(x) + c_1 MLP(x)        W_c [2, D], b_c [2]
    residual="sum":      y = r(x) + MLP(x)
    residual="none":     y = r(x)

One expert a token beside the fixed branch costs what two experts a token cost, and moves half as many rows. A token
that capacity dropped has r(x) = 0, so with "learned" it keeps c_1 MLP(x), not all of it. All experts and the fixed
branch start as copies of one network; the router alone makes them different.

The pyramid is a list of expert counts, one a mixture layer, usually twice as many in the last two (``pyramid``). A swap
takes it as ``num_experts: {per_layer: [4, 4, 8, 8]}`` and refuses a list of another length than its sites.

Source: DeepSpeed-MoE (2201.05596, section 4: phenomena I and II, PR-MoE); "learned" is what its released code does.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.router import exact_linear
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.dense import DenseFFN


class Config(BaseConfig):
    """Settings of one layer; None means as in the feed-forward that stands at the site, as for ``train.moe``.

    Attributes:
        num_experts: E of this layer. residual: how the fixed branch joins, or no such branch.
        expert_size, activation, gated, bias: form of the experts and of the fixed branch.
        router: a router method; its num_experts is filled in. losses: name -> loss method.
    """

    num_experts: int = Field(default=8, ge=1)
    residual: Literal["learned", "sum", "none"] = "learned"
    expert_size: int | None = Field(default=None, ge=1)
    activation: ops.Activation | None = None
    gated: bool | None = None
    bias: bool | None = None
    router: MethodUse = MethodUse(method="train.softmax_topk", config={"top_k": 1, "renormalise": False})
    losses: dict[str, MethodUse] = Field(
        default_factory=lambda: {"balance": MethodUse(method="train.balance_loss", config={"scope": "batch"})}
    )


def pyramid(num_experts: int, layers: int, *, wide: int = 2, factor: int = 2) -> list[int]:
    """Expert counts of ``layers`` mixture layers: ``num_experts``, and ``factor`` times as many in the last ``wide``.

    Raises:
        ConfigError: a count below 1, or more wide layers than layers.
    """
    if min(num_experts, layers, factor) < 1 or not 0 <= wide <= layers:
        raise ConfigError(
            f"no pyramid of {num_experts} experts in {layers} layers, {factor} times as many in the last {wide}; "
            "counts must be >= 1 and the wide layers among the layers"
        )
    return [num_experts] * (layers - wide) + [factor * num_experts] * wide


def mix(routed_TO: Tensor, dense_TO: Tensor, logits_T2: Tensor) -> Tensor:
    """c_0 routed + c_1 dense [T, O] with c = softmax of the logits [T, 2]; c is computed in float32."""
    share_T2 = logits_T2.float().softmax(-1).to(routed_TO.dtype)
    return share_T2[:, :1] * routed_TO + share_T2[:, 1:] * dense_TO


class LearnedMix(nn.Module):
    """The combine of "learned": weighs both branches token by token. Parameters ``weight`` [2, D], ``bias`` [2]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        linear = nn.Linear(dim, 2)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, routed_TO: Tensor, shared_TO: Tensor | None, x_TD: Tensor, routing: Routing) -> Tensor:
        """See ``moestro.core.layer.add_shared``.

        Raises:
            ConfigError: there is no fixed branch to weigh against.
        """
        if shared_TO is None:
            raise ConfigError("a learned mix of two branches, but the layer lost its fixed one; keep layer.shared")
        return mix(routed_TO, shared_TO, exact_linear(x_TD, self.weight, self.bias))


@torch.no_grad()
def copy_into(bank: StackedFFN, branch: DenseFFN) -> None:
    """Make every expert of ``bank`` a copy of ``branch``, in place."""
    one = dict(branch.bank.named_parameters())
    for name, parameter in bank.named_parameters():
        parameter.copy_(one[name].expand_as(parameter))


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site of width ``site.dim``.

    Raises:
        ConfigError: what ``train.moe`` raises: an open size that the site does not tell, a part of the wrong kind.
    """
    plain = method("train.moe")
    layer = plain.build(site, plain.configure(config.model_dump(exclude={"residual"})), shared)
    assert isinstance(layer, MoELayer)
    bank = layer.bank
    assert isinstance(bank, StackedFFN)
    if bank.out != bank.dim:
        raise ConfigError(f"{site.path}: {bank.dim} in, {bank.out} out; a fixed branch needs as many out as in")
    branch = DenseFFN(bank.dim, bank.inner, activation=bank.activation, gated=bank.gated, bias=bank.up_bias is not None)
    copy_into(bank, branch)
    if config.residual != "none":
        layer.shared = branch
    if config.residual == "learned":
        layer.combine = LearnedMix(site.dim)
    return layer


CARD = MethodCard(
    title="DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale",
    year=2022,
    arxiv="2201.05596",
    paper="deepspeed-moe",
    summary="A fixed feed-forward beside one routed expert, and more experts in the last layers.",
    taxonomy="experts/shared-expert",
    deviations=(
        "the paper adds the branches up; the default weighs them as its released code does (residual='sum' adds)",
        "no token is dropped by default; router: train.random_token_selection has the released code's capacity",
        "the weights of the branches are computed in float32",
    ),
)
