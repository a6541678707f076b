"""How the output of an expert comes from those of its copies: by fixed weights, or by the input.

Owns what the chapter on MoE models calls the combination of replicated experts (7.2.4), as far as it happens while a model
runs: the sum of the copies' outputs, and the rule that chooses one of them. What the numbers are is found by
convert/replicas.py and convert/ensemble.py.

Shapes: C copies, E experts, D model dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxmoe.rotation import NO_TURNS, LayerTurns

SMALLEST = 1e-30  # added to a norm, whose logarithm is then finite
SPREAD = 0.5  # share of the usual norm by which an input may differ from it


@dataclass(frozen=True)
class Selector:
    """Chooses one copy by the input x of its expert: that of the least slope * log |x| + intercept, float32 [C, E], which
    stand for the logarithm of its squared error.

    usual: float32 [E], logarithms of the norm that inputs have. Where |x| differs from it by SPREAD or more of it, and
    wherever it is -inf, nothing is chosen. None: something is always.
    """

    slopes: mx.array
    intercepts: mx.array
    usual: mx.array | None = None

    def weights(self, fixed: Sequence[mx.array], experts: mx.array, log_norms: mx.array) -> list[mx.array]:
        """What each copy of experts [...] counts, for inputs of log_norms that fit [...]: 1 for the chosen one of those
        whose `fixed` weight [...] is above 0, the first of equal ones, 0 for others; `fixed` where nothing is chosen."""
        expected = [
            mx.where(weight > 0, slope[experts] * log_norms + intercept[experts], mx.inf)
            for weight, slope, intercept in zip(fixed, self.slopes, self.intercepts, strict=True)
        ]
        best = mx.argmin(mx.stack(expected), axis=0)
        chosen = [(best == c).astype(mx.float32) for c in range(len(fixed))]
        if self.usual is None:
            return chosen
        usual = self.usual[experts]
        near = (log_norms > usual + math.log(1 - SPREAD)) & (log_norms < usual + math.log(1 + SPREAD))
        return [mx.where(near, one, weight) for one, weight in zip(chosen, fixed, strict=True)]


@dataclass(frozen=True)
class Copies:
    """How the output of an expert comes from its matrices: what those of each copy expect of their inputs, and what its
    output counts, weights float32 [C, E] (None: there is one copy), unless a selector chooses."""

    turns: tuple[LayerTurns, ...] = (NO_TURNS,)
    weights: mx.array | None = None
    selector: Selector | None = None

    def log_norms(self, x: mx.array) -> mx.array | None:
        """Of x [..., D] what the selector goes by, float32 [...]; None where there is no selector."""
        if self.selector is None:
            return None
        return mx.log(mx.linalg.norm(x.astype(mx.float32), axis=-1) + SMALLEST)


ONE_COPY = Copies()


def combined(
    outputs: Sequence[mx.array], copies: Copies, experts: mx.array, log_norms: mx.array | None = None
) -> mx.array:
    """Outputs [..., D] of every copy of experts [...] -> their weighted sum, one copy after the other. log_norms: where
    there is a selector, of the experts' inputs, of a shape that fits [...]. Copies that no expert here has may be missing
    at the end of `outputs`."""
    if copies.weights is None:
        return outputs[0]
    count = len(outputs) if copies.selector is None else len(copies.weights)
    weights = [copies.weights[c][experts] for c in range(count)]
    if copies.selector is not None:
        assert log_norms is not None
        weights = copies.selector.weights(weights, experts, log_norms)
    parts = [y * weight[..., None].astype(y.dtype) for y, weight in zip(outputs, weights, strict=False)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
