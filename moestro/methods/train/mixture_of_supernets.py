"""Mixture-of-supernets: one training run for a menu of model sizes, with weights mixed for each size.

A supernet holds every architecture as a slice of its largest one, so that the slices pull at the same weights. Here an
elastic layer of a feed-forward keeps m copies E_j [O, I] of its matrix, and a router that reads the *architecture*, not
a token, mixes them. For architecture a with o of O outputs and i of I inputs:

    none     W_a = E[:o, :i]
    layer    W_a = sum_j r_j(a) E_j[:o, :i]                   r(a) = softmax over j of L2 ReLU(L1 enc(a)), in R^m
    neuron   W_a[n, :] = sum_j R[n, j] E_j[n, :i],  n < o      R(a) [o, m]: the first o m of L2's outputs, as (o, m),
                                                              softmax over each row

Biases are mixed with the same weights. The flattened index n m + j keeps a neuron's row of R the same in every slice.
enc(a) = (hidden, heads, inner, layers), each over that of the largest architecture. All copies are always mixed, once a
forward and not once a token; a chosen architecture collapses to a plain network without copies or routers.

The same method stands at every kind of site that a space varies: ``mlp`` mixes; ``embedding``, ``norm``, ``attention``
and ``head`` are sliced. Blocks beyond ``layers`` add nothing to the residual stream. Which architecture runs is part of
a forward: ``with moestro.session(arch={"hidden": 96, ...})``; without one it is the largest.

``objective`` is the sandwich: the losses of the largest, of the smallest and of ``pop_size`` random architectures add
up in one optimiser step. With ``distill`` the largest's distribution teaches the others.

Source: Mixture-of-Supernets (2306.04845), sections on layer-wise and neuron-wise mixtures, and its released code.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from moestro import ops
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import LossTerm, layer_context
from moestro.core.cost import Work
from moestro.core.errors import ConfigError
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.supernet_model import (
    ElasticAttention,
    ElasticEmbedding,
    ElasticHead,
    ElasticNorm,
    check_site,
    default_space,
    encoder_of,
    running,
    stock_parts,
)
from moestro.methods.train._parts.supernet_model import collapse as collapse
from moestro.methods.train._parts.supernet_model import search as search
from moestro.methods.train._parts.supernet_space import FEATURES, PART, Arch, Encoder, SharedEncoder, Space
from moestro.methods.train._parts.supernet_space import Limits as Limits


class Config(BaseConfig):
    """Settings, the same at every site of a model and for the objective.

    Attributes:
        space: the architectures; None: those with a quarter, a half or all of the neurons.
        experts: m, copies of a feed-forward's weights. routing: how they are mixed.
        router_hidden: width of a router. router_dropout: on its hidden layer, while training.
        init: what the copies start as. "copies": all as the first one, which stands at the site (for trained weights);
            "random": the others with random weights of its size; "scaled": random, and all sqrt(m) larger, since an
            even mixture of independent copies is that much smaller than each.
        pop_size: random architectures in a step. distill: the largest teaches the others.
    """

    space: Space | None = None
    experts: int = Field(default=2, ge=1)
    routing: Literal["none", "layer", "neuron"] = "neuron"
    router_hidden: int = Field(default=128, ge=1)
    router_dropout: float = Field(default=0.0, ge=0, lt=1)
    init: Literal["copies", "random", "scaled"] = "random"
    pop_size: int = Field(default=1, ge=0)
    distill: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.routing == "none" and self.experts > 1:
            raise ConfigError(f"experts={self.experts} but routing='none' mixes nothing; use experts 1, or a routing")
        return self


def mix(copies_MX: Tensor, share_OM: Tensor) -> Tensor:
    """sum_j share[n, j] copies[j, n, ...], [O, ...], in float32 or better and returned in the copies' type.

    Args:
        copies_MX: [M, O, I] or [M, O]. share_OM: [O, M], or [1, M] for one mixture of all rows.
    """
    share_MX = share_OM.T.reshape(share_OM.shape[1], -1, *[1] * (copies_MX.ndim - 2))
    return (share_MX * copies_MX).sum(0).to(copies_MX.dtype)


class ArchRouter(nn.Module):
    """Shares of the copies from an architecture's encoding.

    Args:
        rows: output neurons for a mixture of each, 1 for one of the whole matrix. experts: M.
    """

    def __init__(self, rows: int, experts: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.experts = experts
        self.dropout = dropout
        self.first = nn.Linear(len(FEATURES), hidden)
        self.last = nn.Linear(hidden, rows * experts)

    def forward(self, encoding_F: Tensor, rows: int) -> Tensor:
        """Shares [rows, M] float32, of the first ``rows`` neurons. A product with one vector, once a forward."""
        count = rows * self.experts
        with torch.autocast(encoding_F.device.type, enabled=False):
            hidden_R = F.relu(self.first.weight.float() @ encoding_F + self.first.bias.float())
            hidden_R = F.dropout(hidden_R, self.dropout, self.training)
            logits_N = self.last.weight[:count].float() @ hidden_R + self.last.bias[:count].float()
        return logits_N.view(rows, self.experts).softmax(-1)


class ElasticLinear(nn.Module):
    """m copies of a matrix. Parameters: ``weight`` [M, O, I], ``bias`` [M, O] or None.

    Args:
        first: the stock layer that the first copy is. init: see ``Config``.
    """

    def __init__(self, first: nn.Linear, experts: int, init: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([first.weight.detach()] * experts))
        self.bias = None if first.bias is None else nn.Parameter(torch.stack([first.bias.detach()] * experts))
        if init != "copies" and not self.weight.is_meta:
            with torch.no_grad():
                self.weight[1:].normal_(std=float(first.weight.std()))
                self.weight.mul_(experts**0.5 if init == "scaled" else 1.0)

    def forward(self, share_OM: Tensor | None, out: int, inner: int) -> tuple[Tensor, Tensor | None]:
        """W_a [out, inner] and b_a [out] of one architecture; share None: the only copy."""
        weight_MOI = self.weight[:, :out, :inner]
        bias_MO = None if self.bias is None else self.bias[:, :out]
        if share_OM is None:
            return weight_MOI[0], None if bias_MO is None else bias_MO[0]
        return mix(weight_MOI, share_OM), None if bias_MO is None else mix(bias_MO, share_OM)


class ElasticFFN(nn.Module):
    """A feed-forward whose matrices are mixed for the architecture that runs.

    Args:
        parts: the stock layers by name, (gate,) up, down. layer: index of its block, None where no block is.
    """

    def __init__(
        self, parts: dict[str, nn.Linear], activation: ops.Activation, layer: int | None, config: Config, space: Encoder
    ) -> None:
        super().__init__()
        self.config, self.activation, self.layer = config, activation, layer
        self.space = SharedEncoder(space)
        *before, self.down = parts
        self.before = tuple(before)
        self.parts = nn.ModuleDict({n: ElasticLinear(part, config.experts, config.init) for n, part in parts.items()})
        self.routers = nn.ModuleDict()
        if config.routing != "none":
            # A gated neuron is one row of the gate and one of the up matrix: both are mixed alike.
            sizes = {"inner": parts[self.down].in_features, "out": parts[self.down].out_features}
            for name, rows in sizes.items():
                rows = rows if config.routing == "neuron" else 1
                self.routers[name] = ArchRouter(rows, config.experts, config.router_hidden, config.router_dropout)

    def shares(self, arch: Arch) -> tuple[Tensor | None, Tensor | None]:
        """Shares of the copies for the neurons [inner, M] and for the outputs [hidden, M]; [1, M] layer-wise."""
        if not self.routers:
            return None, None
        encoding_F, single = self.space.module.encode(arch), self.config.routing == "layer"
        rows = {"inner": 1 if single else arch.inner, "out": 1 if single else arch.hidden}
        return self.routers["inner"](encoding_F, rows["inner"]), self.routers["out"](encoding_F, rows["out"])

    def mixed(self, arch: Arch) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight and bias of each part in one architecture."""
        inner_IM, out_OM = self.shares(arch)
        found = {name: self.parts[name](inner_IM, arch.inner, arch.hidden) for name in self.before}
        return {**found, self.down: self.parts[self.down](out_OM, arch.hidden, arch.inner)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor) -> Tensor:
        """Output [..., hidden] of hidden states [..., hidden]; zero in a block that the architecture does not have."""
        with layer_context(hidden, self.training) as ctx:
            arch = running(self.space, ctx, hidden, self.layer)
            if arch is None:
                return torch.zeros_like(hidden)
            weights = self.mixed(arch)
            first = [weights[name] for name in self.before]
            up_JD = torch.cat([weight for weight, _ in first])
            bias_J = None if first[0][1] is None else torch.cat([bias for _, bias in first if bias is not None])
            act = ops.apply_activation(F.linear(hidden, up_JD, bias_J), self.activation, len(first) == 2)
            return F.linear(act, *weights[self.down])

    def dense(self, arch: Arch) -> dict[str, Tensor]:
        """The tensors of the plain feed-forward of one architecture, by the names of the stock module."""
        both = {name: dict(zip(("weight", "bias"), pair, strict=True)) for name, pair in self.mixed(arch).items()}
        return {f"{name}.{kind}": t for name, pair in both.items() for kind, t in pair.items() if t is not None}

    def flops_per_token(self, work: Work) -> float:
        """Operations of the largest architecture. Routers and mixing run once a forward, whatever its tokens."""
        return 2.0 * sum(p.weight[0].numel() for p in self.parts.values() if isinstance(p, ElasticLinear))


def copy_distance(model: nn.Module) -> dict[str, float]:
    """Largest difference between any two copies of a matrix over its standard deviation, by module.

    Copies that start equal part only through the shares; as long as this is 0, the router changes nothing.
    """
    found = {}
    for path, part in model.named_modules():
        if isinstance(part, ElasticLinear):
            weight_MOI = part.weight.detach()
            found[path] = float((weight_MOI.amax(0) - weight_MOI.amin(0)).max() / weight_MOI.std())
    return found


def sandwich(space: Space, pop_size: int) -> list[tuple[str, Arch]]:
    """The architectures of a step by the name of their loss; random ones from PyTorch's generator."""
    places = torch.randint(len(space.archs), (pop_size,)).tolist()
    return [("largest", space.largest), ("smallest", space.smallest), *(("random", space.archs[i]) for i in places)]


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The elastic module for a site.

    Raises:
        ConfigError: the largest architecture is not the model, a kind of site or a family that is not known, or other
            settings of the space at another site.
    """
    menu = config.space or default_space(site)
    check_site(site, menu)
    space = shared(PART, lambda: Encoder(menu))
    assert isinstance(space, Encoder)
    if space.space != menu:
        raise ConfigError(f"{site.path}: another search space than at the sites before; a model has one")
    stock: Any = site.module
    if site.kind == "mlp":
        parts, activation = stock_parts(site, menu.largest.inner)
        return ElasticFFN(parts, activation, site.layer, config, space)
    if site.kind == "attention":
        return ElasticAttention(stock, site.layer, space)
    if site.kind == "embedding":
        return ElasticEmbedding(stock, space)
    if site.kind in ("norm", "head"):
        return ElasticNorm(stock) if site.kind == "norm" else ElasticHead(stock)
    raise ConfigError(f"{site.path}: a {site.kind} is not elastic; mlp, attention, norm, embedding and head are")


def objective(model: nn.Module, batch: dict[str, Tensor], teachers: Any, config: Config) -> dict[str, LossTerm]:
    """{largest, smallest, random}: next-token cross entropy in nats, summed over targets; random over architectures.

    With ``distill`` all but the largest learn its distribution instead. In evaluation there is no random architecture
    and no lesson: losses of runs with and without ``distill`` compare.

    Raises:
        ConfigError: the model is no supernet, or one of another space; the batch has no labels.
    """
    space = encoder_of(model).space
    if config.space not in (None, space):
        raise ConfigError("the objective names another search space than the model's; give both the same settings")
    if "labels" not in batch:
        raise ConfigError(f"a supernet learns next tokens, from a batch with labels; this one has {', '.join(batch)}")
    wanted_N = batch["labels"][:, 1:].reshape(-1)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found: dict[str, Tensor] = {}
    taught: Tensor | None = None
    for name, arch in sandwich(space, config.pop_size if model.training else 0):
        with session(arch=arch):
            logits_BSV = model(**inputs, use_cache=False).logits
        logits_NV = logits_BSV[:, :-1].flatten(0, 1).float()
        if taught is None:
            loss = F.cross_entropy(logits_NV, wanted_N, ignore_index=-100, reduction="sum")
        else:
            loss = -(taught * logits_NV.log_softmax(-1))[wanted_N != -100].sum()
        if config.distill and model.training and name == "largest":
            taught = logits_NV.detach().softmax(-1)
        found[name] = found[name] + loss if name in found else loss
    return {name: LossTerm(total, "token") for name, total in found.items()}


CARD = MethodCard(
    title="Mixture-of-Supernets: Improving Weight-Sharing Supernet Training with Architecture-Routed "
    "Mixture-of-Experts",
    year=2023,
    arxiv="2306.04845",
    paper="mixture-of-supernets",
    summary="Elastic layers whose m weight copies a router of the architecture mixes: one run, a menu of model sizes.",
    taxonomy="gating/soft/expert-merging",
    deviations=(
        "rotary heads have one width: a narrow model has fewer of them, where the paper's BERT may keep their number",
        "gate and up matrix of a gated feed-forward share one router: together they make a neuron",
        "one backward of the summed losses of a sandwich step, where the released code runs one for each architecture",
    ),
)
