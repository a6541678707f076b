"""Repacking: the very bytes of a checkpoint in records, whole or not at all, on disks that fill up and after kills."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import interrupted
import mlx.core as mx
import pytest
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.utils import load_model
from safetensors.numpy import load_file
from test_stacked import assert_reads_what_the_model_has, fuse, quantized
from toy_checkpoints import (
    convert,
    edit_config,
    edit_weights,
    flip_bit,
    folder_nbytes,
    snapshot,
    write_architecture,
    write_qwen3,
)

from mlxmoe import repack as repack_module
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.models import model_classes
from mlxmoe.reader import Read, Reader
from mlxmoe.repack import Manifest, Repack, RepackedStore, record_name, repacked_class
from mlxmoe.stacked import StackedStore, StockModel, read_layer
from mlxmoe.store import PAGE, read_header
from mlxmoe.work import HashingWriter

MANIFEST = "repack.json"


def repack(source: Path, output: Path, *arguments: str) -> int:
    return main(["repack", str(source), str(output), *arguments])


def refused(capsys: pytest.CaptureFixture[str], source: Path | str, output: Path, *arguments: str) -> str:
    """What a repacking says that is refused."""
    return interrupted.refused(capsys, lambda: repack(Path(source), output, *arguments))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock 4-bit MLX checkpoint. Tests copy it before they damage it."""
    base = tmp_path_factory.mktemp("stock")
    return quantized(write_architecture(base / "plain", "deepseek_v3"), base / "stock")


@pytest.fixture(scope="module")
def repacked(stock: Path) -> Path:
    output = stock.parent / "repacked"
    assert repack(stock, output) == 0
    return output


# What is written --------------------------------------------------------------------------------------------------------


def trunk(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for path in folder.glob("model*.safetensors"):
        tensors.update(mx.load(str(path)))
    return tensors


def assert_repacks(source: Path, output: Path) -> None:
    """Experts and everything else, byte for byte as mlx-lm reads the source."""
    assert repack(source, output) == 0
    store = RepackedStore(output)
    assert_reads_what_the_model_has(source, store)
    model = StockModel(open_checkpoint(source))
    assert store.stock == {layer.site.layer: layer for layer in model.layers}
    for layer in model.layers:
        for name in layer.tensor_names().values():
            del model.tensors[name]
    found = trunk(output)
    assert found.keys() == model.tensors.keys()
    for name, wanted in model.tensors.items():
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
        assert mx.array_equal(found[name].view(mx.uint8), mx.contiguous(wanted).view(mx.uint8)), name
    store.close()


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_plain_weights(case: str, tmp_path: Path) -> None:
    assert_repacks(write_architecture(tmp_path / "plain", case), tmp_path / "out")


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (3, "affine"), (4, "mxfp4")])
@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "nemotron_h"])
def test_quantized_weights(case: str, bits: int, mode: str, tmp_path: Path) -> None:
    source = quantized(write_architecture(tmp_path / "plain", case), tmp_path / "stock", bits, mode)
    assert_repacks(source, tmp_path / "out")


def test_layouts_without_slices(tmp_path: Path) -> None:
    """What StackedStore refuses: fused projections, a tensor per expert in block-scaled fp8."""
    fused = write_architecture(tmp_path / "fused", "qwen3_moe")
    fuse(fused)
    assert_repacks(fused, tmp_path / "out1")
    fp8 = write_qwen3(tmp_path / "fp8", num_hidden_layers=1)

    def change(weights: dict[str, mx.array]) -> None:
        for name in [name for name in weights if ".experts." in name]:
            weights[name] = mx.to_fp8(weights[name])
            weights[f"{name}_scale_inv"] = mx.full((1, 1), 0.5)

    edit_weights(fp8, change)
    edit_config(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert_repacks(fp8, tmp_path / "out2")
    for folder in (fused, fp8):
        with pytest.raises(UserError, match="no slices"):
            StackedStore(open_checkpoint(folder))


def test_a_trunk_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack_module, "TRUNK_FILE_NBYTES", 100_000)
    source = write_qwen3(tmp_path / "source", shard_bytes=400_000)
    assert_repacks(source, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2


@pytest.mark.parametrize(("case", "mode"), [("deepseek_v3", "affine"), ("gpt_oss", "mxfp4"), ("qwen3_next", None)])
def test_loads_whole_with_the_source_s_logits(case: str, mode: str | None, tmp_path: Path) -> None:
    """Through mlx-lm's own loader, the experts from the store: the same bits."""
    source = write_architecture(tmp_path / "plain", case)
    if mode is not None:
        source = quantized(source, tmp_path / "stock", 4, mode)
    assert repack(source, tmp_path / "out") == 0
    store = RepackedStore(tmp_path / "out")

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, arguments = model_classes(config)
        return repacked_class(model_class, store), arguments

    wanted, _ = load_model(source, get_model_classes=model_classes)
    model, _ = load_model(tmp_path / "out", lazy=True, get_model_classes=classes)
    with Reader(2) as reader:
        for layer in store.layers:
            model.update(tree_unflatten(list(read_layer(store, reader, layer.layer).items())))
    store.close()
    for each in (model, wanted):  # the CPU's products want float32
        each.update(tree_map(lambda a: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a, each.parameters()))
    ids = mx.array([[3 + i * 11 % 250 for i in range(20)]])
    assert mx.array_equal(model(ids), wanted(ids))


def test_records_are_aligned_and_plain_safetensors_reads_them(stock: Path, repacked: Path) -> None:
    store, stacked = RepackedStore(repacked), StackedStore(open_checkpoint(stock))
    for path in sorted(repacked.glob("experts-*.safetensors")):
        assert all(info.offset % PAGE == 0 and info.nbytes % PAGE == 0 for info in read_header(path).values())
        assert len(load_file(path)) == 8
    for layer in store.layers:
        for expert in range(layer.num_experts):
            (span,) = store.spans(layer.layer, expert)
            record = load_file(span.file.path)[record_name(layer.layer, expert)].tobytes()
            assert len(record) == span.nbytes
            assert zlib.crc32(record) == span.checks[0].crc32
            assert span.checks[0][:2] == (0, span.nbytes)
            pieces = {
                (part.projection, part.field): span_.file.path.read_bytes()[at : at + part.nbytes]
                for span_ in stacked.spans(layer.layer, expert)
                for at, part in zip([span_.offset], span_.parts, strict=True)
            }
            assert record == b"".join(pieces[p[:2]] for p in span.parts if p.projection >= 0).ljust(len(record), b"\0")
    store.close()
    stacked.close()


def test_folder_is_a_checkpoint(stock: Path, repacked: Path) -> None:
    """The source's side files, its config, and the hash of every file."""
    checkpoint = open_checkpoint(repacked)
    assert checkpoint.kind == "repacked"
    assert checkpoint.config == open_checkpoint(stock).config
    manifest = Manifest.load(repacked)
    assert {*manifest.files, MANIFEST} == {path.name for path in repacked.iterdir()}
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == {
        name: digest for name, digest in snapshot(repacked).items() if name != MANIFEST
    }
    assert manifest.nbytes == folder_nbytes(repacked) - (repacked / MANIFEST).stat().st_size
    assert (repacked / "tokenizer_config.json").is_file()
    assert {name: entry[1] for name, entry in manifest.source["files"].items()} == {
        name: digest for name, digest in snapshot(stock).items() if name in manifest.source["files"]
    }
    assert manifest.source["files"].keys() == {"config.json", "model.safetensors"}


def test_config_says_nothing_of_single_experts(tmp_path: Path) -> None:
    """A mixed recipe names the experts' modules; the model around them has none of these."""
    source = quantized(write_architecture(tmp_path / "plain", "gpt_oss"), tmp_path / "stock")
    config = json.loads((source / "config.json").read_text())
    path = "model.layers.0.mlp.experts.gate_proj"
    edit_config(source, quantization={**config["quantization"], path: {"bits": 4, "group_size": 32}})
    assert_repacks(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"] == config["quantization"]


def test_same_source_same_bytes(stock: Path, repacked: Path, tmp_path: Path) -> None:
    assert repack(stock, tmp_path / "out") == 0
    assert snapshot(tmp_path / "out") == snapshot(repacked)


def test_json_and_dry_run(stock: Path, repacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repack(stock, tmp_path / "out", "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    planned = json.loads(captured.out.splitlines()[-1])
    assert not list(tmp_path.iterdir())
    assert "deepseek_v3, 2 layers" in captured.err
    assert planned["dry_run"]
    assert planned["bytes"] == Manifest.load(repacked).nbytes
    assert planned["bytes_experts"] == sum(path.stat().st_size for path in repacked.glob("experts-*"))
    assert planned["bytes_trunk"] == sum(path.stat().st_size for path in repacked.glob("model*"))
    assert (planned["layers"], planned["experts"]) == (2, 16)
    assert repack(stock, tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {**planned, "dry_run": False}
    assert repack(stock, tmp_path / "again", "--dry-run") == 0
    assert capsys.readouterr().out == "would write 357 kB\n"


# What is refused --------------------------------------------------------------------------------------------------------


def test_sources_that_cannot_be_repacked(
    stock: Path, repacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = stock.parent / "plain"
    assert convert(plain, tmp_path / "converted", "--bpw", "9") == 0
    assert "is converted already" in refused(capsys, tmp_path / "converted", tmp_path / "out")
    assert "is repacked already" in refused(capsys, repacked, tmp_path / "out")
    dense = shutil.copytree(plain, tmp_path / "dense")
    edit_config(dense, model_type="llama")
    assert "is not a Mixture-of-Experts model" in refused(capsys, dense, tmp_path / "out")
    truncated = shutil.copytree(stock, tmp_path / "truncated")
    os.truncate(truncated / "model.safetensors", 100_000)
    assert "has 100000 bytes, its header says" in refused(capsys, truncated, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_outputs_that_cannot_be_written(stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    assert "out exists already" in refused(capsys, stock, tmp_path / "out")
    assert "out exists already" in refused(capsys, stock, tmp_path / "out", "--resume")
    assert "exists already" in refused(capsys, stock, Path("."))
    assert "there is no folder" in refused(capsys, stock, tmp_path / "no" / "out")
    assert "no unfinished repacking" in refused(capsys, stock, tmp_path / "new", "--resume")
    assert snapshot(tmp_path) == before


def test_damage_of_a_repacked_folder(repacked: Path, tmp_path: Path) -> None:
    def damaged(change: Callable[[Path], Any]) -> str:
        copy = shutil.copytree(repacked, tmp_path / "copy")
        change(copy)
        before = len(os.listdir("/dev/fd"))
        with pytest.raises(UserError) as error:
            RepackedStore(copy)
        assert len(os.listdir("/dev/fd")) == before
        shutil.rmtree(copy)
        return error.value.message

    def edit(**changes: Any) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            data = {**json.loads((folder / MANIFEST).read_text()), **changes}
            (folder / MANIFEST).write_text(json.dumps(data))

        return change

    def edit_layer(**changes: Any) -> Callable[[Path], Any]:
        layers = json.loads((repacked / MANIFEST).read_text())["layers"]
        return edit(layers=[{**layers[0], **changes}, *layers[1:]])

    second = "experts-00002-of-00002.safetensors"
    assert "is missing" in damaged(lambda f: (f / second).unlink())
    assert "its header says" in damaged(lambda f: os.truncate(f / second, PAGE * 3))
    assert "is not valid JSON" in damaged(lambda f: (f / MANIFEST).write_text("{"))
    assert "is not text" in damaged(lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"))
    assert "is not a manifest" in damaged(edit(format="mlxmoe-plan"))
    assert "format version 2, this mlxmoe reads up to 1" in damaged(edit(version=2))
    assert "is damaged" in damaged(edit(version="1"))
    assert "is damaged" in damaged(edit(layers=[{}]))
    assert "3 projections and 1 checksums" in damaged(edit_layer(crc32=[1]))
    assert "is damaged" in damaged(edit_layer(kind="other"))
    assert "has nothing for L1.E8" in damaged(edit_layer(num_experts=9, crc32=[0] * 9))
    projections = json.loads((repacked / MANIFEST).read_text())["layers"][0]["projections"]
    projections[0]["fields"][0][3] += 4
    assert "is damaged" in damaged(edit_layer(projections=projections))
    projections[0]["fields"][0][2:] = [[96, 8, 2], 96 * 8 * 2 * 4]
    assert "repack.json says 16384 bytes" in damaged(edit_layer(projections=projections))


def test_damage_of_a_record(repacked: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(repacked, tmp_path / "copy")
    info = read_header(copy / "experts-00001-of-00002.safetensors")["L1.E3"]
    flip_bit(copy / "experts-00001-of-00002.safetensors", info.offset + 1000)
    store = RepackedStore(copy)
    with Reader(1) as reader:
        assert reader.submit([Read(*store.spans(1, 2))]).wait()
        with pytest.raises(UserError, match="layer 1, expert 3 has a wrong checksum"):
            reader.submit([Read(*store.spans(1, 3))]).wait()
    store.close()


# A disk that fills up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [100, 600, 20_000, 110_000, 250_000, 350_000, 358_000])
def test_disk_full_at_any_byte(
    nbytes: int,
    stock: Path,
    repacked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the work folder's own files and in every kind of result."""
    with interrupted.full_disk(monkeypatch, nbytes):
        assert "the disk is full" in refused(capsys, stock, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = snapshot(tmp_path / "out.partial")
    assert not [name for name in before if name.endswith(".tmp")]
    assert repack(stock, tmp_path / "out", "--resume") == 0
    whole = snapshot(repacked)
    assert snapshot(tmp_path / "out") == whole
    assert all(before[name] == whole[name] for name in before if name in whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 200 kB."""
    with interrupted.mounted(tmp_path / "disk", "200k") as folder:
        yield folder


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
@pytest.mark.parametrize("known", [True, False], ids=["seen before writing", "seen while writing"])
def test_real_full_disk(
    known: bool,
    small_disk: Path,
    stock: Path,
    repacked: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        if not known:
            usage = shutil.disk_usage(small_disk)._replace(free=10**12)
            patched.setattr(shutil, "disk_usage", lambda path: usage)
        message = refused(capsys, stock, small_disk / "out")
    assert ("free, the result needs" if known else "the disk is full") in message
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert repack(stock, small_disk / "out", "--resume") == 0
    assert snapshot(small_disk / "out") == snapshot(repacked)


def test_other_faults_of_the_disk_are_not_called_full(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: HashingWriter, data: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(HashingWriter, "write", broken)
    assert repack(stock, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "full" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


# Processes that are killed ----------------------------------------------------------------------------------------------


def test_killed_at_every_step(stock: Path, repacked: Path, tmp_path: Path) -> None:
    # job; 2 experts files and the trunk with a note each; side files; repack.json
    last = 1 + 2 * 3 + len(open_side_files(repacked)) + 1
    interrupted.check_killed_at_every_step("mlxmoe.repack", ["repack", str(stock)], last, repacked, tmp_path)


def open_side_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".safetensors" and path.name != MANIFEST]


# Resuming ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """out.partial as Ctrl-C behind the experts leaves it; returns where `out` would be."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Repack, "_write_shard", stop)
        assert repack(stock, tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def test_unfinished_work_is_kept_and_gone_on_with(
    stock: Path, repacked: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(unfinished.parent)
    assert "holds an unfinished repacking" in refused(capsys, stock, unfinished)
    assert snapshot(unfinished.parent) == before
    partial = unfinished.with_name("out.partial")
    inodes = {path.name: path.stat().st_ino for path in partial.glob("experts-*")}
    assert len(inodes) == 2
    assert repack(stock, unfinished, "--resume") == 0
    assert {path.name: path.stat().st_ino for path in unfinished.glob("experts-*")} == inodes
    assert snapshot(unfinished) == snapshot(repacked)


@pytest.mark.parametrize("what", ["config.json", "model.safetensors"])
def test_another_source_is_refused(
    what: str, stock: Path, repacked: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By content: the same sizes and names do not make it the same source, a copy with other times does."""
    other = shutil.copytree(stock, unfinished.parent / "other")
    if what == "config.json":
        edit_config(other, rope_theta=12345.0)
    else:
        flip_bit(other / what, -1)
    before = snapshot(unfinished.with_name("out.partial"))
    message = refused(capsys, other, unfinished, "--resume")
    assert message.endswith(f"out.partial was started with other {what}")
    assert snapshot(unfinished.with_name("out.partial")) == before
    shutil.rmtree(other)
    same = shutil.copytree(stock, unfinished.parent / "stock")
    os.utime(same / "model.safetensors")
    assert repack(same, unfinished, "--resume") == 0
    assert snapshot(unfinished) == snapshot(repacked)


def test_another_version_is_refused(
    stock: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repack_module, "__version__", "99.0")
    assert re.search(r"started with other mlxmoe \d", refused(capsys, stock, unfinished, "--resume"))


def test_complete_work_of_another_source(
    stock: Path, repacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped before the last rename: the manifest that is there says what it was."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stop)
        assert repack(stock, tmp_path / "out") == 130
    other = shutil.copytree(stock, tmp_path / "other")
    flip_bit(other / "model.safetensors", -1)
    assert "other model.safetensors" in refused(capsys, other, tmp_path / "out", "--resume")
    monkeypatch.setattr(Repack, "_write", stop)  # nothing is done again
    assert repack(stock, tmp_path / "out", "--resume") == 0
    assert snapshot(tmp_path / "out") == snapshot(repacked)


def test_two_processes_on_one_folder(stock: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    descriptor = os.open(unfinished.with_name("out.partial") / "state", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process works on" in refused(capsys, stock, unfinished, "--resume")
    os.close(descriptor)
    assert repack(stock, unfinished, "--resume") == 0


def test_source_that_changes_meanwhile(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(stock, tmp_path / "source")
    write_shard = Repack._write_shard

    def change(self: Repack, shard: Any) -> Any:
        flip_bit(source / "model.safetensors", -1)
        return write_shard(self, shard)

    monkeypatch.setattr(Repack, "_write_shard", change)
    assert "model.safetensors was changed while it was repacked" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_that_is_truncated_meanwhile(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(stock, tmp_path / "source")
    write_layer = Repack._write_layer

    def truncate(self: Repack, layer: Any) -> Any:
        os.truncate(source / "model.safetensors", 10_000)
        return write_layer(self, layer)

    monkeypatch.setattr(Repack, "_write_layer", truncate)
    assert "cannot be read" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
