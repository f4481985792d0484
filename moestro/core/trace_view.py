"""Sequences of a trace as tensors: for display, and as training data for predictors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.trace_format import NO_EXPERT, LayerInfo


Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Some sequences side by side, padded on the right.

    Attributes:
        sequence_B: int64, numbers in the trace. valid_BS: bool, False for padding.
        position_BS, token_BS: int64, -1 for padding. tags: for each row its tokens' labels.
        expert: layer -> int64 [B, S, K] in rank order, -1 where a token has fewer. weight: layer -> float32 [B, S, K].
        kept: layer -> bool [B, S, K], False also where there is no assignment.
    """

    sequence_B: Tensor
    valid_BS: Tensor
    position_BS: Tensor
    token_BS: Tensor
    tags: list[list[str]]
    expert: dict[int, Tensor]
    weight: dict[int, Tensor]
    kept: dict[int, Tensor]


def assemble(
    rows: Mapping[str, Array], sequences: Sequence[int], layers: Sequence[LayerInfo], tags: Sequence[str]
) -> SequenceBatch:
    """Rows of some sequences (columns as ``RoutingTrace.rows`` gives them) as one batch.

    A token is a (sequence, position, forward); tokens stand in the order of their positions. K is the largest count of
    the layer among these rows.
    """
    row_of = {sequence: row for row, sequence in enumerate(sequences)}
    row_N = np.asarray([row_of[int(item)] for item in rows["sequence"]], dtype=np.int64)
    key_N3 = np.stack([row_N, rows["position"].astype(np.int64), rows["forward"].astype(np.int64)], axis=1)
    key_T3, first_T, token_N = np.unique(key_N3, axis=0, return_index=True, return_inverse=True)
    token_N = token_N.reshape(-1)
    row_T = key_T3[:, 0]
    start_B = np.searchsorted(row_T, np.arange(len(sequences)))
    column_T = np.arange(len(row_T)) - start_B[row_T]
    width = int(column_T.max()) + 1 if len(row_T) else 0
    shape = (len(sequences), width)
    cell_T = row_T * width + column_T

    def spread(values: Array) -> Tensor:
        out = np.full(shape[0] * shape[1], -1, dtype=np.int64)
        out[cell_T] = values
        return torch.from_numpy(out.reshape(shape))

    tag_BS = spread(rows["tag"][first_T])
    expert: dict[int, Tensor] = {}
    weight: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    for info in layers:
        mine_N = (rows["layer"] == info.layer) & (rows["rank"] != NO_EXPERT)
        rank_M = rows["rank"][mine_N].astype(np.int64)
        slots = int(rank_M.max()) + 1 if rank_M.size else info.top_k or 1
        place_M = cell_T[token_N[mine_N]] * slots + rank_M
        size = shape[0] * width * slots
        for store, column, empty, kind in (
            (expert, "expert", NO_EXPERT, np.int64),
            (weight, "weight", 0, np.float32),
            (kept, "kept", False, np.bool_),
        ):
            out = np.full(size, empty, dtype=kind)
            out[place_M] = rows[column][mine_N]
            store[info.layer] = torch.from_numpy(out.reshape(*shape, slots))
    return SequenceBatch(
        sequence_B=torch.tensor(list(sequences), dtype=torch.int64),
        valid_BS=tag_BS >= 0,
        position_BS=spread(key_T3[:, 1]),
        token_BS=spread(rows["token_id"][first_T]),
        tags=[[tags[item] for item in row if item >= 0] for row in tag_BS.tolist()],
        expert=expert,
        weight=weight,
        kept=kept,
    )
