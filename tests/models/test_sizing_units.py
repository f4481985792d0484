"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.errors import ConfigError
from moestro.models.sizing_units import flag_size, parse_size, show_count, show_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GiB", 2 * 2**30),
        ("2 gib", 2 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5e9", 1_500_000_000),
        (".5KiB", 512),
        ("4096", 4096),
        ("1kB", 1000),
        ("3B", 3),
        (7, 7),
        ("1e3MiB", 1000 * 2**20),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2G", "write 2GiB (powers of 1024) or 2GB (powers of 1000)"),
        ("1.5m", "write 1.5MiB"),
        ("2GiBs", "'GiBs' is not known"),
        ("-1GiB", "is not a size"),
        ("", "is not a size"),
        ("two", "is not a size"),
        ("1,5GB", "is not a size"),
        ("0", "at least 1"),
        ("1e400", "at least 1"),
        ("9e99PiB", "at least 1"),
    ],
)
def test_what_is_no_size_is_refused_with_a_way_out(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text, "--memory")
    assert said in str(caught.value)
    assert str(caught.value).startswith("--memory=")


@given(st.integers(1, 2**60))
def test_a_flag_is_never_too_small_and_close(nbytes: int) -> None:
    read = parse_size(flag_size(nbytes))
    assert nbytes <= read <= nbytes * 1.011 + 1


def test_shown() -> None:
    assert show_size(1.5 * 2**30) == "1.50 GiB"
    assert show_size(1023) == "1023 B"
    assert show_size(45.04 * 2**20) == "45.0 MiB"
    assert show_count(1_290_000_000) == "1.29 B"
    assert show_count(46.7e9) == "46.7 B"
    assert show_count(12) == "12"
