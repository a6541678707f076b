"""The quantizers against plain references, against MLX's and against published figures."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from mlxmoe.convert.quantize import affine_search, clip_search, encode, output_clip_search, truncation_fit
from mlxmoe.convert.write import pack_matrix
from mlxmoe.formats import GROUP_SIZES, LEVELS, NARROW_LEVELS, MatrixShape, num_planes
from mlxmoe.reference import unpack


def gaussian(groups: int, group_size: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((groups, group_size)).astype(np.float32)


def decibel(error: float, groups: np.ndarray) -> float:
    return float(10 * np.log10(error / np.vdot(groups, groups)))


def plain_value(groups: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The definition: the nearest of the 2^bits values s * (q - (2^bits - 1)/2), by trying all of them."""
    grid = np.arange(2**bits) - (2**bits - 1) / 2
    values = scales[:, None, None] * grid
    nearest = np.abs(groups[:, :, None] - values).argmin(axis=2)
    return scales[:, None] * grid[nearest]


@pytest.mark.parametrize("bits", NARROW_LEVELS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_encode_picks_the_nearest_value(bits: int, group_size: int) -> None:
    groups = gaussian(6, group_size, seed=bits)
    scales, errors = clip_search(groups, bits)
    value = plain_value(groups, scales.astype(np.float32), bits)
    assert np.allclose(((value - groups) ** 2).sum(axis=1), errors, rtol=1e-4, atol=1e-6)
    codes = encode(groups, scales.astype(np.float32), bits)
    ours = (codes - (2**bits - 1) / 2) * scales.astype(np.float32)[:, None]
    assert np.allclose(ours, value, atol=1e-6)


# Gaussian weights, dB of the squared error: what a scale per 128 weights reaches after a clip search (an independent
# simulation gave -9.35 and -14.54 for 2 and 3 bits), and what min/max affine with 64 reaches.
@pytest.mark.parametrize(("bits", "least"), [(2, -9.3), (3, -14.5), (4, -20.0), (6, -31.6), (8, -43.7)])
def test_gaussian_error_is_as_published(bits: int, least: float) -> None:
    groups = gaussian(2000, 128)
    assert decibel(float(clip_search(groups, bits)[1].sum()), groups) < least


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clip_search_is_close_to_a_continuous_one(bits: int) -> None:
    """SciPy's scalar minimiser over the scale of each group, started on a fine grid: at most 2 % less error in all."""
    groups = gaussian(12, 64, seed=3)
    _, errors = clip_search(groups, bits)

    def error(scale: float, group: np.ndarray) -> float:
        return float(((plain_value(group[None], np.array([scale]), bits) - group) ** 2).sum())

    best = 0.0
    for group in groups:
        full = np.abs(group).max() / ((2**bits - 1) / 2)
        grid = min(np.linspace(0.2, 1, 60) * full, key=lambda scale: error(scale, group))
        found = minimize_scalar(error, bounds=(0.95 * grid, 1.05 * grid), args=(group,), method="bounded")
        best += min(found.fun, error(grid, group))
    assert errors.sum() < 1.02 * best


def uneven_moments(columns: int, seed: int = 0) -> np.ndarray:
    """float32 [2, K, K] of correlated inputs whose sizes span a factor of thirty."""
    random = np.random.RandomState(seed)
    x = random.standard_normal((2, 3 * columns, columns)) @ random.standard_normal((columns, columns))
    x *= np.geomspace(0.2, 6, columns)
    return (x.swapaxes(1, 2) @ x / x.shape[1]).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_clip_is_close_to_a_continuous_one(bits: int) -> None:
    """SciPy's scalar minimiser of (w - w_hat) H_gg (w - w_hat)' over the scale, for every group. The search knows 20
    scales, and the error has many minima: at most 15 % more in all; and less than the clip by the weights' error leaves."""
    size, hessian = 32, uneven_moments(64)
    stack = np.random.RandomState(1).standard_normal((2, 6, 64)).astype(np.float32)
    scales = output_clip_search(stack, hessian, bits, size)
    assert (scales == scales.astype(np.float16).astype(np.float32)).all()

    def error(scale: float, row: np.ndarray, within: np.ndarray) -> float:
        left = plain_value(row[None], np.array([scale]), bits)[0] - row
        return float(left @ within @ left)

    found, by_weights, best = 0.0, 0.0, 0.0
    for e, row, group in np.ndindex(2, 6, 2):
        columns = slice(group * size, (group + 1) * size)
        within, w = hessian[e, columns, columns], stack[e, row, columns]
        full = np.abs(w).max() / ((2**bits - 1) / 2)
        grid = min(np.linspace(0.2, 1.1, 90) * full, key=lambda scale: error(scale, w, within))
        near = minimize_scalar(error, bounds=(0.97 * grid, 1.03 * grid), args=(w, within), method="bounded")
        best += min(near.fun, error(grid, w, within))
        found += error(scales[e, row, group], w, within)
        by_weights += error(clip_search(w[None], bits)[0][0].astype(np.float32), w, within)
    assert best * 0.999 < found < 1.15 * best
    assert found < {2: 0.8, 3: 0.85, 4: 0.9}[bits] * by_weights


def test_output_clip_on_even_inputs_is_the_clip_by_weights() -> None:
    stack = np.random.RandomState(3).standard_normal((2, 5, 64)).astype(np.float32)
    groups = stack.reshape(-1, 32)
    scales = output_clip_search(stack, np.stack([np.eye(64, dtype=np.float32)] * 2), 3, 32).reshape(-1)
    left = np.square(plain_value(groups, scales, 3) - groups).sum()
    assert left == pytest.approx(clip_search(groups, 3)[1].sum(), rel=0.01)  # the one search has 20 steps, the other 9


def test_output_clip_of_nothing() -> None:
    stack = np.zeros((1, 2, 32), np.float32)
    assert (output_clip_search(stack, uneven_moments(32)[:1], 2, 32) == 0).all()
    assert np.isfinite(output_clip_search(stack + 1, np.zeros((1, 32, 32), np.float32), 2, 32)).all()


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_affine_is_never_worse_than_mlx(bits: int, group_size: int) -> None:
    groups = gaussian(400, group_size, seed=bits)
    words = mx.quantize(mx.array(groups), group_size=group_size, bits=bits)
    theirs = np.array(mx.dequantize(*words, group_size=group_size, bits=bits))
    coded = affine_search(groups, bits)
    value = coded.codes * coded.scales.astype(np.float32)[:, None] + coded.biases.astype(np.float32)[:, None]
    assert coded.error == pytest.approx(float(((value - groups) ** 2).sum()), rel=1e-3)
    assert coded.error < 1.02 * float(((theirs - groups) ** 2).sum())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((3, 4, 5, 6, 8)),
    kind=st.sampled_from(("zero", "constant", "one outlier", "tiny", "uniform", "negative")),
)
def test_odd_groups(bits: int, kind: str) -> None:
    """Groups that break naive scales: no NaN, codes in range, and an error no larger than coding everything as zero."""
    groups = {
        "zero": np.zeros((3, 32)),
        "constant": np.full((3, 32), 0.37),
        "one outlier": np.r_[np.zeros(31), 50.0][None].repeat(3, 0),
        "tiny": gaussian(3, 32) * 1e-7,
        "uniform": np.linspace(-1, 1, 96).reshape(3, 32),
        "negative": -np.abs(gaussian(3, 32)) - 1,
    }[kind].astype(np.float32)
    norm = float(np.vdot(groups, groups))
    coded = affine_search(groups, bits)
    assert coded.codes.max() < 2**bits
    assert np.isfinite(coded.scales).all()
    assert coded.error <= 1.001 * norm + 1e-20
    if bits in NARROW_LEVELS:
        scales, errors = clip_search(groups, bits)
        assert np.isfinite(scales).all()
        assert (scales >= 0).all()
        assert encode(groups, scales.astype(np.float32), bits).max() < 2**bits
        assert errors.sum() <= 1.001 * norm + 1e-20


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_above_8_bits_codes_are_rounded_to_nearest(bits: int) -> None:
    """Every weight within half a step, by the definition of the code in float64; no larger step than the largest weight of
    its group needs, among those of 8 digits; and the error is what it is said to be."""
    groups = gaussian(40, 32, seed=bits) * np.geomspace(1e-4, 1e4, 40, dtype=np.float32)[:, None]
    groups[0], groups[1, :31], groups[2, 0] = 0, 0, -64.0  # zeros; one weight alone; an even power of two
    scales, errors = clip_search(groups, bits)
    exact = scales.astype(np.float64)
    codes = encode(groups, scales.astype(np.float32), bits)
    assert codes.dtype == np.uint16
    assert codes.max() < 2**bits
    left = (codes - (2**bits - 1) / 2) * exact[:, None] - groups
    assert (np.abs(left) <= exact[:, None] * (0.5 + 2.0**-8)).all()  # 2^15 steps are counted in float32
    np.testing.assert_allclose(errors, np.square(left).sum(axis=1), rtol=1e-4)
    assert scales[0] == errors[0] == 0
    unit = np.maximum(2.0 ** (np.floor(np.log2(exact[1:])) - 7), 2.0**-23)
    assert (exact[1:] % unit == 0).all()
    largest = np.abs(groups[1:]).max(axis=1).astype(np.float64)
    assert (largest <= exact[1:] * 2 ** (bits - 1)).all()
    assert (largest > (exact[1:] - unit) * 2 ** (bits - 1)).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_what_products_read_above_8_bits_is_exact_in_16_bit_floats(dtype: mx.Dtype) -> None:
    """Scales and biases of both fields of a code, down to the least scale that there is."""
    groups = gaussian(60, 32) * np.geomspace(1e-7, 10, 60, dtype=np.float32)[:, None]
    scales = mx.array(clip_search(groups, 16)[0].astype(np.float32))
    assert scales.min() == 2.0**-23
    for factor in (0.5, 1, 256, -32768):
        assert mx.array_equal((scales * factor).astype(dtype).astype(mx.float32), scales * factor)


def test_16_bits_are_closer_than_the_sources_own_rounding() -> None:
    """But for weights below 1/64 of the largest of their group, nobody is further off than bfloat16 is from a weight."""
    groups = np.array(mx.array(gaussian(500, 128)).astype(mx.bfloat16).astype(mx.float32))
    scales, errors = clip_search(groups, 16)
    left = (encode(groups, scales.astype(np.float32), 16) - 32767.5) * scales.astype(np.float32)[:, None] - groups
    largest = np.abs(groups).max(axis=1, keepdims=True)
    large = np.abs(groups) > largest / 64
    assert (np.abs(left)[large] < np.abs(groups)[large] * 2.0**-9).all()
    # the variance of even rounding at steps of max / 2^15; largest weights lie on the border of two codes
    even = 128 * float(np.square(largest / 2**15).sum()) / 12
    assert even < errors.sum() < 1.1 * even


@pytest.mark.parametrize("level", [10, 12, 14])
def test_above_8_bits_the_best_gain_is_1_to_four_digits(level: int) -> None:
    groups = gaussian(64, 128, seed=level)
    scales, _ = clip_search(groups, 16)
    codes = encode(groups, scales.astype(np.float32), 16)
    gain, error = truncation_fit(groups, codes, scales, 16, level)
    value = ((codes >> (16 - level)) - (2**level - 1) / 2) * scales.astype(np.float64)[:, None] * 2.0 ** (16 - level)
    (best,), *_ = np.linalg.lstsq(value.reshape(-1, 1), groups.reshape(-1), rcond=None)
    assert gain == 1.0
    assert best == pytest.approx(1, abs=5e-5)
    assert error == pytest.approx(((value - groups) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("level", [3, 4, 6, 8, 16])
def test_truncation_fit_is_least_squares(level: int) -> None:
    groups = gaussian(64, 128, seed=level)
    scales, _ = clip_search(groups, level)
    codes = encode(groups, scales.astype(np.float32), level)
    for lower in NARROW_LEVELS[: num_planes(level) - 1]:
        gain, error = truncation_fit(groups, codes, scales, level, lower)
        value = (
            ((codes >> (level - lower)) - (2**lower - 1) / 2)
            * scales.astype(np.float64)[:, None]
            * 2.0 ** (level - lower)
        )
        (wanted,), *_ = np.linalg.lstsq(value.reshape(-1, 1), groups.reshape(-1), rcond=None)
        assert gain == pytest.approx(wanted, rel=1e-4)
        assert error == pytest.approx(((wanted * value - groups) ** 2).sum(), rel=1e-3)


def test_nested_base_loses_less_than_a_decibel() -> None:
    """The reason for planes: 2 bits of a 4-bit code are within 0.9 dB of a dedicated 2-bit code."""
    groups = gaussian(2000, 128)
    dedicated = decibel(float(clip_search(groups, 2)[1].sum()), groups)
    scales, _ = clip_search(groups, 4)
    codes = encode(groups, scales.astype(np.float32), 4)
    assert decibel(truncation_fit(groups, codes, scales, 4, 2)[1], groups) < dedicated + 0.9


def test_2_bits_of_16_are_nearly_those_of_8() -> None:
    """The scale of 16 bits clips nothing, and that of 8 hardly anything."""
    groups, errors = gaussian(2000, 64) * np.float32(0.02), {}
    for bits in (8, 16):
        scales, _ = clip_search(groups, bits)
        codes = encode(groups, scales.astype(np.float32), bits)
        errors[bits] = decibel(truncation_fit(groups, codes, scales, bits, 2)[1], groups)
    assert errors[8] < errors[16] < errors[8] + 0.3


@pytest.mark.parametrize("level", LEVELS)
def test_packed_matrix_unpacks_to_its_measured_error(level: int) -> None:
    weight = gaussian(24, 256, seed=9)
    matrix, errors = pack_matrix(weight, MatrixShape("up_proj", 24, 256, 64), level)
    assert len(errors) == num_planes(level)
    for lower, error in zip(LEVELS, errors, strict=False):
        value = np.array(unpack(matrix, lower))
        assert ((value - weight) ** 2).sum() / (weight**2).sum() == pytest.approx(error, rel=1e-3)
