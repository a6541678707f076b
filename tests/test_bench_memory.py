"""`mlxmoe bench memory`: its arguments, its bars, and that each section notices what it is there to notice."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxmoe.bench import memory
from mlxmoe.bench.checkpoint import CheckpointShape
from mlxmoe.bench.memory import (
    SECTIONS,
    Bar,
    Bench,
    MemoryConfig,
    Setting,
    add_arguments,
    build_seconds,
    ceiling_run,
    opened,
    report_lines,
    run,
    settings,
    streaming_memory,
    traces,
)
from mlxmoe.bench.reads import SyntheticShape
from mlxmoe.errors import UserError
from mlxmoe.policies import OFFLINE, POLICIES
from mlxmoe.prepared import full_memory, prepare, smallest_memory, smallest_streaming
from mlxmoe.runtime import RuntimeConfig

# Experts weigh more than what is kept free for buffers
TINY = CheckpointShape(
    num_hidden_layers=2, hidden_size=128, moe_intermediate_size=128, num_experts=64, num_attention_heads=1,
    num_key_value_heads=1, vocab_size=512,
)  # fmt: skip
FEW = [Setting(0.0, "lru", 2), Setting(0.5, "lfu", 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the synthetic models of all tests are kept."""
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models of a megabyte, and MLX's limits put back."""
    monkeypatch.setattr(memory, "shape_of_experts", lambda nbytes: TINY)
    monkeypatch.setattr(memory, "settings", lambda grid: FEW)
    monkeypatch.setattr(memory, "PREFETCH_TOKENS", 8)
    limits = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    yield
    mx.set_memory_limit(limits[0])
    mx.set_cache_limit(limits[1])


@pytest.fixture
def bench(folder: Path, tmp_path: Path) -> Bench:
    config = MemoryConfig(size=1000, small=1000, folder=folder, tokens=4, repeats=1, context=256, max_tokens=128)
    return Bench(replace(config, model=str(Bench(config, folder, tmp_path).synthetic(1000))), folder, tmp_path)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def nothing(count: int) -> None:
    pass


# -- bars and settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "below", "passed"), [(0.9, True, True), (1.0, True, True), (1.1, True, False), (0.9, False, False)]
)
def test_a_bar(value: float, below: bool, passed: bool) -> None:
    bar = Bar("largest peak", value, 1.0, below)
    assert bar.passed is passed
    assert bar.as_json()["passed"] is passed
    assert bar.line().startswith("pass" if passed else "FAIL")
    assert f"{value:.4g} ({'<=' if below else '>='} 1)" in bar.line()


@pytest.mark.parametrize("grid", [True, False])
def test_every_policy_budget_and_thread_count_is_tried(grid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real settings
    tried = memory.settings(grid)
    assert len(tried) == len(set(tried))
    assert {s.policy for s in tried} == POLICIES.keys() - set(OFFLINE)
    assert {s.share for s in tried} == set(memory.SHARES)
    assert {s.threads for s in tried} >= {1, 8}
    assert any(s.direct for s in tried)
    assert any(s.prefetch != "off" for s in tried)
    assert len(settings(True)) > len(settings(False))


@pytest.mark.parametrize("residency", [0.0, 0.3, 0.75])
def test_memory_for_a_residency(bench: Bench, residency: float) -> None:
    prepared = prepare(bench.synthetic(1000), RuntimeConfig(context=256))
    total = sum(sum(layer.sizes) for layer in prepared.streamed_shapes)
    found = streaming_memory(prepared, residency)
    assert prepared.streaming(found).budget >= residency * total
    least = prepared.streaming(0).least_memory
    assert found == least if residency == 0 else prepared.streaming(found - 2000).budget < residency * total
    with opened(bench.synthetic(1000), memory=found, context=256, exact=True) as loaded:
        assert loaded.experts is not None
        assert loaded.experts.capacity >= residency * total - len(prepared.streamed_shapes)


# -- sections ----------------------------------------------------------------------------------------------------------


def test_identity_holds(bench: Bench) -> None:
    section = memory.identity(bench, nothing)
    assert [bar.passed for bar in section.bars] == [True]
    assert {row["model"] for row in section.rows} == {"model", "synthetic converted", "synthetic mlx"}
    assert len(section.rows) == 3 * (len(FEW) + 3)
    assert {"streaming", "resident"} >= {row["mode"] for row in section.rows}


def test_identity_notices_a_different_bit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = memory.digests

    def differing(loaded: Any, prompt: Any, tokens: int) -> list[str]:
        found = digests(loaded, prompt, tokens)
        if loaded.experts is not None and loaded.report.kind == "mlx":
            found[-1] = "another"
        return found

    monkeypatch.setattr(memory, "digests", differing)
    section = memory.identity(bench, nothing)
    assert [bar.passed for bar in section.bars] == [False]
    assert [row["differing"] for row in section.rows if row["model"] == "synthetic mlx"][:2] == [1, 1]


def test_a_run_under_the_ceiling(bench: Bench) -> None:
    source = bench.synthetic(1000)
    least = streaming_memory(prepare(source, RuntimeConfig(context=256)), 0.0)
    found = ceiling_run(str(source), least, 256, exact=True)
    assert found["mode"] == "streaming"
    assert 0 < found["mlx_peak"] <= least
    assert found["rss_growth"] > 0
    assert found["planned"] <= least
    with pytest.raises(RuntimeError, match=f"with --memory {least // 2}: .*does not fit"):
        ceiling_run(str(source), least // 2, 256, exact=True)


def test_ceiling_has_a_run_for_every_mode(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, int, bool, int]] = []

    def run_as_planned(source: str | None, budget: int, context: int, exact: bool) -> dict[str, Any]:
        asked.append((source, budget, exact, context))
        return {"memory": budget, "mlx_peak": budget, "rss_growth": 2 * budget}

    monkeypatch.setattr(memory, "ceiling_run", run_as_planned)
    section = memory.ceiling(bench, nothing)
    assert [(bar.value, bar.passed) for bar in section.bars] == [(1.0, True), (2.0, False)]
    prepared = prepare(bench.model, RuntimeConfig(context=256))
    budgets = {budget for source, budget, _, context in asked if source == bench.model and context == 256}
    assert min(budgets) == smallest_streaming(prepared)
    assert smallest_memory(prepared) in budgets
    assert max(budgets) == full_memory(prepared)
    assert {exact for _, _, exact, _ in asked} == {True, False}
    assert len(set(asked)) == len(asked)


def test_speed_has_a_row_for_each_residency_and_way_of_reading(bench: Bench) -> None:
    rows = memory.speed(bench, nothing).rows
    assert [row["residency"] for row in rows] == [r for r in memory.RESIDENCIES for _ in range(2)] + [1.0]
    assert [row["mode"] for row in rows] == ["streaming"] * 6 + ["resident"]
    assert [row.get("direct") for row in rows] == [False, True] * 3 + [None]
    for row in rows[:-1]:
        assert 0 < row["hit_rate"] <= 1
        assert 0 <= row["wait_share"] < 1
    assert rows[0]["nbytes_read"] >= rows[4]["nbytes_read"]
    assert rows[-1]["hit_rate"] is None


def test_prefetch_is_compared_with_none(bench: Bench) -> None:
    rows = memory.prefetch(bench, nothing).rows
    assert [row["prefetch"] for row in rows] == 2 * ["off", "router", "previous"]
    assert [row["report"] is None for row in rows] == 2 * [True, False, False]
    plain, slowed = rows[:3], rows[3:]
    assert all(row["read_rate"] is None for row in plain)
    assert len({row["read_rate"] for row in slowed}) == 1
    # By how much is a matter of the machine; the rate is tested below
    assert slowed[0]["wait_share"] > plain[0]["wait_share"]
    facts = [line for line in report_lines({"sections": {"prefetch": {"rows": rows}}, "bars": []}) if "recall" in line]
    assert len(facts) == 4


def test_reads_are_slowed_down_to_a_multiple_of_computing() -> None:
    # 0.2 s a token, a quarter of it waiting: 0.15 s of computing, in twice of which 30 MB have to come
    row = {"tokens_per_second": 5.0, "wait_share": 0.25, "nbytes_read": 30e6}
    assert memory.slow_rate(row) == pytest.approx(100e6)


def test_elastic_has_a_twin_of_the_same_bytes(bench: Bench) -> None:
    section = memory.elastic(bench, nothing)
    (row,) = section.rows
    assert set(row["levels"]) & {2, 3}
    assert row["elastic"]["median"] > 0
    for bar, ratio in zip(section.bars, ("speed", "work"), strict=True):
        assert bar.value == pytest.approx(row[ratio]["median_of_pairs"], abs=1e-3)


def test_fidelity_compares_forecast_and_measurement(bench: Bench) -> None:
    section = memory.fidelity(bench, nothing)
    klds = [row["kld"] for row in section.rows]
    assert klds == sorted(klds, reverse=True)  # more memory, less lost
    worst = max(abs(row["kld"] / row["forecast"] - 1) for row in section.rows if row["forecast"])
    assert section.bars[0].value == pytest.approx(worst)
    stock = Bench(replace(bench.config, model=str(bench.synthetic(1000, "mlx"))), bench.work, bench.work)
    assert memory.fidelity(stock, nothing).rows == []


def test_all_hit(bench: Bench) -> None:
    section = memory.all_hit(bench, nothing)
    assert [row["model"] for row in section.rows] == ["model", "synthetic converted", "synthetic mlx"]
    syncs, building = section.bars
    assert syncs.passed
    assert building.value == pytest.approx(max(r["ratio"]["median_of_pairs"] for r in section.rows), abs=1e-3)


def test_a_host_read_is_noticed() -> None:
    class Curious(nn.Module):
        def __call__(self, tokens: mx.array) -> mx.array:
            return tokens * int((tokens + 1).item())

    class Broken(nn.Module):
        def __call__(self, tokens: mx.array) -> mx.array:
            raise ValueError("nothing to do with it")

    assert not traces(Curious())
    assert traces(nn.ReLU())
    with pytest.raises(ValueError, match="nothing to do with it"):
        traces(Broken())


def test_building_time_grows_with_the_work() -> None:
    class Chain(nn.Module):
        def __init__(self, length: int):
            super().__init__()
            self.length = length

        def __call__(self, x: mx.array) -> mx.array:
            for _ in range(self.length):
                x = x + 1
            return x

    x = mx.zeros((4,))
    assert build_seconds(Chain(400), x, 20) > 4 * build_seconds(Chain(20), x, 20) > 0


def test_policies_are_judged_against_belady_and_lru(bench: Bench) -> None:
    section = memory.policies(bench, nothing)
    for row in section.rows:
        assert row["lru"] <= row["hit_rate"] <= row["bound"]
    assert [bar.limit for bar in section.bars] == [0.9, 1.0]
    assert section.bars[1].passed


def test_reads_have_a_bar_for_each_state_and_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = memory.bench_reads
    small = SyntheticShape(1, 64, 512, 256)
    monkeypatch.setattr(memory, "bench_reads", lambda folder, repeats: real(folder, repeats, small))
    section = memory.reads(bench, nothing)
    assert len({bar.name for bar in section.bars}) == 6
    assert {bar.limit for bar in section.bars} == {0.85, 5.0}


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "1"], "--tokens is 1"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--context", "8"], "--context is 8"),
        (["--max-tokens", "3"], "--max-tokens is 3"),
        (["--size", "much"], "'much' is not a size"),
        (["--folder", "no such folder"], "there is no folder no such folder"),
        (["no such model"], "no such model"),
    ],
)
def test_bad_input(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run(arguments(*words))


def test_the_last_line_is_one_json_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--only", "all-hit", "elastic", "--folder", str(folder), "--repeats", "1", "--tokens", "2", "--json"]
    assert run(arguments(*words)) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert list(result["sections"]) == ["all-hit", "elastic"]
    assert [bar["name"].split(":")[0] for bar in result["bars"]] == ["all hits", "all hits", "elastic", "elastic"]
    assert "machine" in result
    assert out.splitlines()[:-1] == report_lines(result)
    assert all(path.name.startswith("synthetic-") for path in folder.iterdir())
    assert "all-hit" in err


def test_every_section_is_explained() -> None:
    page = (Path(memory.__file__).resolve().parents[1] / "docs" / "streaming.md").read_text(encoding="utf-8")
    for name in SECTIONS:
        assert f"`{name}`" in page, f"docs/streaming.md does not say what the section {name} measures"
