"""Three values a row in words: what is written is read, on every instruction set, and damage harms nobody."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from moestro.core.errors import ConfigError
from moestro.engine import pack_ternary, ternary
from moestro.engine.kernels.interface import Matrix
from moestro.engine.kernels.twin import linear, quantise
from moestro.engine.layout import Bytes, aligned
from tests.engine.test_kernels import every_isa, same_bits


ZEROS = 880


def drawn(n: int, k: int, share: float = 0.88, seed: int = 0) -> tuple[Bytes, np.ndarray, np.ndarray]:
    """Symbols, low and high values."""
    rng = np.random.default_rng(seed)
    symbols = (rng.random((n, k)) >= share).astype(np.uint8) * rng.integers(1, 3, (n, k)).astype(np.uint8)
    low, high = ((rng.integers(1, 200, n) / 256).astype(np.float32) for _ in range(2))
    return symbols, -low, high


def stored(symbols: Bytes, low: Any, high: Any, zeros: int = ZEROS) -> Matrix:
    data = pack_ternary.pack(symbols, low, high, zeros)
    place = aligned(len(data))
    place[:] = data
    return Matrix("t1", *symbols.shape, place, size=len(data), words=pack_ternary.book(zeros).table)


KINDS = {
    "random": lambda n, k: drawn(n, k)[0],
    "dense": lambda n, k: drawn(n, k, 0.0)[0],
    "zeros": lambda n, k: np.zeros((n, k), np.uint8),
    "highs": lambda n, k: np.full((n, k), 2, np.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (33, 130), (5, 1), (48, 515)])
def test_every_symbol_comes_back(kind: str, n: int, k: int) -> None:
    symbols = KINDS[kind](n, k)
    _, low, high = drawn(n, k)
    made = stored(symbols, low, high)
    assert made.words is not None
    assert np.array_equal(ternary.symbols(made.data, n, k, made.words), symbols)
    weight = ternary.unpack(made.data, n, k, made.words)
    assert np.array_equal(weight, np.choose(symbols, [np.zeros((n, 1)), low[:, None], high[:, None]]))
    assert made.size <= ternary.most_bytes(n, k)


@pytest.mark.parametrize("zeros", [340, 800, 990])
def test_tables_are_sound_and_hold_every_quadruple(zeros: int) -> None:
    book = pack_ternary.book(zeros)
    ternary.check_table(book.table)
    assert len(np.unique(book.table)) == ternary.WORDS  # no string twice
    single = book.table[book.table >> np.uint64(56) == 1] & np.uint64(255)
    assert len(single) == ternary.QUADS
    assert book.step[ternary.WORDS].tolist() == list(range(ternary.QUADS))


def test_rows_with_the_zeros_of_the_paper_take_less_than_its_code() -> None:
    symbols, low, high = drawn(64, 3072, 0.885)
    bits = 8 * stored(symbols, low, high).size / symbols.size
    assert 0.63 < bits < 0.744 + 0.021  # entropy; the paper's dictionary, and what is stored beside the words


@pytest.mark.parametrize(("n", "k"), [(16, 64), (50, 200), (33, 1000)])
def test_every_instruction_set_and_row_count_gives_the_same_bits_and_the_twin_agrees(n: int, k: int) -> None:
    made = stored(*drawn(n, k))
    rng = np.random.default_rng(4)
    x = rng.standard_normal((37, k)).astype(np.float32)
    x[3] = 0
    x[4] *= 1e30
    first = every_isa()[0].linear(made, x)
    for kernels in every_isa():
        cuts = [0, 1, 3, 6, 10, 37]
        parts = [kernels.linear(made, x[a:b]) for a, b in pairwise(cuts)]
        assert same_bits(first, np.concatenate(parts)), kernels.features()
    codes, scale = quantise(x)
    seen = (codes * scale[..., None]).reshape(37, -1)[:, :k].astype(np.float64)
    assert made.words is not None
    exact = seen @ ternary.unpack(made.data, n, k, made.words).T
    tolerance = 1e-5 * np.abs(exact).max(1, keepdims=True) + 1e-30
    assert (np.abs(first - exact) <= tolerance).all()
    assert (np.abs(linear(made, x) - first) <= tolerance).all()


def test_extreme_products_do_not_saturate() -> None:
    made = stored(np.full((16, 128), 2, np.uint8), -np.ones(16, np.float32), np.ones(16, np.float32))
    x = np.ones((1, 128), np.float32)
    for kernels in every_isa():
        assert kernels.linear(made, x).tolist() == [[128.0] * 16]


def damaged(made: Matrix, how: str) -> Matrix:
    """The same matrix with bytes that were never written so."""
    data = aligned(made.size)
    data[:] = made.data
    starts = data[:12].view(np.uint32)
    if how == "offset":
        starts[1] = 1 << 31
    elif how == "backwards":
        starts[1] = 4
    elif how == "counts":
        data[starts[0] + 64 : starts[0] + 96] = 255
    elif how == "long words":  # every word the longest: rows run over their ends
        assert made.words is not None
        longest = int(np.argmax(made.words >> np.uint64(56)))
        for row in range(2):
            data[starts[row] + 96 : starts[row + 1]].view(np.uint16)[:] = longest
    else:
        rng = np.random.default_rng(0)
        data[starts[0] : starts[0] + 96] = rng.integers(0, 8, 96)
    return Matrix("t1", made.n, made.k, data, size=made.size, words=made.words)


@pytest.mark.parametrize("how", ["offset", "backwards", "counts", "long words", "noise"])
def test_damage_is_a_nan_or_another_number_and_touches_nothing_else(how: str) -> None:
    made = stored(*drawn(32, 256))
    x = np.ones((9, 256), np.float32)
    broken = damaged(made, how)
    for kernels in every_isa():
        for rows in (1, 9):
            got = kernels.linear(broken, x[:rows])
            assert got.shape == (rows, 32)
            if how in ("offset", "backwards", "counts"):
                assert np.isnan(got[:, :16]).all()
    if how in ("offset", "backwards", "counts"):
        with pytest.raises(ConfigError, match="row block"):
            ternary.parts(broken.data, 32)


def test_bad_input_is_one_line() -> None:
    symbols, low, high = drawn(16, 64)
    with pytest.raises(ConfigError, match="no bfloat16 numbers"):
        pack_ternary.pack(symbols, low + np.float32(1e-6), high, ZEROS)
    with pytest.raises(ConfigError, match="rows of 65536 inputs"):
        pack_ternary.pack(np.zeros((1, 1 << 16), np.uint8), [0], [0], ZEROS)
    with pytest.raises(ConfigError, match="needs a table"):
        Matrix("t1", 16, 64)
    table = pack_ternary.book(ZEROS).table.copy()
    for wrong in (0, 8 << 56, 1 << 56 | 3, 1 << 56 | 1 << 9):
        table[77] = wrong
        with pytest.raises(ConfigError, match="the entry 77 is damaged"):
            ternary.check_table(table)
    with pytest.raises(ConfigError, match="has 65536 entries, this one 5"):
        ternary.check_table(table[:5])
    with pytest.raises(ConfigError, match="8 bytes; 4 are there"):
        ternary.parts(np.zeros(4, np.uint8), 16)
    made = stored(symbols, low, high)
    with pytest.raises(ConfigError, match="row 0 of a t1 matrix has 64 symbols, not 65"):
        ternary.symbols(made.data, 16, 65, made.words)  # type: ignore[arg-type]
