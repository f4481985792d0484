"""What a receipt says of packing: bytes by class before and after, bits a weight, choices that changed, parity."""

import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any

from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.ledger import Ledger
from moestro.core.packed import PackedFFN
from moestro.core.plan import BitPlan
from moestro.models.save import unsaved
from moestro.surgery.bits import BLOCK, COARSE, BitWork
from moestro.surgery.parity import Choices, difference
from moestro.surgery.receipt import Calib, count_parameters


CHANGED_LIMIT = 0.02
"""Share of changed choices from which on a receipt warns."""

PARITY_TOKENS = 1024
"""Calibration tokens on which the model is compared before and after."""

CLASSES = (
    ("norm", re.compile(r"norm|(^|\.)ln_|layer_norm", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|(^|\.)shared\.weight$|wte|wpe", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|(^|\.)(q|k|v|o)_proj\.", re.IGNORECASE)),
    ("head", re.compile(r"^(lm_head|score|qa_outputs|classifier|cls)\b")),
)


def class_of(name: str, sites: Mapping[str, str]) -> str:
    """One of experts, router, shared, norm, embedding, attention, head, other.

    Args:
        sites: prefix of a mixture's part -> its class.
    """
    for start, what in sites.items():
        if name.startswith(start):
            return what
    return next((what for what, pattern in CLASSES if pattern.search(name)), "other")


def bytes_by_class(model: nn.Module) -> dict[str, int]:
    """Bytes of what a saved model holds, by class; with or without storage."""
    parts: dict[str, str] = {}
    for path in (path for path, module in model.named_modules() if isinstance(module, MoELayer)):
        parts |= {f"{path}.bank.": "experts", f"{path}.router.": "router", f"{path}.": "shared"}
    left_out = unsaved(model)
    found: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        if name not in left_out:
            what = class_of(name, parts)
            found[what] = found.get(what, 0) + tensor.numel() * tensor.element_size()
    return dict(sorted(found.items()))


def expert_weights(model: nn.Module, kinds: type | UnionType = StackedFFN | PackedFFN) -> int:
    """Weights of all matrices of experts in banks of some kinds."""
    banks = [layer.bank for layer in mixture_layers(model).values() if isinstance(layer.bank, kinds)]
    return sum(bank.flops_per_row(expert) // 2 for bank in banks for expert in range(bank.num_experts))


def describe(work: BitWork) -> dict[str, Any]:
    """One packed layer: matrices by packing, bytes, experts that calibration did not reach."""
    counts: dict[str, dict[str, int]] = {}
    for name, used in work.planned.items():
        for one in used:
            counts.setdefault(name, {})[str(one)] = counts.get(name, {}).get(str(one), 0) + 1
    shape = work.place.shape
    return {
        "layer": work.layer,
        "site": shape.site,
        "experts_before": shape.num_experts,
        "experts_after": shape.num_experts,
        "matrices": counts,
        "starved": work.starved,
    }


def receipt_of(
    model: nn.Module, plan: BitPlan, works: Sequence[BitWork], ledger: Ledger, before: Mapping[str, int], count: int
) -> dict[str, Any]:
    """The receipt without parity.

    Args:
        before: bytes by class of the model as it was. count: its parameters; a packed weight is one still.
    """
    after = bytes_by_class(model)
    weights = expert_weights(model)
    return {
        "method": plan.method,
        "config": plan.config,
        "seed": plan.seed,
        "rounding": None if plan.rounding is None else plan.rounding.model_dump(mode="json"),
        "ledger": ledger.close(),
        "layers": [describe(work) for work in works],
        "wide": plan.wide,
        "bytes": {
            what: {"before": before.get(what, 0), "after": after.get(what, 0)} for what in sorted({*before, *after})
        },
        "expert_weights": weights,
        "bits_per_weight": {
            "before": 8 * before.get("experts", 0) / weights,
            "after": 8 * after.get("experts", 0) / weights,
        },
        "parameters": {"before": count, "after": count_parameters(model) + expert_weights(model, PackedFFN)},
        "notes": plan.notes,
        "warnings": [*_starved(works), *_coarse(works)],
        "parity": None,
    }


def _starved(works: Sequence[BitWork]) -> list[str]:
    places = [f"{work.layer}/{expert}" for work in works for expert in work.starved]
    if not places:
        return []
    shown = ", ".join(places[:12]) + (", ..." if len(places) > 12 else "")
    return [f"{len(places)} experts saw no calibration token and were rounded to the nearest: {shown}"]


def _coarse(works: Sequence[BitWork]) -> list[str]:
    places = [f"{work.layer}/{name}" for work in works for name in work.coarse]
    if not places:
        return []
    shown = ", ".join(places[:12]) + (", ..." if len(places) > 12 else "")
    return [
        f"the weights of {shown} have been in 4 bits or fewer before ({COARSE} values at most in a block of {BLOCK}); "
        "packing them again adds an error to that of the first time, start from the float checkpoint"
    ]


def compared(calib: Calib) -> list[Mapping[str, Any] | Tensor]:
    """The first batches, ``PARITY_TOKENS`` in all or a little more: their logits are kept."""
    some: list[Mapping[str, Any] | Tensor] = []
    tokens = 0
    for batch in calib:
        if tokens >= PARITY_TOKENS:
            break
        some.append(batch)
        call = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        tokens += max((v.numel() for k, v in call.items() if k.endswith("ids")), default=PARITY_TOKENS)
    return some


def add_parity(
    receipt: dict[str, Any], before: tuple[list[Tensor], Choices], after: tuple[list[Tensor], Choices]
) -> None:
    """Figures of the logits and of changed choices; a warning above the limit."""
    changed = before[1].changed(after[1])
    receipt["parity"] = {"as_routed": difference(before[0], after[0])}
    receipt["changed_choices"] = {"limit": CHANGED_LIMIT, "by_site": changed}
    worst = max(changed, key=lambda site: changed[site])
    share = sum(changed.values()) / len(changed)
    receipt["changed_choices"]["mean"] = share
    if changed[worst] > CHANGED_LIMIT:
        receipt["warnings"].append(
            f"{changed[worst]:.1%} of the choices at {worst} are others than before ({share:.1%} over all mixtures), "
            f"above the limit of {CHANGED_LIMIT:.0%}"
        )
