"""Experts at 16 bits beside others at 2 and 4, from converting to predictions: the source's own where everything has 16;
resident, reduced, exchanged and streamed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import (
    RuntimeConfig,
    convert,
    edit_weights,
    folder_nbytes,
    headers,
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
from mlxmoe.bench.report import bytes_by_class, describe
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.convert.changes import divergence
from mlxmoe.convert.source import Source
from mlxmoe.elastic import ElasticMemory
from mlxmoe.experts import ExpertLayer, KernelExperts
from mlxmoe.kernels import ReferenceKernels
from mlxmoe.loading import Loaded
from mlxmoe.models import named_arrays
from mlxmoe.prepared import expert_layers, full_memory, smallest_memory

pytestmark = pytest.mark.usefixtures("limits", "short_windows")

CONTEXT = 128
PROMPT = mx.array([[5 + i * 7 % 250 for i in range(70)]])
CLASSES = ("embedding", "head", "attention", "shared", "dense")
ALL_16 = [f"--bits={name}=16" for name in CLASSES]
KERNELS = pytest.mark.parametrize("kernels", [None, ReferenceKernels()], ids=["built-ins", "kernels"])
Kernels = ReferenceKernels | None


def write_source(folder: Path, growth: float, **changes: int) -> Path:
    """A model whose experts grow from each to the next: who is larger has more to lose."""
    dims = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    write_qwen3(folder, **dims, **changes)

    def scale(weights: dict[str, mx.array]) -> None:
        for name, array in weights.items():
            if ".experts." in name:
                weights[name] = array * growth ** int(name.split(".experts.")[1].split(".")[0])

    edit_weights(folder, scale)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("wide") / "source", 1.15, num_experts=24, num_experts_per_tok=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For calibration, which takes its time."""
    return write_source(tmp_path_factory.mktemp("small") / "source", 2.5, num_experts=4, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def mixed(source: Path) -> Path:
    folder = source.parent / "mixed"
    assert convert(source, folder, "--bpw", "11", "--expert-bits", "2,4,16") == 0
    return folder


def log_probabilities(source: Path) -> mx.array:
    logits = open_model(source, RuntimeConfig(1 << 30, CONTEXT)).model(PROMPT).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def expert_stack(source: Path, path: str, projection: str) -> np.ndarray:
    tensors = Source(open_checkpoint(source), 128).tensors()
    return np.array(tensors[f"{path}.{projection}.weight"].astype(mx.float32))


# Converting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_everything_at_16_bits_predicts_what_the_source_does(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a float32 source, whose trunk is kept as it is; what is left is the rounding of the experts."""
    write_architecture(tmp_path / "source", case, mx.float32)
    assert convert(tmp_path / "source", tmp_path / "out", "--size", "100MB", *ALL_16) == 0
    assert "every tensor is at its widest" in capsys.readouterr().err
    plan = load_plan(tmp_path / "out")
    assert set(plan.level_histogram()) == {16}
    assert plan.expected_loss < 1e-8
    assert {(entry.bits, entry.group_size, entry.error) for entry in plan.trunk.values()} == {(16, 0, 0.0)}
    before, after = log_probabilities(tmp_path / "source"), log_probabilities(tmp_path / "out")
    assert 0 < divergence(before, after).mean().item() < 1e-6


def test_2_4_and_16_bits_in_one_layer(source: Path, mixed: Path) -> None:
    """By a reader that shares nothing with the package, at every level that can be read."""
    plan = load_plan(mixed)
    assert any({2, 4, 16} <= {level for entry in layer.experts for level in entry.levels} for layer in plan.layers)
    assert plan.version == 3
    for layer in plan.layers:
        for p, shape in enumerate(layer.projections):
            stack = expert_stack(source, layer.path, shape.name)
            for e, entry in enumerate(layer.experts):
                levels = [level for level in (2, 3, 4, 6, 8, 10, 12, 14, 16) if level <= entry.levels[p]]
                for level, stated in zip(levels, entry.errors[p], strict=True):
                    left = stored_matrix(mixed, layer, e, p, level) - stack[e]
                    # gains have four digits in the file, so one near 1 is off by up to 5e-4
                    assert (left**2).sum() / (stack[e] ** 2).sum() == pytest.approx(stated, rel=2e-3, abs=3e-7)
                if entry.levels[p] == 16:
                    assert entry.errors[p][-1] < 1e-8


def test_16_bits_are_among_the_defaults(source: Path, tmp_path: Path) -> None:
    """Where 8 bits leave bytes over, and not before."""
    for bpw, levels in (("6", {2, 3, 4, 6, 8}), ("22", {8, 16})):
        assert convert(source, tmp_path / bpw, "--bpw", bpw) == 0
        assert set(load_plan(tmp_path / bpw).level_histogram()) <= levels
    assert 16 in load_plan(tmp_path / "22").level_histogram()
    assert {entry.bits for entry in load_plan(tmp_path / "22").trunk.values()} == {8}


def test_trunk_tensors_as_the_source_has_them(source: Path, tmp_path: Path) -> None:
    """Bit for bit, without a word of them in the quantization that MLX is told of; the other classes keep their rules."""
    assert convert(source, tmp_path / "out", "--bpw", "10", "--bits", "attention=16") == 0
    plan = load_plan(tmp_path / "out")
    widths = {name: entry.bits for name, entry in plan.trunk.items()}
    assert {bits for name, bits in widths.items() if "self_attn" in name} == {16}
    assert {bits for name, bits in widths.items() if "self_attn" not in name} <= {6, 8}
    written, wanted = (dict(mx.load(str(next(f.glob("model*.safetensors"))))) for f in (tmp_path / "out", source))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in (name for name, bits in widths.items() if bits == 16):
        assert written[name].dtype == mx.bfloat16
        assert mx.array_equal(written[name], wanted[name])
        assert name.removesuffix(".weight") not in config["quantization"]
    assert bytes_by_class(open_checkpoint(tmp_path / "out"), plan)["attention"] == sum(
        written[name].nbytes for name, bits in widths.items() if bits == 16
    )
    assert np.isfinite(np.array(open_model(tmp_path / "out").model(PROMPT))).all()


def test_a_range_up_to_16_takes_it_where_bytes_are_left(source: Path, tmp_path: Path) -> None:
    for bpw, wanted in (("4.6", {8}), ("30", {16})):
        assert convert(source, tmp_path / bpw, "--bpw", bpw, "--bits", "attention=8-16") == 0
        plan = load_plan(tmp_path / bpw)
        assert {entry.bits for name, entry in plan.trunk.items() if "self_attn" in name} == wanted
        assert {entry.bits for name, entry in plan.trunk.items() if "self_attn" not in name} <= {3, 4, 5, 6, 8}
        assert folder_nbytes(tmp_path / bpw) <= float(bpw) * plan.num_parameters / 8


def test_what_people_are_told(mixed: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(mixed)]) == 0
    assert "% at 16 bit" in capsys.readouterr().out
    described = describe(open_checkpoint(mixed), load_plan(mixed))
    assert 16 in {level for layer in described["layers"] for row in layer["levels"] for level in row}
    assert convert(source, tmp_path / "out", "--bpw", "22", "--bits", "head=16", "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    assert "% at 16 bit" in captured.err
    foretold = json.loads(captured.out.splitlines()[-1])
    assert convert(source, tmp_path / "out", "--bpw", "22", "--bits", "head=16", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == foretold["bytes"]
    assert folder_nbytes(tmp_path / "out") == foretold["bytes"]


def test_a_stopped_conversion_goes_on(
    source: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxmoe.convert import job

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["--bpw", "11", "--expert-bits", "2,4,16"]
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_shard", stopped)
        convert(source, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", *arguments, "--resume") == 0
    assert snapshot(tmp_path / "out") == snapshot(mixed)


# By calibration text --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(small: Path, short_windows: None) -> list[str]:
    """Arguments of a conversion by text."""
    text = write_words(small.parent / "text.txt", 800)
    return ["--calibration", str(text), "--calibration-tokens", "512", "--bits", "attention=16"]


@pytest.mark.parametrize(
    "settings",
    [
        ["--nested", "0.5", "--polish", "none", "--rotation", "none"],
        ["--polish", "layer", "--rotation", "none"],
        ["--method", "awq", "--polish", "none"],
        ["--rotation", "randomised-hadamard", "--replicas", "sensitivity:0.4", "--combine", "learned"],
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                ["--polish", "factors", "--router", "topk-mse", "--rotation", "none"],
                ["--polish", "model", "--refine", "1", "--rotation", "none"],
                ["--rotation", "block-hadamard-64", "--allocation", "uniform"],
                ["--allocation", "benefit", "--sensitivity", "mix"],
            )
        ),
    ],
    ids=" ".join,
)
def test_calibrated_conversions(settings: list[str], small: Path, calibrated: list[str], tmp_path: Path) -> None:
    """Codes at 16 bits are those of rounding, whatever else is done: their scales stay as they are, and the source comes
    back; and attention is the source's, bit for bit."""
    arguments = ["--bpw", "17", "--expert-bits", "2,16", *calibrated, *settings]
    assert convert(small, tmp_path / "out", *arguments) == 0
    plan = load_plan(tmp_path / "out")
    assert {2, 16} <= set(plan.level_histogram())
    wanted = Source(open_checkpoint(small), 128).tensors()
    plain = "awq" not in settings  # which scales rows of up where it scales columns of down
    for layer in plan.layers:
        for e, entry in enumerate(layer.experts):
            for p, (shape, level) in enumerate(zip(layer.projections, entry.levels, strict=True)):
                if level != 16:
                    continue
                assert entry.errors[p][-1] < 1e-7
                assert set(entry.gains[p][5:]) == {1.0}
                rule = layer.rotations.hidden if shape.name.startswith("down_proj") else layer.rotations.inputs
                if rule.name == "none" and (plain or shape.name != "up_proj"):
                    weight = np.array(wanted[f"{layer.path}.{shape.name}.weight"][e].astype(mx.float32))
                    left = stored_matrix(tmp_path / "out", layer, e, p, 16) - weight
                    assert np.abs(left).max() <= np.abs(weight).max() * 2.0**-15
    written = dict(mx.load(str(tmp_path / "out" / "model.safetensors")))
    kept = [name for name, entry in plan.trunk.items() if entry.tensor_class == "attention"]
    assert kept
    assert all(mx.array_equal(written[name], wanted[name]) for name in kept)
    assert np.isfinite(np.array(open_model(tmp_path / "out").model(PROMPT))).all()


def test_nothing_is_expected_to_be_lost_at_16_bits(small: Path, calibrated: list[str], tmp_path: Path) -> None:
    """By text: trunk and experts at 16 bits cost nothing by the losses, and hardly anything by the predictions."""
    others = [f"--bits={name}=16" for name in CLASSES if name != "attention"]
    assert convert(small, tmp_path / "out", "--bpw", "32", *calibrated, *others) == 0
    plan = load_plan(tmp_path / "out")
    assert set(plan.level_histogram()) == {16}
    assert plan.expected_loss < 1e-6
    assert divergence(log_probabilities(small), log_probabilities(tmp_path / "out")).mean().item() < 1e-6


# Running --------------------------------------------------------------------------------------------------------------


def opened(folder: Path, share: float, kernels: Kernels, **settings: Any) -> tuple[Loaded, ElasticMemory]:
    """A model `share` of the way from base planes to everything that is written."""
    config = RuntimeConfig(None, CONTEXT, kernels=kernels, **settings)
    prepared = prepare(folder, config)
    least, full = smallest_memory(prepared), full_memory(prepared)
    loaded = open_model(folder, replace(config, memory=int(least + share * (full - least))))
    assert loaded.elastic is not None
    return loaded, loaded.elastic


def layers_of(loaded: Loaded) -> list[ExpertLayer | KernelExperts]:
    found = {path: m for path, m in loaded.model.named_modules() if isinstance(m, ExpertLayer | KernelExperts)}
    return [found[path] for path in sorted(found)]


@KERNELS
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_bytes_that_are_counted_are_held(mixed: Path, kernels: Kernels, share: float) -> None:
    """Of the arrays that products read; the kernels' tables are counted with the trunk."""
    loaded, elastic = opened(mixed, share, kernels)
    held = sum(layer.nbytes for layer in layers_of(loaded))
    tables = sum(b.table.nbytes for m in layers_of(loaded) if isinstance(m, KernelExperts) for b in m.banks[:3] if b)  # type: ignore[union-attr]
    assert held - tables == elastic.nbytes == loaded.report.nbytes_experts
    if share in (0.0, 1.0):
        assert set(elastic.residency.histogram()) == ({2} if share == 0.0 else {2, 4, 16})


def test_more_memory_widens_every_layer_to_two_fields(mixed: Path) -> None:
    """And changes no bit."""
    narrow, elastic = opened(mixed, 1.0, None)
    assert {width for row in elastic.residency.widths for width in row} == {0}
    wide = open_model(mixed, RuntimeConfig(1 << 30, CONTEXT))
    assert wide.elastic is not None
    assert {width for row in wide.elastic.residency.widths for width in row} == {16}
    assert wide.elastic.nbytes > elastic.nbytes
    assert wide.elastic.nbytes == sum(layer.nbytes for layer in layers_of(wide))
    assert bool(mx.array_equal(narrow.model(PROMPT), wide.model(PROMPT)).item())


@KERNELS
def test_a_layer_computes_with_the_matrices_of_the_file(mixed: Path, kernels: Kernels) -> None:
    """Reduced, after exchanges between 2 and 16 bits, and with all that is written: against the definition of the format."""
    for share, adapt in ((1.0, False), (0.4, True)):
        loaded, elastic = opened(mixed, share, kernels, adapt=adapt)
        rng = np.random.default_rng(0)
        for _ in range(3 if adapt else 0):
            for layer in layers_of(loaded):
                hot = rng.choice(24, 6, replace=False)
                for _ in range(40):
                    layer(mx.zeros((1, 64)), mx.array(rng.choice(hot, (1, 4))))
            assert elastic.adapt() > 0
        for i, (plan, module) in enumerate(zip(load_plan(mixed).layers, layers_of(loaded), strict=True)):
            x = mx.array(rng.standard_normal((24, 64)).astype(np.float32))
            found = np.array(module(x, mx.arange(24)[:, None]))[:, 0]
            for e, levels in enumerate(elastic.residency.levels[i]):
                gate, up, down = (stored_matrix(mixed, plan, e, p, level) for p, level in enumerate(levels))
                activated = gate @ np.array(x[e])
                hidden = activated / (1 + np.exp(-activated)) * (up @ np.array(x[e]))
                wanted = down @ hidden
                np.testing.assert_allclose(found[e], wanted, atol=2e-5 * np.abs(down).max() * np.abs(hidden).sum())


@KERNELS
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_streamed_logits_are_the_resident_models(mixed: Path, kernels: Kernels, share: float) -> None:
    config = RuntimeConfig(None, CONTEXT, kernels=kernels, threads=3, direct=False)
    prepared = prepare(mixed, config)
    memory = prepared.streaming(0).least_memory + int(share * sum(shape.total for shape in prepared.streamed_shapes))
    loaded = loading._open_streamed(prepared, memory, config)
    resident = open_model(mixed, RuntimeConfig(1 << 30, CONTEXT, kernels=kernels))
    assert sum(shape.total for shape in prepared.streamed_shapes) == sum(
        prepared.storage.nbytes(shape, level)
        for layer in load_plan(mixed).layers
        for entry in layer.experts
        for shape, level in zip(layer.projections, entry.levels, strict=True)
    )
    for tokens in (PROMPT, PROMPT[:, :1], PROMPT[:, 30:33]):
        assert bool(mx.array_equal(loaded.model(tokens), resident.model(tokens)).item())
    assert loaded.experts is not None
    loaded.experts.check()
    loaded.experts.close()


def test_the_trunk_as_it_is_counts_what_it_takes(source: Path, tmp_path: Path) -> None:
    """In memory it has the activations' type, as everything else."""
    assert convert(source, tmp_path / "out", "--bpw", "12", *ALL_16) == 0
    loaded = open_model(tmp_path / "out")
    prefixes = tuple(f"{path}." for path in expert_layers(loaded.model))
    held = {n: a.nbytes for n, a in named_arrays(loaded.model.parameters()).items() if not n.startswith(prefixes)}
    assert prepare(tmp_path / "out").nbytes_trunk == sum(held.values())
    assert len(held) == len(headers(tmp_path / "out"))
