"""MoMa where it stands: what it takes from the site, low precision, costs, modalities of several layers, refusals."""

import pytest
import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.cost import Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.routing import Scores
from moestro.core.session import Edit, Session, session
from moestro.core.site import Shared
from moestro.methods.train._parts.batch_choice import parting_level
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import DIM, site, tokens


MODALITY = {"image": [(50, 96)]}
GROUPS = {"text": 2, "image": 2}
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def build(**config: object) -> MoELayer:
    torch.manual_seed(0)
    use = method("train.moma")
    return use.build(
        site(), use.configure({"groups": GROUPS, "modality": MODALITY, "expert_size": 5, **config}), Shared()
    )


def context(ids: Tensor) -> RoutingContext:
    return RoutingContext("test", Session(collect=True), tokens(1, len(ids), ids=ids))


def whole(family: str = "llama", **config: object) -> nn.Module:
    model = adopt(tiny_model(family))
    swap(model, "train.moma", {"groups": GROUPS, "modality": MODALITY, **config})
    return model


@pytest.mark.parametrize(("family", "form"), [("llama", (48, True, "silu")), ("bert", (48, False, "gelu"))])
def test_an_expert_has_the_form_of_the_feed_forward_at_the_site(family: str, form: tuple[object, ...]) -> None:
    for layer in mixture_layers(whole(family)).values():
        assert (layer.bank.inner, layer.bank.gated, layer.bank.activation) == form
    for layer in mixture_layers(whole(family, expert_size=7, gated=not form[1], activation="relu")).values():
        assert (layer.bank.inner, layer.bank.gated, layer.bank.activation) == (7, not form[1], "relu")
    use = method("train.moma")
    with pytest.raises(ConfigError, match="does not tell expert_size"):
        use.build(site(), use.configure({"modality": MODALITY}), Shared())


def test_layers_may_sort_their_tokens_differently() -> None:
    model = adopt(tiny_model("llama"))
    for layer, first in enumerate((50, 90)):
        swap(model, "train.moma", {"groups": GROUPS, "modality": {"image": [(first, 96)]}}, layers=[layer])
    with torch.no_grad(), session(collect=True) as opened:
        model(IDS, use_cache=False)
    (ctx,) = opened.take()
    for layer, first in enumerate((50, 90)):
        routing = ctx.routings[f"model.layers.{layer}.mlp"]
        assert torch.equal(routing.expert_N >= 2, IDS.flatten()[routing.token_N] >= first)


def test_a_tag_from_token_ids_sorts_the_tokens_that_depth_routing_lets_through() -> None:
    found = []
    for modality in (MODALITY, "kind"):
        model = whole(modality=modality)
        swap(model, "train.mixture_of_depths", {"capacity": 0.5}, kind="block", layers=[0])
        draw = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if ".bank." in name or name.endswith("router.weight"):
                nn.init.normal_(parameter, std=0.4, generator=draw)
        with torch.no_grad(), session(tags={"kind": lambda ids_T: (ids_T >= 50).long()}):
            found.append(model(IDS, use_cache=False).logits)
    assert torch.equal(*found)


def test_a_prompt_with_a_cache_is_refused_unless_allowed() -> None:
    ask = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ContextError, match="cannot generate"):
        whole().generate(IDS, **ask)
    assert whole(allow_noncausal=True).generate(IDS, **ask).shape == (2, 10)


def test_probabilities_sum_to_one_over_the_experts_of_a_tokens_group() -> None:
    layer, x = build(), torch.randn(4, DIM)
    scores = layer.router.score(x, layer.bank, context(torch.tensor([1, 60, 2, 70])))
    probability = scores.probabilities()
    torch.testing.assert_close(probability.sum(1), torch.ones(4))
    gate = (x @ layer.router.weight.T).sigmoid()
    torch.testing.assert_close(probability[0, :2], gate[0, :2] / gate[0, :2].sum())
    assert not probability[[0, 2], 2:].any()
    assert not probability[[1, 3], :2].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_whose_logits_tie_in_bfloat16_are_ranked_in_float32(autocast: bool) -> None:
    layer = build(groups={"text": 2, "image": 1})
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :2] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    x = torch.zeros(4, DIM)
    x[:, 0], x[:, 1] = 256.0, torch.tensor([0.25, 0.75, 0.0, 0.5])
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert (x.bfloat16() @ layer.router.weight.bfloat16().T)[:, 0].unique().numel() == 1
        routing = layer.route(x, context(torch.arange(4)))
        y = layer.run_experts(x, routing)
    pairs = sorted(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
    assert pairs == [(0, 1), (1, 0), (2, 1), (3, 0)]
    assert routing.scores.logits_TC.dtype == torch.float32
    assert y.isfinite().all()
    assert y.dtype == x.dtype


def test_a_token_costs_its_experts_the_router_and_its_groups_auxiliary_router() -> None:
    layer = build(groups={"text": 1, "image": 3}, bottleneck=4).eval()
    expert, main, extra = 2 * 3 * DIM * 5, 2 * 4 * DIM, 2 * (4 * DIM + 4 * 2)  # of two groups' outputs the mean, 2
    work = Work(length=9, training=False)
    assert cost(layer, work) == expert + main, "auxiliary routers that nobody asks cost nothing"
    assert cost(layer, Work(length=9)) == expert + main + extra
    nn.init.normal_(layer.router.auxiliary.out)
    assert cost(layer, work) == expert + main + extra
    assert (
        cost(layer, Work(length=9, training=False, rows={"block.mlp": [0.5, 0, 0, 1]})) == 1.5 * expert + main + extra
    )


def test_assignments_a_token_are_known_where_they_do_not_depend_on_the_modality() -> None:
    cases = [({"groups": {"text": 1, "image": 49}}, 1.0), ({"capacity_factor": 0.25}, 0.5)]
    for config, expected in cases:
        assert build(**config).router.real_per_token(9) == expected
    assert build(groups={"text": 1, "image": 2}, capacity_factor=0.25).router.real_per_token(9) is None


class Closed(Edit):
    """Closes the first choice to all tokens but one."""

    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        """See Edit."""
        select_TC = scores.select_TC.clone()
        select_TC[1:, 0] = float("-inf")
        return scores.replace(select_TC=select_TC)


def test_an_expert_that_edits_close_to_most_tokens_takes_what_is_left() -> None:
    ctx = RoutingContext("test", Session(edits=(Closed(),)), tokens(1, 6, ids=torch.arange(6)))
    routing = build().route(torch.randn(6, DIM), ctx)
    assert routing.counts_C().tolist() == [1, 3, 0, 0]
    model = adopt(tiny_model("llama"))
    swap(model, "train.mixture_of_depths", {"capacity": 0.5}, kind="block", layers=[0])
    with torch.no_grad(), session(collect=True, edits=[Closed()]) as opened:
        model(IDS, use_cache=False)
    assert opened.take()[0].routings["model.layers.0"].token_N.tolist() == [0]


def test_a_calibrated_threshold_moves_a_tenth_of_the_way_each_time() -> None:
    layer, x = build(threshold="calibrated"), torch.randn(8, DIM)
    auxiliary, level = layer.router.auxiliary, torch.zeros(4)
    nn.init.normal_(auxiliary.out)
    for _ in range(2):
        ctx = context(torch.arange(8) * 10)
        routing = layer.route(x, ctx)
        chosen = torch.zeros(8, 4, dtype=torch.bool)
        chosen[routing.token_N, routing.expert_N] = True
        level = 0.9 * level + 0.1 * parting_level(ctx.get("block.mlp", "auxiliary"), chosen)[0]
        torch.testing.assert_close(auxiliary.threshold, level)
    assert float(level.abs().min()) > 0
