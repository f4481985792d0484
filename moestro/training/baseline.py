"""Baselines of equal cost, made from a recipe: what its mixture has to beat.

    dense             every mixture becomes a dense feed-forward of the operations that a token's experts, shared branch
                      and projections take; only the router is not paid for
    topk              the same layers, routed by ``train.softmax_topk`` with as many real assignments a token; where no
                      whole numbers come within 1 %, the number of steps makes the operations equal
    equal_flops       dense, with the forward of the whole model as dear as the recipe's, the router included; where no
                      whole width comes within 1 %, the number of steps makes up for it
    equal_parameters  dense, with as many parameters as the recipe's model

    made = baseline("recipes/from-scratch.yaml", "dense")
    train(made.recipe, "runs/from-scratch-dense")           # or: train(recipe, out, baseline="dense")

All sizes come from counting both models (``training.size``, ``core.cost``), none is typed. Seed, data, steps and
optimiser stay the recipe's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from torch import nn

from moestro.core.cost import Work, cost
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.models.sites import sites
from moestro.models.skeleton import parameters_on_meta
from moestro.surgery.opened import form_at
from moestro.training.baseline_recipe import (
    WITHIN,
    Origin,
    Place,
    assemble,
    carried,
    entries,
    origin,
    without_mixtures,
)
from moestro.training.baseline_topk import route_by_topk
from moestro.training.recipe import Recipe, load_recipe
from moestro.training.size import Size
from moestro.training.skeleton import recipe_skeleton


Kind = Literal["dense", "topk", "equal_flops", "equal_parameters"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Baseline:
    """A derived recipe, and how it compares.

    Attributes:
        kind: which. recipe: the baseline's, named ``<name>-<kind>``. size, of: counted sizes of the baseline and of the
            recipe it was made from. notes: what was done, a line each.
    """

    kind: Kind
    recipe: Recipe
    size: Size
    of: Size
    notes: tuple[str, ...]

    def text(self) -> str:
        """The recipe as YAML, under a comment that says what it is."""
        head = "".join(f"# {line}\n" for line in self.notes)
        return head + yaml.safe_dump(self.recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def kind_of(name: str) -> Kind:
    """The kind of that name.

    Raises:
        ConfigError: there is none.
    """
    for kind in KINDS:
        if kind == name:
            return kind
    raise ConfigError(f"no baseline {name!r}; known: {', '.join(KINDS)}")


def baseline(recipe: Recipe | str | Path, kind: Kind, *, measured: str | Path | None = None) -> Baseline:
    """Derive a baseline.

    Args:
        measured: folder of a run of the recipe. Its assignments a token count in the place of those that the settings
            tell; needed where data decide how many experts a token uses.

    Raises:
        ConfigError: a recipe that starts from trained weights or converts, or has no mixture; a mixture that is no
            feed-forward; costs that data decide without a measured run; a cost that cannot be met within 1 %.
    """
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    kind = kind_of(kind)
    found = origin(settings, measured)
    if kind == "topk":
        values, said = route_by_topk(found)
    else:
        values, said = _dense(found, kind)
    derived, size = assemble(found, values, f"{settings.name}-{kind.replace('_', '-')}")
    if kind == "equal_flops" or (kind == "topk" and not values["exact"]):
        derived, steps = _equal_steps(settings, derived, size, found.size)
        said = f"{said}; {steps}"
    if kind == "equal_parameters":
        _check("parameters", size.parameters, found.size.parameters)
    return Baseline(
        kind, derived, size, found.size, (f"{kind} baseline of {settings.name}: {said}", *_costs(size, found.size))
    )


def _costs(size: Size, of: Size) -> list[str]:
    def line(name: str, one: int, two: int) -> str:
        return f"{name} {one:,}, the recipe's {two:,} ({one / two - 1:+.2%})"

    return [
        line("forward operations a token:", size.forward_flops, of.forward_flops),
        line("parameters:", size.parameters, of.parameters),
        line("parameters a token uses:", size.active, of.active),
    ]


def _check(what: str, one: float, two: float, out: str = "make the model wider") -> None:
    if abs(one / two - 1) > WITHIN:
        raise ConfigError(
            f"no whole number comes within {WITHIN:.0%} of the recipe's {two:,.0f} {what}, the nearest gives "
            f"{one:,.0f}; {out}"
        )


def _equal_steps(recipe: Recipe, derived: Recipe, size: Size, of: Size) -> tuple[Recipe, str]:
    """The baseline with steps of which all operations together agree, and which of width and steps did it."""
    if abs(size.train_flops / of.train_flops - 1) <= WITHIN:
        return derived, "operations a token agree, steps are the recipe's"
    total = of.train_flops * recipe.total_steps
    steps = max(1, round(total / size.train_flops))
    _check("operations of the run", size.train_flops * steps, total, "give the recipe more steps")
    if recipe.phases:
        raise ConfigError(
            f"whole sizes make the operations equal only to {size.train_flops / of.train_flops - 1:+.1%}, and the "
            f"phases of {recipe.name} fix the steps that could make up for it; make the model wider"
        )
    changed = {**derived.model_dump(mode="json", exclude_unset=True), "steps": steps, "tokens": None}
    return Recipe.parse(changed), (
        f"whole sizes make the operations a token equal only to {size.train_flops / of.train_flops - 1:+.1%}, so "
        f"{steps:,} steps in the place of {recipe.total_steps:,} make those of the run equal"
    )


# -- dense ---------------------------------------------------------------------------------------------------------


def _dense(found: Origin, kind: Kind) -> tuple[dict[str, Any], str]:
    """Recipe values with dense feed-forwards in the place of mixtures, and the widths in words."""
    forms = _forms(found)

    def values(widths: Sequence[int]) -> dict[str, Any]:
        configs = [{"size": width, **form} for width, form in zip(widths, forms, strict=True)]
        return {"swaps": [*without_mixtures(found), *entries(found, "train.dense", configs)]}

    parameters = kind == "equal_parameters"
    unit = [
        _unit(place, form, _count if parameters else _operations)
        for place, form in zip(found.places, forms, strict=True)
    ]
    if kind == "dense":
        wanted = [
            (_experts(place, found.work) - at_0) / each for place, (at_0, each) in zip(found.places, unit, strict=True)
        ]
    else:
        _, thin = assemble(found, values([1] * len(forms)), "thin")
        left = found.size.parameters - thin.parameters if parameters else found.size.forward_flops - thin.forward_flops
        shares = [_count(place.module) if parameters else cost(place.module, found.work) for place in found.places]
        wanted = [1 + left * share / sum(shares) / each for share, (_, each) in zip(shares, unit, strict=True)]
    widths = carried(wanted)
    if kind == "dense":
        done = sum(at_0 + width * each for width, (at_0, each) in zip(widths, unit, strict=True))
        _check("operations of feed-forwards a token", done, sum(_experts(place, found.work) for place in found.places))
    return values(widths), f"feed-forwards of width {_range(widths)} in the place of {found.where()}"


def _range(widths: Sequence[int]) -> str:
    return f"{widths[0]:,}" if len(set(widths)) == 1 else f"{min(widths):,} to {max(widths):,}"


def _experts(place: Place, work: Work) -> float:
    """Operations a token of a mixture without its router."""
    whole = cost(place.module, work)
    return whole - cost(place.module.router, work) if isinstance(place.module, MoELayer) else whole


def _operations(module: nn.Module) -> float:
    return cost(module, Work(1))


def _count(module: nn.Module) -> float:
    return float(sum(p.numel() for p in module.parameters()))


def _unit(place: Place, form: Mapping[str, Any], measure: Callable[[nn.Module], float]) -> tuple[float, float]:
    """What a dense feed-forward of width 0 would count, and what each unit of width adds."""
    use = method("train.dense")
    with parameters_on_meta():
        one, two = (measure(use.build(place.site, use.configure({"size": size, **form}), Shared())) for size in (1, 2))
    return 2 * one - two, two - one


def _forms(found: Origin) -> list[dict[str, Any]]:
    """The form of each dense feed-forward: that of the experts, else that of the family's own feed-forward."""
    forms = [form_at(place.site) for place in found.places]
    if None in forms:
        bare = found.recipe.model_copy(update={"model": found.recipe.model.model_copy(update={"swaps": []})})
        stock: dict[str, Site] = {site.path: site for site in sites(recipe_skeleton(bare, found.tokenizer), "mlp")}
        forms = [form or form_at(stock[place.site.path]) for form, place in zip(forms, found.places, strict=True)]
    return [
        {} if form is None else {"activation": form.activation, "gated": form.gated, "bias": form.bias}
        for form in forms
    ]
