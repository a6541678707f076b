"""Stage 1, measure: the squared error of every matrix at every level it could be written at, by the real quantizer.

One artefact per layer (`measure-<layer>.npz`) and one for the trunk, so that a conversion that was killed goes on at the
layer where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.convert.config import AS_IS_BITS, TRUNK_BITS, ConvertConfig
from mlxmoe.convert.quantize import affine_search, clip_search
from mlxmoe.convert.rotate import UNTURNED, Rotated, longest_rules
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.errors import UserError
from mlxmoe.models import ExpertSite
from mlxmoe.rotation import UNROTATED, LayerRotations, rotate

_BLOCK_WEIGHTS = 1 << 23  # trunk tensors are converted to float32 in blocks of 32 MiB

Progress = Callable[[int], object]  # called with the number of weights just done


class ExpertScores(NamedTuple):
    """What calibration text says of one layer's experts beside the loss (scores.py). Means over all tokens of the text.

    output [P, E, levels]: squared error of the gate-weighted output of an expert, this projection alone quantized.
    outputs [E]: the same of the output itself. weight [P, E, levels]: squared error of the weights. energy [P, E]: the same
    of the weights themselves. frequency [E]: share of the tokens. contribution [E]: norm of the gate-weighted output.
    massive [E]: share of massive activations.
    """

    output: np.ndarray
    outputs: np.ndarray
    weight: np.ndarray
    energy: np.ndarray
    frequency: np.ndarray
    contribution: np.ndarray
    massive: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """[P, E, levels]: relative squared error of the weights."""
        return self.weight / np.where(self.energy > 0, self.energy, 1.0)[..., None]


class ExpertErrors(NamedTuple):
    """Of one layer: squared norms [P, E] and squared errors [P, E, levels], float64. weights [P, E]: what a relative error
    of 1 costs; None: the rule of sensitivity.py. scores: where the configuration asks for them. rotations: that the errors
    were measured behind."""

    norms: np.ndarray
    errors: np.ndarray
    weights: np.ndarray | None = None
    scores: ExpertScores | None = None
    rotations: LayerRotations = UNROTATED


class TrunkErrors(NamedTuple):
    """Of the quantizable trunk, in Source order: squared norms [tensors] and squared errors [tensors, formats], where
    the formats of a tensor are `candidate_formats` (fewer than the array has columns for a tensor with one group size).
    weights [tensors]: what a relative error of 1 costs; None: the rule of sensitivity.py."""

    norms: np.ndarray
    errors: np.ndarray
    weights: np.ndarray | None = None


class TrunkFormat(NamedTuple):
    """How a trunk tensor is stored in MLX's affine layout."""

    bits: int
    group_size: int


AS_IS = TrunkFormat(AS_IS_BITS, 0)  # what stands in the plan for a tensor that is written as the source has it


def candidate_formats(tensor: TrunkTensor) -> list[TrunkFormat]:
    """Every width with every group size that fits the tensor."""
    return [TrunkFormat(bits, group_size) for bits in TRUNK_BITS for group_size in tensor.group_sizes]


def measure_layer(
    source: Source,
    tensors: dict[str, mx.array],
    site: ExpertSite,
    levels: tuple[int, ...],
    progress: Progress,
    rotated: Rotated = UNTURNED,
) -> ExpertErrors:
    """Errors of one layer's experts, coded behind rotations. Takes the layer's stacks out of `tensors`."""
    shapes = source.shapes[site.path]
    norms = np.zeros((len(shapes), site.num_experts))
    errors = np.zeros((len(shapes), site.num_experts, len(levels)))
    for p, shape in enumerate(shapes):
        for e, weight in enumerate(source.experts(tensors, site, shape.name)):
            groups = rotate(weight, rotated.of(p, len(shapes))).reshape(-1, shape.group_size)
            norms[p, e] = np.vdot(groups, groups)
            for i, level in enumerate(levels):
                errors[p, e, i] = clip_search(groups, level)[1].sum(dtype=np.float64)
            progress(weight.size)
    return ExpertErrors(norms, errors)


def row_blocks(name: str, array: mx.array) -> Iterator[np.ndarray]:
    """A trunk tensor [..., K] as float32 [rows, K], some rows at a time. Raises UserError for values not finite."""
    rows = array.reshape(-1, array.shape[-1])
    step = max(1, _BLOCK_WEIGHTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        block = np.array(rows[start : start + step].astype(mx.float32))
        if not np.isfinite(block).all():
            raise UserError(f"{name} has values that are not finite", "the checkpoint is damaged: download it again")
        yield block


def measure_trunk(trunk: list[TrunkTensor], tensors: dict[str, mx.array], progress: Progress) -> TrunkErrors:
    """Errors of the quantizable trunk tensors, each evaluated once and dropped from `tensors`."""
    norms, errors = np.zeros(len(trunk)), np.zeros((len(trunk), 2 * len(TRUNK_BITS)))
    for t, tensor in enumerate(trunk):
        array = tensors.pop(tensor.name)
        mx.eval(array)
        for block in row_blocks(tensor.name, array):
            norms[t] += np.vdot(block, block)
            for i, (bits, group_size) in enumerate(candidate_formats(tensor)):
                errors[t, i] += affine_search(block.reshape(-1, group_size), bits).error
            progress(block.size)
    return TrunkErrors(norms, errors)


def check_finite(trunk: list[TrunkTensor], tensors: dict[str, mx.array]) -> None:
    """Raises UserError for values not finite in tensors that are written as they are. Takes them out of `tensors`."""
    for tensor in trunk:
        array = tensors.pop(tensor.name)
        for _ in row_blocks(tensor.name, array.reshape(-1, *array.shape[-1:])):
            pass


def unmeasured(source: Source, config: ConvertConfig) -> tuple[dict[int, ExpertErrors], TrunkErrors]:
    """Zeros in place of measurements: enough to know sizes."""
    rotations = longest_rules(config.rotation, config.seed)
    experts = {
        site.layer: ExpertErrors(
            np.zeros((len(source.shapes[site.path]), site.num_experts)),
            np.zeros((len(source.shapes[site.path]), site.num_experts, len(config.expert_levels))),
            rotations=rotations,
        )
        for site in source.sites
    }
    count = sum(tensor.tensor_class is not None for tensor in source.trunk)
    return experts, TrunkErrors(np.zeros(count), np.zeros((count, 2 * len(TRUNK_BITS))))
