"""Which layers a plan is about, as settings say it."""

import re
from typing import Annotated

from pydantic import AfterValidator

from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, ModelShape


PATTERN = re.compile(r"all|(first|last|every):([1-9]\d*)")


def _known(choice: list[int] | str) -> list[int] | str:
    if isinstance(choice, str) and not PATTERN.fullmatch(choice):
        raise ValueError("must be all, first:N, last:N, every:N or a list of layer indices")
    if isinstance(choice, list) and (not choice or len(set(choice)) != len(choice) or min(choice) < 0):
        raise ValueError("a list of layers needs at least one index, none negative, none twice")
    return choice


Layers = Annotated[list[int] | str, AfterValidator(_known)]
"""``all``, ``first:N``, ``last:N``, ``every:N`` (the N-th, the 2N-th, ... as in Switch), or a list of indices."""


def choose(shape: ModelShape, choice: list[int] | str, *, dense: bool) -> list[LayerShape]:
    """The layers meant by ``choice`` among those that are dense (or mixtures), in order.

    Raises:
        PlanError: no such layers, a listed one that is of the other kind, or experts in others that would be skipped.
    """
    kind = "dense" if dense else "mixture"
    fit = [layer for layer, there in sorted(shape.layers.items()) if (there.num_experts is None) == dense]
    if isinstance(choice, list):
        for layer in choice:
            if shape.layer(layer).layer not in fit:
                other = "a mixture" if dense else "dense"
                raise PlanError(f"{shape.name} layer {layer} is {other}; {kind} layers are {fit or 'none'}")
        return [shape.layer(layer) for layer in sorted(choice)]
    if shape.foreign and not dense:
        others = ", ".join(f"{layer} ({what})" for layer, what in shape.foreign.items())
        raise PlanError(
            f"layers={choice!r}, but {shape.name} holds no equal float experts in layers {others}; list those that are "
            f"meant ({fit or 'none is a mixture of float experts'})"
        )
    way, _, number = choice.partition(":")
    count = int(number or 1)
    if way in ("first", "last") and count > len(fit):
        raise PlanError(f"layers={choice!r}, but {shape.name} has {len(fit)} {kind} layers")
    found = {"all": fit, "first": fit[:count], "last": fit[-count:], "every": fit[count - 1 :: count]}[way]
    if not found:
        raise PlanError(f"layers={choice!r} means no layer; {shape.name} has {len(fit)} {kind} layers")
    return [shape.layer(layer) for layer in found]
