"""The benchmark of codes: every arm gives the symbols back, and sizes are those of what is stored."""

import pytest
import torch

from moestro.testing.bench import compress


def test_all_arms_give_the_symbols_back() -> None:
    codes = compress.symbols(24, 203)
    arms = compress.stores(codes)
    for name, arm in arms.items():
        assert torch.equal(arm.unpack(arm.pack()), codes), name
    size = {name: arm.nbytes(arm.packed) for name, arm in arms.items()}
    assert size["five trits a byte"] == 24 * 41
    assert size["two bits"] == 24 * 51
    words, counts = arms["ours"].packed
    assert size["ours"] == 2 * len(words) + 2 * 24 < size[compress.PAPER]
    assert int(counts.sum()) == len(words)


def test_rows_compare_ours_with_every_arm_and_the_entropy() -> None:
    rows = compress.codecs(16, 512, 1)
    peers = set(compress.stores(compress.symbols(2, 8))) - {"ours"}
    for metric in ("size", "encoding", "decoding"):
        assert peers <= {row.peer_name for row in rows if row.metric == metric}
    for row in rows:
        better_if_less = row.metric == "size"
        assert row.ratio == pytest.approx(row.peer / row.ours if better_if_less else row.ours / row.peer)
    entropies = [row for row in rows if row.peer_name == "entropy"]
    assert len(entropies) == 2
    assert all(row.peer == pytest.approx(0.6298, abs=1e-4) and 0.7 < row.ratio < 1 for row in entropies)


def test_products_are_timed_against_the_dense_one() -> None:
    rows = compress.products(32, 512, 1)
    assert {(row.metric, row.peer_name) for row in rows} == {
        ("time", "dense float32"), ("time", "two bits"), ("memory", "dense float32"),
    }  # fmt: skip
    assert rows[-1].ratio > 20


def test_quantisers_are_compared_in_error_bytes_and_time() -> None:
    rows = compress.quantisers(1, 64, 256, 1)
    plain, large = (
        {(row.metric, row.peer_name): row for row in rows if f", {count} large" in row.case} for count in (0, 4)
    )
    peers = ("whole rows", "groups of 32", "hqq")
    assert set(plain) == set(large) == {(what, peer) for what in ("relative error", "size", "time") for peer in peers}
    for row in rows:
        assert row.ratio == pytest.approx(row.peer / row.ours)
    # Without large inputs adaptive groups are whole rows: one scale of 16 bits for 256 weights.
    assert plain["size", "whole rows"].ours == plain["size", "whole rows"].peer == 4 + 16 / 256
    assert plain["relative error", "whole rows"].ratio == 1
    assert large["size", "hqq"].peer == large["size", "groups of 32"].peer == 4.5
    assert large["relative error", "whole rows"].ratio > 1.5, "large inputs spoil the scale of a whole row"
    assert plain["relative error", "hqq"].peer < plain["relative error", "groups of 32"].peer


def test_the_programme_is_timed_against_a_general_solver() -> None:
    (row,) = compress.allocations(12, 1)
    assert (row.metric, row.peer_name) == ("time", "HiGHS")
    assert row.ratio > 0
