"""FactorLLM: do slices of a dense feed-forward, chosen by a router that the dense model taught, stand in for all of it?

A pretrained model's feed-forwards are cut into four slices with untouched weights, two of them run for a token. The
arms differ in who chooses: the prior-approximate router, its labels themselves (the oracle), a coin, a router trained
by the model's loss, or nobody (the best half of the units for all tokens). All arms but the dense one spend the same
operations. Some arms are cut in every layer, the others in the middle third, where a model survives it.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.forward import logits_of
from moestro.core.layer import mixture_layers
from moestro.core.session import Edit, session
from moestro.data.packing import IGNORE
from moestro.observe.passing import scaled_inputs
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, Recovers, Study, Within
from moestro.studies._slices import (
    EXPERTS,
    TOP_K,
    Cut,
    by_loss,
    collated,
    cut,
    data,
    dense,
    edits_of,
    inputs,
    middle,
    scale,
)


# -- measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model: nn.Module, name: str, edits: Sequence[Edit] = ()) -> dict[str, float]:
    """Held-out loss in nats a token and share of next tokens that are the model's first guess."""
    loss, right, count = 0.0, 0, 0
    for batch in collated(data(name)[1], scale(BUDGETS[name])):
        with session(edits=edits, keeps=["input"]):
            logits_BSV = logits_of(model, inputs(batch))[:, :-1].float()
        labels_BS = batch["labels"][:, 1:]
        live_BS = labels_BS != IGNORE
        loss += float(nn.functional.cross_entropy(logits_BSV[live_BS], labels_BS[live_BS], reduction="sum"))
        right += int((logits_BSV[live_BS].argmax(-1) == labels_BS[live_BS]).sum())
        count += int(live_BS.sum())
    return {"heldout_loss": loss / count, "accuracy": right / count}


def pruned(made: Cut, name: str, sites: Sequence[str]) -> dict[str, float]:
    """The dense model with the most active K / E of each layer's units alone."""
    factors: dict[nn.Module, Tensor] = {}
    for site in sites:
        activity_I = made.activity_I[site]
        mask_I = torch.zeros_like(activity_I)
        mask_I[activity_I.topk(len(activity_I) * TOP_K // EXPERTS).indices] = 1.0
        factors[dense(name).get_submodule(f"{site}.down_proj")] = mask_I
    with scaled_inputs(factors):
        return score(dense(name), name)


def ratio(first: Callable[[], Any], second: Callable[[], Any], times: int) -> float:
    """Seconds of ``first`` over seconds of ``second``, run in turns: the median of paired ratios."""
    found = []
    for _ in range(times):
        stamps = [time.perf_counter()]
        for one in (first, second):
            one()
            stamps.append(time.perf_counter())
        found.append((stamps[1] - stamps[0]) / (stamps[2] - stamps[1]))
    return statistics.median(found)


@torch.no_grad()
def speedups(model: Any, name: str) -> dict[str, float]:
    """How much faster than the dense model: a decode step with its cache, and one feed-forward, for 1 and 32 tokens."""
    budget, plain = BUDGETS[name], dense(name)
    prompt, times = budget.pick(ci=4, micro=8, full=16), budget.pick(ci=2, micro=5, full=11)
    site = [*mixture_layers(model), "model.layers.0.mlp"][0]
    found = {}
    for rows in (1, 32):
        ids = torch.arange(rows * prompt).view(rows, prompt) % 200 + 5

        def stepper(one: Any, ids: Tensor = ids) -> Callable[[], Any]:
            cache = one(input_ids=ids, use_cache=True).past_key_values
            return lambda: one(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

        steps = stepper(plain), stepper(model)
        for step in steps:
            step()
        found[f"decode_speedup_{rows}"] = ratio(*steps, times)
        x_TD = torch.randn(1, rows, plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
        ours = functools.partial(model.get_submodule(site), x_TD)
        found[f"ffn_speedup_{rows}"] = ratio(functools.partial(plain.get_submodule(site), x_TD), ours, 5 * times)
    return found


def fitted(made: Cut) -> dict[str, float]:
    """What became of the routers, means over layers."""
    fits = list(made.fits.values())
    return {
        "label_agreement": float(np.mean([fit.agreement for fit in fits])),
        "label_top_share": float(np.mean([float(fit.label_share_E.max()) for fit in fits])),
        "prior_loss_fall": float(np.mean([1 - fit.losses[-1] / fit.losses[0] for fit in fits])),
        "fitted_scale": float(np.mean([fit.scale for fit in fits])),
        "fit_seconds": made.seconds,
    }


@functools.cache
def whole(name: str) -> dict[str, float]:
    """The dense model's scores."""
    return score(dense(name), name)


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm."""
    name = budget.name
    if arm == "dense":
        return {**whole(name), "kept_accuracy": 1.0, **speedups(dense(name), name)}
    if arm == "lm":
        return score(by_loss(seed, name), name)
    made = cut(seed, name)
    if arm.startswith("static"):
        inside = [site for place, site in enumerate(made.layers) if arm == "static_all" or place in middle(made.model)]
        found = pruned(made, name, inside)
    else:
        found = score(made.model, name, edits_of(arm, made, seed, name))
    found["kept_accuracy"] = found["accuracy"] / max(whole(name)["accuracy"], 1e-9)
    if arm == "pa":
        found |= fitted(made)
    if arm == "pa_all":
        found |= speedups(made.model, name)
    return found


MIDDLE = (
    "Held-out loss with the middle third cut: dense {dense.heldout_loss}, random {random.heldout_loss}, untaught "
    "routers {untrained.heldout_loss}, PA "
    "{pa.heldout_loss}, its labels as the choice {oracle.heldout_loss}, router by the model's loss {lm.heldout_loss}, "
    "best half of the units {static.heldout_loss}; with fitted scales (mean {pa.fitted_scale}, E / K = 2) PA "
    "{pa_scaled.heldout_loss} and random {random_scaled.heldout_loss}. The fitted router makes "
    "{pa.label_agreement} of its choices as the labels do on the tokens it was fitted on (a coin: 0.5); the commonest "
    "label of a layer is one for "
    "{pa.label_top_share} of the tokens. Fitting took {pa.fit_seconds} s for all layers."
)
ALL = (
    "Accuracy, dense {dense.accuracy}; every layer cut: PA {pa_all.accuracy}, with fitted scales "
    "{pa_scaled_all.accuracy}, labels as the choice {oracle_all.accuracy}, random {random_all.accuracy}, best half of "
    "the units {static_all.accuracy}; the middle third cut: PA {pa.accuracy}, with fitted scales {pa_scaled.accuracy}. "
    "Nothing was tuned afterwards; the paper tunes the slices."
)

STUDY = Study(
    paper="factorllm",
    title="Slices that the dense model chooses",
    setting=(
        "SmolLM2-135M-Instruct (30 layers, 4-bit weights opened as float32), each feed-forward in 4 random slices "
        "with 2 a token and no weight changed; routers fitted on 4096 tokens of the standard library's documentation, "
        "measured on 2048 held-out tokens; seeds change partition and routers. The paper has TinyLlama-1.1B and "
        "MobileLLaMA-1.4B, tunes slices on about 10 million tokens, and its tables could not be read."
    ),
    claims=(
        Claim(
            key="routing",
            text="The router that the dense outputs taught closes a fifth of the gap from random choices to dense.",
            where="abstract; the loss in the released code",
            claimed="fast and accurate routing from the prior",
            metric="heldout_loss",
            judge=Recovers(method="pa", cut="random", whole="dense", share=0.2),
            tells=MIDDLE,
        ),
        Claim(
            key="beats_static",
            text="Choosing for each token is better than the best half of the units for all.",
            where="the method: slices chosen by token",
            claimed="not compared",
            metric="heldout_loss",
            judge=Beats(method="pa", control="static"),
            tells=MIDDLE,
        ),
        Claim(
            key="prior_helps",
            text="The prior is a better teacher than the model's own loss on equally many tokens.",
            where="summaries of the paper: ablation of the loss",
            claimed="better accuracy with the loss than without",
            metric="heldout_loss",
            judge=Beats(method="pa", control="lm"),
            tells=MIDDLE,
        ),
        Claim(
            key="taught",
            text="What the router was taught matters: routers of random weights choose worse.",
            where="summaries of the paper: ablation of the loss",
            claimed="better accuracy with the loss than without",
            metric="heldout_loss",
            judge=Beats(method="pa", control="untrained"),
            tells=MIDDLE,
        ),
        Claim(
            key="keeps_85",
            text="With every feed-forward cut, 85 % of the accuracy stays.",
            where="abstract",
            claimed="up to 85 % of the source model's performance",
            metric="kept_accuracy",
            judge=Within(arm="pa_all", low=0.85),
            tells=ALL,
        ),
        Claim(
            key="faster",
            text="Decoding the whole model is 30 % faster.",
            where="abstract",
            claimed="over 30 % faster inference",
            metric="decode_speedup_1",
            judge=Beats(method="pa_all", control="dense", better="higher", by=0.3),
            tells=(
                "A decode step is {pa_all.decode_speedup_1} times as fast for 1 row and {pa_all.decode_speedup_32} for "
                "32 (dense against itself {dense.decode_speedup_1} and {dense.decode_speedup_32}); a feed-forward "
                "alone {pa_all.ffn_speedup_1} and {pa_all.ffn_speedup_32}. By operations the model could gain 1.42."
            ),
        ),
    ),
    arms=(
        Arm(name="dense", text="the dense model; speed: against itself", role="control"),
        Arm(name="static", text="middle third: the most active half of the units for all tokens", role="control"),
        Arm(name="random", text="middle third: 2 of 4 slices drawn for each token", role="control"),
        Arm(name="pa", text="middle third: the prior-approximate router"),
        Arm(name="untrained", text="middle third: linear routers of random weights", role="control"),
        Arm(name="oracle", text="middle third: the labels of the prior as the choice", role="reference"),
        Arm(name="pa_scaled", text="the router, output scales fitted by least squares", role="reference"),
        Arm(name="random_scaled", text="random slices with the same scales", role="reference"),
        Arm(name="static_all", text="every layer: the most active half of the units", role="control"),
        Arm(name="random_all", text="every layer: random slices", role="control"),
        Arm(name="pa_all", text="every layer: the prior-approximate router"),
        Arm(name="pa_scaled_all", text="every layer: the router with fitted scales", role="reference"),
        Arm(name="oracle_all", text="every layer: the labels as the choice", role="reference"),
        Arm(
            name="lm",
            text="middle third: softmax router, one pass by the model's loss and a balance loss",
            role="control",
        ),
    ),
    run=run,
    methods=(
        "convert.factorllm",
        "convert.split",
        "train.prior_approximate",
        "train.softmax_topk",
        "train.balance_loss",
    ),
    units={
        "heldout_loss": "nats a token",
        "accuracy": "share of next tokens",
        "kept_accuracy": "of the dense model's accuracy",
        "decode_speedup_1": "times as fast",
        "decode_speedup_32": "times as fast",
        "ffn_speedup_1": "times as fast",
        "ffn_speedup_32": "times as fast",
        "fit_seconds": "s",
        "label_agreement": "share of choices on the fitted tokens",
        "label_top_share": "share of tokens",
        "prior_loss_fall": "of the first epoch's mean",
        "fitted_scale": "times",
    },
)
