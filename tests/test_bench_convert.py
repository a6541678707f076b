"""`mlxmoe bench convert` and `bench quantizers`: processes of their own, the numbers between the files and the reports, and
mlx-lm's quantizers given our text. No test looks at a speed."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import children
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU
from toy_checkpoints import write_qwen3

from mlxmoe.bench import convert, quantizers, stock
from mlxmoe.bench.child import Ran, nothing, run_child
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.convert.calibrate import Calibration, choose_tokens, read_documents
from mlxmoe.errors import UserError
from mlxmoe.machine import peak_rss

TEXT = "".join(f"{n} comes before {n + 1}; " for n in range(400))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / "model"
    return write_qwen3(folder, hidden_size=64, moe_intermediate_size=64, num_experts=4, num_hidden_layers=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def _children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", children.FOLDER)


# Processes of their own -----------------------------------------------------------------------------------------------


def test_a_child_reports_its_own_peak_and_not_ours() -> None:
    ours = np.ones(200 << 20, np.uint8)
    assert peak_rss() > ours.nbytes
    small, large = (run_child(children.hold, n << 20) for n in (1, 65))
    assert (small.value, large.value) == (1 << 20, 65 << 20)
    assert large.peak_rss - small.peak_rss == pytest.approx(64 << 20, rel=0.1)
    assert run_child(nothing).peak_rss < run_child(nothing, imports=["mlx.core"]).peak_rss


def test_what_a_child_refuses_is_refused_here() -> None:
    with pytest.raises(UserError, match="no bread here") as refused:
        run_child(children.refuse, "bread")
    assert refused.value.hint == "look elsewhere"
    with pytest.raises(RuntimeError, match="children:fail ended with status 3"):
        run_child(children.fail)


def in_process(function: Any, *arguments: Any, imports: tuple[str, ...] = ()) -> Ran:
    """In the place of `run_child`, where it is not the process that is tested."""
    return Ran(function(*arguments), 2.0, (100 if function is nothing else 300) << 20)


# mlx-lm's quantizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn:2:64",
        "rtn:mixed_2_6:32",
        "gptq:4:64",
        "dynamic:3.0:2:4",
        "awq:4:64",
        "dwq:1e-4:rtn:2:32",
        "dwq:1e-4:gptq:2:64",
    ],
)
def test_recipes(recipe: str) -> None:
    assert ":".join(stock.parse(recipe)) == recipe


@pytest.mark.parametrize(
    "recipe",
    [
        *("", "rtn", "rtn:2", "rtn:2:48", "rtn:7:64", "rtn:mixed_9:64", "rtn:2:64:1", "gptq:mixed_2_6:64", "best:2:64"),
        *(
            "dynamic:3.0:4:2",
            "dynamic:3.0:2",
            "dynamic:x:2:4",
            "dwq:1e-4",
            "dwq:2:rtn:2:64",
            "dwq:1e-4:dwq:1e-4:rtn:2:64",
        ),
    ],
)
def test_what_is_no_recipe(recipe: str) -> None:
    with pytest.raises(UserError, match="is no quantizer of mlx-lm"):
        stock.parse(recipe)


@pytest.fixture
def tokens(source: Path, text: Path, tmp_path: Path) -> str:
    """A file of two windows, of 64 tokens each."""
    windows = stock.read_tokens(open_checkpoint(source), str(text), 1024)
    np.save(tmp_path / "tokens.npy", windows[:2, :64])
    return str(tmp_path / "tokens.npy")


def test_both_sides_read_the_same_text(source: Path, text: Path) -> None:
    checkpoint = open_checkpoint(source)
    windows = stock.read_tokens(checkpoint, str(text), 1100)
    tokenizer = stock.read_tokenizer(checkpoint)
    ours = choose_tokens(read_documents(text, tokenizer), tokenizer, Calibration(str(text), tokens=1100), seed=0)
    assert windows.shape == (2, 512)
    assert (windows == ours).all()


def written(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["rtn:2:32", "rtn:mixed_2_6:32"])
def test_rtn_is_what_their_command_writes(source: Path, tmp_path: Path, tokens: str, recipe: str) -> None:
    from mlx_lm.convert import convert as their_convert

    _, bits, group_size = recipe.split(":")
    settings = {"q_bits": int(bits)} if bits.isdecimal() else {"quant_predicate": bits}
    their_convert(str(source), str(tmp_path / "theirs"), quantize=True, q_group_size=int(group_size), **settings)
    stock.quantize(recipe, str(source), str(tmp_path / "ours"), tokens)
    ours, theirs = written(tmp_path / "ours"), written(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        assert mx.array_equal(ours[name], array).item(), name
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0] == configs[1]


def divergence(source: Path, folder: Path, tokens: str) -> float:
    """Mean KL divergence on the tokens themselves."""
    from mlxmoe.evaluate import kl_divergence, log_softmax
    from mlxmoe.loading import open_model

    x = mx.array(np.load(tokens))
    original, quantized = (log_softmax(open_model(path).model(x)) for path in (source, folder))
    return float(kl_divergence(original, quantized).mean().item())


def test_dwq_trains_scales_and_leaves_codes(source: Path, tmp_path: Path, tokens: str) -> None:
    many = np.concatenate([np.load(tokens)] * 12)
    np.save(tmp_path / "many.npy", many)
    for recipe in ("rtn:2:32", "dwq:3e-3:rtn:2:32"):
        stock.quantize(recipe, str(source), str(tmp_path / recipe), str(tmp_path / "many.npy"))
    start, trained = (written(tmp_path / recipe) for recipe in ("rtn:2:32", "dwq:3e-3:rtn:2:32"))
    assert {name: a.dtype for name, a in start.items()} == {name: a.dtype for name, a in trained.items()}
    moved = {name for name in start if not mx.array_equal(start[name], trained[name]).item()}
    assert moved >= {n for n in start if n.endswith((".scales", ".biases")) and "gate." not in n}  # routers: 8 bits
    # mlx-lm freezes what is quantized and nothing else: norms and routers are trained as well
    assert not moved & {name for name, array in start.items() if array.dtype == mx.uint32}
    assert divergence(source, tmp_path / "dwq:3e-3:rtn:2:32", tokens) < 0.8 * divergence(
        source, tmp_path / "rtn:2:32", tokens
    )


@pytest.mark.parametrize("recipe", ["gptq:2:32", "dynamic:3.5:2:4"])
def test_learned_quantizers_get_our_text(source: Path, tmp_path: Path, tokens: str, recipe: str) -> None:
    result = stock.quantize(recipe, str(source), str(tmp_path / "out"), tokens)
    assert np.isfinite(divergence(source, tmp_path / "out", tokens))
    assert (result is None) == (recipe != "gptq:2:32")
    weights = written(tmp_path / "out")
    assert {a.dtype for n, a in weights.items() if n.endswith(".scales")} == {mx.bfloat16}


def test_what_mlx_lm_does_not_do_is_said(source: Path, tmp_path: Path, tokens: str) -> None:
    for recipe, sentence in (
        ("awq:4:64", "mlx_lm.awq does not support qwen3_moe"),
        ("gptq:3:64", "mlx_lm.gptq does not write 3 bits"),
    ):
        with pytest.raises(UserError, match=sentence):
            stock.quantize(recipe, str(source), str(tmp_path / "out"), tokens)
    assert not (tmp_path / "out").exists()


def test_the_pass_over_the_text_is_timed_by_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 13.0, 15.0])
    monkeypatch.setattr(stock.time, "perf_counter", lambda: next(times))
    windows = stock._Windows(mx.zeros((5, 4), mx.int32))
    assert len(windows) == 5
    parts = [windows[i : i + 2] for i in (0, 2, 4)]
    assert [part.shape for part in parts] == [(2, 4), (2, 4), (1, 4)]
    assert windows.seconds() == pytest.approx(6.25)  # four windows took 5, the last one counts like one of them


# float32 products of the same numbers in another order
@pytest.mark.parametrize("kind", ["linear", "bias", "embedding", "heads", "experts", "few experts"])
def test_unpacked_modules_compute_what_quantized_ones_do(kind: str) -> None:
    """Values, and gradients of scales and biases through MLX's own quantized products."""
    mx.random.seed(0)
    x, arguments = mx.random.normal((2, 40, 64)), ()
    module: Any = {
        "linear": lambda: nn.Linear(64, 32, bias=False),
        "bias": lambda: nn.Linear(64, 32),
        "embedding": lambda: nn.Embedding(50, 64),
        "heads": lambda: MultiLinear(64, 32, 2),
    }.get(kind, lambda: SwitchGLU(64, 32, 5))()
    if kind == "embedding":
        x = mx.random.randint(0, 50, (2, 40))
    if kind == "heads":
        x = x[None]
    if "experts" in kind:
        x = x if kind == "experts" else x[:, :3]
        arguments = (mx.random.randint(0, 5, (*x.shape[:2], 2)),)
    holder = nn.Sequential(module)
    nn.quantize(holder, 32, 4)
    module, packed = holder.layers[0], list(holder.named_modules())
    unpacked = [(path, m) for path, m in packed if isinstance(m, stock._QUANTIZED)]
    assert unpacked

    def loss(scales: list[mx.array]) -> mx.array:
        for (_, m), each in zip(unpacked, scales, strict=True):
            current = dict(holder.named_modules())
            target = next(current[path] for path, own in unpacked if own is m)
            target.scales = each
        return mx.square(holder.layers[0](x, *arguments)).sum()

    scales = [m.scales for _, m in unpacked]
    wanted = mx.value_and_grad(loss)(scales)
    for (_, m), each in zip(unpacked, scales, strict=True):
        m.scales = each
    holder.update_modules(stock.tree_unflatten([(path, stock.Unpacked(m)) for path, m in unpacked]))
    found = mx.value_and_grad(loss)(scales)
    np.testing.assert_allclose(found[0].item(), wanted[0].item(), rtol=1e-5)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-3, atol=1e-4)


# bench convert --------------------------------------------------------------------------------------------------------


def test_synthetic_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(convert, "run_child", in_process)
    arguments = ["bench", "convert", "--synthetic", "8MB", "--layers", "2", "--bpw", "4.5", "--repeats", "2", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["file_bytes"] == pytest.approx(8e6, rel=0.35)  # a whole number of experts
    assert 0.44 * result["file_bytes"] < result["layer_bytes"] < 0.5 * result["file_bytes"]
    assert result["weights"] == pytest.approx(result["file_bytes"] / 2, rel=0.01)
    assert list(result["subjects"]) == ["mlxmoe convert", "mlx_lm.convert"]
    for each in result["subjects"].values():
        assert each["converted_bytes"] == pytest.approx(result["weights"] * 4.5 / 8, rel=0.05)
        assert (each["peak_rss"], each["peak_above_imports"]) == (300 << 20, 200 << 20)
        assert each["file_over_peak"] == pytest.approx(result["file_bytes"] / (200 << 20), abs=1e-3)
        assert each["weights_per_second"] == round(result["weights"] / 2)
    assert result["ratios"] == {
        "mlxmoe convert / mlx_lm.convert": {
            key: {"of_medians": 1.0, "median_of_pairs": 1.0, "low": 1.0, "high": 1.0} for key in ("seconds", "peak_rss")
        }
    }
    assert list(tmp_path.iterdir()) == []


def test_a_calibrated_conversion_is_taken_apart(source: Path, text: Path, tmp_path: Path) -> None:
    """Every stage is found in the profile of a real conversion, and together they are most of it."""
    arguments = ["convert", str(source), str(tmp_path / "out"), "--bpw", "8"]
    stages = convert.profiled([*arguments, "--calibration", str(text), "--calibration-tokens", "1024"])
    assert list(stages) == ["forward", "backward", "codes", "polish", "all"]
    assert min(stages.values()) > 0
    parts = sum(seconds for name, seconds in stages.items() if name != "all")
    assert 0.5 * stages["all"] < parts < stages["all"]


def test_calibrated_subjects(
    source: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers from two runs of each to the report; who is asked for what."""
    asked: list[tuple[str, tuple[Any, ...]]] = []
    seconds = iter(range(1, 100))

    def run(function: Any, *arguments: Any, imports: tuple[str, ...] = ()) -> Ran:
        asked.append((function.__qualname__, arguments))
        if function is convert.profiled:
            Path(arguments[0][2]).mkdir()
            return Ran({"forward": 2.0, "backward": 4.0, "codes": 8.0, "polish": 0.0, "all": 20.0}, 1.0, 1)
        if function is nothing:
            return Ran(None, 0.0, 50 << 20)
        output = Path(arguments[0][2] if function is main else arguments[2])
        output.mkdir()
        (output / "model").write_bytes(b"1000")
        theirs = 0.25 if function is not main and arguments[0].startswith("gptq") else None
        return Ran(0 if function is main else theirs, float(next(seconds)), (60 << 20) + len(asked))

    monkeypatch.setattr(convert, "run_child", run)
    arguments = ["--calibration", str(text), "--calibration-tokens", "1024", "--bpw", "4.2", "--repeats", "2", "--json"]
    assert main(["bench", "convert", str(source), *arguments]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    names = ["mlxmoe convert", "mlx_lm.convert", "mlxmoe convert --calibration", "mlx_lm.gptq"]
    assert list(result["subjects"]) == names
    # A B C D, D C B A: seconds 1 2 3 4 and 8 7 6 5
    medians = [result["subjects"][name]["seconds"]["median"] for name in names]
    assert medians == [4.5, 4.5, 4.5, 4.5]
    assert result["ratios"]["mlxmoe convert --calibration / mlx_lm.gptq"]["seconds"] == {
        "of_medians": 1.0, "median_of_pairs": pytest.approx((3 / 4 + 6 / 5) / 2, abs=1e-4), "low": 0.75, "high": 1.2,
    }  # fmt: skip
    weights = result["weights"]
    stages = result["subjects"]["mlxmoe convert --calibration"]["stages"]
    assert stages["forward_tokens_per_second"] == 512
    assert stages["backward_tokens_per_second"] == 256
    assert "polish_tokens_per_second" not in stages  # one window
    assert stages["coded_weights_per_second"] == round(weights / 8)
    theirs = result["subjects"]["mlx_lm.gptq"]["stages"]
    assert theirs == {"forward_tokens_per_second": 4096, "coded_weights_per_second": round(weights / 4.25)}
    assert result["subjects"]["mlx_lm.convert"]["peak_above_imports"] == (10 << 20) + 7
    recipes = {arguments[0] for name, arguments in asked if name == "quantize"}
    assert recipes == {"rtn:4:64", "gptq:4:64"}
    assert "the 1024 tokens that mlxmoe gets" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either SRC or --synthetic SIZE"),
        (["model", "--synthetic", "1GB"], "give either SRC or --synthetic SIZE"),
        (["--synthetic", "lots"], "'lots' is not a size"),
        (["--synthetic", "1MB", "--layers", "0"], "--layers is 0, expected 1 or more"),
        (["--synthetic", "1MB", "--repeats", "0"], "--repeats is 0, expected 1 or more"),
        (["--synthetic", "1MB", "--calibration-tokens", "0"], "--calibration-tokens is 0, expected 1 or more"),
        (["--synthetic", "4MB", "--layers", "1", "--calibration", "nothing.txt"], "nothing.txt cannot be read"),
    ],
)
def test_bad_settings(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(convert.tempfile, "tempdir", str(tmp_path))
    assert main(["bench", "convert", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(convert, "run_child", lambda *arguments, imports=(): Ran(1, 0.0, 0))
    assert main(["bench", "convert", "--synthetic", "4MB", "--layers", "1"]) == 1
    assert "mlxmoe convert ended with status 1" in capsys.readouterr().err
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    assert main(["bench", "convert", "--synthetic", "4MB", "--layers", "1"]) == 2
    assert "has 1 B free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# bench quantizers -----------------------------------------------------------------------------------------------------


def test_quantizers(
    source: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of both sides with exact bytes; what does not run says why; what was kept is taken again."""
    made: list[str] = []

    def run(function: Any, *arguments: Any, imports: tuple[str, ...] = ()) -> Ran:
        made.append(arguments[0] if isinstance(arguments[0], str) else arguments[0][0])
        if made[-1] == "convert":  # without text: faster
            arguments = (arguments[0][: arguments[0].index("--calibration")],)
        return in_process(function, *arguments)

    monkeypatch.setattr(quantizers, "run_child", run)
    keep = tmp_path / "kept"
    arguments = ["bench", "quantizers", str(source), "--calibration", str(text), "--text", str(text), "--json"]
    arguments += ["--calibration-tokens", "512", "--max-tokens", "64", "--keep", str(keep)]
    rows = "rtn:2:64,rtn:8:64,awq:4:64,mlxmoe:400kB"
    assert main([*arguments, "--rows", rows]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    by_row = {each["row"]: each for each in result["rows"]}
    assert ",".join(by_row) == rows
    assert made == ["rtn:2:64", "rtn:8:64", "awq:4:64", "convert"]
    assert by_row["awq:4:64"]["refused"] == "mlx_lm.awq does not support qwen3_moe"
    assert by_row["mlxmoe:400kB"]["bytes"] <= 400_000
    for row in ("rtn:2:64", "rtn:8:64"):
        folder = keep / row.replace(":", "-")
        assert by_row[row]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        assert by_row[row]["tokens"] == 64
    assert by_row["rtn:8:64"]["kld_mean"] < 0.1 * by_row["rtn:2:64"]["kld_mean"]
    assert sorted(path.name for path in keep.iterdir()) == ["mlxmoe-400kB", "rtn-2-64", "rtn-8-64"]
    assert main([*arguments, "--rows", "rtn:8:64"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert again["kld_mean"] == by_row["rtn:8:64"]["kld_mean"]
    assert len(made) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "rtn:2:64,nothing:3"], "'nothing:3' is no quantizer"),
        (["--rows", "mlxmoe:lots"], "'lots' is not a size"),
        (["--rows", ""], "--rows names nothing to compare"),
        (["--calibration-tokens", "0"], "--calibration-tokens is 0, expected 1 or more"),
        (["--max-tokens", "-1"], "--max-tokens is -1, expected 1 or more"),
        (["--keep", "absent/models"], "absent/models is no folder and cannot be made one"),
    ],
)
def test_bad_settings_of_quantizers(
    more: list[str], words: str, source: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "quantizers", str(source), "--calibration", str(text), "--text", str(text)]
    assert main([*arguments, *more]) == 2
    assert words in capsys.readouterr().err
