"""`mlxmoe forecast`: measured at several budgets, kept in plan.json, said when the model is loaded."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from toy_checkpoints import convert, load_plan, prepare, write_qwen3

from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.loading import RuntimeConfig, open_model
from mlxmoe.plan import Forecast, Plan
from mlxmoe.prepared import full_memory, smallest_memory

pytestmark = pytest.mark.usefixtures("limits")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 8, "num_hidden_layers": 2}
    return write_qwen3(tmp_path_factory.mktemp("forecast") / "source", **dims)


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    assert convert(source, source.parent / "out", "--bpw", "9", "--expert-bits", "4,6") == 0
    return source.parent / "out"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return tmp_path / "text.txt"


def test_measured_budgets_are_kept_and_said(
    source: Path, converted: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    arguments = ["--reference", str(source), "--text", str(text), "--points", "3", "--max-tokens", "96", "--json"]
    assert main(["forecast", str(folder), *arguments]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["points"]
    forecast = load_plan(folder).forecast
    assert forecast is not None
    assert forecast.measured_on == {"texts": ["text.txt"], "max_tokens": 96}
    assert [kld for _, kld in forecast.points] == pytest.approx(sorted(row["kld"] for row in measured), rel=1e-3)
    assert len(forecast.points) == 3
    # The plan is otherwise what it was
    assert replace(load_plan(folder), forecast=None) == load_plan(converted)
    prepared = prepare(folder, RuntimeConfig(context=64))
    least, full = smallest_memory(prepared), full_memory(prepared)
    for memory, row in ((least, measured[-1]), (full, measured[0])):
        report = open_model(folder, RuntimeConfig(memory, 64)).report
        assert report.expected_kld == pytest.approx(row["kld"], rel=2e-3)
        assert f"KLD to the original about {report.expected_kld:.3g} nats" in report.lines()[1]
    streamed = open_model(folder, RuntimeConfig(full - 1, 64, exact=True, threads=2, direct=False))
    assert streamed.report.mode == "streaming"
    assert streamed.report.expected_kld == pytest.approx(measured[0]["kld"], rel=2e-3)
    assert streamed.experts is not None
    streamed.experts.close()
    assert open_model(converted, RuntimeConfig(full, 64)).report.expected_kld is None


def test_a_folder_without_budgets_is_refused(
    source: Path, text: Path, capsys: pytest.CaptureFixture[str], converted: Path
) -> None:
    arguments = ["--reference", str(source), "--text", str(text)]
    assert main(["forecast", str(source), *arguments]) == 2
    assert "there are no budgets to compare" in capsys.readouterr().err
    assert main(["forecast", str(converted), *arguments, "--points", "1"]) == 2
    assert "1 points make no curve" in capsys.readouterr().err


def test_between_points_it_is_a_power_law() -> None:
    """Points on KLD = 3 * loss^1.5 are met everywhere between them; beyond, the KLD goes with the loss."""
    points = tuple((loss, 3 * loss**1.5) for loss in (0.01, 0.04, 0.2))
    forecast = Forecast(points, {})
    for loss in (0.01, 0.013, 0.04, 0.11, 0.2):
        assert math.isclose(forecast.kld(loss), 3 * loss**1.5, rel_tol=1e-9)
    assert math.isclose(forecast.kld(0.4), 2 * points[-1][1])
    assert math.isclose(forecast.kld(0.005), points[0][1] / 2)


def test_a_plan_keeps_it(converted: Path) -> None:
    plan = replace(load_plan(converted), forecast=Forecast(((0.01, 0.002), (0.1, 0.03)), {"texts": ["a"]}))
    assert Plan.loads(plan.dumps()) == plan


@pytest.mark.parametrize("points", [[], [[0.1, 0.2], [0.1, 0.3]], [[0.2, 0.1], [0.1, 0.1]], [[0.1, 0.0]], [[0.1]], "x"])
def test_a_damaged_forecast_is_refused(converted: Path, points: object) -> None:
    plan = replace(load_plan(converted), forecast=Forecast(((0.01, 0.002), (0.1, 0.03)), {}))
    text = plan.dumps().replace("[[0.01,0.002],[0.1,0.03]]", json.dumps(points))
    assert text != plan.dumps()
    with pytest.raises(UserError, match="damaged"):
        Plan.loads(text)
