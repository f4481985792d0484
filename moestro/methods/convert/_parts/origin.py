"""Whether models grew out of one initialisation: only then do their units correspond and do means make sense."""

import math

import torch.nn.functional as F
from torch import Tensor


RELATED = 0.05
"""Cosine between matrices of two models above which they count as of one origin."""


def related(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices [out, in] of the same place grew out of one initialisation.

    Their cosine is above 0.05, and above six standard deviations of what independent draws give, 6 / sqrt(n).
    """
    if first.shape != second.shape:
        return False
    cosine = F.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0)
    return float(cosine) > max(RELATED, 6.0 / math.sqrt(first.numel()))
