"""Whom a token counts for: calibration that reaches experts which the router seldom chooses.

    natural   the experts that run
    raised    the experts that would run if each token chose a given, larger number: the best by the selection scores,
              weighted as the router weighs so many
    all       every expert, weighted as if all were chosen

Only what is counted changes: the model runs on the natural choice, and later layers see its outputs.
"""

from typing import Final, Literal, get_args

import torch

from moestro.core.errors import ConfigError
from moestro.core.router import Router, topk_indices
from moestro.core.routing import Routing


Policy = Literal["natural", "raised", "all"]
POLICIES: Final[tuple[str, ...]] = get_args(Policy)


def check_policy(site: str, router: Router, policy: Policy, raise_to: int | None) -> None:
    """Raise ConfigError unless the policy can work with a layer's router; numbers are in the message."""
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r}; must be one of {', '.join(POLICIES)}")
    if (policy == "raised") != (raise_to is not None):
        has = "no raise_to" if raise_to is None else f"raise_to={raise_to}"
        raise ConfigError(f"policy={policy} with {has}; raise_to goes with policy=raised, which needs it")
    if raise_to is None:
        return
    if raise_to > router.num_choices:
        raise ConfigError(f"{site}: raise_to={raise_to}, but its router has {router.num_choices} choices")
    if router.top_k is not None and raise_to < router.top_k:
        raise ConfigError(f"{site}: raise_to={raise_to}, but its router chooses {router.top_k} anyway; give more")


def counted(site: str, router: Router, routing: Routing, policy: Policy, raise_to: int | None) -> Routing:
    """The assignments that statistics count: those that run, and what the policy adds.

    Choices that the router closed to a token (groups that were not kept) are not raised to; ``all`` counts them too.

    Raises:
        ConfigError: the router gives no scores to rank the others by.
    """
    real = routing.real()
    if policy == "natural":
        return real
    scores = routing.scores
    if scores is None:
        raise ConfigError(f"{site}: its router gives no scores, so nothing ranks other experts; use policy=natural")
    if policy == "all":
        shape = (routing.num_tokens, routing.num_experts)
        expert_TK = torch.arange(routing.num_experts, device=routing.expert_N.device).expand(shape)
    else:
        assert raise_to is not None
        open_T = (scores.select_TC > float("-inf")).sum(-1)
        most = int(open_T.min()) if len(open_T) else raise_to
        expert_TK = topk_indices(scores.select_TC, min(raise_to, most))
    weight_TK = router.weigh(scores.gate_TC.gather(1, expert_TK))
    more = Routing.from_topk(
        expert_TK, weight_TK, num_experts=routing.num_experts, num_null=routing.num_null, scores=scores
    ).replace(top_k=None)
    # A choice that no rank explains (noise, a threshold, experts that pick tokens) counts as it runs.
    known_TC = torch.zeros_like(scores.gate_TC, dtype=torch.bool).scatter_(1, expert_TK, True)
    apart_N = ~known_TC[real.token_N, real.expert_N]
    live_N = more.expert_N < routing.num_experts
    return more.replace(
        token_N=torch.cat([more.token_N[live_N], real.token_N[apart_N]]),
        expert_N=torch.cat([more.expert_N[live_N], real.expert_N[apart_N]]),
        weight_N=torch.cat([more.weight_N[live_N], real.weight_N[apart_N].to(more.weight_N.dtype)]),
        num_null=0,
    )
