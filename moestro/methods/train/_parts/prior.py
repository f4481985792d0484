"""Labels and losses by which a dense feed-forward teaches a router over its slices, and the fit of one router.

Formulas: ``train.prior_approximate``.
"""

from typing import Literal

import torch
from torch import Tensor

from moestro.core.bank import Bank
from moestro.core.errors import DataError
from moestro.core.router import exact_linear, topk_indices
from moestro.core.routing import Routing


Target = Literal["softmax-mask", "uniform"]
Direction = Literal["router||label", "label||router"]
CLIP = 1e-7


@torch.no_grad()
def slice_errors(bank: Bank, x_TD: Tensor, target_TO: Tensor) -> Tensor:
    """Mean squared distance of each slice's output from a target [T, O], float32 [T, E]; one slice at a time."""
    weight_T1 = torch.ones(len(x_TD), 1, device=x_TD.device, dtype=torch.float32)
    found = []
    for expert in range(bank.num_experts):
        here_T1 = torch.full((len(x_TD), 1), expert, dtype=torch.int64, device=x_TD.device)
        y_TO = bank(x_TD, Routing.from_topk(here_T1, weight_T1, num_experts=bank.num_experts))
        found.append((y_TO.float() - target_TO.float()).square().mean(-1))
    return torch.stack(found, 1)


def labels_of_errors(error_TE: Tensor, top_k: int) -> Tensor:
    """Pseudo-labels [T, E] in float32: 1 for the ``top_k`` smallest errors of a token, ties to the lower slice."""
    return torch.zeros_like(error_TE, dtype=torch.float32).scatter_(1, topk_indices(-error_TE, top_k), 1.0)


def pa_pseudo_labels(outputs_TED: Tensor, dense_TD: Tensor, top_k: int, output_scale: float) -> Tensor:
    """Labels [T, E] of 0 and 1, K ones a token, from the slices' outputs and the dense layer's."""
    error_TE = (outputs_TED.float() - dense_TD.float()[:, None] / output_scale).square().mean(-1)
    return labels_of_errors(error_TE, top_k)


def prior_approximate_loss(
    logits_TE: Tensor,
    labels_TE: Tensor,
    *,
    target: Target = "softmax-mask",
    direction: Direction = "router||label",
) -> Tensor:
    """Divergence between router and labels, summed over tokens, in nats.

    Args:
        logits_TE: raw, float32. labels_TE: of 0 and 1, a token's with at least one 1.
    """
    q_TE = labels_TE.softmax(-1) if target == "softmax-mask" else labels_TE / labels_TE.sum(-1, keepdim=True)
    q_TE = q_TE.clamp(CLIP, 1 - CLIP)
    p_TE = logits_TE.float().softmax(-1).clamp(CLIP, 1 - CLIP)
    first, second = (p_TE, q_TE) if direction == "router||label" else (q_TE, p_TE)
    return (first * (first.log() - second.log())).sum()


def balance(logits_TE: Tensor, top_k: int) -> Tensor:
    """The balance term as released, summed over tokens: what the K likeliest slices get, over E.

    The released code ranks by a second softmax of the probabilities, which ranks alike.
    """
    p_TE = logits_TE.float().softmax(-1)
    mask_TE = torch.zeros_like(p_TE).scatter_(1, topk_indices(p_TE.detach(), top_k), 1.0)
    return (mask_TE * p_TE).mean(-1).sum()


def fit_linear_router(
    weight_ED: Tensor,
    bias_E: Tensor,
    x_TD: Tensor,
    labels_TE: Tensor,
    *,
    epochs: int,
    lr: float,
    rows: int,
    seed: int,
    target: Target = "softmax-mask",
    direction: Direction = "router||label",
) -> tuple[Tensor, Tensor, list[float]]:
    """A linear router fitted to labels by Adam; nothing but the two tensors it begins with is in the graph.

    Args:
        weight_ED, bias_E: where it starts; they stay as they are. rows: tokens a step; ``seed`` draws their order.

    Returns:
        Weight and bias in float32, and the mean loss of each epoch's steps in nats a token.

    Raises:
        DataError: no tokens.
    """
    if not len(x_TD):
        raise DataError("no tokens to fit a router on; give batches with at least one token that is not padding")
    weight = weight_ED.detach().float().clone().requires_grad_()
    bias = bias_E.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    draw = torch.Generator().manual_seed(seed)
    means = []
    with torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for place in torch.split(torch.randperm(len(x_TD), generator=draw), rows):
                logits = exact_linear(x_TD[place].detach(), weight, bias)
                loss = prior_approximate_loss(logits, labels_TE[place], target=target, direction=direction)
                optimizer.zero_grad()
                torch.autograd.backward(loss / len(place))
                optimizer.step()
                total += float(loss.detach())
            means.append(total / len(x_TD))
    return weight.detach(), bias.detach(), means


def least_squares_scale(chosen_TO: Tensor, dense_TO: Tensor) -> float:
    """The s that minimises |dense - s chosen|^2: <dense, chosen> / <chosen, chosen>; 0 where nothing was chosen."""
    chosen = chosen_TO.double()
    power = float((chosen * chosen).sum())
    return float((dense_TO.double() * chosen).sum()) / power if power > 0 else 0.0
