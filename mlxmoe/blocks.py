"""The MoE block of a layer in three kernels beside its router's matrix product, and its shared experts: FusedBlock.

mlx-lm's block leaves softmax, partition, gathering, normalisation, weighting and the sum to one built-in each; here
`route` chooses and weights the experts and `expert_down` sums their outputs. `fused_block` reads the routing rule off a
built block of mlx-lm 0.32.2 and leaves alone what it does not know exactly, as a gate whose arithmetic mlxmoe.models
should have corrected and has not.

Shapes: T tokens, E experts, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    ernie4_5_moe,
    gemma4_text,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    lfm2_moe,
    minimax,
    mixtral,
    nemotron_h,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
)

from mlxmoe.experts import KernelExperts
from mlxmoe.kernels import ExpertBanks, MetalKernels, ReferenceKernels
from mlxmoe.models import GroupLimitedGate
from mlxmoe.router import Router

# Gates with sigmoid scores: what they add to the sum of the chosen ones
_SIGMOID_EPSILON: dict[type, float] = {
    GroupLimitedGate: 1e-20,
    deepseek_v3.MoEGate: 0.0,
    deepseek_v32.MoEGate: 0.0,
    glm4_moe.MoEGate: 0.0,
    glm4_moe_lite.MoEGate: 1e-20,
    nemotron_h.MoEGate: 1e-20,
}
# A selection bias [E], in the gate or in the block
_BIASES = ("e_score_correction_bias", "expert_bias")
# What the blocks call the experts that every token goes to; with a gate, their output is weighted by its sigmoid
_SHARED = ("shared_experts", "shared_expert", "shared_expert_gate")
# Nemotron's products around the routed experts, where those are narrower than the model
_LATENT = ("fc1_latent_proj", "fc2_latent_proj")


class FusedBlock(nn.Module):
    """Stands where `block` was, computes the same and is called the same way; its children keep their names.

    What `block` computes in 16 bits between the router's logits and the weighted sum is float32 here: of experts whose
    scores agree to 16 bits the better one is chosen. The result has the type of the input.
    """

    def __init__(
        self,
        block: Any,
        family: _Family,
        router: Router,
        banks: ExpertBanks,
        kernels: MetalKernels | ReferenceKernels,
    ):
        super().__init__()
        self._family, self._router, self._kernels = family, router, kernels
        self.experts = KernelExperts(banks, kernels)
        for name in (family.gate_name, *_BIASES, *_SHARED, *_LATENT):
            if name in block:
                setattr(self, name, block[name])

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., D] -> [..., D]."""
        rows = x.reshape(-1, x.shape[-1])
        gate: Any = self[self._family.gate_name]
        bias = next((owner[name] for owner in (gate, self) for name in _BIASES if name in owner), None)
        routing = self._kernels.route(self._family.logits(gate, rows), bias, self._router)
        inputs = self.fc1_latent_proj(x) if "fc1_latent_proj" in self else x
        y = self.experts.weighted(inputs, routing.experts, routing.weights)
        if "fc2_latent_proj" in self:
            y = self.fc2_latent_proj(y)
        if "shared_experts" in self:
            return y + self.shared_experts(x)
        if "shared_expert" in self:
            return _add_gated(y, self.shared_expert_gate(x), self.shared_expert(x))
        return y


@partial(mx.compile, shapeless=True)
def _add_gated(y: mx.array, gate: mx.array, shared: mx.array) -> mx.array:
    """y and shared [..., D], gate [..., 1] -> y + sigmoid(gate) * shared, in one kernel."""
    return y + mx.sigmoid(gate) * shared


class WeightedExperts(nn.Module):
    """Stands where Gemma 4 has its Experts, whose router is a module beside them: the weighted sum is a kernel too."""

    def __init__(self, banks: ExpertBanks, kernels: MetalKernels | ReferenceKernels):
        super().__init__()
        self.experts = KernelExperts(banks, kernels)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [..., D], experts (uint32) and router weights [..., A] -> [..., D]."""
        active = experts.shape[-1]
        rows = x.reshape(-1, x.shape[-1])
        return self.experts.weighted(rows, experts.reshape(-1, active), weights.reshape(-1, active)).reshape(x.shape)


def fused_block(
    block: nn.Module, banks: ExpertBanks, kernels: MetalKernels | ReferenceKernels, family: str
) -> FusedBlock | WeightedExperts | None:
    """The replacement of an MoE block whose experts are `banks`, sharing its other modules, or None for a block whose
    routing is not known exactly, or not to the kernels. `family` is the name of its module in mlx-lm. Reads no data."""
    if family in ("gemma4", "gemma4_text") and type(block) is gemma4_text.Experts:
        return WeightedExperts(banks, kernels)
    known = _FAMILIES.get(family)
    if known is None or type(block) is not known.block or getattr(block, "sharding_group", None) is not None:
        return None
    try:
        router = known.router(block, banks.gate.num_experts)
    except ValueError:  # the kernel has no room for so many experts, or the rule makes sense to mlx-lm only
        return None
    return FusedBlock(block, known, router, banks, kernels) if router is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# Routing rules. Each reads a block of its family; None: not this one.
# ---------------------------------------------------------------------------------------------------------------------


def _softmax(block: Any, num_experts: int) -> Router | None:
    """Softmax over all experts; normalised if the block says so (Qwen2's has no such setting)."""
    return Router(num_experts, block.top_k, normalise=bool(getattr(block, "norm_topk_prob", False)))


def _softmax_normalised(block: Any, num_experts: int) -> Router | None:
    """ERNIE: the same, always normalised. (Its lower bound of 1e-12 for the sum is far below the best softmax score.)"""
    return Router(num_experts, block.k, normalise=True) if type(block.gate_act) is nn.Softmax else None


def _softmax_chosen(block: Any, num_experts: int) -> Router | None:
    """The best logits, and the softmax of those alone."""
    return Router(num_experts, block.num_experts_per_tok, "softmax_chosen")


def _softmax_chosen_by_gate(block: Any, num_experts: int) -> Router | None:
    """The same; Granite's router knows how many."""
    return Router(num_experts, block.router.top_k, "softmax_chosen")


def _sparsemixer(block: Any, num_experts: int) -> Router | None:
    """Phi-3.5: each expert's weight is its share in the softmax of those near it that are not chosen before it."""
    return Router(num_experts, block.top_k, "sparsemixer", epsilon=block.jitter_eps)


def _sigmoid_biased(block: Any, num_experts: int) -> Router | None:
    """MiniMax: sigmoid, selection bias, always normalised."""
    return Router(num_experts, block.num_experts_per_tok, "sigmoid", normalise=True, epsilon=1e-20)


def _sigmoid_scaled(block: Any, num_experts: int) -> Router | None:
    """LFM2: sigmoid, a selection bias or none, scaled."""
    return Router(
        num_experts,
        block.top_k,
        "sigmoid",
        normalise=bool(block.norm_topk_prob),
        epsilon=1e-6,
        scaling=block.routed_scaling_factor,
    )


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


# ---------------------------------------------------------------------------------------------------------------------
# Logits. What each router makes of rows [T, D]: [T, E].
# ---------------------------------------------------------------------------------------------------------------------


def _linear(gate: Any, rows: mx.array) -> mx.array:
    return gate(rows)


def _linear_in_float32(gate: Any, rows: mx.array) -> mx.array:
    return gate(rows.astype(mx.float32))


def _linear_inside(gate: Any, rows: mx.array) -> mx.array:
    """Granite's."""
    return gate.layer(rows)


def _bare_weight(gate: Any, rows: mx.array) -> mx.array:
    """Gates that are called for experts, not for logits."""
    return rows @ gate.weight.T


class _Family(NamedTuple):
    """The class of a family's block, how its routing rule is read, and how its router's logits are computed."""

    block: type[nn.Module]
    router: Callable[[Any, int], Router | None]
    logits: Callable[[Any, mx.array], mx.array] = _linear
    gate_name: str = "gate"


_FAMILIES = {
    "qwen2_moe": _Family(qwen2_moe.Qwen2MoeSparseMoeBlock, _softmax),
    "qwen3_moe": _Family(qwen3_moe.Qwen3MoeSparseMoeBlock, _softmax),
    "qwen3_vl_moe": _Family(qwen3_moe.Qwen3MoeSparseMoeBlock, _softmax),
    "qwen3_next": _Family(qwen3_next.Qwen3NextSparseMoeBlock, _softmax),
    "qwen3_5_moe": _Family(qwen3_next.Qwen3NextSparseMoeBlock, _softmax),
    "olmoe": _Family(olmoe.OlmoeSparseMoeBlock, _softmax),
    "ernie4_5_moe": _Family(ernie4_5_moe.Ernie4_5_MoeMLP, _softmax_normalised),
    "mixtral": _Family(mixtral.MixtralSparseMoeBlock, _softmax_chosen),
    "gpt_oss": _Family(gpt_oss.MLPBlock, _softmax_chosen, gate_name="router"),
    "granitemoe": _Family(granitemoe.GraniteMoeMoE, _softmax_chosen_by_gate, _linear_inside, "router"),
    "phimoe": _Family(phimoe.PhiMoESparseMoeBlock, _sparsemixer),
    "minimax": _Family(minimax.MiniMaxSparseMoeBlock, _sigmoid_biased, _linear_in_float32),
    "lfm2_moe": _Family(lfm2_moe.Lfm2MoeSparseMoeBlock, _sigmoid_scaled),
    "deepseek_v2": _Family(deepseek_v2.DeepseekV2MoE, _softmax_groups, _bare_weight),
    "deepseek_v3": _Family(deepseek_v3.DeepseekV3MoE, _sigmoid_groups, _bare_weight),
    "deepseek_v32": _Family(deepseek_v32.DeepseekV32MoE, _sigmoid_groups, _bare_weight),
    "glm_moe_dsa": _Family(deepseek_v32.DeepseekV32MoE, _sigmoid_groups, _bare_weight),
    "kimi_vl": _Family(deepseek_v3.DeepseekV3MoE, _sigmoid_groups, _bare_weight),
    "kimi_k25": _Family(deepseek_v3.DeepseekV3MoE, _sigmoid_groups, _bare_weight),
    "glm4_moe": _Family(glm4_moe.MoE, _sigmoid_groups, _bare_weight),
    "glm4_moe_lite": _Family(glm4_moe_lite.Glm4MoeLiteMoE, _sigmoid_groups, _bare_weight),
    "nemotron_h": _Family(nemotron_h.NemotronHMoE, _sigmoid_groups, _bare_weight),
}
