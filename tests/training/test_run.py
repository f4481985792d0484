"""Whole runs from a recipe: the model it describes, resumed to the bit, saved so that everything reopens it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import moestro
from moestro.cli import main
from moestro.core.errors import ConfigError, TrainError
from moestro.core.layer import mixture_layers
from moestro.data.dataset import Dataset
from moestro.testing.training import mixture
from moestro.testing.training import recipe as plain_recipe
from moestro.training import precision
from moestro.training.build import build_model, loss_weights, open_model, reference_tokenizer
from moestro.training.checkpoint import find_checkpoints
from moestro.training.evaluate import score_texts
from moestro.training.log import read_metrics
from moestro.training.loop import Trainer
from moestro.training.objectives import Classification
from moestro.training.parallel import Ranks
from moestro.training.recipe import Recipe
from moestro.training.run import dry_run, prepare, recipe_tokenizer, train
from moestro.training.size import size_of


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
MIXTURE = {
    "sites": "mlp",
    "method": "train.moe",
    "config": {
        "num_experts": 4,
        "expert_size": 16,
        "router": {"method": "train.sigmoid_bias", "config": {"top_k": 2}},
        "losses": {"balance": {"method": "train.balance_loss", "config": {"scope": "global"}}},
    },
}


def values(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"config": LLAMA, "swaps": [MIXTURE]},
        "data": {"source": "builtin:german", "tokenizer": "bpe:300", "sequence_length": 32},
        "losses": {"balance": 0.01},
        "optimizer": {"lr": 0.01},
        "precision": "float32",
        "steps": 4,
        "batch_size": 4,
        "accumulation": 2,
        "checkpoint": {"every": 2},
        "monitor": {"every": 2},
        **changes,
    }


def recipe(**changes: Any) -> Recipe:
    return Recipe.parse(values(**changes))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    heldout = {"source": "builtin:german", "split": "heldout", "sequence_length": 32}
    train(recipe(eval={"every": 2, "limit": 3, "data": heldout}), out, silent=True)
    return out


def test_what_a_run_leaves(ran: Path) -> None:
    rows = read_metrics(ran)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert set(steps[0]["terms"]) == {"causal", "balance"}
    assert [row["step"] for row in rows if "heldout" in row] == [2, 4]
    sites = steps[1]["router"]
    assert set(sites) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert sites["model.layers.0.mlp"]["assignments"] == 2 * 4 * 32 * 2
    assert sum(sites["model.layers.0.mlp"]["load"]) == pytest.approx(1, abs=1e-5)
    assert "router" not in steps[0]
    assert not (ran / ".run.lock").exists()


def test_the_model_reopens_everywhere(ran: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = reference_tokenizer(str(ran / "model"))
    assert tokenizer is not None
    ids = torch.tensor([tokenizer("Am Bahnhof der kleinen Stadt")["input_ids"]])
    ours = moestro.load(str(ran / "model"))
    theirs = AutoModelForCausalLM.from_pretrained(ran / "model").eval()
    kept = open_model(find_checkpoints(ran / "checkpoints")[0][-1].model).eval()
    with torch.no_grad():
        wanted = ours(input_ids=ids).logits
        assert torch.equal(theirs(input_ids=ids).logits, wanted)
        assert torch.equal(kept(input_ids=ids).logits, wanted)
    receipt = json.loads((ran / "model" / "receipt.json").read_text())
    assert receipt["training"]["steps"] == 4
    assert receipt["training"]["recipe"]["name"] == "tiny"
    biases = [layer.router.selection_bias for layer in mixture_layers(ours).values()]
    assert all(bool(bias.any()) for bias in biases)


def test_an_interrupted_run_goes_on_to_the_same_bits(ran: Path, tmp_path: Path) -> None:
    changed = recipe()
    stopped = train(changed.model_copy(update={"steps": 2}), tmp_path, silent=True)
    assert stopped.steps == 2
    train(changed, tmp_path, silent=True)
    one = open_model(ran / "model").state_dict()
    two = open_model(tmp_path / "model").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_phase_with_a_plan_survives_a_resume(tmp_path: Path) -> None:
    """The plan is applied once, when its phase begins, and the moments follow the experts."""
    parts = values(
        model={
            "config": LLAMA,
            "plan": {"method": "convert.upcycle", "config": {"num_experts": 2, "top_k": 1, "noise": 0.1}},
        },
        losses={},
        phases=[
            {"name": "wide", "steps": 2, "freeze": ["*embed_tokens*"]},
            {"name": "fine", "on_enter": {"method": "convert.segment", "config": {"segments": 2}}},
        ],
        checkpoint={"every": 1, "keep": 9},
    )
    whole = Recipe.parse(parts)
    train(whole, tmp_path / "whole", silent=True)
    model = open_model(tmp_path / "whole" / "model")
    assert {layer.bank.num_experts for layer in mixture_layers(model).values()} == {4}
    for cut in (1, 2, 3):
        folder = tmp_path / f"cut{cut}"
        (folder / "checkpoints").mkdir(parents=True)
        source = tmp_path / "whole" / "checkpoints" / f"step-{cut:08d}"
        source.rename(folder / "checkpoints" / source.name)
        train(whole, folder, silent=True)
        wanted, found = model.state_dict(), open_model(folder / "model").state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), cut


def test_a_phase_prunes_by_what_its_own_training_rows_say(tmp_path: Path) -> None:
    """The planner measures on the run's data; a resumed run after the phase began does not measure again."""
    parts = values(
        model={"config": LLAMA, "plan": {"method": "convert.upcycle", "config": {"num_experts": 4, "noise": 0.5}}},
        losses={},
        phases=[
            {"name": "train", "steps": 2},
            {
                "name": "recover",
                "on_enter": {
                    "method": "compress.prune_experts",
                    "config": {"keep": 3, "policy": "all"},
                    "rows": 5,
                },
            },
        ],
        checkpoint={"every": 1, "keep": 9},
    )
    train(Recipe.parse(parts), tmp_path / "run", silent=True)
    model = open_model(tmp_path / "run" / "model")
    assert {layer.bank.num_experts for layer in mixture_layers(model).values()} == {3}
    receipt = json.loads((tmp_path / "run" / "model" / "receipt.json").read_text())
    note = receipt["surgery"][-1]["notes"]["calibration"]
    assert note["policy"] == "all"
    assert {tuple(row["tokens"]) for row in note["layers"]} == {(note["tokens"],) * 4}
    assert 0 < note["tokens"] <= 5 * parts["data"]["sequence_length"]


def test_training_from_an_opened_model_lowers_its_loss(ran: Path, tmp_path: Path) -> None:
    texts = moestro_texts()
    again = recipe(
        model={"load": str(ran / "model")},
        data={"source": "builtin:german", "sequence_length": 32},
        steps=8,
        gradient_checkpointing=True,
        teachers={"before": str(ran / "model")},
    )
    train(again, tmp_path, silent=True)
    tokenizer = reference_tokenizer(str(ran / "model"))
    assert tokenizer is not None
    before = score_texts(moestro.load(str(ran / "model")), tokenizer, texts, context=32)
    after = score_texts(moestro.load(str(tmp_path / "model")), tokenizer, texts, context=32)
    assert after.bits_per_byte < before.bits_per_byte


def moestro_texts() -> list[str]:
    from moestro.data.corpora import corpus

    return corpus("german", "train")[:2]


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    for name, on in (("off", False), ("on", True)):
        train(recipe(gradient_checkpointing=on, steps=2), tmp_path / name, silent=True)
    one, two = (open_model(tmp_path / name / "model").state_dict() for name in ("off", "on"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "model",
    [
        {"config": LLAMA},
        {"config": LLAMA, "swaps": [MIXTURE]},
        {"config": LLAMA, "plan": {"method": "convert.upcycle", "config": {"num_experts": 4}}},
        {"config": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}},
    ],
    ids=["dense", "swapped", "planned", "mixtral"],
)
def test_dry_run_counts_what_would_be_built(model: dict[str, Any]) -> None:
    settings = recipe(model=model)
    said = dry_run(settings)
    built = build_model(settings, "causal", recipe_tokenizer(settings))
    assert said == size_of(built, 32)
    assert said.parameters == sum(p.numel() for p in built.parameters())
    banks = [p for layer in mixture_layers(built).values() for p in layer.bank.parameters()]
    share = next((layer.router.top_k / layer.bank.num_experts for layer in mixture_layers(built).values()), 1)
    assert said.active == said.parameters - round(sum(p.numel() for p in banks) * (1 - share))
    assert said.weight_bytes == 4 * said.parameters


def test_flops_are_those_torch_counts() -> None:
    """Against torch's own counter on the dense model, which counts the pairs that the mask hides too."""
    from torch.utils.flop_counter import FlopCounterMode

    settings = recipe(model={"config": {**LLAMA, "attn_implementation": "eager"}})
    model = build_model(settings, "causal", recipe_tokenizer(settings))
    model.set_attn_implementation("eager")
    said = size_of(model, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 32, dtype=torch.int64), use_cache=False)
    hidden_pairs = 2 * 4 * 15.5 * 32  # layers, positions after a token's own on average, width of all heads
    rotary = counter.get_total_flops() / 32 - (said.forward_flops + hidden_pairs)
    assert 0 <= rotary < 0.01 * said.forward_flops


def test_a_run_of_a_stock_mixture_takes_its_coefficient_over() -> None:
    config = {
        **LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.05,
    }
    settings = recipe(model={"config": config}, losses={})
    model = build_model(settings, "causal", recipe_tokenizer(settings))
    assert loss_weights(settings, model) == {"balance": 0.05}
    assert loss_weights(recipe(model={"config": config}, losses={"balance": 0.0}), model) == {"balance": 0.0}


def test_folders_that_cannot_be_used(ran: Path, tmp_path: Path) -> None:
    import fcntl

    with pytest.raises(ConfigError, match=r"holds a run \(step 4\)"):
        train(recipe(), ran, fresh=True, silent=True)
    (tmp_path / "busy").mkdir()
    with (tmp_path / "busy" / ".run.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TrainError, match="another process is training there"):
            train(recipe(), tmp_path / "busy", silent=True)
    with pytest.raises(ConfigError, match="cannot be shared by 3 ranks"):
        Ranks(0, 3).share(4)


# -- the command line -------------------------------------------------------------------------------------------


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(steps=2)))
    assert main(["train", str(path), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 2
    assert said["tokens"] == 2 * 4 * 32
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"{said['parameters']:,}" in capsys.readouterr().out
    assert main(["train", str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "trained 2 steps" in printed.out
    assert "step 2/2  loss" in printed.err
    assert main(["eval", str(tmp_path / "out" / "model"), "--data", "builtin:german", "--context", "32", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["split"] == "heldout"
    assert score["bytes"] > 2000
    assert score["bits_per_byte"] < 8.5
    assert main(["eval", str(tmp_path / "out" / "model"), "--data", str(tmp_path / "none.txt")]) == 2
    assert "no such data file" in capsys.readouterr().err


def test_a_bad_recipe_is_one_line_and_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**values(), "stpes": 1}))
    assert main(["train", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {path}: unknown key 'stpes'; did you mean 'steps'?\n"
    assert not (tmp_path / "out").exists()


def test_the_compute_type_is_measured_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(dtype: torch.dtype) -> None:
        monkeypatch.setattr(precision, "matmul_seconds", lambda asked: 1.0 if asked == dtype else 9.0)

    settings = recipe(precision="auto", steps=2)
    faster(torch.float32)
    train(settings, tmp_path, silent=True)
    faster(torch.bfloat16)
    (saved,) = find_checkpoints(tmp_path / "checkpoints")[0]
    resumed, _, lines = prepare(settings, tmp_path, Ranks(), saved)
    assert resumed.dtype == torch.float32
    assert lines[0] == "compute type float32, as the run began"
    assert prepare(settings, tmp_path, Ranks())[0].dtype == torch.bfloat16


# -- any module, any numbers ------------------------------------------------------------------------------------


def test_a_digit_classifier_is_as_welcome(tmp_path: Path) -> None:
    """Rows of plain numbers, a plain module with a mixture, micro-batches with a loss per token."""
    torch.manual_seed(0)
    centres = torch.randn(4, 8)
    rows = [{"x": centres[i % 4] + 0.1 * torch.randn(8), "label": i % 4} for i in range(64)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            losses = {"train.z_loss": {}, "train.balance_loss": {"scope": "global"}}
            self.mix = mixture("mix", 4, 8, "train.softmax_topk", {}, losses)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x + self.mix(x))
            return logits

    found = {}
    for accumulation in (1, 4):
        settings = plain_recipe(
            steps=30,
            batch_size=16,
            accumulation=accumulation,
            losses={"z": 1e-3, "balance": 0.01},
            optimizer={"lr": 0.02, "eps": 1e-3},
        )
        out = tmp_path / str(accumulation)
        net = Net()
        Trainer(net, settings, Dataset({"digits": rows}), Classification(), out).run(silent=True)
        losses = [row["terms"]["classification"] for row in read_metrics(out)]
        assert losses[-1] < 0.2 * losses[0]
        found[accumulation] = net.state_dict()
    for name, value in found[1].items():
        torch.testing.assert_close(found[4][name], value, rtol=1e-3, atol=1e-5)
