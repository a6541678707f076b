"""The MoE block of a layer in three kernels beside its router's matrix product: FusedBlock.

mlx-lm's block leaves softmax, partition, gathering, normalisation, weighting and the sum to one built-in each; here
`route` chooses and weights the experts and `expert_down` sums their outputs. `fused_block` reads the routing rule off a
built block of mlx-lm 0.32.2 and leaves alone what it does not know exactly, as a gate whose arithmetic mlxmoe.models
should have corrected and has not.

Shapes: T tokens, E experts, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
)

from mlxmoe.experts import KernelExperts
from mlxmoe.kernels import ExpertBanks, MetalKernels, ReferenceKernels
from mlxmoe.models import GroupLimitedGate
from mlxmoe.router import Router

# Gates that choose experts themselves, from a bare weight [E, D] and (but for V2's) a selection bias [E]
_SIGMOID_EPSILON: dict[type, float] = {  # added to the sum of the chosen scores
    GroupLimitedGate: 1e-20,
    deepseek_v3.MoEGate: 0.0,
    glm4_moe.MoEGate: 0.0,
    glm4_moe_lite.MoEGate: 1e-20,
}
_SELECTING_GATES = (deepseek_v2.MoEGate, *_SIGMOID_EPSILON)
# What the blocks call the experts that every token goes to; with a gate, their output is weighted by its sigmoid
_SHARED = ("shared_experts", "shared_expert", "shared_expert_gate")


class FusedBlock(nn.Module):
    """Stands where `block` was, computes the same and is called the same way; its children keep their names.

    What `block` computes in 16 bits between the router's logits and the weighted sum is float32 here, so experts whose
    scores agree to 16 bits may be chosen in another order. The result has the type of the input.
    """

    def __init__(
        self,
        block: Any,
        gate_name: str,
        router: Router,
        banks: ExpertBanks,
        kernels: MetalKernels | ReferenceKernels,
    ):
        super().__init__()
        self._gate_name, self._router, self._kernels = gate_name, router, kernels
        self.experts = KernelExperts(banks, kernels)
        for name in (gate_name, *_SHARED):
            if name in block:
                setattr(self, name, block[name])

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., D] -> [..., D]."""
        rows = x.reshape(-1, x.shape[-1])
        gate = self[self._gate_name]
        selecting = isinstance(gate, _SELECTING_GATES)
        logits = rows @ gate.weight.T if selecting else gate(rows)
        bias = gate.get("e_score_correction_bias") if selecting else None
        routing = self._kernels.route(logits, bias, self._router)
        y = self.experts.weighted(rows, routing.experts, routing.weights).reshape(x.shape)
        if "shared_experts" in self:
            return y + self.shared_experts(x)
        if "shared_expert" in self:
            return y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y


def fused_block(
    block: nn.Module, banks: ExpertBanks, kernels: MetalKernels | ReferenceKernels, family: str
) -> FusedBlock | None:
    """The replacement of an MoE block whose experts are `banks`, sharing its other modules, or None for a block whose
    routing is not known exactly, or not to the kernels. `family` is the name of its module in mlx-lm. Reads no data."""
    known = _FAMILIES.get(family)
    if known is None or type(block) is not known.block or getattr(block, "sharding_group", None) is not None:
        return None
    try:
        router = known.router(block, banks.gate.num_experts)
    except ValueError:  # the kernel has no room for so many experts, or the rule makes sense to mlx-lm only
        return None
    return FusedBlock(block, known.gate_name, router, banks, kernels) if router is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# Routing rules. Each reads a block of its family; None: not this one.
# ---------------------------------------------------------------------------------------------------------------------


def _softmax(block: Any, num_experts: int) -> Router | None:
    """Softmax over all experts; normalised if the block says so (Qwen2's has no such setting)."""
    return Router(num_experts, block.top_k, normalise=bool(getattr(block, "norm_topk_prob", False)))


def _softmax_chosen(block: Any, num_experts: int) -> Router | None:
    """The best logits, and the softmax of those alone."""
    return Router(num_experts, block.num_experts_per_tok, "softmax_chosen")


def _softmax_groups(block: Any, num_experts: int) -> Router | None:
    """DeepSeek-V2: softmax over all experts, chosen from the groups with the best single experts, not normalised."""
    gate = block.gate
    kind: type = type(gate)
    if kind is not deepseek_v2.MoEGate or gate.topk_method not in ("greedy", "group_limited_greedy"):
        return None
    groups, top_groups = (1, 1) if gate.topk_method == "greedy" else (gate.n_group, gate.topk_group)
    scaling = gate.routed_scaling_factor
    return Router(num_experts, gate.top_k, "softmax", groups, top_groups, group_score="max", scaling=scaling)


def _sigmoid_groups(block: Any, num_experts: int) -> Router | None:
    """DeepSeek-V3 and its kin: sigmoid, selection bias, groups by the sum of their two best."""
    gate = block.gate
    epsilon, corrected = _SIGMOID_EPSILON.get(type(gate)), type(gate) is GroupLimitedGate
    # mlx-lm's own gates score the experts of rejected groups 0, above a negative biased score
    if epsilon is None or (gate.topk_group < gate.n_group and not corrected):
        return None
    return Router(
        num_experts,
        gate.top_k,
        "sigmoid",
        gate.n_group,
        gate.topk_group,
        normalise=bool(gate.norm_topk_prob) and (gate.top_k > 1 or corrected),  # mlx-lm's own: not a single expert
        epsilon=epsilon,
        scaling=gate.routed_scaling_factor,
    )


class _Family(NamedTuple):
    """The class of a family's block, how its routing rule is read, and the name of its router's matrix."""

    block: type[nn.Module]
    router: Callable[[Any, int], Router | None]
    gate_name: str = "gate"


_FAMILIES = {
    "qwen2_moe": _Family(qwen2_moe.Qwen2MoeSparseMoeBlock, _softmax),
    "qwen3_moe": _Family(qwen3_moe.Qwen3MoeSparseMoeBlock, _softmax),
    "qwen3_next": _Family(qwen3_next.Qwen3NextSparseMoeBlock, _softmax),
    "qwen3_5_moe": _Family(qwen3_next.Qwen3NextSparseMoeBlock, _softmax),
    "olmoe": _Family(olmoe.OlmoeSparseMoeBlock, _softmax),
    "mixtral": _Family(mixtral.MixtralSparseMoeBlock, _softmax_chosen),
    "gpt_oss": _Family(gpt_oss.MLPBlock, _softmax_chosen, "router"),
    "deepseek_v2": _Family(deepseek_v2.DeepseekV2MoE, _softmax_groups),
    "deepseek_v3": _Family(deepseek_v3.DeepseekV3MoE, _sigmoid_groups),
    "glm4_moe": _Family(glm4_moe.MoE, _sigmoid_groups),
    "glm4_moe_lite": _Family(glm4_moe_lite.Glm4MoeLiteMoE, _sigmoid_groups),
}
