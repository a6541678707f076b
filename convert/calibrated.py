"""Matrices coded for the least error of their outputs: what measure and write do when there are statistics.

Shapes: E experts, N rows, K columns, G group size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.convert.awq import nearest, rounded, with_gains
from mlxmoe.convert.gptq import (
    SWEEPS,
    Code,
    Coded,
    Curvature,
    affine_code,
    curvature,
    decoded,
    output_errors,
    quantize,
    symmetric_code,
)
from mlxmoe.convert.quantize import Affine, affine_search, clip_search, unclipped_scales
from mlxmoe.convert.stats import Moments
from mlxmoe.formats import (
    FIELD_BITS,
    LEVELS,
    PLANE_WIDTHS,
    MatrixShape,
    PackedMatrix,
    num_planes,
    pack_codes,
    split_planes,
)
from mlxmoe.rotation import IDENTITY, Rotation, rotate, rotate_moments, unrotate

_STACK_WEIGHTS = 1 << 23  # weights coded together: float32 copies of them are there a dozen times
MEASURE_SWEEPS = 1  # the ratios between levels are known after one


# Called with experts, the index of a level, and the values [E, N, K] that they have there
Seen = Callable[[slice, int, np.ndarray], None]


class Weighed(NamedTuple):
    """What errors of one projection cost. norms [E]: loss at a relative error of 1; errors [E, levels]: loss."""

    norms: np.ndarray
    errors: np.ndarray


def _chunks(count: int, weights_each: int) -> list[slice]:
    step = max(1, _STACK_WEIGHTS // weights_each)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _start(weight: np.ndarray, level: int, group_size: int) -> np.ndarray:
    """float32 scales [E, N, K/G] by the clip search."""
    scales, _ = clip_search(weight.reshape(-1, group_size), level)
    return scales.astype(np.float32).reshape(*weight.shape[:2], -1)


def _encode(
    weight: np.ndarray, curved: Curvature, level: int, group_size: int, mu: float, sweeps: int, feedback: bool
) -> tuple[Coded, Code]:
    if level > FIELD_BITS:
        scales = unclipped_scales(weight.reshape(*weight.shape[:2], -1, group_size), level)
        return nearest(weight, scales, level)
    if not feedback:
        return rounded(weight, curved.hessian, level, group_size)
    code = symmetric_code(level, mu)
    scales = _start(weight, level, group_size)
    return quantize(weight, curved, scales, np.zeros_like(scales), code, sweeps), code


def measure_experts(
    stack: np.ndarray,
    moments: Moments,
    levels: Sequence[int],
    group_size: int,
    rotation: Rotation = IDENTITY,
    feedback: bool = True,
    seen: Seen = lambda *_: None,
) -> Weighed:
    """stack float32 [E, N, K] -> what its errors cost at every level, by the real quantizer, coded behind `rotation`.
    feedback: as for `pack_experts`."""
    experts = len(stack)
    norms, errors = np.zeros(experts), np.zeros((experts, len(levels)))
    for part in _chunks(experts, stack[0].size):
        weight, rows = rotate(stack[part], rotation), moments.row_weights[part]
        curved = curvature(rotate_moments(moments.hessian[part], rotation))
        norms[part] = output_errors(weight, curved.hessian, rows) / 2
        for i, level in enumerate(levels):
            values = decoded(*_encode(weight, curved, level, group_size, 0.0, MEASURE_SWEEPS, feedback))
            errors[part, i] = output_errors(weight - values, curved.hessian, rows) / 2
            seen(part, i, unrotate(values, rotation))
    return Weighed(norms, errors)


def pack_experts(
    stack: np.ndarray,
    moments: Moments,
    levels: Sequence[int],
    shape: MatrixShape,
    mu: float,
    rotation: Rotation = IDENTITY,
    feedback: bool = True,
) -> list[tuple[PackedMatrix, tuple[float, ...], np.ndarray]]:
    """Every expert of one projection [E, N, K] at its own level, coded behind `rotation`: the stored matrix, its relative
    errors (of the outputs) at every level up to that, and the values [N, K] that it stands for, rotated back.

    feedback: GPTQ; False rounds to nearest on grids clipped by the error of the outputs (awq.py). Above 8 bits both round
    to nearest (quantize.unclipped_scales), and `mu` is of no account."""
    result: dict[int, tuple[PackedMatrix, tuple[float, ...], np.ndarray]] = {}
    for level in sorted(set(levels)):
        chosen = np.array([e for e, own in enumerate(levels) if own == level])
        for part in _chunks(len(chosen), stack[0].size):
            experts = chosen[part]
            curved = curvature(rotate_moments(moments.hessian[experts], rotation))
            weight = rotate(stack[experts], rotation)
            coded, code = _encode(weight, curved, level, shape.group_size, mu, SWEEPS, feedback)
            coded = coded if level <= FIELD_BITS else with_gains(weight, curved.hessian, coded, code)
            norms = output_errors(weight, curved.hessian, moments.row_weights[experts])
            lost = [
                output_errors(weight - decoded(coded, code, i), curved.hessian, moments.row_weights[experts])
                for i in range(len(code.tables))
            ]
            relative = np.array([*lost[1:], lost[0]]) / np.where(norms > 0, norms, 1.0)  # [levels up to this, E]
            values = unrotate(decoded(coded, code), rotation)
            for row, e in enumerate(experts):
                result[int(e)] = (_packed(coded, row, shape, level), tuple(map(float, relative[:, row])), values[row])
    return [result[e] for e in range(len(levels))]


def _packed(coded: Coded, row: int, shape: MatrixShape, level: int) -> PackedMatrix:
    planes = split_planes(mx.array(coded.codes[row]), level)
    words = [pack_codes(plane, width) for plane, width in zip(planes, PLANE_WIDTHS, strict=False)]
    lower = LEVELS[: num_planes(level) - 1]
    gains = {low: float(coded.gains[row, i]) for i, low in enumerate(lower)}
    return PackedMatrix(shape, level, words, mx.array(coded.scales[row].astype(np.float16)), gains)


def code_trunk(
    matrix: np.ndarray, moments: Moments, bits: int, group_size: int, sweeps: int = SWEEPS
) -> tuple[Affine, float, float]:
    """matrix float32 [N, K] -> MLX's affine codes [N * K/G, G], the loss that they cost and the loss at a relative error
    of 1. Without moments of the inputs (fallback of `Moments`): least squares on the weights."""
    if not len(moments.hessian):
        plain = affine_search(matrix.reshape(-1, group_size), bits)
        norm = float(np.vdot(matrix, matrix)) or 1.0
        return plain, moments.outputs * plain.error / norm, moments.outputs
    curved, code = curvature(moments.hessian), affine_code(bits)
    codes, scales, biases, loss, norm = [], [], [], 0.0, 0.0
    for part in _chunks(len(matrix), matrix.shape[1]):
        weight, rows = matrix[None, part], moments.row_weights[:, part]
        start = affine_search(weight.reshape(-1, group_size), bits)
        first = [a.astype(np.float32).reshape(1, weight.shape[1], -1) for a in (start.scales, start.biases)]
        coded = quantize(weight, curved, first[0], first[1], code, sweeps)
        loss += output_errors(weight - decoded(coded, code), curved.hessian, rows)[0] / 2
        norm += output_errors(weight, curved.hessian, rows)[0] / 2
        codes.append(coded.codes.reshape(-1, group_size))
        scales.append(coded.scales.reshape(-1).astype(np.float16))
        biases.append(coded.biases.reshape(-1).astype(np.float16))
    whole = Affine(np.concatenate(codes), np.concatenate(scales), np.concatenate(biases), loss)
    return whole, loss, norm


def affine_values(coded: Affine, shape: tuple[int, ...]) -> np.ndarray:
    """float32: what stored affine codes stand for."""
    values = coded.codes * coded.scales.astype(np.float32)[:, None] + coded.biases.astype(np.float32)[:, None]
    return values.reshape(shape)
