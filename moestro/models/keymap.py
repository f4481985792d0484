"""Which tensors of a checkpoint make up which tensor of a model, and whether they are all there.

Only names and shapes are looked at, so every finding comes before a byte of data is read. A finding names the layer,
the expert, the projection and the file.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from moestro.core.errors import LoadError
from moestro.models.spec import FamilySpec, Layout, Rule
from moestro.models.weights import Chain, part_shapes


Shape = tuple[int, ...]


class Headers(Protocol):
    """What is needed of a checkpoint to check it."""

    def keys(self) -> Iterable[str]:
        """Names of all tensors."""

    def shape(self, key: str) -> Shape:
        """Shape of one tensor."""


@dataclass(frozen=True)
class Mixture:
    """One mixture layer of a model: its place, and the number of its experts."""

    path: str
    stack_path: str
    layer: int
    num_experts: int


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint: its name, the shape it must have, and what a person would call it."""

    key: str
    shape: Shape
    what: str


@dataclass(frozen=True)
class Entry:
    """One tensor in Moestro's form, the pieces of a checkpoint it is joined from, and where it goes in a model.

    Attributes:
        name: in a model whose mixtures are MoELayers. shape: of the whole.
        chain: cuts the whole into the checkpoint's ``pieces``.
        targets: names in the model at hand; ``out`` cuts the whole into them.
    """

    name: str
    shape: Shape
    chain: Chain
    pieces: tuple[Piece, ...]
    targets: tuple[str, ...]
    out: Chain = ()

    def aimed_at(self, other: "Entry") -> "Entry":
        """The same tensor from the same pieces, going to where ``other`` has its pieces."""
        return replace(self, targets=tuple(piece.key for piece in other.pieces), out=other.chain)


def entries(shapes: Mapping[str, Shape], mixtures: Sequence[Mixture], layout: Layout | None = None) -> dict[str, Entry]:
    """The map from a model's tensors to a checkpoint's.

    Args:
        shapes: names and shapes of the tensors of a model whose mixtures are MoELayers.
        mixtures: the mixture layers that ``layout`` applies to.
        layout: how the checkpoint packs them; None when it has the model's own names.

    Returns:
        name -> entry, in the order of ``shapes``.
    """
    found = {}
    for name, shape in shapes.items():
        mixture = next((m for m in mixtures if name.startswith(m.path + ".")), None)
        if mixture is None or layout is None:
            piece = Piece(name, shape, _plain_name(name))
            found[name] = Entry(name, shape, (), (piece,), (name,))
        else:
            found[name] = _packed(name, shape, mixture, layout)
    return found


def _packed(full: str, shape: Shape, mixture: Mixture, layout: Layout) -> Entry:
    """The entry of a tensor inside a mixture layer."""
    name = full.removeprefix(mixture.path + ".")
    block = mixture.path
    if layout.block is not None:
        relative = layout.block.format(layer=mixture.layer)
        block = ".".join(part for part in (mixture.stack_path, relative) if part)
    for rule in layout.rules:
        if rule.target == name:
            return Entry(full, shape, rule.chain, tuple(_pieces(rule, block, shape, mixture)), (full,))
    for disk, ours in layout.moves:
        if name.startswith(ours):
            key = f"{block}.{disk}{name.removeprefix(ours)}"
            what = f"layer {mixture.layer}, {disk}{name.removeprefix(ours)}"
            return Entry(full, shape, (), (Piece(key, shape, what),), (full,))
    raise LoadError(f"{full} has no place in the {layout.name} layout; save it as a Moestro folder instead")


def _pieces(rule: Rule, block: str, shape: Shape, mixture: Mixture) -> Iterable[Piece]:
    shapes = iter(part_shapes(shape, rule.chain))
    for source, projection in zip(rule.sources, rule.projections, strict=True):
        if "{expert}" not in source:
            yield Piece(f"{block}.{source}", next(shapes), f"layer {mixture.layer}, {projection}")
            continue
        for expert in range(mixture.num_experts):
            key = f"{block}.{source.format(expert=expert)}"
            yield Piece(key, next(shapes), f"layer {mixture.layer}, expert {expert}, {projection}")


def choose_layout(spec: FamilySpec, keys: Iterable[str]) -> Layout | None:
    """The layout of a family that most of a checkpoint's names fit; the stock one when none does.

    Names decide by majority, so that one missing or misnamed tensor does not change the answer.
    """
    if spec.moe is None:
        return None
    counts = [0] * len(spec.moe.layouts)
    tests = [_layout_pattern(layout, spec) for layout in spec.moe.layouts]
    for key in keys:
        for index, test in enumerate(tests):
            counts[index] += bool(test.search(key))
    best = max(counts)
    return spec.moe.stock if best == 0 else spec.moe.layouts[counts.index(best)]


def _layout_pattern(layout: Layout, spec: FamilySpec) -> re.Pattern[str]:
    """Matches the names of the layout's expert tensors."""
    blocks = [layout.block] if layout.block else [stack.mlp for stack in spec.stacks]
    names = [source for rule in layout.rules if rule.target.startswith("bank.") for source in rule.sources]
    return re.compile(rf"(?:{_either(blocks)})\.(?:{_either(names)})$")


def _either(patterns: Iterable[str | None]) -> str:
    escaped = (re.escape(pattern) for pattern in patterns if pattern)
    return "|".join(re.sub(r"\\\{(layer|expert)\\\}", r"\\d+", pattern) for pattern in escaped)


def describe(key: str, spec: FamilySpec | None) -> str:
    """What a checkpoint's tensor is, as far as its name tells: layer, expert, projection."""
    for layout in () if spec is None or spec.moe is None else spec.moe.layouts:
        for rule in layout.rules:
            for source, projection in zip(rule.sources, rule.projections, strict=True):
                test = re.escape(source).replace(r"\{expert\}", r"(?P<expert>\d+)")
                match = re.search(rf"\.(?P<layer>\d+)\..*?{test}$", key)
                if match is not None:
                    expert = match.groupdict().get("expert")
                    return f"layer {match['layer']}, " + (f"expert {expert}, " if expert else "") + projection
    return _plain_name(key)


def _plain_name(key: str) -> str:
    match = re.search(r"\.(\d+)\.(.+)$", key)
    return f"layer {match[1]}, {match[2]}" if match else key


def check(
    wanted: Iterable[Entry],
    source: Headers,
    *,
    where: Mapping[str, str] | None = None,
    optional: frozenset[str] = frozenset(),
    ignored: Sequence[str] = (),
    spec: FamilySpec | None = None,
    name: str = "the checkpoint",
) -> None:
    """Hold a checkpoint against a map: every piece there once with its shape, and nothing else.

    Args:
        wanted: the map. source: names and shapes of the checkpoint.
        where: tensor name to file name, for messages.
        optional: names that may be missing (tied copies). ignored: regular expressions of names that may be there.

    Raises:
        LoadError: a tensor is missing, of another shape, claimed twice or not known; layer, expert, projection and
            file are in the message, and how many more there are.
    """
    present = set(source.keys())
    claimed: set[str] = set()
    missing: list[Piece] = []
    misshapen: list[tuple[Piece, Shape]] = []
    for entry in wanted:
        for piece in entry.pieces:
            if piece.key in claimed:
                raise LoadError(f"{piece.what}: {piece.key} would be read twice; the family's table is wrong")
            claimed.add(piece.key)
            if piece.key not in present:
                if piece.key not in optional:
                    missing.append(piece)
            elif tuple(source.shape(piece.key)) != piece.shape:
                misshapen.append((piece, tuple(source.shape(piece.key))))
    files = where or {}
    if misshapen:
        raise LoadError(_misshapen(misshapen, files, name))
    ignore = re.compile("|".join(ignored)) if ignored else None
    extra = sorted(key for key in present - claimed if ignore is None or not ignore.search(key))
    if missing:
        raise LoadError(_missing(missing, extra, spec, files, name))
    if extra:
        what = describe(extra[0], spec)
        raise LoadError(
            f"{what}: {extra[0]} in {files.get(extra[0], name)} belongs to nothing in the model{_more(len(extra))}; "
            "the config names another architecture, or the tensor was renamed or added by mistake"
        )


def _misshapen(found: list[tuple[Piece, Shape]], files: Mapping[str, str], name: str) -> str:
    piece, has = found[0]
    hint = ""
    if len(has) > 1 and has != piece.shape and (*has[:-2], has[-1], has[-2]) == piece.shape:
        hint = "; it is transposed"
    elif has and piece.shape and has[0] != piece.shape[0] and has[1:] == piece.shape[1:]:
        hint = f"; the config says {piece.shape[0]} rows, the tensor has {has[0]}"
    return (
        f"{piece.what}: {piece.key} in {files.get(piece.key, name)} has shape {list(has)}, "
        f"expected {list(piece.shape)}{hint}{_more(len(found))}"
    )


def _missing(found: list[Piece], extra: list[str], spec: FamilySpec | None, files: Mapping[str, str], name: str) -> str:
    first = found[0]
    message = f"{first.what}: {first.key} is not in {name}{_more(len(found))}"
    if extra:
        other = extra[0]
        message += f"; {other} ({describe(other, spec)}, in {files.get(other, name)}) belongs to nothing in the model"
    return message


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
