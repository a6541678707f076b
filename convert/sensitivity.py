"""What an error in a matrix costs: before any calibration by rule, with it by one of several scores.

Without calibration each tensor class has a weight, and the expected loss is the sum over matrices of weight *
||W - W_hat||^2 / ||W||^2. The weights were fitted once to the measured KLD (nats per token) of the project's trained test
model when one class alone was quantized at 3 and 4 bits (docs/quantization.md has the table), so the sum is on the scale of
a KLD for that model and a relative measure for others. Within a class every layer counts the same, and within a layer's
experts each in proportion to its own energy.

With calibration the loss is measured, in nats (stats.py). The other scores order experts in other ways; they say nothing of
the trunk, so they only share out what the losses give to all experts (allocate.py). docs/quantization.md has how each agrees
with the measured divergence of single experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxmoe.convert.config import Allocation
from mlxmoe.convert.measure import ExpertErrors, ExpertScores
from mlxmoe.convert.replicas import benefit, sensitivity

# KLD per unit of relative squared error when the whole class (all layers) has it.
CLASS_WEIGHTS = {"head": 1.2, "embedding": 0.65, "attention": 1.0, "dense": 5.0, "shared": 0.2, "experts": 0.4}


def trunk_weight(tensor_class: str, tensors_in_class: int, num_layers: int) -> float:
    """Weight of one trunk tensor: the class weight shared by its tensors.

    `dense` MLPs stand in few layers (the first), so their weight is per layer of the model, not per dense layer.
    """
    share = tensors_in_class if tensor_class != "dense" else 3 * num_layers
    return CLASS_WEIGHTS[tensor_class] / share


def expert_weights(norms: Sequence[float], num_layers: int, num_projections: int) -> list[float]:
    """Weight of each expert's matrix of one layer and projection, from the squared norms of the experts' weights."""
    total = sum(norms) or 1.0
    return [CLASS_WEIGHTS["experts"] / (num_layers * num_projections) * norm / total for norm in norms]


def score_losses(allocation: Allocation, layers: Sequence[ExpertErrors]) -> list[np.ndarray]:
    """What experts' levels are chosen by, [P, E, levels] for every layer, in a unit of its own.

    layers: measured on text, with scores; norms[-1] then is the loss without the expert, to second order.

    fisher     the loss, in nats (stats.py)
    output     squared error of the expert's gate-weighted output, this projection alone quantized
    weight     squared error of the weights, relative to all experts of the layer
    frequency  share of the tokens
    ablation   contribution to the layer's output * loss without the expert (the chapter's 7.2.2)
    mix        shares of relative output error and loss, both at the lowest level, and frequency (the chapter's 7.2.2)

    The last three are one number for an expert or a matrix, times the relative squared error of the weights at the level.
    """
    if allocation.sensitivity == "fisher":
        return [layer.errors for layer in layers]
    scores = [_scores(layer) for layer in layers]
    if allocation.sensitivity == "output":
        return [each.output for each in scores]
    if allocation.sensitivity == "weight":
        return [each.weight / each.energy.sum(axis=1)[:, None, None] for each in scores]
    if allocation.sensitivity == "frequency":
        factors = [np.broadcast_to(each.frequency, each.energy.shape) for each in scores]
    elif allocation.sensitivity == "ablation":
        factors = [importance(layer) * np.ones(len(layer.norms))[:, None] for layer in layers]
    else:
        factors = mixed(allocation.shares, layers)
    return [factor[..., None] * each.relative for factor, each in zip(factors, scores, strict=True)]


def importance(layer: ExpertErrors) -> np.ndarray:
    """[E]: contribution to the layer's output * loss without the expert."""
    return _scores(layer).contribution * layer.norms[-1]


def mixed(shares: Sequence[float], layers: Sequence[ExpertErrors], whole: bool = False) -> list[np.ndarray]:
    """[P, E] of every layer: relative error of the expert's output, loss and frequency, each scaled to a largest value of 1
    in the model. `whole`: [1, E], errors and losses of an expert's projections added up."""
    parts: list[list[np.ndarray]] = [[], [], []]
    for layer in layers:
        scores = _scores(layer)
        each = [scores.output[..., 0] / np.where(scores.outputs > 0, scores.outputs, 1.0), layer.errors[..., 0]]
        if whole:
            each = [part.sum(axis=0, keepdims=True) for part in each]
        for column, values in zip(parts, (*each, np.broadcast_to(scores.frequency, each[0].shape)), strict=True):
            column.append(values)
    flat = [np.concatenate([values.reshape(-1) for values in column]) for column in parts]
    ends = np.cumsum([values.size for values in parts[0]])
    pieces = np.split(sensitivity(flat[0], flat[1], flat[2], shares), ends[:-1])
    return [piece.reshape(values.shape) for piece, values in zip(pieces, parts[0], strict=True)]


def expert_benefits(allocation: Allocation, layers: Sequence[ExpertErrors]) -> list[np.ndarray]:
    """[E] of every layer: the chapter's benefit (7.2.4), sensitivity * frequency * (1 + massive-activation ratio)."""
    mixes = mixed(allocation.shares, layers, whole=True)
    scores = [_scores(layer) for layer in layers]
    return [benefit(mix[0], each.frequency, each.massive) for mix, each in zip(mixes, scores, strict=True)]


def _scores(layer: ExpertErrors) -> ExpertScores:
    assert layer.scores is not None, "measured with scores"
    return layer.scores
