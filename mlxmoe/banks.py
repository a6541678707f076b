"""From records on disk to what products read: merged buckets for MLX's built-ins, plane banks for the kernels.

Reads through ExpertStore, decides nothing: levels and widths come from residency.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxmoe.experts import Bucket, ExpertLayer
from mlxmoe.formats import LEVELS, MatrixShape, array_bytes, level_scale, merge_planes, num_planes, write_floats
from mlxmoe.kernels import PlaneBank
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.residency import Residency
from mlxmoe.store import ExpertStore, record_parts


def fill_buckets(
    layers: dict[str, ExpertLayer], folder: Path, plan: Plan, residency: Residency, dtype: mx.Dtype
) -> None:
    """Reads the resident planes and sets the buckets of every layer (module path -> layer)."""
    widths = {layer.path: row for layer, row in zip(plan.layers, residency.widths, strict=True)}
    for layer, projections in _read(folder, plan, residency):
        for p, (shape, projection) in enumerate(zip(layer.projections, projections, strict=True)):
            layers[layer.path][shape.name].fill(projection.buckets(widths[layer.path][p], dtype))


def plane_banks(
    layers: dict[str, ExpertLayer], folder: Path, plan: Plan, residency: Residency
) -> Iterator[tuple[str, list[PlaneBank]]]:
    """Reads the resident planes: (module path, a bank per projection) of every layer, with the layer's biases."""
    for layer, projections in _read(folder, plan, residency):
        module = layers[layer.path]
        yield (
            layer.path,
            [
                projection.plane_bank(module[shape.name].get("bias"))
                for shape, projection in zip(layer.projections, projections, strict=True)
            ],
        )


def _read(folder: Path, plan: Plan, residency: Residency) -> Iterator[tuple[LayerPlan, list[_Projection]]]:
    """One layer's records at a time."""
    with ExpertStore(folder, plan.layers) as store:
        for layer, levels in zip(plan.layers, residency.levels, strict=True):
            records = [
                [store.read(layer.layer, e, plane) for plane in range(max(map(num_planes, expert)))]
                for e, expert in enumerate(levels)
            ]
            yield (
                layer,
                [
                    _Projection(layer, p, records, [expert[p] for expert in levels])
                    for p in range(len(layer.projections))
                ],
            )


class MergedBank:
    """Expert matrices of one projection as MLX's built-in products read them: `arrays` is written in place, row by row.

    Allocates the memory. `write` touches bytes only, so any thread may call it, for rows that no graph is reading.
    """

    def __init__(self, shape: MatrixShape, bits: int, rows: int, dtype: mx.Dtype):
        self._shape, self._bits, self._dtype = shape, bits, dtype
        groups = shape.columns // shape.group_size
        words = mx.zeros((rows, shape.rows, shape.code_nbytes(bits) // 4 // shape.rows), mx.uint32)
        scales, biases = (mx.zeros((rows, shape.rows, groups), dtype) for _ in range(2))
        mx.eval(words, scales, biases)
        self.arrays = Bucket(bits, words, scales, biases)
        self._rows = [
            np.frombuffer(array_bytes(array), np.uint8).reshape(rows, -1) for array in (words, scales, biases)
        ]

    def write(self, row: int, planes: Sequence[np.ndarray], scales: np.ndarray, factor: float) -> None:
        """One expert: its first planes (uint8 as stored) and its stored scales float16, times `factor` at this level."""
        words, row_scales, row_biases = (rows[row] for rows in self._rows)
        words[:] = merge_planes(planes, self._bits)
        values = scales.astype(np.float32) * np.float32(factor)
        half = np.float32(((1 << LEVELS[len(planes) - 1]) - 1) / 2)
        write_floats(values, row_scales, self._dtype)
        write_floats(-half * values, row_biases, self._dtype)


class _Projection:
    """One projection of a layer's experts: from the records that were read to what a product reads."""

    def __init__(
        self,
        layer: LayerPlan,
        projection: int,
        records: list[list[np.ndarray]],
        levels: list[int],
    ):
        self._layer, self._projection, self._records, self._levels = layer, projection, records, levels
        self._shape: MatrixShape = layer.projections[projection]

    def plane_bank(self, bias: mx.array | None) -> PlaneBank:
        """The resident planes as they are."""
        bank = PlaneBank.empty(self._shape, self._levels, bias)
        for expert, level in enumerate(self._levels):
            for plane in range(num_planes(level)):
                bank.write_plane(expert, plane, self._part(expert, plane, "words"))
            bank.write_scales(expert, self._part(expert, 0, "scales").view(np.float16), self._factor(expert))
        return bank

    def buckets(self, width: int, dtype: mx.Dtype) -> list[tuple[list[int], Bucket]]:
        """Merged codes: one bucket of the given field width, or (0) one per resident level."""
        widths = {e: width or level for e, level in enumerate(self._levels)}
        buckets = []
        for bits in sorted(set(widths.values())):
            experts = [e for e in widths if widths[e] == bits]
            bucket = MergedBank(self._shape, bits, len(experts), dtype)
            for row, expert in enumerate(experts):
                planes = [self._part(expert, j, "words") for j in range(num_planes(self._levels[expert]))]
                scales = self._part(expert, 0, "scales").view(np.float16)
                bucket.write(row, planes, scales, self._factor(expert))
            buckets.append((experts, bucket.arrays))
        return buckets

    def _factor(self, expert: int) -> float:
        """What the stored scales are multiplied with at the resident level."""
        entry, level = self._layer.experts[expert], self._levels[expert]
        written, gains = entry.levels[self._projection], entry.gains[self._projection]
        return level_scale(written, level, 1.0 if level == written else gains[num_planes(level) - 1])

    def _part(self, expert: int, plane: int, field_name: str) -> np.ndarray:
        """uint8 view of one array of a record."""
        for part in record_parts(self._layer, self._layer.experts[expert], plane):
            if (part.projection, part.field) == (self._projection, field_name):
                return self._records[expert][plane][part.offset : part.offset + part.nbytes]
        raise AssertionError(f"no {field_name} of projection {self._projection} in plane {plane}")
