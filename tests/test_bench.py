"""mlxmoe bench: timing arithmetic, bytes against hand counts, the stock baseline, and the commands end to end.

No test looks at a speed: machines are noisy. What can be counted is compared exactly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import children
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model, load_tokenizer, quantize_model, save_model
from safetensors import safe_open

from mlxmoe import checkpoint as checkpoints
from mlxmoe.bench import baseline
from mlxmoe.bench.checkpoint import CheckpointShape, shape_of_size, tensors, write_checkpoint
from mlxmoe.bench.child import run_child
from mlxmoe.bench.decode import arrays, cache_bytes, fixed_prompt, measure, weight_bytes_per_token
from mlxmoe.bench.timing import Ratio, Spread, interleave
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.machine import machine_facts

SHAPE = CheckpointShape(max_position_embeddings=128)
D, F, E, K, V = SHAPE.hidden_size, SHAPE.moe_intermediate_size, SHAPE.num_experts, SHAPE.num_experts_per_tok, 320
Q, KV, HEAD, LAYERS = 64, 32, 16, 2


QUICK = ["--prompt-tokens", "9", "--tokens", "4", "--repeats", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    write_checkpoint(folder, SHAPE)
    return folder


def test_spread_and_ratio() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert Spread.of([1.0, 2.0]).as_json() == {"median": 1.5, "low": 1.0, "high": 2.0}
    # medians 4 / 8; pairs 1/8, 5/2, 4/9
    assert Ratio.of([1.0, 5.0, 4.0], [8.0, 2.0, 9.0]) == (0.5, 4 / 9, 1 / 8, 5 / 2)


def test_runs_alternate_and_stay_paired() -> None:
    calls: list[str] = []

    def run(name: str) -> str:
        calls.append(name)
        return f"{name}{calls.count(name)}"

    done: list[int] = []
    results = interleave([lambda: run("a"), lambda: run("b")], 3, lambda: done.append(1))
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert results == [["a1", "a2", "a3"], ["b1", "b2", "b3"]]
    assert len(done) == 6


def test_prompts_are_fixed_and_in_the_vocabulary() -> None:
    prompt = fixed_prompt(1000, 37)
    assert prompt == fixed_prompt(1000, 37)
    assert set(prompt) == set(range(37))


def trunk_elements() -> dict[str, int]:
    """Weights that every token reads, counted by hand; of the embedding one row."""
    return {
        "embedding": D,
        "attention": LAYERS * (Q * D + 2 * KV * D + D * Q),
        "router": LAYERS * E * D,
        "norms": LAYERS * (2 * D + 2 * HEAD) + D,
        "head": V * D,
    }


def test_bytes_per_token_of_float32(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint)
    model.update(baseline._cast(model, mx.float32))
    count = weight_bytes_per_token(model, K)
    assert count.trunk == 4 * sum(trunk_elements().values())
    assert count.experts == 4 * LAYERS * K * 3 * D * F
    assert count.total == count.trunk + count.experts
    assert weight_bytes_per_token(model, E).experts == E * count.experts // K


def test_bytes_per_token_of_stock_4_bit(checkpoint: Path) -> None:
    stock = baseline.stock_model(open_checkpoint(checkpoint)).model
    count = weight_bytes_per_token(stock, K)
    elements = trunk_elements()
    # 4 bits and, for each 64, a float32 scale and bias; mlx-lm keeps this router at 8 bits
    assert count.experts == LAYERS * K * 3 * D * F * 5 // 8
    expected = sum(elements[name] * 5 // 8 for name in ("embedding", "attention", "head"))
    assert count.trunk == expected + elements["router"] * 9 // 8 + 4 * elements["norms"]


class Experts(nn.Module):
    """Stands for a layer that keeps its experts outside the parameters, and one small array inside them."""

    num_experts = 4

    def __init__(self) -> None:
        super().__init__()
        self.table = mx.zeros((10,), mx.float32)
        self.inner = SwitchLinear(8, 8, 4, bias=False)  # counted by nbytes, not again
        self._banks = mx.zeros((4, 100), mx.uint8)

    @property
    def nbytes(self) -> int:
        return self._banks.nbytes


class Small(nn.Module):
    def __init__(self, head: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 6)
        self.layers = [Experts(), nn.Linear(2, 3, bias=False)]
        if head:
            self.lm_head = nn.Linear(6, 5, bias=False)


def test_a_layer_that_counts_its_own_experts_and_tied_embeddings() -> None:
    count = weight_bytes_per_token(Small(head=True), 2)
    assert count.experts == 2 * 100
    assert count.trunk == 4 * (6 + 2 * 3 + 6 * 5)
    # without a head of its own the embedding is the head, and is read in full
    assert weight_bytes_per_token(Small(head=False), 2).trunk == 4 * (5 * 6 + 2 * 3)


def test_a_run_decodes_what_was_asked_whatever_the_tokens_are(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint)
    model.update(baseline._cast(model, mx.float32))
    run = measure(model, fixed_prompt(10, V), 7)
    assert (run.prompt_tokens, run.decoded) == (10, 6)
    assert run.kv_bytes == LAYERS * 2 * KV * 4 * (10 + 7)
    assert run.prefill_rate == 10 / run.ttft_seconds
    assert run.decode_rate == 6 / run.decode_seconds


def test_cache_bytes_count_the_filled_part() -> None:
    def fill(cache: Any, tokens: int) -> Any:
        for _ in range(tokens):
            cache.update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 4)))
        return cache

    row = 2 * (8 + 4) * 4
    assert cache_bytes(KVCache()) == 0
    assert cache_bytes(fill(KVCache(), 3)) == 3 * row
    assert cache_bytes(fill(RotatingKVCache(max_size=4), 9)) == 4 * row
    assert cache_bytes(CacheList(fill(KVCache(), 3), fill(KVCache(), 5))) == 8 * row


def parameter_shapes(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {path: (array.shape, array.dtype) for path, array in arrays(model.parameters())}


def test_the_synthetic_baseline_has_the_shapes_of_the_quantized_source(checkpoint: Path) -> None:
    real = baseline.stock_model(open_checkpoint(checkpoint))
    synthetic = baseline.stock_model(open_checkpoint(checkpoint)._replace(kind="converted"))
    assert parameter_shapes(real.model) == parameter_shapes(synthetic.model)
    assert "quantized by mlx-lm to 4 bits in groups of 64" in real.notes[0]
    assert "random weights of the same shapes" in synthetic.notes[0]
    assert "float32" in real.notes[1]
    types = {array.dtype for _, array in arrays(real.model.parameters())}
    assert types == {mx.uint32, mx.float32}


def test_the_synthetic_baseline_keeps_the_type_of_its_config(checkpoint: Path) -> None:
    model, _ = baseline._synthetic(open_checkpoint(checkpoint).config, "a reason")
    assert {array.dtype for _, array in arrays(model.parameters())} == {mx.uint32, mx.bfloat16}


@pytest.fixture
def stock_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A 3-bit MLX checkpoint as mlx-lm saves it."""
    model, config = load_model(checkpoint)
    model, config = quantize_model(model, config, 32, 3)
    folder = tmp_path / "stock"
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)
    return folder


def test_a_stock_checkpoint_is_its_own_baseline(stock_checkpoint: Path) -> None:
    stock = baseline.stock_model(open_checkpoint(stock_checkpoint))
    assert stock.model.layers[0].mlp.switch_mlp.up_proj.bits == 3
    assert "as it stands" in stock.notes[0]


def test_configs_of_transformers_5_are_read(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    config = {k: v for k, v in opened.config.items() if k != "rope_theta"}
    config["rope_parameters"] = {"rope_theta": 54321.0, "rope_type": "default"}
    for kind in ("huggingface", "converted"):
        made = baseline.stock_model(opened._replace(config=config, kind=kind))
        assert made.model.args.rope_theta == 54321.0


def test_weights_that_stock_mlx_lm_cannot_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(checkpoint, folder)
    weights = dict(mx.load(str(next(checkpoint.glob("*.safetensors")))).items())
    weights["model.final_norm.weight"] = weights.pop("model.norm.weight")
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(next(folder.glob("*.safetensors"))), weights)
    made = baseline.stock_model(open_checkpoint(folder))
    assert "cannot read these weights: random weights of the same shapes" in made.notes[0]
    # chosen by the user, it must not be replaced by random weights
    assert main(["bench", str(checkpoint), "--compare", "mlx-lm", "--baseline", str(folder), *QUICK]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.endswith("renamed: ValueError: Received 1 parameters not in model: ")
    assert hint.startswith("hint: ")


def test_a_converted_folder_is_no_stock_baseline(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="is a converted folder"):
        baseline.stock_model(open_checkpoint(checkpoint)._replace(kind="converted"), given=True)


def test_the_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(checkpoint), *QUICK, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["settings"] == {"prompt_tokens": 9, "tokens": 4, "repeats": 2}
    for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "ttft_seconds"):
        assert 0 < result[key]["low"] <= result[key]["median"] <= result[key]["high"]
    read = result["bytes_per_token"]
    assert read["total"] == read["trunk"] + read["experts"] + read["kv"]
    speed = result["decode_tokens_per_second"]["median"]
    assert result["effective_gb_per_second"] == pytest.approx(read["total"] * speed / 1e9, rel=1e-3)
    assert result["memory"]["process_peak_rss"] > result["memory"]["run_peak"] > 0
    assert {"platform", "cpu", "mlx", "mlx_lm", "device", "commit"} <= set(result["machine"])
    assert "compare" not in result
    assert "bench: 100%" in err


@pytest.mark.parametrize(
    ("kind", "given", "note"),
    [
        ("huggingface", False, "quantized by mlx-lm to 4 bits"),
        ("converted", False, "random weights of the same shapes"),
        ("huggingface", True, "as it stands"),
    ],
)
def test_the_command_compares(
    checkpoint: Path,
    stock_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    given: bool,
    note: str,
) -> None:
    if kind == "converted" and not given:
        opened = open_checkpoint(checkpoint)._replace(kind=kind)
        monkeypatch.setattr(checkpoints, "open_checkpoint", lambda source: opened)
    extra = ["--baseline", str(stock_checkpoint)] if given else []
    assert main(["bench", str(checkpoint), "--compare", "mlx-lm", *extra, *QUICK, "--json"]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    result = json.loads(lines[-1])
    compare = result["compare"]
    for name in ("decode", "prefill"):
        ratio, key = compare[f"{name}_ratio"], f"{name}_tokens_per_second"
        assert ratio["low"] <= ratio["median_of_pairs"] <= ratio["high"]
        expected = result[key]["median"] / compare["baseline"][key]["median"]
        assert ratio["of_medians"] == pytest.approx(expected, rel=1e-3)
    if not given:  # 4 bits against bfloat16 held as float32, and ours not counted twice
        assert 0 < compare["baseline"]["memory"]["run_peak"] < result["memory"]["run_peak"]
    assert note in compare["notes"][0]
    assert any(line.startswith("decode ratio") for line in lines)
    assert not any("INFO" in line for line in lines)  # mlx-lm's own chatter belongs to stderr


def test_two_models_that_mlxmoe_loads(
    checkpoint: Path, stock_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one's numbers are those that it has alone."""
    assert (
        main(["bench", str(checkpoint), "--compare", "mlxmoe", "--baseline", str(stock_checkpoint), *QUICK, "--json"])
        == 0
    )
    *lines, last = capsys.readouterr().out.splitlines()
    compare = json.loads(last)["compare"]
    assert main(["bench", str(stock_checkpoint), *QUICK, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert compare["with"] == "mlxmoe"
    assert compare["baseline"]["bytes_per_token"] == alone["bytes_per_token"]
    assert compare["baseline"]["bytes_per_token"] != json.loads(last)["bytes_per_token"]
    assert f"mlxmoe, {stock_checkpoint}" in lines[0]
    assert not any("mlx-lm, 4 bits" in line for line in lines)
    ratio, key = compare["decode_ratio"], "decode_tokens_per_second"
    expected = json.loads(last)[key]["median"] / compare["baseline"][key]["median"]
    assert ratio["of_medians"] == pytest.approx(expected, rel=1e-3)


def test_the_baseline_must_be_of_the_same_model(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, CheckpointShape(vocab_size=384))
    assert main(["bench", str(checkpoint), "--compare", "mlx-lm", "--baseline", str(other), *QUICK]) == 2
    assert "vocabulary has 384 entries, the model's 320" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats is 0, expected 1 or more"),
        (["--tokens", "1"], "--tokens is 1, expected 2 or more"),
        (["--prompt-tokens", "0"], "--prompt-tokens is 0, expected 1 or more"),
        (["--baseline", "x"], "--baseline is given without --compare"),
        (["--compare", "mlxmoe"], "--compare mlxmoe needs another model"),
        (["--prompt-tokens", "2040", "--tokens", "9"], "2040 prompt tokens and 9 decoded exceed the context of"),
    ],
)
def test_bad_settings(checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", str(checkpoint), *arguments]) == 2
    err = capsys.readouterr().err
    assert f"error: {message}" in err
    assert "hint: " in err


def test_machine_facts_can_be_printed() -> None:
    assert json.loads(json.dumps(machine_facts()))["device"] == "cpu"


def test_checkpoints_are_valid_safetensors(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    total = write_checkpoint(folder, SHAPE, shard_bytes=100_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert total == sum(f.stat().st_size for f in files)
    assert sum(f.stat().st_size > 130_000 for f in files) == 0
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shapes = dict(tensors(SHAPE))
    found = {}
    for file in files:
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert weight_map[name] == file.name
                found[name] = tuple(opened.get_slice(name).get_shape())
    assert found == shapes
    weights = mx.load(str(folder / weight_map["model.layers.1.mlp.experts.7.up_proj.weight"]))
    up = weights["model.layers.1.mlp.experts.7.up_proj.weight"]
    assert up.dtype == mx.bfloat16
    assert np.array(up.astype(mx.float32)).std() == pytest.approx(D**-0.5, rel=0.05)


def test_checkpoints_are_complete_models(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    text = "Grüße, 世界!\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert tokenizer.decode(prompt) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_ids == {2}
    assert max(tokenizer.get_vocab().values()) < V


def test_checkpoints_come_in_the_size_asked_for() -> None:
    for nbytes, layers in ((1 << 30, 64), (512 << 20, 96), (64 << 20, 8)):
        assert shape_of_size(nbytes, layers).nbytes() == pytest.approx(nbytes, rel=0.25)


def test_writing_a_checkpoint_takes_constant_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", children.FOLDER)
    small, large = (run_child(children.write, str(tmp_path / str(n)), n).peak_rss for n in (1 << 20, 96 << 20))
    assert 0 < large - small < 24 << 20
