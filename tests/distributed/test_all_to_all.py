"""Three ways for the same rows: equal to the last bit, and what each sends is what its formula says."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.errors import ConfigError, ContextError
from moestro.testing.distributed import run_distributed
from moestro.training.all_to_all import Links, Sent, all_to_all, all_to_all_here


WIDTH = 3
LAYOUTS = [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (8, 2), (12, 4)]
SEEDS = range(3)


def uneven(world: int, seed: int, *, alike: int = 1) -> tuple[list[Tensor], list[list[int]]]:
    """Rows and splits by rank, about half of them empty; the same in every ``alike`` neighbours."""
    draw = torch.Generator().manual_seed(seed)
    groups = world // alike
    some = torch.randint(0, 5, (groups, world), generator=draw) * torch.randint(0, 2, (groups, world), generator=draw)
    splits = [some[rank // alike].tolist() for rank in range(world)]
    rows = [torch.randn(int(some[group].sum()), WIDTH, generator=draw) for group in range(groups)]
    return [rows[rank // alike] for rank in range(world)], splits


def by_hand(rows: Sequence[Tensor], splits: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """What every rank gets, by source."""
    blocks = [x.split(list(split)) for x, split in zip(rows, splits, strict=True)]
    return [[sent[rank] for sent in blocks] for rank in range(len(rows))]


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return [len(x) for x in found] == [len(x) for x in expected] and all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("world", "size"), LAYOUTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_uneven_rows_arrive_as_by_hand(world: int, size: int, seed: int) -> None:
    rows, splits = uneven(world, seed)
    expected = by_hand(rows, splits)
    for algorithm in ("flat", "hierarchical"):
        found, _ = all_to_all_here(rows, splits, algorithm, ranks_per_node=size)
        assert all(map(equal, found, expected))


@pytest.mark.parametrize(("world", "size"), LAYOUTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_coordinated_brings_each_row_once_and_each_answer_to_all(world: int, size: int, seed: int) -> None:
    rows, splits = uneven(world, seed, alike=size)
    expected = by_hand(rows, splits)
    found, _ = all_to_all_here(rows, splits, "coordinated", slicing=size)
    for rank in range(world):
        assert equal(found[rank], expected[rank][::size])  # one of the copies that a flat exchange brings
    answers = [torch.cat(blocks) * (rank + 1) for rank, blocks in enumerate(found)]
    counts = [[len(block) for block in blocks] for blocks in found]
    back, _ = all_to_all_here(answers, counts, "coordinated", slicing=size, back=True)
    for rank in range(world):
        sent = rows[rank].split(splits[rank])
        assert equal(back[rank], [block * (goal + 1) for goal, block in enumerate(sent)])


def volume(world: int, size: int) -> tuple[list[Tensor], list[list[int]], int]:
    """Evenly spread rows, as many for each rank, and their bytes on one rank."""
    each = 2 * size
    rows = [torch.randn(each * world, WIDTH) for _ in range(world)]
    return rows, [[each] * world] * world, rows[0].nbytes


@pytest.mark.parametrize(("p", "g"), [*LAYOUTS, (128, 8)])
def test_messages_and_bytes_are_the_formulas(p: int, g: int) -> None:
    rows, splits, v = volume(p, g)
    _, flat = all_to_all_here(rows, splits, ranks_per_node=g)
    assert set(map(repr, flat)) == {repr(Sent(p - 1, v - v // p, p - g, v * (p - g) // p))}
    _, tree = all_to_all_here(rows, splits, "hierarchical", ranks_per_node=g)
    across = v * (p - g) // p
    assert set(map(repr, tree)) == {repr(Sent(g - 1 + p // g - 1, v - v // g + across, p // g - 1, across))}
    assert tree[0].bytes == pytest.approx(v * (2 - 1 / g - g / p))

    found, out = all_to_all_here(rows, splits, "coordinated", slicing=g, ranks_per_node=g)
    slice_bytes = v // g - v // p
    assert set(map(repr, out)) == {repr(Sent(p // g - 1, slice_bytes, p // g - 1, slice_bytes))}
    answers, counts = [torch.cat(blocks) for blocks in found], [[len(b) for b in blocks] for blocks in found]
    _, back = all_to_all_here(answers, counts, "coordinated", slicing=g, ranks_per_node=g, back=True)
    messages, sent = p // g - 1 + g - 1, slice_bytes + v - v // g
    assert set(map(repr, back)) == {repr(Sent(messages, sent, p // g - 1, slice_bytes))}


def test_empty_messages_count() -> None:
    rows, splits = [torch.zeros(0, WIDTH)] * 4, [[0] * 4] * 4
    for algorithm, messages in (("flat", 3), ("hierarchical", 2), ("coordinated", 1)):
        found, sent = all_to_all_here(rows, splits, algorithm, ranks_per_node=2, slicing=2)  # type: ignore[arg-type]
        assert [(one.messages, one.bytes) for one in sent] == [(messages, 0)] * 4
        assert all(torch.cat(blocks).shape == (0, WIDTH) for blocks in found)


def test_bad_layouts_and_splits_are_refused() -> None:
    rows, splits = uneven(6, 0)
    with pytest.raises(ConfigError, match="ranks_per_node=4 does not divide 6 ranks"):
        all_to_all_here(rows, splits, "hierarchical", ranks_per_node=4)
    with pytest.raises(ConfigError, match="slicing=0 does not divide 6 ranks"):
        all_to_all_here(rows, splits, "coordinated", slicing=0)
    with pytest.raises(ConfigError, match="no all-to-all 'ring'"):
        all_to_all_here(rows, splits, "ring")  # type: ignore[arg-type]
    with pytest.raises(ContextError, match="6 splits that sum to 6 for 5 rows; give 6 counts"):
        all_to_all_here([torch.zeros(5, 1)] * 6, [[1] * 6] * 6)
    with pytest.raises(ContextError, match="6 splits that sum to 0 for 0 rows; give 3 counts"):
        all_to_all_here([torch.zeros(0, 1)] * 6, [[0] * 6] * 6, "coordinated", slicing=2, back=True)


# -- processes ---------------------------------------------------------------------------------------------------


def on_ranks(rank: int, world: int) -> dict[str, Any]:
    """Every algorithm over gloo, and its gradient where it has one."""
    found: dict[str, Any] = {}
    for algorithm in ("flat", "hierarchical"):
        links = Links(algorithm, ranks_per_node=2)  # type: ignore[arg-type]
        for seed in SEEDS:
            rows, splits = uneven(world, seed)
            x = rows[rank].clone().requires_grad_()
            told: list[tuple[int, bool]] = []
            got, counts = all_to_all(x, splits[rank], links, tell=lambda *what, told=told: told.append(what))
            (got * (rank + 1)).sum().backward()
            assert x.grad is not None
            found[f"{algorithm} {seed}"] = [got.tolist(), counts, x.grad.tolist(), told]
        found[algorithm] = vars(links.sent)
    links = Links("coordinated", ranks_per_node=2, slicing=2)
    rows, splits = uneven(world, 0, alike=2)
    got, counts = all_to_all(rows[rank], splits[rank], links)
    back, sources = all_to_all(got, counts, links, back=True)
    found["coordinated"] = [got.tolist(), counts, back.tolist(), sources, dict(vars(links.sent))]
    with pytest.raises(ContextError, match=r"no gradient: .* 2 times; run it under torch\.no_grad"):
        all_to_all(rows[rank].clone().requires_grad_(), splits[rank], links)
    half, _ = all_to_all(rows[rank].bfloat16(), splits[rank], links)
    found["bfloat16"] = torch.equal(half, got.bfloat16())
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_distributed(on_ranks, 4)
    return found


@pytest.mark.parametrize("algorithm", ["flat", "hierarchical"])
def test_processes_get_what_one_process_says(ranks: list[dict[str, Any]], algorithm: Any) -> None:
    total = [Sent() for _ in ranks]
    for seed in SEEDS:
        rows, splits = uneven(4, seed)
        expected, sent = all_to_all_here(rows, splits, algorithm, ranks_per_node=2)
        gradients = [[torch.full((count, WIDTH), 1.0 + to) for to, count in enumerate(split)] for split in splits]
        _, returned = all_to_all_here(
            [torch.cat([torch.full_like(b, 1.0 + r) for b in blocks]) for r, blocks in enumerate(expected)],
            [[len(b) for b in blocks] for blocks in expected],
            algorithm,
            ranks_per_node=2,
        )
        for rank, found in enumerate(ranks):
            got, counts, gradient, told = found[f"{algorithm} {seed}"]
            assert got == torch.cat(expected[rank]).tolist()
            assert counts == [len(block) for block in expected[rank]]
            assert gradient == torch.cat(gradients[rank]).tolist()
            assert told == [(sent[rank].bytes, False), (returned[rank].bytes, True)]
            for one in (sent[rank], returned[rank]):
                for name, value in vars(one).items():
                    setattr(total[rank], name, getattr(total[rank], name) + value)
    assert [found[algorithm] for found in ranks] == [vars(one) for one in total]
    assert all(one.bytes > 0 for one in total)


def test_coordinated_processes(ranks: list[dict[str, Any]]) -> None:
    rows, splits = uneven(4, 0, alike=2)
    expected, out = all_to_all_here(rows, splits, "coordinated", slicing=2, ranks_per_node=2)
    counts = [[len(block) for block in blocks] for blocks in expected]
    answers = [torch.cat(blocks) for blocks in expected]
    _, back = all_to_all_here(answers, counts, "coordinated", slicing=2, ranks_per_node=2, back=True)
    for rank, found in enumerate(ranks):
        got, from_groups, returned, sources, sent = found["coordinated"]
        assert (got, from_groups) == (answers[rank].tolist(), counts[rank])
        assert (returned, sources) == (rows[rank].tolist(), splits[rank])
        both = {name: value + vars(back[rank])[name] for name, value in vars(out[rank]).items()}
        assert sent == both
        assert found["bfloat16"]
    assert max(len(found["coordinated"][0]) for found in ranks) > 0
