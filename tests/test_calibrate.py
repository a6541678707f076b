"""Converting by calibration text: what the text may be, what is written, and work that is stopped at any step."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import (
    SMALL,
    convert,
    edit_weights,
    folder_nbytes,
    load_plan,
    open_model,
    snapshot,
    stored_matrix,
    write_architecture,
    write_qwen3,
)
from toy_text import write_words

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.convert import selftext
from mlxmoe.convert.calibrate import METHODS, Calibration, choose_tokens, default_tokens, read_documents
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.job import Job
from mlxmoe.convert.selftext import OPENINGS, TAU, balanced_choice, own_text
from mlxmoe.convert.source import Source
from mlxmoe.convert.stats import Moments, unseen_directions
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.errors import UserError
from mlxmoe.evaluate import EvalConfig, Text, evaluate

pytestmark = pytest.mark.usefixtures("short_windows")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("calibrate") / "source", **SMALL)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    return write_words(source.parent / "text.txt")


@pytest.fixture(scope="module")
def arguments(text: Path) -> list[str]:
    return ["--bpw", "6", "--calibration", str(text), "--calibration-tokens", "256", "--expert-bits", "2,4,8"]


@pytest.fixture(scope="module")
def whole(source: Path, arguments: list[str]) -> Path:
    output = source.parent / "whole"
    assert convert(source, output, *arguments) == 0
    return output


# Text -----------------------------------------------------------------------------------------------------------------


def test_windows_are_the_same_every_time_and_cover_the_documents(source: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(open_checkpoint(source))
    path = tmp_path / "text.jsonl"
    letters = "abcdefghijklmnop"
    path.write_text("\n".join(json.dumps({"text": letter * 500}) for letter in letters))
    calibration = Calibration(str(path), tokens=16 * 64, window=64)
    documents = read_documents(path, tokenizer)
    windows = choose_tokens(documents, tokenizer, calibration, seed=0)
    assert windows.shape == (16, 64)
    assert (windows == choose_tokens(documents, tokenizer, calibration, seed=0)).all()
    assert (windows != choose_tokens(documents, tokenizer, calibration, seed=1)).any()
    assert len(set(tokenizer.decode(windows.flatten().tolist()))) > 8
    few = choose_tokens(documents, tokenizer, Calibration(str(path), tokens=10**9, window=64), seed=0)
    assert few.size == 16 * 500 // 64 * 64


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [(10**4, 16384), (4 * 10**6, 31250), (20 * 10**6, 156250), (10**9, 524288), (10**11, 524288)],
)
def test_tokens_that_a_model_gets(parameters: int, tokens: int) -> None:
    assert default_tokens(parameters) == tokens
    assert Calibration("f").for_model(parameters).tokens == tokens
    assert Calibration("f", tokens=77).for_model(parameters).tokens == 77


def test_chats_go_through_the_template(source: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(open_checkpoint(source))
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    assert read_documents(path, tokenizer) == ["<|im_start|>user\nhello<|im_end|>\n"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no text"),
        ('{"text": "a"}\n{"txt": 1}\n', "line 2 has neither text nor messages"),
        ("[1]\n", "line 1 has neither text nor messages"),
        ("{", "line 1 is not JSON"),
        ('{"messages": [{"content": 1}, 2]}', "line 1 has neither text nor messages"),
        ('{"text": "short"}', "is too short: 5 tokens, and one window takes 64"),
    ],
)
def test_text_that_is_none(
    content: str, expected: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert convert(source, tmp_path / "out", "--bpw", "6", "--calibration", str(path)) == 2
    assert expected in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"bad.jsonl"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--calibration", "nowhere.txt"], "there is no calibration file nowhere.txt"),
        (["--method", "gptq"], "--method gptq needs text"),
        (["--method", "awq"], "--method awq needs text"),
        (["--calibration-tokens", "0"], "--calibration-tokens 0 is not a number of tokens"),
        (["--calibration", "self", "--candidates", "0"], "--candidates 0 is not between 1 and 64"),
        (["--candidates", "3"], "--candidates is about text that the model writes itself"),
        (["--method", "rtn"], "--method rtn reads no text"),
        (["--nested", "-1"], "--nested -1.0 is not between 0 and 10"),
    ],
)
def test_bad_settings(
    more: list[str], expected: str, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if more[0] == "--calibration" or more[1] in METHODS else ["--calibration", str(text)]
    assert convert(source, tmp_path / "out", "--bpw", "6", *given, *more) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--calibration-tokens", "512"], "--calibration-tokens is about calibration text"),
        (["--candidates", "3"], "--candidates is about calibration text"),
        (["--nested", "0.3"], "--nested is about calibration text"),
        (["--predecessors", "source"], "--predecessors is about calibration text"),
        (["--combine", "variance"], "--combine is about copies of experts"),
        (["--dry-run", "--resume"], "--dry-run keeps nothing"),
        (["--dry-run", "--restart"], "--dry-run keeps nothing"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    more: list[str], expected: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out", "--bpw", "6", *more) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_binary_file_is_no_text(source: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_documents(tmp_path / "x.txt", None)


# Results --------------------------------------------------------------------------------------------------------------


def kld(folder: Path, reference: Path, text: Path) -> float:
    loaded, original = open_model(folder), open_model(reference)
    texts = [Text("text", [text.read_text()])]
    return float(evaluate(loaded.model, loaded.tokenizer, texts, original.model, EvalConfig(512, 128))["kld_mean"])


def test_nearer_to_the_original_than_without_text(source: Path, whole: Path, text: Path, tmp_path: Path) -> None:
    """On other text of the same kind, and with fewer bytes: sizes of so small a model come in steps of a page a record."""
    assert convert(source, tmp_path / "rtn", "--bpw", "6.3", "--method", "rtn") == 0
    assert folder_nbytes(whole) <= folder_nbytes(tmp_path / "rtn")
    other = write_words(tmp_path / "other.txt", 600, seed=1)
    assert kld(whole, source, other) < 0.8 * kld(tmp_path / "rtn", source, other)


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss"])
def test_families(case: str, text: Path, tmp_path: Path) -> None:
    """Converted, loaded and run; routers are those of the source, stored matrices decode to what the plan says they are."""
    changes = {"intermediate_size": 96} if case == "mixtral" else {}
    source = write_architecture(tmp_path / "source", case, **changes)
    arguments = ["--bpw", "8", "--calibration", str(text), "--calibration-tokens", "256", "--expert-bits", "3,6"]
    assert convert(source, tmp_path / "out", *arguments) == 0
    layer = load_plan(tmp_path / "out").layers[0]
    stack = np.array(Source(open_checkpoint(source), 128).tensors()[f"{layer.path}.up_proj.weight"].astype(mx.float32))
    for e, expert in enumerate(layer.experts):
        left = stored_matrix(tmp_path / "out", layer, e, 1, expert.levels[1]) - stack[e]
        assert (left**2).sum() < {3: 0.12, 6: 0.004}[expert.levels[1]] * (stack[e] ** 2).sum()
    loaded = open_model(tmp_path / "out")
    assert mx.isfinite(loaded.model(mx.array([[5, 6, 7]]))).all().item()


def test_dry_run_tells_the_bytes_and_leaves_nothing(
    source: Path, whole: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out", *arguments, "--dry-run", "--json") == 0
    assert not list(tmp_path.iterdir())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == folder_nbytes(whole)


def test_experts_that_are_never_reached_are_named(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their router logits are zero, those of two others large; they are written all the same."""
    source = write_qwen3(tmp_path / "source", **SMALL)

    def close(weights: dict[str, mx.array]) -> None:
        name = "model.layers.0.mlp.gate.weight"
        gate, norm = np.zeros((4, 64), np.float32), "model.layers.0.post_attention_layernorm.weight"
        weights[norm] = mx.array(np.ones(64)).astype(weights[norm].dtype)
        weights["model.embed_tokens.weight"] = mx.abs(weights["model.embed_tokens.weight"]) + 1
        gate[:2], gate[2:] = 9, -9
        weights[name] = mx.array(gate).astype(weights[name].dtype)

    edit_weights(source, close)
    arguments = ["--bpw", "6", "--calibration", str(text), "--calibration-tokens", "256"]
    assert convert(source, tmp_path / "out", *arguments) == 0
    assert "layer 0: the calibration text never reaches experts 2, 3; the layer's own" in capsys.readouterr().err
    assert len(load_plan(tmp_path / "out").layers[0].experts) == 4


def test_few_tokens_are_noted(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_words(tmp_path / "short.txt", 40)
    assert convert(source, tmp_path / "out", "--bpw", "6", "--calibration", str(path)) == 0
    error = capsys.readouterr().err
    tokens = len(path.read_text()) // 64 * 64  # one a letter, in whole windows
    assert f"the calibration text has {tokens} tokens, fewer than the 16384 that were asked for" in error


def test_tokens_that_experts_saw_are_counted(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """512 tokens of two experts each, 32 experts."""
    source = write_qwen3(tmp_path / "source", **{**SMALL, "num_experts": 32})
    arguments = ["--bpw", "10", "--calibration", str(text), "--calibration-tokens", "512", "--expert-bits", "4"]
    assert convert(source, tmp_path / "out", *arguments, "--dry-run") == 0
    found = re.findall(
        r"layer (\d): the calibration text reaches an expert 32 times on average, the rarest (\d+) and the most frequent "
        r"(\d+) times; 64 on average should be there",
        capsys.readouterr().err,
    )
    assert [layer for layer, *_ in found] == ["0", "1"]
    assert all(0 <= int(rarest) < 32 < int(most) <= 512 for _, rarest, most in found)


def test_model_writes_its_own_text(source: Path, tmp_path: Path) -> None:
    """Every window starts with an opening and goes on with what the model draws, the same for the same seed."""
    loaded = open_model(source)
    first = own_text(loaded.model, loaded.tokenizer, 18, 96, 0, lambda n: None)
    assert first.shape == (18, 96)
    assert (first == own_text(loaded.model, loaded.tokenizer, 18, 96, 0, lambda n: None)).all()
    assert (first != own_text(loaded.model, loaded.tokenizer, 18, 96, 1, lambda n: None)).any()
    assert loaded.tokenizer.decode(first[1].tolist()).startswith(OPENINGS[1][:5])
    logits = loaded.model(mx.array(first))
    logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[:, :-1]
    drawn = np.take_along_axis(logs, first[:, 1:, None], -1)
    # tokens drawn by p are likelier than others, by the sum of both divergences of p and an even distribution
    assert drawn[:, -10:].mean() > logs[:, -10:].mean() + 0.15


def test_texts_are_chosen_by_surprise_and_by_the_load_of_the_experts() -> None:
    """Against the sum written out, over all ways to take the next text; and by hand: a text that the chosen ones lack."""
    random = np.random.default_rng(0)
    loads, surprise = random.integers(0, 9, (7, 2, 3)), random.random(7)
    chosen: list[int] = []
    for _ in range(4):
        costs = {}
        for c in set(range(7)) - set(chosen):
            total = loads[[*chosen, c]].sum(axis=0)
            spread = np.mean([row.std() / row.mean() for row in total])
            costs[c] = surprise[[*chosen, c]].mean() + spread / TAU
        chosen.append(min(costs, key=lambda c: costs[c]))
    assert balanced_choice(loads, surprise, 4).tolist() == sorted(chosen)
    one_sided = np.array([[[8, 0]], [[8, 0]], [[0, 8]]])
    assert balanced_choice(one_sided, np.zeros(3), 2).tolist() == [0, 2]
    assert balanced_choice(one_sided, np.array([0.0, 0.1, 90.0]), 2).tolist() == [0, 1]
    assert balanced_choice(one_sided, np.zeros(3), 3).tolist() == [0, 1, 2]


def test_of_several_own_texts_the_balanced_ones_are_kept(source: Path) -> None:
    loaded = open_model(source)
    every = own_text(loaded.model, loaded.tokenizer, 12, 48, 0, lambda n: None)
    kept = own_text(loaded.model, loaded.tokenizer, 4, 48, 0, lambda n: None, candidates=3)
    assert kept.shape == (4, 48)
    rows = [next(i for i, row in enumerate(every) if (row == text).all()) for text in kept]
    assert rows == sorted(set(rows))
    layers = [layer for layer in loaded.model.modules() if hasattr(layer, "choices")]
    assert not any(layer.choices.watched for layer in layers)

    def spread(texts: np.ndarray) -> float:
        for layer in layers:
            layer.choices.watched = True
        mx.eval(loaded.model(mx.array(texts)))
        counts = [np.bincount(layer.choices.take(), minlength=4) for layer in layers]
        for layer in layers:
            layer.choices.watched = False
        return float(np.mean([c.std() / c.mean() for c in counts]))

    assert spread(kept) < np.median([spread(every[i : i + 4]) for i in range(9)])


def test_converted_by_its_own_text(source: Path, tmp_path: Path) -> None:
    arguments = ["--bpw", "6", "--calibration", "self", "--calibration-tokens", "128"]
    assert convert(source, tmp_path / "out", *arguments) == 0
    assert load_plan(tmp_path / "out").settings["calibration"]["file"] == "self"


def test_own_text_that_was_stopped_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing it takes hours for a large model: what is written is not written again."""
    arguments = ["--bpw", "6", "--calibration", "self", "--calibration-tokens", "64"]
    monkeypatch.setattr("mlxmoe.convert.selftext._SIDE_BY_SIDE", 1)
    write, written = selftext._continue, []

    def counted(*given: Any) -> np.ndarray:
        if len(written) == 1:
            written.append("stop")
            raise KeyboardInterrupt
        written.append("text")
        return write(*given)

    monkeypatch.setattr(selftext, "_continue", counted)
    assert convert(source, tmp_path / "out", *arguments) == 130
    assert (tmp_path / "out.partial" / "state" / "text-0.json").is_file()
    assert convert(source, tmp_path / "out", *arguments, "--resume") == 0
    assert written == ["text", "stop", "text"]
    monkeypatch.setattr(selftext, "_continue", write)
    assert convert(source, tmp_path / "whole", *arguments) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_without_text_a_note_says_what_it_would_give(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "--calibration FILE, self or hub lowers the loss"
    assert convert(source, tmp_path / "out", "--bpw", "6", "--dry-run") == 0
    assert capsys.readouterr().err.count(note) == 1
    assert convert(source, tmp_path / "out", "--bpw", "6", "--dry-run", "--method", "rtn") == 0
    assert note not in capsys.readouterr().err


# Stopping and going on ------------------------------------------------------------------------------------------------


def test_stopped_at_every_step(
    source: Path, whole: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop before every seventh rename of a file, in one conversion that is resumed every time: the result is that of a
    conversion without a stop."""
    renames, real = 0, os.replace

    def replace(old: Any, new: Any) -> None:
        nonlocal renames
        renames += 1
        if renames % 7 == 0:
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        stops = 0
        while convert(source, tmp_path / "out", *arguments, *(["--resume"] if stops else [])) == 130:
            stops += 1
            assert stops < 60
    assert snapshot(tmp_path / "out") == snapshot(whole)
    # job; 3 hidden states, 3 gradients, 4 times what errors cost; plan; 3 hidden states, 3 trunks; 2 layers, 1 shard with
    # a note each; 3 side files and the plan: 28 at least, and what the work in hand at a stop has to do again
    assert stops >= 4


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (["--calibration-tokens", "512"], "calibration.tokens"),
        (["--nested", "0.5"], "calibration.mu"),
        (["--predecessors", "source"], "calibration.predecessors"),
        (["--method", "awq"], "calibration.method"),
        (["--predecessors", "source", "--seed", "1"], "calibration.predecessors and seed"),
    ],
)
def test_resume_with_other_settings(
    more: list[str],
    differs: str,
    source: Path,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.measure", stop)
        assert convert(source, tmp_path / "out", *arguments) == 130
    assert convert(source, tmp_path / "out", *arguments, *more, "--resume") == 2
    assert f"was started with other {differs}" in capsys.readouterr().err


def test_a_tokenizer_that_is_away_costs_no_work(
    source: Path,
    arguments: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is refused on resuming is refused; hours of statistics stay where they are. What is refused at the start leaves
    nothing."""
    folder = shutil.copytree(source, tmp_path / "source")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.Job._keep_plan", stop)
        assert convert(folder, tmp_path / "out", *arguments) == 130
    assert "out.partial keeps what is done: the same command with --resume goes on" in capsys.readouterr().err
    before = snapshot(tmp_path / "out.partial")
    assert "state/weighed-0.npz" in before
    (folder / "tokenizer.json").rename(tmp_path / "away")
    assert convert(folder, tmp_path / "out", *arguments, "--resume") == 2
    assert "has no usable tokenizer" in capsys.readouterr().err
    assert snapshot(tmp_path / "out.partial") == before
    assert convert(folder, tmp_path / "other", *arguments) == 2
    assert not list(tmp_path.glob("other*"))
    (tmp_path / "away").rename(folder / "tokenizer.json")
    assert convert(folder, tmp_path / "out", *arguments, "--resume") == 0
    assert snapshot(tmp_path / "out") == snapshot(whole)


def test_calibration_text_that_changed_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_words(tmp_path / "text.txt")
    arguments = ["--bpw", "6", "--calibration", str(path)]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.measure", stop)
        assert convert(source, tmp_path / "out", *arguments) == 130
    write_words(path, seed=9)
    assert convert(source, tmp_path / "out", *arguments, "--resume") == 2
    assert "was started with other calibration.sha256" in capsys.readouterr().err


def test_settings_say_how_it_was_calibrated(whole: Path, text: Path) -> None:
    settings = load_plan(whole).settings["calibration"]
    assert settings["tokens"] == 256
    assert len(settings["sha256"]) == 64
    assert settings["file"] == text.name


def test_without_text_nothing_is_calibrated(source: Path, tmp_path: Path) -> None:
    config = ConvertConfig(bpw=6)
    Job(source, tmp_path / "out", config, quiet=True).run()
    assert "calibration" not in load_plan(tmp_path / "out").settings


# Bad input ------------------------------------------------------------------------------------------------------------


def test_singular_statistics_are_reported(
    source: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three inputs of one layer's experts are always zero: the norm before them multiplies by it."""
    folder = shutil.copytree(source, tmp_path / "source")

    def silence(weights: dict[str, mx.array]) -> None:
        weights["model.layers.1.post_attention_layernorm.weight"][:3] = 0

    edit_weights(folder, silence)
    assert convert(folder, tmp_path / "out", *arguments, "--dry-run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the statistics are singular")]
    (line,) = lines
    experts = "model.layers.1.mlp.switch_mlp"
    assert line == (
        "the statistics are singular, for the calibration text says nothing about "
        f"3 of the 64 inputs of {experts}.gate_proj, 3 of the 64 inputs of {experts}.up_proj; a damping of 2% of their mean "
        "stands in"
    )


def test_directions_that_no_text_took() -> None:
    hessian = np.stack([np.eye(8, dtype=np.float32)] * 2)
    moments = Moments(hessian, np.ones((2, 3)), np.array([40, 2]), 0.0)
    assert unseen_directions(moments, 30) == 0
    assert unseen_directions(moments, 5) == 3
    assert unseen_directions(moments._replace(tokens=np.array([4, 2])), 30) == 2
    hessian[:, :3] = hessian[:, :, :3] = 0
    assert unseen_directions(moments, 30) == 3
    hessian[0, 0, 0] = 1
    assert unseen_directions(moments, 30) == 2
    assert unseen_directions(moments._replace(hessian=np.zeros((0, 0, 0))), 1) == 0


def test_layers_that_share_keys_and_values(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 4's way: the last layer reads the keys and values of the one before, and cannot run without it."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    heads = {"head_dim": 32, "num_key_value_heads": 1}
    changes = {"num_kv_shared_layers": 1, "layer_types": kinds, "per_layer_config": {"1": heads, "2": heads}}
    source = write_architecture(tmp_path / "source", "gemma4_text", **changes)
    given = ["--bpw", "10", "--calibration", str(text), "--calibration-tokens", "128"]
    assert convert(source, tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert "this architecture cannot be calibrated (Layer 2 is a KV-shared layer" in error
    assert "hint: convert it with --method rtn" in error
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert convert(source, tmp_path / "out", "--bpw", "10", "--method", "rtn") == 0


def test_hidden_states_that_are_not_finite(
    source: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are finite, and too large for what they are multiplied with."""
    folder = shutil.copytree(source, tmp_path / "source")

    def enlarge(weights: dict[str, mx.array]) -> None:
        for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.v_proj.weight"):
            weights[name] = mx.full(weights[name].shape, 1e30).astype(weights[name].dtype)

    edit_weights(folder, enlarge)
    assert convert(folder, tmp_path / "out", *arguments) == 2
    assert "the hidden states behind model.layers.0 are not finite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "layers.1.mlp.experts.3.up_proj",
            "layers.1.mlp.switch_mlp.up_proj.weight has values that are not finite in expert 3",
        ),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.weight has values that are not finite"),
        ("layers.1.mlp.gate", "layers.1.mlp.gate.weight has values that are not finite"),
        ("layers.0.input_layernorm", "layers.0.input_layernorm.weight has values that are not finite"),
        ("norm", "model.norm.weight has values that are not finite"),
        ("embed_tokens", "model.embed_tokens.weight has values that are not finite"),
    ],
)
def test_what_is_not_finite_is_named(
    name: str,
    value: float,
    words: str,
    source: Path,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tensor, and not the hidden states that it spoils; before anything is measured."""
    folder = shutil.copytree(source, tmp_path / "source")

    def spoil(weights: dict[str, mx.array]) -> None:
        values = np.array(weights[f"model.{name}.weight"].astype(mx.float32))
        values.flat[3] = value
        weights[f"model.{name}.weight"] = mx.array(values).astype(mx.bfloat16)

    edit_weights(folder, spoil)
    assert convert(folder, tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_repacked_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_qwen3(tmp_path / "source", **SMALL)
    assert main(["repack", str(source), str(tmp_path / "repacked")]) == 0
    capsys.readouterr()
    assert convert(tmp_path / "repacked", tmp_path / "out", "--bpw", "6") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'repacked'} is a repacked folder" in error
    assert "hint: convert the checkpoint that it was made from" in error
