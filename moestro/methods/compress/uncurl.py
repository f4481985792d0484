"""UNCURL: a mixture cut down for one task by merging the experts that the router treats alike on the task's data.

For each layer, from the router logits z_te of the task's tokens t:

    S_ef = (1 + r_ef) / 2,   r Pearson's correlation of z_.e and z_.f over tokens
    spectral clustering of S into E' groups
    inner units of each member aligned to the group's most used one (linear assignment on weights)
    W_c = sum_{e in c} f_e W_e / sum_{e in c} f_e,   f_e tokens of expert e; equal weights for a group without tokens
    the router stays, and a choice of e becomes a choice of its group (``router="remap"``)

Statistics are taken once, of the model as it is, or layer by layer behind merged ones (``sequential``). Afterwards the
merged model is fine-tuned on the task. ``compress.merge_experts`` has the same parts with other defaults, and more.

Source: UNCURL (2409.01483, section on the pruning method); alignment and merging as in MC-SMoE (2310.01334, section 3).
"""

from typing import Literal

from moestro.core.card import MethodCard
from moestro.core.inputs import PlanInputs
from moestro.core.plan import ExpertPlan
from moestro.methods.compress._parts.calibration import Keep
from moestro.methods.compress._parts.merging import Merging, check_merging, merged


class Config(Merging):
    """Settings.

    Attributes:
        layers: which mixtures: all, first:N, last:N, every:N or a list.
        keep: experts a layer has afterwards, E': a whole number, or a share such as 0.5 of those it has.
        similarity: of router logits on data, of router rows, or of expert outputs on data.
        grouping: spectral clusters, or average linkage, which needs no seed.
        align: order of inner units: by weights, by activations on data, or as they stand.
        weighting: of the members of a group: by tokens, or equal.
        router: remap choices of old experts, or one row a group: the members' mean, or the most used member's row.
        sample: tokens that align=activations looks at.
        sequential: measure each layer behind those that are merged already, on a copy of the model, one run over the
            data a layer; otherwise all at once on the model as it is.
        policy, raise_to: whom a calibration token counts for: natural, raised (to raise_to experts) or all.
        least: tokens below which an expert is starved. allow_starved: go on with half or more of them starved.
    """

    keep: Keep = 0.5
    grouping: Literal["spectral", "agglomerative"] = "spectral"


def statistics(config: Config) -> dict[str, dict[str, object]]:
    """What is measured on the task's data."""
    return config.wishes()


def check(inputs: PlanInputs, config: Config) -> None:
    """Refuse what needs no measurement to be refused.

    Raises:
        PlanError: no mixtures, more experts than there are, or fewer than the router chooses and rows to choose them.
    """
    check_merging(inputs, config)


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Groups of experts of each chosen layer.

    Raises:
        PlanError: no mixtures, fewer experts than the router chooses, statistics that were not measured.
    """
    return merged(inputs, config, "compress.uncurl")


CARD = MethodCard(
    title="Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning",
    year=2024,
    arxiv="2409.01483",
    paper="uncurl",
    summary="Experts that the router treats alike on a task's data are clustered, aligned and merged by use.",
    taxonomy="inference/model/compression/expert-pruning",
    needs=("model",),
    deviations=(
        "alignment and merging follow MC-SMoE's public code, where the paper's text leaves them open",
        "the paper does not say what becomes of the router; here it stays and its choices are renamed",
    ),
)
