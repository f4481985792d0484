"""From a recipe to a model: opened or made, planned and swapped."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moestro.core.errors import ConfigError
from moestro.core.losses import RoutingLoss
from moestro.data.tokens import open_tokenizer
from moestro.training.recipe import Head, PhaseConfig, PlanUse, Recipe, SwapConfig


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moestro.data.dataset import Dataset

TASKS: dict[Head, str] = {
    "causal": "causal-lm",
    "masked": "masked-lm",
    "classification": "sequence-classification",
    "seq2seq": "seq2seq-lm",
    "span": "question-answering",
}


def reference_tokenizer(ref: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer that lies beside a model's weights; None when there is none. LoadError for a damaged one."""
    from moestro.models.refs import resolve

    folder = resolve(ref).folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")):
        return None
    return open_tokenizer(folder)


def open_model(ref: str | Path, head: Head | None = None, num_labels: int | None = None) -> Any:
    """Open a model for training, with float32 weights.

    Args:
        head: None opens what was saved; else a head of that kind, newly initialised where the checkpoint has another.
    """
    from moestro.models.load import load, load_for

    if head is None:
        return load(ref, dtype=torch.float32)
    overrides = None if num_labels is None else {"num_labels": num_labels}
    return load_for(ref, TASKS[head], dtype=torch.float32, device=None, overrides=overrides)


def make_model(config: Mapping[str, Any], head: Head, vocab_size: int, num_labels: int | None = None) -> Any:
    """A model from scratch of a known family, with Moestro's layer where the family has mixtures.

    Args:
        config: values of a Transformers configuration; ``vocab_size`` may be missing or ``auto``.

    Raises:
        ConfigError: a vocabulary smaller than the tokenizer's, a value that the family's configuration does not have.
        FamilyError, LoadError: a family that is not known, a value that Transformers refuses.
    """
    from moestro.models.families import family
    from moestro.models.skeleton import config_from, construct, model_class
    from moestro.models.subclass import moestro_class
    from moestro.models.swap import swap_stock_blocks, watch_stacks

    values = dict(config)
    if values.get("vocab_size", "auto") == "auto":
        values["vocab_size"] = vocab_size
    if not isinstance(values["vocab_size"], int):
        raise ConfigError(f"model.config.vocab_size={values['vocab_size']!r}: expected a whole number or auto")
    if values["vocab_size"] < vocab_size:
        raise ConfigError(
            f"model.config.vocab_size={values['vocab_size']} is under the tokenizer's {vocab_size} tokens"
        )
    if num_labels is not None:
        values["num_labels"] = num_labels
    spec = family(values)
    built = config_from(values, "model.config")
    _check_names(values, built)
    built.dtype = torch.float32
    if hasattr(built, "output_router_logits"):
        built.output_router_logits = False
    stock: Any = model_class(built, TASKS[head])
    model = construct(moestro_class(stock), built, "model.config")
    swap_stock_blocks(model, spec)
    watch_stacks(model, spec)
    return model


def _check_names(values: Mapping[str, Any], built: Any) -> None:
    """Raise ConfigError for a value that the configuration ``built`` of them only carries along."""
    from moestro.models.skeleton import known_values

    known, held = known_values(values["model_type"]), vars(built)
    unknown = next((name for name in values if name in held and name not in known and f"_{name}" not in held), None)
    if unknown is not None:
        near = difflib.get_close_matches(str(unknown), sorted(known), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"model.config: a {values['model_type']} configuration has no {unknown!r}{hint}")


def check_causal(head: Head, model: Any) -> None:
    """Raise ConfigError for an encoder that is to predict next tokens: it sees them."""
    from moestro.models.families import family

    if head != "causal" or not getattr(model, "is_moestro", False):
        return
    encoders = all(stack.name == "encoder" for stack in family(model.config).stacks)
    if encoders and not getattr(model.config, "is_decoder", False):
        raise ConfigError(f"{type(model).__name__} sees the tokens it would have to predict; use objective: masked")


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", model: Any) -> None:
    """Raise ConfigError for a tokenizer with more tokens than a Transformers model has."""
    config = getattr(model, "config", None)
    known = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(known, int) and len(tokenizer) > known:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary {known}; "
            "use the tokenizer the model was trained with"
        )


def build_model(
    recipe: Recipe, head: Head, tokenizer: "PreTrainedTokenizerBase | None", num_labels: int | None = None
) -> Any:
    """The model a recipe describes, with its plan applied and its swaps done."""
    settings = recipe.model
    wanted: Head = head if settings.head == "auto" else settings.head
    if settings.load is not None:
        model = open_model(settings.load, wanted, num_labels)
    else:
        assert settings.config is not None
        model = make_model(settings.config, wanted, 0 if tokenizer is None else len(tokenizer), num_labels)
    change_model(recipe, model)
    return model


def change_model(recipe: Recipe, model: nn.Module) -> None:
    """Apply the recipe's plan and swaps to a fresh model."""
    if recipe.model.plan is not None:
        apply_plan(model, recipe.model.plan, recipe.seed)
    for entry in recipe.model.swaps:
        apply_swap(model, entry)


def apply_swap(model: nn.Module, entry: SwapConfig) -> None:
    """One entry of ``swaps``."""
    from moestro.models.swap import swap

    swap(model, entry.method, entry.config, kind=entry.sites, layers=entry.layers, stack=entry.stack)


def apply_plan(
    model: nn.Module,
    use: PlanUse,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Apply a plan file, or the plan that a planner method makes from the model as it is now. Returns the receipt.

    Args:
        batches: calibration data for a planner that measures.
    """
    from moestro import surgery
    from moestro.core.plan import ExpertPlan, Plan
    from moestro.methods.planning import make_plan

    if use.file is not None:
        plan: Plan = ExpertPlan.load(use.file)
    else:
        assert use.method is not None
        plan = make_plan(use.method, model, use.config, batches=batches, seed=seed)
    receipt: dict[str, Any] = surgery.apply(model, plan, optimizer=optimizer)
    return receipt


def enter_phase(recipe: Recipe, dataset: "Dataset | None" = None, objective: Any = None) -> Any:
    """What the trainer calls when a phase with a plan begins.

    Args:
        dataset, objective: of the run; a planner that measures is given the plan's ``rows`` of them, the same for every
            rank.
    """

    def on_enter(model: nn.Module, phase: PhaseConfig, optimizer: torch.optim.Optimizer) -> None:
        assert phase.on_enter is not None
        batches = None if dataset is None else calibration_batches(dataset, objective, phase.on_enter.rows, recipe.seed)
        apply_plan(model, phase.on_enter, recipe.seed, optimizer, batches)

    return on_enter


def calibration_batches(
    dataset: "Dataset", objective: Any, count: int, seed: int, size: int = 8
) -> list[dict[str, Any]]:
    """``count`` rows of the training data, drawn by the seed from all sources alike, as arguments of a forward."""
    draw = np.random.default_rng(seed)
    sources = list(dataset.sources.values())
    rows = []
    for place, source in enumerate(sources):
        share = (count + len(sources) - 1 - place) // len(sources)
        rows += [source[int(i)] for i in draw.permutation(len(source))[:share]]
    batches = [objective.collate(rows[at : at + size], []) for at in range(0, len(rows), size)]
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "token_type_ids")
    return [{name: batch[name] for name in names if name in batch} for batch in batches]


def loss_weights(recipe: Recipe, model: nn.Module) -> dict[str, float]:
    """Weights of the losses: the stock model's coefficients, as far as its layers still have the losses, then what the
    recipe says.
    """
    from moestro.models.swap import state_of

    there = {name for losses in routing_losses(model) for name in losses}
    stock = {name: weight for name, weight in state_of(model).loss_weights.items() if name in there}
    return {**stock, **recipe.losses}


def routing_losses(model: nn.Module) -> list[dict[str, RoutingLoss]]:
    """The losses of every layer that routes, by name."""
    found = []
    for module in model.modules():
        losses = getattr(module, "losses", None)
        if isinstance(losses, nn.ModuleDict):
            found.append({name: loss for name, loss in losses.items() if isinstance(loss, RoutingLoss)})
    return found
