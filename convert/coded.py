"""A layer as it is coded: what the passes hand from coding to polishing, to the disk and to the files.

Shapes: E experts, N rows, K columns, G group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import mlx.core as mx
import numpy as np

from mlxmoe.convert.polish import Stored, View
from mlxmoe.convert.quantize import Affine
from mlxmoe.convert.source import TrunkTensor
from mlxmoe.convert.write import Packed
from mlxmoe.formats import LEVELS, NARROW_LEVELS, PackedMatrix, num_planes
from mlxmoe.plan import LayerPlan
from mlxmoe.rotation import Rotation

_FIELDS = ("codes", "scales", "biases")


@dataclass
class CodedLayer:
    """trunk: quantized tensors by name. experts: projection by projection, empty in a layer without any. copies: the same
    of further copies, None where an expert has none. routers: float32 tensors by name that are not those of the source."""

    trunk: dict[str, Affine] = field(default_factory=dict)
    experts: list[list[Packed]] = field(default_factory=list)
    copies: list[list[Packed | None]] = field(default_factory=list)
    routers: dict[str, np.ndarray] = field(default_factory=dict)

    def by_expert(self) -> Iterator[list[Packed | None]]:
        """The matrices of every expert in turn."""
        return map(list, zip(*self.experts, *self.copies, strict=True))

    def stored(
        self, tensors: Sequence[TrunkTensor], layer: LayerPlan | None, rotations: Sequence[Rotation]
    ) -> dict[str, Stored]:
        """The matrices whose scales can be refined, by the path of their module; rotations: of each projection. The
        embedding has no inputs, what is stacked by heads has no gradient of its own, and what is written as it is has no
        scales: they stay."""
        found = {}
        for tensor in tensors:
            if tensor.name in self.trunk and len(tensor.shape) == 2 and tensor.tensor_class != "embedding":
                found[tensor.module] = Stored.trunk(self.trunk[tensor.name], tensor.shape)
        if layer is not None:
            for shape, matrices, rotation in zip(layer.projections, self.experts, rotations, strict=True):
                found[f"{layer.path}.{shape.name}"] = Stored.experts([m.matrix for m in matrices], rotation)
        return found

    def views(self, stored: dict[str, Stored], layer: LayerPlan | None, mu: float) -> list[View]:
        """What `stored` gave for this layer as it is written and, with mu > 0, at every level below, which count mu in
        all."""
        whole = View(1.0, stored)
        if layer is None or mu == 0:
            return [whole]
        projections = {f"{layer.path}.{s.name}": m for s, m in zip(layer.projections, self.experts, strict=True)}
        highest = max(packed.matrix.level for packed in chain(*self.experts))
        lower = [level for level in NARROW_LEVELS if level < highest]

        def lowered(level: int) -> dict[str, Stored]:
            experts = {path: stored[path].lowered([m.matrix for m in own], level) for path, own in projections.items()}
            return stored | experts

        return [whole, *(View(mu / len(lower), lowered(level)) for level in lower)]

    def take(self, stored: Mapping[str, Stored], layer: LayerPlan | None) -> None:
        """Takes the scales and biases of what `stored` gave for this layer."""
        for p, shape in enumerate(layer.projections if layer is not None else ()):
            refined = stored[f"{layer.path}.{shape.name}"]  # type: ignore[union-attr]
            self.experts[p] = [
                packed._replace(matrix=refined.repacked(e, packed.matrix)) for e, packed in enumerate(self.experts[p])
            ]
        for name, coded in self.trunk.items():
            path = name.removesuffix(".weight")
            if path in stored:
                self.trunk[name] = stored[path].recoded(coded)

    def trunk_arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` reads: the trunk and the routers."""
        arrays = {f"{name}/{part}": getattr(coded, part) for name, coded in self.trunk.items() for part in _FIELDS}
        return arrays | {f"{name}/values": values for name, values in self.routers.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> CodedLayer:
        """Without experts."""
        layer = cls()
        for key in arrays:
            name, _, part = key.rpartition("/")
            if part == "values":
                layer.routers[name] = arrays[key]
            elif part == "codes":
                layer.trunk[name] = Affine(arrays[key], arrays[f"{name}/scales"], arrays[f"{name}/biases"], 0.0)
        return layer

    def expert_arrays(self) -> dict[str, np.ndarray]:
        """What `take_experts` reads."""
        arrays: dict[str, np.ndarray] = {}
        for p, matrices in enumerate(self.experts):
            for e, (matrix, errors) in enumerate(matrices):
                gains = [matrix.gains[low] for low in LEVELS[: num_planes(matrix.level) - 1]]
                parts = {"scales": np.array(matrix.scales), "gains": np.array(gains), "errors": np.array(errors)}
                parts |= {f"plane{n}": np.array(words) for n, words in enumerate(matrix.planes)}
                arrays |= {f"{p}.{e}.{name}": values for name, values in parts.items()}
        return arrays

    def take_experts(self, arrays: Mapping[str, np.ndarray], layer: LayerPlan) -> None:
        """The experts that `expert_arrays` kept."""
        self.experts = []
        for p, shape in enumerate(layer.projections):
            matrices = []
            for e, planned in enumerate(layer.experts):
                level = planned.levels[p]
                own = {name: arrays[f"{p}.{e}.{name}"] for name in ("scales", "gains", "errors")}
                planes = [mx.array(arrays[f"{p}.{e}.plane{n}"]) for n in range(num_planes(level))]
                gains = dict(zip(LEVELS, map(float, own["gains"]), strict=False))
                matrix = PackedMatrix(shape, level, planes, mx.array(own["scales"]), gains)
                matrices.append(Packed(matrix, tuple(map(float, own["errors"]))))
            self.experts.append(matrices)
