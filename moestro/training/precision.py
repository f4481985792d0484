"""float32 or bfloat16: decided by measuring this machine, not by the checkpoint's type.

bfloat16 products run at a hundredth of float32's speed on processors without units for them. Weights, optimiser and
routers stay in float32 either way; bfloat16 means autocast around the forward.
"""

import time
from typing import Literal

import torch


GAIN = 1.2  # bfloat16 must be this much faster to be worth its rounding
SHAPE = (128, 256, 256)


def choose_dtype(asked: Literal["auto", "float32", "bfloat16"]) -> tuple[torch.dtype, str]:
    """The compute type and a line that says why."""
    if asked != "auto":
        return getattr(torch, asked), f"compute type {asked}, as the recipe says"
    full = matmul_seconds(torch.float32)
    half = matmul_seconds(torch.bfloat16)
    chosen = torch.bfloat16 if half * GAIN < full else torch.float32
    name = str(chosen).removeprefix("torch.")
    return chosen, f"compute type {name}: a bfloat16 product takes {half / full:.2g} times as long as float32 here"


def matmul_seconds(dtype: torch.dtype, repeats: int = 5) -> float:
    """Least processor time in seconds of a matrix product of type ``dtype`` on one thread, warmed up once.

    Processor time of one thread, not time on the wall: on a busy machine the latter says how long threads waited for
    each other, and has chosen the type that is a hundred times slower.
    """
    rows, inner, columns = SHAPE
    a = torch.ones(rows, inner, dtype=dtype)
    b = torch.ones(inner, columns, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(repeats + 1):
            start = time.thread_time()
            torch.mm(a, b)
            best = min(best, time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best
