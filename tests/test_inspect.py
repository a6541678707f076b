"""`mlxmoe inspect` on the demo model that comes with the package, and the demo model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxmoe.checkpoint import DEMO, folder_nbytes
from mlxmoe.cli import main
from mlxmoe.plan import Plan


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_demo_is_small_and_whole() -> None:
    assert folder_nbytes(DEMO) <= 12_000_000
    plan = Plan.load(DEMO)
    assert {path.name for path in DEMO.iterdir()} == {*plan.files, "plan.json"}
    assert all((DEMO / name).stat().st_size == entry.nbytes for name, entry in plan.files.items())


def test_says_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    found, plan = inspect_json(capsys), Plan.load(DEMO)
    assert found["kind"] == "converted"
    assert found["experts"] == 32
    assert found["moe_layers"] == 5
    assert found["experts_per_token"] == 4
    assert found["parameters"] == plan.num_parameters == 20_082_464
    assert found["bytes_file"] == folder_nbytes(DEMO)
    assert found["expert_levels"] == {str(level): n for level, n in plan.level_histogram().items()}
    assert sum(n for layer in found["layers"] for levels in layer["levels"].values() for n in levels.values()) == 480


def test_budgets_run_from_the_least_to_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_json(capsys)
    rows = found["budgets"]
    assert found["least_memory"] < found["least_resident"] == rows[0]["memory"]
    assert rows[0]["levels"] == {"2": 480}
    assert [row["mode"] for row in rows] == ["elastic"] * (len(rows) - 1) + ["resident"]
    losses = [row["expected_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert rows[-1]["expected_loss"] == pytest.approx(found["expected_loss"], rel=1e-3)


def test_memory_that_is_too_small_is_shown_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_json(capsys, "--memory", "1MB")["fits"] is False
    assert main(["inspect", "--memory", "1MB"]) == 0
    assert "does not fit in 1 MB" in capsys.readouterr().out


def test_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "5 layers of 32 experts, 4 per token" in out
    assert "layer 5: gate_proj" in out
    assert "expected loss" in out


def test_unconverted_folder(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    found = inspect_json(capsys, str(tiny_model), "--context", "256")
    assert found["kind"] == "huggingface"
    assert found["context"] == 256
    assert found["bytes_experts"] == 5 * 32 * 3 * 128 * 256 * 4
    assert "budgets" not in found
    assert main(["inspect", str(tiny_model)]) == 0
    assert "all experts resident from" in capsys.readouterr().out
