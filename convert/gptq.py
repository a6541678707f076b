"""Codes that minimise the error of a layer's outputs: GPTQ/LDLQ batched over experts, then coordinate descent.

The error of a matrix W on the inputs that it sees is tr(D H D'), D = W - W_hat, H = sum over tokens of w_t x_t x_t'
(stats.py). Column by column each weight is rounded after the error of the columns before it has been fed back into it
(GPTQ, arXiv 2210.17323, algorithm 1, in the order of falling diag(H); the same as LDLQ of QuIP, arXiv 2307.13304).
Coordinate descent then revisits every code with the others fixed and refits the scale of each group by least squares; no
step of it raises the error. It starts from whichever of LDLQ and rounding to nearest has less error in each row, so the
result is never worse than rounding to nearest.

Nested codes (MatGPTQ, arXiv 2602.03537, in spirit): a code is also read at fewer bits. With a weight mu for the lower
levels every code is chosen for the sum over levels of mu_L * error_L, each level with an error feedback of its own. LDL'
makes both sums separate over columns, so the greedy choice is the exact one per column.

numpy in float32: MLX's CPU wheels carry the reference BLAS, which is thirty times slower than numpy's.

Shapes: E experts (1 for a matrix of the trunk), N rows, K columns, G group size, L levels. Inside, arrays are [E, K, N].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxmoe.formats import LEVELS, num_planes

DAMPING = 0.02  # share of the mean of diag(H) added to it: 1 to 2.5 % is usual
SWEEPS = 3  # of coordinate descent: each gains less than the one before
_BLOCK = 32  # columns whose feedback is applied one by one before the rest gets theirs in one product
_REACH = 2  # codes tried on both sides of the nearest one when lower levels count


class Curvature(NamedTuple):
    """What the rounding needs to know of the inputs of E matrices.

    hessian [E, K, K] damped, order [E, K] of the columns by falling diagonal, factor [E, K, K] upper triangular with
    inverse(hessian in that order) = factor' factor.
    """

    hessian: np.ndarray
    order: np.ndarray
    factor: np.ndarray


class Code(NamedTuple):
    """The reading of a code of `bits` at the full level and at `lower` levels: value = scale * table[q] + bias.

    tables [1 + len(lower), 2^bits]: the full level first. weights: what the squared error of each level counts.
    fitted_bias: affine codes, whose bias is fitted as well; symmetric ones have none.
    """

    bits: int
    tables: np.ndarray
    weights: tuple[float, ...]
    fitted_bias: bool


class Coded(NamedTuple):
    """codes uint8 [E, N, K], scales and biases float32 [E, N, K/G] (exact in float16), gains [E, lower levels]."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    gains: np.ndarray


def symmetric_code(bits: int, mu: float = 0.0) -> Code:
    """Mid-rise codes of formats.py with all levels below; with mu > 0 the lower levels' errors count mu in all."""
    lower = LEVELS[: num_planes(bits) - 1]
    q = np.arange(1 << bits)
    tables = [q - ((1 << bits) - 1) / 2]
    tables += [2.0 ** (bits - low) * ((q >> (bits - low)) - ((1 << low) - 1) / 2) for low in lower]
    weights = (1.0, *(mu / len(lower) for _ in lower))
    return Code(bits, np.array(tables, np.float32), weights, fitted_bias=False)


def affine_code(bits: int) -> Code:
    """MLX's affine codes."""
    return Code(bits, np.arange(1 << bits, dtype=np.float32)[None], (1.0,), fitted_bias=True)


def curvature(hessian: np.ndarray, damping: float = DAMPING) -> Curvature:
    """hessian [E, K, K], symmetric and not negative -> what `quantize` needs. A zero hessian counts as the identity."""
    experts, columns, _ = hessian.shape
    damped = hessian.astype(np.float64)
    index = np.arange(columns)
    mean = damped[:, index, index].mean(axis=1, keepdims=True)
    mean[mean <= 0] = 1.0
    damped[:, index, index] += damping * mean
    order = np.argsort(-damped[:, index, index], axis=1, kind="stable")
    factor = np.empty((experts, columns, columns), np.float32)
    for e in range(experts):
        inverse = np.linalg.inv(damped[e][np.ix_(order[e], order[e])])
        factor[e] = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return Curvature(damped.astype(np.float32), order, factor)


def output_errors(difference: np.ndarray, hessian: np.ndarray, row_weights: np.ndarray) -> np.ndarray:
    """float64 [E]: sum over rows of row_weights [E, N] * d H d' for difference [E, N, K] and hessian [E, K, K]."""
    per_row = np.einsum("enk,enk->en", difference @ hessian, difference)
    return (per_row * row_weights).sum(axis=1, dtype=np.float64)


def decoded(coded: Coded, code: Code, level: int = 0) -> np.ndarray:
    """float32 [E, N, K]: the values at the full level (0) or the lower one of that index plus 1, its gain included."""
    experts, rows, columns = coded.codes.shape
    groups = coded.scales.shape[2]
    values = code.tables[level][coded.codes].reshape(experts, rows, groups, columns // groups)
    values = values * coded.scales[..., None] + coded.biases[..., None]
    if level:
        values *= coded.gains[:, level - 1, None, None, None]
    return values.reshape(coded.codes.shape)


def quantize(
    weight: np.ndarray, curved: Curvature, scales: np.ndarray, biases: np.ndarray, code: Code, sweeps: int = SWEEPS
) -> Coded:
    """weight [E, N, K] from starting scales and biases [E, N, K/G] -> codes, scales and gains of less error."""
    worker = _Worker(weight, curved, scales, biases, code)
    worker.keep_better(worker.nearest(), worker.feedback())
    for _ in range(sweeps):
        worker.sweep()
    return worker.coded()


class _Worker:
    """The state of one call of `quantize`: everything transposed to [E, K, N], so that a column is contiguous."""

    def __init__(self, weight: np.ndarray, curved: Curvature, scales: np.ndarray, biases: np.ndarray, code: Code):
        self._weight = np.ascontiguousarray(weight.swapaxes(1, 2))
        self._curved, self._code = curved, code
        self._scales = np.ascontiguousarray(scales.swapaxes(1, 2).astype(np.float32))  # [E, K/G, N]
        self._biases = np.ascontiguousarray(biases.swapaxes(1, 2).astype(np.float32))
        self._group_size = weight.shape[2] // scales.shape[2]
        self._codes = np.zeros(self._weight.shape, np.uint8)
        # Lower levels take part only if their errors count; their gains are fitted at the end in any case.
        self._levels = [i for i, w in enumerate(code.weights) if w > 0]
        self._gains = np.ones((weight.shape[0], len(code.tables)), np.float32)

    def nearest(self) -> np.ndarray:
        """Codes rounded to nearest; also fits the gains of the lower levels to them."""
        codes = np.empty_like(self._codes)
        for group, columns in self._groups():
            target = self._weight[:, columns]
            codes[:, columns] = self._rounded(target, self._scales[:, group, None], self._biases[:, group, None])
        if len(self._levels) > 1:
            self._fit_gains(codes)
        return codes

    def feedback(self) -> np.ndarray:
        """LDLQ: codes column by column in the order of falling diag(H), one running target per level."""
        order, factor = self._curved.order, self._curved.factor
        experts, columns, rows = self._weight.shape
        targets = np.repeat(np.take_along_axis(self._weight, order[:, :, None], 1)[None], len(self._levels), 0)
        groups = (order // self._group_size)[:, :, None]
        scales, biases = (np.take_along_axis(a, groups, 1) for a in (self._scales, self._biases))
        codes = np.empty((experts, columns, rows), np.uint8)
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            errors = np.empty((len(self._levels), experts, stop - start, rows), np.float32)
            for j in range(start, stop):
                q = self._choose(targets[:, :, j], scales[:, j], biases[:, j])
                codes[:, j] = q
                for i, level in enumerate(self._levels):
                    value = self._read(q, level, scales[:, j], biases[:, j])
                    errors[i, :, j - start] = (targets[i, :, j] - value) / factor[:, j, j, None]
                if j + 1 < stop:
                    step = factor[:, j, j + 1 : stop, None]
                    targets[:, :, j + 1 : stop] -= step * errors[:, :, j - start, None]
            if stop < columns:
                targets[:, :, stop:] -= factor[:, start:stop, stop:].swapaxes(1, 2) @ errors
        result = np.empty_like(codes)
        np.put_along_axis(result, np.broadcast_to(order[:, :, None], codes.shape), codes, 1)
        return result

    def keep_better(self, first: np.ndarray, second: np.ndarray) -> None:
        """Starts from the codes of less error, row by row."""
        better = self._row_errors(second) <= self._row_errors(first)
        self._codes = np.where(better[:, None], second, first)

    def sweep(self, refit: bool = True) -> None:
        """One pass of coordinate descent over all groups: their codes, then (`refit`) their scale and bias."""
        hessian = self._curved.hessian
        errors = self._errors(self._codes)
        for group, columns in self._groups():
            within = hessian[:, columns, columns]
            slopes = hessian[:, columns] @ errors  # [levels, E, G, N]
            scale, bias = self._scales[:, group], self._biases[:, group]
            for j in range(self._group_size):
                column = columns.start + j
                curve = hessian[:, column, column, None]
                value = self._weight[:, column] - (errors[:, :, column] - slopes[:, :, j] / curve)
                q = self._choose(value, scale, bias)
                self._codes[:, column] = q
                for i, level in enumerate(self._levels):
                    fresh = self._weight[:, column] - self._read(q, level, scale, bias)
                    slopes[i] += within[:, :, j, None] * (fresh - errors[i, :, column])[:, None]
                    errors[i, :, column] = fresh
            if refit:
                self._refit(group, columns, errors, slopes)
        if len(self._levels) > 1:
            self._fit_gains(self._codes)

    def coded(self) -> Coded:
        if len(self._code.tables) > 1:
            self._fit_gains(self._codes)
        codes, scales, biases = (
            np.ascontiguousarray(a.swapaxes(1, 2)) for a in (self._codes, self._scales, self._biases)
        )
        return Coded(codes, scales, biases, self._gains[:, 1:])

    # -- one column ----------------------------------------------------------------------------------------------------

    def _choose(self, targets: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """uint8 codes [E, N] of the least weighted squared distance to the targets [levels, E, N]."""
        nearest = self._rounded(targets[0], scale, bias)
        if len(self._levels) == 1:
            return nearest
        best, least = nearest, np.full(nearest.shape, np.inf, np.float32)
        for step in range(-_REACH, _REACH + 1):
            q = np.clip(nearest.astype(np.int16) + step, 0, (1 << self._code.bits) - 1).astype(np.uint8)
            cost = np.zeros(q.shape, np.float32)
            for target, level in zip(targets, self._levels, strict=True):
                cost += self._code.weights[level] * np.square(target - self._read(q, level, scale, bias))
            better = cost < least
            best, least = np.where(better, q, best), np.where(better, cost, least)
        return best

    def _rounded(self, target: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        q = np.rint((target - bias) * inverse - self._code.tables[0, 0])
        return np.clip(q, 0, (1 << self._code.bits) - 1).astype(np.uint8)

    def _read(self, q: np.ndarray, level: int, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        value = self._code.tables[level][q] * scale + bias
        if level:
            value *= self._gains[:, level].reshape(-1, *[1] * (q.ndim - 1))
        return value

    # -- whole matrices ------------------------------------------------------------------------------------------------

    def _groups(self) -> list[tuple[int, slice]]:
        size = self._group_size
        return [(g, slice(g * size, (g + 1) * size)) for g in range(self._scales.shape[1])]

    def _values(self, codes: np.ndarray, level: int) -> np.ndarray:
        size = self._group_size
        return self._read(codes, level, np.repeat(self._scales, size, 1), np.repeat(self._biases, size, 1))

    def _errors(self, codes: np.ndarray) -> np.ndarray:
        """[levels, E, K, N]: what is left of the weight at each level."""
        return np.stack([self._weight - self._values(codes, level) for level in self._levels])

    def _row_errors(self, codes: np.ndarray) -> np.ndarray:
        """[E, N]: weighted error of each row."""
        total = np.zeros((self._weight.shape[0], self._weight.shape[2]), np.float32)
        for error, level in zip(self._errors(codes), self._levels, strict=True):
            total += self._code.weights[level] * np.einsum("ekn,ekn->en", self._curved.hessian @ error, error)
        return total

    def _refit(self, group: int, columns: slice, errors: np.ndarray, slopes: np.ndarray) -> None:
        """Least squares for the scale (and bias) of a group; kept, row by row, where the stored float16 is better.

        With Z the group's tables (and ones), the change d of (scale, bias) minimises sum over levels of
        mu (e - Z d)' H (e - Z d): d = (Z' H Z)^-1 Z' H e. Updates `errors` in place.
        """
        within = self._curved.hessian[:, columns, columns]
        parts = [self._level_basis(self._codes[:, columns], level) for level in self._levels]  # of [B, E, G, N]
        count = len(parts[0])
        normal = np.zeros((*self._scales[:, group].shape, count, count))
        right = np.zeros((*self._scales[:, group].shape, count))
        for i, level in enumerate(self._levels):
            mu = self._code.weights[level]
            curved = within @ parts[i]
            normal += mu * np.einsum("aegn,begn->enab", curved, parts[i])
            right += mu * np.einsum("aegn,egn->ena", parts[i], slopes[i])
        size = np.trace(normal, axis1=2, axis2=3)[..., None, None]
        change = np.linalg.solve(normal + (1e-7 * size + 1e-30) * np.eye(count), right[..., None])[..., 0]
        before = [self._scales[:, group], self._biases[:, group]][:count]
        after = [(b + change[..., i]).astype(np.float16).astype(np.float32) for i, b in enumerate(before)]
        change = np.stack([a.astype(np.float64) - b for a, b in zip(after, before, strict=True)], axis=-1)
        gained = 2 * (change * right).sum(-1) - np.einsum("ena,enab,enb->en", change, normal, change)
        keep = (gained > 0) & (after[0] > 0) & np.isfinite(after).all(axis=0)
        change *= keep[..., None]
        for stored, new in zip((self._scales, self._biases), after, strict=False):
            stored[:, group] = np.where(keep, new, stored[:, group])
        for i in range(len(self._levels)):
            for basis, step in zip(parts[i], np.moveaxis(change, -1, 0).astype(np.float32), strict=True):
                errors[i, :, columns] -= basis * step[:, None]

    def _level_basis(self, codes: np.ndarray, level: int) -> np.ndarray:
        """[B, E, G, N]: what one unit of scale, and of bias if it is fitted, adds to the values of a level."""
        table = self._code.tables[level][codes]
        if level:
            table = table * self._gains[:, level, None, None]
        return np.stack([table, np.ones_like(table)]) if self._code.fitted_bias else table[None]

    def _fit_gains(self, codes: np.ndarray) -> None:
        """The factor of each lower level that makes its error least: <v, W>_H / <v, v>_H."""
        self._gains[:] = 1.0
        for level in range(1, len(self._code.tables)):
            value = self._values(codes, level)
            curved = self._curved.hessian @ value
            across = np.einsum("ekn,ekn->e", curved, self._weight, dtype=np.float64)
            square = np.einsum("ekn,ekn->e", curved, value, dtype=np.float64)
            fit = np.divide(across, square, out=np.ones_like(across), where=square > 0)
            self._gains[:, level] = np.where(fit > 0, fit, 1.0)
