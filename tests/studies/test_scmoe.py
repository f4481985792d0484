"""The study of self-contrast: its problems, and texts that several passes write side by side, against one by one."""

import numpy as np
import pytest
import torch

from moestro.core.decoding import Route
from moestro.core.session import session
from moestro.engine.reference import ReferenceForward
from moestro.studies._chains import (
    MOST,
    SIGNS,
    STOP,
    Pass,
    Problems,
    ids,
    last_number,
    only,
    problems,
    right,
    size_of,
    write,
)
from moestro.studies._framework import BUDGETS
from moestro.studies._mixture import fresh
from moestro.studies.scmoe import joined, lower_bound


SIZE, COUNTS = size_of(BUDGETS["ci"])
PROMPTS = [ids("7+2="), ids("12+7-5="), ids("3=")]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made, draw = fresh(SIZE, 0).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():  # far from even, so that texts and routes differ
            if parameter.dim() > 1:
                parameter.normal_(0, 0.7, generator=draw)
    return made


def text(tokens: tuple[int, ...]) -> str:
    return "".join(SIGNS[token] for token in tokens)


@pytest.mark.parametrize("terms", [2, 4])
def test_steps_are_the_partial_sums_and_no_problem_is_in_two_parts(terms: int) -> None:
    size = SIZE.model_copy(update={"steps": 100})  # so many rows that each short problem would come up again
    data, dev, test = problems(size, 1, dev=40, test=80, terms=terms)
    asked = [*dev.asked, *test.asked]
    assert len(asked) == len(set(asked)) == 120
    for question, steps in zip(asked, [*dev.steps, *test.steps], strict=True):
        numbers = text(question)[:-1].replace("+", " +").replace("-", " -").split()
        sums = np.cumsum([int(number) for number in numbers])
        assert 2 <= len(numbers) <= terms
        assert 0 <= sums.min() <= sums.max() <= MOST
        assert text(steps) == " ".join(map(str, sums[1:])) + "."
    held = set(map(text, asked))
    (rows,) = data.sources.values()
    for row in rows:
        whole = text(tuple(row["input_ids"]))
        assert held.isdisjoint(part.split("=")[0] + "=" for part in whole.split(".") if "=" in part)


@pytest.mark.parametrize("route", [None, Route(kind="rank", k=2), Route(kind="threshold", threshold=0.5)])
def test_texts_side_by_side_are_texts_alone_without_a_cache(model: torch.nn.Module, route: Route | None) -> None:
    """Prompts are padded on the left, and every pass keeps keys and values."""
    edits = [] if route is None else [ReferenceForward(model, pages=1).override(route)]
    alone = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.inference_mode(), session(edits=edits):
            while len(tokens) < len(prompt) + 7 and tokens[-1] != STOP:
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        alone.append(tuple(tokens[len(prompt) :]))
    assert write([Pass(model, route, PROMPTS)], only, 7) == alone
    assert len(set(alone)) > 1


def test_both_passes_stand_behind_the_same_text(model: torch.nn.Module) -> None:
    weak = Route(kind="rank", k=3)
    found = write([Pass(model, None, PROMPTS), Pass(model, weak, PROMPTS)], joined(0.05, 2.0), 6)
    edit = ReferenceForward(model, pages=1).override(weak)
    for prompt, written in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for token in written:
            with torch.inference_mode():
                strong = model(input_ids=torch.tensor([tokens])).logits[0, -1].numpy()
                with session(edits=[edit]):
                    weaker = model(input_ids=torch.tensor([tokens])).logits[0, -1].numpy()
            assert token == joined(0.05, 2.0)([strong, weaker]).argmax()
            tokens.append(token)
    assert found != write([Pass(model, None, PROMPTS)], only, 6)


def test_the_last_number_decides_and_a_text_without_an_end_is_wrong() -> None:
    assert [last_number(ids(one)) for one in ("9 14.", "14.", "9 14", "", ".")] == ["14", "14", None, None, ""]
    asked = Problems((ids("1+1="),) * 4, (ids("2."), ids("2."), ids("2."), ids("7 2.")))
    assert right([ids("2."), ids("3."), ids("2"), ids("9 2.")], asked).tolist() == [True, False, False, True]


def test_the_bootstrap_s_lower_end() -> None:
    gain = np.repeat([1.0, 0.0, -1.0], [30, 60, 10])  # mean 0.2, standard error 0.06
    assert lower_bound(gain) == pytest.approx(0.2 - 1.96 * 0.06, abs=0.015)
    assert lower_bound(np.zeros(50)) == 0
