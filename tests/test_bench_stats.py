"""`mlxmoe stats`: what it prints, keeps and draws, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import convert, edit_weights, write_architecture, write_qwen3
from toy_text import write_domains

from mlxmoe.bench.pages import stats_parts
from mlxmoe.bench.stats import load_stats, report_lines
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.convert import activations
from mlxmoe.convert.activations import ExpertNumbers, Threshold, gather
from mlxmoe.convert.domains import choose_windows, read_domains
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.written import open_weights
from mlxmoe.errors import UserError
from mlxmoe.parts import Parts

NEVER = [2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's architecture, with two experts in every layer that are never chosen."""
    path = write_architecture(tmp_path_factory.mktemp("stats") / "model", "deepseek_v3")

    def exclude(weights: dict[str, mx.array]) -> None:
        for name in weights:
            if name.endswith("e_score_correction_bias"):
                weights[name] = mx.where(mx.arange(weights[name].size) // 2 == NEVER[0] // 2, -9.0, weights[name])

    edit_weights(path, exclude)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("text") / "text.jsonl")


def stats(model: Path, text: Path, *arguments: object) -> int:
    settings = ["--max-tokens", 256, "--window", 32]
    return main([str(a) for a in ("stats", model, "--text", text, *settings, *arguments)])


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "s.json"
    assert stats(model, text, "--save", path) == 0
    return path


def test_json_is_what_the_statistics_say(model: Path, text: Path, saved: Path, tmp_path: Path) -> None:
    """The command's numbers are those of `gather` on the same windows; the description loses none of them."""
    result = load_stats(saved)
    checkpoint = open_checkpoint(model)
    tokenizer, weights = read_tokenizer(checkpoint), open_weights(checkpoint)
    windows = choose_windows(read_domains([text], tokenizer), tokenizer, 256, 32)
    walk = Walk(LayerStream(weights), windows.tokens, tmp_path)
    layers = gather(walk, windows, weights.sites, Threshold(), lambda _: None)
    assert [domain["name"] for domain in result["domains"]] == ["digits", "vowels"]
    assert (result["tokens"], result["window"]) == (256, 32)
    for found, layer in zip(result["layers"], layers, strict=True):
        assert found["stream"]["rms"] == pytest.approx(layer.stream.rms, rel=1e-5)
        if layer.routed is None:
            assert found["routed"] is None
            continue
        experts = found["routed"]["experts"]
        for name in ExpertNumbers._fields:
            if name != "domains":  # shares there, counts here
                values = [np.nan if value is None else value for value in experts[name]]
                np.testing.assert_allclose(values, getattr(layer.routed.experts, name), rtol=1e-5)
        assert experts["frequency"] == pytest.approx(layer.routed.experts.tokens / 256, rel=1e-5)
        assert found["routed"]["never"] == NEVER
        assert found["routed"]["kinds"]["never"] == len(NEVER)
        assert sum(found["routed"]["kinds"].values()) == len(experts["kind"])
        trigger = found["routed"]["hidden"]["triggers"][0]
        assert trigger["magnitude"] == pytest.approx(layer.routed.hidden.largest, rel=1e-5)
        assert trigger["token"] in {"digits": "0123456789 ", "vowels": "aeiou "}[trigger["domain"]]
    assert result["never"] == [{"layer": n, "experts": NEVER} for n in (1, 2)]
    assert np.array(result["lift"]["values"], dtype=object).shape == (8, 8)


def test_text_for_people(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats(model, text, "--threshold", 5, "--scale", "median", "--json") == 0
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    assert "NaN" not in last, "JSON knows no such number"
    result = json.loads(last)
    assert "256 tokens in windows of 32, domains: digits 128, vowels 128" in lines[0]
    assert "massive: hidden values of experts from 5 times the layer's median on" in lines[1]
    assert [line.split()[0] for line in lines[2:6]] == ["layer", "0", "1", "2"]
    assert "layer 1: never chosen: 2, 3" in lines
    assert result["threshold"] == {"factor": 5.0, "scale": "median"}
    assert "stats: 100%" in err


def test_arrays(model: Path, text: Path, saved: Path, tmp_path: Path) -> None:
    assert stats(model, text, "--save", tmp_path / "s.npz") == 0
    result = load_stats(saved)
    routed = [layer for layer in result["layers"] if layer["routed"] is not None]
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["layers"].tolist() == [1, 2]
        assert arrays["tokens"].tolist() == [layer["routed"]["experts"]["tokens"] for layer in routed]
        assert arrays["domains"].shape == (2, 8, 2)
        np.testing.assert_array_equal(arrays["together"][:, range(8), range(8)], arrays["tokens"])
        wanted = [np.nan if v is None else v for v in routed[1]["routed"]["experts"]["reap"]]
        np.testing.assert_allclose(arrays["reap"][1], wanted, rtol=1e-5)
        header = json.loads(arrays["header"].tobytes())
    assert header["domains"] == result["domains"]


def test_page(saved: Path, model: Path, text: Path, tmp_path: Path) -> None:
    assert stats(model, text, "--report", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 7
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    result = load_stats(saved)
    trigger = result["layers"][2]["stream"]["triggers"][0]
    assert f"<td>{trigger['magnitude']:.4g}</td><td>{trigger['domain']}</td><td>{trigger['position']}</td>" in page


def test_pairs_that_are_rarer_than_chance_do_not_stand_out(saved: Path) -> None:
    result = load_stats(saved)
    layer = next(layer for layer in result["layers"] if layer["routed"] is not None)
    lifts = [1.5, 1.01, 0.95, 0.7]
    layer["routed"]["pairs"] = [{"experts": [i, 7], "tokens": 9, "lift": lift} for i, lift in enumerate(lifts)]
    lines = [line for line in report_lines(result) if line.startswith(f"layer {layer['layer']}: chosen together")]
    assert lines == [f"layer {layer['layer']}: chosen together more than by chance: 0+7 1.5x, 1+7 1.01x"]
    layer["routed"]["pairs"] = layer["routed"]["pairs"][2:]
    assert not [line for line in report_lines(result) if line.startswith(f"layer {layer['layer']}: chosen together")]


def test_pictures_of_one_domain_and_one_active_expert(saved: Path) -> None:
    """No map of domains, and none of pairs."""
    result = {**load_stats(saved), "lift": None}
    result["domains"] = result["domains"][:1]
    assert {part.name for part in stats_parts(result)} == {"frequency", "classes", "layers", "largest", "reap", ""}


def test_converted_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 8 bits and above, experts see nearly what they see in the original."""
    source = write_qwen3(tmp_path / "source", num_hidden_layers=2)
    assert convert(source, tmp_path / "out", "--bpw", "9") == 0
    capsys.readouterr()
    tables = []
    for folder in (source, tmp_path / "out"):
        assert stats(folder, text, "--json") == 0
        tables.append(last_line(capsys)["layers"][0]["routed"]["experts"])
    np.testing.assert_allclose(tables[1]["tokens"], tables[0]["tokens"], atol=10)
    seen = [i for i, n in enumerate(tables[0]["tokens"]) if n > 20]
    assert seen
    for name in ("reap", "input_trace", "gate"):
        np.testing.assert_allclose(*([table[name][i] for i in seen] for table in tables), rtol=0.1)


def stop_behind(part: str, patched: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as a part is kept."""
    keep = Parts.keep

    def then_stop(self: Parts, name: str, value: object) -> None:
        keep(self, name, value)
        if name == part:
            raise KeyboardInterrupt

    patched.setattr(Parts, "keep", then_stop)


def test_goes_on_where_it_was_stopped(
    model: Path,
    text: Path,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the numbers of a run that was not stopped, and without doing a layer again. What lay there before is not touched
    until the new file is whole."""
    path = tmp_path / "s.json"
    path.write_text("older")
    with monkeypatch.context() as patched:
        stop_behind("layer-1", patched)
        assert stats(model, text, "--save", path) == 130
    assert "s.json.partial keeps what is done" in capsys.readouterr().err
    assert path.read_text() == "older"
    assert stats(model, text, "--save", path) == 2
    assert "holds an unfinished statistics run" in capsys.readouterr().err
    assert stats(model, text, "--save", path, "--threshold", 5, "--resume") == 2
    assert "was started with other threshold.factor" in capsys.readouterr().err
    done: list[int] = []
    layer = activations._layer

    def counted(walk: Walk, i: int, *rest: Any) -> Any:
        done.append(i)
        return layer(walk, i, *rest)

    monkeypatch.setattr(activations, "_layer", counted)
    assert stats(model, text, "--save", path, "--resume") == 0
    assert done == [2]
    assert path.read_bytes() == saved.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["s.json"]


def test_nothing_is_kept_without_a_file(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats(model, text, "--resume") == 2
    assert "--resume needs a file beside which layers are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save", "s.csv"], "ends neither in .json nor in .npz"),
        (["--save", "absent/s.json"], "there is no folder absent"),
        (["--report", "absent/x.html"], "there is no folder absent"),
        (["--threshold", "0"], "--threshold 0 is not a positive number"),
        (["--window", "100000"], "a window of 100000 tokens is longer than the model's"),
        (["--max-tokens", "0"], "--max-tokens 0 is not a number of tokens"),
        (["--window", "1"], "a window of 1 tokens predicts nothing"),
    ],
)
def test_settings_that_are_refused(
    arguments: list[str], words: str, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", str(model), "--text", str(text), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is not a file of mlxmoe stats"),
        ('{"format": "mlxmoe-stats", "version": 99}', "has version 99"),
    ],
)
def test_files_that_are_no_statistics(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_stats(path)
