"""What the router of an MoE block ranks experts by, without the choice that the block makes of it.

For traces and for reading ahead; the choice itself stays in the block, or in router.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ScoresFn = Callable[[mx.array], mx.array]  # inputs of the experts [..., D] -> [..., E]


# What blocks call a projection of their input that the experts alone see
_LATENT = ("fc1_latent_proj", "routed_expert_down_proj")


def experts_see_the_input(block: nn.Module) -> bool:
    """Whether the experts of a block get what its router and its shared experts get."""
    return not any(isinstance(block.get(name), nn.Module) for name in _LATENT)


def gate_scores(block: nn.Module, num_experts: int) -> ScoresFn | None:
    """What `block`'s router ranks experts by, as a function of its input, or None for a gate that is not known.

    The input is the experts': a block that projects it for them has no such function. A gate is a linear layer, or has a
    weight [E, D]. With a selection bias (DeepSeek-V3 and its kin) the scores are
    sigmoid(logits) + bias, else softmax(logits). Float32. Group limits are left out.
    """
    if not experts_see_the_input(block):
        return None
    gate: Any = block.get("gate", block.get("router"))
    if isinstance(gate, nn.Linear | nn.QuantizedLinear):
        return lambda x: mx.softmax(gate(x).astype(mx.float32), axis=-1)
    weight = gate.get("weight") if isinstance(gate, nn.Module) else None
    if not isinstance(weight, mx.array) or weight.ndim != 2 or weight.shape[0] != num_experts:
        return None
    bias = gate.get("e_score_correction_bias")
    if bias is None:
        return lambda x: mx.softmax((x @ weight.T).astype(mx.float32), axis=-1)
    return lambda x: mx.sigmoid((x @ weight.T).astype(mx.float32)) + bias
