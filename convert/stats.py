"""Statistics of a layer: for every matrix the second moments of its inputs, weighted by what its outputs are worth.

For a small change E of a matrix W the KL divergence of the model's predictions grows by

    loss(E) = 1/2 * 1/T * sum over tokens t and rows r of  g_tr^2 (e_r . x_t)^2

(the Fisher information with its diagonal over tokens and rows), g the gradient of the log-probability of a token drawn by
the model at the matrix's outputs. Splitting g_tr^2 into a row part and a token part, as in K-FAC and GuidedQuant
(arXiv 2505.07004), gives what the quantizer and the allocation use:

    loss(E) = 1/2 * sum over r of rho_r * e_r H e_r',   rho_r = 1/T sum_t g_tr^2,
    H = sum_t w_t x_t x_t' / sum_t w_t,   w_t = mean over r of g_tr^2

The gradient at an expert's output carries the square of its gate weight, so H is gate-weighted (MoEQuant,
arXiv 2505.03804, eq. 5, has the gate weight itself). Experts that few tokens reach borrow from their layer.

Shapes: T tokens, E experts (1 for a matrix of the trunk), N rows, K columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxmoe.convert.stream import Record
from mlxmoe.errors import UserError

BORROWED_TOKENS = 256  # an expert's own moments count like its tokens, its layer's like this many
MOST_INPUTS = 4096  # that are kept of one module, where any are
EVEN_SHARE = 2.0  # of the mean weight, added to every token's: the gradients of single draws are noisy


class Moments(NamedTuple):
    """Of one module: hessian float32 [E, K, K] and row_weights float64 [E, N] (rho); tokens int64 [E] that each expert saw.
    outputs: loss of a relative squared error of 1 that is spread evenly (for what has no matrix of its own inputs).
    inputs float32 [S, K]: some of them, where asked for."""

    hessian: np.ndarray
    row_weights: np.ndarray
    tokens: np.ndarray
    outputs: float
    inputs: np.ndarray | None = None


def without_inputs(outputs: float, num_experts: int = 1) -> Moments:
    """Of a module that has no matrix of its inputs, or saw none."""
    nothing = np.zeros((0, 0, 0), np.float32), np.zeros((0, 0)), np.zeros(num_experts, np.int64)
    return Moments(*nothing, outputs)


def unseen_directions(moments: Moments, tokens: int) -> int:
    """Directions of the inputs that a text of so many tokens has nothing to say about: columns beyond their number, or
    always zero. The second moments are singular in them: only the damping of gptq.py gives an error there a cost. One
    number for all experts, since each has its layer's moments mixed in."""
    if not len(moments.hessian):
        return 0
    columns = moments.hessian.shape[-1]
    zero = (np.diagonal(moments.hessian, axis1=1, axis2=2) <= 0).all(axis=0).sum()
    return max(int(zero), columns - min(tokens, int(moments.tokens.sum())))


class Accumulator:
    """Sums records of one module over batches. `num_experts` 0: a matrix of the trunk. `sample`: inputs to keep of each."""

    def __init__(self, path: str, num_experts: int = 0, dense: bool = True, sample: int = 0):
        self._path, self._experts, self._dense, self._sample = path, num_experts, dense, sample
        self._inputs: list[np.ndarray] = []
        self._moments: np.ndarray | None = None  # [E, K, K]
        self._even: np.ndarray | None = None
        self._weights = np.zeros(max(1, num_experts))
        self._counts = np.zeros(max(1, num_experts), np.int64)
        self._rows: np.ndarray | None = None
        self._outputs, self._total = 0.0, 0

    def add(self, record: Record, tokens: int) -> None:
        """One batch of `tokens` tokens."""
        self._total += tokens
        squares = np.square(record.gradients)
        self._outputs += float((squares.mean(axis=1) * np.square(record.outputs).sum(axis=1)).sum(dtype=np.float64))
        if self._sample and len(self._inputs) * self._sample < MOST_INPUTS:
            self._inputs.append(record.inputs[:: max(1, len(record.inputs) // self._sample)][: self._sample])
        if not self._dense:
            return
        if record.experts is None:
            self._add(0, record.inputs, squares)
            return
        order = np.argsort(record.experts, kind="stable")
        bounds = np.searchsorted(record.experts[order], np.arange(self._experts + 1))
        for e in range(self._experts):
            chosen = order[bounds[e] : bounds[e + 1]]
            if len(chosen):
                self._add(e, record.inputs[chosen], squares[chosen])

    def _add(self, e: int, inputs: np.ndarray, squares: np.ndarray) -> None:
        if self._moments is None or self._rows is None or self._even is None:
            experts, columns = max(1, self._experts), inputs.shape[1]
            self._moments = np.zeros((experts, columns, columns), np.float32)
            self._even = np.zeros_like(self._moments)
            self._rows = np.zeros((experts, squares.shape[1]))
        weights = squares.mean(axis=1)
        self._moments[e] += (inputs * weights[:, None]).T @ inputs
        self._even[e] += inputs.T @ inputs
        self._weights[e] += weights.sum(dtype=np.float64)
        self._counts[e] += len(inputs)
        self._rows[e] += squares.sum(axis=0, dtype=np.float64)

    def moments(self) -> Moments:
        """The sums so far. Raises UserError where they are not finite."""
        total = max(1, self._total)
        if self._moments is None or self._rows is None or self._even is None:
            return without_inputs(self._outputs / total / 2, len(self._counts))
        if not (np.isfinite(self._moments).all() and np.isfinite(self._rows).all() and np.isfinite(self._outputs)):
            raise UserError(
                f"the statistics of {self._path} are not finite",
                "the checkpoint or its configuration is damaged; mlxmoe convert --method rtn needs no statistics",
            )
        counts = self._counts.astype(np.float64)
        # every token's weight and the even share; both parts as means over the expert's tokens
        mean_weight = self._weights.sum() / max(1.0, counts.sum())
        moments = self._moments + self._even * np.float32(EVEN_SHARE * mean_weight)
        weights = self._weights + EVEN_SHARE * mean_weight * counts
        layer = moments.sum(axis=0, dtype=np.float64) / max(weights.sum(), 1e-300)
        own = np.divide(counts, np.maximum(weights, 1e-300))[:, None, None] * moments
        hessian = (own + BORROWED_TOKENS * layer) / (counts + BORROWED_TOKENS)[:, None, None]
        rows = self._rows / total
        rows = rows + 0.01 * rows.mean(axis=0)  # so that what was never routed to is not worth nothing
        inputs = np.concatenate(self._inputs) if self._inputs else None
        return Moments(hessian.astype(np.float32), rows, self._counts, self._outputs / total / 2, inputs)
