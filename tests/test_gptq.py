"""The batched quantizer against the algorithm as published, exhaustive search and rounding to nearest, in both array
libraries."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import mlx.core as mx
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
    array_library,
    curvature,
    decoded,
    output_errors,
    quantize,
    symmetric_code,
)
from mlxmoe.convert.quantize import affine_search, clip_search
from mlxmoe.convert.stats import Moments
from mlxmoe.convert.write import pack_matrix
from mlxmoe.formats import LEVELS, NARROW_LEVELS, MatrixShape, num_planes
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


def nearest(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, code: Code) -> Coded:
    """Rounding to nearest, by trying every code."""
    size = weight.shape[2] // scales.shape[2]
    grid = code.tables[0] * np.repeat(scales, size, axis=2)[..., None] + np.repeat(biases, size, axis=2)[..., None]
    codes = np.abs(weight[..., None] - grid).argmin(axis=-1).astype(np.uint8)
    return Coded(codes, scales, biases, np.ones((len(weight), len(code.tables) - 1), np.float32))


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


@pytest.mark.parametrize("bits", NARROW_LEVELS)
def test_error_is_far_below_rounding_to_nearest(bits: int) -> None:
    """What error feedback is for: a fraction of the output error at the same bits."""
    weight, hessian = problem(4, 64, 128, seed=1)
    curved, code, scales = curvature(hessian), symmetric_code(bits), starting_scales(weight, bits, 64)
    plain = error(weight, nearest(weight, scales, 0 * scales, code), code, curved)
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
    plain = nearest(weight, scales, 0 * scales, code)
    for row in range(5):
        only = np.eye(5)[[row, row]]
        ours = output_errors(weight - decoded(coded, code), curved.hessian, only)
        theirs = output_errors(weight - decoded(plain, code), curved.hessian, only)
        assert (ours <= 1.0001 * theirs + 1e-9).all()
    assert np.isfinite(decoded(coded, code)).all()


@pytest.mark.parametrize(("size", "group_size"), [(1.0, 32), (2e-6, 32), (1.0, 128)])
def test_every_sweep_lowers_the_error(size: float, group_size: int) -> None:
    """Also where float16 is so coarse that the best scale, once rounded, is worse than the one before, and where a group
    takes several blocks."""
    weight, hessian = problem(2, 24, 128, seed=5)
    weight *= np.float32(size)
    curved, code, scales = curvature(hessian), symmetric_code(2), starting_scales(weight, 2, group_size)
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


# Both array libraries -------------------------------------------------------------------------------------------------


def started(weight: np.ndarray, bits: int, group_size: int, mu: float | None) -> tuple[Code, np.ndarray, np.ndarray]:
    """A code, symmetric for a number mu and affine for None, with starting scales and biases."""
    if mu is not None:
        scales = starting_scales(weight, bits, group_size)
        return symmetric_code(bits, mu), scales, np.zeros_like(scales)
    start = affine_search(weight.reshape(-1, group_size), bits)
    scales, biases = (a.astype(np.float32).reshape(*weight.shape[:2], -1) for a in (start.scales, start.biases))
    return affine_code(bits), scales, biases


@settings(max_examples=12, deadline=None)
@given(
    experts=st.integers(1, 3),
    rows=st.sampled_from((1, 7, 33)),
    groups=st.sampled_from(((32, 1), (32, 3), (64, 2))),
    bits=st.sampled_from(NARROW_LEVELS),
    mu=st.sampled_from((None, 0.0, 0.4)),
    seed=st.integers(0, 10**6),
)
def test_mlx_computes_what_numpy_does(
    experts: int, rows: int, groups: tuple[int, int], bits: int, mu: float | None, seed: int
) -> None:
    """One algorithm: the same rows but for ties, which float32 sums in another order may break the other way; such a row is
    another local minimum, so its error may differ, but not by much. Neither library is worse than rounding to nearest."""
    weight, hessian = problem(experts, rows, groups[0] * groups[1], seed)
    curved = curvature(hessian)
    code, scales, biases = started(weight, bits, groups[0], mu)
    ours, theirs = (quantize(weight, curved, scales, biases, code, library=library) for library in (np, mx))
    same = (ours.codes == theirs.codes).all(axis=2)
    assert same.mean() > 0.9 or (~same).sum() <= 2
    alike = same.all(axis=1)  # experts without a tie: nothing but rounding may differ
    np.testing.assert_allclose(theirs.scales[same], ours.scales[same], rtol=2e-3)  # float16 neighbours
    np.testing.assert_allclose(theirs.gains[alike], ours.gains[alike], rtol=1e-4)
    plain = row_errors(weight, nearest(weight, scales, biases, code), code, curved)
    for coded in (ours, theirs):
        assert [a.dtype for a in coded] == [np.uint8, np.float32, np.float32, np.float32]
        assert error(weight, coded, code, curved) <= 1.1 * error(weight, ours, code, curved)
        if not mu:
            assert (row_errors(weight, coded, code, curved) <= 1.0001 * plain + 1e-9).all()


def row_errors(weight: np.ndarray, coded: Coded, code: Code, curved: Curvature) -> np.ndarray:
    left = weight - decoded(coded, code)
    return np.einsum("enk,ekl,enl->en", left, curved.hessian, left, dtype=np.float64)


@pytest.mark.parametrize("library", [np, mx])
@pytest.mark.parametrize(("bits", "mu"), [(3, None), (6, None), (4, 0.0), (4, 0.5)])
def test_scales_are_the_least_squares_of_a_general_solver(library: ModuleType, bits: int, mu: float | None) -> None:
    """With the codes fixed: numpy's least squares in float64, with the Cholesky factor of H as the weights."""
    weight, hessian = problem(1, 6, 32, seed=bits)
    weight += 0.3  # codes that lean to one side: scale and bias are then hard to tell apart
    curved = curvature(hessian)
    code, scales, biases = started(weight, bits, 32, mu)
    worker = _Worker(weight, curved, scales, biases, code, library)
    worker.keep_better(worker.nearest(), worker.nearest())
    errors = worker._errors(worker._codes)
    worker._refit(0, slice(0, 32), worker._hessian @ errors)
    root = np.linalg.cholesky(curved.hessian[0].astype(np.float64)).T
    levels = [i for i, share in enumerate(code.weights) if share > 0]
    for row in range(6):
        codes = np.asarray(worker._codes)[0, :, row]
        unknown, wanted = [], []
        for level in levels:
            values = code.tables[level][codes] * np.asarray(worker._gains[level]).item()
            columns = [values, np.ones(32)] if mu is None else [values]
            share = np.sqrt(code.weights[level])
            unknown.append(share * root @ np.stack(columns, axis=1))
            wanted.append(share * root @ weight[0, row])
        best = np.linalg.lstsq(np.concatenate(unknown), np.concatenate(wanted), rcond=None)[0]
        found = [np.asarray(a)[0, 0, row] for a in (worker._scales, worker._biases)][: len(best)]
        assert found[0] == pytest.approx(best[0], rel=2e-3)  # a few float16 steps
        if mu is None:  # the bias that is best for the scale as stored
            lean = root @ np.ones(32)
            left = root @ (weight[0, row] - found[0] * code.tables[0][codes])
            assert found[1] == pytest.approx(float(lean @ left / (lean @ lean)), rel=2e-3, abs=1e-3)


class _CoarseProducts(np.ndarray):
    """Arrays whose products round their factors to the 10 bits of TF32's mantissa, as some GPUs do with float32."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        arrays = [np.asarray(a) for a in inputs]
        if ufunc is np.matmul:
            words = [np.ascontiguousarray(a, np.float32).view(np.uint32) for a in arrays]
            arrays = [((w + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32) for w in words]
        if "out" in kwargs:
            kwargs["out"] = tuple(np.asarray(a) for a in kwargs["out"])
        result = getattr(ufunc, method)(*arrays, **kwargs)
        return result.view(_CoarseProducts) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize(("bits", "mu"), [(2, 0.0), (8, 0.0), (4, 0.5), (3, None)])
def test_a_gpu_that_rounds_products_loses_next_to_nothing(
    bits: int, mu: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem(2, 48, 128, seed=bits)
    curved = curvature(hessian)
    code, scales, biases = started(weight, bits, 64, mu)
    exact = error(weight, quantize(weight, curved, scales, biases, code), code, curved)
    monkeypatch.setattr(_Worker, "_taken", lambda _, a: np.ascontiguousarray(a).view(_CoarseProducts))
    coarse = quantize(weight, curved, scales, biases, code)
    assert isinstance(_Worker(weight, curved, scales, biases, code)._hessian, _CoarseProducts)
    # 2^-11 of each product: less than what one other code changes, and rows are few
    assert error(weight, coarse, code, curved) == pytest.approx(exact, rel=5e-3)


class _CountingMlx:
    """mlx.core, counting evaluations."""

    def __init__(self) -> None:
        self.evaluations = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def eval(self, *arrays: Any) -> None:
        self.evaluations += 1
        mx.eval(*arrays)


def test_graphs_of_mlx_stay_small() -> None:
    """Evaluated after every block of 32 columns of the feedback, and every group of a sweep."""
    weight, hessian = problem(1, 4, 128)
    curved, library = curvature(hessian), _CountingMlx()
    quantize(weight, curved, *started(weight, 2, 64, 0.0)[1:], symmetric_code(2), sweeps=3, library=library)
    assert library.evaluations >= 128 // 32 + 3 * 2


def test_the_library_follows_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert array_library() is np  # tests run on the CPU
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert array_library() is mx


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
    """By the reference of the format, at every level that can be read; experts of different levels in one call."""
    weight, hessian = problem(6, 24, 64, seed=3)
    moments, levels = moments_of(hessian, 24), [2, 4, 8, 4, 3, 16]
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
    errors_at_16, gains = packed[5][1], packed[5][0].gains
    assert list(errors_at_16) == sorted(errors_at_16, reverse=True)
    assert errors_at_16[-1] < 1e-7
    assert [gains[level] for level in (10, 12, 14)] == [1, 1, 1]


@pytest.mark.parametrize("feedback", [True, False])
def test_at_16_bits_the_statistics_decide_about_the_lower_levels_alone(feedback: bool) -> None:
    """The codes are those of data-free rounding, by both methods; the gains are least squares in the metric of H, by
    numpy's solver with the factor of H as the weights."""
    weight, hessian = problem(2, 24, 64, seed=5)
    shape = MatrixShape("up_proj", 24, 64, 32)
    packed = pack_experts(weight, moments_of(hessian, 24), [16, 16], shape, 0.0, feedback=feedback)
    for e, (matrix, *_) in enumerate(packed):
        plain = pack_matrix(weight[e], shape, 16).matrix
        assert mx.array_equal(matrix.scales, plain.scales)
        assert all(mx.array_equal(a, b) for a, b in zip(matrix.planes, plain.planes, strict=True))
        factor = np.linalg.cholesky(curvature(hessian).hessian[e].astype(np.float64))
        for level in NARROW_LEVELS:
            value = np.array(unpack(matrix, level)).astype(np.float64) / matrix.gains[level]
            (gain,), *_ = np.linalg.lstsq((value @ factor).reshape(-1, 1), (weight[e] @ factor).reshape(-1), rcond=None)
            assert matrix.gains[level] == pytest.approx(gain, rel=1e-4)


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
