"""`mlxmoe repack SRC OUT`: a checkpoint as it stands, laid out so that an expert is one read.

    OUT/config.json, tokenizer files    the source's
    OUT/model-*.safetensors             everything but routed experts, under the model's own names
    OUT/experts-*.safetensors           a file per MoE layer, a uint8 record per expert, on 4 KiB boundaries
    OUT/repack.json                     formats, checksums, hashes, and what it was made from

Nothing is quantized or rounded: a record holds the very bytes that the checkpoint's experts have once mlx-lm has read
them, so it also takes layouts of which no expert can be sliced (fused projections, block-scaled fp8). Memory: the experts
of one layer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlxmoe import __version__
from mlxmoe.arguments import note, print_json
from mlxmoe.checkpoint import REPACK_FILE, Checkpoint, open_checkpoint, side_files
from mlxmoe.errors import UserError
from mlxmoe.files import parse_versioned
from mlxmoe.formats import array_bytes
from mlxmoe.models import ExpertSite
from mlxmoe.plan import FileEntry
from mlxmoe.stacked import ARRAY_DTYPES, DTYPE_NAMES, FIELDS, NAMES, StockField, StockLayer, StockMatrix, StockModel
from mlxmoe.store import PAGE, Check, Part, SourceLayer, Span, StoreFile, encode_header, read_header
from mlxmoe.units import format_size
from mlxmoe.work import WorkFolder, whole_file, write_whole

REPACK_FORMAT = "mlxmoe-repack"
REPACK_VERSION = 1
TRUNK_FILE_NBYTES = 1_000_000_000
_AGAIN = "repack the model again"


# ---------------------------------------------------------------------------------------------------------------------
# repack.json
# ---------------------------------------------------------------------------------------------------------------------


class RepackedLayer(NamedTuple):
    """The records of one layer: what is in them, the file, and the CRC-32 of each expert's."""

    stock: StockLayer
    file: str
    crc32: tuple[int, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a record holds: the fields of every projection in turn, then zeros up to a whole page."""
        parts = [
            Part(p, field.name, field.nbytes) for p, matrix in enumerate(self.stock.matrices) for field in matrix.fields
        ]
        padding = -sum(part.nbytes for part in parts) % PAGE
        return (*parts, Part(-1, "padding", padding)) if padding else tuple(parts)

    @property
    def record_nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def header(self) -> bytes:
        """The file's safetensors header."""
        nbytes = self.record_nbytes
        layer, experts = self.stock.site.layer, self.stock.site.num_experts
        return encode_header({record_name(layer, e): ("U8", (nbytes,), nbytes) for e in range(experts)})

    @property
    def file_nbytes(self) -> int:
        return len(self.header()) + self.stock.site.num_experts * self.record_nbytes


def record_name(layer: int, expert: int) -> str:
    return f"L{layer}.E{expert}"


@dataclass(frozen=True)
class Manifest:
    """repack.json. `source`: name, files: name -> [bytes, SHA-256]. `files`: those of the folder but itself."""

    model_type: str
    source: dict[str, Any]
    layers: tuple[RepackedLayer, ...]
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the folder but repack.json itself."""
        return sum(entry.nbytes for entry in self.files.values())

    def dumps(self) -> str:
        """The JSON text, one line per layer."""
        head = {
            "format": REPACK_FORMAT,
            "version": REPACK_VERSION,
            "model_type": self.model_type,
            "source": self.source,
            "files": self.files,
        }
        lines = [f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in head.items()]
        layers = ",\n".join(json.dumps(_layer_json(layer), separators=(",", ":")) for layer in self.layers)
        return "{" + ",\n".join(lines) + ',\n"layers":[\n' + layers + "]}\n"

    @classmethod
    def loads(cls, text: str, name: str = REPACK_FILE) -> Manifest:
        """Raises UserError for text that is no manifest or is one of a newer version."""
        data = parse_versioned(text, name, "a manifest of mlxmoe repack", REPACK_FORMAT, REPACK_VERSION, _AGAIN)
        try:
            version = data.get("version")
            if version != REPACK_VERSION:
                raise ValueError(f"format version {version!r}")
            return cls(
                model_type=data["model_type"],
                source=data["source"],
                layers=tuple(map(_load_layer, data["layers"])),
                files={path: FileEntry(*entry) for path, entry in data["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{name} is damaged: {type(error).__name__} {error}", _AGAIN) from None

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        path = folder / REPACK_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not text", _AGAIN) from None
        return cls.loads(text, str(path))


def _layer_json(layer: RepackedLayer) -> dict[str, Any]:
    projections = [{**matrix._asdict(), "fields": [[*f] for f in matrix.fields]} for matrix in layer.stock.matrices]
    return {**layer.stock.site._asdict(), "file": layer.file, "projections": projections, "crc32": layer.crc32}


def _load_layer(data: dict[str, Any]) -> RepackedLayer:
    site = ExpertSite(*(data[name] for name in ExpertSite._fields))
    matrices = []
    for projection in data["projections"]:
        fields = tuple(StockField(name, dtype, tuple(shape), n) for name, dtype, shape, n in projection["fields"])
        matrices.append(StockMatrix(**{**projection, "fields": fields}))
        for each in fields:
            if each.name not in FIELDS or each.nbytes != math.prod(each.shape) * ARRAY_DTYPES[each.dtype].size:
                raise ValueError(f"layer {site.layer}: {list(each)}")
    layer = RepackedLayer(StockLayer(site, tuple(matrices)), data["file"], tuple(data["crc32"]))
    if [matrix.name for matrix in matrices] != list(NAMES[site.kind]) or len(layer.crc32) != site.num_experts:
        raise ValueError(f"layer {site.layer} has {len(matrices)} projections and {len(layer.crc32)} checksums")
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class RepackedStore:
    """An ExpertSource over a repacked folder, opened and checked: one span per expert, with a checksum.

    Raises UserError for a file that is missing, truncated or does not fit repack.json.
    """

    def __init__(self, folder: Path):
        manifest = Manifest.load(folder)
        self.stock = {layer.stock.site.layer: layer.stock for layer in manifest.layers}
        self.layers = tuple(SourceLayer(s.layer, s.path, s.num_experts) for s in (x.site for x in self.stock.values()))
        self._spans: dict[tuple[int, int], Span] = {}
        self._files: list[StoreFile] = []
        try:
            for layer in manifest.layers:
                self._open(folder / layer.file, layer)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, layer: RepackedLayer) -> None:
        tensors = read_header(path)
        file = StoreFile(path)
        self._files.append(file)
        number, parts, nbytes = layer.stock.site.layer, layer.parts, layer.record_nbytes
        for expert, crc32 in enumerate(layer.crc32):
            info = tensors.get(record_name(number, expert))
            if info is None or info.nbytes != nbytes:
                found = f"{info.nbytes} bytes" if info else "nothing"
                raise UserError(
                    f"{path} has {found} for {record_name(number, expert)}, {REPACK_FILE} says {nbytes} bytes",
                    "the folder was changed: repack or copy it again",
                )
            label = f"layer {number}, expert {expert}"
            self._spans[number, expert] = Span(file, info.offset, parts, (Check(0, nbytes, crc32),), label)

    def spans(self, layer: int, expert: int, planes: range | None = None) -> tuple[Span, ...]:
        assert planes is None or planes == range(1), "a repacked checkpoint has one plane"
        return (self._spans[layer, expert],)

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()


def repacked_class(model_class: type[nn.Module], store: RepackedStore) -> type[nn.Module]:
    """The model class for a repacked folder's other weights, which already carry the model's own names.

    Its experts are lazy zeros of the right shapes and types, for whoever replaces the experts, or updates the model with
    `stacked.read_layer` of every layer. Evaluates nothing.
    """

    class Repacked(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {**weights, **{name: array for s in store.stock.values() for name, array in s.empty().items()}}

    return Repacked


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What was written, or would be under --dry-run. Bytes of files; `nbytes` without repack.json."""

    model_type: str
    layers: tuple[RepackedLayer, ...]
    nbytes_experts: int
    nbytes_trunk: int
    nbytes: int

    def as_json(self, dry_run: bool) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "layers": len(self.layers),
            "experts": sum(layer.stock.site.num_experts for layer in self.layers),
            "bytes_record": max(layer.record_nbytes for layer in self.layers),
            "bytes_experts": self.nbytes_experts,
            "bytes_trunk": self.nbytes_trunk,
            "bytes": self.nbytes,
            "dry_run": dry_run,
        }


class Repack:
    """One repacking, known by the source's shapes. Reads no weight and writes nothing before `run`.

    Raises UserError for a source that is no checkpoint of routed experts or is converted or repacked already.
    """

    def __init__(self, source: str | Path, output: Path, quiet: bool = False):
        self.checkpoint = open_checkpoint(source)
        if self.checkpoint.kind in ("converted", "repacked"):
            raise UserError(
                f"{self.checkpoint.name} is {self.checkpoint.kind} already: an expert of it is one read as it stands",
                "repack a stock MLX checkpoint or a Hugging Face folder",
            )
        self.work = WorkFolder(output, "repacking", REPACK_FILE)
        self._quiet = quiet
        model = StockModel(self.checkpoint)
        count = len(model.layers)
        self.layers = tuple(
            RepackedLayer(stock, f"experts-{i:05}-of-{count:05}.safetensors", ())
            for i, stock in enumerate(model.layers, 1)
        )
        experts = {name for layer in model.layers for name in layer.tensor_names().values()}
        self._tensors = model.tensors
        self._shards = _trunk_shards(self.checkpoint, {k: v for k, v in model.tensors.items() if k not in experts})
        self._side = {**side_files(self.checkpoint.folder), "config.json": self._config()}

    def outcome(self) -> Outcome:
        """What `run` writes."""
        experts = sum(layer.file_nbytes for layer in self.layers)
        trunk = sum(len(s.header()) + s.nbytes for s in self._shards)
        side = sum(map(len, self._side.values()))
        return Outcome(self.checkpoint.config["model_type"], self.layers, experts, trunk, experts + trunk + side)

    def run(self, resume: bool = False) -> Outcome:
        """Repacks. Raises UserError when OUT exists, when work is left over and `resume` was not asked for, when that was
        of another source, when the source changes meanwhile or cannot be read, and when the disk is full."""
        self.work.check(resume)
        outcome = self.outcome()
        mx.set_cache_limit(0)  # freed buffers go back at once: peak memory is what one layer needs
        with self.work.locked():
            source = self._claim()
            if not self.work.complete:
                self.work.check_space(outcome.nbytes)
                with self._progress("repack", outcome.nbytes) as progress:
                    manifest = self._write(source, progress)
                assert manifest.nbytes == outcome.nbytes
                self._check_unchanged(source)
                write_whole(self.work.folder / REPACK_FILE, manifest.dumps().encode())
            self.work.publish()
        return outcome

    def _write(self, source: dict[str, Any], progress: Callable[[int], Any]) -> Manifest:
        """Writes every file that is not there yet. Takes the tensors out of memory one layer or shard at a time."""
        files: dict[str, FileEntry] = {}
        layers = []
        for layer in self.layers:
            done = self.work.done(layer.file)
            if done is None:
                entry, crc32 = self._write_layer(layer)
                done = {"file": entry, "crc32": crc32}
                self.work.mark_done(layer.file, done)
            self._forget(list(layer.stock.tensor_names().values()))
            files[layer.file] = FileEntry(*done["file"])
            layers.append(layer._replace(crc32=tuple(done["crc32"])))
            progress(files[layer.file].nbytes)
        for shard in self._shards:
            done = self.work.done(shard.file)
            if done is None:
                done = {"file": self._write_shard(shard)}
                self.work.mark_done(shard.file, done)
            self._forget(list(shard.tensors))
            files[shard.file] = FileEntry(*done["file"])
            progress(files[shard.file].nbytes)
        for name, data in self._side.items():
            files[name] = write_whole(self.work.folder / name, data)
            progress(len(data))
        return Manifest(self.checkpoint.config["model_type"], source, tuple(layers), dict(sorted(files.items())))

    def _write_layer(self, layer: RepackedLayer) -> tuple[FileEntry, list[int]]:
        """The records of one layer and their checksums."""
        names = layer.stock.tensor_names()
        stacks = [self._bytes(names[part.projection, part.field]) for part in layer.parts if part.projection >= 0]
        checksums = []
        with whole_file(self.work.folder / layer.file) as file:
            file.write(layer.header())
            for expert in range(layer.stock.site.num_experts):
                record = b"".join(
                    stack[expert * part.nbytes : (expert + 1) * part.nbytes]
                    for stack, part in zip(stacks, layer.parts, strict=False)
                ).ljust(layer.record_nbytes, b"\0")
                checksums.append(zlib.crc32(record))
                file.write(record)
        return file.entry, checksums

    def _write_shard(self, shard: _Shard) -> FileEntry:
        with whole_file(self.work.folder / shard.file) as file:
            file.write(shard.header())
            for name in shard.tensors:
                file.write(self._bytes(name))
        return file.entry

    def _bytes(self, name: str) -> memoryview:
        """The bytes of a tensor of the model, read now."""
        try:
            array = mx.contiguous(self._tensors[name])
            mx.eval(array)
        except RuntimeError as error:
            raise UserError(
                f"{self.checkpoint.name}: {name} cannot be read ({str(error).splitlines()[0]})",
                "the files are damaged or were changed meanwhile: copy or download them again",
            ) from None
        return array_bytes(array)

    def _forget(self, names: list[str]) -> None:
        for name in names:
            del self._tensors[name]

    # -- the source ----------------------------------------------------------------------------------------------------

    def _claim(self) -> dict[str, Any]:
        """Which source this is, by the SHA-256 of each file; the same as that of the work found, if any was.

        A file with the size and time of modification that it had when it was hashed is not read again.
        """
        found = self.work.job()
        if found is None and self.work.complete:
            found = {"mlxmoe": __version__, "source": Manifest.load(self.work.folder).source, "stamps": {}}
        before = found["source"]["files"] if found else {}
        stamps = self._stamps()
        files = {}
        with self._progress("check source", sum(size for size, _ in stamps.values())) as progress:
            for path in self._source_files():
                if found and found["stamps"].get(path.name) == stamps[path.name]:
                    files[path.name] = before[path.name]
                    progress(stamps[path.name][0])
                else:
                    files[path.name] = list(_hash(path, progress))
        source = {"name": Path(self.checkpoint.name).name, "files": files}
        if found is None:
            self.work.claim({"mlxmoe": __version__, "source": source, "stamps": stamps})
            return source
        changed = sorted(name for name in {*before, *files} if before.get(name) != files.get(name))
        if found["mlxmoe"] != __version__:
            changed.insert(0, f"mlxmoe {found['mlxmoe']}")
        self.work.check_same(changed)
        return source

    def _check_unchanged(self, source: dict[str, Any]) -> None:
        """Raises UserError when a file is no longer what it was when it was hashed: the result would be made of two."""
        before, now = (self.work.job() or {})["stamps"], self._stamps()
        for path in self._source_files():
            name = path.name
            if before[name] != now[name] and list(_hash(path, lambda n: None)) != source["files"][name]:
                raise UserError(
                    f"{path} was changed while it was repacked", f"delete {self.work.folder} and start over"
                )

    def _source_files(self) -> list[Path]:
        return [self.checkpoint.folder / "config.json", *self.checkpoint.shards]

    def _stamps(self) -> dict[str, list[int]]:
        """Name -> size and time of modification of the source's files."""
        facts = {path.name: path.stat() for path in self._source_files()}
        return {name: [fact.st_size, fact.st_mtime_ns] for name, fact in facts.items()}

    def _config(self) -> bytes:
        """config.json without what it says of single expert projections: the model around them has none to quantize."""
        config = json.loads((self.checkpoint.folder / "config.json").read_text())
        paths = tuple(layer.stock.site.path + "." for layer in self.layers)
        for key in ("quantization", "quantization_config"):
            if isinstance(config.get(key), dict):
                config[key] = {name: value for name, value in config[key].items() if not name.startswith(paths)}
        return json.dumps(config, indent=2, ensure_ascii=False).encode()

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], Any]]:
        with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=self._quiet) as bar:
            yield bar.update


class _Shard(NamedTuple):
    """A file of the trunk: its name, and name -> (dtype code, shape, bytes) of its tensors in order."""

    file: str
    tensors: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(nbytes for *_, nbytes in self.tensors.values())

    def header(self) -> bytes:
        return encode_header(self.tensors)


def _trunk_shards(checkpoint: Checkpoint, tensors: dict[str, mx.array]) -> list[_Shard]:
    groups: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    filled = 0
    for name, array in sorted(tensors.items()):
        if array.dtype not in DTYPE_NAMES:
            raise UserError(f"{checkpoint.name}: {name} has values of type {array.dtype}", "please report this model")
        if groups[-1] and filled + array.nbytes > TRUNK_FILE_NBYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = DTYPE_NAMES[array.dtype], tuple(array.shape), array.nbytes
        filled += array.nbytes
    return [_Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, 1)]


def _hash(path: Path, progress: Callable[[int], Any]) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    digest, nbytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            nbytes += len(chunk)
            progress(len(chunk))
    return nbytes, digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a stock MLX checkpoint, a Hugging Face folder or a Hub id")
    parser.add_argument("output", metavar="OUT", type=Path, help="the folder to create")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished repacking (default: refuse)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written, and write nothing (default: write)"
    )
    parser.add_argument("--json", action="store_true", help="last line of stdout is one JSON object (default: text)")


def run(args: argparse.Namespace) -> int:
    repack = Repack(args.source, args.output)
    outcome = repack.outcome() if args.dry_run else repack.run(resume=args.resume)
    note(
        f"{repack.checkpoint.name}: {outcome.model_type}, {len(outcome.layers)} layers; experts "
        f"{format_size(outcome.nbytes_experts)}, other weights {format_size(outcome.nbytes_trunk)}"
    )
    if args.json:
        print_json(outcome.as_json(args.dry_run))
    else:
        print(f"would write {format_size(outcome.nbytes)}" if args.dry_run else args.output)
    return 0
