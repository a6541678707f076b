"""The launch count: known graphs, the stand-ins for GPU-only operations, and a small model end to end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxmoe.bench import launches
from mlxmoe.bench.launches import StepLaunches, _as_on_gpu, _Constants, count, narrowed
from mlxmoe.checkpoint import read_config
from mlxmoe.cli import main
from mlxmoe.errors import UserError

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
    "vocab_size": 5000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def zeros(*shape: int) -> mx.array:
    array = mx.zeros(shape)
    mx.eval(array)
    return array


@mx.compile
def fused(x: mx.array) -> mx.array:
    return mx.sigmoid(x) * x * x


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (lambda x: x, 0),
        (lambda x: x.reshape(2, 2, 8).transpose(2, 0, 1)[None], 0),
        (lambda x: mx.stop_gradient(mx.split(x[1:3], 2, axis=1)[0]), 0),
        (lambda x: mx.broadcast_to(x[:, None], (4, 3, 8)), 0),
        (lambda x: x @ x.T, 1),
        (lambda x: mx.softmax(x, axis=-1), 1),
        (lambda x: x.astype(mx.float16), 1),
        (lambda x: mx.zeros((4, 8)), 1),
        (lambda x: fused(x), 1),
        (lambda x: mx.sigmoid(x) * x * x, 3),
        (lambda x: mx.divmod(x, x)[1], 1),
        (lambda x: (y := mx.exp(x)) + y.T.reshape(4, 8), 2),
    ],
)
def test_known_graphs(graph: Callable[[mx.array], mx.array], expected: int) -> None:
    assert launches.launches([graph(zeros(4, 8))]) == expected


def test_what_two_outputs_share_counts_once() -> None:
    x = mx.exp(zeros(4))
    assert launches.launches([x + x, x * x]) == 3


def test_operations_that_a_gpu_fuses_are_one_node() -> None:
    x, weight, constants = zeros(1, 2, 1, 128), zeros(128), _Constants()

    def attention(size: int) -> mx.array:
        q, k = zeros(1, 2, 1, size), zeros(1, 1, 4, size)
        return mx.fast.scaled_dot_product_attention(mx.exp(q), mx.exp(k), mx.exp(k), scale=1.0)

    original = mx.fast.rms_norm
    with _as_on_gpu(constants):
        normed = launches.launches([mx.fast.rms_norm(mx.exp(x), weight, 1e-5)])
        rotated = launches.launches([nn.RoPE(128)(mx.exp(x), offset=3)])
        attended = launches.launches([attention(128)])
        unfused = launches.launches([attention(80)])
    assert (normed, rotated, attended) == (2, 2, 4)
    assert unfused > 4  # no fused kernel has this head dimension
    assert mx.fast.rms_norm is original


def test_modules_are_restored_after_an_error() -> None:
    original = mx.fast.rope
    with pytest.raises(UserError), _as_on_gpu(_Constants()):
        raise UserError("a", "b")
    assert mx.fast.rope is original


def test_only_widths_and_vocabulary_are_cut() -> None:
    cut = narrowed({**CONFIG, "text_config": {"intermediate_size": 900, "num_hidden_layers": 7}})
    assert cut["text_config"] == {"intermediate_size": 128, "num_hidden_layers": 7}
    changed = {key for key in CONFIG if cut[key] != CONFIG[key]}
    assert changed == {"intermediate_size", "moe_intermediate_size", "vocab_size"}


def test_a_small_model_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text('{"model_type": "no_such_model"}')
    parser = argparse.ArgumentParser()
    launches.add_arguments(parser)
    assert launches.run(parser.parse_args([str(tmp_path / "config.json"), "--json"])) == 0
    assert launches.run(parser.parse_args([str(bad), str(tmp_path), "--json"])) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["model"] for each in result["not_counted"]] == ["bad"]
    (row,) = result["rows"]
    assert set(row) == {"model", "moe_layers", "stock", "ours", "moe_ratio", "meets_bar"}
    assert row["moe_layers"] == 2  # the layer between them is dense
    for side in (row["stock"], row["ours"]):
        assert set(side) == {"per_token", "per_moe_layer", "moe_blocks", "rest"}
        assert side["per_token"] == sum(side["moe_blocks"]) + side["rest"]
        assert side["per_moe_layer"] == side["moe_blocks"][0] == side["moe_blocks"][1]
    assert 0 < row["ours"]["per_moe_layer"] < row["stock"]["per_moe_layer"]
    assert row["ours"]["rest"] == row["stock"]["rest"]


def test_every_layer_costs_the_same() -> None:
    """So neither the first step nor another layer's cache is in the count."""
    few, more, most = (count("m", {**CONFIG, "num_hidden_layers": n, "mlp_only_layers": []}) for n in (2, 3, 4))
    # 4 products, 4 norms, 2 rotations, 2 writes to the cache, attention, 2 sums
    assert more.stock.rest - few.stock.rest == most.stock.rest - more.stock.rest == 15
    assert most.ours.rest == most.stock.rest


def test_an_activation_without_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "activation_of", lambda module: None)
    with pytest.raises(UserError, match="the kernels have no SwiGLU"):
        count("m", CONFIG)


def test_a_config_that_is_not_whole_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "rms_norm_eps"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["bench", "launches", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "lacks rms_norm_eps, which mlx-lm requires" in err
    assert err.count("hint:") == 1


def test_a_model_that_stock_does_not_know_is_said() -> None:
    """mlxmoe reads text-only Qwen3.5 checkpoints; mlx-lm has no module of that name."""
    config = {**CONFIG, "model_type": "qwen3_5_moe_text", "mlp_only_layers": []}
    with pytest.raises(UserError, match="stock mlx-lm does not build m: Model type qwen3_5_moe_text"):
        count("m", config)


def test_the_bar() -> None:
    """At most half in the MoE blocks, no more in the rest."""
    stock = StepLaunches((10, 20), 7)
    assert launches.Row("m", 2, stock, StepLaunches((5, 10), 7)).meets_bar
    assert not launches.Row("m", 2, stock, StepLaunches((6, 10), 7)).meets_bar
    assert not launches.Row("m", 2, stock, StepLaunches((5, 10), 8)).meets_bar


@pytest.mark.slow
def test_real_models_meet_the_bar(shared_dir: Path) -> None:
    """All whose config mlx-lm can build: not deepseek_v4, which it does not know, nor a config of sizes only."""
    folders = sorted(path.parent for path in (shared_dir / "models" / "configs").glob("*/config.json"))
    rows, refused = [], []
    for folder in folders:
        try:
            rows.append(count(folder.name, read_config(folder)))
        except UserError:
            refused.append(folder.name)
    assert refused == ["deepseek-ai__DeepSeek-V4-Flash", "ibm-granite__granite-3.0-3b-a800m"]
    assert len(rows) == len(folders) - 2
    assert [row.model for row in rows if not row.meets_bar] == []


def test_a_config_that_cannot_be_read_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is counted, as everywhere: one sentence, a hint, status 2."""
    assert main(["bench", "launches", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "has no config.json" in err
    assert "hint:" in err
