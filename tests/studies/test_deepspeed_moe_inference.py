"""The study of DeepSpeed-MoE's inference: its reference of one-hot products, its formulas and bytes by hand."""

import pytest
import torch
from torch import Tensor

from moestro.core.bank import StackedFFN
from moestro.studies._dispatch import (
    Choice,
    batched,
    choose,
    dispatch,
    einsum_rows,
    index_rows,
    index_tables,
    one_hot_tables,
    ratio,
    seconds_of,
)
from moestro.studies._framework import BUDGETS
from moestro.studies._messages import WAYS, Machine, communicate, formula, rows_of, there_and_back
from moestro.studies.deepspeed_moe_inference import BATCH, MODELS, decode, fixed_bytes, mixtures


CI = BUDGETS["ci"]


def loop(x: Tensor, choice: Choice, bank: StackedFFN) -> tuple[Tensor, Tensor]:
    """(the layer's output, whether a token was served), one token after another."""
    places = [choice.capacity] * choice.experts
    y, served = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
    for token, expert in enumerate(choice.expert_S.tolist()):
        if places[expert] > 0:
            places[expert] -= 1
            served[token] = True
            hidden = torch.nn.functional.gelu(bank.weight(expert, "up") @ x[token])
            y[token] = choice.weight_S[token] * (bank.weight(expert, "down") @ hidden)
    return y, served


@pytest.mark.parametrize(("tokens", "experts"), [(64, 8), (50, 3), (1, 4), (7, 1)])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_index_and_one_hot_dispatch_are_the_loop(tokens: int, experts: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=draw)
    choice = choose(x, experts, draw)
    assert choice.capacity == -(-tokens // experts)
    bank = StackedFFN(experts, 16, 32, activation="gelu", gated=False)
    for parameter in bank.parameters():
        parameter.normal_(std=0.2, generator=draw)
    expected, served = loop(x, choice, bank)
    if tokens == 64:
        assert 0 < int(served.sum()) < tokens, "some tokens must be dropped and some served"
    routing, tables = index_tables(choice), one_hot_tables(choice)
    for found in (bank(x, routing), einsum_rows(x, tables, batched(bank))):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(found[~served], torch.zeros_like(found[~served]))
    plain = x * (choice.weight_S * served)[:, None]
    for found in (index_rows(x, routing), einsum_rows(x, tables)):
        torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-6)


def test_what_dispatch_measures() -> None:
    found = dispatch(0, tokens=64, experts=8, width=16, times=3)
    assert 0 < found["dropped"] < 1
    assert found["difference"] <= 1e-6
    assert found["dropped_output"] == 0
    assert min(found[name] for name in ("speedup", "speedup_of_moves", "speedup_of_layer")) > 0


def test_ratios_are_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first turn does not count, and one stray turn does not either."""
    now, turns = [0.0], {"slow": 0, "fast": 0}
    monkeypatch.setattr("moestro.studies._dispatch.time.process_time", lambda: now[0])

    def call(name: str, seconds: float) -> None:
        now[0] += seconds * {0: 100, 3: 7}.get(turns[name] if name == "slow" else -1, 1)
        turns[name] += 1

    seconds = seconds_of({"slow": lambda: call("slow", 6.0), "fast": lambda: call("fast", 2.0)}, 5)
    assert seconds == {"slow": [6, 6, 42, 6, 6], "fast": [2] * 5}
    assert ratio(seconds, "slow", "fast") == 3
    assert ratio(seconds, "fast", "slow") == pytest.approx(1 / 3)


def test_the_formulas_at_the_papers_size() -> None:
    """128 ranks, 8 a node: 127 messages become 22; a slice of 8 leaves 15 to others, 16 with its own."""
    assert formula("flat", 128, 8) == (127, 1 - 1 / 128)
    assert formula("hierarchical", 128, 8) == (7 + 15, 2 - 1 / 8 - 1 / 16)
    assert formula("coordinated", 128, 8) == (15, 1 / 8 - 1 / 128)


@pytest.mark.parametrize("arm", list(WAYS))
def test_arms_count_what_their_formula_says(arm: str) -> None:
    found = communicate(arm, 0, CI)
    assert found["equal"] == 1
    assert found["wrong_messages"] == 0
    assert found["wrong_volume"] <= 1e-12
    if arm.endswith("_of_one"):
        assert (found["messages"], found["volume"]) == (15, 1 - 1 / 16)
    if arm == "coordinated":
        assert found["messages_back"] == 3 + 3


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alike", [1, 2])
def test_uneven_rows_are_uneven(alike: int, seed: int) -> None:
    """No exchange is compared of which nothing goes to other ranks."""
    rows, splits = rows_of(Machine(4, 2), seed, alike, 3)
    away = [sum(split) - split[rank] for rank, split in enumerate(splits)]
    assert sum(away) > 0
    assert len({count for split in splits for count in split}) > 2
    assert [len(x) for x in rows] == [sum(split) for split in splits]
    assert (splits[0] == splits[1]) == (alike == 2)


def test_uneven_rows_that_go_astray_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.training import all_to_all

    assert there_and_back("hierarchical", Machine(8, 4), 0, 3)[0]

    def swapped(blocks: list[Tensor], rank: int, size: int) -> all_to_all.Steps:
        found = yield from all_to_all.flat(blocks, rank, size)
        return found[::-1]

    monkeypatch.setattr(all_to_all, "hierarchical", swapped)
    assert not there_and_back("hierarchical", Machine(8, 4), 0, 3)[0]


EXPERT = 3 * 32 * 64 * 4  # bytes at the shortest budget


@pytest.mark.parametrize(("arm", "experts", "fixed", "active"), [
    ("pr_moe", 4 + 8, 2, 2), ("moe_large", 32, 0, 2), ("top2_large", 32, 0, 4),
])  # fmt: skip
def test_bytes_of_a_step_by_hand(arm: str, experts: int, fixed: int, active: int) -> None:
    """Of both layers: with one sequence the chosen experts and the fixed branches, with many all that were hit."""
    assert arm in MODELS
    found = {name: round(1e6 * value) for name, value in decode(arm, 0, CI).items()}
    routers = experts * 32 * 4
    mixes = fixed * (2 * 32 + 2) * 4
    rest = routers + mixes + fixed * EXPERT
    assert sum(map(fixed_bytes, mixtures(arm, 0, CI))) == rest
    assert found["megabytes_held"] == rest + experts * EXPERT
    assert found["megabytes_one"] == rest + active * EXPERT
    assert rest + experts * EXPERT * 0.8 < found["megabytes_batch"] <= rest + experts * EXPERT
    assert BATCH == 64
