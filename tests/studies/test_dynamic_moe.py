"""The parts of the study of top-p routing that a verdict rests on: the control, the text, the course of training."""

import keyword
import random

import pytest
import torch

from moestro.core.context import RoutingContext
from moestro.core.registry import method
from moestro.core.routing import Scores
from moestro.core.session import Session
from moestro.core.site import Shared, Site
from moestro.core.tokens import Tokens
from moestro.studies import dynamic_moe as study
from moestro.studies._framework import BUDGETS


TOKENS = 200


@pytest.fixture
def routed():
    """A top-p router, its routing of tokens of every degree of certainty, and the context."""
    use = method("train.dynamic_moe")
    site = Site(path="mlp", kind="mlp", module=torch.nn.Identity(), dim=4)
    router = use.build(site, use.configure({"num_experts": 8, "p": 0.4}), Shared())
    logits = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(0))
    probability = logits.softmax(-1)
    places = torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS), torch.ones(TOKENS, dtype=torch.bool)
    ctx = RoutingContext("model", Session(), Tokens(*places, None, 1, TOKENS))
    return router, router.choose(Scores(logits, probability, probability, probability), ctx), ctx


def test_the_control_deals_the_same_numbers_to_other_tokens(routed):
    router, routing, ctx = routed
    torch.manual_seed(0)
    dealt = study.Dealt().on_routing("mlp", routing, router, ctx)
    before, after = (torch.bincount(one.token_N, minlength=TOKENS) for one in (routing, dealt))
    assert torch.equal(before.sort().values, after.sort().values)
    assert len(before.unique()) >= 3
    assert int((before != after).sum()) > TOKENS // 4
    probability = routing.scores.probabilities()
    for token in range(TOKENS):
        mine = dealt.token_N == token
        best = probability[token].topk(int(after[token]))
        assert dealt.expert_N[mine].tolist() == best.indices.tolist()
        assert dealt.weight_N[mine].tolist() == best.values.tolist()


def test_the_hard_text_differs_in_its_identifiers_only():
    text = "def function_name(argument):\n    return argument + 12  # a remark\n"
    hard = study.scramble(text, random.Random(1))
    assert hard != text
    words, mixed = study.IDENTIFIER.findall(text), study.IDENTIFIER.findall(hard)
    assert [sorted(word) for word in words] == [sorted(word) for word in mixed]
    assert all(word == other for word, other in zip(words, mixed, strict=True) if keyword.iskeyword(word))
    assert study.IDENTIFIER.sub("", text) == study.IDENTIFIER.sub("", hard)


def test_rows_alternate_and_p_is_calibrated_on_training_rows():
    size = study.scale(BUDGETS["ci"])
    data, known, heldout = study.data_of(size, "ci")
    trained = {row.tobytes() for row in data.sources["data"].ids_NS}
    assert {row.tobytes() for row in known.ids_NS} <= trained
    assert not {row.tobytes() for row in heldout.ids_NS} & trained
    words = [b"".join(bytes([byte - 1]) for byte in row.tolist() if byte) for row in heldout.ids_NS]
    common = [sum(line.count(word) for word in (b"self", b"the", b"name")) for line in words]
    assert sum(common[0::2]) > 2 * sum(common[1::2]), "even rows are plain, odd ones scrambled"


def test_the_course_of_training_is_read_at_a_tenth_and_at_the_end():
    course = study.Course()
    course.counts = {"a": [5.0] * 4 + [3.0] * 30 + [1.0] * 6, "b": [3.0] * 4 + [3.0] * 30 + [2.0] * 6}
    found = course.numbers()
    assert [found[f"experts_at_{place}"] for place in ("start", "tenth", "end")] == [4, 3, 1.5]
    assert found["fall"] == 0.5
    assert found["experts_in_training"] == pytest.approx((4 * 4 + 30 * 3 + 6 * 1.5) / 40)


def test_numbers_that_never_vary_follow_nothing():
    hard = torch.tensor([True, False, True, False])
    loss = torch.tensor([4.0, 1.0, 3.0, 2.0])
    same = study.measure(study.Seen(loss, torch.full((4, 2), 2.0).double(), hard, []), loss)
    assert (same["spearman"], same["spread"], same["hard_minus_easy"]) == (0, 0, 0)
    experts = torch.tensor([[4.0, 2.0], [1.0, 1.0], [3.0, 1.0], [2.0, 1.0]]).double()
    found = study.measure(study.Seen(loss, experts, hard, []), loss)
    assert found["spearman"] == pytest.approx(1)
    assert found["hard_minus_easy"] == pytest.approx(2.5 - 1.25)
    assert found["first_minus_last"] == pytest.approx(1.25)
    assert found["hard_loss_gap"] == pytest.approx(2)
