"""The paper's closed forms give the paper's numbers, and the model of a machine knows latency."""

import pytest

from moestro.core.cost import Work, cost
from moestro.studies.bigmac import Machine, Paper, layer, modelled_speedups, modelled_step


def test_the_papers_five_numbers() -> None:
    paper = Paper()
    assert paper.parameters(narrow=False) / 1e9 == pytest.approx(3.73, abs=0.005)
    assert paper.parameters(narrow=True) / paper.parameters(narrow=False) - 1 == pytest.approx(0.0135, abs=5e-5)
    assert paper.flops(narrow=False) / 1e12 == pytest.approx(3490.67, rel=2e-4)
    assert paper.flops(narrow=True) / paper.flops(narrow=False) - 1 == pytest.approx(0.0454, abs=1e-4)
    assert paper.bytes(narrow=False) / 2**30 == pytest.approx(1488, abs=0.5)
    assert paper.bytes(narrow=True) / 2**30 == pytest.approx(372, abs=0.5)


def test_few_tokens_are_ruled_by_latency() -> None:
    """At decode the messages cost the same whatever their width: nothing is gained."""

    def gain(tokens: int, bandwidth: float) -> tuple[float, float]:
        machine = Machine(ranks=32, bandwidth=bandwidth)
        plain, share = modelled_step(machine, width=2048, tokens=tokens, narrow=False)
        return plain / modelled_step(machine, width=2048, tokens=tokens, narrow=True)[0], share

    many, share = gain(16384, 1e9)
    assert share > 0.95
    assert 3.5 < many < 4  # all but traffic is nothing, and traffic is a quarter
    gains = modelled_speedups(16384)
    assert 1.5 < min(gains) <= many
    halves = modelled_speedups(16384, nbytes=1)  # on the same machines; the gain over half the bytes is smaller
    assert len(halves) == len(gains) < 6
    assert all(1 < half < gain for half, gain in zip(halves, gains, strict=True))
    few, share = gain(1, 12e9)
    assert share > 0.8
    assert 1.0 < few < 1.05


def test_one_rank_sends_nothing_and_pays_for_the_projections() -> None:
    machine = Machine(ranks=1, bandwidth=1e9)
    plain, share = modelled_step(machine, width=64, tokens=100, narrow=False)
    narrow, _ = modelled_step(machine, width=64, tokens=100, narrow=True)
    assert share == 0
    # k = 8 experts of 2 r h^2 and attention of 4 h^2, against one pair of projections of r h^2 each
    assert narrow / plain == pytest.approx((4 + 8 * 0.5 + 0.5) / (4 + 8 * 0.5))


def test_arms_have_equal_parameters_of_experts_and_controls_what_their_names_say() -> None:
    width, work = 128, Work(length=64)
    made = {arm: layer(arm, width) for arm in ("bigmac", "bigmac_half", "fine_grained", "large_experts")}
    sizes = {arm: sum(p.numel() for p in one.bank.parameters()) for arm, one in made.items()}
    assert set(sizes.values()) == {16 * 2 * 32 * width}

    def operations(arm: str) -> float:
        """Of the chosen experts of one token."""
        one = made[arm]
        rest = [one.router, *(part for part in (one.pre, one.post) if part is not None)]
        return cost(one, work) - sum(cost(part, work) for part in rest)

    assert len({operations(arm) for arm in made}) == 1
    travels = {arm: one.router.top_k * one.bank.weight(0, "down").shape[0] for arm, one in made.items()}
    assert travels["bigmac"] == travels["large_experts"] == travels["fine_grained"] / 4
    cut = layer("fine_grained_equal_bytes", width, top_k=1)
    assert cut.router.top_k * cut.bank.weight(0, "down").shape[0] == travels["bigmac"]
