"""Writes synthetic Hugging Face checkpoints: a qwen3_moe model of random bfloat16 weights, of any size.

Tensors are written one after the other, so memory stays constant. The result is a complete model folder (config,
sharded safetensors with their index, tokenizer, chat template) that transformers, mlx-lm and mlxmoe can open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class CheckpointShape:
    """Sizes of a qwen3_moe model, under the names that its config.json uses."""

    num_hidden_layers: int = 2
    hidden_size: int = 64
    moe_intermediate_size: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 320
    max_position_embeddings: int = 2048

    def nbytes(self) -> int:
        return sum(2 * math.prod(shape) for _, shape in tensors(self))


def shape_of_size(nbytes: int, layers: int) -> CheckpointShape:
    """A model of about `nbytes` of weights in `layers` equal layers: the number of experts makes up the size."""
    hidden, width = 512, 256
    expert_bytes = 2 * 3 * hidden * width
    experts = max(4, round(nbytes / layers / expert_bytes))
    return CheckpointShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
    )


def tensors(shape: CheckpointShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order in which they are written."""
    d, f, h = shape.hidden_size, shape.moe_intermediate_size, shape.head_dim
    q, kv = shape.num_attention_heads * h, shape.num_key_value_heads * h
    yield "model.embed_tokens.weight", (shape.vocab_size, d)
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (d,)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        yield f"{layer}.self_attn.q_proj.weight", (q, d)
        yield f"{layer}.self_attn.k_proj.weight", (kv, d)
        yield f"{layer}.self_attn.v_proj.weight", (kv, d)
        yield f"{layer}.self_attn.o_proj.weight", (d, q)
        yield f"{layer}.self_attn.q_norm.weight", (h,)
        yield f"{layer}.self_attn.k_norm.weight", (h,)
        yield f"{layer}.mlp.gate.weight", (shape.num_experts, d)
        for e in range(shape.num_experts):
            yield f"{layer}.mlp.experts.{e}.gate_proj.weight", (f, d)
            yield f"{layer}.mlp.experts.{e}.up_proj.weight", (f, d)
            yield f"{layer}.mlp.experts.{e}.down_proj.weight", (d, f)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (shape.vocab_size, d)


def write_checkpoint(folder: Path, shape: CheckpointShape, shard_bytes: int = 256 << 20, seed: int = 0) -> int:
    """Writes the model into `folder`, which it creates; returns the bytes of all weight files.

    Weights are normal with standard deviation 1/sqrt(columns), norms are one. Raises FileExistsError if the folder
    is there.
    """
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dims in tensors(shape):
        nbytes = 2 * math.prod(dims)
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dims))
        filled += nbytes
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(folder / file, shard, rng)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": shape.nbytes()}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", model_config(shape))
    write_tokenizer(folder)
    return total


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> int:
    """One safetensors file: 8 bytes of header length, a JSON header padded to 8 bytes, then the tensors in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in shard:
        end = offset + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dims in shard:
            values = np.ones(dims, np.float32)
            if len(dims) == 2:
                values = rng.standard_normal(dims, np.float32) / np.float32(math.sqrt(dims[1]))
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())  # bfloat16 by truncation
    return 8 + len(text) + offset


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and the ChatML markers, 259 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": _TEMPLATE,
        },
    )


def model_config(shape: CheckpointShape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        **asdict(shape),
        "intermediate_size": 3 * shape.hidden_size,  # of dense layers: there are none
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
