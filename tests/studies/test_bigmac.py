"""The paper's closed forms give the paper's numbers, and the model of a machine knows latency."""

import pytest

from moestro.studies.bigmac import Machine, Paper, modelled_speedup, modelled_step


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
    assert 1.5 < modelled_speedup() <= many
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
