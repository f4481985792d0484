"""From a recipe with mixtures to one without: what is counted, where mixtures stand, what else has to go with them."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moestro.core.cost import Work
from moestro.core.errors import ConfigError
from moestro.core.layer import mixture_layers
from moestro.core.site import Borrowed, Site
from moestro.models.sites import sites, stacks
from moestro.models.swap import SHARED
from moestro.training.build import routing_losses
from moestro.training.log import RUN, read_metrics
from moestro.training.recipe import Recipe, SwapConfig
from moestro.training.size import Size, attention_costs, size_of
from moestro.training.skeleton import recipe_skeleton, recipe_tokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WITHIN = 0.01  # how far from the recipe's cost a baseline may be


@dataclass(frozen=True)
class Place:
    """A mixture: its site, the stack it is in, and the module."""

    site: Site
    stack: str
    module: nn.Module

    @property
    def layer(self) -> int:
        """Index of its block."""
        assert self.site.layer is not None
        return self.site.layer


@dataclass(frozen=True)
class Origin:
    """A recipe that a baseline is made from, counted.

    Attributes:
        model: on the meta device. layers: every block with a feed-forward by stack. places: the mixtures among them.
    """

    recipe: Recipe
    tokenizer: "PreTrainedTokenizerBase"
    model: Any
    work: Work
    size: Size
    layers: Mapping[str, tuple[int, ...]]
    places: tuple[Place, ...]

    def mixed(self, stack: str) -> list[int]:
        """The blocks of a stack with a mixture."""
        return [place.layer for place in self.places if place.stack == stack]

    def where(self) -> str:
        """The mixtures in words."""
        count = len(self.places)
        return f"{count} mixture{'s' if count > 1 else ''} of {sum(map(len, self.layers.values()))} layers"


def origin(recipe: Recipe, measured: str | Path | None = None) -> Origin:
    """Count a recipe's model and find its mixtures.

    Raises:
        ConfigError: see ``training.baseline.baseline``.
    """
    _check_scratch(recipe)
    tokenizer = recipe_tokenizer(recipe)
    model = recipe_skeleton(recipe, tokenizer)
    mixtures = {path: module for path, module in model.named_modules() if getattr(module, "is_mixture", False)}
    if not mixtures:
        raise ConfigError(
            f"{recipe.name}: the recipe's model has no mixture, so there is nothing to make a baseline of"
        )
    by_stack = {place.spec.name: sites(model, "mlp", stack=place.spec.name) for place in stacks(model)}
    places = [
        Place(site, stack, mixtures.pop(site.path))
        for stack, found in by_stack.items()
        for site in found
        if site.path in mixtures
    ]
    if mixtures:
        path, module = next(iter(mixtures.items()))
        raise ConfigError(
            f"{path}: a {type(module).__name__} that is not the feed-forward of a block; baselines replace those only"
        )
    length, again = recipe.data.sequence_length, recipe.gradient_checkpointing
    rows = {} if measured is None else measured_rows(measured, recipe, model)
    size = size_of(model, length, gradient_checkpointing=again, rows=rows)
    if size.experts_vary:
        raise ConfigError(
            f"{recipe.name}: data decide how many experts a token uses, so its cost has to be measured; train the "
            "recipe, then give the folder of the run (--measured RUN)"
        )
    layers = {name: tuple(s.layer for s in found if s.layer is not None) for name, found in by_stack.items()}
    work = Work(length, rows=rows, by_length=attention_costs(model))
    return Origin(recipe, tokenizer, model, work, size, layers, tuple(places))


def _check_scratch(recipe: Recipe) -> None:
    """Refuse recipes whose mixture comes out of trained weights: a fresh baseline would not be its equal."""
    entered = next((phase.name for phase in recipe.phases if phase.on_enter is not None), None)
    if recipe.model.load is not None or recipe.model.plan is not None:
        what = "starts from trained weights" if recipe.model.load is not None else "converts its model by a plan"
        raise ConfigError(
            f"{recipe.name} {what}; a baseline is made of a model from scratch. Its dense baseline is the same recipe "
            "without plan and swaps"
        )
    if entered is not None:
        raise ConfigError(
            f"{recipe.name} converts its model when phase {entered!r} begins, so no single model has its cost; leave "
            "on_enter out, or write the baseline by hand"
        )


def measured_rows(run: str | Path, recipe: Recipe, model: nn.Module) -> dict[str, list[float]]:
    """Site -> assignments a token of each expert, [E], over the whole of a run, from its reports.

    Raises:
        ConfigError: a run of another model, without a ``run.json`` or without reports that count assignments.
    """
    folder = Path(run)
    try:
        told = json.loads((folder / RUN).read_text(encoding="utf-8"))["recipe"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder}: no folder of a finished run of {recipe.name} ({RUN} is missing or damaged)"
        ) from None
    if told != recipe.model.model_dump(mode="json"):
        raise ConfigError(
            f"{folder}: ran another model than {recipe.name} describes; train this recipe and give its run"
        )
    sums: dict[str, list[float]] = {}
    tokens = seen = 0.0
    for row in read_metrics(folder):
        tokens += float(row.get("tokens", 0.0))
        if "router" not in row:
            continue
        for site, layer in mixture_layers(model).items():
            found = row["router"].get(site, {})
            if found.get("real_per_token") is None:
                raise ConfigError(f"{folder}: its reports do not count assignments of {site}; train the recipe again")
            load = found["load"][: layer.router.num_experts]
            even = sum(load) or 1.0
            before = sums.setdefault(site, [0.0] * len(load))
            sums[site] = [b + tokens * found["real_per_token"] * x / even for b, x in zip(before, load, strict=True)]
        seen, tokens = seen + tokens, 0.0
    if not seen:
        raise ConfigError(f"{folder}: no report of the routers in it; the run is too short")
    return {site: [value / seen for value in values] for site, values in sums.items()}


# -- the derived recipe --------------------------------------------------------------------------------------------


def without_mixtures(found: Origin) -> list[SwapConfig]:
    """The recipe's swaps without what builds or changes mixtures; what acts on the routing of a stack goes too."""
    kept: list[SwapConfig] = []
    for entry in found.recipe.model.swaps:
        if entry.sites == "mlp":
            names = [entry.stack] if entry.stack is not None else list(found.layers)
            rest = {name: [n for n in _own(found, entry, name) if n not in found.mixed(name)] for name in names}
            if all(rest[name] == _own(found, entry, name) for name in names):
                kept.append(entry)
                continue
            one = len(found.layers) == 1
            kept += [
                entry.model_copy(update={"layers": layers, "stack": None if one else name})
                for name, layers in rest.items()
                if layers
            ]
        elif entry.sites != "stack":
            kept.append(entry)
    return kept


def _own(found: Origin, entry: SwapConfig, stack: str) -> list[int]:
    return [layer for layer in found.layers[stack] if entry.layers is None or layer in entry.layers]


def covered(found: Origin, entry: SwapConfig) -> list[int]:
    """Indices of the mixtures that an entry of kind mlp acts on."""
    return [
        index
        for index, place in enumerate(found.places)
        if entry.stack in (None, place.stack) and (entry.layers is None or place.layer in entry.layers)
    ]


def entries(
    found: Origin, method_id: str, configs: Sequence[Mapping[str, Any]], places: Sequence[int] | None = None
) -> list[SwapConfig]:
    """Swaps that build a method at mixtures (all, or those of the indices ``places``), one swap a stack."""
    chosen = range(len(found.places)) if places is None else places
    made = []
    for stack in found.layers:
        mine = [(found.places[index], config) for index, config in zip(chosen, configs, strict=True)]
        mine = [(place, config) for place, config in mine if place.stack == stack]
        if mine:
            layers = [place.layer for place, _ in mine]
            where: dict[str, Any] = {} if layers == list(found.layers[stack]) else {"layers": layers}
            where |= {} if len(found.layers) == 1 else {"stack": stack}
            config = merged([config for _, config in mine])
            made.append(SwapConfig(sites="mlp", method=method_id, config=config, **where))
    return made


def merged(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One config of several: a value where all agree, else ``{"per_layer": [...]}``."""
    values = {name: [config[name] for config in configs] for name in configs[0]}
    return {
        name: found[0] if all(value == found[0] for value in found) else {"per_layer": found}
        for name, found in values.items()
    }


def carried(wanted: Sequence[float], least: int = 1) -> list[int]:
    """Whole numbers; what one is rounded by is carried to the next, so that the sum is as near as it can be."""
    ends = [round(end) for end in accumulate(wanted)]
    return [max(least, end - before) for before, end in zip([0, *ends[:-1]], ends, strict=True)]


def assemble(found: Origin, values: Mapping[str, Any], name: str) -> tuple[Recipe, Size]:
    """The derived recipe and its size.

    Args:
        values: ``swaps``, the whole new list; ``losses``, weights to add.

    Raises:
        ConfigError: a phase or group of the optimiser that is left with nothing to train, parts that nothing uses.
    """
    recipe = found.recipe
    told = recipe.model_dump(mode="json", exclude_unset=True)
    told["name"] = name
    told["model"]["swaps"] = [entry.model_dump(mode="json", exclude_unset=True) for entry in values["swaps"]]
    bare = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"swaps": list(values["swaps"])}), "phases": []}
    )
    model = recipe_skeleton(bare, found.tokenizer)
    _check_used(model)
    gone = _loss_names(found.model) - _loss_names(model)
    told["losses"] = {k: v for k, v in {**recipe.losses, **values.get("losses", {})}.items() if k not in gone}
    names = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    for phase in told.get("phases", []):
        phase["losses"] = {k: v for k, v in phase.get("losses", {}).items() if k not in gone}
        phase["freeze"] = _matching(phase.get("freeze", []), names)
        train = _matching(phase.get("train", []), names)
        if phase.get("train") and not train:
            raise ConfigError(
                f"phase {phase['name']!r} trains parts of the mixtures only; its baseline would train nothing"
            )
        phase["train"] = train
    groups = told.get("optimizer", {}).get("groups")
    if groups:
        fitting = [{**group, "match": _matching(group["match"], names)} for group in groups]
        told["optimizer"]["groups"] = [group for group in fitting if group["match"]]
    derived = Recipe.parse(told)
    size = size_of(
        recipe_skeleton(derived, found.tokenizer),
        recipe.data.sequence_length,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    return derived, size


def _loss_names(model: nn.Module) -> set[str]:
    return {name for losses in routing_losses(model) for name in losses}


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [pattern for pattern in patterns if any(fnmatch.fnmatchcase(name, pattern) for name in names)]


def _check_used(model: nn.Module) -> None:
    """Raise ConfigError for a part that several sites shared and that nothing borrows any more."""
    borrowed = {
        id(part.module) for module in model.modules() for part in vars(module).values() if isinstance(part, Borrowed)
    }
    for name, part in getattr(model, SHARED, nn.ModuleDict()).items():
        if id(part) not in borrowed:
            raise ConfigError(f"the shared part {name!r} would be left without use; this mixture has no such baseline")
