"""The native products: against their description, and against themselves on every instruction set."""

from itertools import pairwise

import numpy as np
import pytest

from moestro.core.errors import ConfigError
from moestro.engine.kernels import choose
from moestro.engine.kernels.interface import LAYOUTS, Kernels, Matrix
from moestro.engine.kernels.twin import TwinKernels, linear, quantise
from tests.engine.models import matrix
from tests.engine.packing import pack


PLAIN = [layout for layout in LAYOUTS if layout != "t1"]  # see test_ternary.py


def every_isa() -> list[Kernels]:
    pytest.importorskip("moestro_native", reason="the native wheel is not installed: pip install ./native")
    best = choose("native")
    return [choose("native", isa=isa) for isa in best.features()["available"]]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (50, 200), (33, 1000)])
def test_the_twin_multiplies_by_the_weights_that_were_packed(layout: str, n: int, k: int) -> None:
    rng = np.random.default_rng(n + k)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    data, stands_for = pack(weight, layout)
    x = rng.standard_normal((5, k)).astype(np.float32)
    if not layout.startswith("f"):
        codes, scale = quantise(x)
        seen = (codes * scale[..., None]).reshape(5, -1)[:, :k]
    else:
        seen = x
    expected = seen.astype(np.float64) @ stands_for.T.astype(np.float64)
    got = linear(Matrix(layout, n, k, data), x)
    assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("layout", PLAIN)
def test_every_instruction_set_and_row_count_gives_the_same_bits_and_the_twin_agrees(layout: str) -> None:
    rng = np.random.default_rng(3)
    made = matrix(rng, layout, 50, 200)
    x = rng.standard_normal((37, 200)).astype(np.float32)
    x[3] = 0
    x[4] *= 1e30
    x[5] *= 1e-30
    all_rows = [kernels.linear(made, x) for kernels in every_isa()]
    for kernels in every_isa():
        cuts = [0, 1, 3, 6, 10, 15, 22, 30, 37]
        parts = [kernels.linear(made, x[a:b]) for a, b in pairwise(cuts)]
        assert same_bits(all_rows[0], np.concatenate(parts)), kernels.features()
    assert all(same_bits(all_rows[0], rows) for rows in all_rows)
    assert np.allclose(
        all_rows[0], linear(made, x), rtol=1e-5, atol=1e-5 * np.abs(all_rows[0]).max(1, keepdims=True).min()
    )


def test_extreme_codes_do_not_saturate() -> None:
    """All codes 255 times all 127: pairs of products leave int16, sums stay exact."""
    weight = np.full((16, 128), 1.0, np.float32)
    weight[:, 1::2] = -1.0
    data, _ = pack(weight, "q8")
    data.reshape(-1, 1056)[:, :1024] = 255
    x = np.ones((1, 128), np.float32)
    expected = linear(Matrix("q8", 16, 128, data), x)
    for kernels in every_isa():
        assert same_bits(kernels.linear(Matrix("q8", 16, 128, data), x), expected)


def test_quantising_rounds_half_to_even_and_says_when_a_value_is_not_finite() -> None:
    every_isa()
    import moestro_native

    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 58, [0.0] * 64, [np.nan] + [1.0] * 63], np.float32)
    codes, scales, sums, finite = moestro_native.quantise(x)
    assert codes[0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    assert sums[0, 0] == 129
    assert scales[0, 0] == 1.0
    assert scales[1, 0] == 0.0
    assert not finite
    assert moestro_native.quantise(x[:2])[3]


def test_activations_are_the_same_on_every_instruction_set_and_close_to_their_formulas() -> None:
    import math

    x = np.concatenate([np.linspace(-100, 100, 997), [0.0, -0.0, 1e-30]]).astype(np.float32)
    wide = x.astype(np.float64)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in wide])
    with np.errstate(over="ignore"):
        silu = wide / (1 + np.exp(-wide))
    expected = {0: silu, 2: np.maximum(wide, 0), 4: wide * (1 + erf) / 2}
    kernels = every_isa()
    import moestro_native

    for act, reference in expected.items():
        first = None
        for each in kernels:
            moestro_native.choose(each.features()["isa"])
            got = moestro_native.activation(act, x)
            first = got if first is None else first
            assert same_bits(first, got)
        assert np.abs(first - reference).max() <= 2e-5


def test_a_choice_of_kernels_that_cannot_work_is_refused() -> None:
    assert isinstance(choose("twin"), TwinKernels)
    with pytest.raises(ConfigError, match="known are native and twin"):
        choose("cuda")
    every_isa()
    with pytest.raises(ConfigError, match="does not run here"):
        choose("native", isa="sse2")


def test_a_matrix_smaller_than_its_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes 4352 bytes, 4351 are there"):
        Matrix("q4", 32, 256, np.zeros(4351, np.uint8))
    with pytest.raises(ConfigError, match="known are"):
        Matrix("q5", 16, 64)
