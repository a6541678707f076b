"""Deterministic weights of the tiny checkpoints, shared by make_vectors.py and the tests.

A tensor is a function of its name and shape alone, so no weights are stored. numpy's RandomState is frozen by NEP 19
and `random_sample` uses no libm, so every platform makes the same bits. The scales keep activations and logits of
order 1, norm weights near 1 and the router's logits apart.
"""

from __future__ import annotations

import zlib

import numpy as np

# The last part of a name that marks a vector of multipliers, which stay near 1.
MULTIPLIERS = ("layer_scalar", "per_expert_scale", "router.scale")


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of the tensor `name` of `shape`."""
    stem = name.removesuffix(".weight")
    if name.endswith(MULTIPLIERS) or "norm" in stem.rsplit(".", 1)[-1]:
        return 1.0, 0.1
    if name.endswith("sinks"):
        return 0.0, 1.0
    if name.endswith(("A_log", "dt_bias")):
        return 0.0, 0.5
    if name.endswith("e_score_correction_bias"):
        return -1.0, 0.3  # some biased scores are negative: experts of rejected groups must still lose to them
    if name.endswith("bias") or len(shape) < 2:
        return 0.0, 0.1
    if name.endswith("conv1d.weight"):
        return 0.0, shape[-1] ** -0.5
    if name.endswith((".gate.weight", "router.weight", "router.proj.weight")):
        return 0.0, 2.0 * shape[-1] ** -0.5
    return 0.0, shape[-1] ** -0.5


def tensor(name: str, shape: tuple[int, ...], norm_offset: float = 0.0) -> np.ndarray:
    """The float32 values of the tensor `name` of `shape`: uniform, with the mean and deviation of `_spread`.

    `norm_offset` is what the model adds to its norm weights (all but that of the linear attention's output).
    """
    mean, deviation = _spread(name, shape)
    if name.endswith("norm.weight") and "linear_attn" not in name:
        mean -= norm_offset
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return (mean + deviation * 3.0**0.5 * (2.0 * random.random_sample(shape) - 1.0)).astype(np.float32)


def checkpoint(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by name. Qwen's models with linear attention add 1 to their norm weights."""
    norm_offset = 1.0 if any("linear_attn" in name for name in shapes) else 0.0
    return {name: tensor(name, tuple(shape), norm_offset) for name, shape in shapes.items()}
