"""The matrices of a layer coded as a plan says, for the least error of their outputs on the calibration text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxmoe.convert.awq import Balance, Projection, degree, find_balance
from mlxmoe.convert.calibrated import affine_values, code_trunk, pack_experts
from mlxmoe.convert.coded import CodedLayer
from mlxmoe.convert.ensemble import code_copy, learn_selection, learn_weights, mean_values
from mlxmoe.convert.gather import differentiate, draw
from mlxmoe.convert.layers import Layers
from mlxmoe.convert.measure import AS_IS
from mlxmoe.convert.scores import observe
from mlxmoe.convert.stats import Moments, without_inputs
from mlxmoe.convert.write import Packed, copy_turns
from mlxmoe.plan import SELECTIVE, LayerPlan, Plan


class Coding(NamedTuple):
    """values: float32 by name, what the codes stand for (of an expert with further copies: the first); layer: the codes."""

    values: dict[str, np.ndarray]
    layer: CodedLayer


def code_layer(layers: Layers, i: int, plan: Plan, moments: dict[str, Moments]) -> Coding:
    """Codes a loaded layer, or what lies before or behind the layers, by its statistics: but not what is written as it
    is."""
    coding = Coding({}, CodedLayer())
    for tensor in layers.trunk[i]:
        entry, matrix = plan.trunk[tensor.name], layers.stream.weight(tensor.name)
        if entry.bits == AS_IS.bits:
            continue
        flat = matrix.reshape(-1, matrix.shape[-1])
        coded, _, _ = code_trunk(flat, moments[tensor.module], entry.bits, entry.group_size)
        coding.layer.trunk[tensor.name] = coded
        coding.values[tensor.name] = affine_values(coded, matrix.shape)
    planned = layers.planned(i, plan)
    if planned is not None:
        _code_experts(layers, i, planned, moments, coding)
    return coding


def _matrix(layers: Layers, path: str, moments: dict[str, Moments]) -> Projection:
    """One projection of a loaded layer's experts."""
    return Projection(layers.stream.weight(f"{path}.weight"), moments[path])


def _code_experts(layers: Layers, i: int, planned: LayerPlan, moments: dict[str, Moments], coding: Coding) -> None:
    paths, rotated = layers.projections(i), layers.rotated(planned.layer)
    balance = None
    if layers.calibration.method == "awq":
        balance = _balance(layers, planned, _matrix(layers, paths[-1], moments))
    for p, (path, shape) in enumerate(zip(paths, planned.projections, strict=False)):
        levels, turn = [expert.levels[p] for expert in planned.experts], rotated.of(p, len(paths))
        matrix = _matrix(layers, path, moments)
        matrix = matrix if balance is None else balance.applied(p, len(paths), matrix)
        coded = pack_experts(*matrix, levels, shape, layers.calibration.mu, turn, feedback=balance is None)
        coding.values[f"{path}.weight"] = np.stack([value for *_, value in coded])
        coding.layer.experts.append([Packed(stored, errors) for stored, errors, _ in coded])


def _balance(layers: Layers, planned: LayerPlan, last: Projection) -> Balance:
    """The scales of AWQ for the last projection of a loaded layer's experts."""
    levels = [expert.levels[-1] for expert in planned.experts]
    return find_balance(last, levels, planned.projections[-1].group_size, degree(layers.stream.module(planned.path)))


def code_copies(
    layers: Layers, i: int, kind: str, planned: LayerPlan, moments: dict[str, Moments], coding: Coding
) -> LayerPlan:
    """Codes further copies of a loaded layer's experts: adds them to `coding`, whose values become the mean of all copies.
    Returns the layer's plan, with how the copies' outputs are combined where that is learned."""
    paths = layers.projections(i)
    matrices = [_matrix(layers, path, moments) for path in paths]
    copies = [[coding.values[f"{path}.weight"] for path in paths]]
    turns = copy_turns(planned, layers.rotated(planned.layer))
    for copy in range(1, len(planned.copy_rotations)):
        further = code_copy(planned, copy, matrices, turns, layers.calibration.mu)
        coding.layer.copies.extend(further.packed)
        copies.append(further.values)
    means = mean_values(planned, copies)
    coding.values.update((f"{path}.weight", mean) for path, mean in zip(paths, means, strict=True))
    replication = layers.config.replicas
    if replication is None or not replication.needs_text:
        return planned
    observed, module = observe(layers.walk, i, kind, layers.sites[i]), layers.stream.module(planned.path)
    if replication.combine == SELECTIVE:
        return learn_selection(module, observed, planned, copies, replication.conservative)
    return learn_weights(module, observed, planned, copies)


def coded_values(layers: Layers, i: int, plan: Plan) -> dict[str, np.ndarray]:
    """float32 values by name of layer i, as a plan codes it at the original's hidden states. Called with the layer loaded,
    when all are measured, from the first to the last: leaves the hidden states behind the layer."""
    walk = layers.walk
    if i < 0:
        return code_layer(layers, i, plan, {t.module: without_inputs(0.0) for t in layers.trunk[i]}).values
    walk.embed("hidden")
    if i == layers.last:
        values = code_layer(layers, i, plan, draw(layers, "hidden")).values
    else:
        values = code_layer(layers, i, plan, differentiate(layers, i, "hidden")).values
        if not walk.path("hidden", i + 1).is_file():
            walk.advance(i, "hidden")
    if layers.calibration.predecessors and i > 0:
        walk.path("hidden", i).unlink()
    return values
