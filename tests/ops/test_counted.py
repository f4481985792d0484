"""Operations of experts as torch counts them: the same whichever path runs, and those that a hand counts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moestro.ops import operators, workers


PATHS = ["segments", pytest.param("native", marks=pytest.mark.skipif(operators.wheel() is None, reason="no wheel"))]
ALL = ("x", "weight", "up", "down", "up_bias", "down_bias")


def counted(case, backend):
    """Operations of the forward pass, and of the backward pass."""
    with FlopCounterMode(display=False) as counter:
        y = case.run(backend)
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("routing", ["topk", "ragged", "one_expert", "some_empty", "none"])
def test_all_paths_count_what_the_loop_counts(make_case, backend, gated, bias, routing):
    case = make_case(30, 6, 3, inner=7, out=5, gated=gated, bias=bias, routing=routing, dtype=torch.float32)
    forward, backward = counted(case.fresh(), "loop")
    assert counted(case.fresh(), backend) == (forward, backward)
    rows = int((case.expert < 6).sum())
    assert forward == 2 * rows * (case.weights.up_EJD[0].numel() + 7 * 5)
    assert backward == 2 * forward
    with torch.no_grad():
        assert counted(case, backend) == (forward, 0)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    ("needed", "up", "down"),
    [
        (("x",), 1, 1),
        (("weight",), 0, 1),
        (("up",), 1, 1),
        (("down",), 0, 1),
        (("up_bias",), 0, 1),
        (("down_bias",), 0, 0),
        (("x", "weight"), 1, 1),
        (("up", "down", "up_bias"), 1, 2),
        (ALL, 2, 2),
    ],
)
def test_frozen_inputs_cost_nothing(make_case, backend, needed, up, down):
    case = make_case(20, 4, 2, dim=8, inner=3, out=5, bias=True, dtype=torch.float32)
    for name in set(ALL) - set(needed):
        case.inputs()[name].requires_grad_(False)
    assert counted(case, backend)[1] == 2 * 40 * (up * 6 * 8 + down * 5 * 3)


@pytest.mark.parametrize("backend", PATHS)
def test_assignments_to_nobody_are_not_counted(make_case, backend):
    case = make_case(20, 5, 3, dtype=torch.float32)
    padded = replace(case, expert=torch.where(torch.arange(60) % 4 == 0, 5, case.expert))
    assert counted(padded, backend)[0] == 2 * 45 * 3 * 8 * 4


@pytest.mark.parametrize("backend", [*PATHS, "reproducible"])
def test_threads_and_blocks_hide_nothing(make_case, backend, two_threads, monkeypatch):
    monkeypatch.setattr(workers, "BLOCK", 100)
    case = make_case(600, 4, 2, dim=128, inner=64, dtype=torch.float32)
    assert 1200 * case.weights.macs_per_row > workers._WORTH_SHARING / 2
    monkeypatch.setattr(workers, "_WORTH_SHARING", 1)
    assert counted(case, backend) == (2 * 1200 * 3 * 128 * 64, 4 * 1200 * 3 * 128 * 64)
    assert torch.get_num_threads() == 2
