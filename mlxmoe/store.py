"""Expert records on disk: written and read in one place, with no policy of what to read when.

`experts-*.safetensors` are valid safetensors whose data starts on a 4 KiB boundary (the header is padded with spaces, as
the format allows) and whose tensors are uint8 records, each a multiple of 4 KiB, so that a record is one aligned read.
One record per (layer, expert, plane), the planes of an expert one after the other: the packed words of that plane of
each projection that has it, and in plane 0 behind them the float16 scales of every projection.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxmoe.errors import UserError
from mlxmoe.formats import num_planes
from mlxmoe.plan import ExpertEntry, LayerPlan

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


def layer_header(layer: LayerPlan) -> bytes:
    return encode_header({name: ("U8", (nbytes,), nbytes) for _, _, name, nbytes in layer_records(layer)})


def layer_file_nbytes(layer: LayerPlan) -> int:
    """Bytes of the layer's file, header and padding included."""
    return len(layer_header(layer)) + sum(nbytes for *_, nbytes in layer_records(layer))


class ExpertStore:
    """The records of a converted folder, opened and checked: every record of the plan is there with its size.

    Reads are positional and may come from any thread. Raises UserError for a file that is missing, truncated, does not
    fit the plan, or whose record has the wrong checksum.
    """

    def __init__(self, folder: Path, layers: tuple[LayerPlan, ...]):
        self._files: dict[str, int] = {}
        self._records: dict[tuple[int, int, int], tuple[str, int, int]] = {}
        self._folder = folder
        self._entries = {(layer.layer, e): entry for layer in layers for e, entry in enumerate(layer.experts)}
        for layer in layers:
            tensors = read_header(folder / layer.file)
            for e, plane, name, nbytes in layer_records(layer):
                info = tensors.get(name)
                if info is None or info.nbytes != nbytes:
                    found = f"{info.nbytes} bytes" if info else "nothing"
                    raise UserError(
                        f"{folder / layer.file} has {found} for {name}, the plan says {nbytes} bytes",
                        "the folder was changed after conversion: convert or copy it again",
                    )
                self._records[layer.layer, e, plane] = (layer.file, info.offset, nbytes)
            self._files[layer.file] = os.open(folder / layer.file, os.O_RDONLY)

    def read(self, layer: int, expert: int, plane: int) -> np.ndarray:
        """One record as uint8 [bytes], its checksum verified. Blocks until it is read."""
        file, offset, nbytes = self._records[layer, expert, plane]
        record = np.empty(nbytes, np.uint8)
        view, done = record.data, 0
        while done < nbytes:
            got = os.preadv(self._files[file], [view[done:]], offset + done)
            if got == 0:
                raise self._damaged(file, layer, expert, plane, "ends early")
            done += got
        if zlib.crc32(view) != self._entries[layer, expert].crc32[plane]:
            raise self._damaged(file, layer, expert, plane, "has a wrong checksum")
        return record

    def _damaged(self, file: str, layer: int, expert: int, plane: int, what: str) -> UserError:
        return UserError(
            f"{self._folder / file}: the record of layer {layer}, expert {expert}, plane {plane} {what}",
            "the file is damaged: copy or convert it again",
        )

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
