"""Baselines: what they cost against the recipe, what of the recipe they keep, and which recipes have none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moestro.cli import main
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.models.sites import sites
from moestro.training.baseline import KINDS, Kind, _equal_steps, baseline
from moestro.training.baseline_recipe import carried
from moestro.training.build import open_model
from moestro.training.log import read_metrics
from moestro.training.recipe import Recipe, load_recipe
from moestro.training.run import dry_run, train
from moestro.training.skeleton import recipe_skeleton


RECIPES = Path(__file__).parents[2] / "recipes"
MOE: dict[str, Any] = {"num_experts": 8, "expert_size": 24}
BALANCE = {"balance": {"method": "train.balance_loss"}}
SIGMOID = {"method": "train.sigmoid_bias", "config": {"top_k": 3}}
RMOE = {"method": "train.rmoe", "config": {"top_k": 2, "state_size": 8}}
TOP_P = {"method": "train.dynamic_moe", "config": {"p": 0.4}}


def swap(method: str = "train.moe", **config: Any) -> dict[str, Any]:
    return {"sites": "mlp", "layers": [1, 2], "method": method, "config": config}


def recipe(*swaps: dict[str, Any], model: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    config = {
        "model_type": "llama",
        "vocab_size": "auto",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        **(model or {}),
    }
    values = {
        "name": "tiny",
        "model": {"config": config, "swaps": list(swaps)},
        "data": {"source": "builtin:german", "tokenizer": "bytes", "sequence_length": 16},
        "steps": 3,
        "batch_size": 2,
        "precision": "float32",
        "monitor": {"every": 1},
        **changes,
    }
    return Recipe.parse(values)


def skeleton(made: Recipe) -> Any:
    return recipe_skeleton(made)


def widths(made: Recipe) -> list[int]:
    return [site.module.bank.inner for site in sites(skeleton(made), "mlp") if hasattr(site.module, "bank")]


def layers(made: Recipe) -> list[MoELayer]:
    return list(mixture_layers(skeleton(made)).values())


SHARED = recipe(swap(**MOE, shared=16, router=SIGMOID))


def test_dense_is_as_wide_as_the_experts_of_a_token_and_the_shared_branch() -> None:
    made = baseline(SHARED, "dense")
    assert widths(made.recipe) == [3 * 24 + 16] * 2
    assert not layers(made.recipe)
    assert made.recipe.name == "tiny-dense"
    router = 2 * 2 * 8 * 32  # operations of two routers, all that the baseline does not do
    assert made.of.forward_flops - made.size.forward_flops == router
    assert made.size == dry_run(made.recipe)
    assert made.of == dry_run(SHARED)


@pytest.mark.parametrize(
    "swaps",
    [
        [swap(**MOE, shared=16, router=SIGMOID)],
        [swap(**MOE, router=RMOE, losses=BALANCE)],
        [swap("train.moe_x", num_experts=4, top_k=2, expert_size=30)],
        [swap("train.bigmac", num_experts=4, top_k=2, down_ratio=0.25)],
        [swap("train.monet", axis=8, heads=2, expert_size=4, top_k=2)],
        [swap("train.pr_moe", num_experts={"per_layer": [2, 4]})],
    ],
    ids=["shared", "borrowed", "relu", "projected", "no MoELayer", "unequal layers"],
)
@pytest.mark.parametrize("kind", ["equal_flops", "equal_parameters"])
def test_equal_costs_are_equal_to_a_hundredth(swaps: list[dict[str, Any]], kind: Kind) -> None:
    losses = {"uniformity": 0.1, "ambiguity": 0.1} if "monet" in swaps[0]["method"] else {"balance": 0.01}
    if swaps[0]["config"].get("router") == SIGMOID or "bigmac" in swaps[0]["method"]:
        losses = {}
    given = recipe(*swaps, losses=losses)
    made = baseline(given, kind)
    one, two = dry_run(made.recipe), dry_run(given)
    cost = "forward_flops" if kind == "equal_flops" else "parameters"
    assert getattr(one, cost) == pytest.approx(getattr(two, cost), rel=0.01)
    assert made.recipe.steps == given.steps
    assert not any(getattr(module, "is_mixture", False) for module in skeleton(made.recipe).modules())
    assert made.recipe.losses == {}


def test_a_dense_baseline_has_the_form_of_the_experts() -> None:
    made = baseline(
        recipe(swap("train.moe_x", num_experts=4, top_k=2, expert_size=30), losses={"balance": 0.1}), "dense"
    )
    banks = [site.module.bank for site in sites(skeleton(made.recipe), "mlp", [1, 2])]
    assert {(bank.activation, bank.gated) for bank in banks} == {
        (layer.bank.activation, layer.bank.gated)
        for layer in layers(recipe(swap("train.moe_x", num_experts=4, top_k=2, expert_size=30)))
    }
    assert {(bank.activation, bank.gated) for bank in banks} != {("silu", True)}


def test_rounding_is_carried() -> None:
    assert carried([1.5, 1.5, 1.5, 1.5]) == [2, 1, 1, 2]
    assert sum(carried([3.3] * 10)) == 33
    assert carried([0.2, 0.2]) == [1, 1]


def test_steps_make_up_for_widths_that_are_too_coarse() -> None:
    given = recipe(swap(**MOE), steps=300)
    of = dry_run(given)
    off = replace(of, train_flops=round(of.train_flops * 1.2))
    made, said = _equal_steps(given, given, off, of)
    assert (made.steps, made.total_steps * off.train_flops) == (250, pytest.approx(300 * of.train_flops, rel=0.01))
    assert "+20.0%, so 250 steps in the place of 300" in said
    near = replace(of, train_flops=round(of.train_flops * 1.009))
    assert _equal_steps(given, given, near, of)[0] == given
    with pytest.raises(ConfigError, match="give the recipe more steps"):
        _equal_steps(recipe(swap(**MOE), steps=3), given, off, of)
    phases = recipe(swap(**MOE), steps=300, phases=[{"name": "a", "steps": 10}, {"name": "b"}])
    with pytest.raises(ConfigError, match="phases of tiny fix the steps"):
        _equal_steps(phases, given, off, of)


def test_topk_exchanges_the_router_alone() -> None:
    made = baseline(SHARED, "topk")
    assert [(layer.router.num_experts, layer.router.top_k) for layer in layers(made.recipe)] == [(8, 3)] * 2
    assert {layer.router.made_by.method for layer in layers(made.recipe)} == {"train.softmax_topk"}
    assert made.size.forward_flops == made.of.forward_flops
    assert made.recipe.losses == {"balance": 0.01}
    assert all(list(layer.losses) == ["balance"] for layer in layers(made.recipe))


def test_topk_of_a_method_that_brings_its_own_router() -> None:
    given = recipe(swap("train.moe_x", num_experts=4, top_k=2, expert_size=30), losses={"balance": 0.3})
    made = baseline(given, "topk")
    (one, two), (was, _) = layers(made.recipe), layers(given)
    assert (one.router.made_by.method, one.router.top_k, two.router.top_k) == ("train.softmax_topk", 2, 2)
    assert (one.bank.activation, one.bank.gated) == (was.bank.activation, was.bank.gated)
    assert made.recipe.losses == {"balance": 0.3}


def test_topk_leaves_no_shared_part_and_no_loss_of_the_old_router() -> None:
    entropy = {"entropy": {"method": "train.entropy_loss"}}
    given = recipe(swap(**MOE, router=RMOE, losses={**BALANCE, **entropy}), losses={"balance": 0.2, "entropy": 0.1})
    made = baseline(given, "topk")
    assert made.recipe.losses == {"balance": 0.2}
    assert not hasattr(skeleton(made.recipe), "moestro_shared")
    router_swap = {"sites": "mlp", "layers": [1, 2], **SIGMOID, "config": {"num_experts": 8, "top_k": 3}}
    swapped = baseline(recipe(swap(**MOE), router_swap), "topk").recipe
    assert [entry.method for entry in swapped.model.swaps] == ["train.moe", "train.softmax_topk", "train.balance_loss"]
    assert [layer.router.top_k for layer in layers(swapped)] == [3, 3]


def test_a_single_choice_keeps_its_probability() -> None:
    made = baseline(recipe(swap(**MOE, router={"method": "train.random_router", "config": {"top_k": 1}})), "topk")
    assert not any(layer.router.config.renormalise for layer in layers(made.recipe))


def test_other_layers_and_settings_stay() -> None:
    frozen = {"name": "all", "freeze": ["*.router.*", "*.norm.*"], "losses": {"balance": 0.5}}
    given = recipe(
        {"sites": "mlp", "method": "train.moe", "config": MOE},
        {"sites": "mlp", "layers": [0], "method": "train.dense", "config": {"size": 7}},
        losses={"causal": 1.0},
        phases=[{**frozen, "losses": {}}],
        optimizer={"groups": [{"match": ["*.router.*"], "lr": 0.1}, {"match": ["*embed*"], "lr": 0.2}]},
    )
    made = baseline(given, "dense").recipe
    assert widths(made) == [7, 48, 48]
    assert made.phases[0].freeze == ["*.norm.*"]
    assert [group.match for group in made.optimizer.groups] == [["*embed*"]]
    assert made.losses == {"causal": 1.0}


def test_encoder_and_decoder_each_keep_their_dense_layers() -> None:
    model = {
        "model_type": "switch_transformers", "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2,
        "num_decoder_layers": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 2, "num_experts": 4,
    }  # fmt: skip
    route = {"sites": "mlp", "method": "train.softmax_topk", "config": {"num_experts": 4, "top_k": 2}}
    swaps = [{**route, "stack": "encoder", "layers": [1]}, {**route, "stack": "decoder", "layers": [1, 3]}]
    values = recipe(*swaps, objective="seq2seq").model_dump(mode="json", exclude_unset=True)
    given = Recipe.parse({**values, "model": {"config": {**model, "vocab_size": "auto"}, "swaps": swaps}})
    before = [site.path for site in sites(skeleton(given), "mlp") if isinstance(site.module, MoELayer)]
    made = baseline(given, "equal_flops")
    after = [site.path for site in sites(skeleton(made.recipe), "mlp") if hasattr(site.module, "bank")]
    assert len(before) == 3
    assert after == before
    assert made.size.forward_flops == pytest.approx(made.of.forward_flops, rel=0.01)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (recipe(), "dense", "no mixture"),
        (recipe(swap(**MOE)), "topk", "already"),
        (recipe(swap(**MOE)), "sparse", "no baseline 'sparse'; known: dense, topk, equal_flops, equal_parameters"),
        (recipe(swap(**MOE, router=TOP_P)), "dense", "--measured RUN"),
        (recipe(swap("train.monet", axis=8, heads=2, expert_size=4, top_k=2)), "topk", "way of its own"),
        (
            recipe(swap(**MOE), phases=[{"name": "p", "train": ["*.router.*"]}]),
            "dense",
            "phase 'p' trains parts of the mixtures only",
        ),
        (
            recipe({"sites": "linear", "layers": [0], "method": "train.moe", "config": {**MOE, "expert_size": 8}}),
            "dense",
            "not the feed-forward of a block",
        ),
        (load_recipe(RECIPES / "upcycle.yaml"), "dense", "starts from trained weights"),
        (load_recipe(RECIPES / "evomoe.yaml"), "topk", "converts its model when phase 'sparsify' begins"),
    ],
)
def test_recipes_without_such_a_baseline_are_refused(given: Recipe, kind: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        baseline(given, kind)
    assert "\n" not in str(caught.value)


def test_a_run_of_a_baseline_says_what_it_is(tmp_path: Path) -> None:
    train(SHARED, tmp_path, silent=True, baseline="equal_flops")
    made = baseline(SHARED, "equal_flops")
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.startswith("# equal_flops baseline of tiny: feed-forwards of width")
    assert Recipe.parse(yaml.safe_load(text)) == made.recipe
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["recipe"]["name"], told["size"]) == ("tiny-equal-flops", made.size.json())
    assert not mixture_layers(open_model(tmp_path / "model"))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert dry_run(again) == made.size


def test_measured_assignments_decide_where_data_do(tmp_path: Path) -> None:
    given = recipe(swap(**MOE, router=TOP_P), losses={}, steps=6, seed=1)
    train(given, tmp_path / "run", silent=True)
    rows = read_metrics(tmp_path / "run")
    each = sum(row["flops_per_token"] for row in rows) / len(rows)
    made = baseline(given, "equal_flops", measured=tmp_path / "run")
    assert made.of.train_flops == pytest.approx(each, rel=1e-4)
    assert made.size.train_flops == pytest.approx(each, rel=0.01)
    other = recipe(swap(**{**MOE, "num_experts": 4}, router=TOP_P))
    with pytest.raises(ConfigError, match="ran another model"):
        baseline(other, "dense", measured=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run\.json is missing or damaged"):
        baseline(given, "dense", measured=tmp_path / "none")


def test_topk_of_a_ragged_router_pays_the_same_in_all(tmp_path: Path) -> None:
    given = recipe(swap(**MOE, router=TOP_P), steps=200)
    short = given.model_copy(update={"steps": 3})
    train(short, tmp_path / "run", silent=True)
    made = baseline(given, "topk", measured=tmp_path / "run")
    total = made.size.train_flops * made.recipe.total_steps
    assert total == pytest.approx(made.of.train_flops * 200, rel=0.01)
    real = (
        sum(
            sum(row["router"][site]["real_per_token"] for site in row["router"])
            for row in read_metrics(tmp_path / "run")
        )
        / 3
    )
    assert abs(sum(layer.router.top_k for layer in layers(made.recipe)) - real) <= 0.5


def test_the_verb(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SHARED.model_dump(mode="json", exclude_unset=True)))
    assert main(["train", str(path), "--baseline", "dense", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("dense baseline of tiny: feed-forwards of width 88 in the place of 2 mixtures of 3 layers")
    assert main(["train", str(path), "--baseline", "dense", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == baseline(SHARED, "dense").size.parameters
    assert main(["train", str(path), "--baseline", "topk"]) == 0
    assert (tmp_path / "runs" / "tiny-topk" / "recipe.yaml").is_file()
    capsys.readouterr()
    for options, words in (
        (["--baseline", "half"], "no baseline 'half'"),
        (["--measured", "x"], "give --baseline too"),
    ):
        assert main(["train", str(path), *options]) == 2
        assert words in capsys.readouterr().err
    assert set(KINDS) == {"dense", "topk", "equal_flops", "equal_parameters"}


def test_a_stock_mixture_loses_its_loss_with_its_layers(tmp_path: Path) -> None:
    stock = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    given = recipe(model={**stock, "num_key_value_heads": 2}, steps=1)
    train(given, tmp_path / "mixture", silent=True)
    assert set(read_metrics(tmp_path / "mixture")[0]["terms"]) == {"causal", "balance"}
    train(given, tmp_path / "dense", silent=True, baseline="dense")
    assert set(read_metrics(tmp_path / "dense")[0]["terms"]) == {"causal"}
    assert widths(baseline(given, "dense").recipe) == [2 * 40] * 3
