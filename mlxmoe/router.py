"""What a router does after its matrix product: which experts a token goes to, and with which weights.

Router is the rule as data, `route` its meaning in plain MLX built-ins; the Metal kernel is in kernels.py.

Shapes: T tokens, E experts, A active experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

# softmax_chosen: softmax over the chosen experts' logits only. sparsemixer: an expert's weight is its share in the softmax
# of the experts that are not chosen before it and whose logits are near its own (Phi-3.5, as mlx-lm's phimoe computes it)
SCORES = ("softmax", "sigmoid", "softmax_chosen", "sparsemixer")
GROUP_SCORES = ("max", "top2")  # DeepSeek-V2 takes a group's best expert, V3 the sum of its two best
MAX_EXPERTS = 1024
MAX_GROUPS = 32
MAX_TOP_K = 32


@dataclass(frozen=True)
class Router:
    """The routing rule of an architecture.

    Experts are chosen by their logits or, where there is a selection bias, by score + bias; the bias is no part of the
    weights. With groups (of neighbouring experts, all of one size) only experts of the `top_groups` best groups are
    chosen from. Among equals the lowest index is chosen; chosen experts are in descending order. Weights are
    score / (sum of chosen scores + epsilon), or the score itself without `normalise`, times `scaling`. For sparsemixer
    epsilon is the jitter: near a logit g are those with g - other <= 2 epsilon max(|other|, g).
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    normalise: bool = False
    epsilon: float = 0.0
    scaling: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a rule that makes no sense, or that the kernel has no room for."""
        in_groups = self.num_experts // self.num_groups if self.num_groups > 0 else 0
        sound = (
            self.score in SCORES
            and self.group_score in GROUP_SCORES
            and 1 <= self.num_experts <= MAX_EXPERTS
            and 1 <= self.top_groups <= self.num_groups <= MAX_GROUPS
            and in_groups * self.num_groups == self.num_experts
            and (self.top_groups == self.num_groups or self.group_score == "max" or in_groups >= 2)
            and 1 <= self.top_k <= min(in_groups * self.top_groups, MAX_TOP_K)
            and (self.score != "sparsemixer" or (self.num_groups == 1 and not self.normalise))
        )
        if not sound:
            raise ValueError(f"no router can do this: {self}")


class Routing(NamedTuple):
    """experts uint32 [T, A] in descending order of selection, weights float32 [T, A]."""

    experts: mx.array
    weights: mx.array


def route(logits: mx.array, bias: mx.array | None, router: Router) -> Routing:
    """logits [T, E] of any float type, selection bias [E] or None -> Routing. In float32."""
    logits = logits.astype(mx.float32)
    if router.score == "sigmoid":
        scores = mx.sigmoid(logits)
    elif router.score == "softmax":
        scores = mx.softmax(logits, axis=-1)
    else:
        scores = logits
    chosen_by = logits if bias is None else scores + bias.astype(mx.float32)
    if router.top_groups < router.num_groups:
        grouped = chosen_by.reshape(*logits.shape[:-1], router.num_groups, -1)
        best = mx.sort(grouped, axis=-1)[..., -1 if router.group_score == "max" else -2 :]
        rank = _ranks(best.sum(axis=-1))
        chosen_by = mx.where((rank < router.top_groups)[..., None], grouped, -mx.inf).reshape(logits.shape)
    ranks = _ranks(chosen_by)
    experts = mx.argsort(ranks, axis=-1)[..., : router.top_k]
    weights = mx.take_along_axis(scores, experts, axis=-1)
    if router.score == "softmax_chosen":
        weights = mx.softmax(weights, axis=-1)
    if router.score == "sparsemixer":
        weights = _shares(logits, ranks, weights, router.epsilon)
    if router.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + router.epsilon)
    return Routing(experts.astype(mx.uint32), weights * router.scaling)


def _ranks(values: mx.array) -> mx.array:
    """How many values of the last axis come before each: those that are larger, and equal ones of a lower index."""
    mine, other = values[..., :, None], values[..., None, :]
    index = mx.arange(values.shape[-1])
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return before.sum(axis=-1)


def _shares(logits: mx.array, ranks: mx.array, chosen: mx.array, jitter: float) -> mx.array:
    """logits and their ranks [T, E], chosen logits [T, A] in their order -> the share of each among those near it that
    are not chosen before it."""
    top, others = chosen[..., :, None], logits[..., None, :]
    left = ranks[..., None, :] >= mx.arange(chosen.shape[-1])[:, None]
    near = top - others <= 2 * jitter * mx.maximum(mx.abs(others), top)
    return 1 / mx.where(left & near, mx.exp(others - top), 0).sum(axis=-1)
