"""Easy data augmentation: what changes, what never does, and where answers stand afterwards."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.errors import ConfigError
from moestro.data.augment import Eda, Neighbours, back_translate, cased, eda, pieces_of
from moestro.data.spans import Question


TABLE = {"old": ["ancient"], "king": ["ruler", "monarch"], "town": ["city"], "lives": ["dwells"]}
CONTEXT = "The Old king, a wise king, lives in an OLD town."


def synonyms(word: str) -> list[str]:
    return TABLE.get(word, [])


def question(*answers: str, context: str = CONTEXT) -> Question:
    return Question("Who?", context, tuple((context.rindex(text), text) for text in answers))


def run(one: Question, seed: int = 0, **settings: Any) -> list[Question]:
    return eda([one], Eda(**settings), synonyms, np.random.default_rng(seed)).questions


def test_every_word_with_a_synonym_is_replaced_and_looks_like_the_old_one() -> None:
    (new,) = run(question("wise king"), sr=1.0, copies=1)
    assert new.context in {
        f"The Ancient {one}, a wise king, dwells in an ANCIENT city." for one in ("ruler", "monarch")
    }
    assert new.answers == ((new.context.index("wise king"), "wise king"),)


def test_one_word_at_least_and_at_most_the_share_is_replaced() -> None:
    for seed in range(20):
        changed = []
        for share in (0.01, 0.21):  # of 10 words that are no answer: 1 and 2
            (new,) = run(question("wise"), seed, sr=share, copies=1)
            pairs = zip(CONTEXT.split(), new.context.split(), strict=True)
            changed.append(sum(a != b for a, b in pairs))
        assert changed == [1, 2]


@pytest.mark.parametrize("way", ["sr", "ri", "rs", "rd"])
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0), data=st.data())
def test_no_operation_touches_an_answer_and_every_place_points_at_it(
    way: str, seed: int, share: float, data: Any
) -> None:
    words = [*TABLE, "wise", "ümlaut", "3rd", "x,", "don't"]
    context = " ".join(data.draw(st.lists(st.sampled_from(words), min_size=3, max_size=12)))
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(context) - 1), st.integers(1, 9)), max_size=3))
    one = Question("?", context, tuple((at, context[at : at + size]) for at, size in spans))
    shares = dict.fromkeys(("sr", "ri", "rs", "rd"), 0.0) | {way: share}
    found = eda([one], Eda(**shares, copies=3), synonyms, np.random.default_rng(seed))
    assert len(found.questions) + found.unchanged == 3
    for new in found.questions:
        assert new.context != context
        assert [text for _, text in new.answers] == [text for _, text in one.answers]
        assert new.misplaced() is None


def test_the_later_mention_of_two_stays_the_answer() -> None:
    one = question("king")
    for seed in range(10):
        for new in run(one, seed, sr=1.0, copies=1):
            before = new.context[: new.answers[0][0]]
            assert "king" not in before  # the first mention was replaced, and is not taken for the answer
            assert "wise" in before


def test_swaps_keep_the_words_and_deletion_keeps_some() -> None:
    one = question("wise")
    (swapped,) = run(one, rs=0.5, sr=0, copies=1)
    assert sorted(swapped.context.replace(",", "").replace(".", "").split()) == sorted(
        CONTEXT.replace(",", "").replace(".", "").split()
    )
    (gone,) = run(one, rd=1.0, sr=0, copies=1)
    assert "".join(gone.context.split()) == ",awise,.".replace("a", "", 1)


def test_inserted_words_are_synonyms_beside_the_old_text() -> None:
    (new,) = run(question("wise"), ri=0.21, sr=0, copies=1)
    more = new.context.replace(",", "").replace(".", "").split()
    for word in CONTEXT.replace(",", "").replace(".", "").split():
        more.remove(word)
    assert len(more) == 2
    assert set(more) <= {word for words in TABLE.values() for word in words}


def test_copies_take_turns_and_losses_are_counted() -> None:
    lost = Question("Who?", CONTEXT, ((0, "king"),))
    fixed = Question("Who?", "wise", ((0, "wise"),))
    found = eda([lost, fixed, question("wise")], Eda(sr=0.5, rd=1.0), synonyms, np.random.default_rng(0))
    assert (found.lost, found.unchanged) == (1, 4)
    assert found.sources == [2] * 4
    assert [",," in q.context.replace(" ", "").replace("wise", "") for q in found.questions] == [False, True] * 2


def test_pieces_are_the_context_and_answers_may_overlap() -> None:
    one = Question("?", CONTEXT, ((4, "Old king"), (8, "king, a")))
    pieces, begins = pieces_of(one)
    assert "".join(piece.text for piece in pieces) == CONTEXT
    assert [pieces[begin].text for begin in begins] == ["Old ", "king"]
    assert [piece.text for piece in pieces if piece.free][:2] == ["The", "wise"]


def test_neighbours_are_the_nearest_whole_words() -> None:
    class Vocabulary:
        def get_vocab(self) -> dict[str, int]:
            return {"big": 0, "large": 1, "##ish": 2, "small": 3, "Big": 4, "a1b": 5, "the": 6}

    table = torch.tensor([[1.0, 0.1], [2.0, 0.0], [1.0, 0.1], [0.0, 9.0], [1.0, 0.1], [1.0, 0.1], [1.0, 0.1]])
    near = Neighbours(Vocabulary(), table)  # type: ignore[arg-type]
    assert near("big") == ("large",)
    assert near("##ish") == near("the") == near("unknown") == near("small") == ()
    wide = Neighbours(Vocabulary(), table, threshold=0.05)  # type: ignore[arg-type]
    assert wide("big") == ("large", "small")


def test_case_follows() -> None:
    assert [cased("city", like) for like in ("town", "Town", "TOWN", "A")] == ["city", "City", "CITY", "City"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sr": 0.0}, "all 0: nothing would change"),
        ({"sr": 1.2}, r"sr=1.2: a share of the words lies between 0 and 1"),
        ({"rd": -0.1}, "rd=-0.1"),
        ({"copies": 0}, "copies=0; at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Eda(**settings)


def test_letters_inside_a_name_are_no_word() -> None:
    one = Question("Who?", "An int32 of old_king is utf8s, not old.", ())
    pieces, _ = pieces_of(one)
    assert [piece.text for piece in pieces if piece.free] == ["An", "of", "is", "not", "old"]


def test_a_share_is_taken_as_it_is_written() -> None:
    context = " ".join(["old"] * 100)  # 0.57 * 100 is below 57 in floating point
    (new,) = run(Question("Who?", context, ()), sr=0.57, copies=1)
    assert new.context.split().count("ancient") == 57


def test_swaps_go_on_for_their_share_and_deletion_takes_its_share() -> None:
    context = " ".join(a + b for a in "abcdefghij" for b in "klmnopqrst")
    one = Question("Who?", context, ())
    (swapped,) = run(one, rs=0.2, sr=0, copies=1)  # 20 swaps of two words; one swap moves two
    moved = sum(a != b for a, b in zip(context.split(), swapped.context.split(), strict=True))
    assert 20 < moved <= 40
    left = [len(new.context.split()) for new in run(one, rd=0.2, sr=0, copies=50)]
    assert sum(left) / 50 == pytest.approx(80, abs=4 * (100 * 0.2 * 0.8 / 50) ** 0.5)


# -- there and back ----------------------------------------------------------------------------------------------

LONG = "It rains. The king lives here!  He is old. He is wise.\nNobody asks where he was born or when?"


def translated(*answers: str, chunk: int = 100) -> tuple[Question, list[str]]:
    asked: list[str] = []

    def shout(text: str) -> str:
        asked.append(text)
        return f"<{text.upper()}>"

    (new,) = back_translate([question(*answers, context=LONG)], shout, chunk=chunk).questions
    return new, asked


def test_sentences_without_an_answer_go_there_and_back_in_chunks() -> None:
    new, asked = translated("king", chunk=24)
    assert asked == ["It rains.", "He is old. He is wise.", "Nobody asks where he was", "born or when?"]
    assert new.context == (
        "<IT RAINS.> The king lives here!  <HE IS OLD. HE IS WISE.> <NOBODY ASKS WHERE HE WAS> <BORN OR WHEN?>"
    )
    assert new.answers == ((new.context.index("king"), "king"),)
    assert new.question == "Who?"


def test_chunks_are_counted_in_bytes() -> None:
    one, asked = Question("Who?", "éé éé éé", ()), []
    back_translate([one], lambda text: asked.append(text) or text.upper(), chunk=9)  # type: ignore[func-returns-value]
    assert asked == ["éé éé", "éé"]


def test_every_sentence_an_answer_touches_stays_and_what_changed_is_told() -> None:
    new, asked = translated("here!  He is", "wise")
    assert asked == ["It rains.", "Nobody asks where he was born or when?"]
    assert new.misplaced() is None
    assert [text for _, text in new.answers] == ["here!  He is", "wise"]
    one = question("king", context=LONG)
    lost = Question("Who?", LONG, ((0, "king"),))
    whole = Question("Who?", "The king.", ((4, "king"),))
    found = back_translate([lost, one, whole], str.upper)
    assert (found.lost, found.unchanged, found.sources) == (1, 1, [1])
    plain = question("king", context="It rains. The king lives.")
    assert back_translate([plain], lambda text: text).unchanged == 1
    with pytest.raises(ConfigError, match="chunk=0 bytes; at least 1"):
        back_translate([one], str.upper, chunk=0)
