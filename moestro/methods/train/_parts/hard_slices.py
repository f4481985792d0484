"""Slices of a dense feed-forward under a hard router, and the fit of their routers one layer after the other."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.methods.train._parts.prior import (
    Direction,
    Target,
    fit_linear_router,
    labels_of_errors,
    least_squares_scale,
    slice_errors,
)
from moestro.observe.layerwise import layerwise
from moestro.observe.passing import watched


ONE_SIDED = 0.95  # share of tokens with one slice among their labels above which the fit warns


class HardRouter(LinearRouter):
    """Top-k of the logits; every chosen slice weighs ``scale``, a buffer [] that is saved with the model, float32
    whatever the model's type.
    """

    hard: ClassVar[bool] = True
    scale: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, scale: float) -> None:
        super().__init__(dim, num_experts, top_k=top_k, bias=True)
        self.choices = top_k
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float32))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move like any module, but never round the scale."""
        exact = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.scale.device)
        return self

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD)
        return Scores(logits_TC, logits_TC.detach(), logits_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.choices)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """The scale for each; gates are 0 or 1 and carry no gradient."""
        return self.scale.float().expand(gate_TK.shape)


def hard_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers with the router of this file, by site.

    Raises:
        ConfigError: there is none.
    """
    found = {site: layer for site, layer in mixture_layers(model).items() if isinstance(layer.router, HardRouter)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layer under train.prior_approximate; convert.factorllm makes them"
        )
    return found


def teacher_at(teacher: nn.Module, site: str) -> nn.Module:
    """The dense feed-forward at a site of the student.

    Raises:
        ConfigError: nothing stands there.
    """
    try:
        return teacher.get_submodule(site)
    except AttributeError:
        raise ConfigError(
            f"the teacher ({type(teacher).__name__}) has nothing at {site}; give the dense model that was converted"
        ) from None


def check_width(site: str, bank: Bank, dense_TO: Tensor) -> None:
    """Raise ConfigError unless the teacher's module and the slices give as many numbers a token."""
    width = bank.weight(0, "down").shape[0]
    if dense_TO.shape[-1] != width:
        raise ConfigError(
            f"{site}: the teacher gives {dense_TO.shape[-1]} numbers a token and the slices {width}; give the dense "
            "model that was converted (families whose feed-forward lies in two modules, BERT's, cannot teach)"
        )


@dataclass(frozen=True)
class Fit:
    """How the fit of one router went.

    Attributes:
        tokens: it rests on. losses: mean L_PA of each epoch, nats a token. agreement: share of labels among the fitted
            router's choices, on the same tokens. label_share_E: share of tokens that have the slice as a label.
        scale: of the outputs afterwards.
    """

    tokens: int
    losses: list[float]
    agreement: float
    label_share_E: Tensor
    scale: float


def fit_routers(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    epochs: int = 3,
    lr: float = 1e-3,
    rows: int = 64,
    seed: int = 0,
    fit_scale: bool = False,
    target: Target = "softmax-mask",
    direction: Direction = "router||label",
) -> dict[str, Fit]:
    """Fit the router of each converted layer on the dense model's own inputs of that layer; changes them in place.

    The dense model runs one block at a time and no gradient passes through it, so the cost is one forward and, for
    each layer, a forward of its slices and a linear fit; memory is that of one layer's inputs.

    Args:
        model: converted by ``convert.factorllm``. teacher: the dense model, of a known family.
        batches: arguments of its forward; tokens that an ``attention_mask`` [B, S] closes are left out.
        rows: tokens a step of Adam. seed: of their order.
        fit_scale: then set the layer's output scale by least squares (not in the paper); one that is not positive is
            told and left out.

    Raises:
        ConfigError: no layer to fit, or a teacher that is not its dense model. DataError: no tokens.
    """
    layers, given = hard_layers(model), list(batches)
    places = {id(teacher_at(teacher, site)): site for site in layers}
    found: dict[str, Fit] = {}
    for step in layerwise(teacher, given):
        inside = [(module, places[id(module)]) for module in step.block.modules() if id(module) in places]
        if not inside:
            continue
        ((dense, site),) = inside
        x_TD, t_TO = _rows_through(dense, step.run, given)
        settings = {"epochs": epochs, "lr": lr, "rows": rows, "seed": seed, "target": target, "direction": direction}
        found[site] = _fit_layer(layers[site], x_TD, t_TO, fit_scale, settings)
        _warn_if_one_sided(site, found[site])
    return found


def _rows_through(dense: nn.Module, run: Callable[[], None], batches: list[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """What enters and leaves a dense feed-forward while ``run`` runs the batches in order, without padding."""
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def take(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        mask = batches[len(entered)].get("attention_mask")
        width = args[0].shape[-1]
        x_TD, t_TO = args[0].reshape(-1, width), output.reshape(-1, output.shape[-1])
        live_T = slice(None) if mask is None else mask.flatten().bool()
        entered.append(x_TD[live_T])
        left.append(t_TO[live_T])

    with watched({"": dense}, take):
        run()
    return torch.cat(entered), torch.cat(left)


@torch.no_grad()
def _fit_layer(layer: MoELayer, x_TD: Tensor, t_TO: Tensor, fit_scale: bool, settings: dict[str, Any]) -> Fit:
    router = layer.router
    assert isinstance(router, HardRouter)
    assert router.bias is not None
    check_width(layer.site, layer.bank, t_TO)
    labels_TE = labels_of_errors(slice_errors(layer.bank, x_TD, t_TO / router.scale), router.choices)
    weight, bias, losses = fit_linear_router(router.weight, router.bias, x_TD, labels_TE, **settings)
    router.weight.copy_(weight)
    router.bias.copy_(bias)
    expert_TK = choose_topk(router.logits(x_TD), router.choices)
    if fit_scale:
        one_TK = torch.ones(expert_TK.shape, device=expert_TK.device)
        routing = Routing.from_topk(expert_TK, one_TK, num_experts=router.num_experts)
        best = least_squares_scale(layer.bank(x_TD, routing), t_TO)
        if best > 0:
            router.scale.fill_(best)
        else:
            told = "%s: the best scale of the chosen slices is %g; it stays %g"
            logging.getLogger("moestro").warning(told, layer.site, best, float(router.scale))
    agreement = float(labels_TE.gather(1, expert_TK).mean())
    return Fit(len(x_TD), losses, agreement, labels_TE.mean(0), float(router.scale))


def _warn_if_one_sided(site: str, fit: Fit) -> None:
    """Small slices lie closest to every target: say so where the labels choose without looking at the token."""
    share = float(fit.label_share_E.max())
    if share > ONE_SIDED and float(fit.label_share_E.min()) < 1.0:
        logging.getLogger("moestro").warning(
            "%s: slice %d is a label of %.0f %% of the tokens; a router that learns this chooses without looking",
            site,
            int(fit.label_share_E.argmax()),
            100 * share,
        )
