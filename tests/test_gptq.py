"""The batched quantizer against the algorithm as published, exhaustive search and rounding to nearest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.convert.calibrated import code_trunk, pack_experts
from mlxmoe.convert.gptq import (
    DAMPING,
    Code,
    Coded,
    Curvature,
    _Worker,
    affine_code,
    curvature,
    decoded,
    output_errors,
    quantize,
    symmetric_code,
)
from mlxmoe.convert.quantize import affine_search, clip_search
from mlxmoe.convert.stats import Moments
from mlxmoe.formats import LEVELS, MatrixShape, num_planes
from mlxmoe.reference import unpack


def problem(
    experts: int, rows: int, columns: int, seed: int = 0, tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [E, N, K] and the second moments [E, K, K] of correlated inputs with a few large columns."""
    random = np.random.RandomState(seed)
    weight = random.standard_normal((experts, rows, columns)).astype(np.float32)
    mix = random.standard_normal((columns, columns)) * (0.2 + 2 * random.rand(columns) ** 4)
    x = random.standard_normal((experts, tokens or 4 * columns, columns)) @ mix
    return weight, (x.swapaxes(1, 2) @ x / x.shape[1]).astype(np.float32)


def starting_scales(weight: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    scales, _ = clip_search(weight.reshape(-1, group_size), bits)
    return scales.astype(np.float32).reshape(*weight.shape[:2], -1)


def error(weight: np.ndarray, coded: Coded, code: Code, curved: Curvature, level: int = 0) -> float:
    ones = np.ones(weight.shape[:2])
    return float(output_errors(weight - decoded(coded, code, level), curved.hessian, ones).sum())


def nearest(weight: np.ndarray, scales: np.ndarray, code: Code) -> Coded:
    """Rounding to nearest, by trying every code."""
    grid = code.tables[0] * np.repeat(scales, weight.shape[2] // scales.shape[2], axis=2)[..., None]
    codes = np.abs(weight[..., None] - grid).argmin(axis=-1).astype(np.uint8)
    return Coded(codes, scales, np.zeros_like(scales), np.ones((len(weight), len(code.tables) - 1), np.float32))


def published(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ for one matrix [N, K], as algorithm 1 of arXiv 2210.17323 states it: float64, one column after the other, no
    blocks, with the order of columns ("act-order") and damping; scales [N, K/G] are fixed."""
    rows, columns = weight.shape
    size, half = columns // scales.shape[1], 2 ** (bits - 1)
    damped = hessian.astype(np.float64) + DAMPING * np.mean(np.diag(hessian)) * np.eye(columns)
    order = np.argsort(-np.diag(damped), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, codes = weight[:, order].astype(np.float64), np.zeros((rows, columns), np.int64)
    for j in range(columns):
        scale = scales[:, order[j] // size]
        codes[:, order[j]] = np.clip(np.floor(left[:, j] / scale) + half, 0, 2 * half - 1)
        value = (codes[:, order[j]] - half + 0.5) * scale
        step = (left[:, j] - value) / upper[j, j]
        left[:, j:] -= np.outer(step, upper[j, j:])
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("columns", "group_size"), [(32, 32), (96, 32), (128, 64)])
def test_batched_feedback_is_the_published_algorithm(bits: int, columns: int, group_size: int) -> None:
    weight, hessian = problem(3, 20, columns, seed=bits)
    scales = starting_scales(weight, bits, group_size)
    worker = _Worker(weight, curvature(hessian), scales, np.zeros_like(scales), symmetric_code(bits))
    ours = worker.feedback().swapaxes(1, 2)
    wanted = np.stack([published(w, h, s, bits) for w, h, s in zip(weight, hessian, scales, strict=True)])
    # float32 against float64: a weight that lies on the border of two codes may fall on either side, and then its row goes
    # another way
    same_rows = (ours == wanted).all(axis=2).mean()
    assert same_rows > 0.9


@pytest.mark.parametrize("bits", LEVELS)
def test_error_is_far_below_rounding_to_nearest(bits: int) -> None:
    """What error feedback is for: a fraction of the output error at the same bits."""
    weight, hessian = problem(4, 64, 128, seed=1)
    curved, code, scales = curvature(hessian), symmetric_code(bits), starting_scales(weight, bits, 64)
    plain = error(weight, nearest(weight, scales, code), code, curved)
    assert error(weight, quantize(weight, curved, scales, 0 * scales, code), code, curved) < 0.6 * plain


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 6, 8)),
    seed=st.integers(0, 10**6),
    tokens=st.sampled_from((1, 3, 40, 400)),
    kind=st.sampled_from(("plain", "zero", "dead column", "outlier")),
)
def test_error_is_never_above_rounding_to_nearest(bits: int, seed: int, tokens: int, kind: str) -> None:
    """Singular moments, moments of nothing, columns that never carry a value: no NaN, and never worse, row by row."""
    weight, hessian = problem(2, 5, 64, seed, tokens)
    if kind == "zero":
        hessian = np.zeros_like(hessian)
    if kind == "dead column":
        hessian[:, 7] = hessian[:, :, 7] = 0
    if kind == "outlier":
        weight[:, 2, 9] = 80
    curved, code, scales = curvature(hessian), symmetric_code(bits), starting_scales(weight, bits, 32)
    coded = quantize(weight, curved, scales, 0 * scales, code)
    plain = nearest(weight, scales, code)
    for row in range(5):
        only = np.eye(5)[[row, row]]
        ours = output_errors(weight - decoded(coded, code), curved.hessian, only)
        theirs = output_errors(weight - decoded(plain, code), curved.hessian, only)
        assert (ours <= 1.0001 * theirs + 1e-9).all()
    assert np.isfinite(decoded(coded, code)).all()


@pytest.mark.parametrize("size", [1.0, 2e-6])
def test_every_sweep_lowers_the_error(size: float) -> None:
    """Also where float16 is so coarse that the best scale, once rounded, is worse than the one before."""
    weight, hessian = problem(2, 24, 96, seed=5)
    weight *= np.float32(size)
    curved, code, scales = curvature(hessian), symmetric_code(2), starting_scales(weight, 2, 32)
    errors = [error(weight, quantize(weight, curved, scales, 0 * scales, code, n), code, curved) for n in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.95 * errors[0]


def test_close_to_exhaustive_search() -> None:
    """All 4^6 codes of a row of six columns at fixed scales: the best is never undercut, and mostly found."""
    weight, hessian = problem(1, 12, 6, seed=2)
    curved, code, scales = curvature(hessian), symmetric_code(2), np.full((1, 12, 1), 0.9, np.float32)
    worker = _Worker(weight, curved, scales, 0 * scales, code)
    worker.keep_better(worker.nearest(), worker.feedback())
    worker.sweep(refit=False)
    ours = worker._row_errors(worker._codes)[0]
    every = np.array(list(itertools.product(range(4), repeat=6)))
    best = []
    for row in weight[0]:
        left = row - (every - 1.5) * 0.9
        best.append(np.einsum("ck,kl,cl->c", left, curved.hessian[0], left).min())
    assert (ours > 0.999 * np.array(best)).all()
    assert ours.sum() < 1.35 * np.sum(best)


# Nested levels --------------------------------------------------------------------------------------------------------


# At 8 bits the codes that are tried reach over a small part of a 2-bit step only
@pytest.mark.parametrize(("bits", "factor"), [(3, 1.2), (4, 1.2), (8, 1.05)])
def test_lower_levels_gain_where_their_errors_count(bits: int, factor: float) -> None:
    weight, hessian = problem(2, 48, 128, seed=bits)
    curved, scales = curvature(hessian), starting_scales(weight, bits, 64)
    full, lower = [], []
    for mu in (0.0, 0.3, 1.0):
        code = symmetric_code(bits, mu)
        coded = quantize(weight, curved, scales, 0 * scales, code)
        full.append(error(weight, coded, code, curved))
        lower.append(error(weight, coded, code, curved, 1))
    assert lower[0] > factor * lower[1]
    assert lower[1] > lower[2]
    assert full[0] < full[1] < full[2]


def test_gains_are_least_squares() -> None:
    weight, hessian = problem(2, 16, 64, seed=4)
    curved, code, scales = curvature(hessian), symmetric_code(4), starting_scales(weight, 4, 32)
    coded = quantize(weight, curved, scales, 0 * scales, code)
    for level in (1, 2):
        least = error(weight, coded, code, curved, level)
        for factor in (0.98, 1.02):
            assert error(weight, coded._replace(gains=coded.gains * factor), code, curved, level) > least


def test_tables_read_a_code_as_the_format_does() -> None:
    code = symmetric_code(4)
    assert list(code.tables[0]) == [q - 7.5 for q in range(16)]
    assert list(code.tables[1]) == [4 * (q // 4 - 1.5) for q in range(16)]
    assert list(code.tables[2]) == [2 * (q // 2 - 3.5) for q in range(16)]
    assert list(affine_code(3).tables[0]) == list(range(8))


# Stored matrices ------------------------------------------------------------------------------------------------------


def moments_of(hessian: np.ndarray, rows: int) -> Moments:
    weights = 0.5 + np.random.RandomState(0).rand(len(hessian), rows)
    return Moments(hessian, weights, np.full(len(hessian), 100), 1.0)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_packed_experts_unpack_to_their_values_and_errors(mu: float) -> None:
    """By the reference of the format, at every level that is written; experts of different levels in one call."""
    weight, hessian = problem(5, 24, 64, seed=3)
    moments, levels = moments_of(hessian, 24), [2, 4, 8, 4, 3]
    packed = pack_experts(weight, moments, levels, MatrixShape("up_proj", 24, 64, 32), mu)
    damped = curvature(hessian).hessian
    for e, (matrix, errors, values) in enumerate(packed):
        assert matrix.level == levels[e]
        assert len(errors) == num_planes(levels[e])
        rows = moments.row_weights[e]
        norm = np.einsum("nk,kl,nl,n->", weight[e], damped[e], weight[e], rows)
        for level, relative in zip(LEVELS, errors, strict=False):
            left = np.array(unpack(matrix, level)) - weight[e]
            assert np.einsum("nk,kl,nl,n->", left, damped[e], left, rows) / norm == pytest.approx(relative, rel=1e-3)
        np.testing.assert_allclose(np.array(unpack(matrix, levels[e])), values, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_trunk_matrix_beats_least_squares_on_the_weights(bits: int) -> None:
    (weight,), hessian = problem(1, 40, 128, seed=bits)
    moments = moments_of(hessian, 40)
    coded, loss, norm = code_trunk(weight, moments, bits, 64)
    plain = affine_search(weight.reshape(-1, 64), bits)
    damped = curvature(hessian).hessian[0]

    def loss_of(values: np.ndarray) -> float:
        left = values.reshape(40, 128) - weight
        return float(np.einsum("nk,kl,nl,n->", left, damped, left, moments.row_weights[0]) / 2)

    def values_of(affine: object) -> np.ndarray:
        return affine.codes * affine.scales.astype(np.float32)[:, None] + affine.biases.astype(np.float32)[:, None]  # type: ignore[attr-defined, no-any-return]

    assert loss == pytest.approx(loss_of(values_of(coded)), rel=1e-3)
    assert norm == pytest.approx(loss_of(np.zeros((40, 128), np.float32)), rel=1e-4)
    assert loss < 0.6 * loss_of(values_of(plain))
    assert coded.codes.max() < 2**bits


def test_trunk_matrix_without_moments_is_least_squares() -> None:
    (weight,), _ = problem(1, 8, 64)
    nothing = Moments(np.zeros((0, 0, 0), np.float32), np.zeros((0, 0)), np.zeros(1, np.int64), 3.0)
    coded, loss, norm = code_trunk(weight, nothing, 4, 64)
    plain = affine_search(weight.reshape(-1, 64), 4)
    assert (coded.codes == plain.codes).all()
    assert norm == 3.0
    assert loss == pytest.approx(3.0 * plain.error / float((weight**2).sum()))
