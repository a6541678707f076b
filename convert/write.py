"""Stage 3, write: codes, scales and records of one file at a time, as the plan says.

Every file is written under a temporary name, synced and renamed, so what has its final name is whole. Beside it, in the
work folder, its SHA-256 and (for experts) what each lower level of the codes would cost.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxmoe.convert.allocate import shard_header
from mlxmoe.convert.measure import Progress, TrunkFormat, row_blocks
from mlxmoe.convert.quantize import affine_search, clip_search, encode, truncation_fit
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.formats import (
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
from mlxmoe.store import layer_header, record_nbytes, record_parts


class HashingWriter:
    """A file that knows its length and SHA-256."""

    def __init__(self, file: io.BufferedWriter):
        self._file, self._hash, self.nbytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.nbytes += len(data)

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.nbytes, self._hash.hexdigest())


@contextmanager
def whole_file(path: Path) -> Iterator[HashingWriter]:
    """A file that gets its name only when it is complete and on the disk; on any error nothing of it is left."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            writer = HashingWriter(file)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> FileEntry:
    """A file of `data`, by the rules of `whole_file`."""
    with whole_file(path) as file:
        file.write(data)
    return file.entry


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz, by the rules of `whole_file`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def pack_matrix(weight: np.ndarray, shape: MatrixShape, level: int) -> tuple[PackedMatrix, tuple[float, ...]]:
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
    return PackedMatrix(shape, level, planes, mx.array(scales.reshape(shape.rows, -1)), gains), tuple(errors)


def pack_record(layer: LayerPlan, entry: ExpertEntry, matrices: Sequence[PackedMatrix], plane: int) -> bytes:
    """One record: the plane of every projection that has it, in plane 0 the scales as well, filled up with zeros."""
    record = bytearray(record_nbytes(layer, entry, plane))
    for part in record_parts(layer, entry, plane):
        matrix = matrices[part.projection]
        array = matrix.scales if part.field == "scales" else matrix.planes[plane]
        record[part.offset : part.offset + part.nbytes] = array_bytes(array)
    return bytes(record)


def write_layer(
    source: Source, tensors: dict[str, mx.array], site: ExpertSite, layer: LayerPlan, folder: Path, progress: Progress
) -> tuple[FileEntry, tuple[ExpertEntry, ...]]:
    """Writes one experts file. Returns its hash and the experts' entries with measured errors, gains and checksums.

    Takes the layer's stacks out of `tensors`; holds one layer of source weights.
    """
    streams = [source.experts(tensors, site, shape.name) for shape in layer.projections]
    entries = []
    with whole_file(folder / layer.file) as file:
        file.write(layer_header(layer))
        for planned, weights in zip(layer.experts, zip(*streams, strict=True), strict=True):
            packed = [
                pack_matrix(w, s, level) for w, s, level in zip(weights, layer.projections, planned.levels, strict=True)
            ]
            matrices = [matrix for matrix, _ in packed]
            checksums = []
            for plane in range(planned.num_planes):
                record = pack_record(layer, planned, matrices, plane)
                checksums.append(zlib.crc32(record))
                file.write(record)
            gains = tuple(tuple(m.gains[lower] for lower in LEVELS[: num_planes(m.level) - 1]) for m in matrices)
            entries.append(ExpertEntry(planned.levels, tuple(errors for _, errors in packed), gains, tuple(checksums)))
            progress(sum(w.size for w in weights))
        result = file
    return result.entry, tuple(entries)


def write_shard(
    shard: Sequence[TrunkTensor],
    formats: dict[str, TrunkFormat],
    tensors: dict[str, mx.array],
    path: Path,
    progress: Progress,
) -> FileEntry:
    """Writes one trunk file in MLX's own layout, tensor by tensor. Takes the tensors out of `tensors`."""
    with whole_file(path) as file:
        file.write(shard_header(shard, formats))
        for tensor in shard:
            array = tensors.pop(tensor.name)
            mx.eval(array)
            for chunk in _tensor_bytes(tensor, formats.get(tensor.name), array):
                file.write(chunk)
            progress(int(np.prod(tensor.shape)))
        result = file
    return result.entry


def _tensor_bytes(tensor: TrunkTensor, stored: TrunkFormat | None, array: mx.array) -> Iterable[memoryview]:
    """The bytes of a trunk tensor: words block by block, then scales, then biases; or the tensor as it is."""
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
