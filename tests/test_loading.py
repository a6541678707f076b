"""Loading: the same logits as a stock model with our weights, every kind of source, and folders that are damaged."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm import stream_generate
from mlx_lm.convert import convert as mlx_lm_convert
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from toy_checkpoints import (
    RuntimeConfig,
    choose_residency,
    convert,
    edit_config,
    flip_bit,
    load,
    load_plan,
    open_model,
    prepare,
    stored_matrix,
    write_architecture,
    write_qwen3,
)

from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.experts import PlaneLinear
from mlxmoe.models import model_classes
from mlxmoe.residency import Residency, Storage, solve_residency
from mlxmoe.store import read_header

pytestmark = pytest.mark.usefixtures("limits")

TOLERANCE = 1e-4  # float32 on both sides, logits of order 1: products of codes and scales against products of weights
ARCHITECTURES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")
IDS = [3 + i * 11 % 250 for i in range(90)]  # more than 64 pairs: the experts are touched in order


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Architecture -> source and converted folder, experts at every level."""
    base = tmp_path_factory.mktemp("load")
    result = {}
    for case in ARCHITECTURES:
        source = write_architecture(base / case, case, max_position_embeddings=512)
        assert convert(source, base / f"{case}-converted", "--bpw", "9") == 0
        result[case] = source, base / f"{case}-converted"
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("source") / "source", num_hidden_layers=2)


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """Damaged only in copies."""
    output = source.parent / "converted"
    assert convert(source, output, "--bpw", "5") == 0
    return output


def in_float32(model: nn.Module) -> nn.Module:
    model.update(
        tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    )
    return model


def stock_with_our_weights(source: Path, converted: Path, residency: Residency) -> nn.Module:
    """mlx-lm's model of the source in float32, every weight replaced by what the converted folder stands for."""
    model, _ = load_model(source, get_model_classes=model_classes)
    plan = load_plan(converted)
    arrays = dict(mx.load(str(converted / "model.safetensors")))
    packed = {f"{n.removesuffix('.weight')}.{part}" for n in plan.trunk for part in ("weight", "scales", "biases")}
    weights = {name: array.astype(mx.float32) for name, array in arrays.items() if name not in packed}
    for name, entry in plan.trunk.items():
        path = name.removesuffix(".weight")
        scales, biases = arrays[f"{path}.scales"].astype(mx.float32), arrays[f"{path}.biases"].astype(mx.float32)
        weights[name] = mx.dequantize(arrays[name], scales, biases, group_size=entry.group_size, bits=entry.bits)
    for layer, levels in zip(plan.layers, residency.levels, strict=True):
        for p, shape in enumerate(layer.projections):
            stack = [stored_matrix(converted, layer, e, p, levels[e][p]) for e in range(len(layer.experts))]
            weights[f"{layer.path}.{shape.name}.weight"] = mx.array(np.stack(stack))
    model.load_weights(list(weights.items()), strict=True)
    return in_float32(model)


def logits(model: nn.Module) -> np.ndarray:
    """Of a prefill and of three tokens decoded behind it, [4, vocabulary]."""
    cache = make_prompt_cache(model)
    steps = [model(mx.array([IDS]), cache=cache)[0, -1]]
    steps += [model(mx.array([[token]]), cache=cache)[0, -1] for token in (7, 8, 9)]
    return np.array(mx.stack(steps))


# Logits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widen", [True, False], ids=["one width", "buckets"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["bases", "some", "all"])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_logits_are_those_of_the_stored_weights(
    case: str,
    share: float,
    widen: bool,
    folders: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, converted = folders[case]
    loader = sys.modules["mlxmoe.prepared"]

    def solve(plan: Any, budget: int | None, storage: Storage, _: bool) -> Residency:
        return solve_residency(plan, budget, storage, widen)

    monkeypatch.setattr(loader, "solve_residency", solve)
    prepared = prepare(converted, RuntimeConfig(context=128))
    least = prepared.nbytes_least + prepared.reserve(0).nbytes
    most = choose_residency(prepared, 1 << 40).nbytes - choose_residency(prepared, least).nbytes
    memory = least + int(share * most) if share < 1 else 1 << 30
    loaded = open_model(converted, RuntimeConfig(memory, 128))
    assert loaded.report.mode == ("resident" if share == 1 else "elastic")
    buckets = [len(m._held.products) for _, m in loaded.model.named_modules() if isinstance(m, PlaneLinear)]
    if widen and share == 1:
        assert set(buckets) == {1}
    if not widen and share == 0.5:
        assert max(buckets) > 1
    stock = stock_with_our_weights(source, converted, choose_residency(prepared, memory))
    assert np.abs(logits(loaded.model) - logits(stock)).max() < TOLERANCE


def test_fidelity_grows_with_the_bits(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Against the source itself."""
    source, _ = folders["qwen3_moe"]
    original = logits(open_model(source, RuntimeConfig(1 << 30, 128)).model)
    errors = []
    for bits in ("2", "3", "4", "6", "8"):
        assert convert(source, tmp_path / bits, "--bpw", "20", "--expert-bits", bits) == 0
        errors.append(np.abs(logits(load(tmp_path / bits)[0]) - original).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


# Sources that are not converted ---------------------------------------------------------------------------------------


def test_hugging_face_folder(source: Path) -> None:
    loaded = open_model(source, RuntimeConfig(1 << 30, 128))
    stock = in_float32(load_model(source)[0])
    assert np.abs(logits(loaded.model) - logits(stock)).max() < TOLERANCE
    assert (loaded.report.kind, loaded.report.mode, loaded.report.levels) == ("huggingface", "resident", {})
    assert len(loaded.report.lines()) == 1


def test_stock_quantized_checkpoint(source: Path, tmp_path: Path) -> None:
    mlx_lm_convert(str(source), str(tmp_path / "stock"), quantize=True, q_bits=4, q_group_size=64)
    loaded = open_model(tmp_path / "stock", RuntimeConfig(1 << 30, 128))
    assert loaded.report.kind == "mlx"
    stock = in_float32(load_model(tmp_path / "stock")[0])
    assert np.abs(logits(loaded.model) - logits(stock)).max() < TOLERANCE


@pytest.mark.parametrize("kind", ["converted", "source"])
def test_stream_generate_as_it_is(kind: str, source: Path, converted: Path) -> None:
    import mlxmoe

    model, tokenizer = mlxmoe.load(converted if kind == "converted" else source, memory="1GB", context=128)
    parts = list(stream_generate(model, tokenizer, "Once upon a time", max_tokens=12))
    assert 1 <= len(parts) <= 12
    assert parts[-1].finish_reason in ("length", "stop")
    again = list(stream_generate(model, tokenizer, "Once upon a time", max_tokens=12))
    assert [part.token for part in again] == [part.token for part in parts]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert tokenizer.decode(ids).startswith("<|im_start|>user\nHi<|im_end|>")


def test_converted_folder_beside_its_source(source: Path, converted: Path, tmp_path: Path) -> None:
    """A converted folder needs nothing of its source, wherever it lies."""
    folder = shutil.copytree(converted, tmp_path / "elsewhere")
    first, second = (logits(open_model(f, RuntimeConfig(1 << 30, 128)).model) for f in (converted, folder))
    np.testing.assert_array_equal(first, second)


# Damage ---------------------------------------------------------------------------------------------------------------


def _flip_record(folder: Path) -> None:
    """One bit of layer 1, expert 2, plane 0."""
    path = folder / load_plan(folder).layers[1].file
    flip_bit(path, read_header(path)["L1.E2.P0"].offset + 1000, 5)


def _drop_an_expert(plan: dict[str, Any]) -> None:
    layer = plan["layers"][0]
    layer["experts"].pop()
    layer["weights"] = [weight[:-1] if isinstance(weight, list) else weight for weight in layer["weights"]]


def _edit_plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        change(plan)
        (folder / "plan.json").write_text(json.dumps(plan))

    return edit


def _last_experts(folder: Path) -> Path:
    return folder / load_plan(folder).layers[-1].file


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit of a record": (_flip_record, "experts-00002.*layer 1, expert 2, plane 0 has a wrong checksum"),
    "experts truncated": (
        lambda f: os.truncate(_last_experts(f), 50_000),
        "experts-00002.* has 50000 bytes, its header",
    ),
    "experts missing": (lambda f: _last_experts(f).unlink(), "experts-00002-of-00002.safetensors is missing"),
    "experts swapped": (
        lambda f: shutil.copy(f / load_plan(f).layers[0].file, _last_experts(f)),
        "experts-00002.* has nothing for L1.E0.P0, the plan says",
    ),
    "experts that are no safetensors": (
        lambda f: _last_experts(f).write_bytes(b"x" * 5000),
        "is not a safetensors file",
    ),
    "bit of the trunk": (
        lambda f: flip_bit(f / "model.safetensors", -100),
        "model.safetensors is not what was written",
    ),
    "bit of the trunk's header": (
        lambda f: flip_bit(f / "model.safetensors", 9, 3),
        "model.safetensors has a damaged header",
    ),
    "trunk truncated": (lambda f: os.truncate(f / "model.safetensors", 9000), "model.safetensors has 9000 bytes"),
    "trunk missing": (lambda f: (f / "model.safetensors").unlink(), "has no model"),
    "plan of a newer version": (
        _edit_plan(lambda plan: plan.update(version=99)),
        "has format version 99, this mlxmoe reads",
    ),
    "plan of another program": (_edit_plan(lambda plan: plan.update(format="x")), "is not a plan of mlxmoe"),
    "plan without layers": (_edit_plan(lambda plan: plan.pop("layers")), "plan.json is damaged"),
    "plan truncated": (lambda f: os.truncate(f / "plan.json", 3000), "plan.json is not valid JSON"),
    "plan that is no text": (lambda f: (f / "plan.json").write_bytes(b"\xff\xfe"), "plan.json is not text"),
    "plan with fewer experts": (
        _edit_plan(_drop_an_expert),
        "the plan does not fit the model: model.layers.0.mlp.switch_mlp has 8 experts",
    ),
    "config changed": (lambda f: edit_config(f, rope_theta=5e5), "config.json is not what was written"),
    "config of another model": (
        lambda f: edit_config(f, model_type="olmoe"),
        "config.json is not what was written|does not fit the model|do not belong together",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing|no usable tokenizer"),
    "tokenizer damaged": (
        lambda f: (f / "tokenizer.json").write_text('{"model":'),
        "no usable tokenizer|tokenizer.json",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_converted_folder(
    what: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = DAMAGE[what]
    folder = shutil.copytree(converted, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=expected):
        load(folder, memory="1GB")
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "Hi", "--max-tokens", "2"]) == 2
    captured = capsys.readouterr()
    message, hint = captured.err.splitlines()[-2:]
    assert message.startswith("mlxmoe: error: ")
    assert hint.startswith("hint: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": 3}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_unconverted_folder_without_a_usable_tokenizer(name: str, text: str, source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="no usable tokenizer"):
        load(folder)


def test_unconverted_folder_without_tokenizer(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no usable tokenizer") as refused:
        load(folder)
    assert "tokenizer.json" in refused.value.hint


def test_unconverted_weights_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    edit_config(folder, hidden_size=64)
    with pytest.raises(UserError, match=r"config\.json"):
        load(folder)


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config"):
        load(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "nothing")
