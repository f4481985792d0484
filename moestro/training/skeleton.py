"""The model of a recipe with shapes only: every parameter on the meta device."""

from typing import TYPE_CHECKING, Any

from moestro.core.errors import ConfigError
from moestro.data.dataset import load_tokenizer
from moestro.training.build import (
    TASKS,
    change_model,
    check_causal,
    check_vocabulary,
    make_model,
    reference_tokenizer,
)
from moestro.training.objectives import make_objective
from moestro.training.phases import ever_trained
from moestro.training.recipe import Head, Recipe


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_skeleton(recipe: Recipe, head: Head, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """As ``build.build_model``, without reading or allocating a weight."""
    from moestro.models.checkpoint import open_checkpoint
    from moestro.models.families import family
    from moestro.models.load import dressed
    from moestro.models.skeleton import config_from, model_class, parameters_on_meta

    settings = recipe.model
    wanted: Head = head if settings.head == "auto" else settings.head
    with parameters_on_meta():
        if settings.load is None:
            assert settings.config is not None
            model = make_model(settings.config, wanted, len(tokenizer))
        else:
            opened = open_checkpoint(settings.load)
            config = config_from(opened.base_config, opened.name)
            model = dressed(model_class(config, TASKS[wanted]), config, family(opened.base_config), opened.swaps)
        change_model(recipe, model)
    return model


def recipe_skeleton(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Any:
    """The model of a run, checked against its data; parameters that no phase trains have no ``requires_grad``.

    Raises:
        ConfigError: sequences too long, a vocabulary too small, an encoder that is to predict next tokens.
    """
    tokenizer = recipe_tokenizer(recipe) if tokenizer is None else tokenizer
    objective = make_objective(recipe.objective, tokenizer)
    model = build_skeleton(recipe, objective.head, tokenizer)
    check_length(recipe, model)
    check_vocabulary(tokenizer, model)
    check_causal(objective.head, model)
    named = dict(model.named_parameters())
    moving = ever_trained(sorted(named), recipe)
    for name, parameter in named.items():
        parameter.requires_grad_(name in moving)
    return model


def recipe_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerBase":
    """The tokenizer of a run."""
    own = None
    if recipe.data.tokenizer == "model" and recipe.model.load is not None:
        own = reference_tokenizer(recipe.model.load)
    return load_tokenizer(recipe.data, own)


def check_length(recipe: Recipe, model: Any) -> None:
    """Raise ConfigError for sequences longer than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    length = recipe.data.sequence_length
    if isinstance(limit, int) and length > limit:
        raise ConfigError(f"data.sequence_length={length} is above the {limit} positions of the model")
