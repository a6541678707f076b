"""The synthetic model for streaming: its files, that every loader takes it, and that its traffic is like a real model's."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from toy_checkpoints import RuntimeConfig, open_model

from mlxmoe.bench import streaming_model
from mlxmoe.bench.checkpoint import CheckpointShape
from mlxmoe.bench.streaming_model import (
    FORMS,
    Routed,
    Traffic,
    TrafficFacts,
    main,
    record_nbytes_of,
    routed,
    shape_of_experts,
    trunk_tensors,
    walk,
    write_streaming_model,
)
from mlxmoe.errors import UserError
from mlxmoe.formats import LEVELS, join_planes, unpack_codes
from mlxmoe.plan import Plan
from mlxmoe.store import ExpertStore, layer_file_nbytes, layer_header, record_parts

# Large enough for traffic, small enough for a second: E 256, A 8
SHAPE = replace(shape_of_experts(20_000_000), vocab_size=1024)
TINY = CheckpointShape(num_hidden_layers=2, hidden_size=128, moe_intermediate_size=64, vocab_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streaming") / "model"
    write_streaming_model(path, SHAPE)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_gives_the_same_bytes(form: str, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_streaming_model(tmp_path / name, TINY, form, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    weights = [name for name in a if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert all(a[name] != c[name] for name in weights)


@pytest.mark.parametrize("nbytes", [4_000_000_000, 10_000_000_000])
def test_shape_of_a_large_model(nbytes: int) -> None:
    shape = shape_of_experts(nbytes)
    total = shape.num_hidden_layers * shape.num_experts * record_nbytes_of(shape)
    assert nbytes <= total < 1.15 * nbytes
    assert 1 << 20 <= record_nbytes_of(shape) <= 6 << 20


def test_bytes_are_those_of_the_records(folder: Path) -> None:
    plan = Plan.load(folder)
    assert len(plan.layers) == SHAPE.num_hidden_layers
    for layer in plan.layers:
        records = SHAPE.num_experts * record_nbytes_of(SHAPE)
        assert (folder / layer.file).stat().st_size == layer_file_nbytes(layer) == len(layer_header(layer)) + records
    assert plan.nbytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != "plan.json")
    with ExpertStore(folder, plan.layers) as store:
        for expert in (0, 17, 255):
            store.read(1, expert, 2)  # checks its checksum


def test_the_errors_in_the_plan_are_those_of_the_codes(folder: Path) -> None:
    plan = Plan.load(folder)
    layer = plan.layers[0]
    errors = []
    with ExpertStore(folder, plan.layers) as store:
        for expert in range(8):
            planes = []
            for plane, width in enumerate((2, 1, 1)):
                part = record_parts(layer, layer.experts[expert], plane)[0]
                words = store.read(0, expert, plane)[: part.nbytes].view(np.uint32)
                planes.append(unpack_codes(mx.array(words.reshape(128, -1)), width, 512))
            full = join_planes(planes).astype(mx.float32) - 7.5
            for count, level in ((1, 2), (2, 3)):
                cut = (join_planes(planes[:count]).astype(mx.float32) - ((1 << level) - 1) / 2) * (1 << (4 - level))
                errors.append((level, float(mx.square(full - cut).sum() / mx.square(full).sum())))
    stated = dict(zip(LEVELS, layer.experts[0].errors[0], strict=False))
    assert stated[4] == 0
    for level, error in errors:
        assert error == pytest.approx(stated[level], rel=0.02)


def test_both_forms_load_and_stock_mlx_lm_agrees(tmp_path: Path) -> None:
    tokens = mx.array([walk(TINY, 5, 24)])
    for form in FORMS:
        write_streaming_model(tmp_path / form, TINY, form)
        loaded = open_model(tmp_path / form, RuntimeConfig(context=256))
        assert loaded.report.kind == form
        logits = loaded.model(tokens)
        assert mx.isfinite(logits).all()
    stock, _ = load_model(tmp_path / "mlx")
    stock.set_dtype(mx.float32)
    assert mx.abs(stock(tokens) - logits).max() < 1e-3


def test_weights_of_form_mlx_are_centred(tmp_path: Path) -> None:
    write_streaming_model(tmp_path / "m", TINY, "mlx")
    weights = mx.load(str(tmp_path / "m" / "model-00002-of-00003.safetensors"))
    assert isinstance(weights, dict)
    name = "model.layers.0.mlp.switch_mlp.gate_proj"
    codes = mx.dequantize(*(weights[f"{name}.{field}"] for field in ("weight", "scales", "biases")), bits=4)
    assert abs(codes.mean()) < 0.02 * codes.astype(mx.float32).square().mean().sqrt()


def test_popularity_follows_zipf() -> None:
    """Along the direction that all tokens share, router rows are -log of a rank: few high values, skewness near 1.9."""
    tensors = trunk_tensors(SHAPE, 0, Traffic())
    shared = tensors["model.embed_tokens.weight"].astype(np.float32).mean(axis=0)
    for layer in range(SHAPE.num_hidden_layers):
        pull = tensors[f"model.layers.{layer}.mlp.gate.weight"].astype(np.float32) @ shared
        pull = (pull - pull.mean()) / pull.std()
        assert (pull**3).mean() > 0.8


def test_it_continues_its_own_walk(folder: Path) -> None:
    """No short circle: what is decoded greedily runs through the vocabulary."""
    model = open_model(folder, RuntimeConfig(context=512)).model
    for start in (0, 900):
        best = mx.argmax(model(mx.array([walk(SHAPE, start, 128)])), axis=-1)[0]
        assert np.array(best).tolist() == walk(SHAPE, start + 1, 128)


def test_its_traffic_is_like_that_of_trained_models(folder: Path) -> None:
    """Published: reuse 0.30-0.44, next-layer router 0.72-0.82 with 0.95 for its first rank, LRU at 25 % of the experts
    0.67-0.80 and at 55 % 0.88-0.96. A short trace on two layers scatters."""
    model = open_model(folder, RuntimeConfig(context=1024)).model
    facts = TrafficFacts.of(routed(model, walk(SHAPE, 0, 1024), window=256), SHAPE.num_experts)
    assert 0.28 < facts.reuse < 0.44
    assert facts.ahead is not None
    assert 0.70 < facts.ahead < 0.85
    assert facts.ahead_by_rank[0] > 0.93
    assert facts.ahead_by_rank == sorted(facts.ahead_by_rank, reverse=True)
    assert 0.67 < facts.lru["0.25"] < 0.82
    assert 0.84 < facts.lru["0.5"] < 0.96
    assert facts.top_quarter > 0.5


def test_routing_is_what_the_model_computes(folder: Path) -> None:
    """Layer by layer against the whole model: the experts seen by a stand-in for its expert layers."""
    model = open_model(folder, RuntimeConfig(context=256)).model
    tokens = walk(SHAPE, 30, 40)
    mine = routed(model, tokens).experts
    seen = []
    for layer in model.model.layers:
        inner = layer.mlp.switch_mlp

        def watch(x: mx.array, indices: mx.array, inner: object = inner) -> mx.array:
            seen.append(np.array(indices[0]))
            return inner(x, indices)  # type: ignore[operator]

        layer.mlp.switch_mlp = watch
    mx.eval(model(mx.array([tokens])))
    assert np.array_equal(np.sort(mine, axis=-1), np.sort(np.stack(seen, axis=1), axis=-1))


def test_facts_of_a_trace_worked_out_by_hand() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 2]], [[1, 0], [0, 1]]])  # T 3, L 2, A 2
    ahead = np.array([[[2, 0]], [[3, 2]], [[3, 0]]])
    facts = TrafficFacts.of(Routed(experts, ahead), 8, fractions=(0.25, 0.5))
    assert facts.reuse == pytest.approx((1 + 2 + 1 + 0) / 8)
    assert facts.ahead == pytest.approx((1 + 2 + 1) / 6)
    assert facts.ahead_by_rank == [pytest.approx(2 / 3, abs=1e-4), pytest.approx(2 / 3, abs=1e-4)]
    assert facts.top_eighth == pytest.approx((3 / 6 + 2 / 6) / 2)
    assert facts.top_quarter == pytest.approx((5 / 6 + 4 / 6) / 2)
    assert facts.lru["0.5"] == pytest.approx((0 + 1 + 2 + 0 + 2 + 0) / 12)
    assert facts.lru["0.25"] == pytest.approx((0 + 1 + 1 + 0 + 2 + 0) / 12)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="exists already"):
        write_streaming_model(tmp_path, TINY)
    with pytest.raises(UserError, match="no folder"):
        write_streaming_model(tmp_path / "a" / "b", TINY)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(UserError, match="free, the experts alone take"):
        write_streaming_model(tmp_path / "full", TINY)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_call_leaves_no_model_and_the_next_one_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming_model, "write_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt):
        write_streaming_model(tmp_path / "model", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["model.partial"]
    monkeypatch.undo()
    write_streaming_model(tmp_path / "model", TINY)
    write_streaming_model(tmp_path / "other", TINY)
    assert contents(tmp_path / "model") == contents(tmp_path / "other")
    assert not (tmp_path / "model.partial").exists()


def test_as_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["streaming_model", str(tmp_path / "m"), "--size", "2MB", "--form", "mlx"])
    main()
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 layers of 256" in err
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization"] == {"group_size": 64, "bits": 4}
