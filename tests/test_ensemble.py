"""Further copies of experts: coded for those that have them, their mean, and the weights of their outputs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwiGLU, SwitchLinear

from mlxmoe.convert.awq import Projection
from mlxmoe.convert.ensemble import code_copy, learn_selection, learn_weights, mean_values
from mlxmoe.convert.scores import Observed
from mlxmoe.convert.stats import Moments
from mlxmoe.experts import ExpertLayer
from mlxmoe.formats import MatrixShape
from mlxmoe.plan import ExpertEntry, LayerPlan, Replicas
from mlxmoe.rotation import UNROTATED, plain_rotation, rotate

D = 32
NAMES = ("gate_proj", "up_proj", "down_proj")
SHAPES = tuple(MatrixShape(name + suffix, D, D, 32) for suffix in ("", "_2") for name in NAMES)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer_plan() -> LayerPlan:
    """Three experts, of which the second has no copy."""
    both, one = (ExpertEntry((2,) * n + (0,) * (6 - n), ((0.1,),) * n + ((),) * (6 - n), ((),) * 6) for n in (6, 3))
    replicas = Replicas((UNROTATED,), ((0.5, 1.0, 0.5), (0.5, 0.0, 0.5)))
    return LayerPlan(0, "m", "glu", "f", SHAPES, ((1.0,) * 3,) * 6, (both, one, both), UNROTATED, replicas)


def test_a_copy_is_coded_for_the_experts_that_have_it() -> None:
    stacks = [gaussian(3, D, D, seed=p) for p in range(3)]
    moments = Moments(np.stack([np.eye(D, dtype=np.float32)] * 3), np.ones((3, D)), np.ones(3, np.int64), 1.0)
    turn = plain_rotation("randomised-hadamard", D, 3)
    coded = code_copy(layer_plan(), 1, [Projection(stack, moments) for stack in stacks], [turn] * 6, 0.0)
    for stack, packed, values in zip(stacks, coded.packed, coded.values, strict=True):
        assert [each is None for each in packed] == [False, True, False]
        assert not values[1].any()
        relative = np.square(values - stack).sum(axis=(1, 2)) / np.square(stack).sum(axis=(1, 2))
        assert (relative[[0, 2]] < 0.15).all()
        # what is behind the rotation takes four values for every scale
        behind = rotate(values[0], turn)
        assert all(len(np.unique(np.round(row / np.abs(row).max(), 3))) <= 4 for row in behind)


def test_the_mean_is_of_the_copies_that_there_are() -> None:
    copies = [[gaussian(3, D, D, seed=c)] for c in range(2)]
    copies[1][0][1] = 0
    (mean,) = mean_values(layer_plan(), copies)
    np.testing.assert_allclose(mean[1], copies[0][0][1])
    np.testing.assert_allclose(mean[2], (copies[0][0][2] + copies[1][0][2]) / 2, rtol=1e-6)


def test_learned_weights_undo_what_a_copy_has_too_much_of() -> None:
    """The first copy gives twice the output, the second something unrelated: half of the one and none of the other."""
    stacks = [0.3 * gaussian(3, D, D, seed=p) for p in range(3)]
    linears = {name: SwitchLinear(D, D, 3, bias=False) for name in NAMES}
    for linear, stack in zip(linears.values(), stacks, strict=True):
        linear.weight = mx.array(stack)
    module = ExpertLayer(linears, SwiGLU(), 3)
    experts = np.repeat(np.arange(3), 40)
    observed = Observed(gaussian(120, D, seed=9), experts, np.ones(120), np.full(3, 40), np.ones(3), np.zeros(3), 120)
    copies = [[stacks[0], stacks[1], 2 * stacks[2]], [stacks[0], stacks[1], 0.3 * gaussian(3, D, D, seed=7)]]
    layer = learn_weights(module, observed, layer_plan(), copies)
    assert layer.replicas is not None
    np.testing.assert_allclose(layer.replicas.weights, [[0.5, 1, 0.5], [0, 0, 0]], atol=0.03)
    for linear, stack in zip(linears.values(), stacks, strict=True):
        assert (np.array(linear.weight) == stack).all()


def test_a_selection_is_fitted_to_the_errors_of_the_outputs() -> None:
    """Squared distance of each copy's output to the original's, worked out over numpy arrays."""
    stacks = [0.3 * gaussian(3, D, D, seed=p) for p in range(3)]
    linears = {name: SwitchLinear(D, D, 3, bias=False) for name in NAMES}
    for linear, stack in zip(linears.values(), stacks, strict=True):
        linear.weight = mx.array(stack)
    experts = np.repeat(np.arange(3), 40)
    x = gaussian(120, D, seed=9) * np.exp(gaussian(120, 1, seed=8))
    observed = Observed(x, experts, np.ones(120), np.full(3, 40), np.ones(3), np.zeros(3), 120)
    copies = [[stacks[0], stacks[1], 1.1 * stacks[2]], [stack + 0.05 * gaussian(3, D, D, seed=7) for stack in stacks]]

    def outputs(matrices: list[np.ndarray]) -> np.ndarray:
        gate, up = (np.einsum("nd,nfd->nf", x, matrix[experts]) for matrix in matrices[:2])
        return np.einsum("nf,ndf->nd", gate / (1 + np.exp(-gate)) * up, matrices[2][experts])

    errors = np.stack([np.square(outputs(copy) - outputs(stacks)).sum(axis=1) for copy in copies])
    norms = np.sqrt(np.square(x).sum(axis=1))
    layer = learn_selection(ExpertLayer(linears, SwiGLU(), 3), observed, layer_plan(), copies, careful=True)
    assert layer.replicas is not None
    assert layer.replicas.selection is not None
    slopes, intercepts, usual = map(np.array, layer.replicas.selection)
    for e in (0, 2):
        rows = experts == e
        lines = np.transpose([np.polyfit(np.log(norms[rows]), np.log(row[rows]), 1) for row in errors])
        np.testing.assert_allclose([slopes[:, e], intercepts[:, e]], lines, rtol=1e-3, atol=1e-3)
        assert usual[e] == 0  # such inputs spread by more than half of their mean
    assert not slopes[:, 1].any()
    for linear, stack in zip(linears.values(), stacks, strict=True):
        assert (np.array(linear.weight) == stack).all()


def test_an_expert_without_inputs_gets_the_mean() -> None:
    linears = {name: SwitchLinear(D, D, 3, bias=False) for name in NAMES}
    nothing = Observed(gaussian(1, D), np.array([1]), np.ones(1), np.ones(3), np.ones(3), np.zeros(3), 1)
    values = [np.array(linear.weight) for linear in linears.values()]
    layer = learn_weights(ExpertLayer(linears, SwiGLU(), 3), nothing, layer_plan(), [values, values])
    assert layer.replicas is not None
    assert layer.replicas.weights == ((0.5, 1.0, 0.5), (0.5, 0.0, 0.5))
