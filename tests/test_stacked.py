"""Experts of checkpoints as they stand: the very bytes that mlx-lm would load, found by offset, for every layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert as mlx_lm_convert
from toy_checkpoints import edit_config, edit_weights, write_architecture, write_qwen3

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.errors import UserError
from mlxmoe.reader import Reader
from mlxmoe.stacked import StackedStore, StockMatrix, StockModel, StockSource, read_layer

ARCHITECTURES = (
    "deepseek_v2", "deepseek_v3", "gemma4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "mixtral", "nemotron_h", "olmoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip
QUANTIZED = ("deepseek_v3", "gpt_oss", "nemotron_h", "qwen2_moe")  # those whose toy configs stock mlx-lm reads


def quantized(source: Path, output: Path, bits: int = 4, mode: str = "affine", group_size: int = 32) -> Path:
    mlx_lm_convert(str(source), str(output), quantize=True, q_bits=bits, q_group_size=group_size, q_mode=mode)
    return output


def assert_reads_what_the_model_has(folder: Path, source: StockSource) -> None:
    """Every byte of every expert, against mlx-lm's own reading and sanitizing of the source folder."""
    model = StockModel(open_checkpoint(folder))
    assert [layer.layer for layer in source.layers] == [layer.site.layer for layer in model.layers]
    with Reader(2) as reader:
        for layer in model.layers:
            arrays = read_layer(source, reader, layer.site.layer)
            assert list(arrays) == list(layer.tensor_names().values())
            for name, array in arrays.items():
                wanted = mx.contiguous(model.tensors[name])
                assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
                assert mx.array_equal(array.view(mx.uint8), wanted.view(mx.uint8)), name


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_plain_weights(case: str, tmp_path: Path) -> None:
    folder = write_architecture(tmp_path / case, case)
    store = StackedStore(open_checkpoint(folder))
    assert_reads_what_the_model_has(folder, store)
    (layer, *_), matrices = store.layers, store.stock[store.layers[0].layer].matrices
    assert {(m.mode, m.bits, m.group_size) for m in matrices} == {("dense", 16, 0)}
    assert [part.field for span in store.spans(layer.layer, 0) for part in span.parts] == ["weight"] * len(matrices)
    store.close()


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (3, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8")])
@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights(case: str, bits: int, mode: str, tmp_path: Path) -> None:
    folder = quantized(write_architecture(tmp_path / "plain", case), tmp_path / "stock", bits, mode)
    store = StackedStore(open_checkpoint(folder))
    assert_reads_what_the_model_has(folder, store)
    stock = store.stock[store.layers[0].layer]
    assert {(m.mode, m.bits, m.group_size) for m in stock.matrices} == {(mode, bits, 32)}
    fields = ["weight", "scales", *(["biases"] if mode == "affine" else [])]
    assert [[field.name for field in m.fields] for m in stock.matrices] == [fields] * len(stock.matrices)
    store.close()


def test_facts_of_a_matrix(tmp_path: Path) -> None:
    """Worked by hand: 96 rows of 64 columns at 4 bits, bfloat16 scales and biases per 32."""
    folder = quantized(write_architecture(tmp_path / "plain", "deepseek_v3"), tmp_path / "stock")
    store = StackedStore(open_checkpoint(folder))
    gate, _, down = next(iter(store.stock.values())).matrices
    weight, scales, biases = gate.fields
    assert gate == StockMatrix("gate_proj", 96, 64, 4, 32, "affine", gate.fields)
    assert weight == ("weight", "U32", (96, 8), 96 * 64 // 2)
    assert scales == ("scales", "BF16", (96, 2), 96 * 2 * 2)
    assert biases == ("biases", "BF16", (96, 2), 96 * 2 * 2)
    assert (down.rows, down.columns) == (64, 96)
    store.close()


def test_experts_at_different_bits(tmp_path: Path) -> None:
    """A mixed recipe: config.json names single tensors."""

    def recipe(path: str, module: Any) -> bool | dict[str, Any]:
        return {"bits": 8 if "down_proj" in path else 4, "group_size": 32} if hasattr(module, "to_quantized") else False

    source = write_architecture(tmp_path / "plain", "olmoe", moe_intermediate_size=64, intermediate_size=64)
    mlx_lm_convert(str(source), str(tmp_path / "stock"), quantize=True, quant_predicate=recipe)
    store = StackedStore(open_checkpoint(tmp_path / "stock"))
    assert_reads_what_the_model_has(tmp_path / "stock", store)
    assert [m.bits for m in store.stock[0].matrices] == [4, 4, 8]
    store.close()


def test_a_tensor_per_expert(tmp_path: Path) -> None:
    """As Hugging Face has them: neighbours in a file come in one read, also where a shard ends among the experts."""
    folder = write_qwen3(tmp_path / "whole")
    store = StackedStore(open_checkpoint(folder))
    assert_reads_what_the_model_has(folder, store)
    assert {len(store.spans(layer.layer, e)) for layer in store.layers for e in range(layer.num_experts)} == {1}
    store.close()
    folder = write_qwen3(tmp_path / "shards", shard_bytes=400_000)
    store = StackedStore(open_checkpoint(folder))
    assert_reads_what_the_model_has(folder, store)
    assert {len(store.spans(layer.layer, e)) for layer in store.layers for e in range(layer.num_experts)} == {1, 2}
    store.close()


def test_stacks_in_several_shards(tmp_path: Path) -> None:
    folder = quantized(write_architecture(tmp_path / "plain", "olmoe"), tmp_path / "stock")
    (single,) = folder.glob("model*.safetensors")
    weights = dict(mx.load(str(single)))
    names = sorted(weights)
    for i in range(3):
        mx.save_safetensors(str(folder / f"model-0000{i}-of-00003.safetensors"), {n: weights[n] for n in names[i::3]})
    single.unlink()
    (folder / "model.safetensors.index.json").unlink()
    store = StackedStore(open_checkpoint(folder))
    assert_reads_what_the_model_has(folder, store)
    assert len({span.file.path for span in store.spans(0, 0)}) == 3
    store.close()


def fuse(folder: Path) -> None:
    """gate_up_proj [E, 2F, D] in one tensor, as transformers 5 writes."""

    def change(weights: dict[str, mx.array]) -> None:
        for name in [name for name in weights if name.endswith("switch_mlp.gate_proj.weight")]:
            base = name.removesuffix("switch_mlp.gate_proj.weight")
            gate, up = weights.pop(name), weights.pop(f"{base}switch_mlp.up_proj.weight")
            weights[f"{base}experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
            weights[f"{base}experts.down_proj"] = weights.pop(f"{base}switch_mlp.down_proj.weight")

    edit_weights(folder, change)


def test_layout_without_slices(tmp_path: Path) -> None:
    folder = write_architecture(tmp_path / "fused", "qwen3_moe")
    fuse(folder)
    with pytest.raises(UserError, match=r"gate_proj.weight are no slices of the files") as error:
        StackedStore(open_checkpoint(folder))
    assert "mlxmoe repack" in error.value.hint


def test_another_type_on_disk_is_no_slice(tmp_path: Path) -> None:
    """Block-scaled fp8 is computed when it is read: the tensor of one expert has the right name and the wrong bytes."""
    folder = write_qwen3(tmp_path / "fp8", num_hidden_layers=1)

    def change(weights: dict[str, mx.array]) -> None:
        for name in [name for name in weights if ".experts." in name]:
            weights[name] = mx.to_fp8(weights[name])
            weights[f"{name}_scale_inv"] = mx.ones((1, 1))

    edit_weights(folder, change)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(UserError, match="are no slices of the files"):
        StackedStore(open_checkpoint(folder))


def test_missing_and_misshapen_experts(tmp_path: Path) -> None:
    folder = quantized(write_architecture(tmp_path / "plain", "olmoe"), tmp_path / "stock")
    name = "model.layers.0.mlp.switch_mlp.up_proj"

    def damaged(**shapes: tuple[int, ...] | None) -> str:
        copy = shutil.copytree(folder, tmp_path / "copy")

        def change(weights: dict[str, mx.array]) -> None:
            for field, shape in shapes.items():
                array = weights.pop(f"{name}.{field}")
                if shape is not None:
                    weights[f"{name}.{field}"] = mx.zeros(shape, array.dtype)

        edit_weights(copy, change)
        with pytest.raises(UserError) as error:
            StackedStore(open_checkpoint(copy))
        shutil.rmtree(copy)
        return error.value.message

    assert f"the tensor {name}.weight is missing" in damaged(weight=None)
    assert f"{name}.weight has shape (7, 40, 8)" in damaged(weight=(7, 40, 8))
    assert f"{name}.scales has shape (7, 40, 2)" in damaged(scales=(7, 40, 2))
    assert f"{name}.biases has shape (8, 41, 2)" in damaged(biases=(8, 41, 2))
    assert f"{name} in the mode affine has weight, scales" in damaged(biases=None)


def test_file_changed_while_it_is_in_use(tmp_path: Path) -> None:
    folder = quantized(write_architecture(tmp_path / "plain", "olmoe"), tmp_path / "stock")
    (path,) = folder.glob("model*.safetensors")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    store = StackedStore(open_checkpoint(folder))
    with Reader(1) as reader:
        read_layer(store, reader, 0)
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        with pytest.raises(UserError, match="was changed while it was in use"):
            read_layer(store, reader, 0)
    store.close()


def test_truncated_shard(tmp_path: Path) -> None:
    folder = quantized(write_architecture(tmp_path / "plain", "olmoe"), tmp_path / "stock")
    store = StackedStore(open_checkpoint(folder))
    (path,) = folder.glob("model*.safetensors")
    os.truncate(path, path.stat().st_size // 3)
    with Reader(2) as reader, pytest.raises(UserError, match=r"layer 1, expert \d+ ends early"):
        read_layer(store, reader, 1)
    store.close()
    with pytest.raises(UserError, match="its header says"):
        StackedStore(open_checkpoint(folder))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path / "shards", shard_bytes=400_000)
    before = len(os.listdir("/dev/fd"))
    StackedStore(open_checkpoint(folder)).close()
    assert len(os.listdir("/dev/fd")) == before


def test_what_is_computed_from_what_is_read(tmp_path: Path) -> None:
    """The facts suffice for a product: MLX's own, against the dequantized matrix."""
    folder = quantized(write_architecture(tmp_path / "plain", "olmoe"), tmp_path / "stock")
    store = StackedStore(open_checkpoint(folder))
    with Reader(1) as reader:
        arrays = read_layer(store, reader, 0)
    matrix = store.stock[0].matrices[0]
    path = "model.layers.0.mlp.switch_mlp.gate_proj"
    weight, scales, biases = (arrays[f"{path}.{field}"] for field in ("weight", "scales", "biases"))
    settings = {"group_size": matrix.group_size, "bits": matrix.bits, "mode": matrix.mode}
    x = mx.array(np.random.RandomState(0).standard_normal((1, matrix.columns)).astype(np.float32))
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    product = mx.quantized_matmul(x, weight[3], scales[3], biases[3], transpose=True, **settings)
    dense = mx.dequantize(weight[3], scales[3], biases[3], **settings)
    assert dense.shape == (matrix.rows, matrix.columns)
    assert np.allclose(np.array(product), np.array(x @ dense.T), atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == matrix.bits
    store.close()
