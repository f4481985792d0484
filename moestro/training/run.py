"""A whole run from a recipe: what ``moestro train`` does, for Python."""

import contextlib
import fcntl
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moestro.core.errors import ConfigError, SaveError, TrainError
from moestro.core.files import write_text
from moestro.data.dataset import Dataset, build_dataset
from moestro.training.build import (
    build_model,
    check_causal,
    check_vocabulary,
    enter_phase,
    loss_weights,
    open_model,
)
from moestro.training.checkpoint import Saved, latest_checkpoint
from moestro.training.log import RUN, Log
from moestro.training.loop import Trainer, TrainResult
from moestro.training.objectives import Objective, make_objective
from moestro.training.parallel import Ranks, gathered_weights, own_class, ranks
from moestro.training.precision import choose_dtype
from moestro.training.recipe import Recipe, load_recipe
from moestro.training.size import Size, size_of
from moestro.training.skeleton import check_length, recipe_skeleton, recipe_tokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moestro.training.baseline import Baseline, Kind


DTYPES = ("float32", "bfloat16")


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    fresh: bool = False,
    silent: bool = False,
    baseline: "Kind | Baseline | None" = None,
    measured: str | Path | None = None,
) -> TrainResult:
    """Train, or go on with a run that was interrupted.

    Args:
        recipe: a Recipe, or the YAML file of one. out: folder of the run; its newest complete checkpoint is resumed.
        fresh: refuse a folder that already holds a run.
        baseline: train this baseline of the recipe instead, one that was derived or its kind (``training.baseline``,
            also for ``measured``); ``out/recipe.yaml`` then says what it is.

    Returns:
        How it ended. ``out/model`` then holds the model, ``out/metrics.jsonl`` the numbers.

    Raises:
        MoestroError: one line; nothing half-written is left.
    """
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if isinstance(baseline, str):
        from moestro.training.baseline import baseline as derive

        baseline = derive(settings, baseline, measured=measured)
    settings = settings if baseline is None else baseline.recipe
    folder = Path(out)
    with ranks(settings.parallel.kind) as group, _locked(folder, group):
        seed_all(settings.seed)
        saved, notes = latest_checkpoint(folder / "checkpoints") if group.main else (None, [])
        group.barrier()
        if not group.main:
            saved, _ = latest_checkpoint(folder / "checkpoints")
        if fresh and saved is not None:
            raise ConfigError(
                f"{folder}: holds a run (step {saved.step}); give another --out, or leave --fresh out to go on"
            )
        trainer, tokenizer, more = prepare(settings, folder, group, saved)
        if group.main and not silent:
            for line in (*notes, *more, *(() if baseline is None else baseline.notes)):
                Log.announce(line)
        describe(trainer)
        if group.main and baseline is not None:
            write_text(folder / "recipe.yaml", baseline.text())
        result = trainer.run(silent=silent)
        if any(phase.on_enter for phase in trainer.recipe.phases):
            describe(trainer)  # a plan may have changed the model's size
        if result.stopped_by is None:
            save_final(trainer, tokenizer)
        group.barrier()
        return result


def describe(trainer: Trainer) -> None:
    """Write ``out/run.json``: the recipe, and the size of the model as it is now. All ranks count, the main one writes:
    looking at a part of sharded weights is a matter of all of them.
    """
    facts = {"schema": 1, "recipe": trainer.recipe.model_dump(mode="json"), "size": trainer.size().json()}
    if trainer.group.main:
        trainer.out.mkdir(parents=True, exist_ok=True)
        write_text(trainer.out / RUN, json.dumps(facts, indent=1) + "\n")


def prepare(
    recipe: Recipe, out: Path, group: Ranks, saved: Saved | None = None
) -> tuple[Trainer, "PreTrainedTokenizerBase", list[str]]:
    """Everything up to the first step: the trainer, the tokenizer, and lines worth printing."""
    tokenizer = recipe_tokenizer(recipe)
    objective = make_objective(recipe.objective, tokenizer)
    dataset = build_dataset(recipe.data, tokenizer, objective.shape)
    num_labels = len(dataset.labels) or None
    if saved is None:
        model = build_model(recipe, objective.head, tokenizer, num_labels)
    else:
        model = open_model(saved.model)
    check_length(recipe, model)
    check_vocabulary(tokenizer, model)
    check_causal(objective.head, model)
    objective = make_objective(recipe.objective, tokenizer, model.config)
    recipe = recipe.model_copy(update={"losses": loss_weights(recipe, model)})
    if recipe.gradient_checkpointing:
        from moestro.core.context import checkpoint

        checkpoint(model)
    dtype, why = _compute_type(recipe, group, saved)
    trainer = Trainer(
        model,
        recipe,
        dataset,
        objective,
        out,
        teachers={name: open_model(ref) for name, ref in recipe.teachers.items()},
        heldout=_heldout(recipe, tokenizer, objective, dataset),
        group=group,
        dtype=dtype,
        on_enter=enter_phase(recipe, dataset, objective),
        tokenizer=tokenizer,
    )
    if group.world > 1:  # the model is the same everywhere now; noise must not be
        seed_all(int(np.random.SeedSequence([recipe.seed, group.rank]).generate_state(1)[0]))
    lines = [why]
    if saved is not None:
        trainer.resume(saved, model_is_loaded=True)
        lines.append(f"resuming {saved.path} at step {saved.step} of {trainer.total}")
    return trainer, tokenizer, lines


def dry_run(recipe: Recipe | str | Path) -> Size:
    """What a recipe would build, counted on the meta device: no weight is read or allocated."""
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    model = recipe_skeleton(settings)
    again = settings.gradient_checkpointing
    return size_of(model, settings.data.sequence_length, gradient_checkpointing=again)


def save_final(trainer: Trainer, tokenizer: "PreTrainedTokenizerBase") -> Path:
    """Write ``out/model``: the trained model as a Moestro folder with its tokenizer and a receipt of the run.

    All ranks take part in gathering a sharded model; the first one writes.
    """
    from moestro.models.save import save, save_into
    from moestro.models.swap import state_of

    weights = gathered_weights(trainer.model, trainer.group)
    folder = trainer.out / "model"
    if not trainer.group.main:
        return folder
    facts: dict[str, Any] = {
        "training": {
            "recipe": trainer.recipe.model_dump(mode="json"),
            "steps": trainer.step,
            "targets": trainer.targets_seen,
            "loss": trainer.last_loss,
        }
    }
    if weights is None:
        return save(trainer.model, folder, tokenizer=tokenizer, overwrite=True, receipt=facts)
    state_of(trainer.model).facts.update(facts)
    with own_class(trainer.model):
        save_into(trainer.model, folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    return folder


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _compute_type(recipe: Recipe, group: Ranks, saved: Saved | None) -> tuple[torch.dtype, str]:
    """The compute type of every rank and why: measured once a run, on rank 0, and kept when it is resumed."""
    if recipe.precision != "auto":
        return choose_dtype(recipe.precision)
    known = None if saved is None else saved.state().get("dtype")
    if known in DTYPES:
        return getattr(torch, known), f"compute type {known}, as the run began"
    dtype, why = choose_dtype("auto") if group.main else (torch.float32, "")
    chosen = DTYPES[group.first(DTYPES.index(str(dtype).removeprefix("torch.")))]
    return getattr(torch, chosen), why


def _heldout(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", objective: Objective, dataset: Dataset
) -> Dataset | None:
    if recipe.eval is None:
        return None
    data = recipe.eval.data
    if "sequence_length" not in data.model_fields_set:
        data = data.model_copy(update={"sequence_length": recipe.data.sequence_length})
    return build_dataset(data, tokenizer, objective.shape, dataset.labels)


@contextlib.contextmanager
def _locked(folder: Path, group: Ranks) -> Iterator[None]:
    """One run at a time in a folder."""
    if not group.main:
        yield
        return
    path = folder / ".run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SaveError(f"{folder}: cannot be the folder of a run ({error.strerror}); give another --out") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainError(f"{folder}: another process is training there; give another --out") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing came of the run
    finally:
        os.close(descriptor)
