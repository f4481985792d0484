"""From token ids to training examples of one length.

*Packing* (for causal models): documents, each closed by a separator token, are laid end to end and the stream is cut
into sequences of S tokens; the remainder under S tokens at the very end is left out. Nothing is learned across a
document's edge: ``position_ids`` restart at 0 where a document (or the sequence) starts, and the label of the first
token of a document is -100, since what stands before it belongs to another text. Transformers' attention masks see
the restarts and keep the documents of a sequence apart; a plain ``nn.Module`` may use ``position_ids`` the same way.

*Chunking* (for encoders): each document is cut by itself into pieces of at most S tokens; batches are padded and carry
an attention mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moestro.core.errors import DataError


IGNORE = -100  # a label that is no target, as everywhere in Transformers


@dataclass(frozen=True)
class Packed:
    """Sequences of one length, S tokens each.

    Attributes:
        ids_NS: token ids, int32.
        starts_NS: True where a document or the sequence begins.
    """

    ids_NS: NDArray[np.int32]
    starts_NS: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids_NS)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.generic]]:
        return {"input_ids": self.ids_NS[index], "starts": self.starts_NS[index]}

    @property
    def num_tokens(self) -> int:
        return int(self.ids_NS.size)


def pack(documents: Sequence[Sequence[int]], length: int, separator: int) -> Packed:
    """Lay documents end to end, each followed by ``separator``, and cut the stream into sequences of ``length``.

    Raises:
        DataError: fewer than ``length`` tokens in all.
    """
    kept = [document for document in documents if len(document)]
    total = sum(len(document) + 1 for document in kept)
    if total < length:
        raise DataError(f"the data hold {total} tokens, fewer than one sequence of sequence_length={length}")
    stream = np.empty(total, dtype=np.int32)
    starts = np.zeros(total, dtype=np.bool_)
    at = 0
    for document in kept:
        starts[at] = True
        stream[at : at + len(document)] = document
        stream[at + len(document)] = separator
        at += len(document) + 1
    rows = total // length
    starts_NS = starts[: rows * length].reshape(rows, length)
    starts_NS[:, 0] = True
    return Packed(stream[: rows * length].reshape(rows, length), starts_NS)


def chunk(documents: Sequence[Sequence[int]], length: int) -> list[dict[str, NDArray[np.int32]]]:
    """Cut each document by itself into pieces of at most ``length`` tokens; pieces of one token are left out.

    Raises:
        DataError: no piece of two tokens or more.
    """
    pieces = [
        {"input_ids": np.asarray(document[at : at + length], dtype=np.int32)}
        for document in documents
        for at in range(0, len(document), length)
        if len(document) - at >= 2
    ]
    if not pieces:
        raise DataError("the data hold no document of two tokens or more")
    return pieces


def positions(starts_BS: torch.Tensor) -> torch.Tensor:
    """Position of each token within its document, [B, S] int64, from the marks of document starts, [B, S] bool."""
    index_S = torch.arange(starts_BS.shape[1], device=starts_BS.device)
    start_BS = torch.where(starts_BS, index_S, 0).cummax(dim=1).values
    return index_S - start_BS


def packed_labels(ids_BS: torch.Tensor, starts_BS: torch.Tensor) -> torch.Tensor:
    """Labels aligned with the inputs, [B, S] int64: the ids, with -100 where a document starts."""
    return ids_BS.masked_fill(starts_BS, IGNORE)


def pad(rows: Sequence[ArrayLike], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right to the longest, [B, S] int64, and the mask of what is real, [B, S] int64."""
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    width = max(len(row) for row in arrays)
    ids_BS = torch.full((len(rows), width), value, dtype=torch.int64)
    mask_BS = torch.zeros((len(rows), width), dtype=torch.int64)
    for number, row in enumerate(arrays):
        ids_BS[number, : len(row)] = torch.from_numpy(row)
        mask_BS[number, : len(row)] = 1
    return ids_BS, mask_BS


def split_documents(ids_S: Sequence[int], starts_S: Sequence[bool]) -> Iterator[list[int]]:
    """The documents (or pieces of documents) of one packed sequence, in order."""
    piece: list[int] = []
    for token, start in zip(ids_S, starts_S, strict=True):
        if start and piece:
            yield piece
            piece = []
        piece.append(int(token))
    yield piece
