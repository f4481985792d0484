"""A recorded trace as the rows of a serving engine: which tokens run together, and where each is routed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError
from moestro.core.expert_cache import Key
from moestro.core.forecast import Recorded
from moestro.methods.simulate._parts.steps import Order


_TOKENS = ("sequence", "position", "token")
_NAMES = {"peek": "peek.L.M of [T, E]", "routes": "routes.L of [T, k]"}
_COLUMNS = ("sequence", "position", "token_id", "layer", "rank", "expert", "kept", "forward")
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows in the order in which they run.

    Attributes:
        recorded: tokens, routes and peeks. starts: index of the first row of every step, and the number of rows.
    """

    recorded: Recorded
    starts: Index

    @property
    def layers(self) -> list[int]:
        """Layers with experts."""
        return sorted(self.recorded.routes)

    def steps(self) -> Iterator[slice]:
        """Rows of each step."""
        for first, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            yield slice(first, end)

    def needs(self) -> list[list[Key]]:
        """What every layer of every step needs."""
        return [
            [(layer, expert) for expert in self.experts(rows, layer)] for rows in self.steps() for layer in self.layers
        ]

    def experts(self, rows: slice, layer: int) -> list[int]:
        """What a layer needs for some rows, ascending."""
        ids = np.unique(self.recorded.routes[layer][rows])
        found: list[int] = ids[ids >= 0].tolist()
        return found

    def split(self, share: float) -> tuple["Rows", "Rows"]:
        """The first ``share`` of the steps, and the rest."""
        at = round(share * (len(self.starts) - 1))
        first = int(self.starts[at])
        return (
            Rows(_part(self.recorded, slice(0, first)), self.starts[: at + 1]),
            Rows(_part(self.recorded, slice(first, None)), self.starts[at:] - first),
        )


def _part(whole: Recorded, rows: Any) -> Recorded:
    return replace(
        whole,
        tokens=whole.tokens[rows],
        positions=whole.positions[rows],
        sequences=whole.sequences[rows],
        routes={layer: ids[rows] for layer, ids in whole.routes.items()},
        peeks={pair: scores[rows] for pair, scores in whole.peeks.items()},
    )


def rows_of(trace: Any, order: Order = "decode", batch: int = 1, peeks: str | Path | None = None) -> Rows:
    """The rows of a trace; assignments that capacity dropped and null experts are left out.

    Args:
        order, batch: see ``steps_of``. peeks: file with what later gates say, see ``read_peeks``.

    Raises:
        ConfigError: the trace holds no assignment, or the peeks are of another one.
    """
    found: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for block in trace.scan(_COLUMNS):
        for name in _COLUMNS:
            found[name].append(block[name])
    columns = {name: np.concatenate(parts).astype(np.int64) for name, parts in found.items() if parts}
    if not columns or not columns["layer"].size:
        raise ConfigError("the trace holds no assignment of a token to an expert; record one with `moestro trace`")
    sequence, position = columns["sequence"], columns["position"]
    if order == "recorded":
        group = columns["forward"]
    else:
        first = np.full(int(sequence.max()) + 1, 1 << 40, dtype=np.int64)
        np.minimum.at(first, sequence, position)
        place = position - first[sequence]
        group = sequence // batch * (int(place.max()) + 1) + place
    token = np.stack([group, sequence, position, columns["token_id"]], axis=1)
    tokens, row = np.unique(token, axis=0, return_inverse=True)
    recorded = Recorded(
        tokens=tokens[:, 3].astype(np.int32),
        positions=tokens[:, 2].astype(np.int32),
        sequences=tokens[:, 1].astype(np.int32),
        routes=_routes(trace, columns, row.ravel(), len(tokens)),
        experts=_experts(trace),
    )
    if not any((ids >= 0).any() for ids in recorded.routes.values()):
        raise ConfigError("the trace holds no assignment of a token to an expert; record one with `moestro trace`")
    if peeks is not None:
        recorded = replace(recorded, peeks=read_peeks(Path(peeks), recorded))
    starts = np.flatnonzero(np.diff(tokens[:, 0], prepend=-1))
    return Rows(recorded, np.append(starts, len(tokens)))


def _experts(trace: Any) -> tuple[int, ...]:
    counts = {info.layer: info.num_experts for info in trace.header.layers}
    return tuple(counts.get(layer, 0) for layer in range(max(counts) + 1))


def _routes(trace: Any, columns: dict[str, Index], row: Index, count: int) -> dict[int, npt.NDArray[np.int32]]:
    routes = {}
    for info in trace.header.layers:
        here = columns["layer"] == info.layer
        real = here & (columns["kept"] > 0) & (columns["expert"] >= 0) & (columns["expert"] < info.num_experts)
        width = int(columns["rank"][here].max(initial=0)) + 1
        ids = np.full((count, max(width, 1)), -1, dtype=np.int32)
        ids[row[real], columns["rank"][real]] = columns["expert"][real]
        routes[info.layer] = ids
    return routes


def read_peeks(path: Path, trace: Recorded) -> dict[tuple[int, int], npt.NDArray[np.float32]]:
    """What gates of later layers said, from an ``.npz``: ``sequence``, ``position`` and ``token`` [T], for each layer
    ``routes.L`` int [T, k], the experts that ran (-1: none), and for pairs of layers ``peek.L.M`` float32 [T, E], the
    gate of layer M on the input of layer L; tokens in any order.

    Args:
        trace: the tokens that are asked for, and where they went.

    Raises:
        ConfigError: no such file, arrays that do not fit, tokens that the file does not hold, or another model's: fewer
            of a layer's experts are those of the trace than lie halfway between chance and all.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ConfigError(f"{path}: no file of recorded peeks: {error}") from None
    if not set(_TOKENS) <= arrays.keys():
        raise ConfigError(f"{path}: arrays {', '.join(_TOKENS)} are missing; it has {', '.join(arrays) or 'none'}")
    if len({arrays[name].shape for name in _TOKENS}) > 1 or arrays["token"].ndim != 1:
        raise ConfigError(f"{path}: sequence, position and token are not three lists of one length")
    untold = [layer for layer in sorted(trace.routes) if f"routes.{layer}" not in arrays]
    if untold:
        raise ConfigError(f"{path}: routes.{untold[0]} is missing, so nothing tells whether it is the trace's model")
    whole = len(arrays["token"])
    at = {key: index for index, key in enumerate(zip(*(arrays[name].tolist() for name in _TOKENS), strict=True))}
    asked = zip(trace.sequences.tolist(), trace.positions.tolist(), trace.tokens.tolist(), strict=True)
    order = []
    for sequence, position, token in asked:
        if (sequence, position, token) not in at:
            raise ConfigError(
                f"{path}: nothing of sequence {sequence} position {position} token {token}; it belongs to another trace"
            )
        order.append(at[sequence, position, token])
    found = {}
    for name, values in arrays.items():
        kind, *layers = name.split(".")
        if kind not in ("peek", "routes"):
            continue
        if not all(map(str.isdigit, layers)) or len(layers) != 1 + (kind == "peek") or values.ndim != 2:
            raise ConfigError(f"{path}: {name} of shape {values.shape} is no {_NAMES[kind]}")
        numbers = tuple(map(int, layers))
        experts = [trace.experts[layer] if layer < len(trace.experts) else 0 for layer in numbers]
        width = experts[-1] if kind == "peek" else values.shape[1]
        if not all(experts) or values.shape != (whole, width):
            raise ConfigError(
                f"{path}: {name} of shape {values.shape} is no {_NAMES[kind]} of this trace, whose layers "
                f"{' and '.join(layers)} have {' and '.join(map(str, experts))} experts"
            )
        if kind == "peek":
            found[numbers[0], numbers[1]] = values[order].astype(np.float32)
        else:
            _check_routes(f"{path}: {name}", values[order], trace.routes[numbers[0]], experts[0])
    return found


def _check_routes(name: str, theirs: npt.NDArray[Any], ours: npt.NDArray[np.int32], experts: int) -> None:
    """Raise ConfigError for routes [T, k] that agree with a trace's hardly more than by chance."""
    chosen = np.zeros((2, len(ours), experts + 1), dtype=bool)
    for used, ids in zip(chosen, (theirs, ours), strict=True):
        if ids.max(initial=-1) >= experts:
            raise ConfigError(f"{name} holds expert {ids.max()}, but the layer has {experts}")
        np.put_along_axis(used, np.where(ids < 0, experts, ids).astype(np.int64), True, axis=1)
    theirs_used, ours_used = chosen[:, :, :experts]
    alike = (theirs_used & ours_used).sum() / max(ours_used.sum(), 1)
    chance = theirs_used.sum() / theirs_used.size
    if alike < (1 + chance) / 2:
        raise ConfigError(
            f"{name}: {alike:.0%} of the trace's experts are among them, chance alone makes it {chance:.0%}; it was "
            "recorded with another model"
        )
