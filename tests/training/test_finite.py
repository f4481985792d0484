"""A NaN or an infinity stops the run in the step it appears in, and the message names the tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import NonFiniteError
from moestro.testing.training import TinyMixture, packed, recipe
from moestro.training.checkpoint import latest_checkpoint
from moestro.training.finite import describe, weights_are_finite
from moestro.training.loop import Trainer
from moestro.training.objectives import Causal


def poison(name: str, value: float) -> Callable[[Trainer], None]:
    def act(run: Trainer) -> None:
        with torch.no_grad():
            run.model.get_parameter(name).flatten()[3] = value

    return act


def poison_output(path: str) -> Callable[[Trainer], None]:
    def act(run: Trainer) -> None:
        run.model.get_submodule(path).register_forward_hook(lambda m, i, out: out * float("inf"))

    return act


def poison_gradient(name: str) -> Callable[[Trainer], None]:
    def act(run: Trainer) -> None:
        run.model.get_parameter(name).register_hook(lambda gradient: gradient * float("nan"))

    return act


def poison_unused_expert(run: Trainer) -> None:
    """No token reaches expert 3, so neither loss nor gradient shows its weight."""
    layer = run.model.get_submodule("blocks.0")
    with torch.no_grad():
        run.model.get_parameter("embed.weight").abs_()
        layer.router.weight[3] = -100.0  # type: ignore[union-attr,index]
        layer.bank.gate_up_proj[3, 0, 0] = float("nan")  # type: ignore[union-attr,index]


CASES: list[tuple[str, Callable[[Trainer], None], str]] = [
    ("weight", poison("head.weight", float("nan")), r"weight head\.weight .*1 NaN of 104 values, first at \[0, 3\]"),
    ("weight inf", poison("embed.weight", float("inf")), r"weight embed\.weight .*1 infinite"),
    ("unused expert", poison_unused_expert, r"weight blocks\.0\.bank\.gate_up_proj .*first at \[3, 0, 0\]"),
    ("activation", poison_output("blocks.0.bank"), r"the output of blocks\.0\.bank is not finite"),
    ("gradient", poison_gradient("blocks.0.bank.down_proj"), r"the gradient of blocks\.0\.bank\.down_proj"),
]


@pytest.mark.parametrize(("what", "act", "message"), CASES, ids=[case[0] for case in CASES])
def test_found_in_the_same_step_and_named(
    what: str, act: Callable[[Trainer], None], message: str, tmp_path: Path
) -> None:
    def at_two(run: Trainer, report: Any) -> None:
        if run.step == 2:
            act(run)

    run = Trainer(TinyMixture(), recipe(steps=9, checkpoint={"every": 1}), packed(), Causal(), tmp_path, hooks=[at_two])
    # A weight that goes bad between two steps would reach the checkpoint first; here the hook runs before the save.
    run.recipe = recipe(steps=9, checkpoint={"every": 2} if what in ("activation", "gradient") else {"every": 7})
    with pytest.raises(NonFiniteError, match="step 3: " + message):
        run.run(silent=True)
    assert run.step == 2
    saved, _ = latest_checkpoint(tmp_path / "checkpoints")
    assert (saved.step if saved else None) == (2 if what in ("activation", "gradient") else None)


def test_a_bad_weight_is_not_saved_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    def at_three(run: Trainer, report: Any) -> None:
        if run.step == 3:
            poison("head.bias", float("nan"))(run)

    run = Trainer(
        TinyMixture(), recipe(steps=9, checkpoint={"every": 1}), packed(), Causal(), tmp_path, hooks=[at_three]
    )
    with pytest.raises(NonFiniteError, match=r"weight head\.bias"):
        run.run(silent=True)
    saved, _ = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.step == 2


def test_a_norm_that_overflows_is_named(tmp_path: Path) -> None:
    def huge(run: Trainer, report: Any) -> None:
        run.model.get_parameter("head.weight").register_hook(lambda gradient: gradient * 1e25)

    run = Trainer(TinyMixture(), recipe(steps=3), packed(), Causal(), tmp_path, hooks=[huge])
    with pytest.raises(NonFiniteError, match=r"norm overflows, the largest entry .* is in head\.weight"):
        run.run(silent=True)


def test_a_bad_loss_is_named(tmp_path: Path) -> None:
    class Broken(Causal):
        def __call__(self, model: nn.Module, batch: dict[str, Tensor], teachers: Any) -> Any:
            losses = super().__call__(model, batch, teachers)
            term = losses["causal"]
            return {"causal": term, "extra": type(term)(term.total * float("nan"), "token")}

    run = Trainer(TinyMixture(), recipe(), packed(), Broken(), tmp_path)
    with pytest.raises(NonFiniteError, match="step 1: loss extra is nan"):
        run.run(silent=True)


def test_the_weight_check_sees_every_place_and_tolerates_large_sums() -> None:
    weights = [torch.full((50,), 3e38), torch.zeros(4, 3), torch.zeros(0), torch.zeros(2, dtype=torch.int64)]
    assert weights_are_finite(weights)  # the sum overflows, no value is infinite
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in range(12):
            weights[1] = torch.zeros(4, 3)
            weights[1].view(-1)[place] = value
            assert not weights_are_finite(weights)


def test_description_counts() -> None:
    tensor = torch.tensor([[0.0, float("nan")], [float("inf"), float("-inf")]])
    assert describe(tensor) == "1 NaN and 2 infinite of 4 values, first at [0, 1]"
