"""One expert from its sources: hand-worked cases and closed forms."""

import math

import pytest
import torch

from moestro.core.plan import ExpertSource
from moestro.surgery.experts import generator, make_tensor, redrawn_units, taken_units


UP = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # [I=3, D=2]
DOWN = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])  # [O=2, I=3]
TENSORS = {"up": UP, "down": DOWN, "up_bias": torch.tensor([7.0, 8.0, 9.0]), "down_bias": torch.tensor([1.0, 2.0])}


def make(
    name: str, *sources: ExpertSource, seed: int = 0, where: tuple[int, int] = (0, 0), **more: bool
) -> torch.Tensor:
    return make_tensor(sources, name, lambda source, key: TENSORS[key], seed, where, **more)


def test_a_plain_source_is_the_very_tensor() -> None:
    assert make("up", ExpertSource(layer=0)) is UP


def test_rows_then_permutation_by_hand() -> None:
    source = ExpertSource(layer=0, rows=[2, 0], permutation=[1, 0])
    assert taken_units(source, 3) == [0, 2]
    assert make("up", source).tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert make("down", source).tolist() == [[10.0, 30.0], [40.0, 60.0]]
    assert make("up_bias", source).tolist() == [7.0, 9.0]
    assert make("down_bias", source).tolist() == [1.0, 2.0]


def test_scales_touch_only_what_they_name() -> None:
    source = ExpertSource(layer=0, scale_down=2.0, scale_bias=0.5)
    assert make("down", source).tolist() == (2 * DOWN).tolist()
    assert make("down_bias", source).tolist() == [0.5, 1.0]
    assert make("up", source) is UP
    assert make("up_bias", source).tolist() == [7.0, 8.0, 9.0]


def test_a_weighted_sum_by_hand() -> None:
    turned = ExpertSource(layer=0, permutation=[2, 1, 0], weight=0.25)
    total = make("up", ExpertSource(layer=0, weight=0.75), turned)
    expected = [[0.75 * 1 + 0.25 * 5, 0.75 * 2 + 0.25 * 6], [3.0, 4.0], [0.75 * 5 + 0.25 * 1, 0.75 * 6 + 0.25 * 2]]
    assert total.tolist() == expected


def test_sums_of_low_precision_are_taken_in_float32() -> None:
    tensors = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-9], dtype=torch.bfloat16)]
    sources = [ExpertSource(layer=i, weight=1.0) for i in range(2)]
    total = make_tensor(sources, "up_bias", lambda source, key: tensors[source.layer], 0, (0, 0))
    assert total.dtype == torch.float32
    assert total.item() == 1.0 + 2.0**-9  # bfloat16 would round to 1


def test_redraw_replaces_one_set_of_units_in_all_matrices() -> None:
    inner, dim = 400, 30
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "gate": torch.randn(inner, dim, generator=draw) * 2 + 1,
        "up": torch.randn(inner, dim, generator=draw),
        "down": torch.randn(dim, inner, generator=draw) * 0.5 - 3,
    }
    source = ExpertSource(layer=4, redraw=0.25)
    made = {
        name: make_tensor([source], name, lambda s, key: tensors[key], 5, (4, 2)) for name in ("gate", "up", "down")
    }
    changed = (made["gate"] != tensors["gate"]).any(1)
    assert int(changed.sum()) == 100
    assert torch.equal(changed, (made["up"] != tensors["up"]).any(1))
    assert torch.equal(changed, (made["down"] != tensors["down"]).any(0))
    for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
        old, new = tensors[name].transpose(0, axis)[changed], made[name].transpose(0, axis)[changed]
        assert (new != old).all()
        error = 4 * old.std().item() / math.sqrt(old.numel())  # four standard errors of a mean
        assert abs(new.mean() - old.mean()) < error
        assert new.std().item() == pytest.approx(old.std().item(), rel=0.06)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 5), (0.59, 5), (1.0, 10)])
def test_the_number_of_redrawn_units_is_rounded_down(share: float, count: int) -> None:
    units = redrawn_units(ExpertSource(layer=0, redraw=share), 10, generator(0))
    assert (0 if units is None else len(units.unique())) == count


def test_noise_is_relative_to_the_matrix() -> None:
    big = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 3
    made = make_tensor([ExpertSource(layer=0, noise=0.1)], "up", lambda s, key: big, 0, (0, 0))
    assert (made - big).std().item() == pytest.approx(0.3, rel=0.02)
    bias = torch.ones(5)
    assert make_tensor([ExpertSource(layer=0, noise=0.1)], "up_bias", lambda s, key: bias, 0, (0, 0)) is bias


def test_mask_zeroes_a_share_of_the_weights_and_leaves_the_rest() -> None:
    big = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    made = make_tensor([ExpertSource(layer=0, mask=0.1)], "down", lambda s, key: big, 0, (0, 0))
    gone = made == 0
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(made[~gone], big[~gone])


def test_draws_depend_on_the_place_and_the_seed_alone() -> None:
    noisy = ExpertSource(layer=0, noise=1.0)
    first = make("up", noisy, seed=1, where=(2, 3))
    make("down", noisy, seed=1, where=(2, 3))
    assert torch.equal(first, make("up", noisy, seed=1, where=(2, 3)))
    others = [make("up", noisy, seed=2, where=(2, 3)), make("up", noisy, seed=1, where=(3, 2))]
    others += [make("up", noisy, seed=1, where=(2, 4))]
    assert not any(torch.equal(first, other) for other in others)
    pair = make("up", noisy.model_copy(update={"weight": 0.5}), noisy.model_copy(update={"weight": 0.5}))
    assert not torch.equal(pair, make("up", noisy))  # two sources of one expert draw apart


def test_moments_follow_and_are_zero_where_weights_are_new() -> None:
    source = ExpertSource(layer=0, rows=[2, 1, 0], redraw=0.34, noise=5.0, scale_down=9.0, scale_bias=3.0)
    up, down = make("up", source, moments=True), make("down", source, moments=True)
    zero = (up == 0).all(1)
    assert int(zero.sum()) == 1
    assert torch.equal(up[~zero], UP.flip(0)[~zero])
    assert torch.equal(down[:, ~zero], DOWN.flip(1)[:, ~zero])
    assert (down[:, zero] == 0).all()
    assert make("down_bias", source, moments=True).tolist() == [1.0, 2.0]
    masked = ExpertSource(layer=0, mask=0.5)
    assert torch.equal(make("up", masked, moments=True) == 0, make("up", masked) == 0)


def test_cut_units_lose_their_output_only() -> None:
    source = ExpertSource(layer=0, cut=0.67)  # floor(0.67 * 3) = 2 units
    down = make("down", source)
    gone = (down == 0).all(0)
    assert int(gone.sum()) == 2
    assert torch.equal(down[:, ~gone], DOWN[:, ~gone])
    assert make("up", source) is TENSORS["up"]
    assert make("down_bias", source) is TENSORS["down_bias"]
    assert torch.equal(make("down", source, moments=True), down)  # here the moments read are the weights themselves
