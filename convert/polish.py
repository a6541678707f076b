"""Scales refined after the codes are written: the codes stay, every scale (and bias) moves until the outputs are nearest.

The codes of a matrix are chosen for the error of its own outputs (gptq.py). What a layer, or the model, gives out depends
on all of its matrices together, and on the errors of the layers before. With the codes fixed the scales are few (one for
64 to 128 weights) and what they change is smooth, so that gradient descent can take all of that into account:

    factors    one factor for every expert on the scales of its last projection, by least squares on the layer's outputs
    layer      all scales of a layer, the outputs of the original's layer as the target (layer-wise reconstruction)
    model      all scales of the model, for the KL divergence of the predictions (DWQ of mlx-lm is of this kind)

`layer` minimises 1/2 sum over tokens of w_t (y_t - y'_t)' M (y_t - y'_t), y the hidden states behind the original's layer,
y' those behind the coded one on the hidden states that the coded layers before give, M and w_t of `Metric`. Adam, steps of
a few windows, the rate falling to zero; scales are float16 in every forward pass, as they are stored. Windows held back
decide which epoch is kept, the start among them, so the loss on them never rises.

Of codes that are read at fewer bits as well (--nested) the loss is the sum over those readings (`View`): the scales are of
all of them, and each has its gain, which moves with them.

Shapes: E experts (1 for a matrix of the trunk), N rows, K columns, G group size, T tokens, D model dim, A active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.convert.changes import divergence
from mlxmoe.convert.quantize import Affine
from mlxmoe.convert.stream import Record
from mlxmoe.convert.walk import Walk
from mlxmoe.formats import FIELD_BITS, PLANE_WIDTHS, PackedMatrix, join_planes, unpack_codes
from mlxmoe.rotation import IDENTITY, Rotation, rotate, unrotate

EPOCHS = 3
RATE = 0.006  # of Adam, in shares of a scale
HELD_BACK = 8  # every so many windows one is kept for the choice of the epoch
RIDGE = 0.01  # towards a factor of 1, in shares of an expert's own curvature
LEAST_STEPS = 8  # of an epoch, where there are as many windows
MOST_TOKENS = 131072  # scales are few: further text would take time and tell them little
_STEP_TOKENS = 2048
_DECAY, _SQUARE_DECAY = 0.9, 0.98  # of Adam's means: few steps, so both are short
_EVEN_TOKENS = 0.5  # of the mean weight, added to every token's
_EVEN_OUTPUTS = 0.05  # of the mean of diag(M), added to it


class Parameter(NamedTuple):
    """What is refined: its values, and float32 of the same shape that its steps are shares of."""

    values: np.ndarray
    unit: np.ndarray


@dataclass
class Stored:
    """The matrices of one module as stored: scales * (codes + zeros) + biases, behind `rotation`.

    codes uint8 (uint16 where there is a matrix of more than 8 bits) [E, N, K], zeros float32 [E], scales and biases float32
    [E, N, K/G], biases None where there are none. Read at a `level` of fewer bits (`lowered`): scales * 2^dropped * gains *
    (the codes without their last `dropped` bits + zeros), dropped uint8 [E], gains float32 [E].
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    rotation: Rotation = IDENTITY
    level: int | None = None
    dropped: np.ndarray | None = None
    gains: np.ndarray | None = None

    @classmethod
    def experts(cls, matrices: Sequence[PackedMatrix], rotation: Rotation) -> Stored:
        """One projection of all experts of a layer."""
        codes, zeros = [], []
        for matrix in matrices:
            planes = [
                unpack_codes(plane, width, matrix.shape.columns)
                for plane, width in zip(matrix.planes, PLANE_WIDTHS, strict=False)
            ]
            codes.append(np.array(join_planes(planes)))
            zeros.append(-((1 << matrix.level) - 1) / 2)
        scales = np.stack([np.array(matrix.scales.astype(mx.float32)) for matrix in matrices])
        return cls(np.stack(codes), np.array(zeros, np.float32), scales, None, rotation)

    @classmethod
    def trunk(cls, coded: Affine, shape: tuple[int, ...]) -> Stored:
        """A matrix [N, K] outside the experts."""
        groups = (1, shape[0], -1)
        scales, biases = (a.astype(np.float32).reshape(groups) for a in (coded.scales, coded.biases))
        return cls(coded.codes.reshape(1, *shape), np.zeros(1, np.float32), scales, biases)

    def lowered(self, matrices: Sequence[PackedMatrix], level: int) -> Stored:
        """The same experts with at most `level` bits of every code; it shares codes and scales with this."""
        levels = np.array([matrix.level for matrix in matrices])
        gains = [matrix.gains[level] if matrix.level > level else 1.0 for matrix in matrices]
        return replace(
            self,
            zeros=(-((1 << np.minimum(levels, level)) - 1) / 2).astype(np.float32),
            level=level,
            dropped=np.maximum(levels - level, 0).astype(np.uint8),
            gains=np.array(gains, np.float32),
        )

    @property
    def free(self) -> np.ndarray:
        """bool [E]: whose scales move. Above 8 bits there is no error that one step would not exceed: they stay."""
        return self.zeros >= -((1 << FIELD_BITS) - 1) / 2

    @property
    def group_size(self) -> int:
        return self.codes.shape[2] // self.scales.shape[2]

    def values(self) -> np.ndarray:
        """float32 [E, N, K], with scales and biases as float16 holds them."""
        units = self._units() * _stored(self.scales)[..., None]
        if self.biases is not None:
            units += _stored(self.biases)[..., None]
        return unrotate(units.reshape(self.codes.shape), self.rotation)

    def slopes(self, gradient: np.ndarray) -> dict[str, np.ndarray]:
        """The gradient [E, N, K] of a loss at the values -> that at the scales, and at the biases and gains where there are
        any."""
        grouped = rotate(gradient, self.rotation).reshape(*self.scales.shape, self.group_size)
        found = {"scales": np.einsum("enkg,enkg->enk", grouped, self._units()) * self.free[:, None, None]}
        if self.biases is not None:
            found["biases"] = grouped.sum(axis=-1)
        if self.gains is not None and self.dropped is not None:
            along = (found["scales"] * _stored(self.scales)).sum(axis=(1, 2)) / self.gains
            found[f"gains-{self.level}"] = along * (self.dropped > 0)
        return found

    def parameters(self) -> dict[str, Parameter]:
        """The arrays that `slopes` are of, not copies."""
        unit = np.abs(self.scales)
        found = {"scales": Parameter(self.scales, unit)}
        if self.biases is not None:
            found["biases"] = Parameter(self.biases, unit)
        if self.gains is not None:
            found[f"gains-{self.level}"] = Parameter(self.gains, np.abs(self.gains))
        return found

    def repacked(self, expert: int, matrix: PackedMatrix) -> PackedMatrix:
        """The stored matrix of an expert with the scales of now, and at a lower level with its gain of now."""
        if self.gains is not None and self.level in matrix.gains:
            return matrix._replace(gains=matrix.gains | {self.level: float(self.gains[expert])})
        return matrix._replace(scales=mx.array(self.scales[expert].astype(np.float16)))

    def recoded(self, coded: Affine) -> Affine:
        """The stored matrix of the trunk with the scales and biases of now."""
        assert self.biases is not None
        scales, biases = (a.reshape(-1).astype(np.float16) for a in (self.scales, self.biases))
        return coded._replace(scales=scales, biases=biases)

    def _units(self) -> np.ndarray:
        """float32 [E, N, K/G, G]: what one unit of scale gives."""
        codes, each = self.codes, (slice(None), None, None)
        if self.gains is None or self.dropped is None:
            units = codes.astype(np.float32) + self.zeros[each]
        else:
            units = (codes >> self.dropped[each]).astype(np.float32) + self.zeros[each]
            units *= (self.gains * (1 << self.dropped.astype(np.int32)))[each]
        return units.reshape(*self.scales.shape, self.group_size)


def _stored(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def weight_gradient(record: Record, num_experts: int) -> np.ndarray:
    """float32 [E, N, K]: the gradient at the weights of a recorded module."""
    if record.experts is None:
        return (record.gradients.T @ record.inputs)[None]
    order = np.argsort(record.experts, kind="stable")
    bounds = np.searchsorted(record.experts[order], np.arange(num_experts + 1))
    rows = np.split(order, bounds[1:-1])
    return np.stack([record.gradients[own].T @ record.inputs[own] for own in rows])


# ---------------------------------------------------------------------------------------------------------------------
# Descent
# ---------------------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """One reading of a layer's matrices, by the path of their modules, and what its loss counts."""

    weight: float
    matrices: dict[str, Stored]


Slopes = dict[str, np.ndarray]  # by the names of `parameters`


def parameters(views: Sequence[View]) -> dict[str, Parameter]:
    """Of all views, those that they share once: <path>/scales, <path>/biases, <path>/gains-<level>."""
    return {
        f"{path}/{name}": parameter
        for view in views
        for path, matrix in view.matrices.items()
        for name, parameter in matrix.parameters().items()
    }


def slopes(view: View, records: dict[str, Record]) -> Slopes:
    """Of a loss, by the gradients in the records of the view's modules."""
    return {
        f"{path}/{name}": slope
        for path, matrix in view.matrices.items()
        for name, slope in matrix.slopes(weight_gradient(records[path], len(matrix.codes))).items()
    }


class Descent:
    """Adam (arXiv 1412.6980) over parameters in shares of their units, the rate falling to zero over `steps`."""

    def __init__(self, parameters: dict[str, Parameter], steps: int, rate: float = RATE):
        self._parameters, self._steps, self._rate, self._done = parameters, steps, rate, 0
        self._means = {name: np.zeros_like(p.values) for name, p in parameters.items()}
        self._squares = {name: np.zeros_like(p.values) for name, p in parameters.items()}

    def step(self, slopes: Slopes) -> None:
        """One step down the slopes."""
        self._done += 1
        rate = self._rate * max(0.0, 1 - (self._done - 1) / self._steps)
        for name, (values, unit) in self._parameters.items():
            values -= rate * unit * self._direction(name, slopes[name] * unit)

    def _direction(self, name: str, slope: np.ndarray) -> np.ndarray:
        mean, square = self._means[name], self._squares[name]
        mean *= _DECAY
        mean += (1 - _DECAY) * slope
        square *= _SQUARE_DECAY
        square += (1 - _SQUARE_DECAY) * np.square(slope)
        corrected = np.sqrt(square / (1 - _SQUARE_DECAY**self._done))
        return np.divide(mean / (1 - _DECAY**self._done), corrected, out=np.zeros_like(mean), where=corrected > 0)


class Outcome(NamedTuple):
    """The loss on the windows held back, before and after."""

    before: float
    after: float


class Share(NamedTuple):
    """Rows of the windows, in steps: what is descended on, and what is held back."""

    steps: list[np.ndarray]
    held_back: list[np.ndarray]


def share_windows(windows: int, tokens: int) -> Share | None:
    """The first MOST_TOKENS of windows of so many tokens each, every HELD_BACK-th held back, in steps of at most
    _STEP_TOKENS; None for fewer than two windows."""
    if windows < 2:
        return None
    windows = max(2, min(windows, MOST_TOKENS // tokens))
    held = np.arange(windows) % HELD_BACK == min(HELD_BACK, windows) - 1
    each = max(1, min(_STEP_TOKENS // tokens, windows // LEAST_STEPS))

    def cut(rows: np.ndarray) -> list[np.ndarray]:
        return [rows[start : start + each] for start in range(0, len(rows), each)]

    return Share(cut(np.flatnonzero(~held)), cut(np.flatnonzero(held)))


def refine(
    parameters: dict[str, Parameter],
    share: Share,
    loss: Callable[[np.ndarray], float],
    slopes: Callable[[np.ndarray], Slopes],
    put: Callable[[], None],
    seed: int,
    epochs: int = EPOCHS,
    progress: Callable[[int], object] = lambda steps: None,
) -> Outcome:
    """Moves parameters down the slopes, epoch by epoch, and leaves those of the least loss on the windows held back. `loss`
    of some windows, the sum over tokens, and `slopes` of it are those of the values that `put` has put into the model
    last."""

    def held_back() -> float:
        put()
        return sum(loss(rows) for rows in share.held_back)

    def copied() -> dict[str, np.ndarray]:
        return {name: parameter.values.copy() for name, parameter in parameters.items()}

    descent = Descent(parameters, epochs * len(share.steps))
    before = least = held_back()
    best = copied()
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        for i in random.permutation(len(share.steps)):
            descent.step(slopes(share.steps[i]))
            put()
            progress(1)
        now = held_back()
        if now < least:
            least, best = now, copied()
    for name, parameter in parameters.items():
        parameter.values[:] = best[name]
    put()
    return Outcome(before, least)


# ---------------------------------------------------------------------------------------------------------------------
# What a layer's outputs are worth
# ---------------------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """The loss of a layer's outputs: 1/2 sum over tokens t of w_t d_t' M d_t.

    outputs float32 [D, D]: M, the mean outer product of the gradients behind the layer, plus a share of its diagonal's mean;
    tokens float32 [windows, T]: w_t, the squared gradients, plus an even share, 1 on average. Together they stand in for the
    Fisher information of every single token, of which one draw says too little.
    """

    outputs: np.ndarray
    tokens: np.ndarray

    def error(self, rows: np.ndarray, difference: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss of outputs that differ by [B, T, D] on the windows `rows`, and its gradient at the outputs."""
        gradient = (difference @ self.outputs) * self.tokens[rows][..., None]
        return float(np.vdot(difference, gradient)) / 2, gradient


def measure_metric(gradients: Iterable[np.ndarray]) -> Metric:
    """From the gradients [B, T, D] of the windows, batch by batch."""
    outer, tokens = None, []
    for batch in gradients:
        flat = batch.reshape(-1, batch.shape[-1])
        outer = flat.T @ flat if outer is None else outer + flat.T @ flat
        tokens.append(np.square(batch).mean(axis=-1))
    assert outer is not None
    weights = np.concatenate(tokens)
    outer = outer / weights.size
    mean = float(np.trace(outer)) / len(outer)
    outer[np.diag_indices_from(outer)] += _EVEN_OUTPUTS * mean if mean > 0 else 1.0
    average = float(weights.mean())
    weights = weights / average + _EVEN_TOKENS if average > 0 else np.ones_like(weights)
    return Metric(outer, (weights / weights.mean()).astype(np.float32))


def layer_metric(walk: Walk, i: int) -> Metric:
    """Of the outputs of layer i, by the gradients behind it."""

    def gradients() -> Iterator[np.ndarray]:
        for rows in walk.batches():
            yield np.array(walk.read("gradient", i + 1, rows).astype(mx.float32))

    return measure_metric(gradients())


# ---------------------------------------------------------------------------------------------------------------------
# A layer, the model
# ---------------------------------------------------------------------------------------------------------------------


def polish_layer(walk: Walk, i: int, kind: str, target: str, views: Sequence[View], share: Share, seed: int) -> Outcome:
    """Refines the matrices of the loaded layer i for the sum of the losses of `views`, and leaves the values of the first
    one in it.

    The layer runs on the hidden states of `kind`; the outputs that it should give are the hidden states `target` behind it.
    """
    stream, metric = walk.stream, layer_metric(walk, i)

    def wanted(rows: np.ndarray) -> mx.array:
        return walk.read(target, i + 1, rows).astype(mx.float32)

    def in_turn() -> Iterator[View]:
        for view in views:
            if len(views) > 1:  # one alone is there already
                _put(walk, view.matrices)
            yield view

    def loss(rows: np.ndarray) -> float:
        total = 0.0
        for view in in_turn():
            found = stream.run(i, walk.batch(rows), walk.read(kind, i, rows)).astype(mx.float32)
            total += view.weight * metric.error(rows, np.array(found - wanted(rows)))[0]
        return total

    def down(rows: np.ndarray) -> Slopes:
        matrix, weights, aim = mx.array(metric.outputs), mx.array(metric.tokens[rows])[..., None], wanted(rows)
        total: Slopes = {}
        for view in in_turn():

            def squared(output: mx.array, weight: float = view.weight) -> mx.array:
                difference = output - aim
                return weight * (difference @ matrix * difference * weights).sum() / 2

            found = stream.descend(i, walk.batch(rows), walk.read(kind, i, rows), squared, list(view.matrices))
            for name, slope in slopes(view, found.records).items():
                total[name] = total[name] + slope if name in total else slope
        return total

    return refine(parameters(views), share, loss, down, lambda: _put(walk, views[0].matrices), seed)


def polish_model(
    walk: Walk,
    stored: dict[str, Stored],
    head: dict[str, np.ndarray],
    share: Share,
    seed: int,
    progress: Callable[[int], object],
) -> Outcome:
    """Refines the matrices `stored`, by the path of their modules, of the model whose layers are all loaded, and leaves
    their values in it. head: values by name of what lies behind the layers and keeps its scales. What lies there must be
    the original's still, and the hidden states of the original behind the last layer on the disk."""
    stream, last = walk.stream, len(walk.stream.layers)
    outside = [path for path in stored if not any(path.startswith(f"{stream.path(i)}.") for i in range(last))]
    original = [(name, stream.weight(name)) for name in (*head, *(f"{path}.weight" for path in outside))]
    stream.replace(head.items())

    def wanted(rows: np.ndarray) -> mx.array:
        """Log-probabilities of the original's predictions."""
        stream.replace(original)
        logs = _logs(stream.logits(walk.batch(rows), walk.read("hidden", last, rows)))
        mx.eval(logs)
        stream.replace(head.items())
        _put(walk, {path: stored[path] for path in outside})
        return logs

    def forward(rows: np.ndarray) -> list[mx.array]:
        hidden = [stream.embed(walk.batch(rows))]
        for i in range(last):
            hidden.append(stream.run(i, walk.batch(rows), hidden[-1]))
            mx.eval(hidden[-1])
        return hidden

    def loss(rows: np.ndarray) -> float:
        aim = wanted(rows)
        lost = divergence(aim, _logs(stream.logits(walk.batch(rows), forward(rows)[-1])))
        return float(np.array(lost).sum(dtype=np.float64))

    whole = View(1.0, stored)

    def down(rows: np.ndarray) -> Slopes:
        tokens, hidden = walk.batch(rows), forward(rows)
        aim = wanted(rows)
        done = stream.conclude(tokens, hidden[last], lambda logits: divergence(aim, _logs(logits)).sum(), outside)
        records = done.records
        for i in reversed(range(last)):
            paths = [path for path in stored if path.startswith(f"{stream.path(i)}.")]
            done = stream.differentiate(i, tokens, hidden[i], done.gradient, paths)
            records |= done.records
        return slopes(whole, records)

    return refine(parameters([whole]), share, loss, down, lambda: _put(walk, stored), seed, progress=progress)


def _logs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _put(walk: Walk, stored: dict[str, Stored]) -> None:
    walk.stream.replace((f"{path}.weight", matrix.values()) for path, matrix in stored.items())


# ---------------------------------------------------------------------------------------------------------------------
# One factor for every expert
# ---------------------------------------------------------------------------------------------------------------------


class Normal(NamedTuple):
    """Of the least squares for the factors: the change d of all factors lowers the loss by right' d - d' matrix d / 2."""

    matrix: np.ndarray  # float64 [E, E]
    right: np.ndarray  # float64 [E]


def normal_equations(record: Record, rest: np.ndarray, metric: Metric, rows: np.ndarray, num_experts: int) -> Normal:
    """From the experts' module of a layer: its record of the windows `rows`, with the gradients of `rest` (what the metric
    gives for target minus output, [B, T, D]) and one row for every pair of token and expert, tokens in order.

    The gradient at an expert's output is its gate weight c times that at the layer's output, so that every pair adds
    P = c * output to the layer's output: matrix = sum_t w_t P_te' M P_tf, right = sum_t P_te' rest_t.
    """
    assert record.experts is not None
    flat = rest.reshape(-1, rest.shape[-1])
    active = len(record.experts) // len(flat)
    gradients, outputs = (a.reshape(len(flat), active, -1) for a in (record.gradients, record.outputs))
    square = np.einsum("td,td->t", flat, flat)
    gates = np.einsum("tad,td->ta", gradients, flat) / np.where(square > 0, square, 1.0)[:, None]
    added = gates[..., None] * outputs  # [T, A, D]
    experts = record.experts.reshape(len(flat), active)
    weighted = (added @ metric.outputs) * metric.tokens[rows].reshape(-1, 1, 1)
    pairs = np.einsum("tad,tbd->tab", weighted, added)
    matrix, right = np.zeros((num_experts, num_experts)), np.zeros(num_experts)
    np.add.at(matrix, (experts[:, :, None], experts[:, None, :]), pairs)
    np.add.at(right, experts, np.einsum("tad,td->ta", added, flat))
    return Normal(matrix, right)


def fit_factors(normal: Normal, free: np.ndarray | bool = True, ridge: float = RIDGE) -> np.ndarray:
    """float64 [E]: the factors 1 + d that lower the loss most, d = (matrix + ridge * diag)^-1 right; 1 for an expert that
    adds nothing or is not `free` (bool [E]). None is below a half or above two."""
    own = np.diagonal(normal.matrix)
    used = (own > 0) & free
    factors = np.ones(len(own))
    if used.any():
        damped = normal.matrix[np.ix_(used, used)] + ridge * np.diag(own[used])
        factors[used] += np.linalg.solve(damped, normal.right[used])
    return np.clip(factors, 0.5, 2.0)


def polish_factors(walk: Walk, i: int, kind: str, target: str, experts: str, last: Stored) -> np.ndarray:
    """float64 [E]: factors for the last projection `last` of the experts' module `experts` of the loaded layer i, whose
    values are in it. They are folded into its scales."""
    metric, stream, num_experts = layer_metric(walk, i), walk.stream, len(last.codes)
    sums = Normal(np.zeros((num_experts, num_experts)), np.zeros(num_experts))
    for batch in walk.batches():
        rows = np.arange(batch.start, batch.stop)
        tokens, hidden = walk.batch(rows), walk.read(kind, i, rows)
        found = stream.run(i, tokens, hidden).astype(mx.float32)
        rest = metric.error(rows, np.array(walk.read(target, i + 1, rows).astype(mx.float32) - found))[1]
        record = stream.differentiate(i, tokens, hidden, mx.array(rest), [experts]).records[experts]
        normal = normal_equations(record, rest, metric, rows, num_experts)
        sums = Normal(sums.matrix + normal.matrix, sums.right + normal.right)
    factors = fit_factors(sums, last.free)
    last.scales *= factors[:, None, None].astype(np.float32)
    return factors
