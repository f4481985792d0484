"""BigMac: descend before the dispatch and ascend after it, so that tokens travel narrow.

A fine-grained expert works x -> r h -> h at full width h, and expert parallelism sends rows of width h both ways. Here
every token is projected down once, experts work up-then-down in the narrow space, and one projection lifts the sum:

    x' = x W_down^T [T, r h],   y' = sum over chosen of p_i(x) E_i(x') [T, r h],   y = y' W_up^T [T, h]

W_down [r h, h] and W_up [h, r h] are shared by all experts of the layer and have no bias, no activation and no norm.
E_i: r h -> inner -> r h with inner = h, as many weights as the fine-grained expert h -> r h -> h; for a gated expert,
which has three matrices, inner = 2 h / 3. The router reads x at full width (``router_input="full"``). Weights are
applied and experts summed in the narrow space, in float32. With `moestro.training.expert_parallel` a row is r h wide on
the wire; expert weights moved between memories are as large as before. The projections start at standard deviation
1 / sqrt(inputs), which keeps the scale of rows and is the usual 0.02 at the paper's width.

Source: BigMac (2502.16927, section 3: DCCA). Not in the paper: gated experts, the router on x', shared experts.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import Bank, StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.router import Router
from moestro.core.routing import Routing, Scores
from moestro.core.site import Borrowed, Shared, Site
from moestro.methods.train._parts.assemble import losses_by_id, router_by_id


LANES = 8  # narrow widths are whole vectors of this many floats


class Config(BaseConfig):
    """Settings.

    Attributes:
        num_experts: e. top_k: k. down_ratio: r, narrow width over the site's. activation, gated: the experts' form.
        expert_size: inner width of an expert, None for that of equal parameters.
        router_input: what the router reads, the site's input x or the narrow x'.
        router: a router method; num_experts and top_k are filled in. losses: name -> loss method.
    """

    num_experts: int = Field(default=16, ge=1)
    top_k: int = Field(default=4, ge=1)
    down_ratio: float = Field(gt=0, le=1, examples=[0.5, 0.25])
    expert_size: int | None = Field(default=None, ge=1)
    activation: ops.Activation = "gelu"
    gated: bool = False
    router_input: Literal["full", "down"] = "full"
    router: MethodUse = MethodUse(method="train.softmax_topk", config={"renormalise": False})
    losses: dict[str, MethodUse] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        return self


def narrow_width(width: int, down_ratio: float) -> int:
    """r h.

    Raises:
        ConfigError: not an integer, or no multiple of 8.
    """
    narrow = width * down_ratio
    if narrow != int(narrow) or int(narrow) % LANES:
        raise ConfigError(
            f"down_ratio={down_ratio:g} makes {width} wide rows {narrow:g} wide; it must be a multiple of {LANES}"
        )
    return int(narrow)


def inner_width(width: int, gated: bool) -> int:
    """Inner width at which an expert has the parameters of a fine-grained one of inner width r h: h, or 2 h / 3 gated.

    A fine-grained gated expert of three matrices [h, r * 2 h / 3] counts 2 r h^2, like a plain one.
    """
    return 2 * width // 3 if gated else width


def layer_parameters(width: int, narrow: int, inner: int, num_experts: int, matrices: int = 2) -> int:
    """Weights of a layer: W_down and W_up, experts of ``matrices`` matrices, a linear router."""
    return 2 * width * narrow + num_experts * matrices * narrow * inner + num_experts * width


class NarrowRouter(Router):
    """A router that reads x' instead of x. It projects by itself: what a layer projects later, edits may not see.

    Args:
        inner: the router, for inputs of the narrow width. down: W_down, which lives in the layer.
    """

    def __init__(self, inner: Router, down: nn.Module) -> None:
        super().__init__(inner.num_experts, top_k=inner.top_k, num_null=inner.num_null)
        self.inner = inner
        self.causal = inner.causal
        self.down = Borrowed(down)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        return self.inner.score(self.down(x_TD), bank, ctx)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        return self.inner.choose(scores, ctx)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return self.inner.weigh(gate_TK)

    def after_step(self, load_C: Tensor) -> None:
        """See Router."""
        self.inner.after_step(load_C)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site of width h = ``site.dim``.

    Raises:
        ConfigError: r h is not an integer or no multiple of 8; the router or a loss is none.
    """
    if site.out is not None and site.out != site.dim:
        raise ConfigError(f"{site.path}: {site.dim} inputs but {site.out} outputs; descend and ascend need one width")
    narrow = narrow_width(site.dim, config.down_ratio)
    down = nn.Linear(site.dim, narrow, bias=False)
    up = nn.Linear(narrow, site.dim, bias=False)
    for projection in (down, up):
        if not projection.weight.is_meta:
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    reads = narrow if config.router_input == "down" else site.dim
    sees = replace(site, dim=reads)
    router = router_by_id(config.router, sees, shared, num_experts=config.num_experts, top_k=config.top_k)
    if config.router_input == "down":
        router = NarrowRouter(router, down)
    inner = config.expert_size or inner_width(site.dim, config.gated)
    bank = StackedFFN(config.num_experts, narrow, inner, activation=config.activation, gated=config.gated)
    losses = losses_by_id(config.losses, site, shared)
    return MoELayer(router, bank, site=site.path, pre=down, post=up, losses=losses)


CARD = MethodCard(
    title="BigMac: A Communication-Efficient Mixture-of-Experts Model Structure for Fast Training and Inference",
    year=2025,
    arxiv="2502.16927",
    paper="bigmac",
    summary="Tokens are projected down before they travel to their experts and up after they came back.",
    taxonomy="experts/network/ffn",
    deviations=("gated experts and a router on the narrow input are options of ours",),
)
