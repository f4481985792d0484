"""Counting the operations of what runs, products that add up in place among them, which torch's counter leaves out."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def operation_counter() -> FlopCounterMode:
    """A context; inside it floating point operations of matrix products are counted, see ``get_total_flops``."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={aten.addmm_: _product, aten.baddbmm_: _product})


def _product(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Two operations for each number of ``left`` [..., N, K] and each column of ``right`` [..., K, M]."""
    return 2 * left.numel() * right[-1]
