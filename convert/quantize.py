"""Codes and scales for a weight matrix without calibration data: a clip search per group for the squared weight error.

numpy on all cores rather than MLX: the same bits on every machine, whatever its backend, and three times faster than
MLX's CPU backend because each chunk stays in cache.

Symmetric mid-rise codes (routed experts, formats.py): s minimises ||x - s (q - c)||^2 over a grid of clip ratios, then
one least-squares step s = <x, q - c> / <q - c, q - c>. Affine codes (trunk, MLX's own layout): both ends shrink over the
grid, then the least-squares line through (q, x). A min/max scale, as `mx.quantize` takes, costs 1.3 to 1.8 dB at 2 bits.
`output_clip_search` minimises the error of the outputs instead, for who has second moments of the inputs. Above 8 bits
nothing is searched: see `unclipped_scales`.

Shapes: n groups of G weights each, groups [n, G] float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_CHUNK_WEIGHTS = 1 << 17  # 512 KiB of float32: one pass stays in the second-level cache
# Scale of the clip search as a share of the scale that clips nothing: what a group of 32 to 128 weights needs ranges
# from the Gaussian optimum (0.55 at 2 bits, 0.9 at 4) up to 1 for groups without outliers, down for heavy tails.
_CLIP_RATIOS = {
    2: np.linspace(0.36, 1.0, 12),
    3: np.linspace(0.48, 1.0, 9),
    4: np.linspace(0.6, 1.0, 7),
    5: np.linspace(0.72, 1.0, 5),
    6: np.linspace(0.8, 1.0, 4),
    8: np.linspace(0.9, 1.0, 3),
}
WIDTHS = tuple(_CLIP_RATIOS)  # bits that the searches know
_LEAST_EXPONENT = -23  # of a scale above 8 bits: half of it is still exact in float16
_OUTPUT_CLIP_STEPS = 20  # finer: the error of the outputs has many more minima in the scale than that of the weights


class Affine(NamedTuple):
    """MLX's affine layout: codes uint8 [n, G], value = scale * code + bias, scales and biases float16 [n]; and the total
    squared error."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    error: float


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="quantize")


def over_chunks(function: Callable[..., None], *arrays: np.ndarray) -> None:
    """Calls function(*chunks) for cache-sized chunks of rows, on all cores. The function writes into its arguments."""
    group_size = arrays[0].shape[1]
    step = max(1, _CHUNK_WEIGHTS // group_size)
    starts = range(0, len(arrays[0]), step)
    if len(starts) == 1:
        function(*arrays)
        return
    list(_pool().map(lambda i: function(*(a[i : i + step] for a in arrays)), starts))


def encode(groups: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, G] of symmetric mid-rise: clip(floor(x / s) + 2^(bits-1), 0, 2^bits - 1). A zero scale codes 0.

    uint8, above 8 bits uint16.
    """
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    q = groups * inverse[:, None]
    np.floor(q, out=q)
    q += 1 << (bits - 1)
    np.clip(q, 0, (1 << bits) - 1, out=q)
    return q.astype(np.uint8 if bits <= 8 else np.uint16)


def unclipped_scales(groups: np.ndarray, bits: int) -> np.ndarray:
    """float32 scales [...] of groups [..., G] for codes of more than 8 bits: the least s with max |w| <= s * 2^(bits-1)
    among multiples of 2^-23 of at most 8 binary digits; 0 of a group of zeros.

    At 16 bits a weight is off by about max |w| / 2^16 at most: by less than its own rounding to bfloat16, unless it is far
    smaller than the group's largest. There is nothing that a search or error feedback could win. Such scales, times powers
    of two from 1/2 on, are exact in float16 and bfloat16, and that is all that products read (experts.Bucket).
    """
    needed = np.abs(groups).max(axis=-1) / np.float32(1 << (bits - 1))
    _, exponent = np.frexp(needed)  # needed < 2^exponent
    unit = np.ldexp(np.float32(1), np.maximum(exponent - 8, _LEAST_EXPONENT))
    return np.ceil(needed / unit) * unit


def _difference(groups: np.ndarray, scales: np.ndarray, half: float) -> np.ndarray:
    """What the values at these scales [...] have more than groups [..., G]."""
    centred = _centred(groups, scales, half)
    centred *= scales[..., None]
    centred -= groups
    return centred


def _centred(groups: np.ndarray, scales: np.ndarray, half: float) -> np.ndarray:
    """The codes minus their centre [..., G]: odd multiples of one half."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    q = groups * inverse[..., None]
    np.floor(q, out=q)
    q += 0.5
    np.clip(q, -half, half, out=q)
    return q


def _least_error(
    full: np.ndarray,
    ratios: np.ndarray,
    error: Callable[[np.ndarray], np.ndarray],
    fitted: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Scales of least error, and that: among shares of `full`, which clips nothing, and what is `fitted` to the best one."""
    best, least = np.zeros_like(full), np.full_like(full, np.inf)

    def consider(scale: np.ndarray) -> None:
        # What is stored is float16, so that is what the error must be measured with.
        scale = scale.astype(np.float16).astype(np.float32)
        found = error(scale)
        better = found < least
        np.copyto(best, scale, where=better)
        np.copyto(least, found, where=better)

    for ratio in ratios:
        consider(full * np.float32(ratio))
    consider(np.maximum(fitted(best), 0))
    return best, least


def clip_search(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float16 scales [n] of the symmetric code with the least squared error, and that error [n] float32.

    Above 8 bits those of `unclipped_scales`."""
    scales, errors = np.empty(len(groups), np.float16), np.empty(len(groups), np.float32)
    half = ((1 << bits) - 1) / 2

    def search(x: np.ndarray, out_scales: np.ndarray, out_errors: np.ndarray) -> None:
        def error(scale: np.ndarray) -> np.ndarray:
            left = _difference(x, scale, half)
            return np.einsum("ij,ij->i", left, left)

        def fitted(scale: np.ndarray) -> np.ndarray:
            centred = _centred(x, scale, half)
            return np.einsum("ij,ij->i", centred, x) / np.einsum("ij,ij->i", centred, centred)

        if bits > 8:
            out_scales[:] = plain = unclipped_scales(x, bits)
            out_errors[:] = error(plain)
            return
        out_scales[:], out_errors[:] = _least_error(np.abs(x).max(axis=1) / half, _CLIP_RATIOS[bits], error, fitted)

    # Scales and errors travel as columns so that every chunked array is two-dimensional.
    over_chunks(lambda x, s, e: search(x, s[:, 0], e[:, 0]), groups, scales[:, None], errors[:, None])
    return scales, errors


def output_clip_search(stack: np.ndarray, hessian: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """float32 scales [E, N, K/G], exact in float16, of symmetric codes for stack [E, N, K]: each group's own share of the
    error of the outputs, (w - w_hat) H_gg (w - w_hat)', is least, H_gg [E, G, G] the group's block of hessian [E, K, K].

    The clip of AWQ (arXiv 2306.00978, the authors' code), by second moments in place of a sample of inputs.
    """
    half, ratios = ((1 << bits) - 1) / 2, np.linspace(_CLIP_RATIOS[bits][0], 1.0, _OUTPUT_CLIP_STEPS)
    scales = np.empty((*stack.shape[:2], stack.shape[2] // group_size), np.float32)
    for group in range(scales.shape[2]):
        columns = slice(group * group_size, (group + 1) * group_size)
        x, within = np.ascontiguousarray(stack[:, :, columns]), hessian[:, columns, columns]

        def error(scale: np.ndarray, x: np.ndarray = x, within: np.ndarray = within) -> np.ndarray:
            left = _difference(x, scale, half)
            return np.einsum("eng,eng->en", left @ within, left)

        def fitted(scale: np.ndarray, x: np.ndarray = x, within: np.ndarray = within) -> np.ndarray:
            centred = _centred(x, scale, half)
            curved = centred @ within
            square = np.einsum("eng,eng->en", curved, centred)
            return np.divide(np.einsum("eng,eng->en", curved, x), square, out=np.zeros_like(square), where=square > 0)

        scales[:, :, group], _ = _least_error(np.abs(x).max(axis=2) / half, ratios, error, fitted)
    return scales


def affine_search(groups: np.ndarray, bits: int) -> Affine:
    """Affine codes with the least squared error per group."""
    codes = np.empty(groups.shape, np.uint8)
    scales, biases = np.empty((len(groups), 1), np.float16), np.empty((len(groups), 1), np.float16)
    errors = np.empty((len(groups), 1), np.float32)
    top = np.float32((1 << bits) - 1)

    def round_codes(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        q = (x - bias) * inverse
        np.rint(q, out=q)
        return np.clip(q, 0, top, out=q)

    def search(
        x: np.ndarray, out_codes: np.ndarray, out_scale: np.ndarray, out_bias: np.ndarray, out_error: np.ndarray
    ) -> None:
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        middle, reach = (low + high) / 2, (high - low) / 2
        best_scale, best_bias = np.zeros_like(low), np.zeros_like(low)
        least = np.full_like(low, np.inf)

        def consider(scale: np.ndarray, bias: np.ndarray) -> None:
            scale, bias = (a.astype(np.float16).astype(np.float32) for a in (scale, bias))
            q = round_codes(x, scale, bias)
            q *= scale
            q += bias
            q -= x
            error = np.einsum("ij,ij->i", q, q)[:, None]
            better = error < least
            for target, value in ((best_scale, scale), (best_bias, bias), (least, error)):
                np.copyto(target, value, where=better)

        for ratio in _CLIP_RATIOS[bits]:
            consider(2 * ratio * reach / top, middle - ratio * reach)
        q = round_codes(x, best_scale, best_bias)
        q_mean, x_mean = q.mean(axis=1, keepdims=True), x.mean(axis=1, keepdims=True)
        q -= q_mean
        spread = np.einsum("ij,ij->i", q, q)[:, None]
        slope = np.divide(np.einsum("ij,ij->i", q, x)[:, None], spread, out=best_scale.copy(), where=spread > 0)
        consider(np.maximum(slope, 0), x_mean - slope * q_mean)
        out_codes[:] = round_codes(x, best_scale, best_bias).astype(np.uint8)
        out_scale[:], out_bias[:], out_error[:] = best_scale, best_bias, least

    over_chunks(search, groups, codes, scales, biases, errors)
    return Affine(codes, scales[:, 0], biases[:, 0], float(errors.sum(dtype=np.float64)))


def truncation_fit(
    groups: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int, level: int
) -> tuple[float, float]:
    """Gain and squared error of reading `bits`-bit codes at `level`: the best single factor for the whole matrix.

    groups, codes [n, G], scales [n] of the full code. With v = s 2^(bits-level) ((q >> (bits-level)) - c) and d = x - v the
    gain is <x, v> / <v, v> = 1 + <d, v> / <v, v> and the error ||d||^2 - <d, v>^2 / <v, v>. Above 8 bits the gain is 1,
    which the best one is to four digits, and scales stay exact in 16-bit floats.
    """
    sums = np.zeros((len(groups), 3), np.float32)
    factor, half = np.float32(1 << (bits - level)), np.float32(((1 << level) - 1) / 2)

    def accumulate(x: np.ndarray, q: np.ndarray, s: np.ndarray, out: np.ndarray) -> None:
        v = (q >> (bits - level)).astype(np.float32)
        v -= half
        v *= s * factor
        d = x - v  # sums of x itself would lose the digits of a small error
        out[:, 0] = np.einsum("ij,ij->i", d, v)
        out[:, 1] = np.einsum("ij,ij->i", v, v)
        out[:, 2] = np.einsum("ij,ij->i", d, d)

    over_chunks(accumulate, groups, codes, scales.astype(np.float32)[:, None], sums)
    dv, vv, dd = sums.sum(axis=0, dtype=np.float64)
    if vv == 0:
        return 1.0, 0.0
    if level > 8:
        return 1.0, float(dd)
    return float(1 + dv / vv), float(max(dd - dv * dv / vv, 0.0))
