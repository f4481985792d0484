"""inspect.property_probe: scores by hand and against plain loops, what chance is, what the code of a layer is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro import surgery
from moestro.core.errors import ConfigError, DataError
from moestro.core.inputs import MeterInputs, PlanInputs
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.report import Report
from moestro.core.session import session
from moestro.methods.inspect import property_probe as subject
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, logits


METER = method("inspect.property_probe")


def config(**values: Any) -> subject.Config:
    return subject.Config(**{"min_active": 1, "min_true": 1, **values})


def whole(value_TF: Tensor) -> list[subject.Block]:
    """A code as one run of units that are active anywhere."""
    return [(torch.arange(len(value_TF)), value_TF)]


def bools(*columns: str) -> Tensor:
    """Columns of 0 and 1 as bool [T, P]."""
    return torch.tensor([[digit == "1" for digit in column] for column in columns]).T


def halves(count: int) -> Tensor:
    """Even tokens are for fitting."""
    return torch.arange(count) % 2 == 0


# -- scores -------------------------------------------------------------------------------------------------------


def test_coverage_by_hand() -> None:
    """Unit 0 has its largest value 4 on fitting tokens; with 2 levels its thresholds are 0 and 2.

    z > 0: tokens 0, 1, 2, 4; z > 2: tokens 0, 1. Property 0 (tokens 0, 1): F1 1 at the higher threshold. Property 1
    (tokens 0, 1, 2, 5): 2 * 3 / (4 + 4) = 3/4 at the lower one, 2 * 2 / (2 + 4) = 2/3 at the higher.
    """
    value = torch.tensor([[4.0], [3.0], [1.0], [0.0], [2.0], [-9.0]])
    (found,) = subject.probe(whole(value), [bools("110000", "111001")], halves(6), config(levels=2))
    assert found.coverage == pytest.approx((1 + 3 / 4) / 2)
    (one,) = subject.probe(whole(value), [bools("110000", "111001")], halves(6), config(levels=1))
    assert one.coverage == pytest.approx((2 * 2 / (4 + 2) + 3 / 4) / 2)


def test_reconstruction_by_hand() -> None:
    """Unit 0 says yes on fitting tokens 0, 2 (property 0 both times), unit 1 on 2, 4 (property 1 once).

    At precision 0.95 unit 0 is given property 0 and unit 1 nothing; at 0.5 unit 1 is given properties 0 and 1. Of the
    test tokens 1, 3, 5 unit 0 says yes on 1 and 3, unit 1 on 3 and 5.
    """
    value = torch.tensor([[1.0, 0], [1, 0], [1, 1], [1, 1], [0, 1], [0, 1]])
    true = bools("101100", "010110")  # fitting tokens 0, 2: property 0; 4: property 1
    (sure,) = subject.probe(whole(value), [true], halves(6), config(levels=1))
    # token 1: told {0}, true {1}: 0; token 3: told {0}, true {0, 1}: 2/3; token 5 has no true property
    assert sure.reconstruction == pytest.approx((0 + 2 / 3) / 2)
    (loose,) = subject.probe(whole(value), [true], halves(6), config(levels=1, precision=0.5))
    # token 1: told {0}: 0; token 3: told {0, 1}: 1
    assert loose.reconstruction == pytest.approx((0 + 1) / 2)
    (twice,) = subject.probe(whole(value), [true], halves(6), config(levels=1, min_active=2))
    assert twice == sure  # unit 0 says yes exactly twice
    (rare,) = subject.probe(whole(value), [true], halves(6), config(levels=1, min_active=3))
    assert rare.reconstruction == 0.0


def plain(value_TF: Tensor, true_TP: Tensor, fit_T: Tensor, settings: subject.Config) -> tuple[float, float]:
    """Classifier by classifier, property by property, token by token."""
    best = [0.0] * true_TP.shape[1]
    told: list[set[int]] = [set() for _ in value_TF]
    for unit in value_TF.T:
        top = max(0.0, float(unit[fit_T].max()))
        for level in range(settings.levels):
            yes = unit > top * level / settings.levels
            count = int((yes & fit_T).sum())
            for p, true in enumerate(true_TP.T):
                both = int((yes & true).sum())
                best[p] = max(best[p], 2 * both / (int(yes.sum()) + int(true.sum())) if both else 0.0)
                hits = int((yes & true & fit_T).sum())
                if count >= settings.min_active and hits >= settings.precision * count:
                    for token in (yes & ~fit_T).nonzero().squeeze(1).tolist():
                        told[token].add(p)
    scores = []
    for token in (~fit_T).nonzero().squeeze(1).tolist():
        true = set(true_TP[token].nonzero().squeeze(1).tolist())
        if true:
            scores.append(2 * len(true & told[token]) / (len(true) + len(told[token])))
    return sum(best) / len(best), sum(scores) / len(scores)


@pytest.mark.parametrize("precision", [0.6, 0.95])
def test_probes_agree_with_plain_loops_over_blocks_of_units(precision: float) -> None:
    draw = torch.Generator().manual_seed(4)
    true = torch.rand(60, 5, generator=draw) < torch.tensor([0.05, 0.2, 0.4, 0.6, 0.9])
    value = torch.randn(60, 6, generator=draw) + 2.0 * true[:, [0, 1, 2, 3, 4, 0]].float()
    value[torch.rand(60, 6, generator=draw) < 0.3] = 0.0
    settings = config(levels=4, precision=precision, min_active=2)
    blocks = []
    for at in (0, 2, 4):  # runs of two units, on the tokens where one of them is not 0
        rows = value[:, at : at + 2].any(1).nonzero().squeeze(1)
        blocks.append((rows, value[rows, at : at + 2]))
    other = true[torch.randperm(60, generator=draw)]
    found = subject.probe(blocks, [true, other], halves(60), settings)
    for scored, label in zip(found, (true, other), strict=True):
        coverage, reconstruction = plain(value, label, halves(60), settings)
        assert scored.coverage == pytest.approx(coverage, abs=1e-6)
        assert scored.reconstruction == pytest.approx(reconstruction, abs=1e-6)


def test_units_that_tell_properties_stand_far_above_chance() -> None:
    draw = torch.Generator().manual_seed(2)
    true = torch.rand(400, 3, generator=draw) < 0.2
    value = true.float() * (1 + torch.rand(400, 3, generator=draw))
    mixed = subject.shuffled(true, halves(400), 0)
    told, chance = subject.probe(whole(value), [true, mixed], halves(400), config(min_active=10))
    assert (told.coverage, told.reconstruction) == (1.0, 1.0)
    assert chance.coverage < 0.5
    assert chance.reconstruction < 0.1


def test_activity_by_hand() -> None:
    """Two experts of two units; the first sees tokens 0 and 1, the second all three."""
    first = (torch.tensor([0, 1]), torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    second = (torch.tensor([0, 1, 2]), torch.tensor([[1.0, -1.0], [0.2, 0.0], [0.0, 0.0]]))
    found = subject.activity([first, second], 3, 0.0)
    assert found == pytest.approx({"L0": 4 / 3, "dead units": 1 / 4, "empty pairs": 2 / 5})
    assert subject.activity([first, second], 3, 0.5)["L0"] == pytest.approx(2 / 3)


def test_shuffling_stays_within_the_halves() -> None:
    true, fit = torch.arange(40)[:, None] < torch.tensor([10, 25]), halves(40)
    mixed = subject.shuffled(true, fit, 1)
    assert torch.equal(mixed[fit].sum(0), true[fit].sum(0))
    assert torch.equal(mixed[~fit].sum(0), true[~fit].sum(0))
    assert not torch.equal(mixed, true)
    assert torch.equal(mixed[:, 0] & ~mixed[:, 1], torch.zeros(40, dtype=torch.bool)), "rows stay whole"
    assert torch.equal(mixed, subject.shuffled(true, fit, 1))


def test_token_properties_are_the_most_frequent_ids() -> None:
    true = subject.token_properties(torch.tensor([7, 3, 7, 9, 3, 1]), 3)
    assert true.T.tolist() == [
        [i in (1, 4) for i in range(6)],
        [i in (0, 2) for i in range(6)],
        [i == 5 for i in range(6)],
    ]


# -- models -------------------------------------------------------------------------------------------------------


def model() -> Any:
    """A tiny Llama with random MoE-X layers."""
    made = adopt(tiny_model("llama"))
    swap(made, "train.moe_x", {"num_experts": 5, "top_k": 2, "expert_size": 20})
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in mixture_layers(made).values():
            for parameter in layer.parameters():
                parameter.normal_(0.0, 0.3, generator=draw)
    return made.eval()


def measure(made: Any, batches: list[dict[str, Tensor]], **values: Any) -> Report:
    settings = METER.configure({"min_active": 1, "min_true": 1, **values})
    report: Report = METER.entry("measure")(MeterInputs(name="tiny", model=made, batches=batches), settings)
    return report


def test_the_code_is_what_the_experts_compute() -> None:
    made = model()
    site, layer = next(iter(mixture_layers(made).items()))
    with torch.no_grad(), session(keeps=("input",), collect=True) as opened:
        made(input_ids=ids())
        (ctx,) = opened.take()
    x, routing = ctx.kept[site, "input"], ctx.routings[site]
    _, codes = subject.run(MeterInputs(model=made, batches=[{"input_ids": ids()}]), {site: layer})
    code = torch.zeros(14, 5, 20)
    with torch.no_grad():
        for expert, (rows, values) in enumerate(subject.blocks(layer.bank, codes[site])):
            code[rows, expert] = values
        wide = torch.einsum("td,eid->tei", x, layer.bank.up_proj).relu()
        weight = torch.zeros(14, 5).index_put((routing.token_N, routing.expert_N), routing.weight_N)
        torch.testing.assert_close(code, wide * weight[:, :, None], atol=1e-6, rtol=1e-5)
        out = torch.einsum("tei,eoi->to", code, layer.bank.down_proj)
        torch.testing.assert_close(out, layer.run_experts(x, routing), atol=1e-5, rtol=1e-5)
    report = measure(made, [{"input_ids": ids()}], layers=[0], active_above=0.02)
    assert report.numbers["L0"] == pytest.approx(float((code > 0.02).sum()) / 14)
    assert report.numbers["dead units"] == pytest.approx(float((~(code > 0.02).any(0)).float().mean()))
    assert report.numbers["units"] == 100


def test_padding_counts_nowhere_and_properties_follow_their_tokens() -> None:
    made = model()
    batch = ids(4, 9)
    true = torch.stack([batch % 2 == 0, batch > 50], -1)
    plainly = measure(made, [{"input_ids": batch, "properties": true}])
    pad, none = torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3, 2, dtype=torch.bool)
    mask = torch.cat([pad, torch.ones_like(batch)], 1)
    padded = {"input_ids": torch.cat([pad, batch], 1), "attention_mask": mask, "properties": torch.cat([none, true], 1)}
    pieces = [{name: tensor[at : at + 1] for name, tensor in padded.items()} for at in range(4)]
    for batches in ([padded], pieces):
        found = measure(made, batches)
        assert found.notes == plainly.notes == {"tokens": 36, "properties": 2}
        assert found.numbers == pytest.approx(plainly.numbers, abs=1e-6)
    moved = measure(made, [{"input_ids": batch, "properties": true.roll(1, 1)}])
    assert moved.numbers["coverage"] != pytest.approx(plainly.numbers["coverage"], abs=1e-3)


def test_what_is_reported_is_the_score_of_the_layer_and_chance_that_of_shuffled_labels() -> None:
    made, batch = model(), ids(6, 9)
    true = torch.stack([batch % 2 == 0, batch > 50, batch % 5 == 1], -1)
    site, layer = next(iter(mixture_layers(made).items()))
    given = {"input_ids": batch, "properties": true}
    report = subject.measure(MeterInputs(model=made, batches=[given], seed=5), config(layers=[0], precision=0.7))
    seen, codes = subject.run(MeterInputs(model=made, batches=[given]), {site: layer})
    fit = torch.arange(6).repeat_interleave(9) % 2 == 0
    assert torch.equal(seen.sequence_T % 2 == 0, fit)
    labels = true.flatten(0, 1)
    for name, label in (("", labels), (" by chance", subject.shuffled(labels, fit, 5))):
        with torch.no_grad():
            (found,) = subject.probe(subject.blocks(layer.bank, codes[site]), [label], fit, config(precision=0.7))
        assert report.numbers["coverage" + name] == pytest.approx(found.coverage)
        assert report.numbers["reconstruction" + name] == pytest.approx(found.reconstruction)
    assert report.numbers["coverage"] != report.numbers["coverage by chance"]
    assert report.numbers["reconstruction"] != report.numbers["reconstruction by chance"]


def test_numbers_are_means_over_the_chosen_layers() -> None:
    made = model()
    batches = [{"input_ids": ids(4, 9)}]
    both, second = measure(made, batches), measure(made, batches, layers=[1])
    table = both.tables["layers"]
    place = table.columns.index("coverage")
    assert [row[0] for row in table.rows] == list(mixture_layers(made))
    assert both.numbers["coverage"] == pytest.approx(sum(row[place] for row in table.rows) / 2)
    assert second.tables["layers"].rows == [table.rows[1]]


def test_rare_properties_are_left_out() -> None:
    batch = ids(4, 9)
    true = torch.zeros(4, 9, 3, dtype=torch.bool)
    true[:, ::2, 0] = True
    true[::2, 1, 1] = True  # on even sequences only
    true[1::2, 1, 2] = True  # on odd ones only
    report = measure(model(), [{"input_ids": batch, "properties": true}])
    assert report.notes["properties"] == 1
    nothing = measure(model(), [{"input_ids": batch, "properties": true}], min_true=20)
    assert "coverage" not in nothing.numbers
    assert nothing.numbers["L0"] > 0


def test_a_dense_model_is_measured_as_a_mixture_of_one() -> None:
    made = tiny_model("llama")
    before = logits(made)
    with pytest.raises(ConfigError, match="--num-experts 1 --top-k 1"):
        measure(made, [{"input_ids": ids()}])
    use = method("convert.upcycle")
    plan = use.plan(PlanInputs(subject=OpenModel(made)), use.configure({"num_experts": 1, "top_k": 1}))
    surgery.apply(made, plan)
    torch.testing.assert_close(logits(made), before, atol=1e-5, rtol=0)
    numbers = measure(made, [{"input_ids": ids()}]).numbers
    assert numbers["units"] == numbers["L0"] == made.config.intermediate_size  # SiLU units are never exactly 0


@pytest.mark.parametrize(
    ("batches", "values", "error", "message"),
    [
        ([], {}, ConfigError, "give texts or batches"),
        ([{"input_ids": ids(1, 5)}], {}, ConfigError, "give two"),
        ([{"input_ids": ids()}], {"layers": [2]}, ConfigError, r"layers=\[2\], but the model has mixture layers 0-1"),
        (
            [{"input_ids": ids(), "properties": torch.ones(2, 6, 1)}],
            {},
            DataError,
            r"\[2, 6, 1\] for token ids \[2, 7\]",
        ),
        (
            [{"input_ids": ids()}, {"input_ids": ids(), "properties": torch.ones(2, 7, 1)}],
            {},
            DataError,
            "some batches carry properties",
        ),
        ([{"input_ids": ids(), "properties": torch.ones(2, 7)}], {}, DataError, r"shape \[2, 7\] for token ids"),
        (
            [{"input_ids": ids(), "properties": torch.ones(2, 7, count)} for count in (1, 3)],
            {},
            DataError,
            "batches carry 1, 3 properties a token",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    batches: list[dict[str, Tensor]], values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure(model(), batches, **values)


@pytest.mark.parametrize("values", [{"precision": 0.0}, {"levels": 0}, {"layers": []}, {"min_active": 0}])
def test_wrong_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        METER.configure(values)
