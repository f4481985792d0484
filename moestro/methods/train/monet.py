"""Monet: a quarter of a million experts a layer, put together from halves, narrow enough to be named and taken out.

Expert (i, j) of n^2 joins the i-th of n first halves and the j-th of n second halves. With d the width, m the width of
an expert, a(u) = max(u, 0)^2, and routing heads h that score both axes apart (g1, g2 [H, n], each head's weights sum to
1), the layer is y = sum over h, i, j of g1_hi g2_hj E_ij(x) with

    horizontal  E_ij(x) = V_j a(U_i x + b_i) + c_j
    vertical    u = a(U_i x + b_i), v = a(U'_j x + b'_j), m/2 wide each; the output is two halves of width d/2:
                E_ij(x) = [V_i u + W_i v + c_i ; V'_j u + W'_j v + c'_j]

The sums over experts are regrouped, halves before pairs, so that nothing of size n^2 arises:

    M(g, u, g')_j = sum_h g'_hj sum_i g_hi u_i        what second half j receives            [n, m]
    P(g, g')_i    = sum_h g_hi sum_j g'_hj            how much of first half i is used       [n]
    horizontal  y = sum_j V_j M(g1, a, g2)_j + P(g2, g1)_j c_j
    vertical    top = sum_i V_i P(g1, g2)_i u_i + W_i M(g2, v, g1)_i + P(g1, g2)_i c_i,    bottom likewise, axes swapped

Once experts are masked (``MonetLayer.mask``) the inner sums run over the pairs left; nothing is shared out again.
Scores come from two routers d -> H n that keep about k of n choices in each head (``_parts/product_keys.py``) and serve
``group_size`` layers: the first layer scores its input, the others use its scores. Each axis is a routing of its own,
at ``<site>.first`` and ``<site>.second``, with choices h n + i. Parameters: 2 n m d + n m + n d a layer, 2 d H n a
router.

Source: Monet (2412.04139, sections 3.1 to 3.3). Masked sums: derived from the definition; the paper's forms need
weights that sum to 1. All losses of a model add up over its routers, where the paper's values are means.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro import ops
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext, layer_context
from moestro.core.cost import Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import emit
from moestro.core.losses import RoutingLoss
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.site import Borrowed, Shared, Site
from moestro.methods.train._parts.assemble import losses_by_id
from moestro.methods.train._parts.assignments import headed_weights
from moestro.methods.train._parts.paired_halves import fits, mix, paired_halves, used
from moestro.methods.train._parts.product_keys import AXES, ProductKeyRouter, router_of_group


SLOT = "product_keys"


class Config(BaseConfig):
    """Settings.

    Attributes:
        axis: n, halves of each kind; a layer has n^2 experts. heads: H. expert_size: m.
        top_k: k, choices kept of an axis and head on the average. group_size: layers that share a router.
        losses: name -> loss method; the heads, and the half that each axis counts, are filled in.
    """

    axis: int = Field(default=512, ge=2)
    heads: int = Field(default=8, ge=1)
    expert_size: int = Field(default=16, ge=1)
    top_k: int = Field(default=32, ge=1)
    group_size: int = Field(default=4, ge=1)
    decompose: Literal["vertical", "horizontal"] = "vertical"
    activation: Literal["relu2", "relu", "gelu", "gelu_tanh", "silu"] = "relu2"
    losses: dict[str, MethodUse] = Field(
        default_factory=lambda: {
            "uniformity": MethodUse(method="train.uniformity_loss"),
            "ambiguity": MethodUse(method="train.ambiguity_loss"),
        }
    )

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.axis:
            raise ConfigError(
                f"top_k={self.top_k} a head but axis={self.axis}: top_k^2 is more than the {self.axis**2} experts"
            )
        if self.decompose == "vertical" and self.expert_size % 2:
            raise ConfigError(f"expert_size={self.expert_size} is odd; vertical experts join two halves")
        return self


class HalfExperts(nn.Module):
    """The weights of a layer's experts.

    Parameters: horizontal ``up`` [n, m, d], ``up_bias`` [n, m], ``down`` [n, m, d], ``down_bias`` [n, d]; vertical
    the same for each axis, ``first_up`` [n, m/2, d] and so on to ``second_down_bias`` [n, d/2]; ``down`` [n, m, d/2]
    takes u in its first m/2 rows and v in the others.
    """

    def __init__(self, dim: int, out: int, config: Config) -> None:
        super().__init__()
        self.activation = config.activation
        self.size = config.expert_size
        self.vertical = config.decompose == "vertical"
        parts, axis, size = 2 if self.vertical else 1, config.axis, config.expert_size
        for name in AXES if self.vertical else ("",):
            at = f"{name}_" if name else ""
            shapes = {"up": (axis, size // parts, dim), "down": (axis, size, out // parts)}
            for what, shape in shapes.items():
                weight = nn.Parameter(torch.empty(shape))
                if not weight.is_meta:
                    nn.init.normal_(weight, std=0.02)
                bias = shape[:2] if what == "up" else (axis, shape[2])
                self.register_parameter(f"{at}{what}", weight)
                self.register_parameter(f"{at}{what}_bias", nn.Parameter(torch.zeros(bias)))

    def ascend(self, x_TD: Tensor, at: str = "") -> Tensor:
        """a(U x + b) of every half, [T, n, m]."""
        up_CID = self.get_parameter(f"{at}up")
        pre_TX = nn.functional.linear(x_TD, up_CID.flatten(0, 1), self.get_parameter(f"{at}up_bias").flatten())
        if self.activation == "relu2":
            return pre_TX.relu().square().view(len(x_TD), *up_CID.shape[:2])
        return ops.apply_activation(pre_TX, self.activation, gated=False).view(len(x_TD), *up_CID.shape[:2])

    def descend(self, hidden_TCI: Tensor, used_TC: Tensor, at: str = "") -> Tensor:
        """sum_j V_j hidden_j + used_j c_j, [T, O]."""
        y_TO = hidden_TCI.flatten(1) @ self.get_parameter(f"{at}down").flatten(0, 1)
        return y_TO + used_TC @ self.get_parameter(f"{at}down_bias")

    def pair(self, axis: str, what: str) -> tuple[Tensor, Tensor]:
        """Matrix and bias ``up`` or ``down`` of an axis, "" for horizontal experts."""
        name = f"{axis}_{what}" if axis else what
        return self.get_parameter(name), self.get_parameter(f"{name}_bias")

    def forward(self, x_TD: Tensor, first_THC: Tensor, second_THC: Tensor, open_CC: Tensor | None = None) -> Tensor:
        """y [T, O] for weights of both axes; with ``open_CC`` (bool, first by second half) of the open experts only."""
        if open_CC is None and self.activation == "relu2" and fits(self, x_TD, first_THC, second_THC):
            axes = AXES if self.vertical else ("",)
            ups, downs = ([p for n in axes for p in self.pair(n, what)] for what in ("up", "down"))
            return paired_halves(x_TD, (first_THC, second_THC), ups, downs)
        turned_CC = None if open_CC is None else open_CC.T
        used_second_TC = used(second_THC, first_THC, turned_CC)
        if not self.vertical:
            return self.descend(mix(first_THC, self.ascend(x_TD), second_THC, open_CC), used_second_TC)
        u_TCI, v_TCI = self.ascend(x_TD, "first_"), self.ascend(x_TD, "second_")
        used_first_TC = used(first_THC, second_THC, open_CC)
        top_TCI = torch.cat([u_TCI * used_first_TC[..., None], mix(second_THC, v_TCI, first_THC, turned_CC)], -1)
        low_TCI = torch.cat([mix(first_THC, u_TCI, second_THC, open_CC), v_TCI * used_second_TC[..., None]], -1)
        top_TO = self.descend(top_TCI, used_first_TC, "first_")
        return torch.cat([top_TO, self.descend(low_TCI, used_second_TC, "second_")], -1)


def _table(pairs: Iterable[tuple[int, int]]) -> Tensor:
    """Pairs as a tensor [P, 2]; what is no table of numbers is an empty one of another shape."""
    rows = list(pairs)
    try:
        return torch.tensor(rows) if rows else torch.empty(0, 2, dtype=torch.int64)
    except (TypeError, ValueError):
        return torch.empty(0)


class MonetLayer(nn.Module):
    """The layer. The buffer ``open`` [n, n], bool, says which experts are there; it is saved with the model."""

    is_mixture = True
    open: Tensor

    def __init__(self, site: Site, config: Config, router: ProductKeyRouter, losses: dict[str, RoutingLoss]) -> None:
        super().__init__()
        self.site, self.owner, self.heads = site.path, router.sites[0], config.heads
        self.router = Borrowed(router)
        self.experts = HalfExperts(site.dim, site.dim if site.out is None else site.out, config)
        self.losses = nn.ModuleDict(losses)
        self.register_buffer("open", torch.ones(config.axis, config.axis, dtype=torch.bool))

    def mask(self, pairs: Iterable[tuple[int, int]] | Tensor) -> None:
        """Take experts out: pairs (first, second), or bool [n, n] with True for those that go. ``open.fill_(True)``
        brings all back.

        Raises:
            ConfigError: pairs that do not exist, another shape, or numbers that are neither bool nor whole.
        """
        if isinstance(pairs, Tensor) and pairs.dtype == torch.bool:
            if pairs.shape != self.open.shape:
                raise ConfigError(f"{self.site}: a mask of {tuple(pairs.shape)} for experts {tuple(self.open.shape)}")
            self.open &= ~pairs.to(self.open.device)
            return
        index_P2 = pairs if isinstance(pairs, Tensor) else _table(pairs)
        whole = not (index_P2.is_floating_point() or index_P2.is_complex())
        if not whole or index_P2.ndim != 2 or index_P2.shape[1] != 2:
            shape = f"{tuple(index_P2.shape)} of {str(index_P2.dtype).removeprefix('torch.')}"
            raise ConfigError(
                f"{self.site}: a mask is pairs (first, second) of whole numbers or bool {tuple(self.open.shape)}, "
                f"got {shape}"
            )
        if index_P2.numel() and not 0 <= int(index_P2.min()) <= int(index_P2.max()) < len(self.open):
            raise ConfigError(
                f"{self.site}: halves are numbered 0 to {len(self.open) - 1}, got {index_P2.tolist()[:3]}"
            )
        self.open[index_P2[:, 0], index_P2[:, 1]] = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor) -> Tensor:
        """Output [..., O] of hidden states [..., d].

        Raises:
            ContextError: the layer that scores for this group did not run before in this forward.
        """
        with layer_context(hidden, self.training) as ctx:
            x_TD = hidden.reshape(-1, hidden.shape[-1])
            ctx.keep(self.site, "input", x_TD)
            first_THC, second_THC = (weight_THC.to(x_TD.dtype) for weight_THC in self.route(x_TD, ctx))
            closed = not bool(self.open.all())
            y_TO: Tensor = self.experts(x_TD, first_THC, second_THC, self.open if closed else None)
            ctx.keep(self.site, "output", y_TO)
            return y_TO.view(*hidden.shape[:-1], y_TO.shape[-1])

    def flops_per_token(self, work: Work) -> float:
        """Operations for one token: the halves' matrices, the sums over halves, the router where it is asked."""
        axis, experts = len(self.open), self.experts
        products = sum(weight.numel() for name, weight in experts.named_parameters() if not name.endswith("up_bias"))
        closed = not self.open.is_meta and not bool(self.open.all())
        reached = axis if closed else 1  # halves that a half meets one by one
        products += self.heads * axis * reached * ((1 if closed else 2) * experts.size + (2 if experts.vertical else 1))
        return 2.0 * products + (cost(self.router.module, work) if self.site == self.owner else 0.0)

    def route(self, x_TD: Tensor, ctx: RoutingContext) -> list[Tensor]:
        """The weights of both axes, [T, H, n] each. Edits act on the group's scores, in each layer by itself."""
        router = self.router.module
        assert isinstance(router, ProductKeyRouter)
        axes = router.axes
        if self.site == self.owner:
            scored = [axis.score(x_TD, None, ctx) for axis in axes]
            choices = [axis.choose(scores, ctx) for axis, scores in zip(axes, scored, strict=True)]
            tables = [headed_weights(routing, self.heads) for routing in choices]
            decided = list(zip(scored, choices, tables, strict=True))
            ctx.put(self.site, SLOT, decided)
        else:
            decided = ctx.get(self.owner, SLOT)
            if decided is None:
                raise ContextError(f"{self.site} uses the scores of {self.owner}, which did not run before it")
        weights = []
        for name, axis, (scores, routing, weight_THC) in zip(AXES, axes, decided, strict=True):
            site = f"{self.site}.{name}"
            if ctx.session.edits:
                for edit in ctx.session.edits:
                    scores = edit.on_scores(site, scores, ctx)
                routing = axis.choose(scores, ctx)
                for edit in ctx.session.edits:
                    routing = edit.on_routing(site, routing, axis, ctx)
                weight_THC = headed_weights(routing, self.heads)
            if routing.num_tokens != len(x_TD):
                raise ContextError(f"{site}: routing for {routing.num_tokens} tokens, the layer got {len(x_TD)}")
            emit(site, routing, ctx, self.losses)
            weights.append(weight_THC)
        return weights


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site of width d = ``site.dim``.

    Raises:
        ConfigError: no feed-forward site, vertical experts with an odd output width, a loss that is none.
    """
    if site.kind != "mlp":
        raise ConfigError(f"{site.path}: the layer cannot stand at a site of kind {site.kind}; use mlp")
    out = site.dim if site.out is None else site.out
    if config.decompose == "vertical" and out % 2:
        raise ConfigError(f"{site.path}: output width {out} is odd; vertical experts answer in two halves")
    shape = (site.dim, config.axis, config.heads, config.top_k, config.group_size)
    router = router_of_group(site, shared, *shape)
    losses: dict[str, RoutingLoss] = {}
    if router.sites[0] == site.path:  # one loss a router, not one a layer that uses it
        uses = {}
        for name, use in config.losses.items():
            known = method(use.method).config_type.model_fields
            filled = {key: value for key, value in {"heads": config.heads, "scale": 0.5}.items() if key in known}
            uses[name] = MethodUse(method=use.method, config={**filled, **use.config})
        losses = losses_by_id(uses, site, shared)
    return MonetLayer(site, config, router, losses)


CARD = MethodCard(
    title="Monet: Mixture of Monosemantic Experts for Transformers",
    year=2024,
    arxiv="2412.04139",
    paper="monet",
    summary="n^2 experts of two halves each for the parameters of n: experts that can be named and masked.",
    taxonomy="experts/hyper-parameters/count",
    deviations=(
        "losses add up over routers, the paper's reported values are means over them",
        "padding is left out of the statistics of a training batch",
    ),
)
