"""Steps that several routers share between scoring and weighing."""

import logging
from typing import Literal

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.core.router import topk_indices


def normalise(gate_TK: Tensor, eps: float = 0.0) -> Tensor:
    """Weights divided by their sum over the last axis (plus ``eps``)."""
    return gate_TK / (gate_TK.sum(-1, keepdim=True) + eps)


def keep_best_groups(select_TC: Tensor, num_groups: int, groups_kept: int, score: Literal["max", "top2_sum"]) -> Tensor:
    """Scores with every choice outside the best groups of its token at -inf.

    Groups are runs of C / num_groups neighbours. A group scores its best member (DeepSeek-V2) or the sum of its two
    best (DeepSeek-V3). The mask is -inf, not 0: a selection score may be negative.
    """
    if num_groups == 1 or groups_kept == num_groups:
        return select_TC
    grouped_TGM = select_TC.view(select_TC.shape[0], num_groups, -1)
    if score == "max":
        group_TG = grouped_TGM.amax(-1)
    else:
        group_TG = grouped_TGM.topk(min(2, grouped_TGM.shape[-1]), dim=-1).values.sum(-1)
    closed_TG = torch.ones_like(group_TG, dtype=torch.bool)
    closed_TG.scatter_(1, topk_indices(group_TG, groups_kept), False)
    return grouped_TGM.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).view_as(select_TC)


def check_groups(num_experts: int, top_k: int, num_groups: int, groups_kept: int) -> None:
    """Raise ConfigError unless the experts divide into groups and the kept ones hold top_k experts."""
    if num_experts % num_groups:
        raise ConfigError(f"num_groups={num_groups} does not divide num_experts={num_experts}")
    if not 1 <= groups_kept <= num_groups:
        raise ConfigError(f"groups_kept={groups_kept}; must be between 1 and num_groups={num_groups}")
    if top_k > groups_kept * (num_experts // num_groups):
        raise ConfigError(
            f"top_k={top_k} but {groups_kept} groups of {num_experts // num_groups} hold only "
            f"{groups_kept * (num_experts // num_groups)} experts"
        )


def warn_if_dead(top_k: int, normalised: bool, method: str) -> None:
    """Say that a router with one expert a token and normalised weights learns nothing: its weight is always 1."""
    if top_k == 1 and normalised:
        logging.getLogger("moestro").warning(
            "%s: top_k=1 with weights that sum to 1 gives the router no gradient from the model's loss; "
            "use top_k=2 or weights that are not renormalised",
            method,
        )
