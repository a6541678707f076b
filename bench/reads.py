"""`mlxmoe bench reads`: how fast experts arrive, against a plain `preadv` loop, and a missed one against the obvious ways.

Both sides of a comparison run in turns on the same file, records and memory, so that what else the machine does strikes
both alike. What "cold" means: the pages were dropped from the page cache before each measurement (on Linux); a disk may
have caches of its own. Checksums were verified by an earlier read, as in a running model.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlxmoe.arguments import print_json
from mlxmoe.bench.timing import Ratio, Spread, interleave
from mlxmoe.checkpoint import Checkpoint, open_checkpoint
from mlxmoe.errors import UserError
from mlxmoe.formats import array_bytes
from mlxmoe.reader import DEFAULT_THREADS, Probe, Read, Reader, open_direct, probe
from mlxmoe.repack import Repack, RepackedStore
from mlxmoe.stacked import StackedStore, StockModel
from mlxmoe.store import PAGE, ExpertSource, Part, Span, StoreFile, encode_header, read_header

SIZES = (1 << 20, 3 << 20, 6 << 20)  # of records: what an expert takes in the models of today
THREADS = (1, 4, 8)
# Of the page cache; macOS has no call that drops a file from it
CACHE_STATES = ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",)
STATES = (*CACHE_STATES, "direct")
_BATCH_NBYTES = 48 << 20  # per measurement


class ReadRate(NamedTuple):
    """MB/s of records of one size through the reader, and of a plain loop with as many threads; ratio of the pairs."""

    nbytes: int
    threads: int
    state: str  # warm or cold page cache, or direct: past it
    reader: Spread
    plain: Spread
    ratio: Ratio

    def as_json(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).as_json() for name in ("reader", "plain", "ratio")}
        return {"bytes": self.nbytes, "threads": self.threads, "state": self.state, **parts}


def drop_pages(descriptor: int) -> None:
    """Takes a file out of the page cache."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_rates(
    path: Path,
    sizes: Sequence[int] = SIZES,
    threads: Sequence[int] = THREADS,
    states: Sequence[str] = STATES,
    repeats: int = 15,
    after: Callable[[], Any] = lambda: None,
) -> list[ReadRate]:
    """Reads records at random pages of a file, split over nine destinations as an expert of MLX's is, into memory that MLX
    owns. `after` is called after each of the `2 * repeats` measurements of every combination."""
    file = StoreFile(path)
    try:
        nbytes = file.stamp()[0]
        rates = []
        for size in sizes:
            assert nbytes >= size, f"{path} has {nbytes} bytes"
            batch = _Batch(file, size, min(_BATCH_NBYTES, nbytes) // size)
            for state in states:
                rates += [batch.rate(count, state, repeats, after) for count in threads]
        return rates
    finally:
        file.close()


def _split(row: memoryview, parts: Sequence[Part]) -> list[memoryview]:
    """Consecutive pieces of memory, one per part."""
    pieces, at = [], 0
    for part in parts:
        pieces.append(row[at : at + part.nbytes])
        at += part.nbytes
    return pieces


class _Batch:
    """Records of one size and the memory that they are read into, row by row."""

    def __init__(self, file: StoreFile, nbytes: int, count: int):
        self._file, self._nbytes, self._count = file, nbytes, count
        self._random = random.Random(0)
        self._bank = mx.zeros((count, nbytes), mx.uint8)
        mx.eval(self._bank)
        memory = array_bytes(self._bank)
        self._rows = [memory[i * nbytes : (i + 1) * nbytes] for i in range(count)]
        scales = nbytes // 27 // 64 * 64
        weight = (nbytes - 6 * scales) // 3 // 64 * 64
        fields = [("weight", weight), ("scales", scales), ("biases", scales)] * 3
        fields[-1] = "biases", scales + nbytes - sum(n for _, n in fields)
        self._parts = tuple(Part(i // 3, name, n) for i, (name, n) in enumerate(fields))

    def rate(self, threads: int, state: str, repeats: int, after: Callable[[], Any]) -> ReadRate:
        direct = state == "direct"
        plain_loop = _PlainLoop(self._file.path, self._rows, threads, direct)
        with Reader(threads, direct) as reader, closing(plain_loop):
            ways = self._through(reader), plain_loop
            ours, plain = interleave([partial(self._mb_per_s, way, state) for way in ways], repeats, after)
        return ReadRate(self._nbytes, threads, state, Spread.of(ours), Spread.of(plain), Ratio.of(ours, plain))

    def _mb_per_s(self, run: Callable[[list[int]], float], state: str) -> float:
        pages = (self._file.stamp()[0] - self._nbytes) // PAGE + 1
        offsets = [self._random.randrange(pages) * PAGE for _ in range(self._count)]
        if state == "warm":
            for offset, row in zip(offsets, self._rows, strict=True):
                os.preadv(self._file.descriptor, [row], offset)
        elif state == "cold":
            drop_pages(self._file.descriptor)
        return self._count * self._nbytes / run(offsets) / 1e6

    def _through(self, reader: Reader) -> Callable[[list[int]], float]:
        def run(offsets: list[int]) -> float:
            reads = [
                Read(Span(self._file, offset, self._parts, (), "a record"), _split(row, self._parts))
                for offset, row in zip(offsets, self._rows, strict=True)
            ]
            begin = time.perf_counter()
            reader.submit(reads).wait()
            return time.perf_counter() - begin

        return run


class _PlainLoop:
    """Threads that each read their share of the records, one call a record, and wait for the next round.

    Direct reads need memory on a page boundary, which MLX's need not be: they end in memory of the thread's own.
    """

    def __init__(self, path: Path, rows: Sequence[memoryview], threads: int, direct: bool):
        self._descriptor = open_direct(path) if direct else os.open(path, os.O_RDONLY)
        self._rows, self._direct = rows, direct
        self._offsets: list[int] = []
        self._begin, self._end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
        self._threads = [threading.Thread(target=self._read_shares, args=(i, threads)) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def __call__(self, offsets: list[int]) -> float:
        """Seconds to read a record at each offset."""
        self._offsets = offsets
        begin = time.perf_counter()
        self._begin.wait()
        self._end.wait()
        return time.perf_counter() - begin

    def close(self) -> None:
        self._begin.abort()
        for thread in self._threads:
            thread.join()
        os.close(self._descriptor)

    def _read_shares(self, first: int, threads: int) -> None:
        own = memoryview(mmap.mmap(-1, self._rows[0].nbytes)) if self._direct else None
        with suppress(threading.BrokenBarrierError):
            while True:
                self._begin.wait()
                for i in range(first, len(self._offsets), threads):
                    row, done = own or self._rows[i], 0
                    while done < row.nbytes:
                        done += os.preadv(self._descriptor, [row[done:]], self._offsets[i] + done)
                self._end.wait()


# ---------------------------------------------------------------------------------------------------------------------
# A missed expert
# ---------------------------------------------------------------------------------------------------------------------


class MissTime(NamedTuple):
    """Seconds per missed expert of one way of getting it, and how many times those of the first source it takes."""

    way: str
    state: str  # warm or cold page cache
    seconds: Spread
    ratio: Ratio

    def as_json(self) -> dict[str, Any]:
        return {"way": self.way, "state": self.state, **{n: getattr(self, n).as_json() for n in ("seconds", "ratio")}}


def miss_times(
    checkpoint: Checkpoint,
    sources: Mapping[str, ExpertSource],
    threads: int = DEFAULT_THREADS,
    misses: int = 8,
    repeats: int = 9,
    after: Callable[[], Any] = lambda: None,
) -> list[MissTime]:
    """`misses` experts at random of a stock checkpoint, through the reader from each of `sources` (the same experts,
    such as a StackedStore and a RepackedStore), and with what comes to mind first:

    mx.load   the shard is opened, the expert's slice of each tensor evaluated: MLX reads the tensor
    memmap    of tensors that are mapped already, the expert's slice is copied and made an array

    Every way takes up what it reads in memory of MLX's own. `after` is called after each of the
    `repeats * (len(sources) + 2)` measurements of each state.
    """
    alternatives = _Alternatives(checkpoint)
    picks = random.Random(0)
    experts = [(layer.layer, e) for layer in next(iter(sources.values())).layers for e in range(layer.num_experts)]
    times = []
    with Reader(threads) as reader:
        ways: dict[str, Callable[[list[tuple[int, int]]], float]] = {
            name: _through_reader(reader, source, experts, misses) for name, source in sources.items()
        }
        ways |= {"mx.load": alternatives.load, "memmap": alternatives.memmap}
        for state in CACHE_STATES:

            def run(way: str, state: str = state) -> float:
                chosen = picks.sample(experts, min(misses, len(experts)))
                for source in sources.values():
                    _prepare(reader, source, chosen, state)
                return ways[way](chosen)

            results = interleave([partial(run, way) for way in ways], repeats, after)
            times += [
                MissTime(way, state, Spread.of(seconds), Ratio.of(seconds, results[0]))
                for way, seconds in zip(ways, results, strict=True)
            ]
    return times


def _prepare(reader: Reader, source: ExpertSource, experts: Sequence[tuple[int, int]], state: str) -> None:
    """Warm: the experts are read once. Cold: the source's files are dropped from the page cache."""
    spans = [span for expert in experts for span in source.spans(*expert)]
    if state == "warm":
        reader.submit([Read(span) for span in spans]).wait()
    for file in {span.file for span in spans} if state == "cold" else ():
        drop_pages(file.descriptor)


def _through_reader(
    reader: Reader, source: ExpertSource, experts: Sequence[tuple[int, int]], misses: int
) -> Callable[[list[tuple[int, int]]], float]:
    """Into a row of memory per missed expert, as a cache has it."""
    nbytes = max(sum(span.nbytes for span in source.spans(*expert)) for expert in experts)
    bank = mx.zeros((misses, nbytes), mx.uint8)
    mx.eval(bank)
    memory = array_bytes(bank)

    def run(chosen: list[tuple[int, int]]) -> float:
        begin = time.perf_counter()
        reads = []
        for row, expert in enumerate(chosen):
            at = row * nbytes
            for span in source.spans(*expert):
                reads.append(Read(span, _split(memory[at : at + span.nbytes], span.parts)))
                at += span.nbytes
        reader.submit(reads).wait()
        return (time.perf_counter() - begin) / len(chosen)

    return run


class _Alternatives:
    """The obvious ways of getting an expert out of stacked tensors."""

    def __init__(self, checkpoint: Checkpoint):
        model = StockModel(checkpoint)
        shards = {name: (path, info) for path in checkpoint.shards for name, info in read_header(path).items()}
        self._tensors = {
            layer.site.layer: [(model.on_disk[n], *shards[model.on_disk[n]]) for n in layer.tensor_names().values()]
            for layer in model.layers
        }

    def load(self, chosen: list[tuple[int, int]]) -> float:
        """Of the first only: one takes as long as hundreds by the other ways."""
        layer, expert = chosen[0]
        begin = time.perf_counter()
        shards = {path: cast(dict[str, mx.array], mx.load(str(path))) for _, path, _ in self._tensors[layer]}
        mx.eval([shards[path][name][expert] for name, path, _ in self._tensors[layer]])
        return time.perf_counter() - begin

    def memmap(self, chosen: list[tuple[int, int]]) -> float:
        mapped = {
            layer: [
                np.memmap(path, np.uint8, "r", info.offset, (info.shape[0], info.nbytes // info.shape[0]))
                for _, path, info in tensors
            ]
            for layer, tensors in self._tensors.items()
        }
        begin = time.perf_counter()
        for layer, expert in chosen:
            mx.eval([mx.array(np.array(tensor[expert])) for tensor in mapped[layer]])
        return (time.perf_counter() - begin) / len(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyntheticShape:
    """The experts of a stock 4-bit checkpoint; by default those of Qwen3-30B-A3B, fewer and in fewer layers (2.65 MB
    each, 680 MB in all)."""

    layers: int = 4
    num_experts: int = 64
    hidden: int = 2048
    width: int = 768

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.width,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_experts": self.num_experts,
            "num_experts_per_tok": min(8, self.num_experts),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "quantization": {"group_size": 64, "bits": 4, "mode": "affine"},
        }


def write_stock(folder: Path, shape: SyntheticShape) -> None:
    """A stock checkpoint of random bytes with routed experts and nothing else: enough to read from and to repack."""
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("gate_proj", shape.width, shape.hidden),
            ("up_proj", shape.width, shape.hidden),
            ("down_proj", shape.hidden, shape.width),
        ):
            path, stack = f"model.layers.{layer}.mlp.switch_mlp.{name}", (shape.num_experts, rows)
            tensors[f"{path}.weight"] = "U32", (*stack, columns // 8), math.prod(stack) * columns // 2
            for field in ("scales", "biases"):
                tensors[f"{path}.{field}"] = "BF16", (*stack, columns // 64), math.prod(stack) * columns // 32
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config()))
    left, block = sum(nbytes for *_, nbytes in tensors.values()), random.Random(0).randbytes(1 << 24)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(encode_header(tensors))
        while left:
            left -= file.write(block[:left])
        file.flush()
        os.fsync(file.fileno())  # pages that are not on the disk cannot be dropped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="a folder on the disk to measure; 1.4 GB are written, and removed at the end (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=15, metavar="N", help="measurements of each kind (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="last line of stdout is one JSON object (default: text)")


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected 1 or more", "leave --repeats out for the default")
    if not args.folder.is_dir():
        raise UserError(f"there is no folder {args.folder}", "name a folder on the disk to measure")
    result = bench_reads(args.folder, args.repeats)
    for line in report_lines(result):
        print(line)
    if args.json:
        print_json(
            {
                "read_rates": [rate.as_json() for rate in result.rates],
                "miss_times": [miss.as_json() for miss in result.misses],
                "probe": result.probe.as_json(),
            }
        )
    return 0


class Result(NamedTuple):
    rates: list[ReadRate]
    misses: list[MissTime]
    probe: Probe


def bench_reads(
    folder: Path, repeats: int, shape: SyntheticShape = SyntheticShape(), sizes: Sequence[int] = SIZES
) -> Result:
    """Writes a synthetic checkpoint into a folder of its own in `folder`, and its repacked form, and measures both."""
    total = 2 * repeats * len(sizes) * len(THREADS) * len(STATES) + repeats * len(CACHE_STATES) * 4
    with tempfile.TemporaryDirectory(dir=folder, prefix="mlxmoe-reads-") as name:
        work = Path(name)
        write_stock(work / "stock", shape)
        Repack(work / "stock", work / "repacked").run()
        checkpoint = open_checkpoint(work / "stock")
        stacked, repacked = StackedStore(checkpoint), RepackedStore(work / "repacked")
        try:
            with tqdm(total=total, desc="bench reads") as bar:
                rates = read_rates(checkpoint.shards[0], sizes, repeats=repeats, after=bar.update)
                sources: dict[str, ExpertSource] = {"repacked": repacked, "as it is": stacked}
                misses = miss_times(checkpoint, sources, repeats=repeats, after=bar.update)
            spans = [span for x in repacked.layers for e in range(x.num_experts) for span in repacked.spans(x.layer, e)]
            return Result(rates, misses, probe(spans))
        finally:
            stacked.close()
            repacked.close()


def report_lines(result: Result) -> Iterator[str]:
    yield "MB/s of records (medians), reader and plain preadv loop; ratio of the pairs (lowest to highest)"
    for rate in result.rates:
        yield (
            f"{rate.nbytes >> 20} MiB {rate.threads} threads {rate.state:6}  {rate.reader.median:7.0f} "
            f"{rate.plain.median:7.0f}  {rate.ratio.median_of_pairs:.2f} ({rate.ratio.low:.2f} to {rate.ratio.high:.2f})"
        )
    yield "ms per missed expert (medians), and how many times that of a repacked one"
    for miss in result.misses:
        yield f"{miss.state:4} {miss.way:9} {1000 * miss.seconds.median:9.3f}  {miss.ratio.of_medians:7.1f}"
    chosen = "past the page cache" if result.probe.direct else "through the page cache"
    yield f"a start-up probe chose {result.probe.threads} threads, {chosen}"
