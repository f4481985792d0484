"""DeepSeekMoE, specialisation: are thin experts beside a shared one better, and are they harder to do without?

One layer takes five forms that differ in how experts are cut and in nothing else: a coarse mixture, thin experts, a
shared expert, both, and a coarse mixture with 1.5 times the experts' parameters and operations. Each is trained alike;
then tokens lose their best experts, or the shared one against one more routed expert. The controls close experts at
random, swap as many routed ones, and give back the weight that a closed expert takes along.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from moestro.core.inputs import MeterInputs
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.studies._framework import Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._language import Scale, heldout, llama, text, train
from moestro.training.objectives import Causal


@dataclass(frozen=True)
class Form:
    """How an arm's experts are cut: segments of each, shared ones, and width against the other arms."""

    segments: int = 1
    shared: int = 0
    wider: float = 1.0


EXPERTS, TOP_K = 8, 2
FORMS = {
    "deepseekmoe": Form(segments=4, shared=1),
    "coarse": Form(),
    "coarse_large": Form(wider=1.5),
    "segmented": Form(segments=4),
    "isolated": Form(shared=1),
}
AUX = {"balance": 0.01}
SHARES = [0.125, 0.25]
FLOOR = 1e-4  # of the loss: what routed experts are worth counts as this at least
TIMES = 3  # the rise of a swapped routed expert that the shared one must exceed


def scale(budget: Budget) -> Scale:
    """A small run for each budget; ``inner`` is that of a coarse expert. Long, so that experts come to matter."""
    thin = {"layers": 3, "dim": 64, "inner": 128, "heads": 2, "length": 64}
    return budget.pick(
        ci=Scale(layers=2, dim=32, inner=64, heads=2, vocabulary=512, length=32, batch=4, steps=4, heldout=8),
        micro=Scale(**thin, vocabulary=512, steps=40, lr=4e-3, heldout=16),
        full=Scale(**thin, vocabulary=512, steps=1200, lr=4e-3, heldout=256),
    )


def build(size: Scale, form: Form, seed: int) -> nn.Module:
    """A Llama model with the form's mixture in every block but the first."""
    model = llama(size, seed)
    use = method("train.deepseekmoe")
    config = use.configure(
        {
            "num_experts": EXPERTS,
            "top_k": TOP_K,
            "expert_size": round(size.inner * form.wider),
            "segments": form.segments,
            "shared": form.shared,
        }
    )
    for number, block in enumerate(model.model.layers):
        if number:
            site = Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
            block.mlp = use.build(site, config, Shared())
    return model


def readings(rises: Mapping[str, float]) -> dict[str, float]:
    """What claims are about, from the numbers of ``inspect.expert_redundancy``."""
    top = rises["slope: top"]
    found = {
        "top_slope": top,
        "top_slope_kept": rises["slope: top, weight kept"],
        "random_slope": rises["slope: random"],
        "top_excess": top - rises["slope: random"],
        "routed_worth": rises["rise: no routed"],
        "top_part": rises[f"rise: top {SHARES[-1]:g}"] / max(rises["rise: no routed"], FLOOR),
    }
    if "rise: no shared" in rises:
        traded = min(rises["rise: no shared"], rises["rise: no shared, full weight"])
        found |= {
            "shared_traded": traded,
            "shared_worth": rises["rise: no shared, none added"],
            "swap": rises["rise: chosen swap"],
            "best_swap": rises["rise: best swap"],
            "shared_excess": traded - TIMES * rises["rise: chosen swap"],
            "shared_over_best": traded - rises["rise: best swap"],
        }
    return found


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one form, then measure its held-out loss and how it rises without experts."""
    size = scale(budget)
    data = text(size.vocabulary, size.length, size.heldout, limit=budget.pick(ci=4, micro=120, full=None))
    model = build(size, FORMS[arm], seed)
    train(model, data.train, size, seed, losses=AUX)
    (rows,) = data.heldout.sources.values()
    asked = [rows[i] for i in range(min(size.heldout, len(rows)))]
    collated = [Causal().collate(asked[at : at + size.batch], []) for at in range(0, len(asked), size.batch)]
    batches = [{name: one[name] for name in ("input_ids", "position_ids")} for one in collated]
    meter = method("inspect.expert_redundancy")
    report = meter.entry("measure")(
        MeterInputs(name=arm, model=model.eval(), batches=batches, seed=seed), meter.configure({"shares": SHARES})
    )
    return {"heldout_loss": heldout(model, data.heldout, size), **readings(report.numbers)}


TELLS_LOSS = (
    "both {deepseekmoe}, coarse {coarse}, coarse and 1.5 times as large {coarse_large}, thin experts alone "
    "{segmented}, a shared expert alone {isolated}."
)
TELLS_TOP = (
    "both {deepseekmoe}, coarse {coarse}, coarse and larger {coarse_large}, thin alone {segmented}, shared alone "
    "{isolated}; all routed experts are worth {deepseekmoe.routed_worth}, {coarse.routed_worth}, "
    "{coarse_large.routed_worth}, {segmented.routed_worth} and {isolated.routed_worth} of the loss."
)
TELLS_SHARED = (
    "of the loss, without the shared expert {deepseekmoe.shared_worth}, with a routed one in its place "
    "{deepseekmoe.shared_traded}, with one of the chosen routed ones swapped {deepseekmoe.swap}, with the best one "
    "{deepseekmoe.best_swap}; beside coarse experts {isolated.shared_worth}, {isolated.shared_traded}, "
    "{isolated.swap} and {isolated.best_swap}."
)
LEAST = 0.001  # of the loss: what is smaller no reader would call an effect, whatever its sign
STEEPER = Beats(method="deepseekmoe", control="coarse_large", better="higher", by=0.1, relative=True)

STUDY = Study(
    paper="deepseekmoe",
    part="specialisation",
    title="Experts that others cannot replace",
    setting=(
        "Llama models of 3 layers and width 64 with mixtures in all but the first, trained for 1200 steps of 512 "
        "tokens on the standard library's source files (a BPE of 512); the paper trains 9 layers of width 1280 on 100B "
        "tokens. Coarse is 2 of 8 experts of width 128, the method 1 shared and 7 of 31 routed experts of width 32: "
        "equal total and active parameters of experts. No arm renormalises its weights, and all have a balance loss "
        "per sequence of weight 0.01. Closed are 1/8 and 1/4 of the experts of every token in every mixture layer."
    ),
    claims=(
        Claim(
            key="loss",
            text="Thin and shared experts lower the loss at equal total and active parameters.",
            where="DeepSeekMoE 2B against GShard 2B",
            claimed="Pile loss 1.808 against 1.867",
            metric="heldout_loss",
            judge=Beats(method="deepseekmoe", control="coarse", by=0.01),
            tells=TELLS_LOSS,
        ),
        Claim(
            key="equals_larger",
            text="They match a coarse mixture with 1.5 times the parameters and operations of experts.",
            where="against GShard with 1.5 times the experts",
            claimed="1.808 for both",
            metric="heldout_loss",
            judge=NotWorse(method="deepseekmoe", control="coarse_large", tolerance=0.01),
            tells=TELLS_LOSS,
        ),
        Claim(
            key="less_redundant",
            text="The loss rises more steeply with the share of each token's best experts that are disabled.",
            where="the specialisation study, against the larger GShard",
            claimed="a steeper rise",
            metric="top_slope",
            judge=STEEPER,
            tells=TELLS_TOP,
        ),
        Claim(
            key="not_lost_weight",
            text="It does so too when the experts that come instead get the weight of those that went.",
            where="the refuting control: weights that are not renormalised shrink with the rank",
            claimed="not separated in the paper",
            metric="top_slope_kept",
            judge=STEEPER,
            tells=TELLS_TOP,
        ),
        Claim(
            key="not_worth",
            text="The best quarter takes away a larger part of what all routed experts together are worth.",
            where="the refuting control: experts that matter more are missed more, redundant or not",
            claimed="not separated in the paper",
            metric="top_part",
            judge=STEEPER,
            tells=TELLS_TOP,
        ),
        Claim(
            key="best_not_any",
            text="It is the best experts that are missed: disabling as many at random is less harm.",
            where="the refuting control",
            claimed="not compared in the paper",
            metric="top_excess",
            judge=Within(arm="deepseekmoe", low=LEAST),
            tells="slopes: best {deepseekmoe.top_slope}, random {deepseekmoe.random_slope}.",
        ),
        Claim(
            key="shared",
            text=(
                "No routed expert can take the shared one's place: trading it for one more is more than 3 times the "
                "harm of swapping one of a token's routed experts, whether the new one weighs as its router says or 1."
            ),
            where="the specialisation study",
            claimed="Pile loss 1.808 to 2.414",
            metric="shared_excess",
            judge=Within(arm="deepseekmoe", low=LEAST),
            tells=TELLS_SHARED,
        ),
        Claim(
            key="shared_over_best",
            text="It is also more harm than swapping each token's best routed expert.",
            where="the refuting control",
            claimed="not compared in the paper",
            metric="shared_over_best",
            judge=Within(arm="deepseekmoe", low=LEAST),
            tells=TELLS_SHARED,
        ),
        Claim(
            key="segmentation",
            text="Thin experts alone lower the loss.",
            where="the ablations",
            claimed="an improvement",
            metric="heldout_loss",
            judge=Beats(method="segmented", control="coarse"),
            tells=TELLS_LOSS,
        ),
        Claim(
            key="isolation",
            text="A shared expert alone lowers the loss.",
            where="the ablations",
            claimed="an improvement",
            metric="heldout_loss",
            judge=Beats(method="isolated", control="coarse"),
            tells=TELLS_LOSS,
        ),
    ),
    arms=(
        Arm(name="deepseekmoe", text="every expert cut in 4, 1 of them shared: 7 of 31 beside it"),
        Arm(name="coarse", text="2 of 8 experts", role="control"),
        Arm(name="coarse_large", text="2 of 8 experts, each 1.5 times as wide", role="control"),
        Arm(name="segmented", text="every expert cut in 4, none shared: 8 of 32"),
        Arm(name="isolated", text="1 of 8 experts shared: 1 of 7 beside it"),
    ),
    run=run,
    methods=("train.deepseekmoe", "train.softmax_topk", "train.balance_loss", "inspect.expert_redundancy"),
    units={
        "heldout_loss": "nats a token",
        "top_slope": "of the loss, for all experts",
        "top_slope_kept": "of the loss, for all experts",
        "random_slope": "of the loss, for all experts",
        "top_excess": "of the loss, for all experts",
        "top_part": "of routed worth",
        "routed_worth": "of the loss",
        "shared_worth": "of the loss",
        "shared_traded": "of the loss",
        "swap": "of the loss",
        "best_swap": "of the loss",
        "shared_excess": "of the loss",
        "shared_over_best": "of the loss",
    },
)
