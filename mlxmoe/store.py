"""Expert records on disk: where the bytes of an expert lie and how they are read, with no policy of what to read when.

Any place that experts come from is an ExpertSource: it names the bytes of an expert as spans, each one positional read,
and reader.py carries the reads out. Here are spans, the read itself with its checks, and the source of a converted folder;
stock checkpoints are stacked.py's, repacked ones repack.py's.

`experts-*.safetensors` are valid safetensors whose data starts on a 4 KiB boundary (the header is padded with spaces, as
the format allows) and whose tensors are uint8 records, each a multiple of 4 KiB, so that a record is one aligned read.
One record per (layer, expert, plane), the planes of an expert one after the other: the packed words of that plane of
each projection that has it, and in plane 0 behind them the float16 scales of every projection. Behind all records lie the
matrices of the layer's rotations that no rule gives, as they are.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from mlxmoe.errors import UserError
from mlxmoe.formats import num_planes
from mlxmoe.plan import ExpertEntry, LayerPlan
from mlxmoe.rotation import STORED, STORED_NBYTES, RotationRule

PAGE = 4096
_DTYPE_NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F16": 2, "BF16": 2, "U16": 2, "I16": 2,
    "F32": 4, "U32": 4, "I32": 4, "F64": 8, "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Where a tensor of a safetensors file lies: dtype code, shape, absolute offset and bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def encode_header(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Length word and JSON header of a safetensors file, padded so that the data starts on a page boundary.

    `tensors`: name -> (dtype code, shape, bytes), in the order of the data.
    """
    header, offset = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file. Raises UserError for a missing, truncated or damaged one."""

    def damaged(what: str) -> UserError:
        return UserError(f"{path} {what}", "the file is incomplete or damaged: copy, download or convert it again")

    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise damaged("is missing") from None
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 1 << 30):
            raise damaged("is not a safetensors file, or its first bytes are damaged")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0],
                             t["data_offsets"][1] - t["data_offsets"][0])
            for name, t in header.items()
        }  # fmt: skip
        wanted = {name: int(np.prod(t.shape)) * _DTYPE_NBYTES[t.dtype] for name, t in tensors.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError):
        raise damaged("has a damaged header") from None
    for name, info in tensors.items():
        if info.nbytes != wanted[name] or info.offset < 8 + length:
            raise damaged(f"has a damaged header at {name}")
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size != end:
        raise damaged(f"has {size} bytes, its header says {end}")
    return tensors


class StoreFile:
    """A file of a store, open for reading from any thread. Renaming or deleting the path does not matter to it.

    Remembers which checksums were verified; a change in place makes it forget. Raises UserError when it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"cannot open {path}: {error.strerror}", "the folder is incomplete: copy it again"
            ) from None
        self.opened = self._stamp = self.stamp()
        self._verified: set[int] = set()
        self._lock = threading.Lock()

    def stamp(self) -> tuple[int, int]:
        """Bytes and time of modification: what tells that the file was changed in place."""
        facts = os.fstat(self.descriptor)
        return facts.st_size, facts.st_mtime_ns

    def verified(self, stamp: tuple[int, int]) -> set[int]:
        """The offsets whose checksums were found right since the file has this stamp; the caller adds to it."""
        if stamp != self._stamp:
            with self._lock:
                self._stamp, self._verified = stamp, set()
        return self._verified

    def close(self) -> None:
        """Nothing may read from it any more: the system gives its descriptor to the next file that is opened."""
        os.close(self.descriptor)


class Part(NamedTuple):
    """The next bytes of a span: which projection of the expert, and what of it.

    `field` is "plane0" to "plane4" or "scales" in a converted folder, "weight", "scales" or "biases" in a stock or
    repacked checkpoint, "padding" (of projection -1) between records.
    """

    projection: int
    field: str
    nbytes: int


class Check(NamedTuple):
    """CRC-32 of the bytes from `start` up to `stop`, counted from the span's begin."""

    start: int
    stop: int
    crc32: int


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of a file that one read brings: parts one after the other, without gaps."""

    file: StoreFile
    offset: int
    parts: tuple[Part, ...]
    checks: tuple[Check, ...]
    label: str  # for people: "layer 3, expert 17"

    @cached_property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def fault(self, what: str, hint: str = "the file is damaged: copy or convert it again") -> UserError:
        return UserError(f"{self.file.path}: {self.label} {what}", hint)


class SourceLayer(NamedTuple):
    """The routed experts of one layer: its number, its module's path in the model, and how many there are."""

    layer: int
    path: str
    num_experts: int


class ExpertSource(Protocol):
    """Where experts come from. Naming spans reads nothing and may be done from any thread."""

    @property
    def layers(self) -> tuple[SourceLayer, ...]: ...

    def spans(self, layer: int, expert: int, planes: range | None = None) -> tuple[Span, ...]:
        """The fewest reads that bring an expert, in file order. `planes`: of a converted folder only these, such as
        range(1, 3); other sources have one plane."""
        ...

    def close(self) -> None: ...


WritableBytes = memoryview | bytearray | np.ndarray  # contiguous, of any item
Preadv = Callable[[int, Sequence[Any], int], int]
_IOV_MAX = os.sysconf("SC_IOV_MAX")


def read_exactly(descriptor: int, buffers: Sequence[WritableBytes], offset: int, preadv: Preadv = os.preadv) -> int:
    """Fills the buffers one after the other from `offset` of a file. Returns the bytes read: fewer than asked for only
    where the file ends. Raises OSError."""
    left, done = [view for view in map(as_bytes, buffers) if view.nbytes], 0
    while left:
        got = preadv(descriptor, left[:_IOV_MAX], offset + done)
        if got == 0:
            break
        done += got
        while left and got >= left[0].nbytes:
            got -= left.pop(0).nbytes
        if got:
            left[0] = left[0][got:]
    return done


def as_bytes(buffer: WritableBytes) -> memoryview:
    """The buffer's memory, byte by byte."""
    return memoryview(cast(Any, buffer)).cast("B")


def read_span(
    span: Span, buffers: Sequence[WritableBytes], preadv: Preadv = os.preadv, descriptor: int | None = None
) -> None:
    """Reads a span into buffers that together have its size; blocks until it is there. Verifies nothing.

    `descriptor`: another one of the same file. Raises UserError where the file ends early and, with the system's reason,
    where it cannot be read.
    """
    descriptor, nbytes = span.file.descriptor if descriptor is None else descriptor, span.nbytes
    try:
        # Nearly always one call brings all; where it does not, another way starts anew.
        done = preadv(descriptor, buffers, span.offset) if len(buffers) <= _IOV_MAX else 0
        if done != nbytes:
            views = list(map(as_bytes, buffers))
            assert sum(view.nbytes for view in views) == nbytes, f"buffers for {nbytes} bytes of {span.label}"
            done = read_exactly(descriptor, views, span.offset, preadv)
    except OSError as error:
        raise unreadable(span, error) from error
    if done < nbytes:
        raise span.fault("ends early")


def unreadable(span: Span, error: OSError) -> UserError:
    """What to say when the system refuses a read."""
    return span.fault(f"cannot be read: {error.strerror}", "check the disk, then copy or convert the file again")


def verify(span: Span, buffers: Sequence[WritableBytes]) -> None:
    """Compares what `read_span` just brought with the span's checksums: each once, again after a change of the file.

    Raises UserError for a wrong checksum, and for a file without checksums that was changed since it was opened.
    """
    stamp = span.file.stamp()
    if not span.checks and stamp != span.file.opened:
        raise span.fault(
            "was changed while it was in use", "leave the files of a running model as they are; start again"
        )
    verified = span.file.verified(stamp)
    for check in span.checks:
        if span.offset + check.start in verified:
            continue
        if _crc32(list(map(as_bytes, buffers)), check) != check.crc32:
            raise span.fault("has a wrong checksum")
        verified.add(span.offset + check.start)


def _crc32(buffers: Sequence[memoryview], check: Check) -> int:
    crc, at = 0, 0
    for buffer in buffers:
        start, stop = max(check.start - at, 0), min(check.stop - at, buffer.nbytes)
        if start < stop:
            crc = zlib.crc32(buffer[start:stop], crc)
        at += buffer.nbytes
    return crc


def record_name(layer: int, expert: int, plane: int) -> str:
    return f"L{layer}.E{expert}.P{plane}"


class RecordPart(NamedTuple):
    """One array inside a record: the projection's index, "words" or "scales", offset and bytes from its start."""

    projection: int
    field: str
    offset: int
    nbytes: int


def record_parts(layer: LayerPlan, entry: ExpertEntry, plane: int) -> list[RecordPart]:
    """The arrays of one record, in order: plane words of every projection that has them, then (plane 0) the scales."""
    parts, offset = [], 0
    for p, shape in enumerate(layer.projections):
        if num_planes(entry.levels[p]) > plane:
            parts.append(RecordPart(p, "words", offset, shape.plane_nbytes(plane)))
            offset += parts[-1].nbytes
    if plane == 0:
        for p, shape in enumerate(layer.projections):
            if entry.levels[p]:
                parts.append(RecordPart(p, "scales", offset, shape.scales_nbytes))
                offset += parts[-1].nbytes
    return parts


def record_nbytes(layer: LayerPlan, entry: ExpertEntry, plane: int) -> int:
    """Bytes of one record, filled up to whole pages."""
    last = record_parts(layer, entry, plane)[-1]
    return -(-(last.offset + last.nbytes) // PAGE) * PAGE


def layer_records(layer: LayerPlan) -> Iterator[tuple[int, int, str, int]]:
    """(expert, plane, record name, bytes) of a layer in file order."""
    for e, entry in enumerate(layer.experts):
        for plane in range(entry.num_planes):
            yield e, plane, record_name(layer.layer, e, plane), record_nbytes(layer, entry, plane)


class RotationMatrix(NamedTuple):
    """A matrix float16 [K, K] in a layer's file: which of its rotations it is (of which copy, "inputs" or "hidden"), the
    tensor's name."""

    copy: int
    place: str
    rule: RotationRule
    name: str
    columns: int

    @property
    def nbytes(self) -> int:
        return STORED_NBYTES * self.columns * self.columns


def rotation_matrices(layer: LayerPlan) -> list[RotationMatrix]:
    """The matrices of a layer's rotations that its file holds, in file order."""
    return [
        RotationMatrix(copy, place, rule, f"L{layer.layer}.rotation{copy + 1 if copy else ''}.{place}", columns)
        for copy, rotations in enumerate(layer.copy_rotations)
        for (place, rule), columns in zip(rotations._asdict().items(), layer.rotated_columns, strict=True)
        if rule.name in STORED
    ]


def layer_header(layer: LayerPlan) -> bytes:
    records = {name: ("U8", (nbytes,), nbytes) for _, _, name, nbytes in layer_records(layer)}
    matrices = {m.name: ("F16", (m.columns, m.columns), m.nbytes) for m in rotation_matrices(layer)}
    return encode_header({**records, **matrices})


def layer_file_nbytes(layer: LayerPlan) -> int:
    """Bytes of the layer's file, header and padding included."""
    matrices = sum(matrix.nbytes for matrix in rotation_matrices(layer))
    return len(layer_header(layer)) + sum(nbytes for *_, nbytes in layer_records(layer)) + matrices


class ExpertStore:
    """The records of a converted folder, opened and checked: every record of the plan is there with its size.

    An ExpertSource; the planes of an expert lie side by side, so any run of them is one span. Raises UserError for a file
    that is missing, truncated or does not fit the plan.
    """

    def __init__(self, folder: Path, layers: tuple[LayerPlan, ...]):
        self.layers = tuple(SourceLayer(layer.layer, layer.path, len(layer.experts)) for layer in layers)
        self._plans = {layer.layer: layer for layer in layers}
        self._files: dict[int, StoreFile] = {}
        self._records: dict[tuple[int, int, int], TensorInfo] = {}
        self._spans: dict[tuple[int, int, range | None], tuple[Span, ...]] = {}
        self._matrices: dict[tuple[int, int, str], tuple[RotationMatrix, TensorInfo]] = {}
        try:
            for layer in layers:
                self._open(folder / layer.file, layer)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, layer: LayerPlan) -> None:
        tensors = read_header(path)

        def find(name: str, nbytes: int) -> TensorInfo:
            info = tensors.get(name)
            if info is None or info.nbytes != nbytes:
                found = f"{info.nbytes} bytes" if info else "nothing"
                raise UserError(
                    f"{path} has {found} for {name}, the plan says {nbytes} bytes",
                    "the folder was changed after conversion: convert or copy it again",
                )
            return info

        for e, plane, name, nbytes in layer_records(layer):
            self._records[layer.layer, e, plane] = find(name, nbytes)
        for matrix in rotation_matrices(layer):
            self._matrices[layer.layer, matrix.copy, matrix.place] = matrix, find(matrix.name, matrix.nbytes)
        self._files[layer.layer] = StoreFile(path)

    def spans(self, layer: int, expert: int, planes: range | None = None) -> tuple[Span, ...]:
        key = layer, expert, planes
        if key not in self._spans:
            self._spans[key] = tuple(self._find_spans(layer, expert, planes))
        return self._spans[key]

    def _find_spans(self, layer: int, expert: int, planes: range | None) -> Iterator[Span]:
        plan = self._plans[layer]
        entry = plan.experts[expert]
        wanted = [plane for plane in range(entry.num_planes) if planes is None or plane in planes]
        label = f"layer {layer}, expert {expert}" + (f", plane {wanted[0]}" if len(wanted) == 1 else "")
        span: Span | None = None
        for plane in wanted:
            record = self._records[layer, expert, plane]
            if span is not None and span.offset + span.nbytes != record.offset:
                yield span
                span = None
            span = span or Span(self._files[layer], record.offset, (), (), label)
            start = span.nbytes
            check = Check(start, start + record.nbytes, entry.crc32[plane])
            parts = _span_parts(plan, entry, plane, record.nbytes)
            span = replace(span, parts=span.parts + parts, checks=(*span.checks, check))
        if span is not None:
            yield span

    def read(self, layer: int, expert: int, plane: int) -> np.ndarray:
        """One record as uint8 [bytes], its checksum verified. Blocks until it is read."""
        (span,) = self.spans(layer, expert, range(plane, plane + 1))
        record = np.empty(span.nbytes, np.uint8)
        read_span(span, [record.data])
        verify(span, [record.data])
        return record

    def rotation_matrix(self, layer: int, place: str, copy: int = 0) -> np.ndarray | None:
        """The stored matrix float16 [K, K] of a rotation ("inputs" or "hidden") of a layer's experts or of a further copy,
        its checksum verified, or None where a rule gives it. Blocks until it is read."""
        if (layer, copy, place) not in self._matrices:
            return None
        matrix, info = self._matrices[layer, copy, place]
        check = Check(0, info.nbytes, matrix.rule.crc32)
        label = f"layer {layer}, rotation of the {place}"
        span = Span(self._files[layer], info.offset, (Part(-1, "rotation", info.nbytes),), (check,), label)
        values = np.empty(info.nbytes, np.uint8)
        read_span(span, [values.data])
        verify(span, [values.data])
        return values.view(np.float16).reshape(matrix.columns, matrix.columns)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _span_parts(layer: LayerPlan, entry: ExpertEntry, plane: int, nbytes: int) -> tuple[Part, ...]:
    """The parts of one record of a converted folder with its padding."""
    parts = [
        Part(part.projection, f"plane{plane}" if part.field == "words" else part.field, part.nbytes)
        for part in record_parts(layer, entry, plane)
    ]
    padding = nbytes - sum(part.nbytes for part in parts)
    return (*parts, Part(-1, "padding", padding)) if padding else tuple(parts)
