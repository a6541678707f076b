"""Experts written as several copies: what is computed, resident, reduced and streamed; their bytes; what is chosen."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from converted_models import PROMPT, close, logits, open_reduced, open_streamed, written_levels
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from toy_checkpoints import (
    RuntimeConfig,
    convert,
    edit_weights,
    folder_nbytes,
    load_plan,
    open_model,
    prepare,
    snapshot,
    stored_matrix,
    write_architecture,
    write_qwen3,
)
from toy_text import write_words

from mlxmoe import loading
from mlxmoe.banks import copies_nbytes
from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.experts import ExpertLayer
from mlxmoe.kernels import ReferenceKernels
from mlxmoe.loading import Loaded
from mlxmoe.models import named_arrays
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.prepared import expert_layers
from mlxmoe.rotation import dense, plain_rotation
from mlxmoe.store import layer_records, read_header

pytestmark = pytest.mark.usefixtures("limits", "short_windows")

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 6}
ROTATION = ["--rotation", "randomised-hadamard"]
ARGUMENTS = ["--bpw", "8", "--expert-bits", "2,3,4", *ROTATION]
SPECS = {"pairs": "sensitivity:0.4", "threes": "random:0.5:3"}
CHOOSING = {  # a copy by the input; without and with the conservative mode
    "selective": ["--combine", "selective", "--replicas", "sensitivity:0.5"],
    "careful": ["--combine", "selective", "--conservative", "--replicas", "random:0.7:3"],
}
FILES = (*SPECS, *CHOOSING)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Behind a norm inputs have nearly one length, but where few of its weights are large."""
    folder = write_qwen3(tmp_path_factory.mktemp("replicated") / "source", **SMALL)

    def spread(weights: dict[str, mx.array]) -> None:
        for name, weight in weights.items():
            if name.endswith("post_attention_layernorm.weight"):
                weights[name] = mx.where(mx.arange(weight.size) < 2, 4 * weight, 0.5 * weight)

    edit_weights(folder, spread)
    return folder


@pytest.fixture(scope="module")
def by_text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = write_words(tmp_path_factory.mktemp("calibration") / "text.txt", 800)
    return ["--calibration", str(text), "--calibration-tokens", "256"]


@pytest.fixture(scope="module")
def arguments(by_text: list[str]) -> dict[str, list[str]]:
    plain = {name: [*ARGUMENTS, "--combine", "variance", "--replicas", spec] for name, spec in SPECS.items()}
    return plain | {name: [*ARGUMENTS, *by_text, *how] for name, how in CHOOSING.items()}


@pytest.fixture(scope="module")
def folders(source: Path, arguments: dict[str, list[str]], short_windows: None) -> dict[str, Path]:
    for name, given in arguments.items():
        assert convert(source, source.parent / name, *given) == 0
    return {name: source.parent / name for name in arguments}


class Sum(nn.Module):
    """What a layer with copies means: the sum of their outputs, each times its weight for the expert; with a selection
    [slopes, intercepts, usual norms] that of the copy that it chooses for a token and an expert. Counts what was chosen."""

    def __init__(self, copies: list[ExpertLayer], weights: np.ndarray, selection: list[Any] | None = None):
        super().__init__()
        self.copies, self._weights, self._selection = copies, weights, selection
        self.chosen: Counter[int | None] = Counter()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        outputs = mx.stack([copy(x, indices) for copy in self.copies])
        weights = self._weights[:, np.array(indices)]
        if self._selection is not None:
            norms = np.linalg.norm(np.array(x).astype(np.float64), axis=-1)
            for place in np.ndindex(*indices.shape):
                weights[:, *place] = self._choose(int(indices[place]), float(norms[place[:-1]]))
        return (outputs * mx.array(weights.astype(np.float32))[..., None]).sum(axis=0)

    def _choose(self, expert: int, norm: float) -> np.ndarray:
        slopes, intercepts, usual = self._selection  # type: ignore[misc]
        present = np.flatnonzero(self._weights[:, expert])
        chosen = min(present, key=lambda c: slopes[c][expert] * math.log(norm) + intercepts[c][expert])
        if usual is not None and not usual[expert] / 2 < norm < 1.5 * usual[expert]:
            chosen = None
        if len(present) > 1:
            self.chosen[chosen] += 1
        return self._weights[:, expert] if chosen is None else np.eye(len(self._weights))[chosen]


def written_out(folder: Path, levels: Any) -> Loaded:
    """The model with dense float32 copies W_hat R at these levels, [layer][expert][projection], and no rotation."""
    loaded = open_model(folder)
    modules, replaced = expert_layers(loaded.model), []
    plans = json.loads((folder / "plan.json").read_text())["layers"]
    for layer, of_layer, raw in zip(load_plan(folder).layers, levels, plans, strict=True):
        rules = [raw["rotations"], *raw["replicas"][0]]
        copies = []
        for c, (inputs, hidden) in enumerate(rules):
            linears = {}
            for p, shape in enumerate(layer.projections[:3]):
                name, seed, _ = hidden if p == 2 else inputs
                turn = dense(plain_rotation(name, shape.columns, seed))
                linears[shape.name] = SwitchLinear(shape.columns, shape.rows, len(of_layer), bias=False)
                linears[shape.name].weight = mx.array(
                    np.stack([matrix(folder, layer, e, 3 * c + p, of_layer) @ turn for e in range(len(of_layer))])
                )
            copies.append(ExpertLayer(linears, modules[layer.path].activation, len(of_layer)))
        _, weights, *selection = raw["replicas"]
        replaced.append((layer.path, Sum(copies, np.array(weights), *selection)))
    loaded.model.update_modules(tree_unflatten(replaced))
    return loaded


def matrix(folder: Path, layer: LayerPlan, expert: int, projection: int, levels: Any) -> np.ndarray:
    shape, level = layer.projections[projection], levels[expert][projection]
    return stored_matrix(folder, layer, expert, projection, level) if level else np.zeros((shape.rows, shape.columns))


# What is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_sum_written_out(name: str, folders: dict[str, Path]) -> None:
    expected, found = written_out(folders[name], written_levels(folders[name])), open_model(folders[name])
    for tokens in (PROMPT, PROMPT[:, :1]):  # sorted pairs and few of them
        close(logits(found, tokens), logits(expected, tokens))


@pytest.mark.parametrize("name", CHOOSING)
def test_choices_differ_from_token_to_token(name: str, folders: dict[str, Path]) -> None:
    """Without which the other tests would say little."""
    expected = written_out(folders[name], written_levels(folders[name]))
    logits(expected)
    chosen = sum((m.chosen for _, m in expected.model.named_modules() if isinstance(m, Sum)), Counter())
    assert chosen.keys() == {"selective": {0, 1}, "careful": {None, 0, 1, 2}}[name]
    assert min(chosen.values()) >= 3


@pytest.mark.parametrize("name", ["pairs", "selective"])
def test_logits_of_reduced_levels(name: str, folders: dict[str, Path]) -> None:
    loaded = open_reduced(folders[name])
    assert loaded.elastic is not None
    levels = loaded.elastic.residency.levels
    assert levels != written_levels(folders[name])
    close(logits(loaded), logits(written_out(folders[name], levels)))
    loaded.elastic.resize(loaded.elastic.full)
    assert (logits(loaded) == logits(open_model(folders[name]))).all()


@pytest.mark.parametrize("name", FILES)
def test_streamed_is_resident_to_the_last_bit(name: str, folders: dict[str, Path]) -> None:
    streamed, resident = open_streamed(folders[name]), open_model(folders[name])
    for tokens in (PROMPT, PROMPT[:, :1], PROMPT[:, :3]):
        assert (logits(streamed, tokens) == logits(resident, tokens)).all()
    assert streamed.experts is not None
    sizes = [size for layer in streamed.experts.layers for size in layer.sizes]
    assert len(set(sizes)) > 1  # copies take memory
    streamed.experts.close()


def test_exchanges_of_levels_leave_copies_alone(folders: dict[str, Path]) -> None:
    loaded = open_reduced(folders["pairs"], adapt=True)
    assert loaded.elastic is not None
    for start in range(4):
        logits(loaded, PROMPT[:, start : start + 8])
        loaded.elastic.adapt()
    assert loaded.elastic.swaps
    close(logits(loaded), logits(written_out(folders["pairs"], loaded.elastic.residency.levels)))


def test_the_kernels_are_left_out(folders: dict[str, Path]) -> None:
    loaded = open_model(folders["pairs"], RuntimeConfig(kernels=ReferenceKernels()))
    assert "the kernels lack this file's rotations or copies" in loaded.report.products
    assert (logits(loaded) == logits(open_model(folders["pairs"]))).all()


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_bytes_are_counted_exactly(name: str, folders: dict[str, Path]) -> None:
    folder, plan = folders[name], load_plan(folders[name])
    assert 0.95 * 8 <= 8 * folder_nbytes(folder) / plan.num_parameters <= 8  # records come in steps of a page
    for layer in plan.layers:
        tensors = read_header(folder / layer.file)
        assert {n: info.nbytes for n, info in tensors.items()} == {n: b for _, _, n, b in layer_records(layer)}
    prepared = prepare(folder, RuntimeConfig(context=64))
    more = prepared.nbytes_trunk - sum(array.nbytes for array in named_arrays(prepared.model.parameters()).values())
    copies = 1 + int(SPECS[name][-1] == "3") + 1
    assert more == 2 * 4 * copies * (64 + 64 + 6) == sum(copies_nbytes(layer, mx.float32) for layer in plan.layers)


@pytest.mark.parametrize("name", CHOOSING)
def test_what_copies_are_chosen_by_is_counted(name: str, folders: dict[str, Path]) -> None:
    folder, plan = folders[name], load_plan(folders[name])
    assert 0.95 * 8 <= 8 * folder_nbytes(folder) / plan.num_parameters <= 8
    turns, lines = 2 * 2 * 4 * (64 + 64), 2 * 6  # of two copies; slopes and intercepts of six experts
    if name == "careful":
        turns, lines = 2 * 3 * 4 * (64 + 64), 3 * 6
    values = lines + 2 * lines + (6 if name == "careful" else 0)
    assert sum(copies_nbytes(layer, mx.float32) for layer in plan.layers) == turns + 2 * 4 * values


def test_a_dry_run_tells_the_bytes_of_what_is_fitted(
    source: Path,
    arguments: dict[str, list[str]],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(source, tmp_path / "out", *arguments["careful"], "--dry-run", "--json") == 0
    foretold = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert foretold["bytes"] == folder_nbytes(folders["careful"])


def test_a_dry_run_tells_the_bytes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bpw", "8", *ROTATION, "--replicas", "adaptive", "--json"]
    assert convert(source, tmp_path / "out", *arguments, "--dry-run") == 0
    foretold = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert convert(source, tmp_path / "out", *arguments) == 0
    written = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert foretold["bytes"] == written["bytes"] == folder_nbytes(tmp_path / "out")
    # What is foretold takes further copies to be as good as the first, which alone was measured
    assert foretold["expected_loss"] == pytest.approx(written["expected_loss"], rel=0.03)


def test_an_expert_and_its_copies_have_one_level_and_are_read_together(folders: dict[str, Path]) -> None:
    copies = set()
    for layer in load_plan(folders["threes"]).layers:
        assert sum(any(entry.levels[3:]) for entry in layer.experts) == 3  # half of six
        for entry in layer.experts:
            present = [entry.levels[i : i + 3] for i in (0, 3, 6) if entry.levels[i]]
            assert len(set(present)) == 1
            copies.add(len(present))
    assert copies == {1, 3}


# Converting -----------------------------------------------------------------------------------------------------------


def test_what_outputs_count(source: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """By variance: in inverse proportion to the errors, summing to 1. The mean: 1/copies. 0 where there is no copy."""
    for layer in load_plan(folders["pairs"]).layers:
        assert layer.replicas is not None
        for entry, weights in zip(layer.experts, zip(*layer.replicas.weights, strict=True), strict=True):
            errors = np.array([sum(e[-1] for e in entry.errors[i : i + 3]) for i in (0, 3) if entry.levels[i]])
            np.testing.assert_allclose(weights, [*(1 / errors / (1 / errors).sum()), 0][:2], atol=1e-3)
    assert convert(source, tmp_path / "out", "--bpw", "8", *ROTATION, "--replicas", "sensitivity:1:3") == 0
    for layer in load_plan(tmp_path / "out").layers:
        assert layer.replicas is not None
        assert set(np.array(layer.replicas.weights).flat) == {0.3333}


@pytest.mark.parametrize("combine", ["mean", "learned"])
def test_by_calibration_text(
    combine: str, source: Path, by_text: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [*by_text, "--expert-bits", "2", *ROTATION, "--replicas", "sensitivity:0.5", "--combine", combine]
    assert convert(source, tmp_path / "out", "--bpw", "8", *arguments) == 0
    close(logits(open_model(tmp_path / "out")), logits(written_out(tmp_path / "out", written_levels(tmp_path / "out"))))
    chosen = load_plan(folders["selective"]).layers
    for layer, one in zip(load_plan(tmp_path / "out").layers, chosen, strict=True):
        assert layer.replicas is not None
        # Of two copies that are averaged an error counts a quarter, of two of which one is chosen a half
        halves = [1 / layer.num_copies(e) for e in range(len(layer.experts))]
        np.testing.assert_allclose(layer.weights[:3], np.array(one.weights[:3]) * halves, rtol=2e-3)  # four digits
        sums = np.array(layer.replicas.weights).sum(axis=0)
        single = [not any(entry.levels[3:]) for entry in layer.experts]
        assert (sums[single] == 1).all()
        assert (np.abs(sums - 1).max() < 1e-3) == (combine == "mean")


@pytest.mark.parametrize("name", CHOOSING)
def test_what_copies_are_chosen_by_is_in_the_plan(name: str, folders: dict[str, Path]) -> None:
    """Lines for experts with copies, and the mean of the copies; usual norms where they are asked for."""
    plan = load_plan(folders[name])
    assert plan.version == 4
    assert plan.settings["replicas"]["combine"] == "selective"
    assert plan.settings["replicas"].get("conservative", False) == (name == "careful")
    for layer in plan.layers:
        assert layer.replicas is not None
        assert layer.replicas.selection is not None
        slopes, intercepts, usual = layer.replicas.selection
        for e in range(len(layer.experts)):
            count = layer.num_copies(e)
            of_expert = np.array([[row[e] for row in rows] for rows in (layer.replicas.weights, slopes, intercepts)])
            np.testing.assert_allclose(
                of_expert[0], [1 / count] * count + [0] * (of_expert.shape[1] - count), atol=1e-4
            )
            assert of_expert[1:].any() == (count > 1)
            assert usual is None or count > 1 or usual[e] == 0
        assert (usual is not None) == (name == "careful")
        assert not usual or any(usual)


@pytest.mark.parametrize("name", FILES)
def test_what_an_expert_weighs(name: str, folders: dict[str, Path]) -> None:
    """Errors of k averaged copies add up to 1/k of one copy's, of k of which one is chosen to all of it."""
    plan = load_plan(folders[name])
    for layer in plan.layers:
        found = loading._frequencies(plan, layer.layer)
        added = np.sum(layer.weights, axis=0)
        counts = np.array([layer.num_copies(e) for e in range(len(layer.experts))])
        np.testing.assert_allclose(found, added if name in CHOOSING else added * counts, rtol=1e-3)  # four digits


def test_files_without_choices_are_as_they_were(folders: dict[str, Path]) -> None:
    for name in SPECS:
        data = json.loads((folders[name] / "plan.json").read_text())
        assert data["version"] == 2
        assert data["settings"]["replicas"].keys() == {"by", "share", "copies", "combine"}
        assert all(len(layer["replicas"]) == 2 for layer in data["layers"])


@pytest.mark.parametrize("name", ["pairs", "careful"])
def test_a_stopped_conversion_goes_on(
    name: str, source: Path, arguments: dict[str, list[str]], folders: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.write_shard", stop)  # behind the experts
        assert convert(source, tmp_path / "out", *arguments[name]) == 130
    assert convert(source, tmp_path / "out", *arguments[name], "--resume") == 0
    assert snapshot(tmp_path / "out") == snapshot(folders[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--replicas", "sensitivity"],
            "needs rotations of which there are many, and --rotation none is not such a one",
        ),
        (["--replicas", "sensitivity", "--rotation", "hadamard"], "and --rotation hadamard is not such a one"),
        (["--replicas", "often", *ROTATION], "--replicas often:0.3:2 is not understood"),
        (["--replicas", "random:x", *ROTATION], "--replicas 'random:x' is not understood"),
        (["--replicas", "random:2", *ROTATION], "--replicas random:2:2 is not understood"),
        (["--replicas", "random:0.3:9", *ROTATION], "--replicas random:0.3:9 is not understood"),
        (["--replicas", "random", "--combine", "learned", *ROTATION], "--combine learned goes by text"),
        (["--replicas", "random", "--combine", "selective", *ROTATION], "--combine selective goes by text"),
        (["--replicas", "random", "--conservative", *ROTATION], "and --combine mean selects none"),
        (["--conservative"], "--conservative is about copies of experts"),
    ],
)
def test_refused_before_any_work(
    arguments: list[str], words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out", "--bpw", "8", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_copies_cannot_be_read_layer_by_layer(
    source: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expert with copies is a sum of several outputs, no matrix: said before any work. What the plan says is drawn."""
    (tmp_path / "text.txt").write_text("the experts of a layer " * 20)
    model, text, drawn = str(folders["pairs"]), ["--text", str(tmp_path / "text.txt"), "--window", "32"], tmp_path / "r"
    measured = ["report", model, "--output", str(drawn), "--reference", str(source), *text, "--max-tokens", "64"]
    for command in (["stats", model, *text], measured):
        assert main(command) == 2
        assert "has copies of experts" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert main(["report", model, "--output", str(drawn)]) == 0
    result = json.loads((drawn / "report.json").read_text())
    assert sum(result["bytes_by_class"].values()) == result["bytes"]


def test_experts_with_biases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_architecture(tmp_path / "source", "gpt_oss", intermediate_size=64, moe_intermediate_size=64)
    assert convert(source, tmp_path / "out", "--bpw", "9", *ROTATION, "--replicas", "random") == 2
    assert "have biases" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "into"),
    [
        (r'"replicas":\[\[', '"replicas":[[],['),
        (r'"gate_proj_2",64,64', '"gate_proj_2",64,128'),
        (r'"down_proj_2",', '"down_proj_2",96,'),
        (r"\[(\d),\1,\1,\1,\1,\1\]", r"[\1,\1,\1,\1,0,\1]"),
    ],
)
def test_plans_that_do_not_fit_together(change: str, into: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["pairs"], tmp_path / "copy")
    text, count = re.subn(change, into, (folder / "plan.json").read_text(), count=1)
    assert count == 1
    with pytest.raises(UserError, match="is damaged"):
        Plan.loads(text)


def _lose(replicas: list[Any]) -> None:
    del replicas[2]


def _shorten(replicas: list[Any]) -> None:
    del replicas[2][1][0][-1]


def _drop_a_copy(replicas: list[Any]) -> None:
    del replicas[2][0][-1]


def _lose_usual(replicas: list[Any]) -> None:
    del replicas[2][2]


def _spoil(replicas: list[Any]) -> None:
    replicas[2][0][1][0] = float("nan")


def _turn_negative(replicas: list[Any]) -> None:
    replicas[2][2][0] = -1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_lose, "layer 1: there is nothing for choosing copies by the input"),
        (_shorten, "layer 1: what copies are chosen by does not fit its experts"),
        (_drop_a_copy, "layer 1: what copies are chosen by does not fit its experts"),
        (_spoil, "layer 1: what copies are chosen by does not fit its experts"),
        (_turn_negative, "layer 1: what copies are chosen by does not fit its experts"),
        (_lose_usual, "is damaged"),
    ],
)
def test_damage_to_what_copies_are_chosen_by(
    change: Callable[[list[Any]], None], words: str, folders: dict[str, Path]
) -> None:
    data = json.loads((folders["careful"] / "plan.json").read_text())
    change(data["layers"][1]["replicas"])
    with pytest.raises(UserError, match=words):
        Plan.loads(json.dumps(data))


def test_a_choice_that_was_not_asked_for(folders: dict[str, Path]) -> None:
    data = json.loads((folders["selective"] / "plan.json").read_text())
    data["settings"]["replicas"]["combine"] = "mean"
    with pytest.raises(UserError, match="the settings say nothing of choosing copies by the input"):
        Plan.loads(json.dumps(data))
