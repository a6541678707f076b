"""What the converter writes: its size, its bytes, its contents against the source, for every kind of source."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert as mlx_lm_convert
from safetensors import safe_open
from safetensors.numpy import load_file
from toy_checkpoints import (
    convert,
    folder_nbytes,
    headers,
    load_plan,
    snapshot,
    stored_matrix,
    write_architecture,
    write_qwen3,
)

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.source import Source
from mlxmoe.store import ExpertStore, layer_records, read_header
from mlxmoe.units import parse_size

ARCHITECTURES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("convert") / "source")


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """Experts of one layer at several levels, all trunk classes quantized."""
    output = source.parent / "converted"
    assert convert(source, output, "--bpw", "5") == 0
    return output


def expert_stack(source: Path, path: str, projection: str) -> np.ndarray:
    """float32 [E, N, K] of one projection of the source."""
    tensors = Source(open_checkpoint(source), 128).tensors()
    return np.array(tensors[f"{path}.{projection}.weight"].astype(mx.float32))


# Size -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [f"{n}kB" for n in (498, 575, 837, 1234, 1580)] + ["0.7MB", "800KiB", "999999B"])
def test_folder_is_within_one_percent_below_the_size(size: str, source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out", "--size", size) == 0
    assert 0.99 * parse_size(size) <= folder_nbytes(tmp_path / "out") <= parse_size(size)


@pytest.mark.parametrize("bpw", [3, 4.25, 8.1])
def test_bits_per_weight_count_all_files(bpw: float, source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out", "--bpw", str(bpw)) == 0
    parameters = (
        320 * 128 * 2 + 128 + 3 * (2 * 128 + 2 * 16 + 2 * 64 * 128 + 2 * 32 * 128 + 8 * 128 + 8 * 3 * 128 * 128)
    )
    assert load_plan(tmp_path / "out").num_parameters == parameters
    assert 0.99 * bpw <= 8 * folder_nbytes(tmp_path / "out") / parameters <= bpw


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_no_folder_is_larger_than_asked(case: str, tmp_path: Path) -> None:
    """Records of so small experts come in steps of a page, which is more than a percent of the whole."""
    source = write_architecture(tmp_path / "source", case)
    for bpw in ("6.5", "7"):
        assert convert(source, tmp_path / bpw, "--bpw", bpw) == 0
        share = 8 * folder_nbytes(tmp_path / bpw) / (float(bpw) * load_plan(tmp_path / bpw).num_parameters)
        assert 0.98 < share <= 1


@pytest.mark.parametrize("arguments", [["--size", "600kB"], ["--bpw", "16", "--bits", "head=4"]])
def test_dry_run_tells_the_bytes_and_leaves_nothing(
    arguments: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out", *arguments, "--dry-run", "--json") == 0
    assert not list(tmp_path.iterdir())
    foretold = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert convert(source, tmp_path / "out", *arguments, "--json") == 0
    written = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert foretold["bytes"] == written["bytes"] == folder_nbytes(tmp_path / "out")
    assert foretold["expected_loss"] == pytest.approx(written["expected_loss"], rel=1e-3)
    assert (foretold["dry_run"], written["dry_run"]) == (True, False)
    assert foretold["bytes_by_class"] == written["bytes_by_class"]
    assert sum(written["bytes_by_class"].values()) == written["bytes"]


def test_dry_run_says_what_it_would_do(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "out", "--size", "600kB", "--dry-run") == 0
    captured = capsys.readouterr()
    assert captured.out == "would write 600 kB\n"
    assert "3 layers of 8 experts" in captured.err


def trunk_bits(folder: Path) -> dict[str, set[int]]:
    """Class -> the widths of its tensors."""
    bits: dict[str, set[int]] = {}
    for entry in load_plan(folder).trunk.values():
        bits.setdefault(entry.tensor_class, set()).add(entry.bits)
    return bits


def test_trunk_takes_part_where_the_size_demands_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "below what 6 to 8 bit outside the experts needs"
    assert convert(source, tmp_path / "small", "--size", "500kB") == 0
    assert note in capsys.readouterr().err
    assert min(min(bits) for bits in trunk_bits(tmp_path / "small").values()) < 6
    assert convert(source, tmp_path / "large", "--size", "700kB") == 0
    assert note not in capsys.readouterr().err
    assert all(bits <= {6, 8} for bits in trunk_bits(tmp_path / "large").values())


def test_pinned_widths_are_kept(source: Path, tmp_path: Path) -> None:
    pins = ("--bits", "embedding=3", "--bits", "attention=4-5", "--bits", "head=8", "--expert-bits", "3,6")
    assert convert(source, tmp_path / "out", "--bpw", "6", *pins) == 0
    bits = trunk_bits(tmp_path / "out")
    assert bits["embedding"] == {3}
    assert bits["attention"] <= {4, 5}
    assert bits["head"] == {8}
    assert set(load_plan(tmp_path / "out").level_histogram()) == {3, 6}


def test_more_bytes_than_the_model_can_use(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "out", "--bpw", "18") == 0
    assert "every tensor is at its widest: the folder takes" in capsys.readouterr().err
    assert set(load_plan(tmp_path / "out").level_histogram()) == {16}
    assert set().union(*trunk_bits(tmp_path / "out").values()) == {8}
    # just below what everything takes, it is nearly used up
    most = folder_nbytes(tmp_path / "out")
    for less in (1, 3000):
        assert convert(source, tmp_path / f"less{less}", "--size", f"{most - less}B") == 0
        assert folder_nbytes(tmp_path / f"less{less}") >= 0.99 * (most - less)


def test_more_bytes_cost_less(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for size in (500, 520, 600, 800, 1100, 1500):
        assert convert(source, tmp_path / "out", "--size", f"{size}kB", "--dry-run", "--json") == 0
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["expected_loss"])
    assert losses == sorted(set(losses), reverse=True)


# Files ----------------------------------------------------------------------------------------------------------------


def test_plan_describes_every_file(converted: Path) -> None:
    plan = load_plan(converted)
    assert {path.name for path in converted.iterdir()} == {*plan.files, "plan.json"}
    for name, entry in plan.files.items():
        data = (converted / name).read_bytes()
        assert (entry.nbytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest()), name


def test_conversion_is_deterministic(source: Path, converted: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "again", "--bpw", "5") == 0
    assert snapshot(tmp_path / "again") == snapshot(converted)


def test_config_keeps_the_settings_of_the_source(source: Path, converted: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, converted))
    quantization = after.pop("quantization")
    assert after == before
    widths = {name.removesuffix(".weight"): (e.bits, e.group_size) for name, e in load_plan(converted).trunk.items()}
    assert {n: (q["bits"], q["group_size"]) for n, q in quantization.items() if isinstance(q, dict)} == widths


def test_side_files_come_along(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").write_text("do as you like\n")
    (source / "notes.py").write_text("raise SystemExit\n")
    try:
        assert convert(source, tmp_path / "out", "--bpw", "5") == 0
    finally:
        (source / "LICENSE").unlink()
        (source / "notes.py").unlink()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE", "config.json", "plan.json"} <= names
    assert not names & {"notes.py", "model.safetensors.index.json", "state"}
    assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like\n"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((source / name).read_text())


def test_records_are_pages(converted: Path) -> None:
    """The data of an experts file starts on a page, and every record is whole pages: one aligned read each."""
    for layer in load_plan(converted).layers:
        path = converted / layer.file
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert (8 + length) % 4096 == 0
        tensors = read_header(path)
        assert [name for _, _, name, _ in layer_records(layer)] == list(tensors)
        assert all(info.offset % 4096 == 0 and info.nbytes % 4096 == 0 for info in tensors.values())
        assert path.stat().st_size % 4096 == 0


def test_plain_safetensors_reads_the_records(converted: Path) -> None:
    plan = load_plan(converted)
    with ExpertStore(converted, plan.layers) as store:
        for layer in plan.layers:
            arrays = load_file(converted / layer.file)
            with safe_open(converted / layer.file, "numpy") as opened:
                assert set(opened.keys()) == set(arrays)
            for e, plane, name, _ in layer_records(layer):
                assert arrays[name].dtype == np.uint8
                np.testing.assert_array_equal(arrays[name], store.read(layer.layer, e, plane))


# Weights --------------------------------------------------------------------------------------------------------------


def bytes_of(folder: Path, name: str) -> tuple[str, tuple[int, ...], bytes]:
    """dtype, shape and raw bytes of a tensor of any safetensors file of the folder."""
    for path in sorted(folder.glob("model*.safetensors")):
        info = read_header(path).get(name)
        if info is not None:
            with open(path, "rb") as file:
                file.seek(info.offset)
                return info.dtype, info.shape, file.read(info.nbytes)
    raise AssertionError(f"no tensor {name}")


def test_router_and_norms_are_bit_exact(source: Path, converted: Path) -> None:
    kept = [n for n in headers(converted) if n.endswith(("norm.weight", "layernorm.weight", ".mlp.gate.weight"))]
    assert len(kept) == 3 * 5 + 1
    for name in kept:
        assert bytes_of(converted, name) == bytes_of(source, name)


def test_experts_of_one_layer_have_their_own_levels(converted: Path) -> None:
    levels = [{expert.levels for expert in layer.experts} for layer in load_plan(converted).layers]
    assert any(len(kinds) > 1 for kinds in levels)


# Relative squared error of normal weights at a level, with a clip search, and twice that: who loses a bit sees it
TOLERANCE = {2: 0.13, 3: 0.04, 4: 0.012, 6: 0.0012, 8: 0.0001}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_stored_experts_are_those_of_the_source(case: str, tmp_path: Path) -> None:
    """By a reader that shares nothing with the package: errors as small as the level allows, and as the plan says."""
    source = write_architecture(tmp_path / "source", case)
    assert convert(source, tmp_path / "out", "--bpw", "9", "--expert-bits", "2,3,4,6") == 0
    plan = load_plan(tmp_path / "out")
    for layer in plan.layers:
        for p, shape in enumerate(layer.projections):
            stack = expert_stack(source, layer.path, shape.name)
            for e, expert in enumerate(layer.experts):
                for i, level in enumerate(level for level in (2, 3, 4, 6, 8) if level <= expert.levels[p]):
                    difference = stored_matrix(tmp_path / "out", layer, e, p, level) - stack[e]
                    error = float((difference**2).sum() / (stack[e] ** 2).sum())
                    assert error == pytest.approx(expert.errors[p][i], rel=2e-3)
                    assert error < TOLERANCE[level]


def test_trunk_is_read_by_mlx(source: Path, converted: Path) -> None:
    """Quantized trunk tensors through mx.dequantize: close to the source, and as close as the plan says."""
    arrays = dict(mx.load(str(converted / "model.safetensors")))
    wanted = Source(open_checkpoint(source), 128).tensors()
    for name, entry in load_plan(converted).trunk.items():
        path = name.removesuffix(".weight")
        got = mx.dequantize(
            arrays[name],
            arrays[f"{path}.scales"],
            arrays[f"{path}.biases"],
            group_size=entry.group_size,
            bits=entry.bits,
        )
        original = wanted[name].astype(mx.float32)
        error = (mx.square(got.astype(mx.float32) - original).sum() / mx.square(original).sum()).item()
        assert error == pytest.approx(entry.error, rel=1e-2), name
        assert error < 0.002


# Other sources --------------------------------------------------------------------------------------------------------


def test_expert_biases_are_kept(tmp_path: Path) -> None:
    source = write_architecture(tmp_path / "source", "gpt_oss")
    assert convert(source, tmp_path / "out", "--bpw", "6") == 0
    biases = [name for name in headers(source) if ".experts." in name and name.endswith("_proj.bias")]
    assert len(biases) == 9
    for name in biases:
        assert bytes_of(tmp_path / "out", name) == bytes_of(source, name)
    sinks = [name for name in headers(source) if name.endswith("sinks")]
    assert sinks
    assert all(bytes_of(tmp_path / "out", name) == bytes_of(source, name) for name in sinks)


@pytest.mark.parametrize(("dtype", "code"), [(mx.float16, "F16"), (mx.float32, "F32"), (mx.bfloat16, "BF16")])
def test_sources_of_other_precision(dtype: mx.Dtype, code: str, tmp_path: Path) -> None:
    source = write_architecture(tmp_path / "source", "qwen3_moe", dtype)
    assert convert(source, tmp_path / "out", "--bpw", "9") == 0
    found = headers(tmp_path / "out")
    assert found["model.norm.weight"].dtype == code
    assert bytes_of(tmp_path / "out", "model.norm.weight") == bytes_of(source, "model.norm.weight")
    plan = load_plan(tmp_path / "out")
    stack = expert_stack(source, plan.layers[0].path, "up_proj")
    difference = stored_matrix(tmp_path / "out", plan.layers[0], 0, 1, plan.layers[0].experts[0].levels[1]) - stack[0]
    assert (difference**2).sum() < 0.13 * (stack[0] ** 2).sum()


def test_switch_mlp(tmp_path: Path) -> None:
    source = write_architecture(tmp_path / "source", "nemotron_h")
    assert convert(source, tmp_path / "out", "--bpw", "6") == 0
    layers = load_plan(tmp_path / "out").layers
    assert [(layer.kind, [shape.name for shape in layer.projections]) for layer in layers] == [
        ("mlp", ["fc1", "fc2"])
    ] * 2


def test_stock_quantized_source_is_dequantized(tmp_path: Path) -> None:
    source = write_qwen3(tmp_path / "source")
    mlx_lm_convert(str(source), str(tmp_path / "stock"), quantize=True, q_bits=8, q_group_size=64)
    assert "quantization" in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert convert(tmp_path / "stock", tmp_path / "out", "--bpw", "6") == 0
    plan = load_plan(tmp_path / "out")
    layer = plan.layers[1]
    stack = expert_stack(source, layer.path, "down_proj")
    for e, expert in enumerate(layer.experts):
        difference = stored_matrix(tmp_path / "out", layer, e, 2, expert.levels[2]) - stack[e]
        assert (difference**2).sum() < TOLERANCE[expert.levels[2]] * (stack[e] ** 2).sum()
    quantization: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert not any("switch_mlp" in name for name in quantization)


def test_trained_model(tiny_model: Path, tmp_path: Path) -> None:
    """Hugging Face's names of deepseek_v3, with shared experts and a selection bias."""
    assert convert(tiny_model, tmp_path / "out", "--size", "9MB") == 0
    assert 8_910_000 <= folder_nbytes(tmp_path / "out") <= 9_000_000
    biases = [name for name in headers(tiny_model) if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        assert bytes_of(tmp_path / "out", name) == bytes_of(tiny_model, name)
    assert len({expert.levels for layer in load_plan(tmp_path / "out").layers for expert in layer.experts}) > 2
