"""Routing rules against mlx-lm's own functions, and the kernel against the rule; groups, ties and the rest of the kernel's
rules are in test_kernels.py."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metalsim import require
from mlx_lm.models.phimoe import sparsemixer
from test_kernels import Run, simulated

from mlxmoe.kernels import MetalKernels
from mlxmoe.router import Router, route


@pytest.fixture
def sim() -> Run:
    """metalsim, or the GPU where there is one."""
    if MetalKernels.available():
        return Run(MetalKernels(), [])
    require()
    return simulated()


def logits(tokens: int, experts: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(seed).standard_normal((tokens, experts)).astype(np.float32))


@pytest.mark.parametrize("jitter", [1e-6, 0.01, 0.25, 0.6])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_sparsemixer_is_that_of_mlx_lm(top_k: int, jitter: float) -> None:
    values = logits(200, 16)
    experts, weights = sparsemixer(values, top_k=top_k, jitter_eps=jitter)
    found = route(values, None, Router(16, top_k, "sparsemixer", epsilon=jitter))
    assert mx.array_equal(found.experts, experts)
    assert mx.allclose(found.weights, weights, rtol=1e-5, atol=0)


def test_sparsemixer_among_equals_and_zeros() -> None:
    """The factor of mlx-lm's rule is 0 here: a division by it says near, as the product does."""
    router = Router(4, 3, "sparsemixer", epsilon=0.01)
    assert route(mx.zeros((1, 4)), None, router).experts.tolist() == [[0, 1, 2]]
    assert mx.allclose(route(mx.zeros((1, 4)), None, router).weights, mx.array([[1 / 4, 1 / 3, 1 / 2]]))
    assert mx.allclose(sparsemixer(mx.zeros((1, 4)), top_k=3, jitter_eps=0.01)[1], mx.array([[1 / 4, 1 / 3, 1 / 2]]))


@pytest.mark.parametrize(("experts", "top_k"), [(16, 2), (40, 5), (100, 8)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mean", [0, -4])
def test_sparsemixer_kernel(sim: Run, experts: int, top_k: int, biased: bool, mean: int) -> None:
    # on a coarse grid: many ties, and many logits at the very border of what is near
    values = (mx.round(logits(3, experts) * 4) / 4 + mean).astype(mx.bfloat16)
    bias = logits(1, experts, 8)[0] / 4 if biased else None
    router = Router(experts, top_k, "sparsemixer", epsilon=0.125, scaling=1.5)
    found = sim.kernels.route(values, bias, router)
    sim.clean()
    exact = route(values, bias, router)
    assert mx.array_equal(found.experts, exact.experts)
    assert mx.allclose(found.weights, exact.weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [{"num_groups": 2}, {"num_groups": 2, "top_groups": 2}, {"normalise": True}])
def test_sparsemixer_has_no_groups_and_is_not_normalised(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no router can do this"):
        Router(8, 2, "sparsemixer", **wrong)
