"""What calibration text says of a layer's experts without any gradient: how much they do, and what errors do to it.

The loss of stats.py is in nats and is what the allocation adds up. These are the scores that others rank experts by: error
of the expert's output, error of the weights, frequency, contribution (REAP), massive activations. sensitivity.py makes
losses of them; `mlxmoe bench sensitivity` says which of them is right.

Shapes: E experts, P projections, n sampled rows, D model dim, N rows and K columns of a matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxmoe.convert.calibrated import Seen
from mlxmoe.convert.measure import ExpertScores
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.watch import watched
from mlxmoe.models import ExpertSite

SAMPLE = 64  # inputs of every expert that errors of its output are measured on
HUGE = 10.0  # times the root mean square of the layer: a massive activation


class Observed(NamedTuple):
    """One layer's experts on text: a sample of their inputs [n, D] with the expert [n] and the gate weight [n] of each, and
    sums over all tokens: tokens [E], contribution [E] (gate * ||output||), massive values [E] before the last projection
    and values there in all."""

    inputs: np.ndarray
    experts: np.ndarray
    gates: np.ndarray
    tokens: np.ndarray
    contribution: np.ndarray
    massive: np.ndarray
    total_tokens: int


def observe(walk: Walk, i: int, kind: str, site: ExpertSite) -> Observed:
    """Runs a loaded layer over its hidden states of a kind and watches its experts (watch.py)."""
    samples: list[tuple[np.ndarray, ...]] = []
    sums = np.zeros((3, site.num_experts))
    with watched(walk.stream.layers[i], walk.stream.path(i), site) as watch:
        for rows in walk.batches():
            walk.stream.run(i, walk.batch(rows), walk.read(kind, i, rows))
            seen = watch.take()
            call = seen.routed
            inputs, hidden, outputs = (np.array(a.astype(mx.float32)) for a in (call.inputs, call.hidden, call.outputs))
            slots = (seen.chosen[call.tokens] == call.experts[:, None]).argmax(axis=1)
            gates = seen.weights[call.tokens, slots]
            norms = np.abs(gates) * np.linalg.norm(outputs, axis=1)
            huge = np.abs(hidden) > HUGE * np.sqrt(np.square(hidden).mean())
            for total, weights in zip(sums, (np.ones(len(gates)), norms, huge.mean(axis=1)), strict=True):
                total += np.bincount(call.experts, weights=weights, minlength=site.num_experts)
            key = np.random.default_rng(rows.start).random(len(gates))
            samples = [_fewer(*samples, (call.experts, key, gates, inputs))]
    experts, _, gates, inputs = samples[0]
    return Observed(inputs, experts, gates, sums[0].astype(np.int64), sums[1], sums[2], walk.num_tokens)


def _fewer(*parts: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Of (experts, key, ...) row by row: for every expert the SAMPLE rows of the smallest keys."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    experts = columns[0][order]
    rank = np.arange(len(order)) - np.searchsorted(experts, experts)
    return tuple(column[order[rank < SAMPLE]] for column in columns)


def _squares(stack: np.ndarray) -> np.ndarray:
    """float64 [E] of [E, N, K]."""
    return np.square(stack.reshape(len(stack), -1)).sum(axis=1, dtype=np.float64)


class Scoring:
    """Collects the scores of one loaded expert module while its matrices are measured level by level (calibrated.py)."""

    def __init__(self, module: nn.Module, observed: Observed, num_projections: int, num_levels: int):
        self._module: Any = module
        self._observed = observed
        num_experts = len(observed.tokens)
        self._output = np.zeros((num_projections, num_experts, num_levels))
        self._weight = np.zeros_like(self._output)
        self._norms = np.zeros(self._output.shape[:2])
        every = slice(0, num_experts)
        self._original = self._run(every)
        self._energy = self._per_expert(self._original, every)

    def seen(self, p: int, name: str, stack: np.ndarray) -> Seen:
        """For `measure_experts`: takes in projection p, called `name`, of weights float32 [E, N, K]."""
        linear = self._module[name]
        weight = linear["weight"]
        self._norms[p] = _squares(stack)

        def level(part: slice, j: int, values: np.ndarray) -> None:
            self._weight[p, part, j] = _squares(stack[part] - values)
            changed = mx.array(values).astype(weight.dtype)
            linear["weight"] = mx.concatenate([weight[: part.start], changed, weight[part.stop :]])
            try:
                difference = self._run(part) - self._original[self._rows(part)]
            finally:
                linear["weight"] = weight
            self._output[p, part, j] = self._per_expert(difference, part)

        return level

    def scores(self) -> ExpertScores:
        o = self._observed
        tokens = np.maximum(o.tokens, 1)
        return ExpertScores(
            self._output,
            self._energy,
            self._weight,
            self._norms,
            o.tokens / o.total_tokens,
            o.contribution / o.total_tokens,
            o.massive / tokens,
        )

    def _rows(self, part: slice) -> slice:
        """The sampled rows of a range of experts: they lie in the order of the experts."""
        return slice(*np.searchsorted(self._observed.experts, [part.start, part.stop]))

    def _run(self, part: slice) -> np.ndarray:
        """Outputs [rows, D] of experts on their sampled inputs."""
        rows = self._rows(part)
        x = mx.array(self._observed.inputs[rows])
        y = self._module(x, mx.array(self._observed.experts[rows].astype(np.uint32))[:, None])
        return np.array(y.astype(mx.float32))[:, 0]

    def _per_expert(self, outputs: np.ndarray, part: slice) -> np.ndarray:
        """Mean over all tokens of the text of gate^2 ||output||^2 for rows of `part`, each standing for its share."""
        o, rows = self._observed, self._rows(part)
        experts = o.experts[rows] - part.start
        count = part.stop - part.start
        squares = np.square(o.gates[rows].astype(np.float64)) * np.square(outputs).sum(axis=1, dtype=np.float64)
        sampled = np.maximum(np.bincount(experts, minlength=count), 1)
        return np.bincount(experts, weights=squares, minlength=count) / sampled * (o.tokens[part] / o.total_tokens)
