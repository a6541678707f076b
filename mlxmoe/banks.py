"""From records on disk to what products read: merged buckets for MLX's built-ins, plane banks for the kernels.

Reads through ExpertStore, decides nothing: levels and widths come from residency.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.copies import Copies, Selector
from mlxmoe.experts import Bucket, ExpertLayer
from mlxmoe.formats import (
    ABSENT,
    FIELD_BITS,
    LEVELS,
    MatrixShape,
    array_bytes,
    field_width,
    level_scale,
    merge_planes,
    num_planes,
    words_per_row,
    write_floats,
)
from mlxmoe.kernels import PlaneBank
from mlxmoe.plan import ExpertEntry, LayerPlan, Replicas
from mlxmoe.rotation import LayerTurns, RotationRule, Turn, make_turn, turn_nbytes
from mlxmoe.store import ExpertStore, record_parts

Rows = list[tuple[list[int], "MergedBank"]]  # of a projection: the experts of each bank, in row order


def fill_layer(
    module: ExpertLayer,
    store: ExpertStore,
    layer: LayerPlan,
    levels: Sequence[tuple[int, ...]],
    widths: tuple[int, ...],
    dtype: mx.Dtype,
) -> list[Rows]:
    """Reads the planes of a layer that are resident at these levels and sets its buckets: a bank per projection and
    width. What the layer held before is freed first; nothing may be reading it."""
    for shape in layer.projections:
        module[shape.name].fill([])
    mx.clear_cache()  # MLX would hand out a freed buffer that is larger than what it is for
    found = []
    for p, (shape, projection) in enumerate(zip(layer.projections, _projections(store, layer, levels), strict=True)):
        rows = projection.merged(widths[p], dtype)
        module[shape.name].fill([(experts, bank.arrays) for experts, bank in rows])
        found.append(rows)
    return found


def plane_layer(
    store: ExpertStore, layer: LayerPlan, levels: Sequence[tuple[int, ...]], biases: Sequence[mx.array | None]
) -> list[PlaneBank]:
    """Reads the planes of a layer that are resident at these levels: a bank per projection, with its bias [E, N]."""
    projections = _projections(store, layer, levels)
    return [projection.plane_bank(bias) for projection, bias in zip(projections, biases, strict=True)]


def layer_copies(store: ExpertStore, layer: LayerPlan, dtype: mx.Dtype) -> Copies:
    """How a layer's outputs come from its matrices, for activations of a type. Reads rotations that no rule gives."""

    def turn(copy: int, place: str, rule: RotationRule, columns: int) -> Turn | None:
        return make_turn(rule, columns, store.rotation_matrix(layer.layer, place, copy), dtype)

    turns = [
        LayerTurns(
            *(turn(copy, place, rule, k) for (place, rule), k in zip(rules._asdict().items(), columns, strict=True))
        )
        for copy, rules in enumerate(layer.copy_rotations)
        for columns in [layer.rotated_columns]
    ]
    if layer.replicas is None:
        return Copies(tuple(turns))
    return Copies(tuple(turns), mx.array(layer.replicas.weights), _selector(layer.replicas))


def _selector(replicas: Replicas) -> Selector | None:
    if replicas.selection is None:
        return None
    slopes, intercepts, usual = replicas.selection
    return Selector(mx.array(slopes), mx.array(intercepts), None if usual is None else mx.log(mx.array(usual)))


def copies_nbytes(layer: LayerPlan, dtype: mx.Dtype) -> int:
    """Bytes of memory of what `layer_copies` makes."""
    turns = sum(
        turn_nbytes(rule, columns, dtype)
        for rules in layer.copy_rotations
        for rule, columns in zip(rules, layer.rotated_columns, strict=True)
    )
    return turns + (layer.replicas.num_values * mx.float32.size if layer.replicas is not None else 0)


def _projections(store: ExpertStore, layer: LayerPlan, levels: Sequence[tuple[int, ...]]) -> list[_Projection]:
    """Reads what is resident of a layer at these levels."""
    records = [
        [store.read(layer.layer, e, plane) for plane in range(max(map(num_planes, expert)))]
        for e, expert in enumerate(levels)
    ]
    return [_Projection(layer, p, records, [expert[p] for expert in levels]) for p in range(len(layer.projections))]


def resident_factor(entry: ExpertEntry, projection: int, level: int) -> float:
    """What the stored scales of a matrix are multiplied with where `level` of its bits are resident."""
    written, gains = entry.levels[projection], entry.gains[projection]
    return level_scale(written, level, 1.0 if level == written else gains[num_planes(level) - 1])


def read_matrix(store: ExpertStore, layer: LayerPlan, expert: int, projection: int, level: int) -> StoredMatrix:
    """The first planes of one expert's projection, up to `level`, and its scales. Reads whole records."""
    entry = layer.experts[expert]
    records = [store.read(layer.layer, expert, plane) for plane in range(num_planes(level))]
    parts = [
        record[part.offset : part.offset + part.nbytes]
        for plane, record in enumerate(records)
        for part in record_parts(layer, entry, plane)
        if (part.projection, part.field) == (projection, "words")
    ]
    (scales,) = (
        records[0][part.offset : part.offset + part.nbytes]
        for part in record_parts(layer, entry, 0)
        if (part.projection, part.field) == (projection, "scales")
    )
    return StoredMatrix(parts, scales.view(np.float16))


class StoredMatrix(NamedTuple):
    """Planes as they are stored (uint8) and scales float16."""

    planes: list[np.ndarray]
    scales: np.ndarray


class MergedBank:
    """Expert matrices of one projection as MLX's built-in products read them: `arrays` is written in place, row by row.

    bits: the fields' width as Bucket has it. Allocates the memory. `write` touches bytes only, so any thread may call it,
    for rows that no graph is reading.
    """

    def __init__(self, shape: MatrixShape, bits: int, rows: int, dtype: mx.Dtype):
        self._bits, self._dtype = bits, dtype
        lead = (rows, shape.rows if bits <= FIELD_BITS else 2 * shape.rows)
        words = mx.zeros((*lead, words_per_row(shape.columns, min(bits, FIELD_BITS))), mx.uint32)
        scales, biases = (mx.zeros((*lead, shape.columns // shape.group_size), dtype) for _ in range(2))
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
        fields = _fields(LEVELS[len(planes) - 1], self._bits)
        places = zip(*(np.split(array, len(fields)) for array in (row_scales, row_biases)), strict=True)
        for field, (field_scales, field_biases) in zip(fields, places, strict=True):
            write_floats(np.float32(field.scale) * values, field_scales, self._dtype)
            write_floats(np.float32(field.bias) * values, field_biases, self._dtype)


class _Field(NamedTuple):
    """What is stored for one field of a weight, in units of the scale of its code."""

    scale: float
    bias: float


def _fields(level: int, width: int) -> list[_Field]:
    """Of a code of `level` bits in a bank of that width: see Bucket."""
    if level > FIELD_BITS:
        return [_Field(1 << (level - FIELD_BITS), -(1 << (level - 1))), _Field(1, 0.5)]
    whole = _Field(1, -((1 << level) - 1) / 2)
    return [whole] if width <= FIELD_BITS else [whole, _Field(0, 0)]


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
            bank.write_scales(expert, self._part(expert, 0, "scales"), self._factor(expert))
        return bank

    def merged(self, width: int, dtype: mx.Dtype) -> Rows:
        """Merged codes: one bank of the given field width, or (0) one per resident level."""
        widths = {e: width or field_width(level) for e, level in enumerate(self._levels) if level != ABSENT}
        found = []
        for bits in sorted(set(widths.values())):
            experts = [e for e in widths if widths[e] == bits]
            bank = MergedBank(self._shape, bits, len(experts), dtype)
            for row, expert in enumerate(experts):
                planes = [self._part(expert, j, "words") for j in range(num_planes(self._levels[expert]))]
                scales = self._part(expert, 0, "scales").view(np.float16)
                bank.write(row, planes, scales, self._factor(expert))
            found.append((experts, bank))
        return found

    def _factor(self, expert: int) -> float:
        """What the stored scales are multiplied with at the resident level."""
        return resident_factor(self._layer.experts[expert], self._projection, self._levels[expert])

    def _part(self, expert: int, plane: int, field_name: str) -> np.ndarray:
        """uint8 view of one array of a record."""
        for part in record_parts(self._layer, self._layer.experts[expert], plane):
            if (part.projection, part.field) == (self._projection, field_name):
                return self._records[expert][plane][part.offset : part.offset + part.nbytes]
        raise AssertionError(f"no {field_name} of projection {self._projection} in plane {plane}")
