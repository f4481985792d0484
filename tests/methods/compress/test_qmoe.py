"""QMoE: streamed second moments against whole statistics, groups against single experts, packed against dequantised."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.layer import MoELayer
from moestro.core.plan import BitPlan
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.compress._parts.streaming import Streaming, TokenBuffer
from moestro.observe import collect
from moestro.ops.formats import Packing, dequantise, format_named, nearest, quantise
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder
from tests.surgery.helpers import assert_untouched, ids, layers_of, mixture, snapshot


USE = method("compress.qmoe")
BATCHES = [{"input_ids": ids(3, 11, seed)} for seed in range(3)]
LAYERS = {0: "model.layers.0.mlp", 1: "model.layers.1.mlp"}


def plan_of(model: Any, **config: Any) -> BitPlan:
    found: BitPlan = USE.plan(PlanInputs(subject=OpenModel(model)), USE.configure(config))
    return found


def moments(model: Any, batches: Any = BATCHES, **settings: Any) -> dict[tuple[int, int, str], Tensor]:
    """What is computed on demand, for every matrix; the model stays as it is."""
    found = {}
    for layer, seen in Streaming(**settings).walk(model, batches, LAYERS, None, None):
        for expert in range(len(seen.count_E)):
            for name in ("gate", "up", "down"):
                found[layer, expert, name] = seen.gram(expert, name)
    return found


def test_streamed_moments_are_those_of_whole_statistics() -> None:
    model = mixture()
    stats = collect(model, BATCHES, gram=True, hidden_gram=True)
    found = moments(model)
    for layer, site in LAYERS.items():
        for expert in range(4):
            for name, grams in (("up", stats[site].input_gram), ("down", stats[site].hidden_gram)):
                torch.testing.assert_close(found[layer, expert, name], grams.of(expert), atol=1e-4, rtol=1e-4)
            assert torch.equal(found[layer, expert, "gate"], found[layer, expert, "up"])


def test_padding_is_not_seen() -> None:
    model = mixture()
    batch = BATCHES[0]["input_ids"]
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), batch], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.int64), torch.ones_like(batch)], 1)
    plain = moments(model, [{"input_ids": batch}])
    for key, gram in moments(model, [{"input_ids": padded, "attention_mask": mask}]).items():
        torch.testing.assert_close(gram, plain[key], atol=1e-4, rtol=1e-4)


def kept(model: Any, keep: Tensor, layer: int, expert: int, square: bool = False) -> Tensor:
    """X^T X of the first projection over kept positions of one batch [B, S], by a loop over assignments."""
    there = layers_of(model)[layer]
    seen: list[tuple[Tensor, Any]] = []

    class Take:
        def record(self, site: str, routing: Any, ctx: Any) -> None:
            if site == there.site:
                seen.append((ctx.kept[site, "input"], routing))

    with session(recorder=Take(), keeps=["input"]), torch.no_grad():
        model(**BATCHES[0])
    ((x_TD, routing),) = seen
    total = torch.zeros(x_TD.shape[1], x_TD.shape[1])
    for token, chosen, weight in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True):
        if chosen == expert and keep.flatten()[token]:
            total += torch.outer(x_TD[token], x_TD[token]) * (weight**2 if square else 1)
    return total


@pytest.mark.parametrize("skip", ["at", "before", "both"])
def test_special_tokens_are_left_out(skip: str) -> None:
    """At their position, or at the one before within the row: the last of a row is before nothing."""
    model = mixture()
    tokens = BATCHES[0]["input_ids"]
    special = (int(tokens[0, 4]), int(tokens[1, 0]))
    at = torch.isin(tokens, torch.tensor(special))
    before = torch.zeros_like(at)
    before[:, :-1] = at[:, 1:]
    keep = ~{"at": at, "before": before, "both": at | before}[skip]
    found = moments(model, BATCHES[:1], skip_tokens=special, skip=skip)
    for expert in range(4):
        torch.testing.assert_close(found[1, expert, "up"], kept(model, keep, 1, expert), atol=1e-4, rtol=1e-4)


def test_unlabelled_positions_are_left_out() -> None:
    model = mixture()
    tokens = BATCHES[0]["input_ids"]
    labels = torch.where(torch.arange(11) < 5, -100, tokens)
    batch = {"input_ids": tokens, "labels": labels}
    found = moments(model, [batch], skip_unlabelled=True)
    for expert in range(4):
        expected = kept(model, labels >= 0, 0, expert)
        torch.testing.assert_close(found[0, expert, "up"], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(PlanError, match=r"needs labels .* calibration batch 1 has none"):
        moments(model, [batch, BATCHES[1]], skip_unlabelled=True)


def test_tokens_may_weigh_by_their_gate() -> None:
    model = mixture()
    found = moments(model, BATCHES[:1], gate_weighted=True)
    for expert in range(4):
        expected = kept(model, torch.ones(3, 11), 0, expert, square=True)
        torch.testing.assert_close(found[0, expert, "up"], expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(expected, kept(model, torch.ones(3, 11), 0, expert), rtol=1e-2)


def test_an_expert_is_measured_on_a_limited_number_of_tokens() -> None:
    buffer = TokenBuffer(torch.arange(12.0)[:, None], torch.arange(12), torch.ones(12), [0, 2, 12])
    assert buffer.rows(1, 5)[0].flatten().tolist() == [2, 4, 6, 8, 10]
    assert buffer.rows(1, 10)[0].flatten().tolist() == list(range(2, 12))
    assert buffer.rows(0, 5)[0].flatten().tolist() == [0, 1]
    model = mixture()
    whole, few = moments(model), moments(model, max_tokens_mul=0.5)
    # Half of an even load: 99 tokens, 2 choices, 4 experts.
    traces = [few[0, expert, "up"].trace() / whole[0, expert, "up"].trace() for expert in range(4)]
    assert min(traces) < 0.6
    assert torch.linalg.matrix_rank(moments(model, BATCHES[:1], max_tokens_mul=0.2)[0, 0, "up"]) <= 3


def test_groups_of_experts_are_each_alone() -> None:
    model = mixture()
    one, all_ = copy.deepcopy(model), copy.deepcopy(model)
    surgery.apply(one, plan_of(one, expert_group=1), calib=BATCHES)
    surgery.apply(all_, plan_of(all_, expert_group=16), calib=BATCHES)
    for mine, other in zip(layers_of(one), layers_of(all_), strict=True):
        for expert in range(4):
            for name in ("gate", "up", "down"):
                pair = mine.bank.weight(expert, name), other.bank.weight(expert, name)
                torch.testing.assert_close(*pair, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spelled", ["ternary:row:bf16", "ternary14:row:bf16", "trits:row:bf16", "uint2:row:bf16"])
def test_rounding_to_the_nearest_needs_no_data(spelled: str) -> None:
    model = mixture()
    whole = [[bank.weight(e, "up").detach().clone() for e in range(4)] for bank in (x.bank for x in layers_of(model))]
    surgery.apply(model, plan_of(model, up=spelled, down=spelled, rounding="nearest"))
    for layer, weights in zip(layers_of(model), whole, strict=True):
        for expert, weight in enumerate(weights):
            parts, used = quantise(weight[None], Packing(spelled.split(":")[0], None, "bf16"))
            assert torch.equal(layer.bank.weight(expert, "up"), dequantise(parts, tuple(weight.shape), used)[0])


def test_without_dependent_inputs_or_without_tokens_it_is_the_nearest() -> None:
    weight = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    used = Packing("ternary", None, "bf16")
    gram = torch.stack([5 * torch.eye(24), torch.zeros(24, 24), torch.eye(24)])
    codes, params = Streaming()(weight, used, gram)
    expected, theirs = nearest(weight, used)
    assert torch.equal(codes, expected)
    assert all(torch.equal(params[name], value) for name, value in theirs.items())


def test_it_moves_outputs_less_than_the_nearest() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 16, 96, generator=draw)
    x = torch.randn(2, 400, 96, generator=draw) @ torch.randn(2, 96, 96, generator=draw)
    gram = x.transpose(1, 2) @ x
    used = Packing("ternary", None, "bf16")

    def moved(codes: Tensor, params: dict[str, Tensor]) -> Tensor:
        gap = weight - format_named("ternary").values(codes, params)
        return (gap @ gram @ gap.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(1)

    assert bool((moved(*Streaming()(weight, used, gram)) < 0.7 * moved(*nearest(weight, used))).all())


def test_saved_packed_models_are_the_same_model(tmp_path: Path) -> None:
    """In memory and from disk, expert by expert as long as it must be; it generates and answers as its weights say."""
    tiny_folder("qwen3_moe", tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    before = snapshot(model)
    plan = plan_of(model)
    assert_untouched(model, before)
    with pytest.raises(PlanError, match="looks at data; give calib"):
        surgery.apply(model, plan)
    batches = [ids(4, 16, seed) for seed in range(3)]
    receipt = surgery.apply(model, plan, calib=batches)
    written = surgery.apply(tmp_path / "in", plan, tmp_path / "out", calib=batches)
    assert written["layers"] == receipt["layers"]
    assert written["bits_per_weight"] == receipt["bits_per_weight"]
    again = moestro.load(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for layer in layers_of(again):
        for expert in range(5):
            for name, each in layer.bank.packings.items():
                parts = layer.bank.parts(expert, name)
                assert len(parts["codes"]) == int(parts["counts"].long().sum()) == dict(each[expert].sizes)["words"]
    assert again.generate(ids(2, 4), max_new_tokens=3, do_sample=False).shape == (2, 7)
    plain = moestro.load(tmp_path / "in")
    for wide, packed in zip(layers_of(plain), layers_of(again), strict=True):
        for expert in range(5):
            for name in packed.bank.projections:
                with torch.no_grad():
                    wide.bank.weight(expert, name).copy_(packed.bank.weight(expert, name))
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, plain(ids()).logits, atol=1e-5, rtol=1e-5)


def test_half_precision_and_a_single_token() -> None:
    model = mixture().bfloat16()
    receipt = surgery.apply(model, plan_of(model, allow_starved=True), calib=[ids(1, 1)])
    assert len(receipt["layers"][0]["starved"]) == 2
    bank = layers_of(model)[0].bank
    assert bank.parts(0, "up")["codes"].dtype == torch.uint16
    with torch.no_grad():
        assert bool(model(ids()).logits.isfinite().all())


def test_matrices_may_have_other_formats() -> None:
    model = mixture()
    plan = plan_of(model, down="uint3:g8:f16", p0=0.7)
    assert plan.formats["0/1/up"] == "ternary:row:bf16:zeros=700"
    assert plan.formats["0/1/down"] == "uint3:g8:f16"
    receipt = surgery.apply(model, plan, calib=BATCHES)
    used = layers_of(model)[0].bank.formats()
    assert all(word.startswith("ternary:row:bf16:zeros=700:words=") for word in used["up"])
    assert used["down"] == "uint3:g8:f16"
    assert receipt["bits_per_weight"]["after"] < 32


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"up": "ternery"}, "no format 'ternery'"),
        ({"p0": 0.3}, "p0"),
        ({"p0": 1.0}, "p0"),
        ({"up": "trits", "down": "uint2", "p0": 0.9}, "p0=0.9 is for codes of variable length; trits and uint2"),
        ({"percdamp": 0.0}, "percdamp"),
        ({"skip_tokens": [-1]}, r"skip_tokens=\[-1\] are token ids"),
    ],
)
def test_settings_that_cannot_work(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        USE.configure(config)


def test_rounding_is_as_the_settings_say() -> None:
    settings = {
        "percdamp": 0.3, "blocksize": 7, "expert_group": 3, "max_tokens_mul": 2.5, "gate_weighted": True,
        "skip_tokens": (4, 9), "skip": "both", "skip_unlabelled": True, "least": 3, "allow_starved": False,
    }  # fmt: skip
    made = USE.entry("rounding")(USE.configure(settings))
    expected = {"batch" if name == "expert_group" else name: value for name, value in settings.items()}
    assert made == Streaming(**expected)
    assert Streaming(**expected) != Streaming()
    assert Streaming(**{**expected, "batch": 16}) != made


def test_models_that_cannot_be_packed() -> None:
    from moestro.testing.tiny import tiny_model

    with pytest.raises(PlanError, match="has no mixture of equal float experts"):
        plan_of(tiny_model("llama"))
    model = mixture()
    plan = plan_of(model)
    there = layers_of(model)[1]
    assert isinstance(there, MoELayer)
    with torch.no_grad():
        there.bank.down_proj[2, 0, 0] = float("nan")
    plan = plan.model_copy(update={"model_hash": None})
    with pytest.raises(PlanError, match=r"layer 1 expert 2 projection down: 1 of .* weights are NaN"):
        surgery.apply(model, plan, calib=BATCHES)
    assert USE.module.streams(USE.configure({}))


def test_a_layer_of_which_half_starves_is_refused_before_the_first_is_packed() -> None:
    """An open model is left as it was; asked for, the starved are rounded to the nearest and named."""
    model = mixture()
    one = [{"input_ids": ids(1, 1)}]  # one token chooses two of four
    before = snapshot(model)
    plan = plan_of(model, up="uint2", down="uint2")
    with pytest.raises(PlanError, match=r"\(as routed\) gives 2 of 4 experts of model\.layers\.0\.mlp fewer than 1"):
        surgery.apply(model, plan, calib=one)
    assert_untouched(model, before)
    plan = plan_of(model, up="uint2", down="uint2", allow_starved=True)
    receipt = surgery.apply(model, plan, calib=one)
    assert [len(row["starved"]) for row in receipt["layers"]] == [2, 2]
    assert "4 experts saw no calibration token" in receipt["warnings"][0]
