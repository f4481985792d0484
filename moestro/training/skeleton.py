"""The model of a recipe with shapes only: every parameter on the meta device."""

from typing import TYPE_CHECKING, Any

from moestro.training.build import TASKS, change_model, make_model
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
