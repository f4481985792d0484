"""The oracle over routes: bounds, counts, ties, readings; what is forced is what runs."""

from math import comb

import pytest
import torch

import moestro
import moestro.models.load
from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.inspect.route_oracle import Force, first_minimum, matching_drop, patterns, subject_of
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model


ORACLE = method("inspect.route_oracle")


def duo(layers: int = 3, **config: object) -> torch.nn.Module:
    model = moestro.models.load.adopt(tiny_model("llama", num_hidden_layers=layers))
    swap(model, "train.duo_llm", {"small_ratio": 4, "route": "fixed", **config})
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.bank.parameters():
                parameter.normal_(std=0.4)
    return model.eval()


def batches(rows: int = 3, width: int = 8) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 97, (rows, width), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": ids}]


def test_patterns_are_counted_and_ordered() -> None:
    every = patterns(5, 2)
    assert every.shape == (32, 5)
    assert len({tuple(p) for p in every.tolist()}) == 32
    counts = (every == 0).sum(1).tolist()
    assert [counts.count(b) for b in range(6)] == [comb(5, b) for b in range(6)]
    assert counts == sorted(counts)
    assert patterns(3, 3).shape == (27, 3)
    assert patterns(2, 2).tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]


def test_ties_go_to_the_first_pattern() -> None:
    best, place = first_minimum(torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 0.0], [0.0, 2.0, 0.0]]))
    assert best.tolist() == [0.0, 2.0, 0.0]
    assert place.tolist() == [2, 1, 1]


def test_a_forced_pattern_is_the_model_built_that_way() -> None:
    model, given = duo(), batches()
    choices = [[0], [1]]
    layers = list(mixture_layers(model).values())
    for pattern in patterns(3, 2):
        edit = Force(pattern, [layer.site for layer in layers], choices)
        with torch.no_grad(), session(edits=[edit]):
            forced = model(**given[0]).logits
        kept = [layer.router.config for layer in layers]
        for layer, choice in zip(layers, pattern.tolist(), strict=True):
            layer.router.config = layer.router.config.model_copy(update={"fixed": ("big", "small")[choice]})
        with torch.no_grad():
            built = model(**given[0]).logits
        for layer, config in zip(layers, kept, strict=True):
            layer.router.config = config
        assert torch.equal(forced, built), pattern


def by_hand(model: torch.nn.Module, given: list[dict[str, torch.Tensor]], num_choices: int) -> torch.Tensor:
    """Losses [P, N] of all patterns from cross-entropy."""
    sites = [layer.site for layer in mixture_layers(model).values()]
    rows = []
    for pattern in patterns(len(sites), num_choices):
        with torch.no_grad(), session(edits=[Force(pattern, sites, [[i] for i in range(num_choices)])]):
            logits = model(**given[0]).logits
        ids = given[0]["input_ids"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rows.append(loss)
    return torch.stack(rows)


def measure(model: torch.nn.Module, given: list[dict[str, torch.Tensor]], **config: object):
    return ORACLE.entry("measure")(MeterInputs(model=model, batches=given, seed=3), ORACLE.configure(config))


def test_the_table_is_the_minimum_over_the_patterns_of_a_budget() -> None:
    model, given = duo(), batches()
    loss = by_hand(model, given, 2)
    every = patterns(3, 2)
    report = measure(model, given, null=False)
    rows = report.tables["budgets"].rows
    assert [row[1] for row in rows] == [comb(3, b) for b in range(4)]
    for budget, row in enumerate(rows):
        mine = loss[(every == 0).sum(1) == budget]
        assert row[2] == pytest.approx(float(mine.amin(0).mean()), abs=1e-5)
        assert row[6] == pytest.approx(float(mine.mean()), abs=1e-5)
        assert row[2] <= row[5] + 1e-6  # no fixed pattern beats the oracle
        assert row[2] <= row[4] + 1e-6  # nor a choice without the label
        assert row[3] is None
    assert report.numbers["oracle"] == pytest.approx(float(loss.amin(0).mean()), abs=1e-5)
    assert report.numbers["oracle"] <= min(row[2] for row in rows) + 1e-6  # a larger set is never worse
    assert report.numbers["first choice everywhere"] == pytest.approx(float(loss[-1].mean()), abs=1e-5)
    assert report.numbers["last choice everywhere"] == pytest.approx(float(loss[0].mean()), abs=1e-5)
    place = loss.argmin(0)
    usage = [row[2] for row in report.tables["usage"].rows]
    assert usage == pytest.approx((every[place] == 0).float().mean(0).tolist())


def test_skipping_is_a_choice_too() -> None:
    model, given = duo(layers=2, skip=True), batches()
    report = measure(model, given, null=False)
    assert report.numbers["patterns"] == 9
    loss = by_hand(model, given, 3)
    assert report.numbers["oracle"] == pytest.approx(float(loss.amin(0).mean()), abs=1e-5)
    bare = duo(layers=2, skip=True, fixed="skip")  # all skip: attention only
    bare.load_state_dict(model.state_dict())
    assert report.numbers["last choice everywhere"] == pytest.approx(
        measure(bare, given, null=False).numbers["router loss"]
    )


def test_batched_and_one_by_one_agree() -> None:
    model, given = duo(), batches()
    together = measure(model, given, null=False)
    apart = measure(model, [{"input_ids": row[None]} for row in given[0]["input_ids"]], null=False)
    for name, value in together.numbers.items():
        assert apart.numbers[name] == pytest.approx(value, abs=1e-5), name


def test_padding_is_no_token() -> None:
    model, given = duo(), batches(rows=1)
    ids = given[0]["input_ids"]
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 8]),
    }
    plain, with_pads = measure(model, given, null=False), measure(model, [padded], null=False)
    assert with_pads.numbers["tokens"] == plain.numbers["tokens"] == 7
    assert with_pads.numbers["oracle"] == pytest.approx(plain.numbers["oracle"], abs=1e-5)


def test_the_sequential_reading() -> None:
    model = duo()
    (pair,) = batches(rows=4, width=2)
    report = measure(model, [pair], null=False, sequential=100)
    assert report.numbers["sequential tokens"] == 4
    assert report.numbers["sequential oracle"] == pytest.approx(report.numbers["oracle"], abs=1e-5)  # length 1
    given = batches(rows=2, width=6)
    one = measure(model, given, null=False, sequential=100, choices=[[0]])  # one pattern: ordinary decoding
    assert one.numbers["sequential oracle"] == pytest.approx(one.numbers["first choice everywhere"], abs=1e-5)
    greedy = measure(model, given, null=False, sequential=7)
    assert greedy.numbers["sequential tokens"] == 7
    assert greedy.numbers["sequential oracle"] < greedy.numbers["sequential router"]


def test_the_sequential_reading_keeps_what_it_chose() -> None:
    """Redone with a plain loop: the context of a token are the patterns chosen before it."""
    model = duo(layers=2)
    ids = batches(rows=1, width=5)[0]["input_ids"][0]
    sites, every = [layer.site for layer in mixture_layers(model).values()], patterns(2, 2)
    kept, total = [], 0.0
    for t in range(4):
        losses = []
        for pattern in every:
            table = torch.stack([*kept, pattern])
            with torch.no_grad(), session(edits=[Force(table, sites, [[0], [1]])]):
                logits = model(input_ids=ids[None, : t + 1]).logits[0, -1]
            losses.append(float(-logits.log_softmax(-1)[ids[t + 1]]))
        best = min(range(4), key=lambda i: losses[i])
        kept.append(every[best])
        total += losses[best]
    report = measure(model, [{"input_ids": ids[None]}], null=False, sequential=9)
    assert report.numbers["sequential oracle"] == pytest.approx(total / 4, abs=1e-5)


def test_the_null_drops_at_the_rate_that_spreads_alike_and_gains_by_luck() -> None:
    model, given = duo(), batches(rows=6)
    report = measure(model, given)
    for budget, row in enumerate(report.tables["budgets"].rows):
        if budget in (0, 3):  # a single pattern: no luck to be had
            assert row[3] == pytest.approx(row[2], abs=1e-6)
        else:
            assert row[3] < row[6]
    subject = subject_of(MeterInputs(model=model, batches=given), ORACLE.configure({}))
    base = torch.zeros(3, dtype=torch.int64)
    draw = torch.Generator().manual_seed(0)
    assert matching_drop(subject, base, 0.0, draw) == 0.02
    assert matching_drop(subject, base, 1e9, draw) == 0.4


def test_dropped_assignments_keep_their_mean() -> None:
    model, given = duo(), batches(rows=40, width=12)
    layers = list(mixture_layers(model).values())
    edit = Force(torch.zeros(3, dtype=torch.int64), [layer.site for layer in layers], [[0], [1]], drop=0.2)
    edit.generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), session(edits=[edit], collect=True) as opened:
        model(**given[0])
    (ctx,) = opened.take()
    weights = torch.cat([ctx.routings[layer.site].weight_N for layer in layers])
    assert weights.unique().tolist() == [0.0, pytest.approx(1.25)]
    assert float(weights.mean()) == pytest.approx(1.0, abs=0.05)


def test_any_mixture_can_be_asked() -> None:
    """Choices may be sets of experts; layers that do not vary keep their router's choice."""
    model = moestro.models.load.adopt(tiny_model("mixtral")).eval()
    given = batches()
    report = measure(model, given, null=False, layers=[1], choices=[[0, 1], [2, 3], [4]])
    assert report.numbers["patterns"] == 3
    with torch.no_grad():
        own = model(**given[0]).logits
    ids = given[0]["input_ids"]
    loss = torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report.numbers["router loss"] == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_patterns": 7}, "2 choices in 3 layers make 8 patterns, over max_patterns=7"),
        ({"layers": [3]}, "the model has 3 routed layers, from 0"),
        ({"layers": [0, 0]}, "from 0, each once"),
        ({"choices": []}, "a set of ids"),
        ({"choices": [[0], [2]]}, "a set of ids from 0 to 1"),
        ({"choices": [[0, 0]]}, "a set of ids"),
    ],
)
def test_what_cannot_be_tried_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(duo(), batches(), **config)


def test_no_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="give texts"):
        measure(duo(), [])
