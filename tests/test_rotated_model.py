"""Rotated files from converting to logits: the same as their values rotated back, resident, reduced and streamed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from converted_models import PROMPT, close, logits, open_reduced, open_streamed, written_levels
from mlx_lm.models.switch_layers import SwitchLinear
from safetensors.numpy import load_file
from toy_checkpoints import (
    RuntimeConfig,
    convert,
    edit_weights,
    flip_bit,
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

from mlxmoe.banks import copies_nbytes
from mlxmoe.convert.rotate import CANDIDATES
from mlxmoe.copies import ONE_COPY
from mlxmoe.errors import UserError
from mlxmoe.experts import ExpertLayer
from mlxmoe.formats import LEVELS
from mlxmoe.kernels import ReferenceKernels
from mlxmoe.loading import Loaded
from mlxmoe.models import named_arrays
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.prepared import expert_layers
from mlxmoe.rotation import PLAIN, STORED, LayerRotations, RotationRule, random_signs
from mlxmoe.store import layer_header, read_header

pytestmark = pytest.mark.usefixtures("limits", "short_windows")

SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 6}
NAMES = [name for name in PLAIN if name not in ("none", "block-hadamard-128")]  # 64 hidden values


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("rotated") / "source", **SMALL)


@pytest.fixture(scope="module")
def folders(source: Path) -> dict[str, Path]:
    """The source converted behind every rotation."""
    result = {name: source.parent / name for name in NAMES}
    for name, folder in result.items():
        assert convert(source, folder, "--bpw", "7", "--expert-bits", "2,3,4", "--rotation", name, "--seed", "5") == 0
    return result


def written_out(folder: Path, layer: LayerPlan, place: str, columns: int) -> np.ndarray:
    """R as a dense matrix from the definition, with SciPy's Hadamard matrices and nothing of the project's but the signs."""
    linalg = pytest.importorskip("scipy.linalg")
    rule = getattr(layer.rotations, place)
    if rule.name == "none":
        return np.eye(columns, dtype=np.float32)
    if rule.name in STORED:
        return load_file(folder / layer.file)[f"L{layer.layer}.rotation.{place}"].astype(np.float32)
    size = int(rule.name.rpartition("-")[2]) if rule.name.startswith("block") else columns
    blocks = np.kron(np.eye(columns // size), linalg.hadamard(size) / np.sqrt(size))
    return (blocks if rule.name == "hadamard" else blocks * random_signs(columns, rule.seed)).astype(np.float32)


def rotated_back(folder: Path, levels: Any) -> Loaded:
    """The model with dense float32 experts W_hat R at these levels, [layer][expert][projection], without any rotation."""
    loaded = open_model(folder)
    modules = expert_layers(loaded.model)
    for layer, of_layer in zip(load_plan(folder).layers, levels, strict=True):
        module: ExpertLayer = modules[layer.path]
        module.copies = ONE_COPY
        for p, shape in enumerate(layer.projections):
            turn = written_out(folder, layer, "hidden" if p == len(layer.projections) - 1 else "inputs", shape.columns)
            weights = [stored_matrix(folder, layer, e, p, of_layer[e][p]) @ turn for e in range(len(layer.experts))]
            linear = SwitchLinear(shape.columns, shape.rows, len(layer.experts), bias=False)
            linear.weight = mx.array(np.stack(weights))
            setattr(module, shape.name, linear)
    return loaded


# Resident, reduced, streamed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_values_rotated_back(name: str, folders: dict[str, Path]) -> None:
    expected = rotated_back(folders[name], written_levels(folders[name]))
    for tokens in (PROMPT, PROMPT[:, :1]):  # sorted pairs and few of them
        close(logits(open_model(folders[name]), tokens), logits(expected, tokens))


def test_the_rotation_matters(folders: dict[str, Path]) -> None:
    """What the tolerance has to tell apart: the same codes read without the rotation."""
    loaded = open_model(folders["block-hadamard-64"])
    right = logits(loaded)
    for module in expert_layers(loaded.model).values():
        module.copies = ONE_COPY
    assert np.abs(logits(loaded) - right).max() > 0.05 * np.abs(right).max()


@pytest.mark.parametrize("name", ["random", "block-hadamard-64"])
def test_logits_of_reduced_levels(name: str, folders: dict[str, Path]) -> None:
    loaded = open_reduced(folders[name])
    assert loaded.elastic is not None
    levels = loaded.elastic.residency.levels
    assert levels != written_levels(folders[name])
    close(logits(loaded), logits(rotated_back(folders[name], levels)))


@pytest.mark.parametrize("kernels", [None, ReferenceKernels()], ids=["built-ins", "kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_is_resident_to_the_last_bit(name: str, kernels: Any, folders: dict[str, Path]) -> None:
    resident = open_model(folders[name], RuntimeConfig(None, 64, kernels=kernels))
    streamed = open_streamed(folders[name], kernels=kernels)
    for tokens in (PROMPT, PROMPT[:, :1], PROMPT[:, :3]):
        assert (logits(streamed, tokens) == logits(resident, tokens)).all()
    assert streamed.experts is not None
    streamed.experts.close()


# The project's kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STORED])
def test_the_kernels_compute_what_the_built_ins_do(name: str, folders: dict[str, Path]) -> None:
    built_ins = open_model(folders[name], RuntimeConfig(kernels=None))
    kernels = open_model(folders[name], RuntimeConfig(kernels=ReferenceKernels()))
    assert not expert_layers(kernels.model)
    for tokens in (PROMPT, PROMPT[:, :1]):
        close(logits(kernels, tokens), logits(built_ins, tokens))


def test_kernels_keep_their_rotations_when_levels_change(folders: dict[str, Path]) -> None:
    folder, kernels = folders["randomised-hadamard"], ReferenceKernels()
    reduced = open_reduced(folder, kernels=kernels)
    changed = open_model(folder, RuntimeConfig(None, 64, kernels=kernels))
    assert reduced.elastic is not None
    assert changed.elastic is not None
    changed.elastic.resize(reduced.elastic.nbytes)
    assert changed.elastic.residency.levels == reduced.elastic.residency.levels
    assert (logits(changed) == logits(reduced)).all()


def test_a_rotation_without_a_kernel_runs_on_the_built_ins(folders: dict[str, Path]) -> None:
    loaded = open_model(folders["random"], RuntimeConfig(kernels=ReferenceKernels()))
    assert loaded.report.products == "MLX's built-in products: the kernels lack this file's rotations or copies"
    assert (logits(loaded) == logits(open_model(folders["random"]))).all()


@pytest.mark.parametrize("case", ["gpt_oss", "deepseek_v3", "nemotron_h"])
def test_other_kinds_of_experts(case: str, tmp_path: Path) -> None:
    """Biases, shared experts, two projections. Experts of 64 columns: the other sizes have no Hadamard matrix."""
    key = "intermediate_size" if case == "gpt_oss" else "moe_intermediate_size"
    source = write_architecture(tmp_path / "source", case, **{key: 64, "moe_intermediate_size": 64})
    assert convert(source, tmp_path / "out", "--bpw", "9", "--rotation", "randomised-hadamard") == 0
    expected = rotated_back(tmp_path / "out", written_levels(tmp_path / "out"))
    for module, biased in zip(
        *(expert_layers(m.model).values() for m in (expected, open_model(tmp_path / "out"))), strict=True
    ):
        for linear, old in zip(module.projections, biased.projections, strict=True):
            if "bias" in old:
                linear.bias = old.bias
    found = logits(open_model(tmp_path / "out"))
    close(found, logits(expected))


# Bytes and damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_counted_exactly(name: str, folders: dict[str, Path]) -> None:
    folder, plan = folders[name], load_plan(folders[name])
    assert 0.95 * 7 <= 8 * folder_nbytes(folder) / plan.num_parameters <= 7  # records come in steps of a page
    assert plan.nbytes + (folder / "plan.json").stat().st_size == folder_nbytes(folder)
    for layer in plan.layers:
        tensors = read_header(folder / layer.file)
        stored = {n: info for n, info in tensors.items() if "rotation" in n}
        assert [info.nbytes for info in stored.values()] == ([2 * 128 * 128, 2 * 64 * 64] if name == "random" else [])
        data = (folder / layer.file).stat().st_size - len(layer_header(layer))
        assert data == sum(info.nbytes for info in tensors.values())


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_counted(name: str, folders: dict[str, Path]) -> None:
    prepared = prepare(folders[name], RuntimeConfig(context=64))
    more = prepared.nbytes_trunk - sum(array.nbytes for array in named_arrays(prepared.model.parameters()).values())
    assert more == 2 * 4 * (128 + 64) + (2 * 4 * (128**2 + 64**2) if name == "random" else 0)
    assert more == sum(copies_nbytes(layer, mx.float32) for layer in load_plan(folders[name]).layers)


def test_a_damaged_matrix_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["random"], tmp_path / "copy")
    flip_bit(folder / load_plan(folder).layers[1].file, -5)
    with pytest.raises(UserError, match="layer 1, rotation of the hidden has a wrong checksum"):
        open_model(folder)


def test_a_plan_whose_matrix_is_not_there_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["hadamard"], tmp_path / "copy")
    plan = load_plan(folder)
    layers = tuple(layer._replace(rotations=LayerRotations(hidden=RotationRule("random"))) for layer in plan.layers)
    replace(plan, layers=layers).save(folder)
    with pytest.raises(UserError, match=r"has nothing for L0\.rotation\.hidden"):
        open_model(folder)


# Converting -----------------------------------------------------------------------------------------------------------


def test_levels_are_chosen_by_errors_behind_the_rotation(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns that stand out: what is foretold, and so the allocation, is what the rotation leaves of them."""
    folder = shutil.copytree(source, tmp_path / "source")

    def stand_out(weights: dict[str, mx.array]) -> None:
        for name, array in weights.items():
            if ".experts." in name:
                weights[name] = mx.where(mx.arange(array.shape[1]) % 16 == 0, 20 * array, array)

    edit_weights(folder, stand_out)
    losses = {}
    for name in ("none", "randomised-hadamard"):
        arguments = ["--bpw", "7", "--expert-bits", "2,3,4", "--rotation", name, "--json"]
        assert convert(folder, tmp_path / name, *arguments, "--dry-run") == 0
        foretold = json.loads(capsys.readouterr().out.splitlines()[-1])["expected_loss"]
        assert convert(folder, tmp_path / name, *arguments) == 0
        losses[name] = json.loads(capsys.readouterr().out.splitlines()[-1])["expected_loss"]
        assert foretold == pytest.approx(losses[name], rel=1e-3)
    assert losses["randomised-hadamard"] < 0.8 * losses["none"]


@pytest.mark.parametrize("name", ["auto", "dfrot-100"])
def test_by_calibration_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_qwen3(tmp_path / "source", **{**SMALL, "hidden_size": 64, "num_experts": 4})
    text = write_words(tmp_path / "text.txt", 800)
    arguments = ["--calibration", str(text), "--calibration-tokens", "256", "--expert-bits", "2", "--rotation", name]
    assert convert(source, tmp_path / "out", "--bpw", "6", *arguments) == 0
    plan = load_plan(tmp_path / "out")
    chosen = [rule.name for layer in plan.layers for rule in layer.rotations]
    if name == "auto":
        assert set(chosen) <= {"none", *CANDIDATES}
        assert "rotations, by layers: input " in capsys.readouterr().err
    else:
        assert chosen == [name] * 4
        assert plan.layers[0].rotations.hidden.crc32 != plan.layers[1].rotations.hidden.crc32  # fitted to each
    close(
        logits(open_model(tmp_path / "out")), logits(rotated_back(tmp_path / "out", written_levels(tmp_path / "out")))
    )


def test_a_stopped_conversion_goes_on_with_the_same_rotation(
    source: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--bpw", "7", "--expert-bits", "2,3,4", "--rotation", "random", "--seed", "5"]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.write_layer", stop)
        assert convert(source, tmp_path / "out", *arguments) == 130
    with monkeypatch.context() as patched:  # another machine's QR decomposition would differ in the last bits
        patched.setattr("mlxmoe.rotation.random_orthogonal", stop)
        assert convert(source, tmp_path / "out", *arguments, "--resume") == 0
    assert snapshot(tmp_path / "out") == snapshot(folders["random"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rotation", "auto"], "--rotation auto goes by text"),
        (["--rotation", "dfrot-100"], "--rotation dfrot-100 goes by text"),
        (["--rotation", "block-hadamard-128"], "does not fit the 64 columns of down_proj, which are not a multiple"),
        (["--rotation", "hadamard", "--seed", "-1"], "--seed -1 is not between 0"),
    ],
)
def test_refused_before_any_work(
    arguments: list[str], words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out", "--bpw", "7", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plans_of_older_files_are_read_and_unrotated_ones_are_written_as_such(folders: dict[str, Path]) -> None:
    plan = load_plan(folders["hadamard"])
    assert '"version":2,' in plan.dumps()
    assert Plan.loads(plan.dumps()).layers == plan.layers
    plain = replace(plan, layers=tuple(layer._replace(rotations=LayerRotations()) for layer in plan.layers))
    assert '"version":1,' in plain.dumps()
    assert "rotations" not in plain.dumps()
    assert Plan.loads(plain.dumps()).layers == plain.layers
    for bad in ('["householder",5,0]', '["hadamard",-1,0]', '["hadamard",1.5,0]', '["hadamard"', "7"):
        with pytest.raises(UserError, match=r"is damaged|not valid JSON"):
            Plan.loads(plan.dumps().replace('["hadamard",5,0]', bad, 1))
    assert all(level in LEVELS for level in plan.level_histogram())
