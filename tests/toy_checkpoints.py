"""Tiny random checkpoints for the tests of converting and loading: a model folder each, complete with a tokenizer.

`write_qwen3` is Hugging Face's own layout (one tensor per expert, shards with an index), from bench/checkpoint.py.
`write_architecture` takes a config of tests/vectors, widened so that group sizes divide its experts, and writes the
deterministic weights of vectors/weights.py under the names of mlx-lm's class, which every loader takes as well.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from vectors.weights import tensor

from mlxmoe.bench.checkpoint import CheckpointShape, write_checkpoint, write_tokenizer
from mlxmoe.loading import RuntimeConfig, load, open_model  # noqa: F401 (one place)
from mlxmoe.models import model_classes
from mlxmoe.plan import ExpertEntry, LayerPlan, Plan
from mlxmoe.prepared import choose_residency, prepare  # noqa: F401 (one place)
from mlxmoe.store import TensorInfo, read_header

VECTORS = Path(__file__).resolve().parent / "vectors"
WIDTHS = (2, 1, 1, 2, 2, 2, 2, 2, 2)  # of planes
VOCAB = 320  # more than the byte-level tokenizer needs
SHAPE = CheckpointShape(num_hidden_layers=3, hidden_size=128, moe_intermediate_size=128, max_position_embeddings=512)
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4}  # for write_qwen3

# A config without vectors: Mamba and experts of the SwitchMLP kind (fc1, fc2 and no gate).
NEMOTRON_H: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "hybrid_override_pattern": "M*EE",
    "attention_bias": False,
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "mamba_proj_bias": False,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "n_groups": 1,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-6,
    "use_bias": False,
    "use_conv_bias": True,
    "head_dim": 16,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def write_qwen3(folder: Path, shard_bytes: int = 256 << 20, seed: int = 0, **changes: int) -> Path:
    """A qwen3_moe model of bfloat16 weights as the Hub has them; `changes` are fields of CheckpointShape."""
    write_checkpoint(folder, SHAPE.__class__(**{**vars(SHAPE), **changes}), shard_bytes, seed)
    return folder


def architecture_config(case: str, **changes: Any) -> dict[str, Any]:
    """The config of a case of tests/vectors (or NEMOTRON_H) with experts of 96 columns, which the group size 32 divides."""
    if case == "nemotron_h":
        config = dict(NEMOTRON_H)
    else:
        config = json.loads((VECTORS / f"{case}.json").read_text())["configs"]["transformers-5"]
        config["moe_intermediate_size"] = 96
        if case == "gpt_oss":
            config["intermediate_size"] = 96
    return {**config, "vocab_size": VOCAB, "eos_token_id": 2, **changes}


def write_architecture(folder: Path, case: str, dtype: mx.Dtype = mx.bfloat16, **changes: Any) -> Path:
    """A model of one architecture with weights of one dtype; `changes` are keys of its config."""
    config = architecture_config(case, **changes)
    model_class, arguments = model_classes(config)
    parameters = tree_flatten(model_class(arguments.from_dict(config)).parameters())
    weights = {name: mx.array(tensor(name, tuple(array.shape))).astype(dtype) for name, array in parameters}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None takes the key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Rewrites the folder's only weight file after `change` has edited its tensors in place."""
    (path,) = folder.glob("model*.safetensors")
    weights = dict(mx.load(str(path)))
    change(weights)
    mx.eval(weights)
    path.unlink()  # the lazy arrays above are read from the old file
    mx.save_safetensors(str(path), weights)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Flips one bit of a file, counted from its end if `position` is negative."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def convert(source: Path, output: Path, *arguments: str) -> int:
    """`mlxmoe convert` without progress bar noise checks: its exit status."""
    from mlxmoe.cli import main

    return main(["convert", str(source), str(output), *arguments])


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def folder_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def headers(folder: Path) -> dict[str, TensorInfo]:
    """Where every tensor of the trunk's files lies."""
    return {
        name: info for path in sorted(folder.glob("model*.safetensors")) for name, info in read_header(path).items()
    }


def stored_matrix(folder: Path, layer: LayerPlan, expert: int, projection: int, level: int) -> np.ndarray:
    """float32 [N, K]: the weights that a converted folder holds for one expert, by the definition in formats.py.

    Reads the file with plain safetensors and unpacks bit by bit in numpy: nothing of the runtime's reader is used.
    """
    from safetensors.numpy import load_file

    entry, shape = layer.experts[expert], layer.projections[projection]
    records = load_file(folder / layer.file)
    written = entry.levels[projection]
    codes = np.zeros((shape.rows, shape.columns), np.int64)
    bits_read = 0
    for plane, width in enumerate(WIDTHS):
        if bits_read == level:
            break
        data = records[f"L{layer.layer}.E{expert}.P{plane}"]
        offset = sum(_words_nbytes(layer, entry, p, plane) for p in range(projection))
        words = data[offset : offset + _words_nbytes(layer, entry, projection, plane)].reshape(shape.rows, -1)
        stream = np.unpackbits(words, axis=1, bitorder="little")[:, : shape.columns * width]
        values = stream.reshape(shape.rows, shape.columns, width).astype(np.int64) << np.arange(width)
        codes = (codes << width) | values.sum(axis=-1)
        bits_read += width
    base = records[f"L{layer.layer}.E{expert}.P0"]
    offset = sum(_words_nbytes(layer, entry, p, 0) for p in range(len(layer.projections)))
    offset += sum(2 * other.num_groups for other in layer.projections[:projection])
    scales = base[offset : offset + 2 * shape.num_groups].view(np.float16).astype(np.float32)
    gain = 1.0 if level == written else entry.gains[projection][(2, 3, 4, 6, 8, 10, 12, 14).index(level)]
    factor = scales.reshape(shape.rows, -1, 1) * np.float32(2 ** (written - level) * gain)
    centred = codes.astype(np.float32) - (2**level - 1) / 2
    return (centred.reshape(shape.rows, -1, shape.group_size) * factor).reshape(shape.rows, shape.columns)


def _words_nbytes(layer: LayerPlan, entry: ExpertEntry, projection: int, plane: int) -> int:
    """Bytes of one projection's packed words in the record of a plane; 0 where it was not written."""
    width = WIDTHS[plane]
    if entry.levels[projection] < sum(WIDTHS[: plane + 1]):
        return 0
    shape = layer.projections[projection]
    return shape.rows * -(-shape.columns * width // 32) * 4


def run_child(code: str, *arguments: str) -> list[str]:
    """The command line of a Python child that runs `code`."""
    return [sys.executable, "-W", "ignore", "-c", code, *arguments]


def load_plan(folder: Path) -> Plan:
    return Plan.load(folder)
