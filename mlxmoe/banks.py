"""From records on disk to what products read: merged buckets for MLX's built-ins, plane banks for the kernels.

Reads through ExpertStore, decides nothing: levels and widths come from residency.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxmoe.experts import Bucket, ExpertLayer
from mlxmoe.formats import (
    PLANE_WIDTHS,
    MatrixShape,
    array_bytes,
    join_planes,
    level_scale,
    num_planes,
    pack_codes,
    unpack_codes,
)
from mlxmoe.kernels import PlaneBank
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.residency import Residency
from mlxmoe.store import ExpertStore, record_parts


def fill_buckets(
    layers: dict[str, ExpertLayer], folder: Path, plan: Plan, residency: Residency, dtype: mx.Dtype, chunk: int
) -> None:
    """Reads the resident planes and sets the buckets of every layer (module path -> layer). `chunk`: weights unpacked at
    a time, each taking up to 40 bytes while it lasts."""
    widths = {layer.path: row for layer, row in zip(plan.layers, residency.widths, strict=True)}
    for layer, projections in _read(folder, plan, residency):
        for p, (shape, projection) in enumerate(zip(layer.projections, projections, strict=True)):
            layers[layer.path][shape.name].fill(projection.buckets(widths[layer.path][p], dtype, chunk))


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

    def buckets(self, width: int, dtype: mx.Dtype, chunk: int) -> list[tuple[list[int], Bucket]]:
        """Merged codes: one bucket of the given field width, or (0) one per resident level. `chunk`: weights unpacked at a
        time, each taking up to 40 bytes while it lasts."""
        widths = {e: width or level for e, level in enumerate(self._levels)}
        return [
            (experts, self._bucket(experts, bits, dtype, chunk))
            for bits in sorted(set(widths.values()))
            if (experts := [e for e in widths if widths[e] == bits])
        ]

    def _bucket(self, experts: list[int], bits: int, dtype: mx.Dtype, chunk: int) -> Bucket:
        shape = self._shape
        step = max(1, chunk // shape.num_weights)
        words = mx.zeros((len(experts), shape.rows, shape.code_nbytes(bits) // 4 // shape.rows), mx.uint32)
        mx.eval(words)
        bank = np.frombuffer(array_bytes(words), np.uint32).reshape(words.shape)  # written in place
        groups = shape.columns // shape.group_size
        scales = np.empty((len(experts), shape.rows, groups), np.float32)
        biases = np.empty_like(scales)
        for row, expert in enumerate(experts):
            level = self._levels[expert]
            factor = self._factor(expert)
            stored = self._part(expert, 0, "scales").view(np.float16).reshape(shape.rows, groups)
            np.multiply(stored, np.float32(factor), out=scales[row], dtype=np.float32)
            np.multiply(scales[row], np.float32(-((1 << level) - 1) / 2), out=biases[row])
        for level in sorted({self._levels[e] for e in experts}):
            rows = [row for row, e in enumerate(experts) if self._levels[e] == level]
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                codes = self._codes([experts[row] for row in part], level)
                bank[part] = np.array(pack_codes(codes, bits))
        arrays = words, mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)
        mx.eval(arrays)
        return Bucket(bits, *arrays)

    def _factor(self, expert: int) -> float:
        """What the stored scales are multiplied with at the resident level."""
        entry, level = self._layer.experts[expert], self._levels[expert]
        written, gains = entry.levels[self._projection], entry.gains[self._projection]
        return level_scale(written, level, 1.0 if level == written else gains[num_planes(level) - 1])

    def _codes(self, experts: list[int], level: int) -> mx.array:
        """uint8 [n, N, K]: the first `level` bits of these experts' codes."""
        planes = []
        for plane, width in enumerate(PLANE_WIDTHS[: num_planes(level)]):
            words = np.stack(
                [self._part(e, plane, "words").view(np.uint32).reshape(self._shape.rows, -1) for e in experts]
            )
            planes.append(unpack_codes(mx.array(words), width, self._shape.columns))
        return join_planes(planes)

    def _part(self, expert: int, plane: int, field_name: str) -> np.ndarray:
        """uint8 view of one array of a record."""
        for part in record_parts(self._layer, self._layer.experts[expert], plane):
            if (part.projection, part.field) == (self._projection, field_name):
                return self._records[expert][plane][part.offset : part.offset + part.nbytes]
        raise AssertionError(f"no {field_name} of projection {self._projection} in plane {plane}")
