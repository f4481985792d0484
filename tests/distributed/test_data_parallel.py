"""Two ranks take the steps that one rank takes, whatever experts either of them uses."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moestro.core.layer import mixture_layers
from moestro.data.dataset import Dataset
from moestro.models.load import load
from moestro.testing.distributed import run_distributed
from moestro.testing.training import TinyMixture, packed, recipe
from moestro.training.checkpoint import find_checkpoints
from moestro.training.log import read_metrics
from moestro.training.loop import Trainer
from moestro.training.objectives import Causal
from moestro.training.parallel import Ranks, gathered_weights
from moestro.training.recipe import Recipe
from moestro.training.run import prepare, seed_all
from moestro.training.run import train as train_recipe


# With Adam's usual eps the rounding of a gradient near 0 becomes a step of its own; a larger one keeps updates smooth.
SMOOTH = {"lr": 0.01, "eps": 1e-3}
LOSSES = {"train.balance_loss": {"scope": "global"}, "train.z_loss": {}}


def settings(**changes: Any) -> Recipe:
    return recipe(
        steps=5,
        accumulation=2,
        losses={"balance": 0.3, "z": 0.1},
        optimizer={**SMOOTH, "clip": 0.05},
        **changes,
    )


def tell(run: Trainer) -> dict[str, Any]:
    weights = gathered_weights(run.model, run.group) or run.model.state_dict()
    return {name: tensor.tolist() for name, tensor in weights.items()}


def train(rank: int, world: int, out: str, *, bias: bool) -> dict[str, Any]:
    router = "train.sigmoid_bias" if bias else "train.softmax_topk"
    model = TinyMixture(router=router, losses=LOSSES, layers=2, seed=rank)  # ranks start apart on purpose
    run = Trainer(model, settings(), packed(), Causal(), Path(out), group=Ranks(rank, world))
    run.run(silent=True)
    return tell(run)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What every scenario gave on two ranks: one start of the processes serves all tests."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_distributed(scenarios, 2, str(folder))


def scenarios(rank: int, world: int, folder: str) -> dict[str, Any]:
    return {
        "plain": train(rank, world, f"{folder}/plain", bias=False),
        "bias": train(rank, world, f"{folder}/bias", bias=True),
        "starved": starve(rank, world, f"{folder}/starved"),
        "resumed": resume_together(rank, world, f"{folder}/resumed"),
        "sharded": shard_and_train(rank, world, f"{folder}/sharded"),
        "prepared": prepare_apart(rank, world, f"{folder}/prepared"),
        "recipe": from_recipe(f"{folder}/recipe", "fsdp", cut=True),
    }


@pytest.mark.parametrize("bias", [False, True])
def test_two_ranks_are_one(bias: bool, two_ranks: Any, tmp_path: Path) -> None:
    name = "bias" if bias else "plain"
    folder, (first, second) = two_ranks
    one = train(0, 1, str(tmp_path), bias=bias)
    assert first[name] == second[name]
    close(first[name], one)
    alone, together = read_metrics(tmp_path), read_metrics(folder / name)
    for a, b in zip(alone, together, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["targets"] == b["targets"]
    assert [saved.step for saved in find_checkpoints(folder / name / "checkpoints")[0]] == [5]


def close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=1e-4, atol=1e-6)


def shard_and_train(rank: int, world: int, out: str) -> dict[str, Any]:
    """FSDP2: sharded from the same start on every rank."""
    model = TinyMixture(losses=LOSSES, layers=2)
    group = Ranks(rank, world, "fsdp")
    run = Trainer(model, settings(parallel={"kind": "fsdp"}), packed(), Causal(), Path(out), group=group)
    sharded = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]
    whole = sum(p.numel() for p in model.parameters())
    run.run(silent=True)
    return {"weights": tell(run), "share": sharded / whole}


def test_sharded_ranks_are_one(two_ranks: Any, tmp_path: Path) -> None:
    folder, (first, second) = two_ranks
    one = train(0, 1, str(tmp_path), bias=False)
    assert first["sharded"]["share"] + second["sharded"]["share"] == pytest.approx(1.0)
    assert first["sharded"]["weights"] == second["sharded"]["weights"]
    close(first["sharded"]["weights"], one)
    assert read_metrics(tmp_path)[-1]["loss"] == pytest.approx(read_metrics(folder / "sharded")[-1]["loss"], rel=1e-5)
    saved = find_checkpoints(folder / "sharded" / "checkpoints")[0][-1]
    whole = load_file(saved.model / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in whole.items()} == {
        name: list(torch.tensor(value).shape) for name, value in one.items()
    }


def from_recipe(out: str, kind: str, *, cut: bool) -> None:
    """A Transformers model from a recipe, evaluated on the way, cut in the middle if asked."""
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    text = {"source": "builtin:german", "sequence_length": 32}
    settings = recipe(
        model={"config": llama, "swaps": [{"sites": "mlp", "method": "train.moe", "config": {"num_experts": 4}}]},
        data={**text, "tokenizer": "bpe:300"},
        eval={"every": 1, "limit": 2, "data": {**text, "split": "heldout"}},
        optimizer=SMOOTH,
        parallel={"kind": kind},
    )
    if cut:
        train_recipe(settings.model_copy(update={"steps": 2}), out, silent=True)
    train_recipe(settings, out, silent=True)


def prepare_apart(rank: int, world: int, out: str) -> dict[str, Any]:
    """A recipe on ranks that measure different compute types: one type, one model, noise of their own."""
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    values = recipe(
        model={"config": {**config, "num_attention_heads": 1, "num_key_value_heads": 1}},
        data={"source": "builtin:german", "sequence_length": 32, "tokenizer": "bytes"},
        precision="auto",
    )
    fast = (torch.float32, torch.bfloat16)[rank]
    with patch("moestro.training.precision.matmul_seconds", lambda dtype: 1.0 if dtype == fast else 9.0):
        seed_all(values.seed)
        run, _, _ = prepare(values, Path(out), Ranks(rank, world))
    return {"dtype": str(run.dtype), "weights": tell(run), "noise": torch.rand(4).tolist(), "numpy": np.random.rand()}


def test_ranks_share_type_and_weights_but_not_noise(two_ranks: Any) -> None:
    first, second = (answers["prepared"] for answers in two_ranks[1])
    assert first["dtype"] == second["dtype"] == "torch.float32"
    assert first["weights"] == second["weights"]
    assert first["noise"] != second["noise"]
    assert first["numpy"] != second["numpy"]


def test_a_sharded_recipe_is_resumed_and_saved_whole(two_ranks: Any, tmp_path: Path) -> None:
    folder, _ = two_ranks
    from_recipe(str(tmp_path), "ddp", cut=False)
    one, two = (load(path / "model").state_dict() for path in (tmp_path, folder / "recipe"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    lines = [[row for row in read_metrics(path) if "heldout" in row] for path in (tmp_path, folder / "recipe")]
    assert [row["step"] for row in lines[1]] == [1, 2, 3, 4]
    assert [row["heldout"]["causal"] for row in lines[0]] == pytest.approx(
        [row["heldout"]["causal"] for row in lines[1]], rel=1e-5
    )


class Branches(nn.Module):
    """Two small networks; a row goes to the one its first token names, so a rank may use only one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([TinyMixture(seed=1), TinyMixture(seed=2)])
        self.never = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        which = (input_ids[:, 0] >= 6).long()
        out = input_ids.new_zeros(*input_ids.shape, 13, dtype=torch.float32)
        for number, part in enumerate(self.parts):
            rows = (which == number).nonzero().flatten()
            if len(rows):
                out[rows] = part(input_ids[rows])
        return out


def starve(rank: int, world: int, out: str) -> dict[str, Any]:
    """Rank 0 gets rows for branch 0 only, rank 1 for branch 1 only; and each branch starves its expert 3."""
    model = Branches()
    for layer in mixture_layers(model).values():
        with torch.no_grad():
            layer.router.weight[3].fill_(0.0)  # type: ignore[index,union-attr]
            layer.router.weight[0].fill_(0.0)  # type: ignore[index,union-attr]
    data = packed(64).sources["data"]
    rows = [data[i] for i in range(len(data))]
    low = [row for row in rows if row["input_ids"][0] < 6][:8]
    high = [row for row in rows if row["input_ids"][0] >= 6][:8]
    mixed = [*low[:4], *high[:4], *low[4:], *high[4:]]
    group = Ranks(rank, world) if world > 1 else Ranks()
    values = recipe(steps=2, sampler={"kind": "sequential"}, optimizer={"lr": 0.05, "weight_decay": 0.0})
    run = Trainer(model, values, Dataset({"data": mixed}), Causal(), Path(out), group=group)
    run.run(silent=True)
    return tell(run)


def test_experts_that_one_rank_never_uses_do_not_hang(two_ranks: Any, tmp_path: Path) -> None:
    first, second = (answers["starved"] for answers in two_ranks[1])
    one = starve(0, 1, str(tmp_path))
    assert first == second
    close(first, one)
    fresh = Branches().state_dict()
    torch.testing.assert_close(torch.tensor(first["never.weight"]), fresh["never.weight"], rtol=0, atol=0)
    assert not torch.equal(torch.tensor(first["parts.0.head.weight"]), fresh["parts.0.head.weight"])


def resume_together(rank: int, world: int, out: str) -> list[Any]:
    group = Ranks(rank, world)

    def fresh(folder: Path) -> Trainer:
        torch.manual_seed(rank)
        model = TinyMixture(router="train.noisy_topk", layers=2)
        return Trainer(
            model, recipe(steps=4, checkpoint={"every": 2, "keep": 9}), packed(), Causal(), folder, group=group
        )

    whole = fresh(Path(out) / "whole")
    whole.run(silent=True)
    again = fresh(Path(out) / "again")
    again.resume(find_checkpoints(Path(out) / "whole" / "checkpoints")[0][0])
    start = again.step
    again.run(silent=True)
    return [start, tell(whole) == tell(again), json.dumps(tell(again))]


def test_resume_on_two_ranks_is_bit_for_bit(two_ranks: Any) -> None:
    first, second = (answers["resumed"] for answers in two_ranks[1])
    assert first[:2] == second[:2] == [2, True]
    assert first[2] == second[2]


def fail(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("a rank that fails is told")


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="a rank that fails is told"):
        run_distributed(fail, 2)
