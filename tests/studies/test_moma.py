"""The parts of the study of modality groups that a verdict rests on, and the recipe's two phases."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import moestro
from moestro.core.errors import ConfigError
from moestro.core.routing import Routing, Scores
from moestro.data.tokens import byte_tokenizer, encode
from moestro.studies import moma as study
from moestro.studies._choices import Answers, Flipped, TopOne, chosen
from moestro.studies._framework import BUDGETS
from moestro.studies._pixels import documents, image_ids, images, write
from moestro.training.recipe import Recipe, load_recipe
from moestro.training.run import train


RECIPE = Path(__file__).parents[2] / "recipes" / "moma.yaml"
SHUT = float("-inf")


def test_half_of_the_tokens_are_images_and_none_is_on_both_sides() -> None:
    train_side, heldout = images()
    assert len(train_side) + len(heldout) == 1797
    shown, kept = documents("train", 4000, "german"), documents("heldout", 4000, "german")
    first, last = image_ids()
    assert last - first == 16
    ids = [torch.tensor(row) for row in encode(byte_tokenizer(), shown)]
    pixels = [(row >= first) & (row <= last) for row in ids]
    assert {(len(row), int(mask.sum())) for row, mask in zip(ids, pixels, strict=True)} == {(2 * 8 * 66, 8 * 64)}
    cut = [{text[at + 66 : at + 132] for text in texts for at in range(0, len(text), 132)} for texts in (shown, kept)]
    assert cut[0] <= set(train_side)
    assert cut[1] <= set(heldout)


def test_the_recipe_names_the_ids_of_pixels() -> None:
    recipe = load_recipe(RECIPE)
    wanted = {"image": [list(image_ids())]}
    assert recipe.model.swaps[0].config["modality"] == recipe.objective.config["modality"] == wanted


@pytest.mark.parametrize("budget", ["micro", "full"])
def test_all_arms_cost_the_same_operations_a_token(budget: str) -> None:
    size = study.scale(BUDGETS[budget])
    costs = {
        arm.name: study.flops(study.build(size, arm.name, 0, *study.equal_size(arm.name, size)), size.length)
        for arm in study.STUDY.arms
    }
    for name, cost in costs.items():
        assert cost == pytest.approx(costs["dense"], rel=0.004), name
    layers = {arm.name: study.equal_size(arm.name, size)[1] for arm in study.STUDY.arms}
    assert layers["mod_2t2i"] == {"micro": 2, "full": 6}[budget]


def test_all_but_the_feed_forwards_begins_alike_and_every_second_layer_is_routed_by_depth() -> None:
    size = study.scale(BUDGETS["micro"])
    models = {arm.name: study.build(size, arm.name, 3, *study.equal_size(arm.name, size)) for arm in study.STUDY.arms}
    routed = models.pop("mod_2t2i").model.layers
    assert ["router.weight" in dict(layer.named_parameters()) for layer in routed] == [True, False]
    wanted = {name: p for name, p in models["dense"].named_parameters() if ".mlp." not in name}
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.norm.weight"} < set(wanted)
    for arm, model in models.items():
        found = {name: p for name, p in model.named_parameters() if ".mlp." not in name}
        assert set(found) == set(wanted), arm
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), arm


def routing() -> Routing:
    """Three tokens: the first two of a group with experts 0 and 1, the third of one with 2 and 3."""
    logits = torch.tensor([[1.0, 2.0, SHUT, SHUT], [3.0, -1.0, SHUT, SHUT], [SHUT, SHUT, 0.5, 0.4]])
    scores = Scores(logits, logits, logits.sigmoid())
    taken = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    return Routing.from_mask(taken, scores.gate_TC, num_experts=4, scores=scores, causal=False)


def test_the_causal_control_takes_each_tokens_best_expert_of_its_group() -> None:
    found = TopOne().on_routing("a.mlp", routing(), None, None)
    assert found.causal
    assert found.expert_TK.tolist() == [[1], [0], [2]]
    torch.testing.assert_close(found.weight_TK[:, 0], torch.tensor([2.0, 3.0, 0.5]).sigmoid())


def test_wrong_choices_are_turned_around_among_open_ones_and_counted() -> None:
    every = Flipped(1.0, depth=False, seed=0)
    found = every.on_routing("a.mlp", routing(), None, None)
    assert chosen(found).int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert every.flips == 6
    assert not found.causal
    assert every.on_routing("model.layers.0", routing(), None, None).token_N.tolist() == routing().token_N.tolist()
    assert every.flips == 6, "other kinds of choices are left alone"
    some = Flipped(0.25, depth=True, seed=0)
    for _ in range(200):
        some.on_routing("model.layers.0", routing(), None, None)
    assert some.flips == pytest.approx(0.25 * 6 * 200, rel=0.15)


def test_answers_are_held_against_the_commoner_one_of_each_choice_by_hand() -> None:
    """Groups of two tokens and of one; expert 0 is taken once of two, 1 once, 2 never, 3 once of one."""
    said = torch.tensor([[1.0, -1.0, SHUT, SHUT], [2.0, -2.0, SHUT, SHUT], [SHUT, SHUT, 0.2, 0.6]])
    router = SimpleNamespace(auxiliary=SimpleNamespace(threshold=torch.full((4,), 0.5)))
    answers = Answers()
    ctx = SimpleNamespace(get=lambda site, name: {"auxiliary": said}[name])
    for site in ("a.mlp", "b.mlp", "b.mlp"):
        assert answers.on_routing(site, routing(), router, ctx) is not None
    assert answers.counts["a.mlp"].tolist() == [[2, 2, 1, 1], [1, 1, 0, 1], [2, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]
    assert torch.equal(answers.counts["b.mlp"], 2 * answers.counts["a.mlp"])
    told = answers.told()
    assert told["auxiliary_accuracy"] == pytest.approx(4 / 6)
    assert told["auxiliary_gain"] == pytest.approx(0), "a constant for each choice is right as often"
    assert told["auxiliary_f1"] == pytest.approx(2 * 2 / (3 + 3))


def test_the_speed_up_by_hand() -> None:
    dense = np.array([4.0, 3.0, 2.0, 1.0])
    assert study.speed_up(dense, dense, 1.0) == 1.0
    assert study.speed_up(np.array([2.0, 1.0, 0.5, 0.4]), dense, 1.0) == 2.0
    assert study.speed_up(np.array([2.0, 1.0, 0.5, 0.4]), dense, 2.0) == 1.0
    assert study.speed_up(np.array([4.0, 3.5, 3.0, 2.5]), dense, 1.0) == pytest.approx(3 / 4)


def test_a_loss_that_is_not_causal_is_not_called_so() -> None:
    size, parts = study.scale(BUDGETS["ci"]), study.data("ci").heldout
    untaught = study.Trained(study.build(size, "moma_2t2i", 0, 8, 2).eval(), np.zeros((1, 2)), ())
    assert study.losses(untaught, parts, batch=True).isfinite().all()
    with pytest.raises(ConfigError, match="noncausal_text"):
        study.losses(untaught, parts, batch=False)
    control = study.Trained(untaught.model, untaught.curve, (TopOne(),))
    torch.testing.assert_close(*(study.losses(control, parts, batch=batch) for batch in (True, False)))


def test_what_an_arm_measures_fits_together_and_its_second_stage_trains_auxiliary_routers_only() -> None:
    found = study.run("moma_2t2i", 0, BUDGETS["ci"])
    for part in study.NAMES:
        assert found[f"{part}_gap"] == pytest.approx(found[f"{part}_loss"] - found[f"{part}_loss_by_batch"])
    assert found["gap"] == max(found["text_gap"], found["image_gap"]), "one modality does not make up for the other"
    per_token = found["rise_at_50_of_1000"] / found["rise_per_wrong_choice"]
    assert per_token == pytest.approx(0.05 * 2 * 2, rel=0.2), "two layers with two open choices each"
    model = study.trained("moma_2t2i", 0, "ci").model
    learn = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learn == {name for name, _ in model.named_parameters() if "auxiliary" in name}
    control = study.run("token_choice", 0, BUDGETS["ci"])
    extra = sum(p.numel() for name, p in model.named_parameters() if "auxiliary" in name)
    assert found["parameters"] - control["parameters"] == extra > 0, "what the control never asks does not count"


def test_losses_by_modality_are_means_over_their_own_targets() -> None:
    parts = study.data("ci").heldout
    one = study.trained("dense", 0, "ci")
    found = study.losses(one, parts, batch=False)
    first, last = image_ids()
    with torch.no_grad():
        logits = torch.cat([one.model(part["input_ids"]).logits[:, :-1].flatten(0, 1) for part in parts])
    target = torch.cat([part["labels"][:, 1:].flatten() for part in parts])
    nats = torch.nn.functional.cross_entropy(logits, target, reduction="none").double()
    image = (target >= first) & (target <= last)
    torch.testing.assert_close(found, torch.stack([nats[~image].mean(), nats[image].mean()]), atol=1e-5, rtol=0)


def test_the_second_phase_of_the_recipe_moves_auxiliary_routers_only_and_makes_losses_causal(tmp_path: Path) -> None:
    write(tmp_path / "pixels", characters=6000, source="german")
    values = yaml.safe_load(RECIPE.read_text())
    depth = {"sites": "block", "layers": [0], "method": "train.mixture_of_depths", "config": {"capacity": 0.5}}
    values["model"]["config"] |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    values["model"]["swaps"].append(depth)
    values["data"]["source"] = str(tmp_path / "pixels" / "train.jsonl")
    values["eval"] |= {"every": 3, "limit": 2, "data": {"source": str(tmp_path / "pixels" / "heldout.jsonl")}}
    values["phases"][0]["steps"] = 3
    values |= {"steps": 6, "batch_size": 2, "precision": "float32", "checkpoint": {"every": 3}, "monitor": {"every": 1}}
    out = tmp_path / "run"
    train(Recipe.parse(values), out, silent=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    heldout = {row["step"]: set(row["heldout"]) for row in rows if "heldout" in row}
    assert heldout == {3: {"noncausal_text", "noncausal_image"}, 6: {"causal_text", "causal_image"}}
    terms = [row["terms"] for row in rows if "terms" in row]
    assert all(set(term) == {"noncausal_text", "noncausal_image", "auxiliary"} for term in terms)
    assert [term["auxiliary"] > 0 for term in terms] == [False] * 3 + [True] * 3
    before, after = (
        load_file(next((out / "checkpoints" / f"step-0000000{n}").rglob("model.safetensors"))) for n in (3, 6)
    )
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if "auxiliary" in name and not name.endswith("threshold")}
    model = moestro.load(out / "model")
    ids = torch.tensor([[100, 110, 193, 205, 206]])
    ask = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **ask), model.generate(ids, use_cache=False, **ask))
