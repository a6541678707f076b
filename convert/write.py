"""Stage 3, write: codes, scales and records of one file at a time, as the plan says.

Every file is written under a temporary name, synced and renamed, so what has its final name is whole. Beside it, in the
work folder, its SHA-256 and (for experts) what each lower level of the codes would cost.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.convert.allocate import shard_header
from mlxmoe.convert.measure import Progress, TrunkFormat, row_blocks
from mlxmoe.convert.quantize import Affine, affine_search, clip_search, encode, truncation_fit
from mlxmoe.convert.rotate import Rotated, matrix_of
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.formats import (
    ABSENT,
    LEVELS,
    PLANE_WIDTHS,
    MatrixShape,
    PackedMatrix,
    array_bytes,
    num_planes,
    pack_codes,
    split_planes,
)
from mlxmoe.models import ExpertSite
from mlxmoe.plan import ExpertEntry, FileEntry, LayerPlan
from mlxmoe.rotation import Rotation, plain_rotation, rotate
from mlxmoe.store import layer_header, record_nbytes, record_parts, rotation_matrices
from mlxmoe.work import save_arrays, whole_file


class Packed(NamedTuple):
    """A stored matrix, and its relative error at every level up to the one written."""

    matrix: PackedMatrix
    errors: tuple[float, ...]


def save_rotations(folder: Path, layer: int, rotated: Rotated) -> None:
    """Keeps the rotations that a layer is measured behind, for `load_rotations`."""
    save_arrays(folder / f"rotation-{layer}.npz", rotated.arrays())


def load_rotations(folder: Path, source: Source, layer: int, seed: int) -> Rotated:
    """What `save_rotations` has kept for the layer of that number."""
    (shapes,) = (source.shapes[site.path] for site in source.sites if site.layer == layer)
    with np.load(folder / f"rotation-{layer}.npz") as saved:
        return Rotated.from_arrays(saved, shapes, seed)


def pack_matrix(weight: np.ndarray, shape: MatrixShape, level: int) -> Packed:
    """float32 [N, K] -> the stored matrix, and its relative squared error at every level up to `level`."""
    groups = weight.reshape(-1, shape.group_size)
    scales, error = clip_search(groups, level)
    codes = encode(groups, scales.astype(np.float32), level)
    norm = float(np.vdot(groups, groups)) or 1.0
    gains, errors = {}, []
    for lower in LEVELS[: num_planes(level) - 1]:
        gains[lower], lost = truncation_fit(groups, codes, scales, level, lower)
        errors.append(lost / norm)
    errors.append(float(error.sum(dtype=np.float64)) / norm)
    matrix_codes = mx.array(codes.reshape(shape.rows, shape.columns))
    planes = [
        pack_codes(plane, width) for plane, width in zip(split_planes(matrix_codes, level), PLANE_WIDTHS, strict=False)
    ]
    matrix = PackedMatrix(shape, level, planes, mx.array(scales.reshape(shape.rows, -1)), gains)
    return Packed(matrix, tuple(errors))


def pack_record(layer: LayerPlan, entry: ExpertEntry, matrices: Sequence[PackedMatrix | None], plane: int) -> bytes:
    """One record: the plane of every projection that has it, in plane 0 the scales as well, filled up with zeros."""
    record = bytearray(record_nbytes(layer, entry, plane))
    for part in record_parts(layer, entry, plane):
        matrix = matrices[part.projection]
        assert matrix is not None
        array = matrix.scales if part.field == "scales" else matrix.planes[plane]
        record[part.offset : part.offset + part.nbytes] = array_bytes(array)
    return bytes(record)


def packed_experts(
    source: Source, tensors: dict[str, mx.array], site: ExpertSite, layer: LayerPlan, rotated: Rotated
) -> Iterator[list[Packed | None]]:
    """The matrices of each expert, None where it has no such copy, behind the layer's rotations, by least squares on the
    weights. Takes the layer's stacks out of `tensors`."""
    count, turns = layer.num_matrices, copy_turns(layer, rotated)
    streams = [source.experts(tensors, site, shape.name) for shape in layer.projections[:count]]
    for planned, weights in zip(layer.experts, zip(*streams, strict=True), strict=True):
        yield [
            pack_matrix(rotate(weights[p % count], turns[p]), shape, level) if level != ABSENT else None
            for p, (shape, level) in enumerate(zip(layer.projections, planned.levels, strict=True))
        ]


def copy_turns(layer: LayerPlan, rotated: Rotated) -> list[Rotation]:
    """What the columns of each of a layer's projections are rotated by; `rotated`: those of the first copy."""
    count = layer.num_matrices
    copies = [rotated]
    for rules in layer.copy_rotations[1:]:
        turns = zip(rules, layer.rotated_columns, strict=True)
        copies.append(Rotated(*(plain_rotation(rule.name, columns, rule.seed) for rule, columns in turns)))
    return [copy.of(p, count) for copy in copies for p in range(count)]


def write_layer(
    layer: LayerPlan, experts: Iterator[list[Packed | None]], rotated: Rotated, folder: Path, progress: Progress
) -> tuple[FileEntry, tuple[ExpertEntry, ...]]:
    """Writes one experts file, whose codes lie behind the layer's rotations. Returns its hash and the experts' entries with
    measured errors, gains and checksums."""
    entries = []
    with whole_file(folder / layer.file) as file:
        file.write(layer_header(layer))
        for planned, packed in zip(layer.experts, experts, strict=True):
            matrices = [each.matrix if each is not None else None for each in packed]
            checksums = []
            for plane in range(planned.num_planes):
                record = pack_record(layer, planned, matrices, plane)
                checksums.append(zlib.crc32(record))
                file.write(record)
            gains = tuple(
                tuple(m.gains[lower] for lower in LEVELS[: num_planes(m.level) - 1]) if m is not None else ()
                for m in matrices
            )
            errors = tuple(each.errors if each is not None else () for each in packed)
            entries.append(ExpertEntry(planned.levels, errors, gains, tuple(checksums)))
            progress(sum(shape.num_weights for shape in layer.projections[: layer.num_matrices]))
        for stored in rotation_matrices(layer):
            data = matrix_of(getattr(rotated, stored.place)).tobytes()
            assert zlib.crc32(data) == stored.rule.crc32
            file.write(data)
        result = file
    return result.entry, tuple(entries)


def write_shard(
    shard: Sequence[TrunkTensor],
    formats: dict[str, TrunkFormat],
    tensors: dict[str, mx.array],
    path: Path,
    progress: Progress,
    coded: Callable[[TrunkTensor], Affine | None] = lambda tensor: None,
) -> FileEntry:
    """Writes one trunk file in MLX's own layout, tensor by tensor. Takes the tensors out of `tensors`. What is `coded`
    already is written so, the rest by least squares on the weights."""
    with whole_file(path) as file:
        file.write(shard_header(shard, formats))
        for tensor in shard:
            array, stored = tensors.pop(tensor.name), formats.get(tensor.name)
            ready = coded(tensor) if stored is not None else None
            for chunk in _tensor_bytes(tensor, stored, array) if ready is None else _coded_bytes(tensor, stored, ready):
                file.write(chunk)
            progress(int(np.prod(tensor.shape)))
        result = file
    return result.entry


def _coded_bytes(tensor: TrunkTensor, stored: TrunkFormat | None, coded: Affine) -> Iterable[memoryview]:
    """The bytes of a trunk tensor that is coded already, in the order of `_tensor_bytes`."""
    assert stored is not None
    yield array_bytes(pack_codes(mx.array(coded.codes.reshape(tensor.shape)), stored.bits))
    yield memoryview(coded.scales.tobytes())
    yield memoryview(coded.biases.tobytes())


def _tensor_bytes(tensor: TrunkTensor, stored: TrunkFormat | None, array: mx.array) -> Iterable[memoryview]:
    """The bytes of a trunk tensor: words block by block, then scales, then biases; or the tensor as it is."""
    mx.eval(array)
    if stored is None:
        yield array_bytes(array)
        return
    scales, biases = [], []
    for block in row_blocks(tensor.name, array):
        coded = affine_search(block.reshape(-1, stored.group_size), stored.bits)
        scales.append(coded.scales)
        biases.append(coded.biases)
        words = pack_codes(mx.array(coded.codes.reshape(block.shape)), stored.bits)
        yield array_bytes(words)
    for parts in (scales, biases):
        yield memoryview(np.concatenate(parts).tobytes())
