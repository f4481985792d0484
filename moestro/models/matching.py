"""Hold an opened checkpoint against a model: which of its tensors go where, and whether it has them all."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moestro.models.auto import MODEL_TYPE
from moestro.models.checkpoint import Checkpoint
from moestro.models.keymap import Entry, Mixture, Piece, Shape, check, choose_layout, entries
from moestro.models.spec import FamilySpec, Layout
from moestro.models.swap import SHARED, mixtures, state_of


@dataclass(frozen=True)
class Match:
    """What a checkpoint gives to a model.

    Attributes:
        wanted: the tensors to read, checked. fresh: tensors of the model that no checkpoint of another head has.
        copies: tensors of the checkpoint that must equal another one because the model ties them.
    """

    wanted: dict[str, Entry]
    fresh: list[str]
    copies: dict[str, str]


def match(model: Any, opened: Checkpoint, spec: FamilySpec, *, new_head: bool = False) -> Match:
    """Map a dressed model's tensors to a checkpoint's and check names and shapes; reads headers only.

    Args:
        new_head: the model has another head than the checkpoint: head tensors may be missing or left over.

    Raises:
        LoadError: see ``keymap.check``.
    """
    wanted = map_tensors(model, opened, spec)
    present = set(opened.source.keys())
    ignored = [*spec.ignored]
    fresh: list[str] = []
    if new_head:
        head = re.compile(rf"(^|\.)({'|'.join((*spec.heads, 'pooler'))})\.")
        ignored.append(head.pattern)
        fresh = [
            name
            for name, entry in wanted.items()
            if head.search(name) and any(piece.key not in present for piece in entry.pieces)
        ]
    wanted = {name: entry for name, entry in wanted.items() if name not in fresh}
    claimed = {piece.key for entry in wanted.values() for piece in entry.pieces}
    copies = _tied_copies(model, wanted, present - claimed, spec)
    check(
        wanted.values(),
        opened.source,
        where=opened.files,
        ignored=[*ignored, *(f"^{re.escape(copy)}$" for copy in copies)],
        spec=spec,
        name=opened.name,
    )
    return Match(wanted, fresh, copies)


def map_tensors(model: Any, opened: Checkpoint, spec: FamilySpec) -> dict[str, Entry]:
    """The map from the dressed model's tensors to the checkpoint's names as they are on disk; tied copies left out."""
    tied = model.all_tied_weights_keys
    shapes: dict[str, Shape] = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }
    layout: Layout | None = None
    where: list[Mixture] = []
    if not opened.is_moestro:
        layout, where = choose_layout(spec, opened.source.keys()), mixtures(model, spec)
    state_of(model).facts.update(source=opened.name, layout=layout.name if layout else MODEL_TYPE)
    wanted = entries(shapes, where, layout)
    spell = _spelling(wanted, opened, spec)
    present = set(opened.source.keys())
    copies: dict[str, list[str]] = {}
    for copy, original in tied.items():
        copies.setdefault(original, []).append(copy)

    def on_disk(piece: Piece) -> Piece:
        names = [spell(name) for name in (piece.key, *copies.get(piece.key, ()))]
        return replace(piece, key=next((name for name in names if name in present), names[0]))

    return {
        name: replace(entry, pieces=tuple(on_disk(piece) for piece in entry.pieces)) for name, entry in wanted.items()
    }


def _spelling(wanted: Mapping[str, Entry], opened: Checkpoint, spec: FamilySpec) -> Callable[[str], str]:
    """How the checkpoint writes a name: with or without the prefix of the base model, or by an old name."""
    present = set(opened.source.keys())
    pieces = [piece.key for entry in wanted.values() for piece in entry.pieces]
    prefix = f"{spec.prefix}." if spec.prefix else ""
    changes: list[Callable[[str], str]] = [lambda key: key]
    if prefix:
        changes += [lambda key: key.removeprefix(prefix), lambda key: prefix + key]
    old = {}
    for key in present:
        new = key
        for pattern, replacement in spec.renames:
            new = re.sub(pattern, replacement, new)
        if new != key:
            old[new] = key
    change = max(changes, key=lambda change: sum(change(key) in present or change(key) in old for key in pieces))

    def spell(key: str) -> str:
        if key.startswith(f"{SHARED}."):  # stands beside the base model in every head class
            return key
        return old.get(change(key), change(key))

    return spell


def _tied_copies(model: Any, wanted: Mapping[str, Entry], spare: set[str], spec: FamilySpec) -> dict[str, str]:
    """Unclaimed tensors of the checkpoint that are copies of a tied one -> the name of the one that is read."""
    prefix = f"{spec.prefix}."
    found = {}
    for copy, original in model.all_tied_weights_keys.items():
        read = wanted[original].pieces[0].key
        for name in (copy, original, copy.removeprefix(prefix), original.removeprefix(prefix)):
            if name in spare and name != read:
                found[name] = read
    return found


def aim_at_stock(wanted: Mapping[str, Entry], model: Any, spec: FamilySpec) -> dict[str, Entry]:
    """The same pieces, going to where the plain Transformers model has them."""
    if spec.moe is not None:
        shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stock = entries(shapes, mixtures(model, spec), spec.moe.stock)
        wanted = {name: entry.aimed_at(stock[name]) for name, entry in wanted.items()}
    return dict(wanted)
