"""Who the T tokens of a forward are: row, position, validity, id."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.core.errors import ContextError


@dataclass(frozen=True, slots=True)
class Tokens:
    """One entry per token of a forward, flattened row by row.

    Attributes:
        row_T: int64, the batch row. position_T: int64, place in the whole sequence (the cache's length counts).
        valid_T: bool, False for padding. ids_T: int64 token ids, None when the stack was given embeddings.
        num_rows: B. width: S of the forward the tokens come from. cached: positions of each row before this forward.
        whole: False for a subset of a forward's tokens.
    """

    row_T: Tensor
    position_T: Tensor
    valid_T: Tensor
    ids_T: Tensor | None
    num_rows: int
    width: int
    cached: int = 0
    whole: bool = True

    @property
    def count(self) -> int:
        """T."""
        return self.row_T.numel()

    def take(self, index_T: Tensor) -> "Tokens":
        """The tokens at ``index_T``, in that order."""
        ids_T = None if self.ids_T is None else self.ids_T[index_T]
        picked = (self.row_T[index_T], self.position_T[index_T], self.valid_T[index_T], ids_T)
        return Tokens(*picked, self.num_rows, self.width, self.cached, whole=False)

    def spread(self, value: Tensor) -> Tensor:
        """A value for the batch [], per row [B'] or per token [B', S] as [T]; B' may divide B (beams of one prompt).

        Raises:
            ContextError: B' does not divide B, or S is shorter than the forward.
        """
        value = value.to(self.row_T.device)
        if value.ndim == 0:
            return value.expand(self.count)
        if value.shape[0] == 0 or self.num_rows % value.shape[0]:
            raise ContextError(f"a tag has {value.shape[0]} rows but the batch has {self.num_rows}")
        row_T = self.row_T // (self.num_rows // value.shape[0])
        if value.ndim == 1:
            return value[row_T]
        if not self.whole:
            raise ContextError(
                "a tag per token cannot be read where only some tokens come by (depth routing); tag rows, or give a "
                "function of token ids"
            )
        if value.shape[1] < self.cached + self.width:
            raise ContextError(
                f"a tag has {value.shape[1]} positions but the forward reaches position {self.cached + self.width}; "
                "tag the tokens to come with a function of their ids"
            )
        column_T = torch.arange(self.count, device=row_T.device) - self.row_T * self.width
        return value[row_T, self.cached + column_T]


def tokens_of_shape(hidden: Tensor) -> Tokens:
    """Tokens of a hidden state [..., S, D] about which nothing else is known: all valid, positions from 0."""
    lead = hidden.shape[:-1]
    width = lead[-1] if len(lead) > 1 else 1
    count = hidden.numel() // max(hidden.shape[-1], 1)
    rows = count // max(width, 1)
    return _grid(rows, width, hidden.device, None, None, None)


def tokens_of_call(call: Mapping[str, Any]) -> Tokens | None:
    """Tokens of a Transformers stack's call from ``input_ids`` or ``inputs_embeds``, mask, positions and cache.

    Args:
        call: argument name to value. A mask [B, L] or [B, 1, S, L] may be longer than S by the cached positions.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        rows, width, device = *ids.shape, ids.device
    elif isinstance(embeds, Tensor) and embeds.ndim == 3:
        rows, width, device = *embeds.shape[:2], embeds.device
    else:
        return None
    ids_T = ids.reshape(-1) if isinstance(ids, Tensor) else None
    cached = _cached(call.get("past_key_values"))
    position = call.get("position_ids")
    if not (isinstance(position, Tensor) and position.shape[-2:] in {(rows, width), (1, width)} and position.ndim == 2):
        position = torch.arange(width, device=device).expand(rows, width) + cached
    valid_BS = _valid(call.get("attention_mask"), rows, width, cached)
    return _grid(rows, width, device, ids_T, position.expand(rows, width).reshape(-1), valid_BS, cached)


def _grid(
    rows: int,
    width: int,
    device: torch.device,
    ids_T: Tensor | None,
    position_T: Tensor | None,
    valid_BS: Tensor | None,
    cached: int = 0,
) -> Tokens:
    row_T = torch.arange(rows, device=device).repeat_interleave(width)
    if position_T is None:
        position_T = torch.arange(width, device=device).repeat(rows)
    if valid_BS is None:
        valid_T = torch.ones(rows * width, dtype=torch.bool, device=device)
    else:
        valid_T = valid_BS.reshape(-1)
    return Tokens(row_T, position_T, valid_T, ids_T, rows, width, cached)


def _cached(cache: Any) -> int:
    """Positions a Transformers cache already holds."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    return int(cache.get_seq_length())


def _valid(mask: Any, rows: int, width: int, cached: int) -> Tensor | None:
    """Which positions of this forward are tokens, bool [B, S], from a 2-D or 4-D attention mask."""
    if isinstance(mask, dict):  # one mask per attention kind; padding is the same in all
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.shape[0] not in (rows, 1):
        return None
    if mask.ndim == 2 and mask.shape[1] >= width:
        begin = min(cached, mask.shape[1] - width)
        return (mask[:, begin : begin + width] != 0).expand(rows, width)
    if mask.ndim == 4 and mask.shape[2] == width and mask.shape[3] >= width:
        return _valid_4d(mask, cached).expand(rows, width)
    return None


def _valid_4d(mask: Tensor, cached: int) -> Tensor:
    """Validity from a mask [B, heads, S, L], boolean or integer (1 = may attend) or additive (0 = may attend).

    L is S + ``cached``; longer for a cache of fixed size, whose rest is empty, shorter for one with a window.

    A token is padding when it may not attend to itself. Left-padded causal masks often open the rows of padding fully
    (attention over nothing would be NaN); such a row sees later keys, which no token of a causal mask does.
    """
    first_BSL = mask[:, 0, :, : cached + mask.shape[2]]
    floating = mask.dtype.is_floating_point
    open_BSL = first_BSL > torch.finfo(mask.dtype).min / 2 if floating else first_BSL != 0
    width, length = open_BSL.shape[1:]
    own_S = torch.arange(length - width, length, device=mask.device)
    self_BS = open_BSL.gather(2, own_S.view(1, width, 1).expand(len(open_BSL), -1, -1)).squeeze(2)
    later_SL = torch.arange(length, device=mask.device) > own_S[:, None]
    sees_later_BS = (open_BSL & later_SL).any(2)
    whole_BS = open_BSL.all(2)
    causal_B = (~sees_later_BS | whole_BS).all(1) & (~whole_BS).any(1)
    return self_BS & ~(whole_BS & sees_later_BS & causal_B[:, None])
