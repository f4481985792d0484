"""Experts in a bidirectional encoder: in the middle of it, in new layers on top of it, or as a mixture before its head.

For tokens x [T, D], experts FFN_e(x) = act(x Wu_e^T) Wd_e^T and p = softmax(x W^T) [T, E]:

    replace  y = w FFN_e(x), e = argmax p, in the place of a block's feed-forward. At a ``block`` site each expert is a
             copy of it; with weights that sum to 1 the encoder starts as it was. A ``mlp`` site with a feed-forward
             split over two modules (BERT) does not show all of it and is refused.
    stack    ``layers`` new blocks on the encoder's last one: h + Attention(LN h), then h + y(LN h) with
             y = p_e FFN_e; a LayerNorm at the end. All of them, and all their experts, start as copies of one.
    head     y = x + sum_j g_j FFN_ej(x) on the encoder's output, e1 = argmax p, e2 the next one, (g1, g2) their p over
             the sum. ``residual`` False leaves x out, so that a token without a place becomes 0.

Places: an expert takes C = max(min(n, floor(n f / E)), min_capacity) tokens of a sequence of n, first come, first
served, all first choices before second ones; f is ``capacity_factor`` while training and ``eval_capacity_factor``
otherwise, None drops nothing. Padding takes no place. A second expert is asked by ``second_policy``: all, none,
threshold (g2 above it), or random, with probability min(1, g2 / threshold).

``weight`` of a chosen expert: its share of the chosen (normalised), p itself (probability), or p over itself held
constant (straight): 1 as well, but the task's gradient reaches the router, which a normalised top-1 never shows it.

Losses, named ``balance``: in the head E sum_e f_e P_e for every sequence, f the share of its tokens with e as first
choice, P the mean of p; it is 1 when either is uniform and E when all choose one expert with certainty. It can fall
below 1, where an expert is first choice of few tokens and likely for all. Elsewhere it is the same over a batch.

Source: robust QA (2204.09598), its abstract and released code. GShard (2006.16668, algorithm 1) for the head, Switch
Transformers (2101.03961) for the rest.
"""

import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.losses import RoutingLoss
from moestro.core.plan import MethodUse
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.assemble import losses_by_id
from moestro.methods.train._parts.selection import warn_if_dead
from moestro.methods.train._parts.switch_stack import SwitchBlock, SwitchStack
from moestro.methods.train._parts.top_two import FirstChoiceBalance, Gate, Policy, TopTwo, Weight
from moestro.models.families import family
from moestro.models.sites import DenseFFN, dense_ffn
from moestro.surgery.opened import bank_slot, form_at


Placement = Literal["replace", "stack", "head"]
DEFAULTS: dict[str, dict[str, Any]] = {
    "replace": {"top_k": 1, "weight": "straight", "second_policy": "all"},
    "stack": {"top_k": 1, "weight": "probability", "second_policy": "all", "activation": "relu"},
    "head": {"top_k": 2, "capacity_factor": 1.25, "eval_capacity_factor": 2.0, "activation": "relu"},
}


class Config(BaseConfig):
    """Settings; see the top of the file. ``DEFAULTS`` holds what the placements set differently.

    Attributes:
        top_k: 1 or 2. second_threshold: of the policies threshold and random.
        expert_size: inner width of an expert, None for that of the feed-forward at the site, or four times the site's.
        activation: None in ``replace`` for that of the feed-forward at the site.
        layers, heads, dropout: of a stack.
    """

    placement: Placement = "replace"
    num_experts: int = Field(default=16, ge=1)
    top_k: int = Field(default=1, ge=1, le=2)
    weight: Weight = "normalised"
    capacity_factor: float | None = Field(default=None, gt=0)
    eval_capacity_factor: float | None = Field(default=None, gt=0)
    min_capacity: int = Field(default=4, ge=1)
    second_policy: Policy = "random"
    eval_second_policy: Policy = "all"
    second_threshold: float = Field(default=0.2, gt=0, le=1)
    residual: bool = True
    expert_size: int | None = Field(default=None, ge=1)
    activation: ops.Activation | None = None
    layers: int = Field(default=8, ge=1)
    heads: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _by_placement(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = DEFAULTS.get(str(values.get("placement", "replace")), {})
        one = {"top_k": 1} if values.get("num_experts") == 1 else {}
        return {**given, **one, **values}

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        if self.weight == "straight" and self.top_k == 2:
            raise ConfigError("weight='straight' is for top_k=1; the shares of two experts have a gradient themselves")
        if self.placement != "head" and not self.residual:
            raise ConfigError(f"residual=False is for placement='head'; in {self.placement!r} the block adds its input")
        for name in ("layers", "heads", "dropout") if self.placement != "stack" else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ConfigError(f"{name}={value} is of a stack, but placement={self.placement!r}; leave it out")
        if self.activation == "swiglu_oss":
            raise ConfigError("activation='swiglu_oss' needs gated experts, which these are not; use relu or gelu")
        return self

    @property
    def gate(self) -> Gate:
        """What the router is told."""
        return Gate(**{name: getattr(self, name) for name in Gate.__dataclass_fields__})


def add_input(routed_TO: Tensor, shared_TO: Tensor | None, x_TD: Tensor, routing: Routing) -> Tensor:
    """The residual of a head: a token that no expert took keeps x to the bit."""
    return x_TD + routed_TO


class OnTop(nn.Module):
    """A block of the encoder and what follows it."""

    def __init__(self, block: nn.Module, top: nn.Module) -> None:
        super().__init__()
        self.block, self.top = block, top

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        found = self.block(*args, **kwargs)
        return (self.top(found[0]), *found[1:]) if isinstance(found, tuple) else self.top(found)


def mixture(site: Site, config: Config, shared: Shared, *, path: str, bias: bool, form: dict[str, Any]) -> MoELayer:
    """One mixture layer of any placement, with fresh experts."""
    use = MethodUse(
        method="train.balance_loss", config={"scope": "sequence" if config.placement == "head" else "batch"}
    )
    found: dict[str, RoutingLoss] = losses_by_id({"balance": use}, site, shared)
    losses = {name: FirstChoiceBalance(loss) for name, loss in found.items()}
    inner = config.expert_size or form.get("inner") or 4 * site.dim
    act: Any = config.activation or form.get("activation") or "gelu"
    bank = StackedFFN(config.num_experts, site.dim, inner, activation=act, gated=form.get("gated", False), bias=bias)
    more: dict[str, Any] = {"combine": add_input} if config.placement == "head" and config.residual else {}
    return MoELayer(TopTwo(site.dim, config.gate), bank, site=path, losses=losses, **more)


@torch.no_grad()
def copy_dense(bank: StackedFFN, dense: DenseFFN) -> None:
    """Make every expert the dense feed-forward."""
    for expert in range(bank.num_experts):
        for name in (*bank.projections, *(f"{name}_bias" for name in bank.projections)):
            source = getattr(dense, name)
            if source is not None:
                tensor, index = bank_slot(bank, expert, name)
                tensor[index] = source.to(tensor.dtype)


@torch.no_grad()
def start_head(bank: StackedFFN) -> None:
    """U(-a, a), a = 1 / sqrt(inner width) for the first matrix of an expert and 1 / sqrt(D) for the second."""
    for matrix, width in ((bank.up_weight, bank.inner), (bank.down_proj, bank.out)):
        nn.init.uniform_(matrix, -(width**-0.5), width**-0.5)


def exchanged(block: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """``block`` with another module at ``path``; the modules in between are new, all others the same ones."""
    new = copy.copy(block)
    new._modules = dict(block._modules)
    name, _, rest = path.partition(".")
    inside = block.get_submodule(name)
    new._modules[name] = exchanged(inside, rest, module) if rest else module
    return new


def replaced(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The placement ``replace``: a mixture at a mlp site, or a block whose feed-forward is one."""
    if site.family is None:
        return mixture(site, config, shared, path=site.path, bias=False, form={})
    spec, block, path, name = family(site.family), site.module, site.path, ""
    if site.kind == "block":
        names = [stack.mlp.removeprefix(stack.sites["block"][0] + ".") for stack in spec.stacks]
        name = next(n for n in names if n in dict(block.named_modules()))
        path = f"{site.path}.{name}"
    elif spec.ffn.split:
        raise ConfigError(f"{site.path} does not show the whole feed-forward of {spec.name}; give kind (sites): block")
    there = replace(site, path="x." + name if name else "x", kind="mlp", module=block.get_submodule(name))
    dense, form = dense_ffn(nn.ModuleDict({"x": block}), there), form_at(there)
    assert form is not None
    if config.expert_size not in (None, form.inner) or config.activation not in (None, form.activation):
        raise ConfigError(
            f"{path}: experts are copies of a feed-forward of {form.inner} inner units with {form.activation}; leave "
            "expert_size and activation out"
        )
    layer = mixture(site, config, shared, path=path, bias=form.bias, form=vars(form))
    assert isinstance(layer.bank, StackedFFN)
    if not layer.bank.down_proj.is_meta:
        copy_dense(layer.bank, dense)
    if not name:
        return layer
    block = exchanged(block, name, layer)
    return exchanged(block, spec.ffn.down, nn.Identity()) if spec.ffn.split else block


def stacked(site: Site, config: Config, shared: Shared, form: dict[str, Any]) -> SwitchStack:
    """The placement ``stack``: copies of one block whose experts are copies of one."""
    if site.dim % config.heads:
        raise ConfigError(f"heads={config.heads} do not divide the width {site.dim} of {site.path}")
    if site.family is not None and any(stack.name != "encoder" for stack in family(site.family).stacks):
        raise ConfigError(
            f"{site.path}: a stack attends both ways, but {site.family} has a decoder; use placement head"
        )
    layer = mixture(site, config, shared, path="", bias=True, form=form)
    with torch.no_grad():
        for parameter in layer.bank.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    first = SwitchBlock(site.dim, config.heads, config.dropout, layer)
    blocks = [first, *(copy.deepcopy(first) for _ in range(config.layers - 1))]
    for number, block in enumerate(blocks):
        block.mixture.site = f"{site.path}.top.layers.{number}.mixture"
    return SwitchStack(blocks, site.dim)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """What stands at the site: see the placements at the top of the file.

    Raises:
        ConfigError: a site of the wrong kind, a block that is not the last one, settings that do not fit what is there.
    """
    warn_if_dead(config.top_k, config.num_experts > 1 and config.weight == "normalised", "train.switch_encoder")
    if config.placement == "replace":
        if site.kind not in ("mlp", "block"):
            raise ConfigError(f"{site.path}: placement='replace' is for sites of kind block or mlp, not {site.kind}")
        return replaced(site, config, shared)
    if site.kind != "block" or site.layer is None or site.layer + 1 != site.num_layers:
        last = f"layers: [{site.num_layers - 1}]" if site.num_layers else "the last of them"
        raise ConfigError(
            f"{site.path}: placement={config.placement!r} goes on the last layer; give kind (sites): block and {last}"
        )
    width = getattr(site.model_config, "intermediate_size", None)
    form = {} if width is None else {"inner": width}
    top: nn.Module
    if config.placement == "stack":
        top = stacked(site, config, shared, form)
    else:
        top = mixture(site, config, shared, path=f"{site.path}.top", bias=False, form=form)
        assert isinstance(top.bank, StackedFFN)
        if not top.bank.down_proj.is_meta:
            start_head(top.bank)
    return OnTop(site.module, top)


CARD = MethodCard(
    title="Build a Robust QA System with Transformer-based Mixture of Experts",
    year=2022,
    arxiv="2204.09598",
    paper="robust-qa",
    summary="Switch layers in or on an encoder, or a top-2 mixture before its head, for extractive questions.",
    taxonomy="gating/sparse/token-choice/top-1",
    deviations=(
        "the abstract replaces layers in the middle, the released code stacks new ones; both are here",
        "the router starts at standard deviation 0.02; the released one at 1, which saturates its softmax at once",
        "evaluation asks every second expert; the released code goes on drawing",
        "the head adds its input; the released one makes a token without a place 0 (residual=False)",
        "padding takes no place and does not count towards the number of places",
        "experts use ReLU where the released head has LeakyReLU(0.01)",
        "the losses are weighed by the recipe; the released code fixes the head's weight at 1",
    ),
)
