"""What is done between the codes and the files: kept, resumed, and visible in a converted model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import (
    SMALL,
    convert,
    load_plan,
    open_model,
    snapshot,
    stored_matrix,
    write_architecture,
    write_qwen3,
)
from toy_text import write_words

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.coded import CodedLayer
from mlxmoe.convert.polish import Outcome, Stored, View, parameters
from mlxmoe.convert.quantize import affine_search
from mlxmoe.convert.route import TEMPERATURE
from mlxmoe.convert.source import Source
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.write import pack_matrix
from mlxmoe.formats import MatrixShape
from mlxmoe.plan import ExpertEntry, LayerPlan

pytestmark = pytest.mark.usefixtures("short_windows")

BIASED = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
CALIBRATED = [
    "--bpw",
    "6",
    "--expert-bits",
    "2,4",
    "--rotation",
    "none",
    "--calibration-tokens",
    "256",
    "--calibration",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("coded") / "source", **SMALL)


def stretch(walk: Walk, *arguments: Any) -> Outcome:
    """In the place of what refines scales: all of them by 1 %, in the model as well."""
    whole = [View(1.0, given) for given in arguments if isinstance(given, dict) and _has_matrices(given)]
    views = whole or next(given for given in arguments if isinstance(given, list) and isinstance(given[0], View))
    for parameter in parameters(views).values():
        parameter.values[:] *= np.float32(1.01)
    walk.stream.replace((f"{path}.weight", matrix.values()) for path, matrix in views[0].matrices.items())
    return Outcome(1.0, 0.9)


def _has_matrices(given: dict[str, Any]) -> bool:
    return any(isinstance(value, Stored) for value in given.values())


ASKED = {
    "none": ["--polish", "none"],
    "factors": ["--polish", "factors"],
    "layer": ["--polish", "layer", "--router", "temperature"],
    "model": ["--polish", "model", "--router", "topk-mse"],
    "nested": ["--polish", "none", "--nested", "1"],
    "nested layer": ["--polish", "layer", "--nested", "1"],
}


@pytest.fixture(scope="module")
def outputs(source: Path, text: Path) -> dict[str, Path]:
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mlxmoe.convert.polished.polish_layer", stretch)
        patched.setattr("mlxmoe.convert.polished.polish_model", stretch)
        for name, more in ASKED.items():
            found[name] = source.parent / name
            assert convert(source, found[name], *CALIBRATED, str(text), *more) == 0
    return found


def test_a_layer_is_kept_bit_for_bit() -> None:
    random = np.random.RandomState(0)
    shapes = (MatrixShape("up_proj", 8, 64, 32), MatrixShape("down_proj", 8, 64, 64))
    entries = tuple(ExpertEntry(levels, (), (), ()) for levels in ((2, 8), (4, 3)))
    layer = LayerPlan(0, "layers.0.mlp", "mlp", "file", shapes, (), entries)
    coded = CodedLayer(routers={"gate.weight": random.standard_normal((2, 4)).astype(np.float32)})
    coded.trunk["o_proj.weight"] = affine_search(random.standard_normal((16, 32)).astype(np.float32), 3)._replace(
        error=0.0
    )
    for p, shape in enumerate(shapes):
        weights = random.standard_normal((2, 8, 64)).astype(np.float32)
        coded.experts.append([pack_matrix(w, shape, e.levels[p]) for w, e in zip(weights, entries, strict=True)])
    again = CodedLayer.from_arrays(coded.trunk_arrays())
    again.take_experts(coded.expert_arrays(), layer)
    for key in ("codes", "scales", "biases"):
        assert (getattr(again.trunk["o_proj.weight"], key) == getattr(coded.trunk["o_proj.weight"], key)).all()
    assert (again.routers["gate.weight"] == coded.routers["gate.weight"]).all()
    for left, right in zip(again.by_expert(), coded.by_expert(), strict=True):
        for a, b in zip(left, right, strict=True):
            assert a.errors == b.errors
            assert (a.matrix.level, a.matrix.shape, a.matrix.gains) == (b.matrix.level, b.matrix.shape, b.matrix.gains)
            assert (np.array(a.matrix.scales) == np.array(b.matrix.scales)).all()
            assert all(
                (np.array(x) == np.array(y)).all() for x, y in zip(a.matrix.planes, b.matrix.planes, strict=True)
            )


@pytest.mark.parametrize("name", ["factors", "layer", "model"])
def test_scales_move_and_sizes_do_not(name: str, outputs: dict[str, Path]) -> None:
    """In the first layer, whose codes do not depend on what is done behind them, only scales differ: all by 1 %, or with
    factors those of the last projection by one number for every expert."""
    before, after = load_plan(outputs["none"]), load_plan(outputs[name])
    assert sum(f.nbytes for f in before.files.values()) == sum(f.nbytes for f in after.files.values())
    plans = ((outputs["none"], before), (outputs[name], after))
    for e, expert in enumerate(after.layers[0].experts):
        for p, level in enumerate(expert.levels):
            old, new = (stored_matrix(folder, plan.layers[0], e, p, level) for folder, plan in plans)
            ratio = np.divide(new, old, where=old != 0, out=np.ones_like(new))
            if name == "factors":
                assert np.ptp(ratio) < 2e-3  # but for the rounding to float16
                assert 0.5 < ratio.min() <= ratio.max() < 2
                assert (np.abs(ratio - 1).max() > 0) == (p == 2)
            else:
                np.testing.assert_allclose(ratio, 1.01, rtol=1e-3)


def test_gains_move_where_lower_levels_count(outputs: dict[str, Path]) -> None:
    """With --nested they are refined together with the scales; without it nobody asks."""
    before, after = load_plan(outputs["nested"]), load_plan(outputs["nested layer"])
    assert {level for entry in before.layers[0].experts for level in entry.levels} == {2, 4}
    for old, new in zip(before.layers[0].experts, after.layers[0].experts, strict=True):
        assert old.levels == new.levels
        for level, was, now in zip(old.levels, old.gains, new.gains, strict=True):
            assert len(was) == len(now) == (2 if level == 4 else 0)
            np.testing.assert_allclose(now, np.array(was) * 1.01, rtol=5e-4)
    alone = [load_plan(outputs[name]).layers[0].experts for name in ("none", "layer")]
    assert [entry.gains for entry in alone[0]] == [entry.gains for entry in alone[1]]


def test_the_trunk_is_refined_as_well(outputs: dict[str, Path]) -> None:
    """But for the embedding, which has no gradient here."""
    _by_one_percent([stored_tensors(outputs[name]) for name in ("none", "layer", "model")])
    _by_one_percent([stored_tensors(outputs[name]) for name in ("nested", "nested layer")])


def _by_one_percent(found: list[dict[str, mx.array]]) -> None:
    for name, array in found[0].items():
        stored = name.rpartition(".")[2]
        if stored not in ("scales", "biases") or (".layers.0." not in name and "embed" not in name):
            continue
        for other in found[1:]:
            wanted = array * (1.0 if "embed" in name else 1.01)
            np.testing.assert_allclose(np.array(other[name]), np.array(wanted), rtol=2e-3)
    assert any("self_attn" in name and name.endswith("scales") for name in found[0])


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for shard in open_checkpoint(folder).shards:
        found.update(cast(dict[str, mx.array], mx.load(str(shard))))
    return found


@pytest.mark.parametrize("name", ["none", "factors", "layer", "model"])
def test_routers_are_those_of_the_source_unless_asked(name: str, outputs: dict[str, Path], source: Path) -> None:
    """Changed ones are in the source's precision."""
    original = Source(open_checkpoint(source), 128).tensors()
    gates = {n: array for n, array in stored_tensors(outputs[name]).items() if ".mlp.gate." in n}
    assert len(gates) == 2
    for n, array in gates.items():
        assert array.dtype == original[n].dtype
        before, after = original[n].astype(mx.float32), array.astype(mx.float32)
        if name in ("none", "factors"):
            assert mx.array_equal(before, after).item()
        elif name == "layer":
            assert mx.array_equal(after, (before / TEMPERATURE).astype(array.dtype).astype(mx.float32)).item()
        else:
            assert 0 < mx.abs(after - before).max().item() < 0.5 * mx.abs(before).max().item()


def test_a_bias_falls_by_the_degradation(text: Path, tmp_path: Path) -> None:
    """Of the selection bias of DeepSeek-V3, by what the plan says that the experts have lost. The loaded model runs."""
    source = write_architecture(tmp_path / "source", "deepseek_v3", **BIASED)
    assert convert(source, tmp_path / "out", *CALIBRATED, str(text), "--router", "bias") == 0
    (layer,) = load_plan(tmp_path / "out").layers
    name = f"{layer.path.rpartition('.')[0]}.gate.e_score_correction_bias"
    before = Source(open_checkpoint(source), 128).tensors()[name].astype(mx.float32)
    after = stored_tensors(tmp_path / "out")[name].astype(mx.float32)
    relative = [np.sqrt(sum(errors[-1] for errors in expert.errors)) for expert in layer.experts]
    np.testing.assert_allclose(np.array(before - after), 0.5 * np.array(relative), atol=4e-3)
    assert mx.isfinite(open_model(tmp_path / "out").model(mx.array([[5, 6, 7]]))).all().item()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--router", "bias"], "has no bias to change"),
        (["--polish", "model", "--nested", "1"], "--polish model refines the level that is written"),
        (["--polish", "factors", "--nested", "1"], "--polish factors refines the level that is written"),
    ],
)
def test_what_does_not_go_is_refused(
    more: list[str], expected: str, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out", *CALIBRATED, str(text), *more) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--polish", "--router"])
def test_both_need_text(flag: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"--polish": "layer", "--router": "topk-mse"}[flag]
    assert convert(source, tmp_path / "out", "--bpw", "6", flag, value) == 2
    assert f"{flag} {value} goes by text" in capsys.readouterr().err


def test_stopped_at_every_step(
    source: Path, text: Path, outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model polished and routers fitted: a stop before every ninth rename, resumed every time."""
    renames, real = 0, os.replace

    def replace(old: Any, new: Any) -> None:
        nonlocal renames
        renames += 1
        if renames % 9 == 0:
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.polished.polish_model", stretch)
        patched.setattr(os, "replace", replace)
        stops = 0
        arguments = [*CALIBRATED, str(text), *ASKED["model"]]
        while convert(source, tmp_path / "out", *arguments, *(["--resume"] if stops else [])) == 130:
            stops += 1
            assert stops < 60
    assert stops >= 4
    assert snapshot(tmp_path / "out") == snapshot(outputs["model"])
