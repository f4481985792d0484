"""Calibration: statistics of a model's experts on data, and whether the data reached them.

    found = observe.calibrate(model, batches, policy="raised", raise_to=4, outputs=True)
    print(found.table())
    found[3].gated_norm.mean      # [E], block 3

An expert that the router seldom chooses is calibrated on few tokens or none. Three policies say whom a token counts for
(``moestro.observe.policy``): ``natural``, ``raised`` and ``all``. Only the counting changes, the model runs as always.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import DataError, MoestroError
from moestro.core.layer import mixture_layers
from moestro.models.sites import sites_by_layer
from moestro.observe.coverage import Coverage, coverage
from moestro.observe.layerwise import Visit, layerwise
from moestro.observe.policy import Policy
from moestro.observe.statistics import LayerStats, ModelStats, statistics


Batches = Iterable[Mapping[str, Any] | Tensor]


@dataclass(frozen=True)
class Calibration(Mapping[int, LayerStats]):
    """Statistics by block, and what they rest on.

    Attributes:
        stats: by site. sites: index of the block -> site of its mixture.
        policy, raise_to: whom a token counted for. least: an expert with fewer tokens is starved.
        data: SHA-256 over the token ids of all batches.
    """

    stats: ModelStats
    sites: Mapping[int, str]
    policy: Policy
    raise_to: int | None
    least: int
    data: str

    def __getitem__(self, layer: int) -> LayerStats:
        return self.stats[self.sites[layer]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def coverage(self, *, natural: bool = False) -> list[Coverage]:
        """Tokens by expert, a row a layer: as counted, or as the router would have it."""
        counts = {site: stats.natural_E if natural else stats.count_E for site, stats in self.stats.items()}
        return coverage(counts, self.least)

    def table(self) -> str:
        """The coverage as text, see ``coverage_table``."""
        return coverage_table(self.note())

    def note(self) -> dict[str, Any]:
        """The same as values for a plan's notes and a receipt, with the tokens of every expert."""
        rows = zip(self.sites.items(), self.coverage(), self.coverage(natural=True), strict=True)
        return {
            "policy": self.policy,
            "raise_to": self.raise_to,
            "tokens": self.stats.num_tokens,
            "data": self.data,
            "least": self.least,
            "layers": [
                {
                    "layer": layer,
                    "site": site,
                    "tokens": self.stats[site].count_E.tolist(),
                    "natural_tokens": self.stats[site].natural_E.tolist(),
                    "smallest": counted.smallest,
                    "median": counted.median,
                    "largest": counted.largest,
                    "starved": list(counted.starved),
                    "naturally_starved": list(natural.starved),
                }
                for (layer, site), counted, natural in rows
            ],
        }


def coverage_table(note: Mapping[str, Any]) -> str:
    """Tokens of an expert by layer, as counted and as the router would have it, and who is starved, as a text table.

    Args:
        note: of a calibration, as it stands in a plan's notes and in receipts.
    """
    raised = "" if note["raise_to"] is None else f" to {note['raise_to']}"
    lines = [
        f"calibration: {note['tokens']:,} tokens, policy {note['policy']}{raised}; tokens of an expert by layer",
        f"  {'layer':>5} {'smallest':>9} {'median':>9} {'largest':>9} {'natural':>15}  below {note['least']}",
    ]
    for row in note["layers"]:
        natural = f"{min(row['natural_tokens'])} to {max(row['natural_tokens'])}"
        starved = ", ".join(map(str, row["starved"])) or "none"
        numbers = f"{row['smallest']:>9} {row['median']:>9g} {row['largest']:>9}"
        lines.append(f"  {row['layer']:>5} {numbers} {natural:>15}  {starved}")
    return "\n".join(lines)


def calibrate(
    model: nn.Module,
    batches: Batches,
    *,
    policy: Policy = "natural",
    raise_to: int | None = None,
    least: int = 1,
    allow_starved: bool = False,
    streamed: bool = False,
    spill: str | Path | None = None,
    enter: Visit | None = None,
    leave: Visit | None = None,
    **wishes: Any,
) -> Calibration:
    """Run data through a model and collect statistics of every mixture layer. Outputs do not change by a bit.

    Args:
        model: with mixture layers; runs in evaluation mode, without gradients, and is given back as it was.
        batches: arguments of its forward, or token ids [B, S].
        policy, raise_to: whom a token counts for. least: tokens below which an expert is starved.
        allow_starved: go on when a layer has half of its experts or more starved.
        streamed: one block at a time over all batches, see ``observe.layerwise``; ``spill``, ``enter`` and ``leave``
            are its own. The memory is that of one block's activations.
        wishes: further statistics, as ``observe.statistics`` takes them.

    Raises:
        PlanError: half or more of a layer's experts are starved. DataError: no token.
        ConfigError: no mixture layer, or a policy that a router cannot follow.
    """
    calls = [_call(model, batch) for batch in batches]
    wishes = {**wishes, "policy": policy, "raise_to": raise_to}
    with statistics(model, **wishes):
        pass  # what cannot be observed is refused before anything runs
    if streamed:
        stats = _streamed(model, calls, wishes, spill=spill, enter=enter, leave=leave)
    else:
        stats = _whole(model, calls, wishes)
    if not stats.num_tokens:
        raise DataError("the calibration data holds no token; give at least one batch")
    found = Calibration(stats, _layers(model), policy, raise_to, least, _hash(calls))
    if not allow_starved:
        _refuse_starved(found)
    return found


def _call(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    call = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if isinstance(batch, Tensor) and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        call["decoder_input_ids"] = batch
    first = next(model.parameters(), None)
    if first is None or first.is_meta:
        return call
    return {name: value.to(first.device) if isinstance(value, Tensor) else value for name, value in call.items()}


def _whole(model: nn.Module, calls: list[dict[str, Any]], wishes: Mapping[str, Any]) -> ModelStats:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with statistics(model, **wishes) as stats, torch.no_grad():
            for call in calls:
                model(**call)
    finally:
        for module, mode in modes:
            module.training = mode
    return stats


def _streamed(model: nn.Module, calls: list[dict[str, Any]], wishes: Mapping[str, Any], **visits: Any) -> ModelStats:
    """The same numbers, block by block."""
    whole = ModelStats()
    run = layerwise(model, calls, **visits)
    try:
        for step in run:
            if not mixture_layers(step.block):
                continue
            with statistics(step.block, **wishes) as stats:
                step.run()
            whole.layers.update(stats.layers)
            whole.num_tokens = max(whole.num_tokens, stats.num_tokens)
    finally:
        run.close()
    order = [site for site in mixture_layers(model) if site in whole.layers]
    whole.layers = {site: whole.layers[site] for site in order}
    return whole


def _layers(model: nn.Module) -> dict[int, str]:
    """Index of the block -> site; for a model of no known family the place among its mixtures."""
    there = list(mixture_layers(model))
    try:
        found = {layer: site.path for layer, site in sites_by_layer(model, "mlp").items() if site.path in there}
    except (MoestroError, AttributeError):
        found = {}
    return found if len(found) == len(there) else dict(enumerate(there))


def _hash(calls: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for call in calls:
        ids = call.get("input_ids")
        if isinstance(ids, Tensor):
            digest.update(f"{tuple(ids.shape)}".encode() + ids.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _refuse_starved(found: Calibration) -> None:
    rows = [row for row in found.coverage() if row.poor]
    if not rows:
        return
    worst = max(rows, key=lambda row: len(row.starved) / row.num_experts)
    more = "" if len(rows) == 1 else f" ({len(rows)} of {len(found)} layers are like that)"
    wider = "policy=all" if found.policy == "raised" else "policy=raised with raise_to, or policy=all"
    wider = "" if found.policy == "all" else f", count with {wider}"
    raise worst.refusal(found.stats.num_tokens, f"policy {found.policy}", more, wider)
