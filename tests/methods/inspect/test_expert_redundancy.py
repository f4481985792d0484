"""inspect.expert_redundancy: what is closed, what is chosen instead, and what the loss then is."""

import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.report import Report
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.methods.inspect import expert_redundancy as subject
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model


E, K = 7, 3  # of the thin mixture below


def model_of(method_id: str, **config: object) -> nn.Module:
    """Two mixture layers with weights large enough to tell experts apart."""
    model = adopt(tiny_model("llama"))
    swap(model, method_id, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.parameters():
                parameter.normal_(std=0.5)
    return model.eval()


def thin(**config: object) -> nn.Module:
    return model_of("train.deepseekmoe", num_experts=4, top_k=2, expert_size=8, segments=2, shared=1, **config)


def batches(rows: int = 3) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 97, (rows, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": ids}]


def report(model: nn.Module, given: list[dict[str, Tensor]] | None = None, **config: object) -> Report:
    use = method("inspect.expert_redundancy")
    inputs = MeterInputs(model=model, batches=given or batches(), seed=4)
    found: Report = use.entry("measure")(inputs, use.configure(config))
    return found


class Seen(Edit):
    """Keeps the routings of all sites, as they stand after the edits before it."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []

    def on_routing(self, site: str, routing: Routing, router: object, ctx: object) -> Routing:
        self.routings.append(routing)
        return routing


def routings(model: nn.Module, *edits: Edit) -> tuple[list[Routing], list[Routing]]:
    """Of the first layer, where both saw the same input: before and after the edits."""
    before, after = Seen(), Seen()
    with torch.no_grad(), session(edits=[before, *edits, after]):
        model(**batches()[0])
    return before.routings[:1], after.routings[:1]


def counts(model: nn.Module, count: int) -> dict[str, int]:
    return dict.fromkeys(mixture_layers(model), count)


def loss_of(logits: Tensor, ids: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)))


# -- which experts ------------------------------------------------------------------------------------------------


def test_without_the_top_two_a_token_takes_ranks_three_to_five() -> None:
    model = thin()
    (before,), (after,) = routings(model, subject.Closed(counts(model, 2), "top"))
    order_TE = before.scores.logits_TC.argsort(-1, descending=True)
    assert torch.equal(before.expert_TK, order_TE[:, :K])
    assert torch.equal(after.expert_TK, order_TE[:, 2 : 2 + K])
    probability = before.scores.logits_TC.softmax(-1)
    torch.testing.assert_close(after.weight_TK, probability.gather(1, after.expert_TK))  # as ever: not renormalised


def test_kept_weights_sum_to_what_they_did_and_keep_their_proportions() -> None:
    model = thin()
    edits = [subject.Closed(counts(model, 2), "top", keep_weight=keep) for keep in (False, True)]
    (before,), (lost,) = routings(model, edits[0])
    _, (kept,) = routings(model, edits[1])
    torch.testing.assert_close(kept.weight_TK.sum(1), before.weight_TK.sum(1))
    assert (lost.weight_TK.sum(1) < before.weight_TK.sum(1)).all()
    torch.testing.assert_close(
        kept.weight_TK / kept.weight_TK.sum(1, True), lost.weight_TK / lost.weight_TK.sum(1, True)
    )


def test_random_experts_are_drawn_evenly_and_chosen_ones_among_the_chosen() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4000, E)
    scores = subject.Scores(logits, logits, logits.softmax(-1))
    taken = logits.topk(K).indices
    routing = Routing.from_topk(taken, torch.ones(4000, K), num_experts=E, scores=scores)
    draw = torch.Generator().manual_seed(1)
    closed = subject.pick(routing, scores, "random", 2, draw)
    assert (closed.sum(1) == 2).all()
    hits = closed.gather(1, taken).double().mean()
    assert float(hits) == pytest.approx(2 / E, abs=0.02)
    closed = subject.pick(routing, scores, "chosen", 2, draw)
    assert (closed.gather(1, taken).sum(1) == 2).all()
    rank = closed.gather(1, taken).double().mean(0)  # each of the chosen as often
    torch.testing.assert_close(rank, torch.full((K,), 2 / K, dtype=torch.float64), atol=0.03, rtol=0)
    closed = subject.pick(routing, scores, "chosen", K + 1, draw)  # more than were chosen: all of them, and one more
    assert closed.gather(1, taken).all()
    assert (closed.sum(1) == K + 1).all()


def test_nulls_are_never_closed() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0, 8.0], [4.0, 1.0, 0.0, 9.0]])
    scores = subject.Scores(logits, logits, logits.softmax(-1))
    routing = Routing.from_topk(torch.tensor([[2], [3]]), torch.ones(2, 1), num_experts=2, num_null=2, scores=scores)
    closed = subject.pick(routing, scores, "top", 1, None)
    assert closed.tolist() == [[False, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("renormalise", [True, False])
def test_what_is_added_is_next_in_rank_and_weighed_by_the_router(renormalise: bool) -> None:
    model = thin(router={"method": "train.softmax_topk", "config": {"renormalise": renormalise}})
    sites = list(mixture_layers(model))
    (before,), (after,) = routings(model, subject.Added(sites, 2))
    order_TE = before.scores.logits_TC.argsort(-1, descending=True)
    assert torch.equal(after.expert_TK, order_TE[:, : K + 2])
    probability = before.scores.logits_TC.softmax(-1).gather(1, after.expert_TK)
    expected = probability / probability.sum(1, True) if renormalise else probability
    torch.testing.assert_close(after.weight_TK, expected)
    _, (full,) = routings(model, subject.Added(sites, 2, full=True))
    assert torch.equal(full.expert_TK, after.expert_TK)
    assert torch.equal(full.weight_TK[:, :K], before.weight_TK)
    assert (full.weight_TK[:, K:] == 1).all()


# -- what the loss then is ----------------------------------------------------------------------------------------


def test_rises_are_those_of_a_model_whose_router_never_could_choose_them() -> None:
    """The first layer alone: the same experts closed in a forward written out with the router's own parts."""
    model = thin()
    (given,) = batches()
    found = report(model, shares=[2 / E], layers=[0], draws=1)
    layer = next(iter(mixture_layers(model).values()))

    class ByHand(Edit):
        def on_scores(self, site: str, scores: subject.Scores, ctx: object) -> subject.Scores:
            if site != layer.site:
                return scores
            third = scores.select_TC.sort(-1, descending=True).values[:, 2:3]
            return scores.replace(select_TC=scores.select_TC.masked_fill(scores.select_TC > third, float("-inf")))

    with torch.no_grad():
        plain = loss_of(model(**given).logits, given["input_ids"])
        with session(edits=[ByHand()]):
            closed = loss_of(model(**given).logits, given["input_ids"])
    assert found.numbers["loss"] == pytest.approx(plain, rel=1e-6)
    assert found.numbers[f"rise: top {2 / E:g}"] == pytest.approx(closed / plain - 1, rel=1e-4)
    assert abs(closed / plain - 1) > 1e-4
    assert found.numbers["slope: top"] == pytest.approx((closed / plain - 1) / (2 / E), rel=1e-4)


def test_without_a_branch_is_with_its_weights_at_zero() -> None:
    model = thin()
    (given,) = batches()
    found = report(model, shares=[0.2], draws=1).numbers
    layers = mixture_layers(model).values()

    def silenced(parts: list[nn.Module], *edits: Edit) -> float:
        kept = [part.bank.down_proj.detach().clone() for part in parts]
        with torch.no_grad():
            for part in parts:
                part.bank.down_proj.zero_()
            with session(edits=edits):
                loss = loss_of(model(**given).logits, given["input_ids"])
            for part, value in zip(parts, kept, strict=True):
                part.bank.down_proj.copy_(value)
        return loss / found["loss"] - 1

    shared, sites = [layer.shared for layer in layers], list(mixture_layers(model))
    expected = {
        "no routed": silenced(list(layers)),
        "no shared, none added": silenced(shared),
        "no shared": silenced(shared, subject.Added(sites, 1)),
        "no shared, full weight": silenced(shared, subject.Added(sites, 1, full=True)),
    }
    assert len({round(value, 5) for value in expected.values()}) == 4
    for what, value in expected.items():
        assert found[f"rise: {what}"] == pytest.approx(value, rel=1e-4, abs=1e-7), what


def test_experts_that_are_copies_are_fully_redundant() -> None:
    """Whoever comes instead answers the same, and a router that renormalises keeps the weight."""
    model = model_of("train.moe", num_experts=6, expert_size=4, router={"method": "train.softmax_topk"})
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.bank.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    found = report(model, shares=[0.2, 0.4]).numbers
    for kind in ("top", "top, weight kept", "random"):
        assert found[f"slope: {kind}"] == pytest.approx(0, abs=1e-6)
    assert abs(found["rise: no routed"]) > 1e-3
    assert not any("shared" in name or "swap" in name for name in found)


def test_ranked_experts_are_missed_more_than_any() -> None:
    found = report(trained(), trained_batches(), shares=[0.25, 0.5]).numbers
    assert found["slope: top"] > 2 * found["slope: random"] > 0


def trained() -> nn.Module:
    """A mixture that learned which token follows which."""
    torch.manual_seed(0)
    model = adopt(tiny_model("llama"))
    swap(model, "train.moe", {"num_experts": 8, "expert_size": 8, "router": {"method": "train.softmax_topk"}})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    (given,) = trained_batches()
    for _ in range(60):
        logits = model(**given).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), given["input_ids"][:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def trained_batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    follows = torch.randperm(94, generator=draw) + 3
    ids = [torch.randint(3, 97, (24,), generator=draw)]
    for _ in range(7):
        ids.append(follows[ids[-1] - 3])
    return [{"input_ids": torch.stack(ids, 1)}]


def test_slopes_and_rounding() -> None:
    assert subject.slope([0.5, 0.25], [0.1, 0.3]) == pytest.approx((0.05 + 0.075) / (0.25 + 0.0625))
    assert subject.slope([0.0], [0.0]) == 0.0
    layers = mixture_layers(thin())
    assert set(subject.closed_counts(layers, 0.25).values()) == {2}  # 1.75
    assert set(subject.closed_counts(layers, 1.5 / E).values()) == {2}
    assert set(subject.closed_counts(layers, 0.05).values()) == {0}


def test_shares_are_told_as_they_were_closed() -> None:
    table = report(thin(), shares=[0.05, 0.25]).tables["closed"]
    assert [row[:2] for row in table.rows] == [[0.05, 0.0], [0.25, pytest.approx(2 / E)]]
    assert table.rows[0][2:] == [0.0, 0.0, 0.0]


def test_a_shared_branch_is_back_after_a_measurement_that_failed() -> None:
    model = thin()
    (given,) = batches()
    layers = list(mixture_layers(model).values())
    before = model(**given).logits
    with subject.without_shared(layers):
        assert not torch.equal(model(**given).logits, before)
    with pytest.raises(RuntimeError), subject.without_shared(layers):
        raise RuntimeError
    assert torch.equal(model(**given).logits, before)


# -- what cannot be measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"shares": [0.0]}, "shares.*greater than 0"),
        ({"shares": [0.1, 1.0]}, "shares.*less than 1"),
        ({"shares": [0.8]}, "closes 6 of 7 experts; 1 are left, a token takes 3"),
        ({"extra": 5}, "extra=5 closes 5 of 7 experts; 2 are left, a token takes 3"),
        ({"layers": [0, 9]}, "the model has 2 mixture layers"),
        ({"layers": [0, 0]}, "each once"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        report(thin(), **config)


def test_dense_models_and_empty_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 mixture layers and 1 batches"):
        report(adopt(tiny_model("llama")))
    use = method("inspect.expert_redundancy")
    with pytest.raises(ConfigError, match="2 mixture layers and 0 batches"):
        use.entry("measure")(MeterInputs(model=thin()), use.configure({}))


def test_routers_of_varying_counts_can_be_closed_but_not_added_to() -> None:
    router = {"method": "train.dynamic_moe", "config": {"p": 0.4}}
    plain = model_of("train.moe", num_experts=6, expert_size=4, router=router)
    found = report(plain, shares=[0.2]).numbers
    assert abs(found["slope: top"]) > 1e-5
    beside = model_of("train.moe", num_experts=6, expert_size=4, router=router, shared=4)
    with pytest.raises(ConfigError, match="no fixed number of experts"):
        report(beside, shares=[0.2])
