"""The board behind each token is the board of the game, and the arms spend what the study says they spend."""

from typing import Any

import chess
import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies import moe_x as subject
from moestro.studies._framework import BUDGETS


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
    learned, asked = (
        {tuple(ids) for ids in one.ids_BS.tolist()} for one in (subject.games(100, 8, 1), subject.games(100, 8, 2))
    )
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
