"""`mlxmoe report`: what it says of the plan, what it measures, that all of it is in report.json, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from toy_checkpoints import convert, write_architecture, write_qwen3
from toy_text import write_domains

from mlxmoe.bench.pages import _levels_figure, report_parts, stats_parts
from mlxmoe.bench.report import bytes_by_class, describe, loss_by_place, measure_curve, sensitivity_by_place
from mlxmoe.bench.stats import load_stats
from mlxmoe.checkpoint import folder_nbytes, open_checkpoint
from mlxmoe.cli import main
from mlxmoe.evaluate import EvalConfig, read_text
from mlxmoe.loading import open_model
from mlxmoe.parts import Parts
from mlxmoe.pictures import heat_map, write_report
from mlxmoe.plan import Plan
from mlxmoe.prepared import full_memory, prepare, smallest_memory
from mlxmoe.residency import PLANES, solve_residency
from mlxmoe.runtime import RuntimeConfig

SETTINGS = ("--max-tokens", "128", "--window", "32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("source") / "model", "deepseek_v3")


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out") / "model"
    assert convert(source, path, "--bpw", "10") == 0
    return path


def report(folder: Path | None, output: Path, *arguments: object) -> int:
    model = [] if folder is None else [str(folder)]
    return main(["report", *model, "--output", str(output), *map(str, arguments)])


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["demo", "toy"])
def test_every_byte_belongs_to_a_class(which: str, out: Path) -> None:
    checkpoint = open_checkpoint(None if which == "demo" else out)
    plan = Plan.load(checkpoint.folder)
    classes = bytes_by_class(checkpoint, plan)
    assert sum(classes.values()) == folder_nbytes(checkpoint.folder)
    assert min(classes.values()) > 0
    codes = sum(
        shape.code_nbytes(entry.levels[p])
        for layer in plan.layers
        for entry in layer.experts
        for p, shape in enumerate(layer.projections)
    )
    assert classes["experts: codes"] == codes
    assert classes["experts: scales"] == sum(
        len(x.experts) * s.scales_nbytes for x in plan.layers for s in x.projections
    )
    experts = sum(classes[f"experts: {part}"] for part in ("codes", "scales", "padding"))
    assert experts == sum((checkpoint.folder / layer.file).stat().st_size for layer in plan.layers)
    heads = [name for name, entry in plan.trunk.items() if entry.tensor_class == "head"]
    tensors = checkpoint.tensors
    parts = [name for head in heads for name in tensors if name.startswith(head.removesuffix("weight"))]
    assert classes["head"] == sum(tensors[name].nbytes for name in parts)


@pytest.mark.parametrize("which", ["demo", "toy"])
def test_all_losses_together_are_the_expected_one(which: str, out: Path) -> None:
    plan = Plan.load(open_checkpoint(None if which == "demo" else out).folder)
    places = loss_by_place(plan)
    total = sum(loss for losses in places.values() for loss in losses.values())
    assert total == pytest.approx(plan.expected_loss, rel=2e-3)  # four digits in the file
    assert total == pytest.approx(solve_residency(plan, None, PLANES, widen=False).expected_loss)
    layers = [place for place in places if place.isdigit()]
    assert layers == [str(i) for i in range(len(layers))]
    assert next(iter(places)) == "embedding"
    assert {"experts gate_proj", "experts up_proj", "experts down_proj"} <= places["1"].keys()


def test_sensitivity_is_the_loss_of_parts_that_are_all_wrong(out: Path) -> None:
    """The loss of a plan whose written errors are all 1."""
    plan = Plan.load(out)
    wrong = [
        layer._replace(
            experts=tuple(e._replace(errors=tuple((1.0,) * len(levels) for levels in e.errors)) for e in layer.experts)
        )
        for layer in plan.layers
    ]
    trunk = {name: entry._replace(error=1.0) for name, entry in plan.trunk.items()}
    expected = loss_by_place(replace(plan, layers=tuple(wrong), trunk=trunk))
    found = sensitivity_by_place(plan)
    assert list(found) == list(expected)
    for place, losses in found.items():
        assert losses == pytest.approx(expected[place])
    listed = describe(open_checkpoint(out), plan)
    assert [row["place"] for row in listed["sensitivity_by_place"]] == list(found)
    assert listed["calibrated"] is False


def test_levels_are_those_of_the_plan(out: Path) -> None:
    checkpoint, plan = open_checkpoint(out), Plan.load(out)
    for described, layer in zip(describe(checkpoint, plan)["layers"], plan.layers, strict=True):
        assert described["layer"] == layer.layer
        assert list(zip(*described["levels"], strict=True)) == [entry.levels for entry in layer.experts]
        assert described["errors"][1][3] == layer.experts[3].errors[1][-1]


def test_every_level_has_a_colour_of_its_own() -> None:
    """Also one that not all files have; what is no copy is blank."""
    levels = [2, 3, 4, 6, 8, 16]
    (panel, bar) = _levels_figure([{"layer": 1, "projections": ["up"], "levels": [[*levels, 0]]}]).axes
    (image,) = panel.images
    drawn = np.ma.masked_invalid(image.get_array())
    assert drawn.mask[0].tolist() == [False] * 6 + [True]
    colours = {tuple(image.cmap(image.norm(level))) for level in levels}
    assert len(colours) == len(levels)
    assert [label.get_text() for label in bar.get_yticklabels()] == [str(level) for level in levels]
    for tick, level in zip(bar.get_yticks(), levels, strict=True):
        assert image.norm(tick) == image.norm(level)


@pytest.mark.parametrize("experts", [2, 4, 32])
def test_experts_are_counted_in_whole_numbers(experts: int) -> None:
    row = {"layer": 1, "projections": ["up"], "levels": [[2] * experts]}
    maps = (
        _levels_figure([row, row]),
        heat_map(np.zeros((2, experts)), [0, 1], title="t", x="expert", y="layer", unit="u"),
    )
    for figure in maps:
        figure.canvas.draw()
        assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_plan_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(None, tmp_path / "r", "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((tmp_path / "r" / "report.json").read_text())
    assert kept == printed
    names = sorted(path.name for path in (tmp_path / "r").iterdir())
    assert names == [
        *("bytes.png", "expected-loss.png", "levels.png"),
        *("report.html", "report.json", "sensitivity.png"),
    ]
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    for nbytes in kept["bytes_by_class"].values():
        assert f"<td>{nbytes}</td>" in page
    assert "curve" not in kept


# -- measured ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(source: Path, out: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    assert main(["stats", str(source), "--text", str(text), *SETTINGS, "--save", str(folder / "s.json")]) == 0
    arguments = ("--reference", source, "--text", text, *SETTINGS, "--stats", folder / "s.json")
    with pytest.MonkeyPatch.context() as patch:  # drawing takes longer than all the rest: test_every_picture_is_drawn
        patch.setattr("mlxmoe.pictures._rendered", lambda figure, kind: b"<svg></svg>" if kind == "svg" else b"")
        assert report(out, folder / "r", *arguments) == 0
    return folder


def test_the_curve(measured: Path, out: Path, source: Path) -> None:
    result = json.loads((measured / "r" / "report.json").read_text())
    curve = result["curve"]
    prepared = prepare(out, RuntimeConfig(kernels=None))
    assert [curve[0]["memory"], curve[-1]["memory"]] == [smallest_memory(prepared), full_memory(prepared)]
    sizes = [row["bytes_weights"] for row in curve]
    assert sizes == sorted(sizes)
    assert curve[0]["kld_mean"] > 1.5 * curve[-1]["kld_mean"] > 0
    assert curve[-1]["expected_loss"] == pytest.approx(result["expected_loss"], rel=2e-3)
    assert set(curve[0]["levels"]) == {"2"}
    plan = Plan.load(out)
    written = {str(level): count for level, count in plan.level_histogram().items()}
    assert curve[-1]["levels"] == written
    for row in curve:
        assert {domain["name"] for domain in row["domains"]} == {"digits", "vowels"}
        assert np.mean([domain["kld_mean"] for domain in row["domains"]]) == pytest.approx(row["kld_mean"], rel=1e-3)
        assert row["kld_stderr"] > 0
        assert row["forecast"] is None


def test_a_budget_is_what_eval_measures_there(
    out: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlxmoe eval --memory` on one text, of which both choose the same windows."""
    plain = tmp_path / "plain.txt"
    plain.write_text("the quick brown fox jumps over the lazy dog and runs away; " * 12)
    prepared = prepare(out, RuntimeConfig(kernels=None))
    memory = (smallest_memory(prepared) + full_memory(prepared)) // 2
    command = [
        "eval",
        str(out),
        "--reference",
        str(source),
        "--text",
        str(plain),
        *SETTINGS,
        "--memory",
        str(memory),
        "--json",
    ]
    assert main(command) == 0
    wanted = json.loads(capsys.readouterr().out.splitlines()[-1])
    models = open_model(out, RuntimeConfig(kernels=None)), open_model(source)
    (row,) = measure_curve(models[0], prepared, models[1], [read_text(plain)], EvalConfig(128, 32), [memory])
    for name in ("kld_mean", "kld_stderr", "top1_agreement", "ppl"):
        assert row[name] == pytest.approx(wanted[name], rel=1e-5)


def test_the_profile(measured: Path) -> None:
    result = json.loads((measured / "r" / "report.json").read_text())
    first, *routed = result["profile"]
    assert (first["routing"], first["experts"], first["shared_error"]) == (None, None, None)
    for row in result["profile"]:
        assert 0 < row["own_error"] < 0.2
        assert 0 < row["stream_error"] < 0.2
    for row in routed:
        assert 0.5 < row["routing"]["topk"] <= 1
        experts = row["experts"]
        assert sum(experts["tokens"]) == 128 * 2
        by_kind = experts["by_kind"]
        assert sum(kind["experts"] for kind in by_kind.values()) == len(experts["kind"])
        assert sum(kind["tokens"] for kind in by_kind.values()) == sum(experts["tokens"])
        known = [error for error in experts["error"] if error is not None]
        assert min(known) <= by_kind["general"]["error"] <= max(known)
        errors = [kind["error"] for kind in by_kind.values() if kind["error"] is not None]
        assert min(errors) <= experts["error_of_all"] <= max(errors)


def test_the_page_holds_the_numbers(measured: Path) -> None:
    result = json.loads((measured / "r" / "report.json").read_text())
    assert result["stats"] == load_stats(measured / "s.json")
    page = (measured / "r" / "report.html").read_text(encoding="utf-8")
    for row in result["curve"]:
        assert f"<td>{row['kld_mean']:.5f}</td><td>{row['kld_stderr']:.5f}</td>" in page
    for row in result["profile"][1:]:
        assert f"<td>{row['routing']['top1']:.2%}</td>" in page
    pictures = [path for path in (measured / "r").iterdir() if path.suffix == ".png"]
    assert {"curve", "domains-kld", "errors", "experts", "routing", "frequency", "reap"} <= {p.stem for p in pictures}
    assert page.count("<svg") == len(pictures)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)


@pytest.mark.parametrize(("part", "layers", "budgets"), [("layer-0", [1, 2], 5), ("layer-2", [], 5), ("budget", [], 3)])
def test_goes_on_where_it_was_stopped(
    part: str,
    layers: list[int],
    budgets: int,
    measured: Path,
    source: Path,
    out: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Behind a layer, and behind the second budget: report.json has what it has without a stop, and nothing is measured
    twice. What an earlier report left is untouched until the new one is there."""
    arguments = ("--reference", source, "--text", text, *SETTINGS, "--stats", measured / "s.json")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.json").write_text("older")
    monkeypatch.setattr("mlxmoe.pictures._rendered", lambda figure, kind: b"<svg></svg>" if kind == "svg" else b"")
    keep, seen = Parts.keep, []

    def then_stop(self: Parts, name: str, value: object) -> None:
        keep(self, name, value)
        seen.append(name)
        if name == part or [each[: len(part)] for each in seen].count(part) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Parts, "keep", then_stop)
        assert report(out, tmp_path / "r", *arguments) == 130
    assert "r.partial keeps what is done" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "r").iterdir()] == ["older"]
    assert report(out, tmp_path / "r", *arguments, "--window", "16", "--resume") == 2
    assert "was started with other window" in capsys.readouterr().err
    seen.clear()
    part = "no part"
    monkeypatch.setattr(Parts, "keep", then_stop)
    assert report(out, tmp_path / "r", *arguments, "--resume") == 0
    assert [name for name in seen if name.startswith("layer")] == [f"layer-{i}" for i in layers]
    assert sum(name.startswith("budget") for name in seen) == budgets
    found, wanted = (json.loads((folder / "r" / "report.json").read_text()) for folder in (tmp_path, measured))
    assert found == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.slow
def test_every_picture_is_drawn(measured: Path, tmp_path: Path) -> None:
    result = json.loads((measured / "r" / "report.json").read_text())
    parts = report_parts(result) + stats_parts(result["stats"])
    written = write_report(tmp_path / "r", "title", parts)
    assert len(written) == 17
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    for drawing in re.findall(r"<svg.*?</svg>", written[0].read_text(encoding="utf-8"), re.DOTALL):
        ElementTree.fromstring(drawing)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "t"], "measuring needs both --reference and --text"),
        (["--budgets", "9GB"], "measuring needs both --reference and --text"),
        (["--stats", "absent.json"], "absent.json cannot be read"),
        (["--reference", "absent", "--text", "absent", "--budgets", "lots"], "'lots' is not a size"),
        (["--reference", "absent", "--text", "absent", "--budgets", "1kB"], "not even the base planes"),
        (["--reference", "absent", "--text", "absent.jsonl"], "absent.jsonl cannot be read"),
    ],
)
def test_settings_that_are_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(None, tmp_path / "r", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert not (tmp_path / "r").exists()


def test_places_that_are_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(None, tmp_path / "page.html") == 2
    assert "a report is a folder" in capsys.readouterr().err
    assert report(None, tmp_path / "absent" / "r") == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_machine_that_is_too_small(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlxmoe.bench.report.machine_memory", lambda: 30_000_000)
    assert report(None, tmp_path / "r", "--reference", source, "--text", text) == 2
    assert "this machine has 30 MB for all of demo, which needs" in capsys.readouterr().err


def test_not_converted(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(source, tmp_path / "r") == 2
    assert "is not converted" in capsys.readouterr().err


def test_another_model_as_reference(out: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_qwen3(tmp_path / "other", num_hidden_layers=2)
    assert report(out, tmp_path / "r", "--reference", other, "--text", text, *SETTINGS) == 2
    assert "do not have the same experts" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
