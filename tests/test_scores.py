"""What text says of experts without gradients: against the model's own router and experts, written out token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import write_architecture, write_qwen3

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.calibrated import measure_experts
from mlxmoe.convert.scores import HUGE, SAMPLE, Observed, Scoring, observe
from mlxmoe.convert.source import Source
from mlxmoe.convert.stats import Moments
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk

TOKENS = np.random.RandomState(0).randint(0, 256, (6, 50)).astype(np.int32)
LEVELS = (2, 4)


def prepared(folder: Path, case: str) -> tuple[Source, Walk, int]:
    """A toy model walked up to its first layer with experts."""
    changes = {"num_hidden_layers": 2, "num_experts": 4}
    path = write_qwen3(folder / case, **changes) if case == "qwen3" else write_architecture(folder / case, case)
    source = Source(open_checkpoint(path), 32)
    walk = Walk(LayerStream(source), TOKENS, folder)
    i = next(i for i in range(9) if source.sites[0].path.startswith(walk.stream.path(i) + "."))
    walk.embed("hidden")
    for before in range(i):
        with walk.stream.loaded(before):
            walk.advance(before, "hidden")
    return source, walk, i


class Seen:
    """What a layer's experts get and give, watched in one run of the layer."""

    def __init__(self, walk: Walk, i: int, path: str):
        self.module: Any = walk.stream.module(path)
        layer, name = walk.stream.layers[i], path.rpartition(".")[2]
        block = layer.mlp
        block[name] = self
        try:
            mx.eval(walk.stream.run(i, mx.array(TOKENS), walk.read("hidden", i, slice(0, len(TOKENS)))))
        finally:
            block[name] = self.module

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        y = self.module(x, indices)
        self.x, self.experts, self.y = (np.array(a).reshape(-1, a.shape[-1]) for a in (x, indices, y))
        return y


@pytest.mark.parametrize("case", ["qwen3", "deepseek_v3", "gpt_oss"])
def test_counts_gates_and_contributions(case: str, tmp_path: Path) -> None:
    source, walk, i = prepared(tmp_path, case)
    site = source.sites[0]
    with walk.stream.loaded(i):
        found = observe(walk, i, "hidden", site)
        seen = Seen(walk, i, site.path)
        experts, gates = seen.experts, gate_weights(case, walk.stream.layers[i].mlp, seen)
    assert found.total_tokens == TOKENS.size
    np.testing.assert_array_equal(found.tokens, np.bincount(experts.reshape(-1), minlength=site.num_experts))
    norms = np.linalg.norm(seen.y.reshape(*experts.shape, -1), axis=-1)
    wanted = np.bincount(experts.reshape(-1), weights=(gates * norms).reshape(-1), minlength=site.num_experts)
    np.testing.assert_allclose(found.contribution, wanted, rtol=1e-4)
    assert (np.bincount(found.experts, minlength=site.num_experts) == np.minimum(found.tokens, SAMPLE)).all()
    places = {x.tobytes(): t for t, x in enumerate(seen.x.astype(np.float32))}
    for x, e, gate in zip(found.inputs, found.experts, found.gates, strict=True):
        t = places[x.tobytes()]
        assert gate == pytest.approx(gates[t][experts[t] == e][0], rel=1e-4)


def test_gates_where_a_norm_stands_behind_the_sum(tmp_path: Path) -> None:
    """Gemma 4 normalises the sum of the experts' outputs: the gates are still those of its router."""
    source, walk, i = prepared(tmp_path, "gemma4_text")
    layer, kept = walk.stream.layers[i], []

    def router(x: mx.array) -> Any:
        kept.append(original(x))
        return kept[-1]

    with walk.stream.loaded(i):
        found = observe(walk, i, "hidden", source.sites[0])
        original, layer.router = layer.router, router
        walk.stream.run(i, mx.array(TOKENS), walk.read("hidden", i, slice(0, len(TOKENS))))
        layer.router = original
        experts, gates = (np.array(a).reshape(-1) for a in kept[0])
    for e in range(source.sites[0].num_experts):
        mine = found.gates[found.experts == e]
        assert len(mine)
        assert np.abs(mine[:, None] - gates[experts == e]).min(axis=1).max() < 1e-5


def gate_weights(case: str, block: Any, seen: Seen) -> np.ndarray:
    """[T, A] of the experts that were chosen, by each architecture's rule."""
    inputs = mx.array(seen.x)
    if case == "deepseek_v3":
        experts, gates = (np.array(a) for a in block.gate(inputs))
        assert (experts == seen.experts).all()
        return gates
    logits = np.array((block.router if case == "gpt_oss" else block.gate)(inputs), np.float64)
    chosen = np.exp(np.take_along_axis(logits, seen.experts.astype(np.int64), 1))
    return chosen / chosen.sum(axis=1, keepdims=True)


def test_massive_values_are_those_far_above_the_mean_square(tmp_path: Path) -> None:
    """One hidden channel of expert 2 is scaled up: it, and hardly anything else, is massive."""
    source, walk, i = prepared(tmp_path, "qwen3")
    site = source.sites[0]
    gate, up = (f"{site.path}.{name}" for name in ("gate_proj", "up_proj"))
    with walk.stream.loaded(i):
        weight = walk.stream.weight(f"{up}.weight")
        weight[2, 5] *= 100
        walk.stream.replace([(f"{up}.weight", weight)])
        found = observe(walk, i, "hidden", site)
        seen = Seen(walk, i, site.path)
        inputs, indices = mx.array(seen.x)[:, None, None], mx.array(seen.experts)
        module = walk.stream.module
        hidden: Any = walk.stream.module(site.path)
        values = np.abs(np.array(hidden.activation(module(up)(inputs, indices), module(gate)(inputs, indices))))
    values = values.reshape(seen.experts.size, -1)
    huge = values > HUGE * np.sqrt(np.square(values).mean())
    wanted = np.bincount(seen.experts.reshape(-1), weights=huge.mean(axis=1), minlength=4)
    np.testing.assert_allclose(found.massive, wanted)
    assert huge[:, 5].sum() > 0.9 * huge.sum() > 0
    assert found.massive.argmax() == 2


def test_scores_of_quantized_experts(tmp_path: Path) -> None:
    """Errors of outputs and of weights, from a model with every expert's projection put in alone."""
    source, walk, i = prepared(tmp_path, "qwen3")
    site = source.sites[0]
    shapes = source.shapes[site.path]
    values: dict[tuple[int, int], np.ndarray] = {}
    with walk.stream.loaded(i):
        module = walk.stream.module(site.path)
        observed = observe(walk, i, "hidden", site)
        scoring = Scoring(module, observed, len(shapes), len(LEVELS))
        before = run(module, observed)
        for p, shape in enumerate(shapes):
            stack = walk.stream.weight(f"{site.path}.{shape.name}.weight")
            take = scoring.seen(p, shape.name, stack)
            even = Moments(
                np.broadcast_to(np.eye(shape.columns, dtype=np.float32), (len(stack), shape.columns, shape.columns)),
                np.ones(stack.shape[:2]),
                observed.tokens,
                0.0,
            )

            def seen(part: slice, j: int, found: np.ndarray, p: int = p, take: Any = take) -> None:
                values[p, j] = found
                for piece in (slice(0, 3), slice(3, 4)):  # as large layers are
                    take(piece, j, found[piece])

            measure_experts(stack, even, LEVELS, shape.group_size, seen=seen)
        scores = scoring.scores()
        assert (run(module, observed) == before).all(), "the layer is as it was"
        share = observed.tokens / TOKENS.size
        squares = (observed.gates**2)[:, None] * before**2
        means = [squares[observed.experts == e].sum(axis=1).mean() for e in range(4)]
        np.testing.assert_allclose(scores.outputs, means * share, rtol=1e-4)
        np.testing.assert_allclose(scores.frequency, share)
        for (p, j), quantized in values.items():
            name = f"{site.path}.{shapes[p].name}.weight"
            stack = walk.stream.weight(name)
            np.testing.assert_allclose(scores.weight[p, :, j], np.square(stack - quantized).sum(axis=(1, 2)), rtol=1e-4)
            np.testing.assert_allclose(scores.energy[p], np.square(stack).sum(axis=(1, 2)), rtol=1e-4)
            walk.stream.replace([(name, quantized)])
            squares = (observed.gates**2)[:, None] * (run(module, observed) - before) ** 2
            walk.stream.replace([(name, stack)])
            means = [squares[observed.experts == e].sum(axis=1).mean() for e in range(4)]
            np.testing.assert_allclose(scores.output[p, :, j], means * share, rtol=1e-3)
    assert (scores.relative[..., 0] > 3 * scores.relative[..., 1]).all()


def run(module: Any, observed: Observed) -> np.ndarray:
    indices = mx.array(observed.experts.astype(np.uint32))[:, None]
    return np.array(module(mx.array(observed.inputs), indices))[:, 0]
