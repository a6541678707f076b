"""Further copies of experts with calibration text: coded, and what their outputs count.

Shapes: C copies, E experts, N rows, K columns, P projections of one copy, n sampled inputs, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxmoe.convert.awq import Projection
from mlxmoe.convert.calibrated import pack_experts
from mlxmoe.convert.replicas import fit_selection, learned_weights
from mlxmoe.convert.scores import Observed
from mlxmoe.convert.write import Packed
from mlxmoe.formats import ABSENT
from mlxmoe.plan import LayerPlan
from mlxmoe.rotation import Rotation

_RIDGE = 1e-2  # towards the mean: few inputs reach a rare expert


class CodedCopy(NamedTuple):
    """One further copy: what is written by projection, None for experts without it, and the values [E, N, K] of each
    projection, zeros for those experts."""

    packed: list[list[Packed | None]]
    values: list[np.ndarray]


def code_copy(
    layer: LayerPlan, copy: int, matrices: Sequence[Projection], turns: Sequence[Rotation], mu: float
) -> CodedCopy:
    """Codes the copy of that number; `matrices`: the P projections of the source, `turns`: of all projections."""
    packed, values = [], []
    for p, (stack, moments) in enumerate(matrices):
        at = copy * layer.num_matrices + p
        levels = np.array([entry.levels[at] for entry in layer.experts])
        chosen = np.flatnonzero(levels != ABSENT)
        some = moments._replace(hessian=moments.hessian[chosen], row_weights=moments.row_weights[chosen])
        coded = pack_experts(stack[chosen], some, levels[chosen].tolist(), layer.projections[at], mu, turns[at])
        column: list[Packed | None] = [None] * len(levels)
        whole = np.zeros_like(stack)
        for e, (matrix, errors, value) in zip(chosen, coded, strict=True):
            column[e], whole[e] = Packed(matrix, errors), value
        packed.append(column)
        values.append(whole)
    return CodedCopy(packed, values)


def mean_values(layer: LayerPlan, copies: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The mean of every expert's copies, projection by projection: what stands in for them while the layers behind are
    coded. To first order in the errors its output is the mean of theirs."""
    counts = np.array([layer.num_copies(e) for e in range(len(layer.experts))], np.float32)[:, None, None]
    return [sum(values) / counts for values in zip(*copies, strict=True)]


def learn_weights(
    module: nn.Module, observed: Observed, layer: LayerPlan, copies: Sequence[Sequence[np.ndarray]]
) -> LayerPlan:
    """The layer with the weights [C, E] of its copies' outputs by least squares on sampled inputs of each expert, towards
    what the source's experts give. `module`: the loaded one, whose weights are put back."""
    target, outputs = _run(module, observed), _copy_outputs(module, observed, layer, copies)
    weights = np.zeros((len(copies), len(layer.experts)))
    for e in range(len(layer.experts)):
        count = layer.num_copies(e)
        rows = observed.experts == e
        some = count > 1 and rows.any()
        weights[:count, e] = (
            learned_weights(np.stack([y[rows] for y in outputs[:count]]), target[rows], _RIDGE) if some else 1 / count
        )
    assert layer.replicas is not None
    found = tuple(map(tuple, weights.tolist()))
    return layer._replace(replicas=layer.replicas._replace(weights=found))


def learn_selection(
    module: nn.Module, observed: Observed, layer: LayerPlan, copies: Sequence[Sequence[np.ndarray]], careful: bool
) -> LayerPlan:
    """As learn_weights, with what one of the copies is chosen by, by their errors on sampled inputs of each expert;
    careful: with the conservative mode."""
    outputs = np.stack(_copy_outputs(module, observed, layer, copies))
    errors = np.square(outputs - _run(module, observed)).sum(axis=2)
    counts = np.array([layer.num_copies(e) for e in range(len(layer.experts))])
    norms = np.linalg.norm(observed.inputs, axis=1)
    assert layer.replicas is not None
    found = fit_selection(norms, observed.experts, errors, counts, careful)
    return layer._replace(replicas=layer.replicas._replace(selection=found))


def _copy_outputs(
    module: Any, observed: Observed, layer: LayerPlan, copies: Sequence[Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """float32 [n, D] of every copy, on the sampled inputs."""
    names = [shape.name for shape in layer.projections[: layer.num_matrices]]
    before, outputs = {name: module[name]["weight"] for name in names}, []
    try:
        for values in copies:
            for name, value in zip(names, values, strict=True):
                module[name]["weight"] = mx.array(value).astype(before[name].dtype)
            outputs.append(_run(module, observed))
    finally:
        for name, weight in before.items():
            module[name]["weight"] = weight
    return outputs


def _run(module: Any, observed: Observed) -> np.ndarray:
    """float32 [n, D]."""
    experts = mx.array(observed.experts.astype(np.uint32))[:, None]
    return np.array(module(mx.array(observed.inputs), experts).astype(mx.float32))[:, 0]
