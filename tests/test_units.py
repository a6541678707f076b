"""Sizes as people write them, in and out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxmoe.errors import UserError
from mlxmoe.units import format_size, parse_size

LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4096B", 4096),
        ("900MB", 900_000_000),
        ("9GB", 9_000_000_000),
        ("9G", 9_000_000_000),
        ("9gb", 9_000_000_000),
        (" 9 GB ", 9_000_000_000),
        ("9GiB", 9 * 2**30),
        ("9Gi", 9 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("0.5kB", 500),
        ("2TB", 2_000_000_000_000),
        ("1.9", 1),
        ("0.3GB", 300_000_000),
        ("9007199254740993", 2**53 + 1),  # not a float64
        ("8.388608TiB", 9_223_372_036_854),
        (str(LARGEST), LARGEST),
        (7, 7),
        (8e9, 8_000_000_000),
    ],
)
def test_sizes(size: str | float, nbytes: int) -> None:
    assert parse_size(size) == nbytes
    assert type(parse_size(size)) is int


@pytest.mark.parametrize(
    "size",
    [
        "",
        " ",
        "GB",
        "9XB",
        "9 G B",
        "9,5GB",
        "-9GB",
        "+9GB",
        "1e9",
        "0x10",
        ".5GB",
        "9.GB",
        "nan",
        "inf",
        "9MiBs",
        "٣GB",
        "9" * 400,
        math.nan,
        math.inf,
        -math.inf,
    ],
)
def test_no_size(size: str | float) -> None:
    with pytest.raises(UserError, match="is not a size") as error:
        parse_size(size)
    assert error.value.hint == "write it as 900MB, 9GB or 9GiB"


@pytest.mark.parametrize("size", ["0", "0GB", "0.9", "0.0001kB", 0, -1, 0.5])
def test_below_one_byte(size: str | float) -> None:
    with pytest.raises(UserError, match="must be one byte or more, found "):
        parse_size(size)


@pytest.mark.parametrize("size", [str(LARGEST + 1), "9999999999TB", LARGEST + 1, 1e300])
def test_above_any_machine(size: str | float) -> None:
    with pytest.raises(UserError, match="more than any machine holds"):
        parse_size(size)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (9_170_000, "9.17 MB"),
        (6.5e10, "65 GB"),
        (2e12, "2 TB"),
        (5e15, "5000 TB"),
        (-9_170_000, "-9.17 MB"),
    ],
)
def test_shown(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(1, LARGEST))
def test_what_is_shown_reads_back(nbytes: int) -> None:
    """Three digits: within half a unit of the third, 0.5 % at most."""
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.005)


@given(st.integers(1, LARGEST))
def test_plain_bytes_are_exact(nbytes: int) -> None:
    assert parse_size(str(nbytes)) == parse_size(f"{nbytes} B") == parse_size(nbytes) == nbytes


@given(st.integers(1, LARGEST // 1024**4), st.sampled_from("KMGT"))
def test_prefixes(number: int, prefix: str) -> None:
    power = "KMGT".index(prefix) + 1
    assert parse_size(f"{number}{prefix}B") == parse_size(f"{number}{prefix.lower()}") == number * 1000**power
    assert parse_size(f"{number}{prefix}iB") == number * 1024**power
