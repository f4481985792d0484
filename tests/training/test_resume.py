"""A run that is cut and resumed is, bit for bit, the run that was never cut."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError, LoadError, NonFiniteError
from moestro.models.atomic import verify_folder
from moestro.testing.training import TinyMixture, packed, recipe
from moestro.training.checkpoint import find_checkpoints, latest_checkpoint, rng_state, set_rng_state
from moestro.training.log import read_metrics
from moestro.training.loop import Trainer, TrainResult
from moestro.training.objectives import Causal
from moestro.training.parallel import Ranks
from moestro.training.recipe import Recipe
from moestro.training.step import StepReport


STEPS = 20
LOSSES = {"train.balance_loss": {"scope": "global"}, "train.z_loss": {}}


def whole_recipe() -> Recipe:
    """Everything that has state: accumulation, phases with ramps and frozen parts, a sampler switch, noise, bias."""
    return recipe(
        steps=STEPS,
        accumulation=2,
        losses={"balance": 0.01, "z": 0.001},
        schedule={"kind": "cosine", "warmup": 3},
        phases=[
            {"name": "warm", "steps": 7, "freeze": ["embed.*"], "values": {"bias_speed": {"start": 0.1, "end": 0.01}}},
            {"name": "rest", "sampler": {"kind": "sequential"}, "losses": {"z": {"start": 0.01, "end": 0.0}}},
        ],
        checkpoint={"every": 1, "keep": STEPS},
    )


def model() -> nn.Module:
    """Bias updates in one layer, random choice in the other, dropout between: all of it must come back."""
    net = TinyMixture(router="train.sigmoid_bias", losses=LOSSES, layers=1)
    noisy = TinyMixture(router="train.noisy_topk", losses=LOSSES, seed=1).blocks[0]
    noisy.site = "blocks.1"  # type: ignore[assignment]
    net.blocks.append(noisy)
    net.blocks.append(nn.Dropout(0.2))
    return net


def trainer(out: Path, **changes: Any) -> Trainer:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)

    def also_uses_other_generators(run: Trainer, report: StepReport) -> None:
        with torch.no_grad():
            run.model.head.bias[0] += 1e-3 * (random.gauss(0, 1) + np.random.standard_normal())  # type: ignore[union-attr,index,operator]

    return Trainer(
        model(), changes.pop("recipe", whole_recipe()), packed(), Causal(), out, hooks=[also_uses_other_generators]
    )


def everything(run: Trainer) -> dict[str, Tensor]:
    state = dict(run.model.state_dict())
    for name, parameter in run.model.named_parameters():
        state.update({f"{name}::{key}": value for key, value in run.optimizer.state[parameter].items()})
    return {**state, **rng_state(Ranks())}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("uncut")
    run = trainer(out)
    run.run(silent=True)
    return out, {name: value.clone() for name, value in everything(run).items()}, read_metrics(out)


@pytest.mark.parametrize("cut", range(1, STEPS))
def test_a_run_cut_anywhere_resumes_bit_for_bit(cut: int, uncut: Any, tmp_path: Path) -> None:
    out, wanted, rows = uncut
    saved = next(saved for saved in find_checkpoints(out / "checkpoints")[0] if saved.step == cut)
    torch.manual_seed(999)  # whatever the new process did before
    run = trainer(tmp_path)
    torch.rand(7)
    run.resume(saved)
    assert run.run(silent=True) == TrainResult(STEPS, rows[-1]["loss"])
    found = everything(run)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    again = [{k: v for k, v in row.items() if k in ("step", "loss", "terms", "lr")} for row in read_metrics(tmp_path)]
    assert again == [{k: v for k, v in row.items() if k in ("step", "loss", "terms", "lr")} for row in rows[cut:]]


def test_the_run_has_state_worth_testing(uncut: Any) -> None:
    _, wanted, rows = uncut
    fresh = model().state_dict()
    assert all(not torch.equal(wanted[name], fresh[name]) for name in fresh if not name.endswith("z_loss"))
    assert {row["phase"] for row in rows} == {"warm", "rest"}
    assert len({row["loss"] for row in rows}) == STEPS


def test_generators_come_back(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value waiting
    np.random.standard_normal()
    state = rng_state(Ranks())
    wanted = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1), random.random())
    set_rng_state(state, Ranks())
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1), random.random()) == wanted


def test_keeps_the_last_complete_ones(tmp_path: Path) -> None:
    trainer(
        tmp_path, recipe=recipe(steps=6, losses={"balance": 0.1, "z": 0.1}, checkpoint={"every": 2, "keep": 2})
    ).run(silent=True)
    found, notes = find_checkpoints(tmp_path / "checkpoints")
    assert [saved.step for saved in found] == [4, 6]
    assert notes == []
    for saved in found:
        assert {"model/model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"} == set(
            verify_folder(saved.path, deep=True)
        )


def test_what_a_killed_save_left_is_passed_over_with_a_line(tmp_path: Path, uncut: Any) -> None:
    small = recipe(steps=2, losses={"balance": 0.1, "z": 0.1}, checkpoint={"every": 1})
    trainer(tmp_path, recipe=small).run(silent=True)
    folder = tmp_path / "checkpoints"
    draft = folder / ".step-00000003.tmp-0123456789abcdef"
    (draft / "model").mkdir(parents=True)
    (draft / "model" / "model.safetensors").write_bytes(b"half")
    (folder / "step-00000009").mkdir()
    (folder / "step-00000009" / "state.json").write_text("{}")
    found, notes = latest_checkpoint(folder)
    assert found is not None
    assert found.step == 2
    assert any("step-00000003" in note and "removed" in note for note in notes)
    assert any("step-00000009" in note and "skipped" in note for note in notes)
    assert not draft.exists()


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    trainer(tmp_path, recipe=recipe(steps=2, losses={"balance": 0.1, "z": 0.1}, checkpoint={"every": 1})).run(
        silent=True
    )
    damaged = tmp_path / "checkpoints" / "step-00000002" / "optimizer.safetensors"
    body = bytearray(damaged.read_bytes())
    body[-5] ^= 1
    damaged.write_bytes(body)
    found, notes = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 1
    assert any("optimizer.safetensors" in note for note in notes)


def test_a_damaged_later_checkpoint_does_not_push_out_sound_ones(tmp_path: Path) -> None:
    """Step 5 is damaged, the run went on from an earlier one and saves step 4: that one must stay."""
    losses = {"balance": 0.1, "z": 0.1}
    run = trainer(tmp_path, recipe=recipe(steps=6, losses=losses, checkpoint={"every": 3, "keep": 1}))
    run.step = 5
    run.save()
    weights = tmp_path / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    run.step = 4
    run.save()
    found, _ = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 4


def test_nothing_non_finite_is_ever_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, recipe=recipe(steps=2, losses={"balance": 0.1, "z": 0.1}))
    with torch.no_grad():
        run.model.get_parameter("blocks.0.bank.down_proj")[1, 2, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.bank\.down_proj .*1 infinite"):
        run.save()
    assert find_checkpoints(tmp_path / "checkpoints") == ([], [])


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    losses = {"balance": 0.1, "z": 0.1}
    trainer(tmp_path, recipe=recipe(steps=1, losses=losses)).run(silent=True)
    saved, _ = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.01, is 0\.02"):
        trainer(tmp_path, recipe=recipe(steps=1, losses=losses, optimizer={"lr": 0.02})).resume(saved)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    losses = {"balance": 0.1, "z": 0.1}
    trainer(tmp_path, recipe=recipe(steps=1, losses=losses)).run(silent=True)
    saved, _ = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    other = Trainer(TinyMixture(dim=16), recipe(steps=1, losses=losses), packed(), Causal(), tmp_path)
    with pytest.raises(LoadError, match="does not fit"):
        other.resume(saved)


KILLED = """
import sys
from pathlib import Path
from moestro.testing.training import TinyMixture, packed, recipe
from moestro.training.checkpoint import latest_checkpoint
from moestro.training.loop import Trainer
from moestro.training.objectives import Causal
from moestro.training.run import seed_all

out = Path(sys.argv[1])
seed_all(0)
steps = recipe(steps=60, checkpoint={"every": 1, "keep": 2})
tell = lambda run, report: print("step", run.step, flush=True)
run = Trainer(TinyMixture(router="train.sigmoid_bias"), steps, packed(), Causal(), out, hooks=[tell])
saved, notes = latest_checkpoint(out / "checkpoints")
if saved is not None:
    run.resume(saved)
print("at", run.step, flush=True)
run.run(silent=True)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    """kill -9 while it saves at every step, then the same command again, until it is through."""

    def start(out: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", KILLED, str(out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole = start(tmp_path / "whole")
    assert "done" in whole.communicate(timeout=300)[0]
    reached = []
    pause = random.Random(0)
    for _ in range(8):
        process = start(tmp_path / "killed")
        assert process.stdout is not None
        reached.append(int(process.stdout.readline().split()[1]))
        for _ in range(pause.randint(2, 6)):
            process.stdout.readline()
        time.sleep(pause.uniform(0, 0.03))  # somewhere in the save that follows the step
        process.kill()
        process.communicate()
    assert all(later > earlier for earlier, later in itertools.pairwise(reached))
    last = start(tmp_path / "killed")
    assert "done" in last.communicate(timeout=300)[0]
    one, two = (latest_checkpoint(tmp_path / name / "checkpoints")[0] for name in ("whole", "killed"))
    assert one is not None
    assert two is not None
    assert one.step == two.step == 60
    for part in ("optimizer", "rng"):
        wanted, found = one.tensors(part), two.tensors(part)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (one.model / "model.safetensors").read_bytes() == (two.model / "model.safetensors").read_bytes()


SCRIPT = """
import sys
from pathlib import Path
from moestro.testing.training import TinyMixture, packed, recipe
from moestro.training.loop import Trainer
from moestro.training.objectives import Causal

def tell(run, report):
    print("step", run.step, flush=True)
    if run.step == 2:
        sys.stdin.readline()

run = Trainer(TinyMixture(), recipe(steps=10**6), packed(), Causal(), Path(sys.argv[1]), hooks=[tell])
result = run.run()
print("ended", result.steps, result.stopped_by, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    while "step 2" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate("\n", timeout=60)
    assert process.returncode == 0, err
    assert f"{signal.Signals(number).name}: finishing step" in err
    saved, _ = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    assert f"ended {saved.step} {int(number)}" in out
    assert f"stopped by a signal after step {saved.step} of 1000000" in err
    state = json.loads((saved.path / "state.json").read_text())
    assert state["sampler"]["consumed"] == {"*": saved.step * 8}
