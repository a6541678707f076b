"""Writes a large synthetic Mixture-of-Experts model whose experts are asked for as a trained model's are.

    python -m mlxmoe.bench.streaming_model OUT [--size 4GB] [--form converted|mlx] [--seed 0]

What a cache sees is routing, so that is what is built: a qwen3_moe model with the expert shape of Qwen3.5-35B-A3B whose
hidden state is a sum of a popular direction, a topic, a slow drift, a word and something of the token's own, in the
shares of `Traffic`. Router rows are random directions, so every share of the hidden state is that share of every router's
logits: experts are popular, stay with a topic, come back with a word, and change with the token. Experts are random codes
whose outputs are small, so that the residual stream changes little from layer to layer, as it does in trained models.

The output head makes token t + 1 follow token t, so that greedy decoding walks through all of the vocabulary, in which
topics and words follow each other as in a text: no answer runs in a circle. The words mean nothing.

Form `converted`: a plan and records of three planes (4 bit) per expert. Form `mlx`: stacked 4-bit tensors as mlx-lm's
own converter writes them. Files are written one after the other, with one expert projection in memory at a time, into
OUT.partial, which is renamed when all is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask
from tqdm import tqdm

from mlxmoe.arguments import note
from mlxmoe.bench.checkpoint import CheckpointShape, model_config, write_tokenizer
from mlxmoe.errors import UserError
from mlxmoe.formats import LEVELS, MatrixShape, choose_group_size, num_planes
from mlxmoe.plan import ExpertEntry, FileEntry, LayerPlan, Plan
from mlxmoe.policies import Lru
from mlxmoe.replay import replay_layer
from mlxmoe.residency import Levels
from mlxmoe.store import encode_header, layer_header, record_nbytes, record_parts
from mlxmoe.units import format_size, parse_size
from mlxmoe.work import HashingWriter, whole_file, write_whole

# T tokens, V vocabulary, L layers, E experts, A active experts per token, D model dim, F expert dim

LEVEL = 4  # bits of every expert where nobody says otherwise
MLX_GROUP_SIZE = 64  # of form `mlx`, as mlx-lm's converter takes it by default
FORMS = ("converted", "mlx")


@dataclass(frozen=True)
class Traffic:
    """Shares of the hidden state as amplitudes, and how long they last. The defaults give the reuse, the popularity and
    the hit rates that were published for trained models (docs/streaming.md has both side by side)."""

    popular: float = 0.45
    topic: float = 0.55
    drift: float = 1.1
    word: float = 0.6
    own: float = 0.4
    topics: int = 16
    dwell: float = 96.0  # tokens until the topic changes, on average
    words: int = 400  # that all topics share, and again as many whose frequency depends on the topic
    memory: float = 0.9  # of the drift from token to token
    router_spread: float = 2.0  # standard deviation of router logits
    expert_output: float = 0.5  # standard deviation of one expert's output, about that of the embedding being 1
    attention_output: float = 0.3

    @property
    def norm(self) -> float:
        return math.sqrt(self.popular**2 + self.topic**2 + self.drift**2 + self.word**2 + self.own**2)


def shape_of_experts(nbytes: int) -> CheckpointShape:
    """At least `nbytes` of 4-bit experts, 256 in a layer of which 8 are active: from 1 GB on in the shape of
    Qwen3.5-35B-A3B's, below in a small one."""
    large = nbytes >= 10**9
    shape = CheckpointShape(
        num_hidden_layers=1,
        hidden_size=2048 if large else 512,
        moe_intermediate_size=512 if large else 128,
        num_experts=256,
        num_experts_per_tok=8,
        num_attention_heads=8 if large else 4,
        num_key_value_heads=2,
        head_dim=128 if large else 32,
        vocab_size=8192 if large else 2048,
        max_position_embeddings=32768,
    )
    per_layer = shape.num_experts * record_nbytes_of(shape)
    return CheckpointShape(**{**asdict(shape), "num_hidden_layers": max(2, -(-nbytes // per_layer))})


def record_nbytes_of(shape: CheckpointShape) -> int:
    """Bytes of all planes of one 4-bit expert as the form `converted` has them."""
    layer = layer_plan(shape, 0, [1.0] * shape.num_experts)
    return sum(record_nbytes(layer, layer.experts[0], plane) for plane in range(num_planes(LEVEL)))


def write_streaming_model(
    folder: Path,
    shape: CheckpointShape,
    form: str = "converted",
    seed: int = 0,
    traffic: Traffic = Traffic(),
    levels: Levels | None = None,
) -> int:
    """Writes the model folder; returns the bytes of its experts. The same arguments give the same bytes.

    levels[l][e][p]: bits written of each expert matrix, of form `converted` only (None: 4 for all). Raises UserError
    where `folder` exists or the disk has no room. What an interrupted call has left is written again.
    """
    assert form in FORMS
    if folder.exists():
        raise UserError(f"{folder} exists already", "choose another folder, or delete it first")
    if not folder.parent.is_dir():
        raise UserError(f"there is no folder {folder.parent} to write into", "create it first")
    assert levels is None or form == "converted"
    levels = levels or [[(LEVEL,) * 3] * shape.num_experts] * shape.num_hidden_layers
    layers = [layer_plan(shape, i, [1.0] * shape.num_experts, experts) for i, experts in enumerate(levels)]
    nbytes = sum(record_nbytes(x, entry, j) for x in layers for entry in x.experts for j in range(entry.num_planes))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < 1.1 * nbytes + shape.vocab_size * shape.hidden_size * 8:
        free = shutil.disk_usage(folder.parent).free
        raise UserError(
            f"{folder.parent} has {format_size(free)} free, the experts alone take {format_size(nbytes)}",
            "give a smaller --size, or a folder on a larger disk",
        )
    partial.mkdir()
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="write", dynamic_ncols=True) as bar:
        if form == "converted":
            _write_converted(partial, shape, seed, traffic, levels, bar.update)
        else:
            _write_mlx(partial, shape, seed, traffic, bar.update)
    os.rename(partial, folder)
    return nbytes


def walk(shape: CheckpointShape, start: int, count: int) -> list[int]:
    """Token ids in the order in which the model itself continues them."""
    return [(start + i) % shape.vocab_size for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Everything but the experts
# ---------------------------------------------------------------------------------------------------------------------


class _Text(NamedTuple):
    """Topic and word of every token of the vocabulary, in the order of the walk."""

    topic: np.ndarray  # [V]
    word: np.ndarray  # [V] below 2 * words


def _text(vocabulary: int, traffic: Traffic, rng: np.random.Generator) -> _Text:
    """Topics last `dwell` tokens on average. Half of the words are drawn by Zipf's law from those that all topics share,
    half from others that each topic ranks in its own order."""
    changes = rng.random(vocabulary) < 1 / traffic.dwell
    topic = rng.integers(traffic.topics, size=vocabulary)[np.cumsum(changes)]
    rank_weight = 1 / np.arange(1, traffic.words + 1)
    rank = rng.choice(traffic.words, vocabulary, p=rank_weight / rank_weight.sum())
    orders = np.array([rng.permutation(traffic.words) for _ in range(traffic.topics)])
    word = np.where(rng.random(vocabulary) < 0.5, rank, traffic.words + orders[topic, rank])
    return _Text(topic, word)


def _unit_rows(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random directions [rows, columns] float32, nearly orthogonal to each other."""
    values = rng.standard_normal((rows, columns), np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def trunk_tensors(shape: CheckpointShape, seed: int, traffic: Traffic) -> dict[str, np.ndarray]:
    """Every tensor outside the experts, float16, under the names of mlx-lm's qwen3_moe."""
    rng = np.random.default_rng([seed, 0])
    d, v, e = shape.hidden_size, shape.vocab_size, shape.num_experts
    text = _text(v, traffic, rng)
    popular = _unit_rows(rng, 1, d)[0]
    drift = np.empty((v, d), np.float32)
    state = _unit_rows(rng, 1, d)[0]
    for t, fresh in enumerate(_unit_rows(rng, v, d)):
        state = traffic.memory * state + math.sqrt(1 - traffic.memory**2) * fresh
        drift[t] = state
    own = _unit_rows(rng, v, d)
    hidden = (
        traffic.popular * popular
        + traffic.topic * _unit_rows(rng, traffic.topics, d)[text.topic]
        + traffic.drift * drift
        + traffic.word * _unit_rows(rng, 2 * traffic.words, d)[text.word]
        + traffic.own * own
    ) / np.float32(traffic.norm)
    tensors = {"model.embed_tokens.weight": hidden * math.sqrt(d)}  # entries of variance 1
    # The token before decides, by its own part more than by what it shares; that gives a peaked distribution
    tensors["lm_head.weight"] = np.roll(hidden + 3 * own, 1, axis=0) * (6 / math.sqrt(d))
    tensors["model.norm.weight"] = np.ones(d, np.float32)
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        skew = -np.log(rng.permutation(e) + 1.0)
        rows = rng.standard_normal((e, d), np.float32)
        rows += np.outer((skew - skew.mean()) / skew.std() - rows @ popular, popular)
        tensors[f"{layer}.mlp.gate.weight"] = rows * (traffic.router_spread / math.sqrt(d))
        for name, (outputs, inputs) in _attention_shapes(shape).items():
            gain = traffic.attention_output if name == "o_proj" else 1.0
            values = rng.standard_normal((outputs, inputs), np.float32)
            tensors[f"{layer}.self_attn.{name}.weight"] = values * (gain / math.sqrt(inputs))
        for name in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{name}.weight"] = np.ones(shape.head_dim, np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = np.ones(d, np.float32)
    return {name: values.astype(np.float16) for name, values in tensors.items()}


def _attention_shapes(shape: CheckpointShape) -> dict[str, tuple[int, int]]:
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    d = shape.hidden_size
    return {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}


def _frequencies(shape: CheckpointShape, trunk: dict[str, np.ndarray], layer: int) -> list[float]:
    """Share of the vocabulary's tokens that choose each expert, by the embedding alone: a stand-in for calibration."""
    embedding = trunk["model.embed_tokens.weight"].astype(np.float32)
    logits = embedding @ trunk[f"model.layers.{layer}.mlp.gate.weight"].astype(np.float32).T
    chosen = np.argpartition(-logits, shape.num_experts_per_tok, axis=1)[:, : shape.num_experts_per_tok]
    counts = np.bincount(chosen.ravel(), minlength=shape.num_experts)
    return (counts / shape.vocab_size).tolist()


def _save_trunk(path: Path, tensors: dict[str, np.ndarray]) -> FileEntry:
    with whole_file(path) as file:
        file.write(encode_header({name: ("F16", t.shape, t.nbytes) for name, t in tensors.items()}))
        for values in tensors.values():
            file.write(memoryview(values.tobytes()))
    return file.entry


def _save_config(folder: Path, shape: CheckpointShape, **more: Any) -> FileEntry:
    config = {**model_config(shape), "torch_dtype": "float16", **more}
    return write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------------


def _matrices(shape: CheckpointShape, preferred_group: int) -> tuple[MatrixShape, ...]:
    d, f = shape.hidden_size, shape.moe_intermediate_size
    return tuple(
        MatrixShape(name, rows, columns, choose_group_size(columns, preferred_group))
        for name, rows, columns in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f))
    )


def _scale(matrix: MatrixShape, level: int, traffic: Traffic) -> float:
    """Of uniform codes of `level` bits, so that inputs of variance 1 give outputs of variance 1 in gate and up, and of the
    expert's share in down, whose inputs silu(g) * u have a standard deviation of about 0.6."""
    gain = traffic.expert_output / 0.6 if matrix.name == "down_proj" else 1.0
    return gain / math.sqrt(matrix.columns * (4**level - 1) / 12)


def _random_words(rng: np.random.Generator, nbytes: int) -> np.ndarray:
    """uint8 [nbytes]: packed codes of any width, uniformly distributed."""
    return rng.integers(0, 1 << 32, -(-nbytes // 4), np.uint32).view(np.uint8)[:nbytes]


def _random_scales(rng: np.random.Generator, matrix: MatrixShape, level: int, traffic: Traffic) -> np.ndarray:
    """float16 [groups], a fifth around the wanted one, so that a group's scale in another's place is noticed."""
    spread = 0.8 + 0.4 * rng.random(matrix.num_groups, np.float32)
    return (_scale(matrix, level, traffic) * spread).astype(np.float16)


def _generator(seed: int, layer: int, expert: int, part: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([seed, 1 + layer, expert, part]))


def layer_plan(
    shape: CheckpointShape, layer: int, frequencies: Sequence[float], levels: Sequence[tuple[int, ...]] | None = None
) -> LayerPlan:
    """levels[e][p]: bits written (None: 4 for all). Against its own code of B bits, a uniform code cut to L is off by a
    uniform error of (4^(B-L) - 1) / 12 code steps squared: the relative errors need no measuring."""
    entries = {experts: _entry(experts) for experts in levels or [(LEVEL,) * 3]}
    return LayerPlan(
        layer=layer,
        path=f"model.layers.{layer}.mlp.switch_mlp",
        kind="glu",
        file=f"experts-{layer + 1:05}-of-{shape.num_hidden_layers:05}.safetensors",
        projections=_matrices(shape, 128),
        weights=(tuple(frequencies),) * 3,
        experts=tuple(entries[e] for e in levels or [(LEVEL,) * 3] * shape.num_experts),
    )


def _entry(levels: tuple[int, ...]) -> ExpertEntry:
    errors = tuple(
        tuple((4 ** (level - lower) - 1) / (4**level - 1) for lower in LEVELS[: num_planes(level)]) for level in levels
    )
    gains = tuple((1.0,) * (num_planes(level) - 1) for level in levels)
    return ExpertEntry(levels, errors, gains, (0,) * num_planes(max(levels)))


def _write_converted(
    folder: Path,
    shape: CheckpointShape,
    seed: int,
    traffic: Traffic,
    levels: Levels,
    progress: Callable[[int], object],
) -> None:
    trunk = trunk_tensors(shape, seed, traffic)
    files = {"model.safetensors": _save_trunk(folder / "model.safetensors", trunk)}
    files["config.json"] = _save_config(folder, shape)
    layers = []
    for i in range(shape.num_hidden_layers):
        layer = layer_plan(shape, i, _frequencies(shape, trunk, i), levels[i])
        with whole_file(folder / layer.file) as file:
            layer = _write_records(file, layer, seed, traffic, progress)
        files[layer.file] = file.entry
        layers.append(layer)
    write_tokenizer(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files[name] = write_whole(folder / name, (folder / name).read_bytes())
    matrices = sum(m.num_weights for m in layers[0].projections) * shape.num_experts * len(layers)
    Plan(
        model_type="qwen3_moe",
        source={"name": "synthetic", "config_sha256": files["config.json"].sha256, "files": {}},
        settings={"synthetic": asdict(traffic)},
        num_parameters=matrices + sum(t.size for t in trunk.values()),
        layers=tuple(layers),
        trunk={},
        expected_loss=0.0,
        seed=seed,
    ).with_files(files).save(folder)


def _write_records(
    file: HashingWriter, layer: LayerPlan, seed: int, traffic: Traffic, progress: Callable[[int], object]
) -> LayerPlan:
    """The records of a layer, random. Returns the plan with their checksums."""
    file.write(layer_header(layer))
    experts = []
    for e, entry in enumerate(layer.experts):
        rng = _generator(seed, layer.layer, e)
        checksums = []
        for plane in range(entry.num_planes):
            record = np.zeros(record_nbytes(layer, entry, plane), np.uint8)
            for part in record_parts(layer, entry, plane):
                matrix = layer.projections[part.projection]
                if part.field == "words":
                    values = _random_words(rng, part.nbytes)
                else:
                    values = _random_scales(rng, matrix, entry.levels[part.projection], traffic).view(np.uint8)
                record[part.offset : part.offset + part.nbytes] = values
            checksums.append(zlib.crc32(record.data))
            file.write(record.data)
            progress(record.nbytes)
        experts.append(entry._replace(crc32=tuple(checksums)))
    return layer._replace(experts=tuple(experts))


def _write_mlx(
    folder: Path, shape: CheckpointShape, seed: int, traffic: Traffic, progress: Callable[[int], object]
) -> None:
    count = shape.num_hidden_layers + 1
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    trunk = trunk_tensors(shape, seed, traffic)
    _save_trunk(folder / names[0], trunk)
    index = dict.fromkeys(trunk, names[0])
    for layer, name in enumerate(names[1:]):
        stacks = list(_stacks(shape, layer))
        with whole_file(folder / name) as file:
            file.write(encode_header({stack.name: stack.described for stack in stacks}))
            for stack in stacks:
                for expert in range(shape.num_experts):
                    values = _stack_rows(stack, seed, layer, expert, traffic)
                    file.write(values.tobytes())
                    progress(values.nbytes)
        index |= dict.fromkeys((stack.name for stack in stacks), name)
    write_whole(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}).encode())
    _save_config(folder, shape, quantization={"group_size": MLX_GROUP_SIZE, "bits": LEVEL})
    write_tokenizer(folder)


class _Stack(NamedTuple):
    """One stacked tensor of all experts: weight, scales or biases of a projection."""

    name: str
    matrix: MatrixShape
    field: str
    described: tuple[str, tuple[int, ...], int]  # dtype code, shape, bytes


def _stacks(shape: CheckpointShape, layer: int) -> Iterator[_Stack]:
    for matrix in _matrices(shape, MLX_GROUP_SIZE):
        for field in ("weight", "scales", "biases"):
            name = f"model.layers.{layer}.mlp.switch_mlp.{matrix.name}.{field}"
            columns = matrix.columns * LEVEL // 32 if field == "weight" else matrix.columns // matrix.group_size
            dims = (shape.num_experts, matrix.rows, columns)
            dtype, itemsize = ("U32", 4) if field == "weight" else ("F16", 2)
            yield _Stack(name, matrix, field, (dtype, dims, itemsize * math.prod(dims)))


def _stack_rows(stack: _Stack, seed: int, layer: int, expert: int, traffic: Traffic) -> np.ndarray:
    """One expert's part of a stack. Biases follow from the scales: codes are centred."""
    part = 1 + 2 * ("gate_proj", "up_proj", "down_proj").index(stack.matrix.name)
    if stack.field == "weight":
        return _random_words(_generator(seed, layer, expert, part), stack.matrix.code_nbytes(LEVEL))
    scales = _random_scales(_generator(seed, layer, expert, part + 1), stack.matrix, LEVEL, traffic)
    return scales if stack.field == "scales" else scales * np.float16(-((1 << LEVEL) - 1) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# What its traffic is like
# ---------------------------------------------------------------------------------------------------------------------


class Routed(NamedTuple):
    """What the routers chose, best first, and what the next layer's router would have chosen on the same hidden state."""

    experts: np.ndarray  # int [T, L, A]
    ahead: np.ndarray  # int [T, L - 1, A]: for layer l + 1, from the input of layer l's experts


def routed(model: nn.Module, tokens: list[int], window: int = 512) -> Routed:
    """Runs a qwen3_moe model layer by layer over `tokens`, in windows without memory of each other."""
    active = model.args.num_experts_per_tok
    experts, ahead = [], []
    for start in range(0, len(tokens), window):
        part = tokens[start : start + window]
        x = model.model.embed_tokens(mx.array([part]))
        mask = create_attention_mask(x, None)
        chosen: list[np.ndarray] = []
        guessed: list[np.ndarray] = []
        layers = model.model.layers
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            x = x + layer.self_attn(layer.input_layernorm(x), mask, None)
            chosen.append(_top(layer.mlp.gate(layer.post_attention_layernorm(x)), active))
            if after is not None:
                guessed.append(_top(after.mlp.gate(after.post_attention_layernorm(x)), active))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        experts.append(np.stack(chosen, axis=1))
        ahead.append(np.stack(guessed, axis=1) if guessed else np.zeros((len(part), 0, active), int))
    return Routed(np.concatenate(experts), np.concatenate(ahead))


def _top(logits: mx.array, active: int) -> np.ndarray:
    """[T, A], best first."""
    return np.array(mx.argsort(-logits[0], axis=-1)[:, :active])


class TrafficFacts(NamedTuple):
    """Means over layers. `reuse`: share of a token's experts that the layer chose for the token before. `ahead`: share
    that the next layer's router names on the hidden state of the layer before; `ahead_by_rank`: how often each rank of it
    is right. `top_eighth`, `top_quarter`: share of the choices that go to the most popular eighth or quarter of the
    experts. `lru`: share of residents -> hit rate of LRU."""

    reuse: float
    ahead: float | None
    ahead_by_rank: list[float]
    top_eighth: float
    top_quarter: float
    lru: dict[str, float]

    @classmethod
    def of(
        cls, traffic: Routed, num_experts: int, fractions: tuple[float, ...] = (0.12, 0.25, 0.5, 0.75)
    ) -> TrafficFacts:
        experts, ahead = traffic
        hot = _one_hot(experts, num_experts)
        counts = -np.sort(-hot.sum(axis=0), axis=1)  # [L, E]
        share = counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)
        right = np.take_along_axis(hot[:, 1:], ahead, axis=2)
        return cls(
            reuse=float((hot[1:] & hot[:-1]).sum() / hot[1:].sum()),
            ahead=float(right.mean()) if right.size else None,
            ahead_by_rank=[round(float(r), 4) for r in right.mean(axis=(0, 1))] if right.size else [],
            top_eighth=float(share[:, num_experts // 8 - 1].mean()),
            top_quarter=float(share[:, num_experts // 4 - 1].mean()),
            lru={f"{f:g}": lru_hit_rate(experts, num_experts, f) for f in fractions},
        )


def _one_hot(experts: np.ndarray, num_experts: int) -> np.ndarray:
    hot = np.zeros((*experts.shape[:2], num_experts), bool)
    np.put_along_axis(hot, experts, True, axis=2)
    return hot


def lru_hit_rate(experts: np.ndarray, num_experts: int, fraction: float) -> float:
    """experts [T, L, A] -> the hit rate of LRU with this share of every layer's experts resident."""
    slots = max(experts.shape[2], int(fraction * num_experts))
    layers = (experts[:, layer] for layer in range(experts.shape[1]))
    hits = [replay_layer(layer, Lru(num_experts, slots), slots).sum() for layer in layers]
    return float(sum(hits)) / experts.size


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic Mixture-of-Experts model with realistic traffic.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--size", default="4GB", help="bytes of routed experts (default: %(default)s)")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="layout (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args()
    shape = shape_of_experts(parse_size(args.size))
    nbytes = write_streaming_model(args.out, shape, args.form, args.seed)
    note(f"{args.out}: {format_size(nbytes)} of experts, {shape.num_hidden_layers} layers of {shape.num_experts}")


if __name__ == "__main__":
    main()
