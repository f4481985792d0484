"""The board behind each token is the board of the game, and the arms spend what the study says they spend."""

from dataclasses import replace
from typing import Any

import chess
import pytest
import torch

from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.studies import moe_x as subject
from moestro.studies._framework import BUDGETS
from moestro.studies._language import heldout


CI = subject.setup(BUDGETS["ci"])


def test_properties_are_the_pieces_on_the_board_seen_by_the_mover() -> None:
    """Games replayed square by square with ``piece_at``: before a move at its from-token, after it at its to-token."""
    played = subject.games(6, 10, 3)
    (batch,) = played.batches(6)
    true = batch["properties"].view(6, 21, 3, 64)
    for game, ids in enumerate(batch["input_ids"].tolist()):
        board = chess.Board()
        assert ids[0] == 64
        for place in range(21):
            if place and place % 2 == 0:
                move = chess.Move(*ids[place - 1 : place + 1])
                if move not in board.legal_moves:
                    move.promotion = chess.QUEEN
                assert move in board.legal_moves
                board.push(move)
            mover = chess.WHITE if place < 3 or (place - 1) // 2 % 2 == 0 else chess.BLACK
            pieces = [board.piece_at(square) for square in range(64)]
            colours = [None if piece is None else piece.color for piece in pieces]
            seen = [[colour is side for colour in colours] for side in (mover, not mover, None)]
            assert true[game, place].tolist() == seen, (game, place)


def test_held_out_games_are_other_games() -> None:
    there = replace(CI, train_games=100, heldout_games=100)
    learned, asked = ({tuple(ids) for ids in one.ids_BS.tolist()} for one in (there.learned, there.asked))
    assert len(learned) == len(asked) == 100
    assert not learned & asked


def test_a_token_meets_as_many_weights_in_every_arm() -> None:
    size = CI.size
    active, total = set(), set()
    for activation, router in subject.FORMS.values():
        for layer in mixture_layers(subject.build(size, subject.mixture(size.inner, activation, router), 0)).values():
            assert layer.bank.activation == activation
            active.add(layer.router.top_k * layer.bank.flops_per_row(0))
            total.add((router is None, layer.bank.num_experts * layer.bank.inner))
    assert len(active) == 1
    assert total == {(True, size.inner), (False, 4 * size.inner)}


def test_every_arm_but_the_short_one_sees_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[int, int]] = []

    def noted(model: Any, data: Any, scale: Any, seed: int, *, steps: int, first: int = 0, **_: Any) -> None:
        spans.append((first, first + steps))

    monkeypatch.setattr(subject, "train", noted)
    with torch.no_grad():
        found = {arm: (spans.clear(), subject.run(arm, 0, BUDGETS["ci"]), list(spans))[2] for arm in subject.FORMS}
    steps, parent = CI.size.steps, CI.parent_steps
    assert 0 < parent < steps
    assert found.pop("upcycled") == [(0, parent), (parent, steps)]
    assert found.pop("short") == [(parent, steps)]
    assert set(map(tuple, found.values())) == {((0, steps),)}


@pytest.mark.parametrize(("arm", "above"), [("gelu", 0.05), ("moe_x", 0.0), ("dense", 0.05), ("dense_relu", 0.0)])
def test_the_middle_layer_is_asked_and_chance_taken_off(
    arm: str, above: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "train", lambda *_, **__: None)
    found = subject.run(arm, 5, BUDGETS["ci"])
    model = subject.build(CI.size, subject.mixture(CI.size.inner, *subject.FORMS[arm]), 5).eval()
    meter = method("inspect.property_probe")
    config = meter.configure({"layers": [1], "active_above": above, "min_true": CI.min_true})
    subject_of = MeterInputs(name=arm, model=model, batches=CI.asked.batches(50), seed=5)
    seen = meter.entry("measure")(subject_of, config).numbers
    assert seen["coverage by chance"] > 0.1
    for name in ("coverage", "reconstruction"):
        assert found[name] == pytest.approx(seen[name] - seen[name + " by chance"])
    assert (found["l0"], found["dead_units"], found["empty_pairs"]) == tuple(
        pytest.approx(seen[name]) for name in ("L0", "dead units", "empty pairs")
    )
    assert found["heldout_loss"] == pytest.approx(heldout(model, CI.asked.rows(), CI.size))


def test_copies_come_from_a_dense_gelu_model_and_the_loss_they_cost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def noted(model: Any, data: Any, scale: Any, seed: int, *, losses: Any = None, **_: Any) -> None:
        if not seen:
            for layer in mixture_layers(model).values():  # as if trained: the copies then answer otherwise
                layer.bank.up_proj.data.mul_(20)
                layer.bank.down_proj.data.mul_(20)
        banks = [layer.bank for layer in mixture_layers(model).values()]
        forms = {(bank.activation, bank.num_experts, bank.inner) for bank in banks}
        rows = [bank.up_proj.detach().clone() for bank in banks]
        seen.append({"forms": forms, "up": rows, "losses": losses, "loss": heldout(model, CI.asked.rows(), CI.size)})

    monkeypatch.setattr(subject, "train", noted)
    _, jump = subject.upcycled(CI, 0)
    dense, copies = seen
    width = CI.size.inner // subject.TOP_K
    assert dense["forms"] == {("gelu", 1, width)}
    assert copies["forms"] == {("relu", subject.EXPERTS, width)}
    assert not dense["losses"]
    assert copies["losses"] == subject.AUX
    assert abs(jump) > 1e-3
    assert jump == pytest.approx(copies["loss"] - dense["loss"], abs=1e-6)
    for one, many in zip(dense["up"], copies["up"], strict=True):
        assert float((many - one).std() / one.std()) == pytest.approx(0.01, rel=0.1)
        assert len({float(expert.sum()) for expert in many}) == subject.EXPERTS
