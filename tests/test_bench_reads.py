"""`mlxmoe bench reads` on a small file: every way measured, the right bytes read, nothing left behind."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxmoe.bench import reads
from mlxmoe.bench.reads import (
    CACHE_STATES,
    STATES,
    THREADS,
    SyntheticShape,
    bench_reads,
    miss_times,
    read_rates,
    write_stock,
)
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.stacked import StackedStore
from mlxmoe.store import PAGE

SMALL = SyntheticShape(layers=2, num_experts=8, hidden=128, width=64)
SIZES = (3 * PAGE, 10_000)


def test_everything_is_measured(tmp_path: Path) -> None:
    result = bench_reads(tmp_path, 1, SMALL, (3 * PAGE, 8 * PAGE))
    assert [(r.nbytes, r.state, r.threads) for r in result.rates] == [
        (size, state, threads) for size in (3 * PAGE, 8 * PAGE) for state in STATES for threads in THREADS
    ]
    assert all(rate.reader.low > 0 and rate.plain.low > 0 for rate in result.rates)
    assert [(miss.way, miss.state) for miss in result.misses] == [
        (way, state) for state in CACHE_STATES for way in ("repacked", "as it is", "mx.load", "memmap")
    ]
    assert all(miss.seconds.low > 0 for miss in result.misses)
    assert not list(tmp_path.iterdir())


def test_both_sides_bring_the_file_s_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.random.RandomState(0).bytes(40 * PAGE))
    file = reads.StoreFile(path)
    batch = reads._Batch(file, 3 * PAGE, 5)
    offsets = [0, PAGE, 7 * PAGE, 30 * PAGE, 37 * PAGE]
    wanted = [path.read_bytes()[offset : offset + 3 * PAGE] for offset in offsets]
    plain_loop = reads._PlainLoop(path, batch._rows, 3, direct=False)
    with reads.Reader(2) as reader, closing(plain_loop):
        for run in (batch._through(reader), plain_loop, plain_loop):
            for row in batch._rows:
                row[:] = bytes(len(row))
            assert run(offsets) > 0
            assert [bytes(row) for row in batch._rows] == wanted
    file.close()


def test_progress_counts_every_measurement(tmp_path: Path) -> None:
    write_stock(tmp_path / "stock", SMALL)
    checkpoint, steps = open_checkpoint(tmp_path / "stock"), []
    store = StackedStore(checkpoint)
    read_rates(checkpoint.shards[0], SIZES, (1, 2), ("warm",), repeats=3, after=lambda: steps.append("read"))
    miss_times(checkpoint, {"as it is": store}, misses=2, repeats=2, after=lambda: steps.append("miss"))
    assert (steps.count("read"), steps.count("miss")) == (2 * 3 * 4, len(CACHE_STATES) * 2 * 3)
    store.close()


def test_synthetic_checkpoint_is_what_mlx_reads(tmp_path: Path) -> None:
    write_stock(tmp_path / "stock", SMALL)
    weights = dict(mx.load(str(tmp_path / "stock" / "model.safetensors")))
    assert len(weights) == 2 * 3 * 3
    assert weights["model.layers.1.mlp.switch_mlp.down_proj.weight"].shape == (8, 128, 64 // 8)
    assert weights["model.layers.1.mlp.switch_mlp.down_proj.biases"].shape == (8, 128, 1)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    full = bench_reads
    monkeypatch.setattr(reads, "bench_reads", lambda folder, repeats: full(folder, repeats, SMALL, (PAGE,)))
    assert main(["bench", "reads", str(tmp_path), "--repeats", "1", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert {"read_rates", "miss_times", "probe"} == set(result)
    assert result["read_rates"][0]["reader"]["median"] > 0
    assert sum("threads" in line for line in out[:-1]) == len(result["read_rates"]) + 1
    assert main(["bench", "reads", str(tmp_path), "--repeats", "0"]) == 2
    assert main(["bench", "reads", str(tmp_path / "nothing")]) == 2
