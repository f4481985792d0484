"""Packed formats: exact bits, scales along the input, products equal to the dequantised ones, and the plain twin."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.ops import counting, formats
from moestro.ops.formats import Packing, _matrix, _reference, packing
from moestro.ops.formats._bits import BLOCKS


INTEGERS = ("int8", "int4", "int3", "int2", "uint8", "uint4", "uint3", "uint2", "sign1")


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(bits=st.sampled_from(sorted(BLOCKS)), count=st.integers(1, 41), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_rows_of_codes_are_streams_of_bits(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(1 << bits, (3, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = formats.pack_rows(codes, bits)
    assert packed.shape == (3, formats.row_bytes(count, bits))
    for row, stored in zip(codes.tolist(), packed, strict=True):
        assert bytes(stored.tolist()) == _reference.pack_row(row, bits)
        assert _reference.unpack_row(bytes(stored.tolist()), bits, count) == row
    assert torch.equal(formats.unpack_rows(packed, bits, count), codes)


def test_the_bytes_of_the_document() -> None:
    """The worked examples of docs/formats.md."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1]], dtype=torch.uint8)
    assert formats.pack_rows(codes, 8).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0, 1]]
    assert formats.pack_rows(codes, 4).tolist() == [[0x21, 0x43, 0x65, 0x07, 0x01]]
    assert formats.pack_rows(codes, 3).tolist() == [[0xD1, 0x58, 0x1F, 0x01]]
    assert formats.pack_rows(codes % 4, 2).tolist() == [[0x39, 0x39, 0x01]]
    assert formats.pack_rows(codes % 2, 1).tolist() == [[0x55, 0x01]]
    page = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for shown in ("21 43 65 07 01", "d1 58 1f 01", "39 39 01", "55 01"):
        assert shown in page
    assert [name for name in formats.formats() if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(("group", "width"), [(None, 20), (8, 24), (8, 21), (5, 13)])
def test_a_packed_matrix_is_its_plain_twin(name: str, group: int | None, width: int) -> None:
    """Codes, scales and zero points are stored exactly, a last group may be short, and every weight is as by hand."""
    used = Packing(name, group)
    form = formats.format_named(name)
    codes, params = formats.nearest(weights(2, 6, width), used)
    parts, again = form.pack(codes, params, used)
    assert again == used
    told = form.parts((6, width), used)
    assert {key: ((2, *shape), kind) for key, (shape, kind) in told.items()} == {
        key: (tuple(part.shape), part.dtype) for key, part in parts.items()
    }
    assert form.nbytes((6, width), used) == sum(part[0].numel() * part.element_size() for part in parts.values())
    unpacked, read = form.unpack(parts, (6, width), used)
    assert torch.equal(unpacked, codes)
    assert all(torch.equal(read[key], value) for key, value in params.items())
    whole = formats.dequantise(parts, (6, width), used)
    zero = params.get("zero", params["scale"])
    for expert, row, column in itertools.product(range(2), range(6), range(width)):
        stored = bytes(parts["codes"][expert, row].tolist())
        code = _reference.unpack_row(stored, int(form.bits), width)[column]
        scale = params["scale"][expert, row].tolist()
        place = 0 if group is None else column // group
        expected = _reference.weight_at(code, place, used, scale, [int(z) for z in zero[expert, row].tolist()])
        assert float(whole[expert, row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", INTEGERS[:-1])
def test_an_error_is_at_most_half_a_step(name: str) -> None:
    weight = weights(3, 7, 40)
    used = Packing(name, 16)
    codes, params = formats.nearest(weight, used)
    step = formats.spread_groups(params["scale"], used, 40)
    form = formats.format_named(name)
    values = form.values(codes, {k: formats.spread_groups(v, used, 40) for k, v in params.items()})
    limit = 0.5 if name.startswith("int") else 1.0  # a rounded zero point may move the ends by half a step more
    assert bool(((weight - values).abs() <= limit * step * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", [*INTEGERS, "wide"])
def test_what_is_quantised_stays_what_it_is(name: str) -> None:
    """Quantising a dequantised matrix changes nothing."""
    used = Packing(name, 8)
    parts, _ = formats.quantise(weights(2, 5, 24), used)
    once = formats.dequantise(parts, (5, 24), used)
    again, _ = formats.quantise(once, used)
    torch.testing.assert_close(formats.dequantise(again, (5, 24), used), once, atol=1e-6, rtol=1e-6)


def test_the_scale_of_one_bit_is_the_best_one() -> None:
    weight = weights(1, 1, 32)
    parts, _ = formats.quantise(weight, Packing("sign1"))
    best = float(parts["scale"])
    sign = torch.where(weight >= 0, 1.0, -1.0)

    def error(scale: float) -> float:
        return float((weight - scale * sign).square().sum())

    assert best == pytest.approx(float(weight.abs().mean()))
    assert error(best) < min(error(best * 0.97), error(best * 1.03))
    zero, _ = formats.quantise(torch.zeros(1, 1, 8), Packing("sign1"))
    assert zero["codes"].tolist() == [[[255]]]  # sign(0) = +1
    assert formats.dequantise(zero, (1, 8), Packing("sign1")).abs().max() == 0


@pytest.mark.parametrize("name", INTEGERS[:-1])
def test_zeros_have_scale_one(name: str) -> None:
    parts, _ = formats.quantise(torch.zeros(1, 3, 8), Packing(name))
    assert parts["scale"].unique().tolist() == [1.0]
    assert bool((formats.dequantise(parts, (3, 8), Packing(name)) == 0).all())


def test_groups_run_along_the_input() -> None:
    """A large input column spoils its own group alone; a large output row spoils nothing but itself."""
    weight = weights(1, 4, 32)
    weight[0, :, 3] *= 100
    error = (weight - formats.dequantise(formats.quantise(weight, Packing("int4", 8))[0], (4, 32), Packing("int4", 8)))[
        0
    ]
    plain = weights(1, 4, 32)
    kept = (plain - formats.dequantise(formats.quantise(plain, Packing("int4", 8))[0], (4, 32), Packing("int4", 8)))[0]
    assert torch.equal(error[:, 8:], kept[:, 8:])
    assert error[:, :8].abs().mean() > 10 * kept[:, :8].abs().mean()


@pytest.mark.parametrize("name", [*INTEGERS, "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantised_matrix(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_matrix, "TILE", 4)  # several panels, the last one short
    used = Packing(name, 8)
    parts, _ = formats.quantise(weights(1, 11, 20), used)
    one = {key: part[0] for key, part in parts.items()}
    rows = weights(6, 20, seed=1).to(dtype).requires_grad_()
    with counting("packed_linear") as calls:
        y = formats.packed_linear(rows, one, (11, 20), used)
    assert calls == 1
    matrix = formats.dequantise(one, (11, 20), used)
    torch.testing.assert_close(y, (rows.float() @ matrix.T).to(dtype))
    y.sum().backward()
    torch.testing.assert_close(rows.grad, matrix.sum(0).expand(6, -1).to(dtype))


def test_scales_of_half_types_are_used_as_they_are_stored() -> None:
    used = Packing("int4", 8, "f16")
    weight = weights(1, 3, 16)
    codes, params = formats.nearest(weight, used)
    assert torch.equal(params["scale"].half().float(), params["scale"])
    expected = (weight / formats.spread_groups(params["scale"], used, 16)).round().clamp(-8, 7) + 8
    assert torch.equal(codes.float(), expected)
    for scale in (1e-9, 1e7):
        with pytest.raises(ConfigError, match="does not fit f16"):
            formats.quantise(weight * scale, used)
        formats.quantise(weight * scale, Packing("int4", 8, "bf16"))


def test_a_packing_is_spelled_and_read() -> None:
    for used in (Packing("int4", 64), Packing("uint2", None, "f16"), Packing("sign1", 8, "bf16", (("length", 7),))):
        assert packing(str(used)) == used
    assert str(Packing("int4", 64)) == "int4:g64:f32"
    assert packing("int4") == Packing("int4")
    for wrong, words in (("int5", "no format 'int5'"), ("int4:64", "is no packing"), ("int4:g0", "is no packing")):
        with pytest.raises(ConfigError, match=words):
            packing(wrong)


def test_what_cannot_be_packed_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match="groups of 64 do not fit rows of 16 inputs"):
        formats.quantise(weights(1, 2, 16), Packing("int4", 64))
    with pytest.raises(ConfigError, match=r"weights of type torch\.int8 are no floats"):
        formats.quantise(torch.ones(1, 2, 16, dtype=torch.int8), Packing("int4"))
    assert formats.check_packing(Packing("int4", 16), 16) == Packing("int4")
