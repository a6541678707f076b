"""Where a token's time goes, counted and added up; what is printed, saved and drawn for a trace."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mlxmoe.bench.decode import weight_bytes_per_token
from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.explain import (
    ExpertBytes,
    Machine,
    check_fits,
    expert_bytes,
    make_choice,
    measure_bandwidth,
    measure_sync,
    resident_share,
    tensor_class,
    token_time,
    trunk_bytes_per_token,
    write_pictures,
)
from mlxmoe.loading import open_model
from mlxmoe.policies import load_choice
from mlxmoe.prepared import Prepared, prepare
from mlxmoe.replay import Study
from mlxmoe.runtime import RuntimeConfig
from mlxmoe.trace import Trace, TraceConfig, load_trace, read_text, record_texts, save_trace

MACHINE = Machine(bandwidth=100e9, disk=2e9, page_cache=8e9, sync_seconds=200e-6)


@pytest.fixture(scope="module")
def demo() -> Prepared:
    return prepare(None, RuntimeConfig(kernels=None))


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random choices of the demo model's shape, some experts more popular than others."""
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(1, 33)
    choices = [[rng.choice(32, 4, replace=False, p=weights / weights.sum()) for _ in range(5)] for _ in range(160)]
    experts = np.sort(np.array(choices, np.uint8), axis=-1)
    path = tmp_path_factory.mktemp("explain") / "trace.npz"
    save_trace(Trace(experts, np.array([0, 80]), (1, 2, 3, 4, 5), 32, None, "demo", "ab" * 32, ("t.jsonl",)), path)
    return path


# -- bytes and times ---------------------------------------------------------------------------------------------------


def test_trunk_bytes_are_those_of_the_benchmark(demo: Prepared) -> None:
    """bench counts the same parameters another way: all of them less the experts, and one row of the embedding."""
    by_class = trunk_bytes_per_token(demo)
    model = open_model(None, RuntimeConfig(kernels=None)).model
    assert sum(by_class.values()) == pytest.approx(weight_bytes_per_token(model, demo.active).trunk, abs=16)
    assert all(by_class[name] > 0 for name in ("attention", "shared", "router", "dense", "head", "embedding", "other"))
    lm_head = model["lm_head"]
    assert by_class["head"] == sum(array.nbytes for array in lm_head.parameters().values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "attention"),
        ("model.layers.3.linear_attn.conv1d.weight", "attention"),
        ("backbone.layers.0.mixer.in_proj.weight", "attention"),
        ("model.layers.3.mlp.shared_experts.gate_proj.scales", "shared"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "shared"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.3.block_sparse_moe.gate.scales", "router"),
        ("language_model.model.layers.1.router.proj.weight", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "dense"),
        ("lm_head.biases", "head"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.3.input_layernorm.weight", "other"),
        ("model.norm.weight", "other"),
    ],
)
def test_classes(name: str, expected: str) -> None:
    assert tensor_class(name) == expected


def test_expert_bytes(demo: Prepared) -> None:
    """A mean over the file's records; without a source the disk stays unknown."""
    assert demo.plan is not None
    found = expert_bytes(demo, None)
    assert found.disk is None
    assert found.per_token == 5 * 4
    sizes = [size for layer in demo.streamed_shapes for size in layer.sizes]
    assert found.memory == pytest.approx(sum(sizes) / 160)


def test_token_time_adds_up() -> None:
    """40 expert reads of 1 MB in memory and 0.5 MB on disk, beside 60 MB of other weights, in 10 layers."""
    experts = ExpertBytes(1e6, 0.5e6, 40)
    resident = token_time(MACHINE, experts, 60_000_000, 10, None)
    assert resident == pytest.approx((1e-3, 0, 0))
    streamed = token_time(MACHINE, experts, 60_000_000, 10, 0.9)
    assert streamed == pytest.approx((1e-3, 0.1 * 40 * 0.5e6 / 2e9, 2e-3))
    assert streamed.total == pytest.approx(4e-3)
    no_disk = token_time(MACHINE._replace(disk=None), experts._replace(disk=None), 60_000_000, 10, 0.9)
    assert no_disk.disk == 0


def test_probes_measure_something() -> None:
    assert 1e8 < measure_bandwidth() < 1e13
    assert 1e-7 < measure_sync() < 1


def test_share_that_memory_keeps(demo: Prepared) -> None:
    least = demo.streaming(0).least_memory
    assert resident_share(demo, least) == pytest.approx(4 / 32, abs=0.03)  # the experts of one token
    assert resident_share(demo, 10**9) == 1.0
    assert resident_share(demo, least) < resident_share(demo, least + 2_000_000) < 1
    with pytest.raises(UserError, match="cannot be streamed with 5 MB"):
        resident_share(demo, 5_000_000)


# -- the command -------------------------------------------------------------------------------------------------------


def explain(*arguments: object) -> int:
    return main(["explain", *map(str, arguments)])


def test_command(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("--trace", trace_file, "--save", tmp_path / "choice.json", "--json") == 0
    captured = capsys.readouterr()
    *lines, last = captured.out.splitlines()
    result = json.loads(last)
    assert (result["layers"], result["experts"], result["experts_per_token"]) == (5, 32, 4)
    assert result["trace"]["tokens_fitted"] == result["trace"]["tokens_held_out"] == 80
    assert [row["slots_equal"] for row in result["budgets"]] == [4, 8, 12, 16, 20, 24, 28]
    for row in result["budgets"]:
        choice, token = row["choice"], row["token"]
        assert row["policies"]["lru"]["hit_rate"] <= choice["hit_rate"] <= row["belady"]
        assert sum(choice["slots"]) == 5 * row["slots_equal"]
        assert token["memory_share"] + token["disk_share"] + token["sync_share"] == pytest.approx(1)
    text = "\n".join(lines)
    assert "a token reads" in text
    assert "least-stale" in text
    half = next(row for row in result["budgets"] if row["residency"] == 0.5)
    saved = load_choice(tmp_path / "choice.json")
    assert [layer.slots for layer in saved.layers] == half["choice"]["slots"]
    assert (saved.policy, saved.parameters) == (half["choice"]["policy"], half["choice"]["parameters"])
    assert (saved.num_experts, saved.model) == (32, "ab" * 32)
    assert [layer.layer for layer in saved.layers] == [1, 2, 3, 4, 5]


def test_memory_is_one_of_the_budgets(
    trace_file: Path, demo: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = demo.streaming(0).least_memory + 3_000_000
    assert explain("--trace", trace_file, "--memory", memory, "--save", tmp_path / "c.json", "--json") == 0
    share = resident_share(demo, memory)
    budgets = json.loads(capsys.readouterr().out.splitlines()[-1])["budgets"]
    (asked,) = [row for row in budgets if row["residency"] == pytest.approx(share)]
    saved = load_choice(tmp_path / "c.json")
    assert saved.note["residency"] == pytest.approx(share)
    assert [layer.slots for layer in saved.layers] == asked["choice"]["slots"]
    assert sum(asked["choice"]["slots"]) == 5 * round(share * 32)


def test_static_carries_its_frequencies(trace_file: Path) -> None:
    """What --save writes of a policy that goes by a table makes the same policy again."""
    trace = load_trace(trace_file)
    study = Study(trace)
    budget = study.budget(0.5)
    static = next(o.candidate for o in budget.outcomes if o.candidate.policy == "static")
    choice = make_choice(budget._replace(candidate=static), study, trace)
    counts = np.bincount(trace.halves()[0].experts[:, 2].ravel(), minlength=32)
    assert choice.make(3).victim(range(32)) == int(counts.argmin())


def test_without_a_trace_the_model_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("--max-tokens", 40, "--window", 16, "--json") == 0
    captured = capsys.readouterr()
    trace = json.loads(captured.out.splitlines()[-1])["trace"]
    assert trace["texts"] == ["prompts.jsonl"]
    assert trace["tokens_fitted"] + trace["tokens_held_out"] >= 40


def test_trace_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = np.array([[[0, 1]], [[2, 3]]], np.uint8)
    save_trace(Trace(experts, np.array([0]), (0,), 8), tmp_path / "t.npz")
    assert explain("--trace", tmp_path / "t.npz") == 2
    error = capsys.readouterr().err
    assert "the trace is of 1 layers with 2 of 8 experts a token, demo has 5 layers with 4 of 32" in error


def test_trace_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = np.tile(np.arange(4, dtype=np.uint8), (7, 5, 1))
    save_trace(Trace(experts, np.array([0]), (1, 2, 3, 4, 5), 32), tmp_path / "t.npz")
    assert explain("--trace", tmp_path / "t.npz") == 2
    assert "a trace of 7 tokens is too short" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_shortest_trace(tmp_path: Path) -> None:
    experts = np.tile(np.arange(4, dtype=np.uint8), (8, 5, 1))
    save_trace(Trace(experts, np.array([0, 1]), (1, 2, 3, 4, 5), 32), tmp_path / "t.npz")
    assert explain("--trace", tmp_path / "t.npz") == 0


def test_nothing_to_choose(demo: Prepared) -> None:
    experts = np.tile(np.arange(32, dtype=np.uint8), (8, 5, 1))
    with pytest.raises(UserError, match="every token uses every expert"):
        check_fits(Trace(experts, np.array([0]), (1, 2, 3, 4, 5), 32), demo._replace(active=32))


@pytest.mark.parametrize("option", ["--save", "--report"])
def test_no_place_to_write_is_noticed_first(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("--trace", "absent", option, tmp_path / "absent" / "x.html") == 2
    assert "there is no folder" in capsys.readouterr().err


def test_report_where_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report").write_text("mine")
    assert explain("--trace", "absent", "--report", tmp_path / "report") == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "report").read_text() == "mine"


def test_pictures_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert explain("--trace", "absent", "--report", tmp_path / "x.html") == 2
    assert "pip install 'mlxmoe[report]'" in capsys.readouterr().err


def test_report(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page that needs nothing else, and pictures with something in them."""
    assert explain("--trace", trace_file, "--report", tmp_path / "one.html", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "<?xml" not in page
    assert page.lower().count("<!doctype") == 1
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    for row in result["budgets"]:
        assert f"{row['choice']['hit_rate']:.1%}" in page

    written = write_pictures(result, load_trace(trace_file), tmp_path / "folder")
    assert sorted(p.name for p in written) == ["hit-rate.png", "popularity.png", "report.html"]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == sorted(p.name for p in written)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written if p.suffix == ".png")


# -- the bar -----------------------------------------------------------------------------------------------------------


def study(model: Any, texts: list[Path], tokens: int) -> Study:
    loaded = open_model(model)
    return Study(record_texts(loaded, [read_text(path) for path in texts], TraceConfig(max_tokens=tokens)))


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("which", ["demo", "tiny"])
@pytest.mark.parametrize("text", ["heldout", "calibration"])
def test_chosen_policy_on_held_out_text(which: str, text: str, shared_dir: Path, tiny_model: Path) -> None:
    """Bars of docs/caching.md, against Belady with the best split for it. 90 % are out of reach at a quarter resident."""
    texts = sorted((shared_dir / "data" / text).glob("*.jsonl"))
    found = study(None if which == "demo" else tiny_model, texts, 16384)
    for residency, bar in ((0.25, 0.82), (0.5, 0.9), (0.75, 0.95)):
        budget = found.budget(residency)
        assert budget.hit_rate >= bar * budget.bound
        assert budget.hit_rate >= budget.lru
