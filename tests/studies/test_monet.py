"""Arms of equal parameters on text nobody saw, masks by the rule each arm names, and sums over domains by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.registry import method
from moestro.core.session import session
from moestro.studies import monet as subject
from moestro.studies._framework import BUDGETS
from moestro.studies.monet import DOMAINS, masks_of


FULL = subject.scale(BUDGETS["full"])
CI = subject.scale(BUDGETS["ci"])
METER = method("inspect.domain_experts").module
# Two layers of 6 experts, 4 domains. At ratio 2 the first domain owns expert 0, at 1.3 expert 1 too; in the second
# layer it owns nothing at 2 and expert 5 at 1.3. Expert 3 is the busiest of all and nobody's.
SCORES = {
    "a": torch.tensor([[0.4, 0.3, 0.0, 0.9, 0.1, 0.0], [0.1, 0.2, 0.3, 0.9, 0.1, 0.0], [0.1, 0.2, 0.1, 0.9, 0.1, 0.0],
                       [0.2, 0.2, 0.0, 0.8, 0.1, 0.3]]),
    "b": torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
                       [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]]),
}  # fmt: skip


def rows_of(batches: list[dict[str, Tensor]]) -> set[tuple[int, ...]]:
    return {tuple(ids) for batch in batches for ids in batch["input_ids"].tolist()}


# -- text ---------------------------------------------------------------------------------------------------------


def test_domains_are_read_in_equal_shares_and_nothing_that_was_read_or_probed_is_asked() -> None:
    data = subject.text("full")
    rows = [tuple(row["input_ids"].tolist()) for row in data.train.sources["data"]]
    assert len(rows) == FULL.steps * FULL.batch
    read = [set(rows[place :: len(DOMAINS)]) for place in range(len(DOMAINS))]
    probed = [rows_of(data.probe[domain]) for domain in DOMAINS]
    for place, domain in enumerate(DOMAINS):
        asked = rows_of(data.heldout[domain])
        assert len(probed[place]) > len(asked) >= 10
        assert len(probed[place] & read[place]) >= 20
        for other in range(len(DOMAINS)):
            assert not asked & (read[other] | probed[other]), (domain, DOMAINS[other])
            assert other == place or not probed[place] & (read[other] | probed[other])


def test_paragraphs_that_were_read_are_not_asked() -> None:
    known, new = (
        "a licence header that stands in every file of the library",
        "a paragraph that nobody has read before now",
    )
    found = subject.unseen([f"{known}\n\n{new}", known.replace(" that", "\nthat"), "short"], [f"x\n\n{known}", "short"])
    assert found == [new, "short"]  # what is short may stand on both sides


def test_held_out_documents_are_cleared_of_all_training_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(subject, "unseen", lambda texts, train: given.append((texts, train)) or texts)
    subject.text.__wrapped__("ci")
    for domain, (texts, train) in zip(DOMAINS, given, strict=True):
        assert sorted(texts + train) == sorted(subject.documents(domain))
        assert texts == subject.documents(domain)[:: subject.HELDOUT_OF]


# -- models -------------------------------------------------------------------------------------------------------


def test_arms_spend_the_same_parameters() -> None:
    count = {
        kind: sum(p.numel() for p in subject.build(FULL, kind, 0).model.layers.parameters())
        + sum(p.numel() for p in subject.build(FULL, kind, 0).moestro_shared.parameters())
        for kind in ("monet_vd", "monet_hd", "dense", "moe")
    }
    assert count["monet_vd"] == count["monet_hd"]
    for kind in ("dense", "moe"):
        assert 0.99 <= count[kind] / count["monet_vd"] <= 1.0, kind
    assert {type(b.mlp).__name__ for b in subject.build(FULL, "dense", 0).model.layers} == {"Squared"}


def test_everything_but_the_feed_forwards_starts_alike() -> None:
    first, *others = (
        {name: value for name, value in subject.build(CI, kind, 1).state_dict().items() if "mlp" not in name}
        for kind in ("dense", "moe", "monet_vd", "monet_hd")
    )
    shared = {name for name in first if not name.startswith("moestro_shared")}
    assert len(shared) > 5
    assert all(torch.equal(other[name], first[name]) for other in others for name in shared)


@pytest.mark.parametrize("kind", ["monet_vd", "monet_vd_short", "monet_hd", "moe", "dense", "dense_short"])
def test_training_of_an_arm(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses weigh 1e-3 on their means over routers; short arms take half the steps."""
    seen: dict[str, Any] = {}

    def noted(model: Any, data: Any, size: Any, seed: int, *, steps: int, losses: dict[str, float]) -> None:
        seen.update(steps=steps, losses=losses)

    monkeypatch.setattr(subject, "train", noted)
    monkeypatch.setattr(subject, "text", lambda name: SimpleNamespace(train=None))
    model = subject.trained.__wrapped__(kind, 0, "full")
    assert not model.training
    assert seen["steps"] == (120 if kind.endswith("short") else 240)
    if not kind.startswith("monet"):
        assert seen["losses"] == ({"balance": 0.01} if kind == "moe" else {})
        return
    with torch.no_grad(), session(collect=True) as opened:
        model(torch.arange(12).view(1, 12))
    (ctx,) = opened.take()
    assert set(seen["losses"]) == {"uniformity", "ambiguity"}
    for name, weight in seen["losses"].items():
        halves = [term for (_, key), term in ctx.losses.items() if key == name]
        assert len(halves) == 2 * 2  # axes, routers
        assert weight * len(halves) / 2 == pytest.approx(1e-3)


# -- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "first", "second"),
    [
        ("monet_vd", [0], []),
        ("monet_hd", [0], []),
        ("moe", [0], []),
        ("monet_loose", [0, 1], [5]),
        ("moe_most", [0], [5]),
    ],
)
def test_the_experts_of_a_domain(arm: str, first: list[int], second: list[int]) -> None:
    found = masks_of(arm, SCORES, 0, 0)
    assert {site: mask.nonzero().squeeze(1).tolist() for site, mask in found.items()} == {"a": first, "b": second}


def test_the_most_typical_expert_need_not_be_the_busiest_and_there_is_always_one() -> None:
    """Over the mean of the others; the third domain has none more typical than what all use."""
    for place, expert in enumerate([0, 2, 3, 5]):
        assert masks_of("moe_most", SCORES, place, 0)["a"].nonzero().tolist() == [[expert]], place
        assert int(masks_of("moe_most", SCORES, place, 0)["b"].sum()) == 1


def test_at_random_go_as_many_of_each_layer() -> None:
    scores = {"a": torch.rand(4, 48, 48, generator=torch.Generator().manual_seed(0))}
    chosen, drawn, again = (masks_of(arm, scores, 1, seed)["a"] for arm, seed in
                            (("monet_vd", 3), ("monet_random", 3), ("monet_random", 4)))  # fmt: skip
    assert int(chosen.sum()) == int(drawn.sum()) == int(again.sum()) > 10
    assert int((chosen & drawn).sum()) < 0.5 * int(chosen.sum())
    assert not torch.equal(drawn, again)


def test_what_masking_does_is_summed_over_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rises: 0.4 at others' 0.1 counts; 0.09 is too little; 0.3 at 0.11 is not three times; 0.5 at -0.1 counts."""
    changes = iter(
        torch.tensor(
            [[0.4, 0.1, 0.1, 0.1], [0.0, 0.09, 0.0, 0.0], [0.11, 0.11, 0.3, 0.11], [-0.1, -0.1, -0.1, 0.5]]
        ).double()
    )
    asked: list[Any] = []

    def loss_changes(model: Any, domains: Any, masks: Any, plain: Any) -> Tensor:
        asked.append((domains, masks, plain))
        return next(changes)

    monkeypatch.setattr(subject, "_meter", lambda: SimpleNamespace(**{**vars(METER), "loss_changes": loss_changes}))
    data = SimpleNamespace(heldout="held out", probe="probe")
    found = subject.forget("monet_vd", None, SCORES, data, [1.0] * 4, 0)
    assert found == pytest.approx(
        {
            "domains_cut_out": 2,
            "own_rise": (0.4 + 0.09 + 0.3 + 0.5) / 4,
            "others_rise": (0.1 + 0 + 0.11 - 0.1) / 4,
            "gap": (0.4 + 0.09 + 0.3 + 0.5 - 0.11) / 4,
            "masked_share": 3 / 12 / 4,  # experts 0, 2 and 5 of the first, second and fourth domain
        }
    )
    assert [domains for domains, _, _ in asked] == ["held out"] * 4


def test_arms_that_only_mask_otherwise_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[tuple[str, str]] = []
    monkeypatch.setattr(subject, "trained", lambda kind, seed, name: models.append(("trained", kind)))
    monkeypatch.setattr(subject, "scored", lambda kind, seed, name: models.append(("scored", kind)) or {})
    monkeypatch.setattr(subject, "forget", lambda arm, *_: {"arm": arm})
    monkeypatch.setattr(subject, "text", lambda name: SimpleNamespace(heldout={"x": [], "y": []}))
    monkeypatch.setattr(subject, "_meter", lambda: SimpleNamespace(loss=lambda model, batches: 1.0))
    kinds = {}
    for arm in subject.STUDY.arms:
        models.clear()
        found = subject.run(arm.name, 0, BUDGETS["full"])
        kinds[arm.name] = {kind for _, kind in models}
        assert found.get("arm", arm.name) == arm.name
    assert kinds == {
        "monet_vd": {"monet_vd"}, "monet_random": {"monet_vd"}, "monet_loose": {"monet_vd"}, "monet_hd": {"monet_hd"},
        "monet_vd_short": {"monet_vd_short"}, "moe": {"moe"}, "moe_most": {"moe"}, "dense": {"dense"},
        "dense_short": {"dense_short"},
    }  # fmt: skip
