"""A recorded trace as the steps of a serving engine: which experts each layer needs, one step after another."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moestro.core.errors import ConfigError
from moestro.core.expert_cache import Key


Order = Literal["decode", "recorded"]
_COLUMNS = ("sequence", "position", "layer", "expert", "kept", "forward")


@dataclass(frozen=True)
class Steps:
    """Steps in order.

    Attributes:
        keys: of each step the (layer, expert) pairs it needs, each once, in order of expert. tokens: number of the
            token, or group of tokens, that a step belongs to; they grow.
        num_tokens: tokens in all, experts: experts of all layers together.
    """

    keys: list[list[Key]]
    tokens: list[int]
    num_tokens: int
    experts: int

    def split(self, share: float) -> tuple[list[list[Key]], "Steps"]:
        """The steps of the first ``share`` of the tokens, and the rest."""
        groups = self.tokens[-1] + 1
        first = round(share * groups)
        at = int(np.searchsorted(self.tokens, first))
        count = round(self.num_tokens * (groups - first) / groups)
        later = [token - first for token in self.tokens[at:]]
        return self.keys[:at], Steps(self.keys[at:], later, count, self.experts)


def steps_of(trace: Any, order: Order = "decode", batch: int = 1) -> Steps:
    """The steps of a trace; assignments that capacity dropped and null experts need nothing.

    Args:
        order: ``decode`` plays every sequence token by token, through all layers, as generation would; ``recorded``
            keeps the forwards of the recording, whole prompts at once. batch: sequences side by side in ``decode``;
            a step then needs the union of their experts.

    Raises:
        ConfigError: the trace holds no assignment.
    """
    experts = {info.layer: info.num_experts for info in trace.header.layers}
    parts: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for block in trace.scan(_COLUMNS):
        limit = np.asarray([experts[int(layer)] for layer in np.unique(block["layer"])])
        place = np.searchsorted(np.unique(block["layer"]), block["layer"])
        real = block["kept"] & (block["expert"] >= 0) & (block["expert"] < limit[place])
        for name in _COLUMNS:
            parts[name].append(block[name][real])
    rows = {name: np.concatenate(found).astype(np.int64) for name, found in parts.items() if found}
    if not rows or not rows["layer"].size:
        raise ConfigError("the trace holds no assignment of a token to an expert; record one with `moestro trace`")
    if order == "recorded":
        group = rows["forward"]
        tokens = np.stack([rows["forward"], rows["sequence"], rows["position"]], axis=1)
    else:
        # Sequences as far as they go, ``batch`` of them at a time; positions from 0 whatever their first one was.
        first = np.full(int(rows["sequence"].max()) + 1, 1 << 40, dtype=np.int64)
        np.minimum.at(first, rows["sequence"], rows["position"])
        place = rows["position"] - first[rows["sequence"]]
        group = rows["sequence"] // batch * (int(place.max()) + 1) + place
        tokens = np.stack([rows["sequence"], rows["position"]], axis=1)
    # Layers in the order in which the first forward met them: encoders before decoders.
    _, seen = np.unique(rows["layer"], return_index=True)
    rank = np.argsort(np.argsort(seen)) if order == "recorded" else np.arange(seen.size)
    layer_rank = rank[np.searchsorted(np.unique(rows["layer"]), rows["layer"])]
    table = np.unique(np.stack([group, layer_rank, rows["layer"], rows["expert"]], axis=1), axis=0)
    starts = np.flatnonzero(np.any(np.diff(table[:, :2], axis=0) != 0, axis=1)) + 1
    bounds = [0, *starts.tolist(), len(table)]
    pairs = list(map(tuple, table[:, 2:].tolist()))
    keys = [pairs[a:b] for a, b in itertools.pairwise(bounds)]
    _, dense = np.unique(table[bounds[:-1], 0], return_inverse=True)
    return Steps(keys, dense.tolist(), len(np.unique(tokens, axis=0)), sum(experts.values()))
