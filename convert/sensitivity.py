"""What an error in a matrix costs, before any calibration: the weight of each tensor class in the expected loss.

expected loss = sum over matrices of weight * ||W - W_hat||^2 / ||W||^2. The weights were fitted once to the measured KLD
(nats per token) of the project's trained test model when one class alone was quantized at 3 and 4 bits
(docs/quantization.md has the table), so the sum is on the scale of a KLD for that model and a relative measure for
others. Within a class every layer counts the same, and within a layer's experts each in proportion to its own energy.
"""

from __future__ import annotations

from collections.abc import Sequence

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
