"""Expert merging: groups of experts that are alike become one expert each.

Four parts, each a setting. How alike two experts are (``similarity``), who forms a group (``grouping``), in which order
inner units are averaged (``align``), and with which weights:

    W_c = sum_{e in c} a_e P_e W_e,   a_e = f_e / sum_{c} f_e (tokens of the expert), or 1 / |c|

P_e puts the inner units of e in the order of the group's most used member. Then the router:

    remap   stays as it is; a choice of e becomes a choice of its group, and two that meet are added and run once
    mean    one row a group, the mean of its members' rows with the weights a_e
    rows    one row a group, that of its most used member

Sources: MC-SMoE (2310.01334, section 3: dominant experts, similarity of router logits, alignment, weighting by use,
``grouping="dominant"``); HC-SMoE (2410.08589: average linkage of expert outputs, ``grouping="agglomerative",
similarity="expert_output"``).
"""

from typing import Literal

from moestro.core.card import MethodCard
from moestro.core.inputs import PlanInputs
from moestro.core.plan import ExpertPlan
from moestro.methods.compress._parts.alignment import Align
from moestro.methods.compress._parts.calibration import Keep
from moestro.methods.compress._parts.grouping import Grouping, Similarity
from moestro.methods.compress._parts.merging import Merging, check_merging, merged


class Config(Merging):
    """Settings.

    Attributes:
        layers: which mixtures: all, first:N, last:N, every:N or a list.
        keep: experts a layer has afterwards: a whole number, or a share such as 0.5 of those it has.
        similarity: of router logits on data, of router rows, or of expert outputs on data.
        grouping: spectral clusters, average linkage, the most used experts with those like them, or groups at random.
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
    similarity: Similarity = "router_logits"
    grouping: Grouping = "dominant"
    align: Align = "weights"
    weighting: Literal["usage", "equal"] = "usage"


def statistics(config: Config) -> dict[str, dict[str, object]]:
    """What is measured on data."""
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
    return merged(inputs, config, "compress.merge_experts")


CARD = MethodCard(
    title="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
    year=2023,
    arxiv="2310.01334",
    summary="Groups of alike experts become one each: by router or output, aligned, weighted by use.",
    taxonomy="inference/model/compression/expert-pruning",
    needs=("model",),
    deviations=(
        "inner units are aligned to the group's most used member instead of the layer's first expert",
        "every layer keeps as many experts, where the paper spreads dominant experts over layers",
        "the merged experts are not compressed further to low rank",
    ),
)
