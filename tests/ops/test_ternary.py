"""The ternary grid and its code: the paper's dictionary, exact round trips, rates against the entropy."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.ops import formats
from moestro.ops.formats import Packing, _reference
from moestro.ops.formats._codebook import Kind, codebook, decode, encode


KINDS: tuple[Kind, ...] = ("tree", "pairs")
NAMES = {"tree": "ternary", "pairs": "ternary14"}


def draw(rows: int, width: int, zeros: float, seed: int = 0) -> Tensor:
    """Independent symbols, the two that are not zero alike often."""
    made = torch.Generator().manual_seed(seed)
    sign = torch.randint(1, 3, (rows, width), dtype=torch.uint8, generator=made)
    return (torch.rand(rows, width, generator=made) >= zeros).to(torch.uint8) * sign


def read(words: Tensor, counts: Tensor, width: int, kind: Kind, zeros: int = 885) -> Tensor:
    place, high = decode(words, counts, width, codebook(kind, zeros))
    symbols = torch.zeros(len(counts) * width, dtype=torch.uint8)
    symbols[place] = high.to(torch.uint8) + 1
    return symbols.view(-1, width)


def strings_of(kind: Kind, zeros: int, words: int) -> list[tuple[int, ...]]:
    book = codebook(kind, zeros, words)
    found = []
    for length, others in zip(book.length_W.tolist(), book.nonzero_KW.T.tolist(), strict=True):
        string = [0] * length
        for other in others:
            if other >= 0:
                string[other // 2] = 1 + other % 2
        found.append(tuple(string))
    return found


def entropy(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2((1 - share) / 2)


def test_the_dictionary_of_the_paper() -> None:
    """Strings of 1 to 14 pairs, by number as the paper's rule gives them; closed against cutting off the last pair."""
    book = codebook("pairs")
    counts = torch.bincount(book.length_W.long() // 2).tolist()
    assert counts == [0, 9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]
    strings = strings_of("pairs", 885, 1 << 16)
    known = set(strings)
    assert len(known) == 1 << 16
    assert all(len(string) == 2 or string[:-2] in known for string in strings)
    assert sorted(strings[:9]) == [(a, b) for a in range(3) for b in range(3)]


@pytest.mark.parametrize(("zeros", "words"), [(885, 700), (600, 1001), (340, 64), (970, 1500)])
def test_books_are_those_that_a_queue_finds(zeros: int, words: int) -> None:
    """String by string in their order: a tie must not fall otherwise on another machine."""
    assert strings_of("pairs", zeros, words) == _reference.pair_strings(zeros, words, 14)
    assert strings_of("tree", zeros, words) == _reference.leaf_strings(zeros, words)


def test_no_leaf_begins_another() -> None:
    strings = sorted(strings_of("tree", 885, 1 << 16))
    assert len(strings) == (1 << 16) - 1
    assert not any(second[: len(first)] == first for first, second in pairwise(strings))
    total = sum(0.885 ** string.count(0) * 0.0575 ** (len(string) - string.count(0)) for string in strings)
    assert total == pytest.approx(1)


@given(
    kind=st.sampled_from(KINDS), width=st.integers(1, 70), rows=st.integers(1, 5),
    share=st.sampled_from([0, 3, 6, 9, 10]), zeros=st.sampled_from([340, 885, 990]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_what_is_decoded_is_what_was_encoded(
    kind: Kind, width: int, rows: int, share: int, zeros: int, seed: int
) -> None:
    symbols = draw(rows, width, share / 10, seed)
    words, counts = encode(symbols, codebook(kind, zeros))
    assert int(counts.sum()) == len(words)
    assert torch.equal(read(words, counts, width, kind, zeros), symbols)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 30, 31, 64])
def test_words_are_those_of_the_plain_coder(kind: Kind, width: int) -> None:
    strings = _reference.pair_strings(800, 300, 14) if kind == "pairs" else _reference.leaf_strings(800, 300)
    symbols = draw(40, width, 0.8)
    words, counts = encode(symbols, codebook(kind, 800, 300))
    expected = [_reference.encode_row(row, strings) for row in symbols.tolist()]
    assert counts.tolist() == [len(row) for row in expected]
    assert words.tolist() == [word for row in expected for word in row]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", [0, 1, 2])
def test_rows_of_one_symbol(kind: Kind, fill: int) -> None:
    symbols = torch.full((3, 101), fill, dtype=torch.uint8)
    words, counts = encode(symbols, codebook(kind))
    assert torch.equal(read(words, counts, 101, kind), symbols)
    length = codebook(kind).length_W[words.long()].view(3, -1).sum(1)
    assert bool((length >= 101).all())
    if kind == "pairs":
        assert length.tolist() == [102] * 3  # ends with the row, made even


def test_many_rows_and_both_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of rows on several threads give the words of all rows at once."""
    from moestro.ops.formats import _codebook

    symbols = draw(64, 50, 0.9)
    whole = [encode(symbols, codebook(kind)) for kind in KINDS]
    monkeypatch.setattr(_codebook, "CHUNK", 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for (words, counts), kind in zip(whole, KINDS, strict=True):
        parts = encode(symbols, codebook(kind))
        assert torch.equal(parts[0], words)
        assert torch.equal(parts[1], counts)


@pytest.mark.parametrize(("kind", "most"), [("tree", 1.06), ("pairs", 1.2)])
def test_the_rate_at_the_design_point(kind: Kind, most: float) -> None:
    """Rows of 3072 with 88.5 % zeros: near the entropy, and below 0.85 bit with all that is stored."""
    symbols = draw(256, 3072, 0.885)
    words, _ = encode(symbols, codebook(kind))
    assert 16 * len(words) / symbols.numel() < most * entropy(0.885)
    form = formats.format_named(NAMES[kind])
    values = {"low": -torch.ones(1, 256, 1), "high": torch.ones(1, 256, 1)}
    _, final = form.pack(symbols[None], values, Packing(form.name, None, "bf16"))
    bits = 8 * form.nbytes((256, 3072), final) / symbols.numel()
    assert bits == (16 * len(words) + 48 * 256) / symbols.numel() < 0.85


@pytest.mark.parametrize(
    ("zeros", "width", "expected"), [(0.885, 768, 0.75), (0.86, 3072, 0.82), (0.7, 3072, 1.7), (1.0, 3072, 0.573)]
)
def test_rates_of_the_papers_dictionary(zeros: float, width: int, expected: float) -> None:
    symbols = draw(128, width, zeros)
    words, _ = encode(symbols, codebook("pairs"))
    assert 16 * len(words) / symbols.numel() == pytest.approx(expected, rel=0.03)


def zeros_of_normal_rows(width: int) -> float:
    """1 - 2 E P(w > M / 2) for normal w, M the largest of a row: what the values leave at zero."""
    from scipy.stats import norm

    m = torch.linspace(0, 8, 20001, dtype=torch.float64)
    density = torch.gradient(torch.from_numpy(norm.cdf(m)) ** width, spacing=(m,))[0]
    return 1 - 2 * float(torch.trapezoid(density * torch.from_numpy(norm.sf(m / 2)), m))


@pytest.mark.parametrize(
    ("width", "words", "beside"), [(128, 1.19, 0.375), (512, 0.85, 0.094), (768, 0.79, 0.0625), (3072, 0.65, 0.0156)]
)
def test_rows_of_normal_weights(width: int, words: float, beside: float) -> None:
    """The wider a row, the further its largest weight and the more zeros; less than a bit from 512 inputs on."""
    weight = torch.randn(1, 600, width, generator=torch.Generator().manual_seed(0))
    codes, params = formats.nearest(weight, Packing("ternary", None, "bf16"))
    assert float((codes == 0).float().mean()) == pytest.approx(zeros_of_normal_rows(width), abs=0.003)
    for name in NAMES.values():
        parts, _ = formats.format_named(name).pack(codes, params, Packing(name, None, "bf16", (("zeros", 0),)))
        assert 8 * parts["codes"].nbytes / weight.numel() < words
        extra = sum(part.nbytes for key, part in parts.items() if key != "codes")
        assert 8 * extra / weight.numel() == pytest.approx(beside, rel=0.01)


def test_a_codebook_for_the_zeros_there_are_is_shorter() -> None:
    codes = draw(64, 1024, 0.7)[None]
    values = {"low": -torch.ones(1, 64, 1), "high": torch.ones(1, 64, 1)}
    for name in NAMES.values():
        form = formats.format_named(name)
        parts, final = form.pack(codes, values, Packing(name, None, "bf16", (("zeros", 0),)))
        _, plain = form.pack(codes, values, Packing(name, None, "bf16"))
        assert dict(final.sizes)["zeros"] == 700
        assert dict(plain.sizes)["zeros"] == 885
        assert form.nbytes((64, 1024), final) < 0.95 * form.nbytes((64, 1024), plain)
        assert torch.equal(form.unpack(parts, (64, 1024), final)[0], codes)


@pytest.mark.parametrize("name", ["trits", "ternary", "ternary14"])
@pytest.mark.parametrize(("group", "width"), [(None, 20), (8, 24), (8, 21), (5, 13), (None, 1)])
def test_a_packed_matrix(name: str, group: int | None, width: int) -> None:
    """Exact symbols and values, shapes as told, any rows alone, stacks padded to the longest."""
    used = Packing(name, group)
    form = formats.format_named(name)
    weight = torch.randn(3, 6, width, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 0
    weight[1, 1].abs_()
    weight[2] *= torch.arange(width) == 0  # fewer words than the others
    codes, params = formats.nearest(weight, used)
    parts, final = form.pack(codes, params, used)
    told = form.parts((6, width), final)
    assert {key: ((3, *shape), kind) for key, (shape, kind) in told.items()} == {
        key: (tuple(part.shape), part.dtype) for key, part in parts.items()
    }
    assert form.nbytes((6, width), final) <= form.nbytes((6, width), used)
    unpacked, again = form.unpack(parts, (6, width), final)
    assert torch.equal(unpacked, codes)
    assert all(torch.equal(again[key], value) for key, value in params.items())
    spread = {key: formats.spread_groups(value, used, width) for key, value in params.items()}
    expected = torch.where(codes == 1, spread["low"], torch.where(codes == 2, spread["high"], 0.0))
    assert torch.equal(formats.dequantise(parts, (6, width), final), expected)
    one = {key: part[1] for key, part in parts.items()}
    some = form.dequantise(form.rows(one, 2, 5), (3, width), final)
    assert torch.equal(some, expected[1, 2:5])
    assert formats.packing(str(final)) == final


def test_the_grid_of_a_row() -> None:
    weight = torch.tensor([[[-4.0, -2.1, -1.9, 0.0, 0.9, 1.1, 2.0], [0.0, 0.5, 0.2, 0.9, 1.0, 0.3, 0.1]]])
    codes, params = formats.nearest(weight, Packing("ternary"))
    assert codes.tolist() == [[[1, 1, 0, 0, 0, 2, 2], [0, 0, 0, 2, 2, 0, 0]]]
    assert params["low"].tolist() == [[[-4.0], [0.0]]]
    assert params["high"].tolist() == [[[2.0], [1.0]]]
    form = formats.format_named("ternary")
    drifted = torch.tensor([[-0.01]])  # as errors of other columns leave it: no symbol for a value that is 0 anyway
    assert form.round(drifted, {"low": torch.zeros(1, 1), "high": torch.ones(1, 1)}).tolist() == [[0]]


def test_five_symbols_a_byte() -> None:
    codes = torch.tensor([[[1, 2, 0, 0, 1, 2]]], dtype=torch.uint8)
    parts, _ = formats.format_named("trits").pack(
        codes, {k: torch.ones(1, 1, 1) for k in ("low", "high")}, Packing("trits")
    )
    assert parts["codes"].tolist() == [[[0x58, 0x02]]]


def test_what_cannot_be_coded() -> None:
    with pytest.raises(ConfigError, match=r"0.333 zeros; a codebook is for shares above 1/3"):
        codebook("tree", 333)
    with pytest.raises(ConfigError, match="1 zeros"):
        codebook("pairs", 1000)
    with pytest.raises(ConfigError, match=r"the shape \[3, 0\]; both must be at least 1"):
        encode(torch.zeros(3, 0, dtype=torch.uint8), codebook("tree"))
    with pytest.raises(ConfigError, match="miss some single pair"):
        codebook("pairs", 999, 27)
    wide = torch.zeros(1, 1, 1 << 17, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="rows of 131072 inputs are too wide"):
        formats.format_named("ternary").pack(wide, {}, Packing("ternary"))
    with pytest.raises(ConfigError, match="does not fit f16"):
        formats.quantise(torch.full((1, 2, 4), 1e6), Packing("ternary", None, "f16"))
