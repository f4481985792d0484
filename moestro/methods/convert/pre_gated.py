"""A trained mixture whose experts are chosen ahead: every gate reads the input of d mixtures before its own.

For the mixtures N = 1 .. B of a decoder, with gates W_N [E, D] behind norms of gain g_N [D]:

    V_N = W_N                       for the first d mixtures, and for those whose source lies before ``from_layer``
    V_N = W_N diag(g_N / g_{N-d})   for all others, which read x_{N-d} from now on (``init="next_gate"``)
    V_N drawn anew                  for these with ``init="random"``

The factor takes the gain of the earlier block's norm out of x_{N-d} and puts the block's own in, so that the gate sees
what it would see behind its own norm, had the residual stream not moved since. It is left out with ``fold=False``.
Inputs that the earlier norm silences (g = 0) stay silent; what a norm adds to its output is not accounted for.

Experts keep every bit. The result is another model than its parent, meant to be trained on: the routing of block N is
decided from less than the parent knew, and there is no way back to the conventional gate at run time. ``distance=0``
changes nothing but the router's name.

Source: Pre-gated MoE (2308.12066, section 4); the start from the next block's gate is ours, their text does not say.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, PlanInputs, spell
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.methods.convert._parts.layers import choose


ROUTER = "train.pre_gated"
NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "attention.output.LayerNorm", "layer_norm",
         "input_layernorm")  # fmt: skip
"""What gives a feed-forward its input, by its name in the block; the first that is there. Blocks without a norm of
their own for it (Cohere) read the norm of the attention."""


class Config(BaseConfig):
    """Settings.

    Attributes:
        distance: d, mixtures between a gate's input and its experts. init: see the top of the file. fold: account for
            the gains of the norms. from_layer: index of the first block whose input may decide ahead; the earliest
            blocks change the stream most.
    """

    distance: int = Field(default=1, ge=0)
    init: Literal["next_gate", "random"] = "next_gate"
    fold: bool = True
    from_layer: int = Field(default=0, ge=0)


def decoder_mixtures(inputs: PlanInputs) -> list[LayerShape]:
    """The mixtures of the last stack, in order: an encoder before it has no steps to hide a read in.

    Raises:
        PlanError: no mixtures, or such whose experts are packed.
    """
    found = choose(inputs.shape, "all", dense=False)
    stack = [stack_of(there.site) for there in found]
    return [there for there, name in zip(found, stack, strict=True) if name == stack[-1]]


def stack_of(path: str) -> str:
    """A module path up to the number of its block."""
    words = path.split(".")
    return ".".join(words[: next((i for i, word in enumerate(words) if word.isdecimal()), len(words))])


def gain(norm: nn.Module, dim: int) -> Tensor:
    """What a norm multiplies its normalised input by, [D] float64 up to a common factor.

    Found by what it does to inputs of +-1 and their negatives, so that it holds whichever way a norm keeps its weight.
    """
    sign_D = torch.ones(dim)
    sign_D[1::2] = -1
    with torch.no_grad():
        whole = copy.deepcopy(norm).float()
        up_D, down_D = (whole(x_D[None])[0].double() for x_D in (sign_D, -sign_D))
    found_D: Tensor = (up_D - down_D) * sign_D.double()
    return found_D


def norm_before(model: nn.Module, there: LayerShape) -> Tensor:
    """The gain of the norm that a mixture's input comes from. Raises PlanError where none of a known name is there."""
    block = there.site.rpartition(".")[0]
    for name in NORMS:
        try:
            norm = model.get_submodule(f"{block}.{name}")
        except AttributeError:
            continue
        return gain(norm, there.dim)
    raise PlanError(f"layer {there.layer}: {block} has no norm of a known name before its mixture; use fold=False")


def factors(model: Any, mine: LayerShape, source: LayerShape) -> list[float]:
    """g_N / g_{N-d}, 0 where the earlier norm silences an input.

    Raises:
        PlanError: see ``norm_before``, or there is no open model to look at.
    """
    if not isinstance(model, nn.Module):
        raise PlanError("folding the norms' gains needs the open model; use fold=False")
    own_D, earlier_D = norm_before(model, mine), norm_before(model, source)
    ratio_D = torch.where(earlier_D == 0, torch.zeros_like(own_D), own_D / earlier_D)
    return [float(value) for value in ratio_D.float()]


def entry(there: LayerShape, source: LayerShape | None, config: Config, model: Any) -> LayerExperts:
    """One mixture: its experts as they are, its gate on the input of ``source``, None for its own.

    Raises:
        PlanError: nobody knows how its router was made, or it is pre-gated already.
    """
    if there.module is None:
        raise PlanError(f"layer {there.layer}: nothing says how its router was made, so it cannot be built anew")
    router = there.module.config["router"]
    if router["method"] == ROUTER:
        raise PlanError(f"layer {there.layer} is pre-gated already; convert the mixture it was made from")
    if there.module.config.get("remap") is not None:
        raise PlanError(f"layer {there.layer} renames its choices; convert before experts are merged")
    settings = {"gate": router, "distance": config.distance, "own_gate": source is None and config.distance > 0}
    module = {**there.module.config, "router": {"method": ROUTER, "config": settings}}
    fresh = source is not None and config.init == "random"
    scale = None if source is None or fresh or not config.fold else factors(model, there, source)
    assert there.num_experts is not None
    return LayerExperts(
        layer=there.layer,
        experts=[[ExpertSource(layer=there.layer, expert=expert)] for expert in range(there.num_experts)],
        router="new" if fresh else "rows",
        router_scale=scale,
        module=MethodUse(method=there.module.method, config=module),
    )


def sources(found: Sequence[LayerShape], config: Config) -> list[LayerShape | None]:
    """For each mixture the one whose input it reads, None for its own."""
    before: list[LayerShape | None] = [None] * config.distance
    given = [there if there.layer >= config.from_layer else None for there in found]
    return [*before, *given][: len(found)] if config.distance else [None] * len(found)


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Routers that read ahead, for all mixtures of the decoder.

    Raises:
        PlanError: fewer than two mixtures, a distance that leaves none to choose ahead, a layer that cannot be built
            anew, norms that cannot be folded.
    """
    found = decoder_mixtures(inputs)
    if len(found) < 2:
        raise PlanError(f"{inputs.shape.name} has {len(found)} mixtures; choosing ahead takes at least 2")
    if config.distance >= len(found):
        raise PlanError(
            f"distance={config.distance} with {len(found)} mixtures leaves none to choose ahead; use at most "
            f"{len(found) - 1}"
        )
    reads = sources(found, config)
    ahead = [there.layer for there, source in zip(found, reads, strict=True) if source is not None]
    if config.distance and not ahead:
        last = found[-1 - config.distance].layer
        raise PlanError(f"from_layer={config.from_layer} leaves no mixture to choose ahead; use at most {last}")
    return ExpertPlan(
        method="convert.pre_gated",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        layers=[entry(there, source, config, inputs.model) for there, source in zip(found, reads, strict=True)],
        notes={"keeps": "nothing" if ahead else "as_routed", "chosen_ahead": spell(ahead)},
    )


CARD = MethodCard(
    title="Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference",
    year=2023,
    arxiv="2308.12066",
    paper="pre-gated-moe",
    summary="Gates of a trained mixture moved to the input of an earlier block, to be trained on.",
    taxonomy="system/storage",
    needs=("model",),
    deviations=("starts from the next block's gate with the norms' gains folded in; the paper does not say",),
)
