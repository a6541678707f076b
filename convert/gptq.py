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

Written once against what numpy and mlx.core have in common, in float32 (a GPU has no float64; the inverses of `curvature`
need it and stay on the CPU). On a GPU it is MLX. Elsewhere numpy: MLX's CPU wheels carry the reference BLAS, which is thirty
times slower than numpy's.

Shapes: E experts (1 for a matrix of the trunk), N rows, K columns, G group size, L levels. Inside, arrays are [E, K, N].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.formats import LEVELS, num_planes

DAMPING = 0.02  # share of the mean of diag(H) added to it: 1 to 2.5 % is usual
SWEEPS = 6  # of coordinate descent: each gains less than the one before
_BLOCK = 32  # columns whose feedback is applied one by one before the rest gets theirs in one product
_TINY = 1e-30  # in float32, and not flushed to zero
_REACH = 2  # codes tried on both sides of the nearest one when lower levels count

Array = Any  # of the library that the codes are computed with
Library = Any  # numpy or mlx.core


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
    """codes [E, N, K] (uint8, above 8 bits uint16), scales and biases float32 [E, N, K/G] (exact in float16), gains
    [E, lower levels]."""

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


def array_library() -> Library:
    """Which library `quantize` computes with: mlx.core where MLX's default device is a GPU, else numpy."""
    return np if mx.default_device() == mx.Device(mx.cpu) else mx


def quantize(
    weight: np.ndarray,
    curved: Curvature,
    scales: np.ndarray,
    biases: np.ndarray,
    code: Code,
    sweeps: int = SWEEPS,
    library: Library = None,
) -> Coded:
    """weight [E, N, K] from starting scales and biases [E, N, K/G] -> codes, scales and gains of less error.

    `library`: numpy or mlx.core; None is what `array_library` says."""
    worker = _Worker(weight, curved, scales, biases, code, library or array_library())
    worker.keep_better(worker.nearest(), worker.feedback())
    for _ in range(sweeps):
        worker.sweep()
    return worker.coded()


class _Worker:
    """The state of one call of `quantize`: everything transposed to [E, K, N], so that a column is contiguous."""

    def __init__(
        self,
        weight: np.ndarray,
        curved: Curvature,
        scales: np.ndarray,
        biases: np.ndarray,
        code: Code,
        library: Library = np,
    ):
        self._xp, self._code = library, code
        self._weight = self._taken(weight.swapaxes(1, 2))
        self._hessian, self._order, self._factor = (self._taken(a) for a in curved)
        # [E, K/G, N], copies: they are refitted in place
        self._scales, self._biases = (self._taken(a.swapaxes(1, 2).astype(np.float32)) for a in (scales, biases))
        self._group_size = weight.shape[2] // scales.shape[2]
        self._codes = self._xp.zeros(self._weight.shape, dtype=self._xp.uint8)
        # Lower levels take part only if their errors count; their gains are fitted at the end in any case.
        self._levels = [i for i, w in enumerate(code.weights) if w > 0]
        self._tables = [self._taken(table) for table in code.tables]
        self._gains = [self._xp.ones((len(weight), 1), dtype=self._xp.float32) for _ in code.tables]

    def nearest(self) -> Array:
        """Codes rounded to nearest; also fits the gains of the lower levels to them."""
        codes = [
            self._rounded(self._weight[:, columns], self._scales[:, group, None], self._biases[:, group, None])
            for group, columns in self._groups()
        ]
        whole = self._xp.concatenate(codes, axis=1)
        if len(self._levels) > 1:
            self._fit_gains(whole)
        return whole

    def feedback(self) -> Array:
        """LDLQ: codes column by column in the order of falling diag(H), one running target per level."""
        xp, order, factor = self._xp, self._order, self._factor
        columns = self._weight.shape[1]
        groups = (order // self._group_size)[:, :, None]
        scales, biases = (xp.take_along_axis(a, groups, 1) for a in (self._scales, self._biases))
        targets = xp.stack([xp.take_along_axis(self._weight, order[:, :, None], 1)] * len(self._levels))
        codes: list[Array] = []
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            block, errors = targets[:, :, : stop - start], []
            for i, j in enumerate(range(start, stop)):
                codes.append(self._choose(block[:, :, i], scales[:, j], biases[:, j]))
                value = self._read(codes[-1], scales[:, j], biases[:, j])
                errors.append((block[:, :, i] - value) / factor[:, j, j, None])
                if j + 1 < stop:
                    block[:, :, i + 1 :] -= factor[:, j, j + 1 : stop, None] * errors[-1][:, :, None]
            if stop < columns:
                fed = factor[:, start:stop, stop:].swapaxes(1, 2) @ xp.stack(errors, axis=2)
                targets = targets[:, :, stop - start :] - fed
            self._run(targets, *codes[start:])
        return xp.take_along_axis(xp.stack(codes, axis=1), xp.argsort(order, axis=1)[:, :, None], 1)

    def keep_better(self, first: Array, second: Array) -> None:
        """Starts from the codes of less error, row by row."""
        better = self._row_errors(second) <= self._row_errors(first)
        self._codes = self._xp.where(better[:, None], second, first)
        self._run(self._codes)

    def sweep(self, refit: bool = True) -> None:
        """One pass of coordinate descent over all groups: their codes, then (`refit`) their scale and bias."""
        errors = self._errors(self._codes)
        for group, columns in self._groups():
            slopes = self._hessian[:, columns] @ errors  # [L, E, G, N]
            codes, steps = self._descend(group, columns, errors[:, :, columns], slopes)
            self._codes[:, columns] = codes
            errors[:, :, columns] += steps
            if refit:
                slopes = slopes + self._hessian[:, columns, columns] @ steps
                errors[:, :, columns] -= self._refit(group, columns, slopes)
            self._run(self._codes, errors, self._scales, self._biases)
        if len(self._levels) > 1:
            self._fit_gains(self._codes)

    def coded(self) -> Coded:
        self._fit_gains(self._codes)
        codes, scales, biases = (
            np.ascontiguousarray(np.asarray(a).swapaxes(1, 2)) for a in (self._codes, self._scales, self._biases)
        )
        return Coded(codes, scales, biases, np.concatenate([np.asarray(a) for a in self._gains], axis=1)[:, 1:])

    # -- one column or group -------------------------------------------------------------------------------------------

    def _descend(self, group: int, columns: slice, errors: Array, slopes: Array) -> tuple[Array, Array]:
        """Every column of a group with the others fixed: its new codes [E, G, N], and how far that moves its errors
        [L, E, G, N], whose slopes H e are given."""
        xp, weight = self._xp, self._weight[:, columns]
        within = self._hessian[:, columns, columns]
        scale, bias = self._scales[:, group], self._biases[:, group]
        codes: list[Array] = []
        steps: list[Array] = []
        for start in range(0, self._group_size, _BLOCK):
            stop = min(start + _BLOCK, self._group_size)
            block = xp.array(slopes[:, :, start:stop])
            if start:
                block += within[:, start:stop, :start] @ xp.stack(steps, axis=2)
            for i, j in enumerate(range(start, stop)):
                best = errors[:, :, j] - block[:, :, i] / within[:, j, j, None]
                codes.append(self._choose(weight[:, j] - best, scale, bias))
                steps.append(weight[:, j] - self._read(codes[-1], scale, bias) - errors[:, :, j])
                if j + 1 < stop:
                    block[:, :, i + 1 :] += within[:, j, j + 1 : stop, None] * steps[-1][:, :, None]
        return xp.stack(codes, axis=1), xp.stack(steps, axis=2)

    def _refit(self, group: int, columns: slice, slopes: Array) -> Array:
        """Least squares for the scale (and bias) of a group; kept, row by row, where the stored float16 is better.

        With z the group's table values the change d of the scale minimises the sum over levels of mu (e - d z)' H (e - d z):
        d = z' H e / z' H z, where `slopes` are H e. A fitted bias adds a column of ones; z less its projection on that is
        orthogonal to it in H, so both are divisions. Returns how far the values [L, E, G, N] move.
        """
        xp, mu = self._xp, [self._code.weights[level] for level in self._levels]
        within, scale, bias = self._hessian[:, columns, columns], self._scales[:, group], self._biases[:, group]
        basis = xp.stack([self._table(self._codes[:, columns], level) for level in self._levels])
        centre, shift, ones = 0.0, 0.0, 0.0
        if self._code.fitted_bias:
            curved = within.sum(2)[:, :, None]  # H 1
            ones = curved.sum(1)
            centre = (basis[0] * curved).sum(1) / ones
            basis, shift = basis - centre[:, None], slopes[0].sum(1) / ones

        def product(other: Array) -> Array:  # [E, N]
            return sum(m * (a * b).sum(1) for m, a, b in zip(mu, basis, other, strict=True))

        square, slope = product(within @ basis), product(slopes)
        scaled = self._stored(scale + slope / (square + _TINY))
        biased = self._stored(bias + shift - centre * (scaled - scale)) if self._code.fitted_bias else bias
        turn = scaled - scale
        move = biased - bias + centre * turn
        gained = turn * (2 * slope - turn * square) + move * ones * (2 * shift - move)
        keep = (gained > 0) & (scaled > 0) & xp.isfinite(scaled) & xp.isfinite(biased)
        self._scales[:, group], self._biases[:, group] = xp.where(keep, scaled, scale), xp.where(keep, biased, bias)
        return basis * xp.where(keep, turn, 0)[:, None] + xp.where(keep, move, 0)[:, None]

    def _choose(self, targets: Array, scale: Array, bias: Array) -> Array:
        """uint8 codes [E, N] of the least weighted squared distance to the targets [L, E, N]."""
        nearest = self._rounded(targets[0], scale, bias)
        if len(self._levels) == 1:
            return nearest
        xp = self._xp
        best, least = nearest, xp.full(nearest.shape, np.inf, dtype=xp.float32)
        for step in range(-_REACH, _REACH + 1):
            q = xp.clip(nearest.astype(xp.int16) + step, 0, (1 << self._code.bits) - 1).astype(xp.uint8)
            squares = xp.square(targets - self._read(q, scale, bias))
            cost = sum(self._code.weights[level] * square for level, square in zip(self._levels, squares, strict=True))
            better = cost < least
            best, least = xp.where(better, q, best), xp.where(better, cost, least)
        return best

    def _rounded(self, target: Array, scale: Array, bias: Array) -> Array:
        xp = self._xp
        inverse = xp.where(scale > 0, 1 / xp.maximum(scale, _TINY), 0)
        q = xp.round((target - bias) * inverse - self._tables[0][0])
        return xp.clip(q, 0, (1 << self._code.bits) - 1).astype(xp.uint8)

    def _table(self, q: Array, level: int) -> Array:
        """What a unit of scale adds to the values of codes [E, ...] at a level."""
        values = self._xp.take(self._tables[level], q)
        return values * self._gains[level].reshape(-1, *[1] * (q.ndim - 1)) if level else values

    def _read(self, q: Array, scale: Array, bias: Array) -> Array:
        """Values [L, *q.shape]. Only codes without lower levels have a bias, which a gain would scale as well."""
        return self._xp.stack([self._table(q, level) * scale + bias for level in self._levels])

    # -- whole matrices ------------------------------------------------------------------------------------------------

    def _groups(self) -> list[tuple[int, slice]]:
        size = self._group_size
        return [(g, slice(g * size, (g + 1) * size)) for g in range(self._scales.shape[1])]

    def _errors(self, codes: Array) -> Array:
        """[L, E, K, N]: what is left of the weight at each level."""
        scales, biases = (self._xp.repeat(a, self._group_size, 1) for a in (self._scales, self._biases))
        return self._weight - self._read(codes, scales, biases)

    def _row_errors(self, codes: Array) -> Array:
        """[E, N]: weighted error of each row."""
        errors = self._errors(codes)
        return sum(
            self._code.weights[level] * ((self._hessian @ error) * error).sum(1)
            for level, error in zip(self._levels, errors, strict=True)
        )

    def _fit_gains(self, codes: Array) -> None:
        """The factor of each lower level that makes its error least: <v, W>_H / <v, v>_H."""
        xp = self._xp
        scales = xp.repeat(self._scales, self._group_size, 1)
        for level in range(1, len(self._tables)):
            value = xp.take(self._tables[level], codes) * scales
            curved = self._hessian @ value
            # over columns first: one long sum in float32 would lose digits
            across, square = ((curved * a).sum(1).sum(1)[:, None] for a in (self._weight, value))
            fit = across / (square + _TINY)
            self._gains[level] = xp.where((square > 0) & (fit > 0), fit, 1)
        self._run(*self._gains)

    # -- the library ---------------------------------------------------------------------------------------------------

    def _taken(self, array: np.ndarray) -> Array:
        contiguous = np.ascontiguousarray(array)
        return contiguous if self._xp is np else self._xp.array(contiguous)

    def _stored(self, array: Array) -> Array:
        """Rounded to the float16 that a file holds."""
        return array.astype(self._xp.float16).astype(self._xp.float32)

    def _run(self, *arrays: Array) -> None:
        """MLX is lazy: evaluating block by block keeps its graphs, and what they hold in memory, small."""
        if self._xp is not np:
            self._xp.eval(*arrays)
