"""`mlxmoe doctor`, with and without a GPU; the GPU is a stand-in whose kernels are the reference, with a fault."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxmoe import doctor
from mlxmoe.errors import UserError
from mlxmoe.kernel_choice import DeviceFacts, LayerShape, Record, Timing, expert_cases
from mlxmoe.kernels import ReferenceKernels

FACTS = DeviceFacts("Apple M1 Pro", "applegpu_g13s", "Darwin 26.1", "0.32.4", "0123456789abcdef")
LAYER = LayerShape(64, 32, 6, 2, 32, 32, (2, 4), "float16")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(words)


def kernels(down: Callable[[mx.array], mx.array] = lambda y: y) -> Any:
    made: Any = ReferenceKernels()
    original = made.expert_down
    made.expert_down = lambda *args: down(original(*args))
    return made


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the record of this test lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlxmoe" / "kernels.json"


@pytest.fixture
def gpu(record: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives the command a GPU with these kernels, and a few small cases."""

    diagnose = doctor.diagnose

    def install(made: Any) -> None:
        monkeypatch.setattr(doctor, "metal_facts", lambda: FACTS)
        monkeypatch.setattr(
            doctor, "diagnose", lambda facts: diagnose(facts, lambda: made, lambda: expert_cases(LAYER))
        )

    return install


@pytest.fixture
def no_gpu(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "metal_facts", lambda: None)


def test_without_metal_it_says_so_and_checks_the_rest(
    no_gpu: None, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.run(arguments("--json")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Metal: not available to this process, so the kernels cannot be checked here"
    assert any(line.startswith("demo model: ok, ") for line in lines)
    assert any(f"mlx {mx.__version__}" in line for line in lines)
    found = json.loads(last)
    assert (found["ok"], found["metal"], found["checks"]) == (True, None, [])
    assert len(found["demo"]["tokens"]) == 16
    assert not record.exists()


def test_right_kernels(gpu: Callable[..., None], record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(kernels())
    assert doctor.run(arguments()) == 0
    out = capsys.readouterr().out
    assert "Metal: Apple M1 Pro (applegpu_g13s), Darwin 26.1; kernels 0123456789ab\n" in out
    assert "all 3 checks passed" in out
    assert len(Record.load(record, FACTS).checks) == 3


def test_a_wrong_kernel_is_shown_recorded_and_the_status(
    gpu: Callable[..., None], record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(kernels(lambda y: y * mx.nan))
    assert doctor.run(arguments("--json")) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("expert_down")]
    assert " ".join(row.split()) == "expert_down float16 planes 2/4 bit - differs: values that are not finite"
    assert lines[-1].startswith("1 of 3 checks found a fault")
    assert [check["status"] for check in json.loads(last)["checks"]] == ["ok", "differs", "ok"]
    assert [check.status for check in Record.load(record, FACTS).checks.values()] == ["ok", "differs", "ok"]


def test_it_measures_again_what_is_on_record(
    gpu: Callable[..., None], record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(kernels(lambda y: -y))
    assert doctor.run(arguments()) == 1
    old = Record.load(record, FACTS)
    old.unfinished = True
    old.timings["a shape"] = Timing({"kernels": 1.0}, {})
    old.save(record)
    gpu(kernels())
    assert "1 of 3" in capsys.readouterr().out
    doctor.diagnose(FACTS)
    assert [check.status for check in Record.load(record, FACTS).checks.values()] == ["ok"] * 3
    assert not Record.load(record, FACTS).unfinished
    assert Record.load(record, FACTS).timings == {}


def test_the_report_holds_everything(
    gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    gpu(kernels(lambda y: y * 2))
    assert doctor.run(arguments("--report", str(tmp_path / "report.json"), "--json")) == 1
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["record"] == "~/cache/mlxmoe/kernels.json"  # no name of a user
    assert found["metal"] == FACTS._asdict()
    assert found["checks"][1]["error"] == pytest.approx(1, rel=1e-3)
    assert {"machine", "packages", "device", "memory_default", "demo"} <= found.keys()


def test_a_report_that_cannot_be_written(no_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the report .* cannot be written: Is a directory"):
        doctor.run(arguments("--report", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nmore"), UserError("it is damaged", "get it again")])
def test_a_demo_model_that_does_not_load(
    no_gpu: None, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "open_model", broken)
    assert doctor.run(arguments()) == 1
    reason = str(error).splitlines()[0]
    assert f"demo model: failed: {reason}\n" in capsys.readouterr().out


def test_a_demo_model_whose_numbers_are_none(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = doctor.open_model(None, doctor.RuntimeConfig(context=256))
    norm = loaded.model.model.norm
    norm.weight = norm.weight * mx.nan
    monkeypatch.setattr(doctor, "open_model", lambda *_: loaded)
    assert doctor.run(arguments()) == 1
    assert "demo model: failed: probabilities that are not numbers" in capsys.readouterr().out
