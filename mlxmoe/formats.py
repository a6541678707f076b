"""What one stored expert matrix is: nested bit-planes with one scale per group (codec `planes`).

A weight matrix W [N, K] is coded in groups of G along K with one float16 scale s per group:

    q in [0, 2^B),  value = s * (q - (2^B - 1) / 2)                             the full code of B bits
    level L < B:    value = s * 2^(B-L) * gain_L * ((q >> (B-L)) - (2^L - 1) / 2)

Planes hold the code's bits, most significant first, in the widths of PLANE_WIDTHS, so that the first planes alone are
the truncated code: a reader that has 2 bits of a 4-bit expert has a 2-bit expert. Every plane is packed along K exactly
as `mx.quantize` packs that width (one little-endian, LSB-first bit stream per row), so MLX's own quantized products run
on it. This file owns shapes, packing and sizes; how codes are chosen is convert/quantize.py, how products are computed
is reference.py (plain) and experts.py (fast).

Shapes: E experts, N rows (outputs), K columns (inputs), G group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from mlxmoe.errors import UserError

LEVELS = (2, 3, 4, 6, 8, 10, 12, 14, 16)  # bits of code that can be resident
WRITTEN_LEVELS = (2, 3, 4, 6, 8, 16)  # and those that are worth writing: 16 bits can be read at all of them
PLANE_WIDTHS = (2, 1, 1, 2, 2, 2, 2, 2, 2)  # level = sum of the first planes
FIELD_BITS = 8  # of the widest field that MLX's built-in products know: wider codes are two fields
NARROW_LEVELS = tuple(level for level in LEVELS if level <= FIELD_BITS)
GROUP_SIZES = (128, 64, 32)  # what MLX's affine products accept, best bytes first
SCALE_NBYTES = 2  # float16 on disk
ABSENT = 0  # in place of a level: a matrix that is not there
_PLANES = {ABSENT: 0, **{level: i + 1 for i, level in enumerate(LEVELS)}}


def num_planes(level: int) -> int:
    """Planes that make up a level: 2 -> 1, 3 -> 2, 4 -> 3, 6 -> 4, 8 -> 5, ..., 16 -> 9; 0 of a matrix that is not there."""
    return _PLANES[level]


def field_width(level: int) -> int:
    """Bits per weight of a code of `level` bits that is merged for MLX's built-in products (see merge_planes)."""
    return level if level <= FIELD_BITS else 2 * FIELD_BITS


def choose_group_size(columns: int, preferred: int = 128) -> int:
    """The largest group size up to `preferred` that divides K. Raises UserError when none does."""
    for group_size in GROUP_SIZES:
        if group_size <= preferred and columns % group_size == 0:
            return group_size
    raise UserError(
        f"a matrix with {columns} input columns cannot be quantized: no group size of 32, 64 or 128 divides it",
        "keep this model unconverted; mlxmoe runs it as it is",
    )


def words_per_row(columns: int, width: int) -> int:
    """uint32 words that hold K codes of `width` bits, a partly filled word counted whole."""
    return -(-columns * width // 32)


def pack_codes(codes: mx.array, width: int) -> mx.array:
    """Packs uint8 codes [..., K] < 2^width into uint32 words [..., ceil(K * width / 32)], as `mx.quantize` does.

    Eight codes make exactly `width` bytes for every width, so one rule serves 1 to 8 bits. A row whose K is no multiple
    of 32 is filled with zero codes to the next one; the extra words are cut off.
    """
    *lead, columns = codes.shape
    padding = -columns % 32
    if padding:
        codes = mx.pad(codes, [(0, 0)] * len(lead) + [(0, padding)])
    eights = codes.astype(mx.uint64).reshape(*lead, -1, 8)
    stream = (eights << (mx.arange(8, dtype=mx.uint64) * width)).sum(axis=-1, keepdims=True)
    stream_bytes = (stream >> (mx.arange(width, dtype=mx.uint64) * 8)) & 0xFF
    words = stream_bytes.astype(mx.uint8).reshape(*lead, -1).view(mx.uint32)
    return words[..., : words_per_row(columns, width)]


def unpack_codes(words: mx.array, width: int, columns: int) -> mx.array:
    """The inverse of `pack_codes`: uint32 words [..., W] -> uint8 codes [..., K]."""
    *lead, num_words = words.shape
    whole = words_per_row(-(-columns // 32) * 32, width)
    if num_words < whole:
        words = mx.pad(words, [(0, 0)] * len(lead) + [(0, whole - num_words)])
    stream_bytes = mx.contiguous(words).view(mx.uint8).reshape(*lead, -1, width).astype(mx.uint64)
    stream = (stream_bytes << (mx.arange(width, dtype=mx.uint64) * 8)).sum(axis=-1, keepdims=True)
    codes = (stream >> (mx.arange(8, dtype=mx.uint64) * width)) & ((1 << width) - 1)
    return codes.astype(mx.uint8).reshape(*lead, -1)[..., :columns]


def split_planes(codes: mx.array, level: int) -> list[mx.array]:
    """Codes [..., K] of `level` bits (uint8, above 8 bits uint16) -> one uint8 array [..., K] per plane, most significant
    first."""
    planes, below = [], level
    for width in PLANE_WIDTHS[: num_planes(level)]:
        below -= width
        planes.append(((codes >> below) & ((1 << width) - 1)).astype(mx.uint8))
    return planes


def join_planes(planes: list[mx.array]) -> mx.array:
    """The first planes of a code -> the truncated code of LEVELS[len(planes) - 1] bits: uint8, above 8 bits uint16."""
    codes = planes[0].astype(mx.uint8 if LEVELS[len(planes) - 1] <= FIELD_BITS else mx.uint16)
    for plane, width in zip(planes[1:], PLANE_WIDTHS[1:], strict=False):
        codes = (codes << width) | plane
    return codes


def merge_planes(planes: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The first planes as they are stored (uint8 bytes) -> the bytes of the truncated code in fields of `width` bits.

    What pack_codes(join_planes(unpacked planes), width) gives, on the host and without unpacking. `width` 16: a matrix of
    2 N rows with fields of 8 bits, which hold the first 8 bits of the code, or all that it has, in rows 0 to N - 1, and the
    bits below in the others, zeros where there are none. K must be a multiple of 8.
    """
    if width <= FIELD_BITS:
        return _merge_fields(planes, PLANE_WIDTHS, width)
    split = num_planes(FIELD_BITS)
    high = _merge_fields(planes[:split], PLANE_WIDTHS, FIELD_BITS)
    low = _merge_fields(planes[split:], PLANE_WIDTHS[split:], FIELD_BITS) if planes[split:] else np.zeros_like(high)
    return np.concatenate([high, low])


def _merge_fields(planes: Sequence[np.ndarray], widths: Sequence[int], width: int) -> np.ndarray:
    """Planes of these widths, as bytes, side by side in fields of `width` bits.

    Eight codes are one or two bytes of a plane and `width` bytes of the result, so each plane is a table look-up.
    """
    below = sum(widths[: len(planes)])
    merged: np.ndarray = np.zeros(planes[0].size // widths[0], np.uint32 if width <= 4 else np.uint64)
    spread: np.ndarray = np.empty_like(merged)
    for plane, plane_width in zip(planes, widths, strict=False):
        below -= plane_width
        eights: np.ndarray = plane.view(np.uint16 if plane_width == 2 else np.uint8)
        # mode clip: without it NumPy looks through the indices and makes a copy first
        np.take(_spread_table(plane_width, width, below), eights, out=spread, mode="clip")
        np.bitwise_or(merged, spread, out=merged)
    return merged.view(np.uint8).reshape(-1, merged.itemsize)[:, :width].reshape(-1)


@cache
def _spread_table(plane_width: int, width: int, below: int) -> np.ndarray:
    """Eight codes of a plane -> the same in fields of `width` bits, shifted by the bits that lie below them."""
    eights = np.arange(1 << (8 * plane_width), dtype=np.uint64)
    table = np.zeros_like(eights)
    for i in range(8):
        code = (eights >> np.uint64(i * plane_width)) & np.uint64((1 << plane_width) - 1)
        table |= code << np.uint64(i * width + below)
    return table.astype(np.uint32 if width <= 4 else np.uint64)


def read_floats(data: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """uint8 bytes that hold float16, bfloat16 or float32 -> float32 values. NumPy knows no bfloat16."""
    if dtype == mx.bfloat16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16 if dtype == mx.float16 else np.float32).astype(np.float32)


def write_floats(values: np.ndarray, out: np.ndarray, dtype: mx.Dtype) -> None:
    """Writes float32 values as float16, bfloat16 or float32, rounded to nearest even, into as many bytes (uint8)."""
    flat = values.reshape(-1)
    if dtype == mx.bfloat16:
        bits = flat.view(np.uint32)
        out.view(np.uint16)[:] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    else:
        out.view(np.float16 if dtype == mx.float16 else np.float32)[:] = flat


def array_bytes(array: mx.array) -> memoryview:
    """The evaluated array's memory as writable bytes, without a copy when it is contiguous."""
    return memoryview(cast(Any, mx.contiguous(array).reshape(-1).view(mx.uint8)))


class MatrixShape(NamedTuple):
    """One projection of an expert: its name in the model, rows N, columns K and group size G."""

    name: str
    rows: int
    columns: int
    group_size: int

    @property
    def num_weights(self) -> int:
        return self.rows * self.columns

    @property
    def num_groups(self) -> int:
        return self.num_weights // self.group_size

    def plane_nbytes(self, plane: int) -> int:
        """Bytes of one packed plane."""
        return self.rows * words_per_row(self.columns, PLANE_WIDTHS[plane]) * 4

    def code_nbytes(self, level: int) -> int:
        """Bytes of all planes up to `level`, without scales; also of one merged code in fields of `level` bits."""
        return self.rows * words_per_row(self.columns, level) * 4

    @property
    def scales_nbytes(self) -> int:
        return self.num_groups * SCALE_NBYTES


class PackedMatrix(NamedTuple):
    """One expert matrix as stored: planes of uint32 words [N, words], float16 scales [N, K/G] of the full code, and the
    gain of each lower level (float, keyed by level; the full level's gain is 1 and not listed)."""

    shape: MatrixShape
    level: int
    planes: list[mx.array]
    scales: mx.array
    gains: dict[int, float]


def level_scale(written: int, level: int, gain: float) -> float:
    """Factor on the stored scale when only `level` of the `written` bits are used."""
    return float(1 << (written - level)) * gain


def dequantize_codes(codes: mx.array, scales: mx.array, level: int) -> mx.array:
    """codes [..., K], scales [..., K/G] of this level -> float32 [..., K]: scale * (code - (2^level - 1) / 2)."""
    group_size = codes.shape[-1] // scales.shape[-1]
    centred = codes.astype(mx.float32) - ((1 << level) - 1) / 2
    grouped = centred.reshape(*scales.shape, group_size) * scales.astype(mx.float32)[..., None]
    return grouped.reshape(codes.shape)
