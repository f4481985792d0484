"""Weight operations give back the bits they took, by every route."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.errors import LoadError
from moestro.models.weights import Concat, Interleave, Permute, Stack, Transpose, join, part_shapes, split


CHAINS = {
    "experts": (Stack(),),
    "gate and up of every expert": (Concat(2, dim=1), Stack()),
    "transposed": (Transpose(),),
    "transposed, alternating": (Transpose(), Interleave(dim=2)),
    "alternating": (Interleave(dim=1),),
    "alternating experts": (Interleave(dim=1), Stack()),
    "permuted": (Permute((2, 0, 3, 1), dim=1),),
    "permuted experts": (Permute((2, 0, 3, 1), dim=1), Stack(), Transpose()),
    "three parts of the columns": (Concat(3, dim=2),),
    "nothing": (),
}


def noise(shape, dtype=torch.float32, seed=0):
    """Random bits, NaN payloads and all."""
    width = dtype.itemsize
    bits = torch.randint(0, 256, (*shape, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return bits.view(dtype).squeeze(-1)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_join_gives_back_the_bits(chain, dtype):
    whole = noise((5, 4, 6), dtype)
    parts = [part.contiguous() for part in split(whole, chain)]
    assert [tuple(part.shape) for part in parts] == part_shapes(whole.shape, chain)
    assert torch.equal(bits(join(iter(parts), whole.shape, chain)), bits(whole))


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_split_gives_back_the_parts(chain):
    parts = [noise(shape, seed=i) for i, shape in enumerate(part_shapes((5, 4, 6), chain))]
    again = split(join(parts, (5, 4, 6), chain), chain)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, parts, strict=True))


@given(
    ops=st.lists(
        st.sampled_from([Stack(), Stack(1), Concat(2), Concat(2, dim=-1), Transpose(), Interleave(0)]), max_size=4
    ),
    shape=st.lists(st.sampled_from([2, 4, 8]), min_size=5, max_size=6),
)
def test_any_chain_round_trips(ops, shape):
    chain = tuple(ops)
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    try:
        parts = [part.contiguous() for part in split(whole, chain)]
    except LoadError:
        return  # a length became odd on the way
    assert torch.equal(join(parts, shape, chain), whole)


def test_what_each_operation_means():
    whole = torch.arange(12.0).view(1, 4, 3)
    gate, up = split(whole, (Concat(2, dim=1), Stack()))
    assert gate.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert up.tolist() == [[6, 7, 8], [9, 10, 11]]
    (disk,) = split(whole, (Interleave(dim=1),))
    assert torch.equal(disk[0, ::2], gate)
    assert torch.equal(disk[0, 1::2], up)
    (disk,) = split(whole, (Transpose(), Interleave(dim=2)))
    assert disk.shape == (1, 3, 4)
    assert torch.equal(disk[0, :, ::2].T, gate)
    assert torch.equal(disk[0, :, 1::2].T, up)
    (permuted,) = split(whole, (Permute((3, 1, 0, 2), dim=1),))
    assert permuted[0, :, 0].tolist() == [9, 3, 0, 6]


def test_join_holds_one_part_at_a_time():
    alive = []

    def parts():
        for index in range(6):
            part = torch.full((2, 3), float(index))
            alive.append(part.data_ptr())
            yield part

    whole = join(parts(), (3, 4, 3), (Concat(2, dim=1), Stack()))
    assert len(alive) == 6
    assert whole.data_ptr() not in alive
    assert whole[1, 0, 0] == 1.0
    assert whole[1, 2, 0] == 4.0


def test_join_casts_into_the_asked_type():
    whole = join([torch.ones(2, 2), torch.ones(2, 2)], (2, 2, 2), (Stack(),), torch.bfloat16)
    assert whole.dtype == torch.bfloat16


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_parts(count):
    with pytest.raises(LoadError, match=r"few|many|no parts"):
        join([torch.zeros(2, 2)] * count, (2, 2, 2), (Stack(),))


def test_a_part_of_another_shape():
    with pytest.raises(LoadError, match=r"shape \[2, 3\], expected \[2, 2\]"):
        join([torch.zeros(2, 2), torch.zeros(2, 3)], (2, 2, 2), (Stack(),))


def test_lengths_that_do_not_divide():
    with pytest.raises(LoadError, match="2 equal parts"):
        split(torch.zeros(3, 3), (Concat(2),))
    for odd in ((3, 4), (1, 4)):
        with pytest.raises(LoadError, match="2 equal parts along dimension 0"):
            split(torch.zeros(odd), (Interleave(dim=0),))
        with pytest.raises(LoadError, match="2 equal parts along dimension 0"):
            Interleave(dim=0).join([torch.zeros(odd)])
    with pytest.raises(LoadError, match="not a permutation"):
        Permute((0, 0, 1))
    with pytest.raises(LoadError, match="3 entries does not fit"):
        split(torch.zeros(2, 2), (Permute((0, 2, 1)),))
