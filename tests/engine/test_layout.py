"""Matrix layouts against a loop over their description, byte by byte."""

import numpy as np
import pytest

from moestro.core.errors import ConfigError
from moestro.engine import layout as lay


SHAPES = [(1, 1), (16, 64), (17, 65), (5, 200), (40, 130)]
PLANES = {"q8": [(8, 0)], "q4": [(4, 0)], "q3": [(2, 0), (1, 2)], "q2": [(2, 0)], "q1": [(1, 0)]}


def codes_by_hand(data: np.ndarray, layout: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Code, scale and zero of every weight, read from the bytes one weight at a time."""
    code, scale, zero = np.zeros((n, k), int), np.zeros((n, k), np.float32), np.zeros((n, k), int)
    size = {"q8": 1056, "q4": 544, "q3": 432, "q2": 304, "q1": 176}[layout]
    groups = -(-k // 64)
    for row in range(n):
        for column in range(k):
            start = (row // 16 * groups + column // 64) * size
            block = data[start : start + size]
            inside = column % 64
            place = inside // 4 * 64 + row % 16 * 4 + inside % 4
            at = value = 0
            for width, shift in PLANES[layout]:
                plane = 1024 * width // 8
                byte = int(block[at + place % plane])
                value |= (byte >> place // plane * width & (1 << width) - 1) << shift
                at += plane
            code[row, column] = value
            scale[row, column] = block[at + row % 16 * 2 :][:2].copy().view(np.float16)[0]
            zero[row, column] = {"q8": 128, "q4": 8}.get(layout, int(block[(at + 32 + row % 16) % size]))
    return code, scale, zero


@pytest.mark.parametrize("layout", list(PLANES))
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_quantised_bytes_are_what_the_description_says(layout: str, n: int, k: int) -> None:
    rng = np.random.default_rng(n * k)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    data = lay.pack(weight, layout)
    code, scale, zero = codes_by_hand(data, layout, n, k)
    by_hand = scale * (code - zero).astype(np.float32)
    assert np.array_equal(lay.unpack(data, layout, n, k), by_hand)
    # Half a step, a step and a half where a zero point or the largest code clips, and the scale's own rounding.
    steps = {"q8": 0.51, "q4": 1.01}.get(layout, 1.01)
    assert (np.abs(by_hand - weight) <= steps * np.abs(scale) + 1e-3 * np.abs(weight)).all()


@pytest.mark.parametrize("layout", ["f32", "f16"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_floats_stand_input_by_input(layout: str, n: int, k: int) -> None:
    weight = np.random.default_rng(n * k).standard_normal((n, k)).astype(np.float32)
    kind = np.float32 if layout == "f32" else np.float16
    stored = lay.pack(weight, layout).view(kind)
    for row in range(n):
        for column in range(k):
            assert stored[(row // 16 * k + column) * 16 + row % 16] == kind(weight[row, column])
    assert np.array_equal(lay.unpack(stored.view(np.uint8), layout, n, k), weight.astype(kind).astype(np.float32))


@pytest.mark.parametrize("layout", list(PLANES))
def test_codes_survive_and_padding_weighs_nothing(layout: str) -> None:
    rng = np.random.default_rng(3)
    n, k = 19, 100
    codes = rng.integers(0, 1 << lay.BITS[layout], (n, k)).astype(np.uint8)
    scale = rng.standard_normal((n, 2)).astype(np.float16)
    zero = None if layout in lay.ZERO else rng.integers(0, 1 << lay.BITS[layout], (n, 2)).astype(np.uint8)
    data = lay.pack_codes(codes, scale, zero, layout)
    assert len(data) == lay.matrix_bytes(layout, n, k)
    found, scales, zeros = lay.codes_of(data, layout, n, k)
    assert np.array_equal(found, codes)
    assert np.array_equal(scales, scale)
    assert np.array_equal(zeros, np.full((n, 2), lay.ZERO.get(layout, 0)) if zero is None else zero)
    whole = lay.unpack(data, layout, 32, 128)
    assert not whole[n:].any()
    assert not whole[:, k:].any()


def test_large_matrices_are_packed_in_parts_without_a_seam() -> None:
    weight = np.random.default_rng(0).standard_normal((2100, 64)).astype(np.float32)
    whole = lay.pack(weight, "q4")
    tail = lay.pack(weight[2096:], "q4")
    assert np.array_equal(whole[-len(tail) :], tail)
    assert np.array_equal(whole[: len(lay.pack(weight[:1040], "q4"))], lay.pack(weight[:1040], "q4"))
    assert lay.aligned(100, 4096).ctypes.data % 4096 == 0


def test_groups_of_zeros_and_the_largest_weight() -> None:
    weight = np.zeros((3, 128), np.float32)
    weight[1, 5], weight[2, 70] = 3.0, -5.0
    for name in set(lay.LAYOUTS) - {"s1"}:
        back = lay.unpack(lay.pack(weight, name), name, 3, 128)
        assert not back[0].any()
        assert np.allclose(back, weight, rtol=1e-3), name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lay.pack(np.ones((2, 2)), "q5"), "no matrix layout 'q5'; there are f32"),
        (lambda: lay.pack(np.ones(4), "q8"), "two axes"),
        (lambda: lay.pack(np.ones((0, 4)), "q8"), "holds no weights"),
        (lambda: lay.pack(np.array([[1.0, np.nan]]), "q8"), r"the weight \[0, 1\] is nan"),
        (lambda: lay.pack(np.array([[1e6]]), "f16"), "does not fit float16"),
        (lambda: lay.pack(np.array([[1e9]]), "q8"), "scale that float16 cannot hold"),
        (lambda: lay.pack(np.ones((2, 2)), "q8", np.zeros(5, np.uint8)), "takes 1056 bytes"),
        (lambda: lay.pack_codes(np.full((1, 1), 16), np.ones((1, 1)), None, "q4"), "code of 16 does not fit q4"),
        (lambda: lay.pack_codes(np.ones((1, 1)), np.ones((1, 2)), None, "q4"), r"need scales \[1, 1\]"),
        (lambda: lay.pack_codes(np.ones((1, 1)), np.ones((1, 1)), None, "q2"), "without zero points"),
        (lambda: lay.unpack(np.zeros(10, np.uint8), "q8", 1, 1), "takes 1056 bytes; 10 are there"),
    ],
)
def test_what_does_not_fit_is_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words):
        call()


def test_signs_times_the_mean_of_a_group() -> None:
    weight = np.random.default_rng(1).standard_normal((19, 100)).astype(np.float32)
    data = lay.pack(weight, "s1")
    assert len(data) == lay.matrix_bytes("s1", 19, 100) == 2 * 2 * 160
    mean = np.stack([np.abs(weight[:, :64]).mean(1), np.abs(weight[:, 64:]).mean(1)], 1).astype(np.float16)
    signs = np.where(weight >= 0, np.float32(1), np.float32(-1))
    assert np.array_equal(lay.unpack(data, "s1", 19, 100), signs * np.repeat(mean.astype(np.float32), 64, 1)[:, :100])
    codes, scale, _ = lay.codes_of(data, "s1", 19, 100)
    assert np.array_equal(codes, weight >= 0)
    assert np.array_equal(data, lay.pack_codes(codes, scale, None, "s1"))
    assert not lay.unpack(data, "s1", 32, 100)[19:].any()
