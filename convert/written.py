"""A converted folder as LayerStream reads one: every matrix as its codes give it back, rotations undone.

So what runs on an original checkpoint layer by layer runs on a converted one. Lazily, like source.py: a matrix is read and
decoded when it is evaluated. Unlike the runtime it computes with dequantized weights, which differ by rounding, and takes no
notice of checksums; everything that is written counts, whatever a memory budget would leave of it.

Shapes: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.convert.source import Source, dequantized
from mlxmoe.errors import UserError
from mlxmoe.formats import GROUP_SIZES, PLANE_WIDTHS, dequantize_codes, join_planes, num_planes, unpack_codes
from mlxmoe.models import ExpertSite, expert_sites, model_classes
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.prepared import activation_dtype, cast_floats
from mlxmoe.rotation import STORED, Rotation, dense, plain_rotation, rotation_signs
from mlxmoe.store import record_name, record_parts, rotation_matrices

Arrays = dict[str, mx.array]


class Written:
    """Like Source, of a folder with a plan. Raises UserError where model and plan do not belong together."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.plan = Plan.load(checkpoint.folder)
        if any(layer.replicas is not None for layer in self.plan.layers):
            raise UserError(
                f"{checkpoint.name} has copies of experts, whose sum is no matrix: it cannot be read layer by layer",
                "mlxmoe eval measures it as a whole; mlxmoe report without --reference shows what was written",
            )
        model_class, args_class = model_classes(checkpoint.config)
        self.build: Callable[[], Any] = lambda: model_class(args_class.from_dict(checkpoint.config))  # type: ignore[call-arg]
        model = self.build()
        self.sites: list[ExpertSite] = expert_sites(model)
        self._modules = dict(model.named_modules())
        written = {(layer.path, len(layer.experts)) for layer in self.plan.layers}
        if written != {(site.path, site.num_experts) for site in self.sites}:
            raise UserError(
                f"{checkpoint.name}: config.json and plan.json do not belong together", "convert the model again"
            )

    def tensors(self) -> Arrays:
        """All tensors under the model's names, lazy; of 16 or 32 bits."""
        loaded: Arrays = {}
        for shard in self.checkpoint.shards:
            loaded.update(cast(Arrays, mx.load(str(shard))))
        # As the runtime has them: scales in the activations' precision, so that weights are not rounded once more
        dtype = activation_dtype(self.checkpoint.config)
        tensors = dequantized({name: cast_floats(array, dtype) for name, array in loaded.items()}, self._modules)
        for layer in self.plan.layers:
            tensors.update(self._experts(layer))
        return tensors

    def _experts(self, layer: LayerPlan) -> Iterator[tuple[str, mx.array]]:
        """Names and stacks [E, N, K] of one layer's projections."""
        records = cast(Arrays, mx.load(str(self.checkpoint.folder / layer.file)))
        rotations = _rotations(layer, records)
        dtype = activation_dtype(self.checkpoint.config)
        for p, shape in enumerate(layer.projections):
            stack = mx.stack([_matrix(layer, records, e, p) for e in range(len(layer.experts))])
            rotation = rotations["hidden" if p == len(layer.projections) - 1 else "inputs"]
            if rotation is not None:
                stack = stack @ mx.array(dense(rotation))
            yield f"{layer.path}.{shape.name}.weight", stack.astype(dtype)


def open_weights(checkpoint: Checkpoint) -> Source | Written:
    """What a LayerStream can read any checkpoint through. Raises UserError for one that it cannot read layer by layer."""
    if checkpoint.kind == "converted":
        return Written(checkpoint)
    if checkpoint.kind == "repacked":
        raise UserError(
            f"{checkpoint.name} is repacked, and repacked folders cannot be read layer by layer",
            "name the checkpoint that it was made from: its weights are the same",
        )
    return Source(checkpoint, max(GROUP_SIZES))


def _matrix(layer: LayerPlan, records: Arrays, expert: int, projection: int) -> mx.array:
    """float32 [N, K] as it lies in the file: behind the rotation, if there is one."""
    entry, shape = layer.experts[expert], layer.projections[projection]
    level = entry.levels[projection]

    def part(plane: int, field: str) -> mx.array:
        record = records[record_name(layer.layer, expert, plane)]
        (found,) = (
            part for part in record_parts(layer, entry, plane) if (part.projection, part.field) == (projection, field)
        )
        return record[found.offset : found.offset + found.nbytes]

    planes = [
        unpack_codes(part(j, "words").view(mx.uint32).reshape(shape.rows, -1), PLANE_WIDTHS[j], shape.columns)
        for j in range(num_planes(level))
    ]
    scales = part(0, "scales").view(mx.float16).reshape(shape.rows, -1)
    return dequantize_codes(join_planes(planes), scales, level)


def _rotations(layer: LayerPlan, records: Arrays) -> dict[str, Rotation | None]:
    """By place: what the columns of the stored matrices expect of the inputs and of the hidden values."""
    stored = {matrix.place: matrix.name for matrix in rotation_matrices(layer)}
    found: dict[str, Rotation | None] = {}
    for (place, rule), columns in zip(layer.rotations._asdict().items(), layer.rotated_columns, strict=True):
        if rule.name == "none":
            found[place] = None
        elif rule.name in STORED:
            block = np.array(records[stored[place]].astype(mx.float32))
            found[place] = Rotation(rule.name, rotation_signs(rule.name, columns, rule.seed), block)
        else:
            found[place] = plain_rotation(rule.name, columns, rule.seed)
    return found
