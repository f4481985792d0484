"""Dropping lesser experts: nothing, all, exactly those of the rule; importance against a double loop; serving."""

from typing import Any

import numpy as np
import pytest
import torch

from moestro.core.decoding import Route
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import mixture_layers
from moestro.core.plan import ServingPlan
from moestro.core.registry import method
from moestro.core.session import session
from moestro.engine.decoding import Follow, thinned
from moestro.engine.kernels.interface import Matrix, Router
from moestro.engine.reference import ReferenceForward
from moestro.engine.scheduler import Scheduler
from moestro.methods.planning import make_plan
from moestro.methods.serve._parts.pruning import column_sums, loss_of_layers, scores
from moestro.methods.serve._parts.pruning import pruning as parts_pruning
from moestro.methods.serve.dynamic_pruning import Config, importance, policy, pruning, route_of, spared, thresholds
from moestro.models.load import adopt
from moestro.testing.tiny import tiny_model
from tests.engine.running import Answer, run
from tests.engine.test_forward import build, forward, prompt, rows
from tests.engine.test_kernels import every_isa, same_bits


IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(3))


def model_of(family: str = "mixtral", **changes: Any) -> Any:
    made = tiny_model(family, **changes)
    adopt(made)
    return made.eval()


@torch.no_grad()
def logits(model: Any, config: Config | None, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    if config is None:
        with column_sums(model):  # the same attention, or bits could differ
            return model(input_ids=ids, **more).logits
    with pruning(model, config):
        return model(input_ids=ids, **more).logits


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return model_of(num_experts_per_tok=3)


@pytest.mark.parametrize("config", [
    Config(threshold=0.0), Config(threshold=1e6, protect=1.0), Config(threshold=2.0, layers=()),
    Config(threshold=2.0, ratios={0: (0.0,), 1: (0.0,), 2: (0.0,)}),
])  # fmt: skip
def test_no_threshold_full_protection_and_no_layers_are_the_model_to_the_bit(mixtral: Any, config: Config) -> None:
    before = mixtral.config._attn_implementation
    assert torch.equal(logits(mixtral, config), logits(mixtral, None))
    assert mixtral.config._attn_implementation == before


def test_a_threshold_above_one_without_protection_is_the_top_1_model() -> None:
    pruned, one = model_of(), model_of()
    one.load_state_dict(pruned.state_dict())
    for layer in mixture_layers(one).values():
        layer.router.top_k = 1
        layer.router.config = layer.router.config.model_copy(update={"top_k": 1})
    got, expected = logits(pruned, Config(threshold=1.5, protect=0.0)), logits(one, None)
    assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.allclose(got, logits(pruned, None), atol=1e-4)


def test_attention_of_our_own_is_the_model_s_and_ignores_padding(mixtral: Any) -> None:
    with torch.no_grad():
        plain = mixtral(input_ids=IDS).logits
    assert torch.allclose(logits(mixtral, None), plain, atol=1e-5)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(IDS)], 1)
    config = Config(threshold=0.9, protect=0.25)
    got = logits(mixtral, config, padded, attention_mask=mask)[:, 5:]
    assert torch.allclose(got, logits(mixtral, config), atol=1e-4)
    with pruning(mixtral, config) as edit, torch.no_grad():
        mixtral(input_ids=padded, attention_mask=mask)
    assert edit.experts == 3 * IDS.numel() * len(mixture_layers(mixtral))
    assert 0 < edit.dropped < edit.asked == edit.experts // 3 * 2


def test_importance_is_the_double_loop_and_differs_from_token_to_token(mixtral: Any) -> None:
    mixtral.set_attn_implementation("eager")
    with torch.no_grad():
        maps = mixtral(input_ids=IDS, output_attentions=True).attentions
        with column_sums(mixtral) as sums, session(keeps=["input"], collect=True):
            mixtral(input_ids=IDS)
    for layer, attention in enumerate(maps):
        mean = attention.mean(1).double().numpy()
        length = mean.shape[1]
        for text in range(len(IDS)):
            size = np.arange(1, length + 1) / 7.0
            slow = [
                size[j] * sum(mean[text, i, j] for i in range(j, length)) / (length - j) for j in range(length)
            ]  # fmt: skip
            assert np.allclose(importance(mean[text], size), slow)
            taken = sums.taken[layer][0][text].numpy()
            assert np.allclose(taken, mean[text].sum(0), atol=1e-5)
            given = (sums.taken[layer][0][text : text + 1], torch.ones(1, length, dtype=torch.bool))
            ranked = scores(*given, torch.from_numpy(size)[None], "attention")[0]
            assert np.allclose(ranked, slow, atol=1e-5)
        assert np.ptp(taken) > 0.1


def test_who_is_spared() -> None:
    assert spared([1.0, 5.0, 5.0, 0.0], 0.25).tolist() == [False, True, False, False]
    assert spared([1.0, 5.0, 5.0, 0.0], 0.26).tolist() == [False, True, True, False]
    assert not spared([1.0, 2.0], 0.0).any()
    assert spared([1.0, 2.0], 1.0).all()


def test_dropped_are_those_whose_ratio_is_below_and_the_others_weigh_anew(mixtral: Any) -> None:
    seen: list[Any] = []

    class Taker:
        def record(self, site: str, routing: Any, ctx: Any) -> None:
            seen.append(routing)

    with torch.no_grad(), session(recorder=Taker()):
        mixtral(input_ids=IDS)
    first = seen[0]
    seen.clear()
    route = Route(kind="ratio", ratios=((0, (0.9, 0.5)),), threshold=0.0)
    with parts_pruning(mixtral, route, watch=False), torch.no_grad(), session(recorder=Taker()):
        mixtral(input_ids=IDS)
    thin, ratio = seen[0], first.weight_TK / first.weight_TK[:, :1]
    assert torch.equal(thin.expert_TK, first.expert_TK)
    drop = torch.stack([torch.zeros(48, dtype=torch.bool), ratio[:, 1] < 0.9, ratio[:, 2] < 0.5], 1)
    assert torch.equal(thin.kept_N.view(-1, 3), ~drop)
    assert drop.any(1).sum() > drop.all(1).sum() == 0
    assert torch.allclose(thin.weight_TK.sum(1), torch.ones(48))
    whole = ~drop.any(1)
    assert torch.equal(thin.weight_TK[whole], first.weight_TK[whole])
    with pytest.raises(ContextError, match="would lose all"):
        first.without(torch.ones_like(drop), lambda gate: gate)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "sigmoid_bias"])
def test_native_rows_lose_the_same_and_batches_do_not_matter(kind: str, renormalise: bool) -> None:
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(8)[:3] for _ in range(20)]).astype(np.int32)
    weights = -np.sort(-rng.random((20, 3)).astype(np.float32), axis=1)
    weights /= weights.sum(1, keepdims=True)
    router = Router(kind, 3, Matrix("f32", 8, 4, np.zeros(8 * 4 * 8, np.uint8)), renormalise=renormalise, scale=2.0)
    ratios = Route(kind="ratio", ratios=((4, (0.8, 0.3)),), threshold=9.0).ratios_of(4, 3)
    assert ratios.tolist() == [0.0, np.float32(0.8), np.float32(0.3)]
    got_ids, got = thinned(ratios, router, ids, weights)
    drop = weights / weights[:, :1] < ratios
    assert np.array_equal(got_ids, np.where(drop, -1, ids))
    assert not got[drop].any()
    normal = renormalise or kind == "topk_softmax"
    lost = drop.any(1)
    assert np.allclose(got[lost].sum(1), 2.0 if normal else np.where(drop, 0, weights)[lost].sum(1), atol=1e-6)
    assert np.array_equal(got[~lost], weights[~lost])
    for row in range(20):
        one = thinned(ratios, router, ids[row : row + 1], weights[row : row + 1])
        assert np.array_equal(one[1][0], got[row])
    spare = np.arange(20) < 7
    assert np.array_equal(thinned(ratios, router, ids, weights, spare)[0][:7], ids[:7])


def test_served_natively_it_equals_the_reference_rule_and_zero_is_the_model() -> None:
    every_isa()
    made = build(layout="q8", layers=2, experts=8)
    one, tokens = forward(made), prompt(20)
    plain = one.step(rows(tokens))
    routers = [layer.router for layer in one.description.layers]
    seen: list[np.ndarray] = []
    one.on_route = lambda layer, ids, weights: seen.append(ids)
    for threshold, first in ((0.0, 0), (0.7, 0), (2.0, 0), (2.0, 6)):
        route = Route(kind="ratio", threshold=threshold, first=first)
        override = Follow(route, routers, lambda: one.asked)
        one.overrides = [None, lambda *given, how=override: how(*given)]  # by Python, and by the kernels themselves
        slow = one.step(rows(tokens, routes=np.ones(20, np.int32)))
        one.overrides = [None, override]
        seen.clear()
        got = one.step(rows(tokens, routes=np.ones(20, np.int32)))
        assert np.allclose(got, slow, atol=1e-5)
        mixed = one.step(rows(tokens, routes=np.arange(20, dtype=np.int32) // 10))
        assert same_bits(mixed[:10], plain[:10])
        del seen[2:]
        dropped = sum(int((ids < 0).sum()) for ids in seen)
        if threshold == 0:
            assert same_bits(got, plain)
        else:
            assert not same_bits(got, plain)
        kept = 20 - first
        assert dropped == {0.0: 0, 2.0: kept * 2 * 2}.get(threshold, dropped)
        assert threshold != 0.7 or 0 < dropped < 80
        pieces = [one.step(rows(tokens[:9], routes=np.ones(9, np.int32))),
                  one.step(rows(tokens[9:], 9, routes=np.ones(11, np.int32)))]  # fmt: skip
        assert same_bits(np.concatenate(pieces), got)


def test_answers_are_labelled_and_texts_differ_only_when_something_is_dropped() -> None:
    made = tiny_model("mixtral", max_position_embeddings=128)
    adopt(made)
    reference = ReferenceForward(made, pages=64)

    def texts(config: Config | None) -> list[list[int]]:
        extra = {} if config is None else {"decoder": policy(config)}
        return run(Scheduler(reference, None), Answer([5, 9, 11, 3], 12, **extra), Answer([40, 41, 42], 12, **extra))

    assert texts(Config(threshold=0.0)) == texts(None)
    assert texts(Config(threshold=3.0, first=1000)) == texts(None)
    assert texts(Config(threshold=3.0)) != texts(None)
    decoder = policy(Config())
    assert not decoder.exact
    assert decoder.name == "serve.dynamic_pruning"


def test_a_plan_holds_the_quantile_of_every_layer_and_rank(mixtral: Any) -> None:
    plan = make_plan("serve.dynamic_pruning", mixtral, {"quantile": 0.5, "protect": 0.0}, batches=[IDS])
    assert isinstance(plan, ServingPlan)
    config = method("serve.dynamic_pruning").configure(plan.decoder.config)
    assert sorted(config.ratios) == [0, 1, 2][: len(config.ratios)] or len(config.ratios) == len(
        mixture_layers(mixtral)
    )
    with pruning(mixtral, config) as edit, torch.no_grad():
        mixtral(input_ids=IDS)
    assert (
        abs(edit.dropped / edit.asked - 0.5) < 0.05
    )  # half of them lie below the median, later layers see other inputs
    few = make_plan("serve.dynamic_pruning", mixtral, {"prune_layers": 1}, batches=[IDS])
    used = method("serve.dynamic_pruning").configure(few.decoder.config)
    assert len(used.layers) == 1
    assert used.layers[0] == int(min(few.notes["loss"], key=few.notes["loss"].get))
    assert ServingPlan.model_validate(plan.model_dump(mode="json")) == plan


def test_quantiles_of_a_histogram() -> None:
    histogram = np.zeros((2, 10), int)
    histogram[0, [1, 3, 5, 7]] = 5
    assert thresholds(histogram, 0.5) == (0.4, 0.0)
    assert thresholds(histogram, 0.0)[0] == 0.0
    assert thresholds(histogram, 1.0)[0] == 0.8


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="thresholds"):
        Route(kind="ratio", threshold=-0.1)
    with pytest.raises(ConfigError, match="thresholds"):
        Route(kind="ratio", ratios=((0, ()),))
    for values in ({"threshold": -1}, {"threshold": float("nan")}, {"protect": 2}, {"quantile": 1.5}, {"first": -1}):
        with pytest.raises(ConfigError):
            method("serve.dynamic_pruning").configure(values)
    assert str(route_of(Config(threshold=0.25))) == "ratio:0.25" == str(Route.parse("ratio:0.25"))


@pytest.mark.parametrize(("share", "length"), [(0.3, 50), (0.3, 90), (0.02, 60), (0.1, 10)])
def test_as_many_tokens_are_spared_as_the_rule_says(mixtral: Any, share: float, length: int) -> None:
    ids = torch.arange(length)[None] % 60 + 3
    with pruning(mixtral, Config(threshold=2.0, protect=share)) as edit, torch.no_grad():
        mixtral(input_ids=ids)
    lesser = sum(layer.router.top_k - 1 for layer in mixture_layers(mixtral).values())
    assert edit.asked == lesser * length
    assert edit.dropped == lesser * (length - int(spared(np.arange(length), share).sum()))


def test_layers_are_chosen_by_the_importance_that_was_asked_for(mixtral: Any) -> None:
    settings = {"prune_layers": 1, "protect": 0.3}
    losses = {}
    for kind in ("attention", "l1_recency"):
        plan = make_plan("serve.dynamic_pruning", mixtral, {**settings, "importance": kind}, batches=[IDS])
        config = method("serve.dynamic_pruning").configure(plan.decoder.config)
        losses[kind] = plan.notes["loss"]
        for layer, told in losses[kind].items():
            only = route_of(config.model_copy(update={"layers": (int(layer),)}))
            with parts_pruning(mixtral, only, protect=0.3, importance=kind), torch.no_grad():
                assert float(mixtral(input_ids=IDS, labels=IDS).loss) == pytest.approx(told, rel=1e-6)
    assert losses["attention"] != losses["l1_recency"]


def test_kernels_drop_in_the_layers_of_the_route_alone() -> None:
    one, tokens = forward(build(layout="q8", layers=3, experts=8)), prompt(8)
    routers = [layer.router for layer in one.description.layers]
    seen: list[np.ndarray] = []
    one.on_route = lambda layer, ids, weights: seen.append(ids)
    one.overrides = [None, Follow(Route(kind="ratio", threshold=2.0, layers=(0, 2)), routers)]
    one.step(rows(tokens, routes=np.ones(8, np.int32)))
    assert [int((ids < 0).sum()) for ids in seen] == [16, 0, 16]
    with pytest.raises(ConfigError, match="spares the first 4 positions, but rows come without theirs"):
        Follow(Route(kind="ratio", first=4), routers)


def test_a_layer_s_loss_is_that_of_every_token_alike_and_of_no_padding(mixtral: Any) -> None:
    """Texts of 24, 13 and 5 tokens, in one batch each, or padded on either side, lose the same."""
    texts = [IDS[0], IDS[1, :13], IDS[0, 7:12]]
    routes = {0: Route(kind="ratio", threshold=0.9, layers=(0,)), 1: Route(kind="ratio", threshold=0.0, layers=(1,))}
    wanted, count = dict.fromkeys(routes, 0.0), sum(len(text) - 1 for text in texts)
    for layer, route in routes.items():
        for text in texts:
            with parts_pruning(mixtral, route, protect=0.2), torch.no_grad():
                told = mixtral(input_ids=text[None]).logits[0].log_softmax(-1)
            wanted[layer] -= float(told[:-1].gather(1, text[1:, None]).sum()) / count
    assert abs(wanted[0] - wanted[1]) > 1e-4
    padded = []
    for left in (False, True):
        ids, mask = torch.zeros(2, 3, 24, dtype=torch.long)
        for row, text in enumerate(texts):
            place = slice(24 - len(text), None) if left else slice(len(text))
            ids[row, place], mask[row, place] = text, 1
        padded.append([{"input_ids": ids, "attention_mask": mask}])
    for batches in ([text[None] for text in texts], *padded):
        assert loss_of_layers(mixtral, batches, routes, 0.2) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ConfigError, match="no token that follows another"):
        loss_of_layers(mixtral, [IDS[:, :1]], routes, 0.0)


def test_protection_without_attention_to_watch_is_refused(mixtral: Any) -> None:
    """As for blocks whose mixer keeps no attention map; where nothing is dropped there, nothing is missed."""
    config = Config(threshold=0.9, protect=0.2)
    for settings in (config, config.model_copy(update={"importance": "l1_recency"})):
        with pruning(mixtral, settings) as edit, torch.no_grad():
            edit.layer_of = {site: layer + 100 * (layer == 1) for site, layer in edit.layer_of.items()}
            with pytest.raises(ContextError, match=r"protect=0\.2 needs the attention of its own block"):
                mixtral(input_ids=IDS)
    with pruning(mixtral, config.model_copy(update={"layers": (0,)})) as edit, torch.no_grad():
        edit.layer_of = {site: layer + 100 * (layer == 1) for site, layer in edit.layer_of.items()}
        mixtral(input_ids=IDS)
    assert edit.dropped > 0


@pytest.mark.parametrize("watch", [True, False])
def test_padding_is_not_counted_whether_or_not_attention_is_watched(mixtral: Any, watch: bool) -> None:
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(IDS)], 1)
    with parts_pruning(mixtral, Route(kind="ratio", threshold=0.9), watch=watch) as edit, torch.no_grad():
        mixtral(input_ids=padded, attention_mask=mask)
    assert edit.experts == 3 * IDS.numel() * len(mixture_layers(mixtral))
    assert 0 < edit.dropped < edit.asked
