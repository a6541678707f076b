"""Losses scaled to measured divergences: parts add up to the plan, quotients to what is measured, and the command."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_checkpoints import SMALL, convert, load_plan, write_qwen3
from toy_text import write_words

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.calibrate import Calibration, choose_tokens, file_sha256, read_documents
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.job import Job
from mlxmoe.convert.passes import measure
from mlxmoe.convert.refine import (
    LIMIT,
    Losses,
    Measurement,
    Part,
    Quotient,
    expected_losses,
    fresh_tokens,
    measure_parts,
    refine,
)
from mlxmoe.convert.tokens import read_tokenizer

pytestmark = pytest.mark.usefixtures("short_windows")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("refine") / "source", **SMALL)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    return write_words(source.parent / "text.txt", 400)


def calibration(text: Path, tokens: int = 1024) -> Calibration:
    return Calibration(str(text), file_sha256(text), tokens=tokens, window=128)


def test_factor_is_the_quotient_within_limits() -> None:
    assert Quotient(2.0, 3.0).factor == 1.5
    assert Quotient(1.0, 100.0).factor == LIMIT
    assert Quotient(100.0, 1.0).factor == 1 / LIMIT
    assert Quotient(0.0, 1.0).factor == 1.0
    assert Quotient(1.0, -0.1).factor == 1 / LIMIT


def test_round_by_round(source: Path, text: Path, tmp_path: Path) -> None:
    """Parts add up to the plan's loss; scaled losses of the same plan are what was measured; the file is what is read."""
    config = ConvertConfig(bpw=6, calibration=calibration(text, 512), expert_levels=(2, 4))
    job = Job(source, tmp_path / "out", config, quiet=True)
    tmp_path.joinpath("state").mkdir()
    layers = job._layers(tmp_path / "state")
    measured = measure(layers)
    losses = Losses(measured.experts, measured.trunk)
    plan = job._allocator(losses).decide().plan
    expected = expected_losses(layers, losses, plan)
    assert list(expected) == [Part(-1, False), *(Part(i, e) for i in (0, 1) for e in (False, True)), Part(2, False)]
    assert sum(expected.values()) == pytest.approx(plan.expected_loss)

    tokens = fresh_tokens(calibration(text, 512), read_tokenizer(job.checkpoint), 0, layers.walk.tokens)
    file = tmp_path / "state" / "refined-0.npz"
    before = {path.name for path in file.parent.iterdir()}
    after, note = refine(layers, losses, plan, tokens, file)
    assert {path.name for path in file.parent.iterdir()} == before | {file.name}
    assert f"{len(expected)} parts cost" in note
    with np.load(file) as saved:
        found = dict(zip(expected, saved["measured"], strict=True))
        assert 0 < max(found.values()) < saved["total"]
    rescaled = expected_losses(layers, after, job._allocator(after).account(plan).plan)
    for part, value in rescaled.items():
        if part.experts:  # the plan's own entries are those of the trunk
            assert value == pytest.approx(expected[part] * Quotient(expected[part], found[part]).factor)
    again, _ = refine(layers, losses, plan, tokens, file)
    np.testing.assert_array_equal(again.trunk.errors, after.trunk.errors)
    trunk = dict(zip(layers.trunk_names(), after.trunk.weights / losses.trunk.weights, strict=True))
    head = Quotient(expected[Part(2, False)], found[Part(2, False)]).factor
    assert trunk["lm_head.weight"] == pytest.approx(head)


def test_every_part_is_given_back_and_every_layer_coded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trunk tensors of a layer, then its experts, both from one coding of the layer; last the model as it is coded."""
    coded: list[int] = []
    names = {0: ["attention", "experts.up", "experts.down"], 1: ["head"]}

    def coded_values(layers: Any, i: int, plan: Any) -> dict[str, np.ndarray]:
        coded.append(i)
        return {name: np.full(2, i) for name in names[i]}

    def found(walk: Any, changes: list[Any], progress: Any, base: Any) -> np.ndarray:
        for i in names:
            changed.extend((i, sorted(change.weights(None))) for change in changes if change.layer == i)
            assert sorted(base(i)(None)) == sorted(names[i])
        return np.repeat([3.0, 2.0, 3.5, 4.0], 4).reshape(4, 1, 4)

    changed: list[tuple[int, list[str]]] = []
    layers: Any = SimpleNamespace(
        trunk={i: [SimpleNamespace(name=names[i][0])] for i in names},
        stream=SimpleNamespace(layers=[None]),
        bar=lambda *_, **__: nullcontext(),
    )
    monkeypatch.setattr("mlxmoe.convert.refine.coded_values", coded_values)
    monkeypatch.setattr("mlxmoe.convert.refine.divergences", found)
    parts = [Part(0, False), Part(0, True), Part(1, False)]
    plan: Any = None
    measured = measure_parts(layers, plan, parts, np.zeros((1, 4), np.int32))
    assert measured == Measurement(4.0, dict(zip(parts, (1.0, 2.0, 0.5), strict=True)))
    assert changed == [(0, ["experts.down", "experts.up"]), (0, ["attention"]), (1, []), (1, ["head"])]
    assert coded == [0, 1]


def test_fresh_tokens_are_those_behind(source: Path, text: Path) -> None:
    tokenizer = read_tokenizer(open_checkpoint(source))
    documents = read_documents(text, tokenizer)
    used = choose_tokens(documents, tokenizer, calibration(text, 512), 0)
    more = choose_tokens(documents, tokenizer, calibration(text, 4096), 0)
    found = fresh_tokens(calibration(text, 512), tokenizer, 0, used)
    assert (more[: len(used)] == used).all()
    np.testing.assert_array_equal(found[: len(more) - len(used)], more[len(used) :])
    everything = choose_tokens(documents, tokenizer, calibration(text, 10**6), 0)
    last = fresh_tokens(calibration(text, 512), tokenizer, 0, everything)
    np.testing.assert_array_equal(last, everything[-len(last) :])


def test_goes_on_where_it_was_stopped(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rounds, stopped before the writing: what was measured is not measured again."""
    arguments = ["--bpw", "6", "--calibration", str(text), "--calibration-tokens", "128", "--expert-bits", "2,4"]
    monkeypatch.setattr("mlxmoe.convert.refine.TOKENS", 256)
    arguments += ["--refine", "2", "--rotation", "none", "--polish", "none"]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.write", stop)
        assert convert(source, tmp_path / "out", *arguments) == 130
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.refine.measure_parts", stop)
        assert convert(source, tmp_path / "out", *arguments, "--resume") == 0
    error = capsys.readouterr().err
    assert "refinement 1: the assembled model diverges by" in error
    assert "refinement 2: the assembled model diverges by" in error
    assert load_plan(tmp_path / "out").settings["allocation"]["refine"] == 2
