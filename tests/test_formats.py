"""Packing, planes and sizes: exact against MLX's own packing, and exact against themselves."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.errors import UserError
from mlxmoe.formats import (
    GROUP_SIZES,
    LEVELS,
    NARROW_LEVELS,
    PLANE_WIDTHS,
    MatrixShape,
    array_bytes,
    choose_group_size,
    dequantize_codes,
    field_width,
    join_planes,
    level_scale,
    merge_planes,
    num_planes,
    pack_codes,
    read_floats,
    split_planes,
    unpack_codes,
    words_per_row,
    write_floats,
)

AWKWARD = (1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 160, 257)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> mx.array:
    dtype = np.uint8 if bits <= 8 else np.uint16
    return mx.array(np.random.RandomState(seed).randint(0, 1 << bits, (rows, columns)).astype(dtype))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_packing_is_mlx_packing(bits: int, group_size: int) -> None:
    """mx.quantize's own words unpack to codes that dequantize as mx.dequantize does, and pack to the same words."""
    weight = mx.random.normal((5, 384), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    codes = unpack_codes(words, bits, 384)
    assert mx.array_equal(pack_codes(codes, bits), words)
    ours = codes.astype(mx.float32).reshape(5, -1, group_size) * scales[..., None] + biases[..., None]
    theirs = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
    assert mx.abs(ours.reshape(5, 384) - theirs).max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from((1, 2, 31, 33)),
    columns=st.sampled_from(AWKWARD),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**31 - 1),
)
def test_unpack_inverts_pack(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = pack_codes(codes, bits)
    assert words.shape == (rows, words_per_row(columns, bits))
    assert mx.array_equal(unpack_codes(words, bits, columns), codes)


def test_packing_is_one_lsb_first_bit_stream() -> None:
    """Worked by hand: 3-bit codes 1..7,0 are the bytes 0xD1 0x58 0x1F (binary 000 111 110 101 100 011 010 001)."""
    words = pack_codes(mx.array([[1, 2, 3, 4, 5, 6, 7, 0] * 4], dtype=mx.uint8), 3)
    assert bytes(array_bytes(words))[:3] == bytes([0b11010001, 0b01011000, 0b00011111])


@settings(max_examples=60, deadline=None)
@given(
    level=st.sampled_from(LEVELS),
    columns=st.sampled_from(AWKWARD),
    rows=st.sampled_from((1, 3, 33)),
    seed=st.integers(0, 2**31 - 1),
)
def test_prefix_of_planes_is_the_truncated_code(level: int, columns: int, rows: int, seed: int) -> None:
    codes = random_codes(rows, columns, level, seed)
    planes = split_planes(codes, level)
    assert len(planes) == num_planes(level)
    assert [int(plane.max()) < 1 << width for plane, width in zip(planes, PLANE_WIDTHS, strict=False)] == [True] * len(
        planes
    )
    for lower in LEVELS[: num_planes(level)]:
        joined = join_planes(planes[: num_planes(lower)])
        assert joined.dtype == (mx.uint8 if lower <= 8 else mx.uint16)
        assert mx.array_equal(joined, codes >> (level - lower))


@pytest.mark.parametrize(("level", "width"), [(lv, w) for lv in NARROW_LEVELS for w in NARROW_LEVELS if w >= lv])
def test_planes_merge_to_the_packed_code(level: int, width: int) -> None:
    """On the host and without unpacking, into fields that may be wider than the code."""
    codes = random_codes(3, 96, level, seed=level)
    merged = merge_planes(stored_planes(codes, level), width)
    assert bytes(merged) == bytes(array_bytes(pack_codes(codes, width)))


def stored_planes(codes: mx.array, level: int) -> list[np.ndarray]:
    """uint8 bytes of each plane, as a file has them."""
    planes = [pack_codes(p, w) for p, w in zip(split_planes(codes, level), PLANE_WIDTHS, strict=False)]
    return [np.array(plane).view(np.uint8).reshape(-1) for plane in planes]


@pytest.mark.parametrize("level", LEVELS)
def test_planes_merge_to_two_fields(level: int) -> None:
    """A matrix of twice the rows: the first 8 bits of all codes, then what is below, which may be nothing."""
    codes = random_codes(3, 96, level, seed=level)
    below = max(level - 8, 0)
    high, low = codes >> below, codes & ((1 << below) - 1)
    wanted = bytes(array_bytes(pack_codes(high, 8))) + bytes(array_bytes(pack_codes(low, 8)))
    assert bytes(merge_planes(stored_planes(codes, level), 16)) == wanted
    assert field_width(level) == (level if level <= 8 else 16)
    shape = MatrixShape("w", 3, 96, 32)
    assert shape.code_nbytes(16) == len(wanted)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_floats_are_written_as_mlx_casts_them(dtype: mx.Dtype) -> None:
    """Ties included: the halves between neighbouring bfloat16 values go to the even one."""
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    values[:4] = [1.00390625, 1.01171875, -1.00390625, 0.0]
    cast = mx.array(values).astype(dtype)
    out = np.empty(values.size * dtype.size, np.uint8)
    write_floats(values, out, dtype)
    assert bytes(out) == bytes(array_bytes(cast))
    assert np.array_equal(read_floats(out, dtype), np.array(cast.astype(mx.float32)))


@pytest.mark.parametrize("level", LEVELS)
def test_dequantize_is_symmetric_mid_rise(level: int) -> None:
    """Every code of a group of 32: s * (q - (2^L - 1)/2), so that code and mirrored code cancel."""
    steps = np.arange(32)[None] * (1 if level <= 8 else 1009) % (1 << level)
    codes = mx.array(steps).astype(mx.uint8 if level <= 8 else mx.uint16)
    value = dequantize_codes(codes, mx.array([[2.0]]), level)
    wanted = 2.0 * (np.array(codes, np.float64) - (2**level - 1) / 2)
    assert np.array_equal(np.array(value), wanted.astype(np.float32))
    mirrored = dequantize_codes((1 << level) - 1 - codes, mx.array([[2.0]]), level)
    assert mx.array_equal(value, -mirrored)


def test_truncated_value_is_within_half_a_step_of_the_full_one() -> None:
    """Reading 2 of 4 bits moves a weight by at most half a step of the coarse grid: 1.5 fine steps."""
    codes = mx.arange(16, dtype=mx.uint8)[None]
    full = dequantize_codes(mx.concatenate([codes, codes], axis=1), mx.array([[1.0]]), 4)
    coarse = dequantize_codes(mx.concatenate([codes, codes], axis=1) >> 2, mx.array([[level_scale(4, 2, 1.0)]]), 2)
    assert mx.abs(full - coarse).max() == 1.5


@pytest.mark.parametrize(
    ("columns", "preferred", "chosen"),
    [(2048, 128, 128), (768, 128, 128), (2880, 128, 64), (96, 128, 32), (2048, 64, 64), (2048, 32, 32)],
)
def test_group_size(columns: int, preferred: int, chosen: int) -> None:
    assert choose_group_size(columns, preferred) == chosen


@pytest.mark.parametrize("columns", [100, 33, 1])
def test_no_group_size_divides(columns: int) -> None:
    with pytest.raises(UserError, match=f"{columns} input columns") as error:
        choose_group_size(columns)
    assert error.value.hint


@pytest.mark.parametrize("level", LEVELS)
def test_sizes_add_up(level: int) -> None:
    """Planes of a level take exactly the bytes of one code of that level where 32 divides K."""
    shape = MatrixShape("down_proj", 48, 384, 128)
    planes = sum(shape.plane_nbytes(plane) for plane in range(num_planes(level)))
    assert planes == shape.code_nbytes(level) == shape.num_weights * level // 8
    assert shape.scales_nbytes == 48 * 3 * 2
