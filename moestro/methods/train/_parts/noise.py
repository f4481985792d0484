"""Noise that routers add to their logits."""

import torch
from torch import Tensor


def gumbel_like(logits_TC: Tensor) -> Tensor:
    """Independent draws from Gumbel(0, 1), -log E for E ~ Exp(1), of the same shape and type; always finite.

    argmax(z + draws) is a sample from softmax(z). Draws come from PyTorch's global generator and carry no gradient.
    """
    draw_TC = torch.empty_like(logits_TC, requires_grad=False).exponential_()
    return draw_TC.clamp_(min=torch.finfo(draw_TC.dtype).tiny).log_().neg_()
