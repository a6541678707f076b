"""Converting what cannot be converted, on disks that fill up, in processes that are killed: nothing is lost or left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import interrupted
import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import (
    SMALL,
    convert,
    edit_config,
    edit_weights,
    flip_bit,
    folder_nbytes,
    load_plan,
    run_child,
    snapshot,
    write_qwen3,
)

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.config import ConvertConfig, parse_rule
from mlxmoe.convert.job import Job
from mlxmoe.convert.measure import unmeasured
from mlxmoe.convert.source import Source
from mlxmoe.errors import UserError
from mlxmoe.work import HashingWriter

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one shard. Tests copy it before they damage it."""
    return write_qwen3(tmp_path_factory.mktemp("faults") / "source", num_hidden_layers=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("sharded") / "source", shard_bytes=400_000, num_hidden_layers=2)


@pytest.fixture(scope="module")
def reference(source: Path) -> dict[str, str]:
    """What an uninterrupted conversion writes: SHA-256 of each file."""
    output = source.parent / "reference"
    assert convert(source, output, "--bpw", "5") == 0
    return snapshot(output)


def refused(capsys: pytest.CaptureFixture[str], source: Path | str, output: Path, *arguments: str) -> str:
    """What a conversion says that is refused."""
    return interrupted.refused(capsys, lambda: convert(Path(source), output, *(arguments or ("--bpw", "5"))))


# Sources --------------------------------------------------------------------------------------------------------------


def _weights_file(folder: Path) -> Path:
    return next(folder.glob("model-*.safetensors"))


def _truncate(nbytes: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(_weights_file(folder), nbytes)


def _set(name: str, shape: tuple[int, ...] | None) -> Callable[[Path], None]:
    """Gives a tensor another shape, or (None) takes it out."""

    def change(weights: dict[str, mx.array]) -> None:
        weights.pop(name, None)
        if shape is not None:
            weights[name] = mx.zeros(shape, mx.bfloat16)

    return lambda folder: edit_weights(folder, change)


def _not_finite(name: str, value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, mx.array]) -> None:
        values = np.array(weights[name].astype(mx.float32))
        values.flat[3] = value
        weights[name] = mx.array(values).astype(weights[name].dtype)

    return lambda folder: edit_weights(folder, change)


def _widened(folder: Path) -> None:
    """All experts of one projection have another shape, so that they still make a stack."""

    def change(weights: dict[str, mx.array]) -> None:
        for e in range(8):
            weights[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] = mx.zeros((128, 64), mx.bfloat16)

    edit_weights(folder, change)


def _index(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / INDEX).write_text(text)


def _config(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(text)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dense model": (lambda f: edit_config(f, model_type="llama"), "'llama' is not a Mixture-of-Experts model"),
    "unknown architecture": (
        lambda f: edit_config(f, model_type="hyper_moe"),
        "unknown architecture 'hyper_moe'; known: .*deepseek_v3.*qwen3_moe",
    ),
    "truncated": (_truncate(200_000), r"model-00001-of-00001.safetensors has 200000 bytes, its header says \d+"),
    "truncated in its header": (_truncate(100), "is not a safetensors file"),
    "empty file": (_truncate(0), "is not a safetensors file"),
    "bit of the header's length": (lambda f: flip_bit(_weights_file(f), 1, 3), "has a damaged header"),
    "bit of the header's syntax": (lambda f: flip_bit(_weights_file(f), 8, 3), "has a damaged header"),
    "bit of a tensor's name": (
        lambda f: flip_bit(_weights_file(f), 60, 3),
        "lacks the tensor model.embed_tokens.weight",
    ),
    "NaN in an expert": (_not_finite(EXPERT, np.nan), r"model\.layers\.1.*up_proj.* not finite in expert 3"),
    "infinity in an expert": (_not_finite(EXPERT, np.inf), r"model\.layers\.1.*up_proj.* not finite in expert 3"),
    "NaN in the head": (_not_finite("lm_head.weight", np.nan), "lm_head.weight has values that are not finite"),
    "NaN in a norm": (_not_finite("model.norm.weight", np.nan), "model.norm.weight has values that are not finite"),
    "NaN in a router": (
        _not_finite("model.layers.0.mlp.gate.weight", np.nan),
        "mlp.gate.weight has values that are not",
    ),
    "shape of one expert": (_set(EXPERT, (128, 64)), "tensors do not have the shapes that config.json says"),
    "shape of all experts": (_widened, r"up_proj.weight has shape \(8, 128, 64\), config.json says \(8, 128, 128\)"),
    "shape of a norm": (
        _set("model.norm.weight", (64,)),
        r"model.norm.weight has shape \(64,\), config.json says \(128,\)",
    ),
    "tensor missing": (_set("model.norm.weight", None), "lacks the tensor model.norm.weight"),
    "expert missing": (
        _set(EXPERT, None),
        "up_proj.weight: the checkpoint has 7 experts, config.json says 8; expert 3 is",
    ),
    "tensor too many": (_set("model.ghost.weight", (8,)), "that its architecture does not use, such as model.ghost"),
    "expert too many": (_set(EXPERT.replace("3", "8"), (128, 128)), "has 9 experts, config.json says 8"),
    "more layers in the config": (lambda f: edit_config(f, num_hidden_layers=3), r"lacks the tensor model.layers.2"),
    "index that is no JSON": (_index("{"), "model.safetensors.index.json is damaged"),
    "index that is no object": (_index("[]"), "model.safetensors.index.json is damaged"),
    "index of mixed types": (_index('{"weight_map": {"a": 1, "b": "c"}}'), "lacks 2 of 2 weight files"),
    "no weights": (lambda f: (_weights_file(f).unlink(), (f / INDEX).unlink()), "has no model"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config that is no JSON": (_config("{"), "config.json is not valid JSON"),
    "config that is no object": (_config("[]"), "config.json names no model_type"),
    "config without a width": (
        lambda f: edit_config(f, hidden_size=None),
        "config.json of qwen3_moe has no hidden_size",
    ),
    "config with a word for a number": (lambda f: edit_config(f, hidden_size="a"), "hidden_size is 'a'"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_source(what: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = DAMAGE[what]
    folder = shutil.copytree(source, tmp_path / "source")
    damage(folder)
    before = snapshot(tmp_path)
    assert re.search(expected, refused(capsys, folder, tmp_path / "out"))
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_any_flipped_bit_of_the_header_is_found(tmp_path: Path) -> None:
    """Every 101st bit of the header, beside the metadata that nobody reads: refused when the source is opened."""
    folder = write_qwen3(
        tmp_path / "source", num_hidden_layers=1, num_experts=2, hidden_size=32, moe_intermediate_size=32
    )
    path = _weights_file(folder)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    start = whole.index(b"}", 0, end) + 1  # behind {"__metadata__": {...}
    for bit in range(8 * start, 8 * end, 101):
        flip_bit(path, bit // 8, bit % 8)
        with pytest.raises(UserError):
            Source(open_checkpoint(folder), 128)
        path.write_bytes(whole)
    Source(open_checkpoint(folder), 128)


def test_shard_missing(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(sharded, tmp_path / "source")
    (folder / "model-00003-of-00005.safetensors").unlink()
    message = refused(capsys, folder, tmp_path / "out")
    assert message.endswith("lacks 1 of 5 weight files, the first is model-00003-of-00005.safetensors")


@pytest.mark.parametrize(("dims", "columns"), [({"moe_intermediate_size": 100}, 100), ({"hidden_size": 80}, 80)])
def test_dimensions_that_no_group_size_divides(
    dims: dict[str, int], columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_qwen3(tmp_path / "source", num_hidden_layers=1, **dims)
    message = refused(capsys, folder, tmp_path / "out")
    assert f"{columns} input columns cannot be quantized: no group size of 32, 64 or 128 divides it" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_source_that_is_converted_already(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "once", "--bpw", "5") == 0
    assert "is already converted" in refused(capsys, tmp_path / "once", tmp_path / "twice")
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_source_that_is_not_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in refused(capsys, tmp_path / "nothing", tmp_path / "out")
    assert "is a file, not a model folder" in refused(capsys, source / "config.json", tmp_path / "out")


def test_hub_without_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A child, because huggingface_hub reads HF_HUB_OFFLINE when it is imported."""
    code = "import sys; from mlxmoe.cli import main; sys.exit(main(sys.argv[1:]))"
    child = run_child(code, "convert", "someone/some-moe", str(tmp_path / "out"), "--bpw", "5")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(child, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    message, hint = done.stderr.splitlines()[-2:]
    assert "cannot download 'someone/some-moe' from the Hub" in message
    assert "network" in hint
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("error", [OSError("no route to host"), ConnectionResetError("reset")])
def test_hub_that_fails(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "cannot download 'someone/some-moe' from the Hub" in refused(capsys, "someone/some-moe", tmp_path / "out")


# What is asked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bits", "router=4"], "--bits 'router=4' is not CLASS=BITS"),
        (["--bits", "head"], "--bits 'head' is not CLASS=BITS"),
        (["--bits", "head=²"], "--bits 'head=²' is not CLASS=BITS"),
        (["--bits", "head=7"], "--bits 'head=7': no width among 2, 3, 4, 5, 6, 8, 16 fits"),
        (["--bits", "head=8-6"], "--bits 'head=8-6': no width"),
        (["--bits", "head=8", "--bits", "head=4"], "--bits is given twice for head"),
        (["--expert-bits", "2,5"], r"expert levels \[5\] are not among 2, 3, 4, 6, 8, 16"),
        (["--expert-bits", "two"], "--expert-bits 'two' is no list of numbers"),
        (["--expert-bits", ""], "--expert-bits '' is no list of numbers"),
        (["--group-size", "48"], "group size 48 is not one of 32, 64, 128"),
        (["--bpw", "0"], "--bpw 0.0 is not between 1 and 32"),
        (["--bpw", "nan"], "--bpw nan is not between 1 and 32"),
        (["--size", "0"], "found 0"),
        (["--size", "nine"], "'nine' is not a size"),
        (["--size", ""], "a conversion needs a size"),
        (["--seed", "-1"], "--seed -1 is not between 0 and 4294967295"),
        (["--seed", "4294967296"], "--seed 4294967296 is not between"),
    ],
)
def test_bad_settings(
    arguments: list[str], expected: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sized = arguments if arguments[0] in ("--bpw", "--size") else [*arguments, "--bpw", "5"]
    message = refused(capsys, source, tmp_path / "out", *sized)
    assert re.search(expected, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--size", "9GB", "--bpw", "3"], ["--bpw", "5", "--resume", "--restart"]])
def test_arguments_that_exclude_each_other(arguments: list[str], source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert(source, tmp_path / "out", *arguments)
    assert stopped.value.code == 2


def test_a_configuration_needs_a_size() -> None:
    with pytest.raises(UserError, match="needs a size"):
        ConvertConfig()
    with pytest.raises(UserError, match="needs a size"):
        ConvertConfig(bpw=3, target_nbytes=10**9)
    assert parse_rule("embedding=4-6") == ("embedding", (4, 6))


def test_size_below_the_smallest(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before anything is measured or made; the size that the hint names works, as do those between."""
    message = refused(capsys, source, tmp_path / "out", "--size", "100kB")
    assert "100 kB is below the smallest possible size of this model" in message
    assert not list(tmp_path.iterdir())
    job = Job(source, tmp_path / "out", ConvertConfig(target_nbytes=100_000), quiet=True)
    with pytest.raises(UserError) as too_small:
        job._allocator(unmeasured(job.source, job.config)).check_size()
    least = int(too_small.value.hint.split("--size ")[1].split("kB")[0]) * 1000
    for size in (least - 1000, least - 500, least - 100, least, least + 300):
        status = convert(source, tmp_path / "out", "--size", f"{size}B")
        assert not (tmp_path / "out.partial").exists()
        assert status == (0 if size >= least else status)
        if status == 0:
            assert folder_nbytes(tmp_path / "out") <= size
            shutil.rmtree(tmp_path / "out")


def test_output_exists(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    for arguments in (["--bpw", "5"], ["--bpw", "5", "--restart"], ["--bpw", "5", "--resume"]):
        assert "out exists already" in refused(capsys, source, tmp_path / "out", *arguments)
    assert "exists already" in refused(capsys, source, Path("."), "--bpw", "5")
    assert snapshot(tmp_path) == before


def test_parent_of_output_missing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in refused(capsys, source, tmp_path / "no" / "out")
    assert not list(tmp_path.iterdir())


# A disk that fills up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [100, 2_500, 6_000, 30_000, 150_000, 330_000, 574_000])
def test_disk_full_at_any_byte(
    nbytes: int,
    source: Path,
    reference: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the work folder's own files and in every kind of result."""
    with interrupted.full_disk(monkeypatch, nbytes):
        message = refused(capsys, source, tmp_path / "out")
    assert "the disk is full" in message
    assert not (tmp_path / "out").exists()
    before = snapshot(tmp_path / "out.partial")
    assert not [name for name in before if name.endswith(".tmp")]
    assert convert(source, tmp_path / "out", "--bpw", "5", "--resume") == 0
    assert snapshot(tmp_path / "out") == reference
    kept = {name for name in before if name in reference}
    assert all(before[name] == reference[name] for name in kept)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 400 kB."""
    with interrupted.mounted(tmp_path / "disk", "400k") as folder:
        yield folder


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
@pytest.mark.parametrize("known", [True, False], ids=["seen before writing", "seen while writing"])
def test_real_full_disk(
    known: bool,
    small_disk: Path,
    source: Path,
    reference: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real ENOSPC: before a file is written the free space is looked at, but another program may take it later."""
    with monkeypatch.context() as patched:
        if not known:
            usage = shutil.disk_usage(small_disk)._replace(free=10**12)
            patched.setattr(shutil, "disk_usage", lambda path: usage)
        message = refused(capsys, source, small_disk / "out")
    assert ("the disk is full" if not known else "free, the result needs") in message
    before = snapshot(small_disk / "out.partial")
    assert not [name for name in before if name.endswith(".tmp")]
    assert any(name in reference for name in before) == (not known)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    inodes = {path.name: path.stat().st_ino for path in (small_disk / "out.partial").glob("experts-*")}
    assert convert(source, small_disk / "out", "--bpw", "5", "--resume") == 0
    assert snapshot(small_disk / "out") == reference
    assert all((small_disk / "out" / name).stat().st_ino == inode for name, inode in inodes.items())


def test_other_faults_of_the_disk_are_not_called_full(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: HashingWriter, data: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(HashingWriter, "write", broken)
    assert convert(source, tmp_path / "out", "--bpw", "5") == 1
    error = capsys.readouterr().err
    assert "full" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


# Processes that are killed --------------------------------------------------------------------------------------------


def test_killed_at_every_step(tmp_path: Path) -> None:
    source = write_qwen3(tmp_path / "source", **SMALL)
    assert convert(source, tmp_path / "whole", "--bpw", "6") == 0
    # job; rotation and errors of 2 layers, the trunk measured; plan; 2 experts files and the trunk with a note each; 3 side
    # files; plan
    last = 1 + 2 * 2 + 1 + 1 + 2 * 3 + 3 + 1
    (tmp_path / "work").mkdir()
    words = ["convert", str(source), "--bpw", "6"]
    interrupted.check_killed_at_every_step("mlxmoe.convert.cli", words, last, tmp_path / "whole", tmp_path / "work")


def _start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from mlxmoe.cli import main; sys.exit(main(sys.argv[1:]))"
    child = run_child(code, "convert", str(source), str(output), "--bpw", "6")
    return subprocess.Popen(child, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("layers") / "source", num_hidden_layers=6, num_experts=4)


def test_killed_from_outside_at_random(many_layers: Path, tmp_path: Path) -> None:
    assert convert(many_layers, tmp_path / "whole", "--bpw", "6") == 0
    for seed in range(2):
        output = tmp_path / f"out{seed}"
        with _start(many_layers, output) as child:
            _wait_for(tmp_path / f"out{seed}.partial" / "state" / "measure-0.npz")
            time.sleep(random.Random(seed).uniform(0, 0.25))
            child.kill()
        assert child.returncode == -signal.SIGKILL
        assert not output.exists()
        assert convert(many_layers, output, "--bpw", "6", "--resume") == 0
        assert snapshot(output) == snapshot(tmp_path / "whole")


def test_two_converters_of_one_folder(many_layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused, whatever it wants, and the first goes on as if nothing had been."""
    output = tmp_path / "out"
    with _start(many_layers, output) as child:
        try:
            _wait_for(tmp_path / "out.partial" / "state" / "measure-1.npz")
            child.send_signal(signal.SIGSTOP)
            before = snapshot(tmp_path / "out.partial")
            assert "holds an unfinished conversion" in refused(capsys, many_layers, output, "--bpw", "6")
            for wish in ("--resume", "--restart"):
                message = refused(capsys, many_layers, output, "--bpw", "6", wish)
                assert "another process works on" in message
            assert snapshot(tmp_path / "out.partial") == before
        except BaseException:
            child.kill()  # a stopped child would be waited for without end
            raise
        child.send_signal(signal.SIGCONT)
    assert child.returncode == 0
    assert load_plan(output).files.keys() == {path.name for path in output.iterdir()} - {"plan.json"}


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """out.partial as a stop behind the first experts file leaves it; returns where `out` would be."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.write_shard", stop)
        assert convert(source, tmp_path / "out", "--bpw", "5") == 130
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def test_unfinished_work_is_not_touched_without_resume(
    source: Path, unfinished: Path, reference: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(unfinished.parent)
    assert "holds an unfinished conversion" in refused(capsys, source, unfinished)
    assert snapshot(unfinished.parent) == before
    assert convert(source, unfinished, "--bpw", "5", "--resume") == 0
    assert snapshot(unfinished) == reference


def test_restart_starts_over(source: Path, unfinished: Path, tmp_path: Path) -> None:
    assert convert(source, unfinished, "--bpw", "6", "--restart") == 0
    assert convert(source, tmp_path / "direct", "--bpw", "6") == 0
    assert snapshot(unfinished) == snapshot(tmp_path / "direct")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "direct"}


def test_restart_with_nothing_there(source: Path, tmp_path: Path, reference: dict[str, str]) -> None:
    assert convert(source, tmp_path / "out", "--bpw", "5", "--restart") == 0
    assert snapshot(tmp_path / "out") == reference


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--bpw", "6"], "other bpw"),
        (["--size", "600kB"], "other bpw and target_nbytes"),
        (["--bpw", "5", "--group-size", "64"], "other group_size"),
        (["--bpw", "5", "--expert-bits", "2,3,4"], "other expert_levels"),
        (["--bpw", "5", "--bits", "head=8"], "other rules.head"),
        (["--bpw", "5", "--seed", "3"], "other seed"),
    ],
)
def test_resume_with_other_settings(
    arguments: list[str], changed: str, source: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(unfinished.parent)
    message = refused(capsys, source, unfinished, *arguments, "--resume")
    assert message.endswith(f"was started with {changed}")
    assert snapshot(unfinished.parent) == before


def test_resume_with_another_source(unfinished: Path, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "was started with other source" in refused(capsys, sharded, unfinished, "--bpw", "5", "--resume")


def test_resume_with_nothing_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no unfinished conversion" in refused(capsys, source, tmp_path / "out", "--bpw", "5", "--resume")
    assert not list(tmp_path.iterdir())


def test_resume_of_published_work_with_other_settings(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped behind the last file and before the rename: the plan that is there says what it was."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stop)
        assert convert(source, tmp_path / "out", "--bpw", "5") == 130
    assert not (tmp_path / "out.partial" / "state").exists()
    message = refused(capsys, source, tmp_path / "out", "--bpw", "6", "--resume")
    assert message.endswith("was started with other bpw")
    monkeypatch.setattr("mlxmoe.convert.job.measure_layer", stop)  # nothing is done again
    assert convert(source, tmp_path / "out", "--bpw", "5", "--resume", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bytes"] == folder_nbytes(tmp_path / "out")


def test_lock_goes_with_the_process(source: Path, unfinished: Path, reference: dict[str, str]) -> None:
    """A lock held elsewhere refuses; once released, the work goes on."""
    descriptor = os.open(unfinished.with_name("out.partial") / "state", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert convert(source, unfinished, "--bpw", "5", "--resume") == 2
    os.close(descriptor)
    assert convert(source, unfinished, "--bpw", "5", "--resume") == 0
    assert snapshot(unfinished) == reference
