"""Checkpoints of a run: complete or not there, never unpickled, enough to go on bit for bit.

    OUT/checkpoints/step-00000040/
        model/                 a model folder (``moestro.save``), or model.safetensors for a plain nn.Module
        optimizer.safetensors  <parameter>::<moment>
        rng.safetensors        generators of torch, numpy and Python, of every rank
        state.json             step, phase, data position, recipe, counters
        manifest.json          sizes and SHA-256, written last

A folder appears by one rename (``moestro.models.atomic``); one that was cut is never taken for a checkpoint.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.core.errors import LoadError, NonFiniteError
from moestro.models.atomic import atomic_folder, has_manifest, leftovers, recover, verify_folder
from moestro.training.finite import first_bad
from moestro.training.parallel import Ranks, own_class


SCHEMA = 1
NAME = re.compile(r"step-(\d{8})")
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: its folder and the step that comes next."""

    path: Path
    step: int

    @property
    def model(self) -> Path:
        """The model part."""
        return self.path / "model"

    def state(self) -> dict[str, Any]:
        """``state.json``. Raises LoadError when it is not of this version."""
        state: dict[str, Any] = json.loads((self.path / "state.json").read_text("utf-8"))
        if state.get("schema") != SCHEMA:
            raise LoadError(f"{self.path}: checkpoint schema {state.get('schema')!r}, this version reads {SCHEMA}")
        return state

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of ``optimizer`` or ``rng``."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(self.path / f"{name}.safetensors")
        return tensors


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Mapping[str, Tensor],
    rng: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
) -> Saved:
    """Write ``folder/step-N`` whole, then delete the oldest ones so that ``keep`` stay, this one among them.

    Args:
        step: steps done. optimizer: ``optimizer_tensors``. state: JSON values. weights: of a sharded model, gathered.
        tokenizer: saved beside the model.

    Raises:
        NonFiniteError: a weight or a moment is NaN or infinite; nothing is written.
        SaveError: disk full or failing; the earlier checkpoints stay.
    """
    check_finite(model if weights is None else weights, optimizer)
    from safetensors.torch import save_file

    target = folder / f"step-{step:08d}"
    with atomic_folder(target, overwrite=True) as draft:
        save_model(model, draft / "model", weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft / "model")
        save_file(dict(optimizer), draft / "optimizer.safetensors")
        save_file(dict(rng), draft / "rng.safetensors")
        body = {"schema": SCHEMA, "step": step, **state}
        (draft / "state.json").write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    # Later steps are what a resumed run passed over as damaged: they must not push sound ones out.
    for old in [saved for saved in find_checkpoints(folder)[0] if saved.step <= step][:-keep]:
        shutil.rmtree(old.path)
    return Saved(target, step)


def check_finite(weights: nn.Module | Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError that names the first weight, buffer or moment that is not finite."""
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    for kind, tensors in (("weight", named), ("optimiser state", optimizer)):
        if found := first_bad(tensors.items()):
            raise NonFiniteError(f"{kind} {found[0]} is not finite ({found[1]}); the checkpoint is not written")


def save_model(model: nn.Module, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """A Moestro model as a model folder, any other module as ``model.safetensors`` (shared tensors once)."""
    if getattr(model, "is_moestro", False):
        with own_class(model):
            model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        return
    from safetensors.torch import save_file, save_model

    folder.mkdir()
    if weights is None:
        save_model(model, str(folder / MODEL_FILE))
    else:
        save_file(dict(weights), folder / MODEL_FILE)


def load_plain_model(model: nn.Module, folder: Path) -> None:
    """Fill a plain module from ``model.safetensors``.

    Raises:
        LoadError: a tensor is missing, unknown or of another shape.
    """
    from safetensors.torch import load_model

    try:
        load_model(model, folder / MODEL_FILE)
    except (OSError, RuntimeError) as error:
        raise LoadError(f"{folder}: does not fit the model ({' '.join(str(error).split())[:300]})") from None


def find_checkpoints(folder: Path) -> tuple[list[Saved], list[str]]:
    """Complete checkpoints by step, and one line for each folder that is none.

    What a killed save left between two renames is put back, its drafts are swept.
    """
    if not folder.is_dir():
        return [], []
    notes = []
    for target in {folder / entry.name.split(".")[1] for entry in folder.iterdir() if entry.name.startswith(".step-")}:
        if left := leftovers(target):
            notes.append(f"{left[0]}: left by a save that was cut; removed")
            recover(target)
    found = []
    for entry in sorted(folder.iterdir()):
        match = NAME.fullmatch(entry.name)
        if match is None or not entry.is_dir():
            continue
        if has_manifest(entry):
            found.append(Saved(entry, int(match[1])))
        else:
            notes.append(f"{entry}: not a complete checkpoint (no valid manifest.json); skipped")
    return found, notes


def latest_checkpoint(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint whose every file has the hash of its manifest, and a line for each that was passed over."""
    found, notes = find_checkpoints(folder)
    for saved in reversed(found):
        try:
            verify_folder(saved.path, deep=True)
        except LoadError as error:
            notes.append(f"{error}; skipped")
            continue
        return saved, notes
    return None, notes


# -- random generators ------------------------------------------------------------------------------------------


def rng_state(group: Ranks) -> dict[str, Tensor]:
    """State of torch's, numpy's and Python's global generators on every rank, as tensors ``rankN.name``."""
    numpy_state: Any = np.random.get_state(legacy=True)
    version, python_words, python_gauss = random.getstate()
    own = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, numpy_state[1]), int(numpy_state[2]), int(numpy_state[3])]),
        "numpy_gauss": torch.tensor([float(numpy_state[4])], dtype=torch.float64),
        "python": torch.tensor([version, *python_words]),
        "python_gauss": torch.tensor([python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
    }
    state = {}
    for name, tensor in own.items():
        parts = [torch.empty_like(tensor) for _ in range(group.world)]
        if group.world > 1:
            dist.all_gather(parts, tensor)
        else:
            parts = [tensor]
        state.update({f"rank{rank}.{name}": part for rank, part in enumerate(parts)})
    return state


def set_rng_state(state: Mapping[str, Tensor], group: Ranks) -> None:
    """Put the generators back; a rank the saving run did not have keeps its fresh ones."""
    prefix = f"rank{group.rank}."
    if f"{prefix}torch" not in state:
        return
    torch.set_rng_state(state[f"{prefix}torch"])
    words = state[f"{prefix}numpy"].tolist()
    keys = np.asarray(words[:-2], dtype=np.uint32)
    np.random.set_state(("MT19937", keys, words[-2], words[-1], float(state[f"{prefix}numpy_gauss"])))
    version, *python_words = state[f"{prefix}python"].tolist()
    waiting, gauss = state[f"{prefix}python_gauss"].tolist()
    random.setstate((version, tuple(python_words), gauss if waiting else None))
