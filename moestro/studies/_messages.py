"""Messages and bytes of the ways around an all-to-all, on machines that are not there and on four real processes."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.studies._framework import Budget
from moestro.training.all_to_all import Links, Sent, all_to_all, all_to_all_here


WIDTH = 8  # of rows whose journey is counted


@dataclass(frozen=True)
class Machine:
    """p ranks, of which ``node`` share a node and hold the same tokens where tensors are sliced."""

    ranks: int
    node: int


# Arm -> algorithm, whether ranks are grouped.
WAYS: Mapping[str, tuple[Any, bool]] = {
    "flat": ("flat", True),
    "hierarchical": ("hierarchical", True),
    "nodes_of_one": ("hierarchical", False),
    "coordinated": ("coordinated", True),
    "slices_of_one": ("coordinated", False),
}


def formula(algorithm: str, p: int, g: int) -> tuple[float, float]:
    """(messages, bytes over V) of one way out on a rank, as published."""
    return {
        "flat": (p - 1, 1 - 1 / p),
        "hierarchical": (g - 1 + p / g - 1, 2 - 1 / g - g / p),
        "coordinated": (p / g - 1, 1 / g - 1 / p),
    }[algorithm]


def rows_of(machine: Machine, seed: int, alike: int, most: int | None) -> tuple[list[Tensor], list[list[int]]]:
    """Rows and splits by rank: 4 for each rank, or 0 to ``most``; the same for ``alike`` ranks."""
    draw = torch.Generator().manual_seed(seed)
    groups, p = machine.ranks // alike, machine.ranks
    counts = torch.full((groups, p), 4)
    if most is not None:
        counts = torch.randint(0, most + 1, (groups, p), generator=draw)
    rows = [torch.randn(int(counts[group].sum()), WIDTH, generator=draw) for group in range(groups)]
    return [rows[r // alike] for r in range(p)], [counts[r // alike].tolist() for r in range(p)]


def there_and_back(arm: str, machine: Machine, seed: int, most: int | None) -> tuple[bool, list[Sent], list[Sent]]:
    """(whether all that arrived is what a flat exchange brings, and all that came back what was sent; counts)."""
    algorithm, grouped = WAYS[arm]
    size = machine.node if grouped else 1
    step = size if algorithm == "coordinated" else 1
    rows, splits = rows_of(machine, seed, step, most)
    there, out = all_to_all_here(rows, splits, algorithm, ranks_per_node=size, slicing=step)
    answers, counts = [torch.cat(blocks) for blocks in there], [[len(b) for b in blocks] for blocks in there]
    home, back = all_to_all_here(answers, counts, algorithm, ranks_per_node=size, slicing=step, back=True)
    plain, _ = all_to_all_here(rows, splits)
    arrived = all(torch.equal(torch.cat(plain[r][::step]), answers[r]) for r in range(machine.ranks))
    returned = all(torch.equal(torch.cat(home[r]), rows[r]) for r in range(machine.ranks))
    return arrived and returned, out, back


def on_process(rank: int, world: int, seed: int, times: int) -> dict[str, list[float]]:
    """On one of four processes: [equal to this process alone, messages, bytes, seconds of an exchange] of each way."""
    found = {}
    for arm, (algorithm, grouped) in WAYS.items():
        if not grouped:
            continue
        sliced = 2 if algorithm == "coordinated" else 1
        rows, splits = rows_of(Machine(world, 2), seed, sliced, 3)
        expected, sent = all_to_all_here(rows, splits, algorithm, ranks_per_node=2, slicing=sliced)
        links = Links(algorithm, ranks_per_node=2, slicing=sliced)
        got, _ = all_to_all(rows[rank], splits[rank], links)
        same = torch.equal(got, torch.cat(expected[rank])) and links.sent == sent[rank]
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            all_to_all(rows[rank], splits[rank], links)
            seconds.append(time.perf_counter() - started)
        found[arm] = [float(same), float(sent[rank].messages), float(sent[rank].bytes), statistics.median(seconds)]
    return found


def communicate(arm: str, seed: int, budget: Budget) -> dict[str, float]:
    """Messages, and bytes over the bytes that a rank holds, a rank; and how far either is from its formula."""
    machine = budget.pick(ci=Machine(16, 4), micro=Machine(128, 8), full=Machine(128, 8))
    algorithm, grouped = WAYS[arm]
    even, out, back = there_and_back(arm, machine, seed, None)
    uneven, _, _ = there_and_back(arm, machine, seed, 3)
    held = machine.ranks * 4 * WIDTH * 4
    messages, volume = formula(algorithm, machine.ranks, machine.node if grouped else 1)
    return {
        "equal": float(even and uneven),
        "messages": statistics.mean(one.messages for one in out),
        "messages_back": statistics.mean(one.messages for one in back),
        "volume": statistics.mean(one.bytes for one in out) / held,
        "volume_back": statistics.mean(one.bytes for one in back) / held,
        "volume_across": statistics.mean(one.bytes_across for one in out) / held,
        "wrong_messages": max(abs(one.messages - messages) for one in out),
        "wrong_volume": max(abs(one.bytes / held - volume) for one in out),
    }


def on_processes(seed: int, budget: Budget) -> dict[str, float]:
    """What ``on_process`` says, over all of them; in a short budget, four ranks of this process say it."""
    if budget.name == "ci":
        machine = Machine(4, 2)
        equal = [there_and_back(arm, machine, seed, 3)[0] for arm, (_, grouped) in WAYS.items() if grouped]
        return {"equal": float(all(equal)), "processes": 1.0}
    from moestro.testing.distributed import run_distributed

    ranks = run_distributed(on_process, 4, seed, budget.pick(ci=1, micro=3, full=20), timeout=600)
    found = {"equal": min(values[0] for rank in ranks for values in rank.values()), "processes": float(len(ranks))}
    for arm in ranks[0]:
        for place, name in enumerate(("messages", "bytes", "ms"), 1):
            scale = 1000 if name == "ms" else 1
            found[f"{arm}_{name}"] = scale * statistics.mean(rank[arm][place] for rank in ranks)
    return found
