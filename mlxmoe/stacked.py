"""The experts of a checkpoint as it stands: a stock MLX one, or a Hugging Face folder with a tensor per expert.

An expert is a slice of each stacked tensor [E, ...], found by offset, so it can be read without the others. Which tensor
on disk a weight of the model is, mlx-lm's own `sanitize` tells (through mlxmoe.models): what it hands through unchanged
lies in the file as the model wants it. Where it computes something instead (fused or packed otherwise), an expert is no
slice of the file, and repack.py writes one that is.

Shapes: E experts, N rows and K columns of a projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import infer_quant_config

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.errors import UserError
from mlxmoe.formats import array_bytes
from mlxmoe.models import ExpertSite, expert_sites, model_classes
from mlxmoe.reader import Read, Reader
from mlxmoe.store import ExpertSource, Part, SourceLayer, Span, StoreFile, TensorInfo, read_header

# Kind of a site: name of each projection in the model, and what it may be called where every expert has a tensor.
NAMES = {
    "glu": {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")},
    "mlp": {"fc1": ("fc1", "up_proj"), "fc2": ("fc2", "down_proj")},
}
FIELDS = ("weight", "scales", "biases")
ARRAY_DTYPES = {  # by their names in safetensors
    "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8, "I32": mx.int32,
    "I64": mx.int64, "BOOL": mx.bool_,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in ARRAY_DTYPES.items()}


class StockField(NamedTuple):
    """One array of an expert matrix: "weight", "scales" or "biases", its dtype as safetensors writes it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class StockMatrix(NamedTuple):
    """One projection of every expert of a layer. `mode` is MLX's ("affine", "mxfp4", ...), or "dense" for plain floats,
    whose group size is 0. A bias of the output is no part of it: it is small and stays in the trunk."""

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int
    mode: str
    fields: tuple[StockField, ...]


class StockLayer(NamedTuple):
    site: ExpertSite
    matrices: tuple[StockMatrix, ...]

    def tensor_names(self) -> dict[tuple[int, str], str]:
        """(projection, field) -> name of the stacked tensor in the model."""
        return {
            (p, field.name): f"{self.site.path}.{matrix.name}.{field.name}"
            for p, matrix in enumerate(self.matrices)
            for field in matrix.fields
        }

    def empty(self) -> dict[str, mx.array]:
        """The stacks [E, ...] under the model's names, as lazy zeros."""
        return {
            f"{self.site.path}.{matrix.name}.{field.name}": mx.zeros(
                (self.site.num_experts, *field.shape), ARRAY_DTYPES[field.dtype]
            )
            for matrix in self.matrices
            for field in matrix.fields
        }


class StockModel:
    """A checkpoint seen through its model, no weight of it read.

    `tensors`: every array under the model's name, lazy. `on_disk`: the name on disk of those that sanitize hands through
    unchanged. Raises UserError for an unknown or dense architecture, and for
    tensors that do not fit config.json.
    """

    def __init__(self, checkpoint: Checkpoint):
        model_class, args_class = model_classes(checkpoint.config)
        model = model_class(args_class.from_dict(checkpoint.config))  # type: ignore[call-arg]
        loaded: dict[str, mx.array] = {}
        for shard in checkpoint.shards:
            loaded.update(cast(dict[str, mx.array], mx.load(str(shard))))
        try:
            self.tensors: dict[str, mx.array] = model.sanitize(dict(loaded))  # type: ignore[operator]
        except UserError:
            raise
        except ValueError as error:  # MLX cannot stack or split tensors of these shapes
            raise _unfit(checkpoint, f"tensors do not have the shapes that config.json says ({error})") from None
        ids = {id(array): name for name, array in loaded.items()}
        self.on_disk = {name: ids[id(array)] for name, array in self.tensors.items() if id(array) in ids}
        modules = dict(model.named_modules())
        self.layers = [self._layer(checkpoint, modules, site) for site in expert_sites(model)]
        if len({layer.site.layer for layer in self.layers}) < len(self.layers):
            raise UserError(
                f"{checkpoint.name} has layers with two sets of routed experts",
                "run it without streaming: give --memory enough for the whole model",
            )

    def _layer(self, checkpoint: Checkpoint, modules: dict[str, nn.Module], site: ExpertSite) -> StockLayer:
        matrices = []
        for name in NAMES[site.kind]:
            path = f"{site.path}.{name}"
            if f"{path}.weight" not in self.tensors:
                raise _unfit(checkpoint, f"the tensor {path}.weight is missing")
            arrays = {field: self.tensors[f"{path}.{field}"] for field in FIELDS if f"{path}.{field}" in self.tensors}
            matrices.append(_matrix(checkpoint, name, path, site, modules[path], arrays, self.tensors))
        return StockLayer(site, tuple(matrices))


def _matrix(
    checkpoint: Checkpoint,
    name: str,
    path: str,
    site: ExpertSite,
    module: nn.Module,
    arrays: dict[str, mx.array],
    tensors: dict[str, mx.array],
) -> StockMatrix:
    """What one projection is, from the shapes and dtypes of its stacks."""
    rows, columns = module["weight"].shape[-2:]
    weight = arrays["weight"]
    if "scales" in arrays:
        try:
            quantization = infer_quant_config(path, module, tensors)
        except ValueError as error:
            raise _unfit(checkpoint, str(error).split("\n")[0]) from None
    else:
        quantization = {"bits": 8 * weight.itemsize, "group_size": 0, "mode": "dense"}
    for field, array in arrays.items():
        if array.shape[:2] != (site.num_experts, rows):
            raise _unfit(checkpoint, f"{path}.{field} has shape {tuple(array.shape)}")
    if ("biases" in arrays) != (quantization["mode"] == "affine"):
        raise _unfit(checkpoint, f"{path} in the mode {quantization['mode']} has {', '.join(arrays)}")
    unknown = [array.dtype for array in arrays.values() if array.dtype not in DTYPE_NAMES]
    if unknown:
        raise _unfit(checkpoint, f"{path} has values of type {unknown[0]}")
    fields = tuple(
        StockField(field, DTYPE_NAMES[array.dtype], tuple(array.shape[1:]), array.nbytes // site.num_experts)
        for field, array in arrays.items()
    )
    return StockMatrix(name, rows, columns, fields=fields, **quantization)


def _unfit(checkpoint: Checkpoint, what: str) -> UserError:
    return UserError(
        f"{checkpoint.name}: {what}", "config.json and weights do not belong together: copy or download them again"
    )


class StackedStore:
    """An ExpertSource over a checkpoint as it stands: a span per tensor of an expert, fewer where they are neighbours.

    There are no checksums; a file that is changed in place is noticed. Raises UserError for a file that is missing or
    truncated, and for a layout in which experts are no slices.
    """

    def __init__(self, checkpoint: Checkpoint):
        model = StockModel(checkpoint)
        self.stock = {layer.site.layer: layer for layer in model.layers}
        self.layers = tuple(SourceLayer(s.layer, s.path, s.num_experts) for s in (x.site for x in model.layers))
        on_disk = _OnDisk(checkpoint)
        self._places = {layer.site.layer: _places(checkpoint, model, layer, on_disk) for layer in model.layers}
        self._spans: dict[tuple[int, int], tuple[Span, ...]] = {}
        self._files: dict[Path, StoreFile] = {}
        try:
            for path in sorted({place.path for row in self._places.values() for places in row for place in places}):
                self._files[path] = StoreFile(path)
        except BaseException:
            self.close()
            raise

    def spans(self, layer: int, expert: int, planes: range | None = None) -> tuple[Span, ...]:
        assert planes is None or planes == range(1), "a stock checkpoint has one plane"
        key = layer, expert
        if key not in self._spans:
            self._spans[key] = tuple(self._find_spans(layer, expert))
        return self._spans[key]

    def _find_spans(self, layer: int, expert: int) -> Iterator[Span]:
        """Neighbours in a file are read together."""
        label = f"layer {layer}, expert {expert}"
        span: Span | None = None
        for place in sorted(places[expert] for places in self._places[layer]):
            file = self._files[place.path]
            if span is not None and (span.file, span.offset + span.nbytes) != (file, place.offset):
                yield span
                span = None
            span = span or Span(file, place.offset, (), (), label)
            span = replace(span, parts=(*span.parts, place.part))
        if span is not None:
            yield span

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Where the experts lie
# ---------------------------------------------------------------------------------------------------------------------

_SINGLE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)*?experts\.(\d+)\.(\w+)\.(\w+)$")


class _Place(NamedTuple):
    """Where one field of one expert lies."""

    path: Path
    offset: int
    part: Part


class _OnDisk:
    """The tensors of all shards, by name and (those of a single expert) by layer, expert, projection and field."""

    def __init__(self, checkpoint: Checkpoint):
        self.tensors: dict[str, tuple[Path, TensorInfo]] = {}
        self.singles: dict[tuple[int, int, str, str], tuple[Path, TensorInfo]] = {}
        for path in checkpoint.shards:
            for name, info in read_header(path).items():
                self.tensors[name] = path, info
                if match := _SINGLE.search(name):
                    layer, expert, projection, field = match.groups()
                    self.singles[int(layer), int(expert), projection, field] = path, info


def _places(checkpoint: Checkpoint, model: StockModel, layer: StockLayer, on_disk: _OnDisk) -> list[list[_Place]]:
    """For every field of every projection, the place of each expert's. Raises UserError where there is none."""
    rows = []
    for (p, field_name), name in layer.tensor_names().items():
        field = next(field for field in layer.matrices[p].fields if field.name == field_name)
        part = Part(p, field_name, field.nbytes)
        whole = model.on_disk.get(name)
        if whole is not None:
            path, info = on_disk.tensors[whole]
            rows.append([_Place(path, info.offset + e * field.nbytes, part) for e in range(layer.site.num_experts)])
            continue
        singles = [
            _single(on_disk, layer, layer.matrices[p].name, field, expert) for expert in range(layer.site.num_experts)
        ]
        if None in singles:
            raise UserError(
                f"{checkpoint.name}: the experts of {name} are no slices of the files, so they cannot be read one by one",
                "write a folder in which they can: mlxmoe repack (as it is), or mlxmoe convert (fewer bits)",
            )
        rows.append([_Place(path, info.offset, part) for path, info in filter(None, singles)])
    return rows


def _single(
    on_disk: _OnDisk, layer: StockLayer, projection: str, field: StockField, expert: int
) -> tuple[Path, TensorInfo] | None:
    """The tensor of one expert alone, where there is one of the right type and shape."""
    for name in NAMES[layer.site.kind][projection]:
        found = on_disk.singles.get((layer.site.layer, expert, name, field.name))
        if found is not None and (found[1].dtype, found[1].shape) == (field.dtype, field.shape):
            return found
    return None


# ---------------------------------------------------------------------------------------------------------------------
# All experts of a layer at once
# ---------------------------------------------------------------------------------------------------------------------


class StockSource(ExpertSource, Protocol):
    """An ExpertSource whose experts have MLX's own formats."""

    @property
    def stock(self) -> Mapping[int, StockLayer]:
        """Layer number -> what its experts are made of."""
        ...


def read_layer(source: StockSource, reader: Reader, layer: int) -> dict[str, mx.array]:
    """The stacks [E, ...] of a layer under the model's names, evaluated. Blocks; raises UserError as reading does."""
    stock = source.stock[layer]
    stacks = stock.empty()
    mx.eval(stacks)
    rows = {key: array_bytes(stacks[name]) for key, name in stock.tensor_names().items()}

    def row(part: Part, expert: int) -> memoryview | None:
        whole = rows.get((part.projection, part.field))
        return whole[expert * part.nbytes : (expert + 1) * part.nbytes] if whole is not None else None

    reads = [
        Read(span, [row(part, expert) for part in span.parts])
        for expert in range(stock.site.num_experts)
        for span in source.spans(layer, expert)
    ]
    reader.submit(reads).wait()
    return stacks
