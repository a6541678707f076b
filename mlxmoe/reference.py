"""The meaning of the plane format in plain MLX built-ins: slow, obvious, the same on every backend.

Every faster path (experts.py today, Metal kernels later) has its test against these functions.

Shapes: T (token, expert) pairs, N rows, K columns, G group size, x [T, K] activations.
"""

from __future__ import annotations

import mlx.core as mx

from mlxmoe.formats import (
    LEVELS,
    PLANE_WIDTHS,
    PackedMatrix,
    dequantize_codes,
    join_planes,
    level_scale,
    num_planes,
    unpack_codes,
)


def unpack(matrix: PackedMatrix, level: int) -> mx.array:
    """float32 [N, K]: the weights that the first `level` bits of the code stand for."""
    planes = [
        unpack_codes(words, width, matrix.shape.columns)
        for words, width in zip(matrix.planes[: num_planes(level)], PLANE_WIDTHS, strict=False)
    ]
    factor = level_scale(matrix.level, level, matrix.gains.get(level, 1.0))
    return dequantize_codes(join_planes(planes), matrix.scales.astype(mx.float32) * factor, level)


def plane_product(x: mx.array, matrix: PackedMatrix, level: int) -> mx.array:
    """x [T, K] float32 -> x @ W.T [T, N] as a sum of one MLX quantized product per plane.

    Plane p of width w with m = 2^(bits of the level below it) contributes with scales m*s and biases -m*s*(2^w - 1)/2;
    the biases of all planes add up to the code's centre, -s*(2^L - 1)/2.
    """
    scales = matrix.scales.astype(mx.float32) * level_scale(matrix.level, level, matrix.gains.get(level, 1.0))
    product, below = mx.zeros((x.shape[0], matrix.shape.rows)), level
    for plane in range(num_planes(level)):
        width = PLANE_WIDTHS[plane]
        below -= width
        weight = float(1 << below)
        product = product + mx.quantized_matmul(
            x,
            matrix.planes[plane],
            scales=scales * weight,
            biases=scales * (-weight * ((1 << width) - 1) / 2),
            transpose=True,
            group_size=matrix.shape.group_size,
            bits=width,
        )
    return product


def mixed_product(x: mx.array, experts: list[int], matrices: list[PackedMatrix], levels: list[int]) -> mx.array:
    """x [T, K], the expert of each row, every expert's matrix and its resident level -> [T, N], one row at a time."""
    rows = [plane_product(x[t : t + 1], matrices[e], levels[e]) for t, e in enumerate(experts)]
    return mx.concatenate(rows, axis=0)


def truncation_levels(level: int) -> tuple[int, ...]:
    """The levels that a code of `level` bits can be read at."""
    return LEVELS[: num_planes(level)]
