"""Aggregation: two mixtures become one, from which each of the two can still be had."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moestro import surgery
from moestro.cli import main
from moestro.core.context import RoutingContext
from moestro.core.errors import PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.registry import method
from moestro.core.routing import Scores
from moestro.core.session import Edit, session
from moestro.data.tokens import byte_tokenizer
from moestro.methods.convert._parts.origin import related
from moestro.models.load import load
from moestro.models.save import save
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder, tiny_model
from tests.surgery.helpers import ids, layers_of, logits, mixture


AGGREGATE = method("convert.aggregate_experts")
UPCYCLED = method("convert.upcycle").configure(
    {"num_experts": 4, "router": {"method": "train.softmax_topk", "config": {"top_k": 2}}}
)


class Only(Edit):
    """Experts outside a range cannot be chosen: their logits are -inf."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        """See Edit; scores of a softmax over what is left."""
        gone = torch.ones(scores.logits_TC.shape[1], dtype=torch.bool)
        gone[self.first : self.last] = False
        logits_TC = scores.logits_TC.masked_fill(gone, float("-inf"))
        return Scores(logits_TC, logits_TC, logits_TC.softmax(-1))


def joined(model: Any, donors: dict[str, Any], **config: Any) -> dict[str, Any]:
    opened = {name: OpenModel(donor, name) for name, donor in donors.items()}
    plan = AGGREGATE.plan(PlanInputs(subject=OpenModel(model), donors=opened), AGGREGATE.configure(config))
    return {**surgery.apply(model, plan, donors=donors), "notes": plan.notes, "rest": plan.rest}


def grown(model: Any, seed: int) -> Any:
    """The model after a little training, as far as its weights tell: small independent changes everywhere."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            scale = 0.5 * float(parameter.std()) if parameter.numel() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    return other


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_the_others_masked_each_model_is_still_there(family: str) -> None:
    first, second = mixture(family, experts=4), mixture(family, experts=3, seed=1)
    before = logits(first)
    model = copy.deepcopy(first)
    joined(model, {"b": second}, shared="first")
    assert [layer.bank.num_experts for layer in layers_of(model)] == [7] * len(layers_of(model))
    assert [layer.router.num_experts for layer in layers_of(model)] == [7] * len(layers_of(model))
    with session(edits=[Only(0, 4)]):
        torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
    assert not torch.allclose(logits(model), before, atol=1e-3), "the second model's experts are never chosen"


def test_the_donor_is_there_too_when_all_else_is_equal() -> None:
    first = mixture(experts=4)
    second = mixture(experts=4)  # the same outside its experts
    for layer in layers_of(second):
        with torch.no_grad():
            layer.bank.down_proj.mul_(-1.5)
            layer.router.weight.copy_(layer.router.weight.flip(0))
    wanted = logits(second)
    joined(first, {"b": second}, shared="first")
    with session(edits=[Only(4, 8)]):
        torch.testing.assert_close(logits(first), wanted, atol=1e-6, rtol=0)


def test_groups_of_a_router_stay_the_groups_of_each_model(tmp_path: Path) -> None:
    """A bias that keeps one model's experts from being chosen leaves the other model, group by group."""
    models = []
    for seed, name in enumerate("ab"):
        tiny_folder("deepseek_v3", tmp_path / name, n_routed_experts=16, n_group=4, topk_group=2, seed=seed)
        models.append(load(tmp_path / name))
    first, second = models
    wanted = logits(first)
    joined(first, {"b": second}, shared="first")
    for layer in layers_of(first):
        assert (layer.router.num_experts, layer.router.config.num_groups, layer.router.config.groups_kept) == (32, 8, 2)
    assert not torch.allclose(logits(first), wanted, atol=1e-3)
    for layer in layers_of(first):
        layer.router.selection_bias[16:] -= 100.0
    torch.testing.assert_close(logits(first), wanted, atol=1e-6, rtol=0)
    save(first, tmp_path / "joined")
    assert torch.equal(logits(load(tmp_path / "joined")), logits(first))
    tiny_folder("deepseek_v3", tmp_path / "few", n_routed_experts=8, n_group=4, topk_group=2)
    with pytest.raises(PlanError, match=r"among 4 groups of equal size, and the models have 16 and 8 experts"):
        joined(second, {"b": load(tmp_path / "few")}, shared="first")


def test_experts_and_rows_stand_in_the_order_of_the_models() -> None:
    models = {"self": mixture(experts=2, seed=0), "b": mixture(experts=3, seed=1), "c": mixture(experts=2, seed=2)}
    rows = torch.cat([layers_of(m)[1].router.weight.detach().clone() for m in models.values()])
    down = torch.cat([layers_of(m)[1].bank.down_proj.detach().clone() for m in models.values()])
    joined(models["self"], {"b": models["b"], "c": models["c"]}, shared="first")
    assert torch.equal(layers_of(models["self"])[1].router.weight, rows)
    assert torch.equal(layers_of(models["self"])[1].bank.down_proj, down)
    assert layers_of(models["self"])[1].router.top_k == 2


def test_the_rest_is_the_mean_for_models_of_one_origin_only() -> None:
    parent = mixture()
    first, second, stranger = grown(parent, 1), grown(parent, 2), mixture(seed=9)
    norms = [m.model.embed_tokens.weight.detach().clone() for m in (first, second)]
    told = joined(first, {"b": second})
    assert told["notes"]["one_origin"] is True
    torch.testing.assert_close(first.model.embed_tokens.weight, (norms[0] + norms[1]) / 2, atol=1e-6, rtol=0)

    kept = second.model.embed_tokens.weight.detach().clone()
    told = joined(second, {"b": stranger})
    assert told["notes"]["one_origin"] is False
    assert torch.equal(second.model.embed_tokens.weight, kept)


def test_origin_is_told_by_correlation_not_by_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    base, other = torch.randn(64, 48, generator=draw), torch.randn(64, 48, generator=draw)
    assert related(base, 3.0 * base + 0.5 * torch.randn(64, 48, generator=draw))
    assert not related(base, other)
    assert not related(base, -base)
    assert not related(base, base[:32])
    small = [torch.randn(4, 4, generator=draw) for _ in range(40)]
    assert not any(related(a, b) for a, b in zip(small[::2], small[1::2], strict=True)), "chance passes for origin"


@pytest.mark.parametrize(
    ("donors", "config", "words"),
    [
        ({}, {}, "got one"),
        ({"b": lambda: tiny_model("llama")}, {}, "b layer 0 is dense"),
        ({"b": lambda: mixture(top_k=1)}, {}, "b layer 0 routes by"),
        ({"b": lambda: mixture()}, {"layers": [5]}, "no feed-forward site in layer 5"),
    ],
)
def test_refusals(donors: dict[str, Any], config: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        joined(mixture(), {name: make() for name, make in donors.items()}, **config)


def test_donors_of_another_shape_are_refused_before_anything_moves() -> None:
    model = mixture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = tiny_model("llama", intermediate_size=64)
    surgery.apply(wide, method("convert.upcycle").plan(PlanInputs(subject=OpenModel(wide)), UPCYCLED))
    with pytest.raises(PlanError, match="inner units"):
        joined(model, {"b": wide}, shared="first")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_gradients_reach_the_experts_and_rows_of_every_model() -> None:
    model = mixture(experts=2, top_k=2)
    joined(model, {"b": mixture(experts=2, seed=1)}, shared="first")
    model.train()
    model(input_ids=ids(4, 32), labels=ids(4, 32)).loss.backward()
    for layer in layers_of(model):
        assert (layer.bank.down_proj.grad.abs().sum((1, 2)) > 0).all()
        assert (layer.router.weight.grad.abs().sum(1) > 0).all()


def saved_mixture(folder: Path, seed: int) -> Path:
    """A folder with a small mixture and a tokenizer."""
    dense = folder.with_name(folder.name + "-dense")
    tiny_folder("llama", dense, vocab_size=300, seed=seed)
    byte_tokenizer().save_pretrained(dense)
    flags = ["--num-experts", "2", "--top-k", "1", "--seed", str(seed)]
    assert main(["convert", "upcycle", str(dense), str(folder), *flags]) == 0
    return folder


def test_from_the_command_line_and_through_the_auto_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [saved_mixture(tmp_path / name, seed) for seed, name in enumerate("abc")]
    out = tmp_path / "out"
    assert main(["convert", "aggregate_experts", *map(str, parts), str(out), "--shared", "first"]) == 0
    assert "6 experts" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert [layer.bank.num_experts for layer in layers_of(model)] == [6, 6]
    assert torch.equal(layers_of(model)[0].bank.down_proj[2:4], layers_of(load(parts[1]))[0].bank.down_proj)
    made = model.generate(input_ids=ids(1, 5), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 8)


def test_the_command_refuses_one_model_and_foreign_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = saved_mixture(tmp_path / "a", 0), saved_mixture(tmp_path / "b", 1)
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["convert", "aggregate_experts", str(first), str(out)]) == 2
    assert "got 1; give two or more" in capsys.readouterr().err
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["foreign"])
    tokenizer.save_pretrained(second)
    (second / "manifest.json").unlink()
    assert main(["convert", "aggregate_experts", str(first), str(second), str(out)]) == 2
    assert "have different tokenizers (1 of" in capsys.readouterr().err
    assert not out.exists()


def test_saved_and_reopened_the_joined_model_has_the_same_bits(tmp_path: Path) -> None:
    model = mixture()
    joined(model, {"b": mixture(seed=1)}, shared="mean")
    save(model, tmp_path / "joined")
    again = load(tmp_path / "joined")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
