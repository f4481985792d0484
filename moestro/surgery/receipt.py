"""What a receipt says of surgery: layer by layer what changed, and how far the answers moved."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moestro.core.plan import ExpertPlan
from moestro.core.session import session
from moestro.surgery.check import Work
from moestro.surgery.fill import unused
from moestro.surgery.parity import AllOn, answers, difference


Calib = Sequence[Mapping[str, Any] | Tensor]


def describe(work: Work) -> dict[str, Any]:
    """One layer: experts and inner width before and after, where router rows come from, old experts left out."""
    shape = work.place.shape
    donors = {source.donor for sources in work.entry.experts for source in sources}
    return {
        "layer": work.entry.layer,
        "site": shape.site,
        "experts_before": shape.num_experts,
        "experts_after": len(work.entry.experts),
        "inner_before": shape.inner,
        "inner_after": work.inner,
        "router": work.entry.router,
        "module": work.use.method,
        "unused": unused(work),
        "donors": sorted(donors - {"self"}),
    }


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once, with or without storage."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)


def parity(
    model: nn.Module, plan: ExpertPlan, sites: Sequence[str], calib: Calib, before: list[Tensor]
) -> dict[str, Any]:
    """Differences of the logits, as routed and, where the plan says what it takes, with all experts on."""
    found: dict[str, Any] = {"as_routed": difference(before, answers(model, calib))}
    weight = plan.notes.get("all_on_weight")
    if weight is not None:
        with session(edits=[AllOn(sites, float(weight))], collect=False):
            found["all_on"] = difference(before, answers(model, calib))
    return found
