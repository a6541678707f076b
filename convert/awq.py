"""AWQ (arXiv 2306.00978): columns that see large inputs scaled up, groups clipped, both by the error of the outputs, and
codes rounded to nearest.

    W x = (W diag(s)) (diag(s)^-1 x)        s_k = a_k^alpha / sqrt(max a^alpha * min a^alpha)

(section 3.2, equations 4 and 5; the normalisation is that of the authors' code, and so is the clip, quantize.py's
`output_clip_search`). A code with one scale a group errs alike in all columns of the group, so a column that is s times
larger when it is coded errs 1/s times as much. a_k is the root of the diagonal of H (stats.py), the root mean square of the
input weighted by what it is worth; AWQ has the mean of |x_k|. alpha is searched for every expert on a grid that starts at 0,
no scales, by tr(D H D') with the codes that will be written: on its own statistics no expert gets worse.

Where 1/s goes: into the rows of the projection before. The input of down is act(gate) * up, linear in up, so up gets rows
divided by s, exactly: a group of codes lies within a row, and only its scale changes. With fc1 and fc2 around relu^2, which
is of degree 2, fc1's rows are divided by sqrt(s). Any other activation between two matrices lets no factor through. Gate and
up stay unscaled: their input comes from the norm, which the router, the shared experts and every other expert read as well,
so it could carry one s for all of them at most, and the router's weights would have to change.

Shapes: E experts, N rows, K columns, G group size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxmoe.convert.gptq import Code, Coded, decoded, output_errors, symmetric_code
from mlxmoe.convert.quantize import encode, output_clip_search
from mlxmoe.convert.stats import Moments
from mlxmoe.errors import UserError
from mlxmoe.formats import NARROW_LEVELS
from mlxmoe.kernels import activation_of

ALPHAS = tuple(i / 10 for i in range(11))
_STACK_WEIGHTS = 1 << 23  # searched together
_LEAST = 1e-4  # of the largest a_k: s stays within what float16 scales can take
_DEGREES = {"swiglu": 1, "geglu": 1, "relu2": 2}  # of the last projection's input in the rows of the one before


class Scales(NamedTuple):
    """s float32 [E, K], the alpha [E] that gave it, and the error [E] of the outputs of the matrix coded behind it."""

    scales: np.ndarray
    alphas: np.ndarray
    errors: np.ndarray


class Projection(NamedTuple):
    """The matrices [E, N, K] of all experts and the statistics of their inputs and outputs."""

    stack: np.ndarray
    moments: Moments

    def some(self, experts: np.ndarray) -> Projection:
        hessian, rows = self.moments.hessian[experts], self.moments.row_weights[experts]
        return Projection(self.stack[experts], self.moments._replace(hessian=hessian, row_weights=rows))


class Balance(NamedTuple):
    """Scales [E, K] of the last projection's columns, taken back in the rows of the projection before, whose outputs enter
    with the power `exponent` (see `degree`): the experts compute what they did."""

    scales: np.ndarray
    exponent: int

    def applied(self, position: int, count: int, matrix: Projection) -> Projection:
        """The projection at a position among `count`."""
        if position == count - 1:
            return scaled_columns(matrix, self.scales)
        if position == count - 2:
            return divided_rows(matrix, self.scales ** np.float32(1 / self.exponent))
        return matrix


def search_scales(matrix: Projection, coded: Callable[[Projection], np.ndarray]) -> Scales:
    """The scales with the least error. coded: matrices and their statistics to the values that their codes stand for."""
    stack, (hessian, row_weights, *_) = matrix
    size = np.sqrt(np.maximum(np.diagonal(hessian, axis1=1, axis2=2), 0)).astype(np.float32)
    size = np.maximum(size, _LEAST * size.max(axis=1, keepdims=True))
    size[~size.any(axis=1)] = 1.0
    best = Scales(np.ones_like(size), np.zeros(len(stack)), np.full(len(stack), np.inf))
    for alpha in ALPHAS:
        scales = size ** np.float32(alpha)
        scales /= np.sqrt(scales.max(axis=1, keepdims=True) * scales.min(axis=1, keepdims=True))
        values = coded(scaled_columns(matrix, scales)) / scales[:, None]
        errors = output_errors(stack - values, hessian, row_weights)
        better = errors < best.errors
        best = Scales(
            np.where(better[:, None], scales, best.scales),
            np.where(better, alpha, best.alphas),
            np.where(better, errors, best.errors),
        )
    return best


def scaled_columns(matrix: Projection, scales: np.ndarray) -> Projection:
    """Columns times s [E, K], for inputs divided by s: second moments H_kl / (s_k s_l). The error of the outputs, and
    what it costs, are those of before."""
    hessian = matrix.moments.hessian / (scales[:, :, None] * scales[:, None, :])
    return Projection(matrix.stack * scales[:, None], matrix.moments._replace(hessian=hessian))


def divided_rows(matrix: Projection, divisors: np.ndarray) -> Projection:
    """Rows divided by [E, N]; what an error of a row costs grows with the square of its divisor."""
    rows = matrix.moments.row_weights * np.square(divisors, dtype=np.float64)
    return Projection(matrix.stack / divisors[:, :, None], matrix.moments._replace(row_weights=rows))


def degree(experts: Any) -> int:
    """The degree of the last projection's input in the rows of the one before, for an expert module of mlx-lm.

    Raises UserError for an activation that lets no factor through exactly, and for biases, which would have to follow.
    """
    activation = activation_of(experts.activation)
    found = None if activation is None else _DEGREES.get(activation.kind)
    if found is None or any("bias" in experts[name] for name in ("up_proj", "fc1") if name in experts):
        raise UserError(
            f"activation-aware scales cannot be folded into experts with {type(experts.activation).__name__}",
            "use --method gptq, which needs no scales",
        )
    return found


def rounded(weight: np.ndarray, hessian: np.ndarray, level: int, group_size: int) -> tuple[Coded, Code]:
    """weight [E, N, K] -> codes rounded to nearest on grids clipped by the error of the outputs; the gains of the levels
    below are fitted by least squares in the metric of hessian [E, K, K]."""
    coded, code = nearest(weight, output_clip_search(weight, hessian, level, group_size), level)
    return with_gains(weight, hessian, coded, code), code


def nearest(weight: np.ndarray, scales: np.ndarray, level: int) -> tuple[Coded, Code]:
    """weight [E, N, K] -> codes rounded to nearest at scales [E, N, K/G], all gains 1."""
    code, group_size = symmetric_code(level), weight.shape[2] // scales.shape[2]
    codes = encode(weight.reshape(-1, group_size), scales.reshape(-1), level).reshape(weight.shape)
    gains = np.ones((len(weight), len(code.tables) - 1), np.float32)
    return Coded(codes, scales, np.zeros_like(scales), gains), code


def with_gains(weight: np.ndarray, hessian: np.ndarray, coded: Coded, code: Code) -> Coded:
    """With the gains of the levels below the full one by least squares in the metric of hessian [E, K, K]; of those above
    8 bits they are 1 (quantize.truncation_fit)."""
    gains = np.ones_like(coded.gains)
    for i in range(min(coded.gains.shape[1], len(NARROW_LEVELS))):
        values = decoded(coded, code, i + 1)
        curved = values @ hessian
        square = np.einsum("enk,enk->e", curved, values, dtype=np.float64)
        fit = np.einsum("enk,enk->e", curved, weight, dtype=np.float64) / np.where(square > 0, square, 1.0)
        gains[:, i] = np.where(fit > 0, fit, 1.0)
    return coded._replace(gains=gains)


def find_balance(last: Projection, levels: Sequence[int], group_size: int, exponent: int) -> Balance:
    """The scales of the last projection of all experts, each searched at the level [E] that it will be written at; 1 above 8
    bits, where there is no error worth one."""
    scales = np.ones((len(last.stack), last.stack.shape[2]), np.float32)
    step = max(1, _STACK_WEIGHTS // last.stack[0].size)
    for level in sorted(set(levels) & set(NARROW_LEVELS)):
        chosen = np.flatnonzero(np.asarray(levels) == level)

        def values(matrix: Projection, level: int = level) -> np.ndarray:
            return decoded(*rounded(matrix.stack, matrix.moments.hessian, level, group_size))

        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            scales[part] = search_scales(last.some(part), values).scales
    return Balance(scales, exponent)
