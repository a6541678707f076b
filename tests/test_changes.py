"""The divergence of single changes: against the whole model with the change in it, and a formula in float64."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr
from toy_checkpoints import write_architecture

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.changes import Change, Weights, divergence, divergences, num_steps
from mlxmoe.convert.source import Source
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError

TOKENS = np.random.RandomState(0).randint(0, 256, (3, 40)).astype(np.int32)


def logs(rows: int, seed: int) -> np.ndarray:
    return log_softmax(3 * np.random.RandomState(seed).standard_normal((rows, 300)), axis=-1)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3])
def test_divergence_is_that_of_float64(size: float) -> None:
    """Down to 1e-7 nats, where sum p (log p - log q) in float32 is noise."""
    p = logs(20, 0)
    q = log_softmax(p + size * logs(20, 1), axis=-1)
    wanted = rel_entr(np.exp(p), np.exp(q)).sum(axis=-1)
    found = np.array(divergence(mx.array(p.astype(np.float32)), mx.array(q.astype(np.float32))))
    np.testing.assert_allclose(found, wanted, rtol=2e-3)


def test_impossible_tokens_add_nothing() -> None:
    p = mx.array([[0.0, -np.inf]])
    assert divergence(p, mx.array([[0.0, -np.inf]])).item() == 0.0


def change(layer: int, name: str) -> Change:
    """A weight with noise of a third of its size."""

    def weights(stream: LayerStream) -> dict[str, np.ndarray]:
        weight = stream.weight(name)
        noise = np.random.RandomState(layer + 2).standard_normal(weight.shape).astype(np.float32)
        return {name: weight + 0.3 * weight.std() * noise}

    return Change(layer, weights)


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_alone_is_what_the_whole_model_says(case: str, tmp_path: Path) -> None:
    """A change in the embedding, in the first and the last layer and in the head, and one that changes nothing."""
    source = Source(open_checkpoint(write_architecture(tmp_path / "model", case, dtype=mx.float32)), 32)
    stream = LayerStream(source)
    last = len(stream.layers)
    site = source.sites[-1]
    names = [
        (-1, "model.embed_tokens.weight"),
        (0, "model.layers.0.self_attn.o_proj.weight"),
        (last - 1, f"{site.path}.down_proj.weight"),
        (last, "lm_head.weight"),
    ]
    changes = [change(*each) for each in names]
    changes.append(Change(0, lambda stream: {names[1][1]: stream.weight(names[1][1])}))
    steps: list[int] = []
    folder = tmp_path / "work"
    folder.mkdir()
    walk = Walk(stream, TOKENS, folder)
    found = divergences(walk, changes, steps.append)
    assert sum(steps) == num_steps(walk, changes) == 3 * last + 1 + len(TOKENS)
    assert list(folder.iterdir()) == []
    assert (found[-1] == 0).all()

    whole = source.build()
    originals = dict(source.tensors())
    whole.load_weights(list(originals.items()), strict=False)

    def predicted() -> np.ndarray:
        return log_softmax(np.array(whole(mx.array(TOKENS))).astype(np.float64), axis=-1)

    before = predicted()
    for (layer, name), got in zip(names, found, strict=False):
        weight = np.array(originals[name])
        noise = np.random.RandomState(layer + 2).standard_normal(weight.shape).astype(np.float32)
        whole.load_weights([(name, mx.array(weight + 0.3 * weight.std() * noise))], strict=False)
        wanted = rel_entr(np.exp(before), np.exp(predicted())).sum(axis=-1)
        whole.load_weights([(name, originals[name])], strict=False)
        assert wanted.mean() > 1e-6
        np.testing.assert_allclose(got, wanted, rtol=0.02, atol=1e-3 * wanted.mean())


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_in_a_changed_model(case: str, tmp_path: Path) -> None:
    """Noise in every layer; one change gives a layer its weights back, one is the base itself."""
    source = Source(open_checkpoint(write_architecture(tmp_path / "model", case, dtype=mx.float32)), 32)
    stream = LayerStream(source)
    last = len(stream.layers)
    noisy = {
        i: change(i, name).weights
        for i, name in [
            (-1, "model.embed_tokens.weight"),
            (0, "model.layers.0.self_attn.o_proj.weight"),
            (last - 1, f"{source.sites[-1].path}.down_proj.weight"),
            (last, "lm_head.weight"),
        ]
    }

    def base(i: int) -> Weights:
        return noisy.get(i, lambda stream: {})

    restored = (-1, 0, last - 1, last)
    changes = [Change(last, base(last)), *(Change(i, lambda stream: {}) for i in restored)]
    folder = tmp_path / "work"
    folder.mkdir()
    walk = Walk(stream, TOKENS, folder)
    found = divergences(walk, changes, lambda n: None, base)
    assert list(folder.iterdir()) == []

    whole = source.build()
    whole.load_weights(list(source.tensors().items()), strict=False)

    def predicted(noise: Collection[int]) -> np.ndarray:
        originals = dict(source.tensors())
        whole.load_weights(list(originals.items()), strict=False)
        stand_in: Any = SimpleNamespace(weight=lambda name: np.array(originals[name]))
        for i in noise:
            whole.load_weights([(k, mx.array(v)) for k, v in noisy[i](stand_in).items()], strict=False)
        return log_softmax(np.array(whole(mx.array(TOKENS))).astype(np.float64), axis=-1)

    before = predicted(())
    for got, left in zip(found, [noisy, *(set(noisy) - {i} for i in restored)], strict=True):
        wanted = rel_entr(np.exp(before), np.exp(predicted(left))).sum(axis=-1)
        assert wanted.mean() > 1e-6
        np.testing.assert_allclose(got, wanted, rtol=0.02, atol=1e-3 * wanted.mean())


def test_not_finite_is_said(tmp_path: Path) -> None:
    source = Source(open_checkpoint(write_architecture(tmp_path / "model", "deepseek_v3")), 32)
    stream = LayerStream(source)
    broken = Change(len(stream.layers), lambda s: {"lm_head.weight": s.weight("lm_head.weight") * np.float32(np.inf)})
    with pytest.raises(UserError, match="not finite"), np.errstate(all="ignore"):
        divergences(Walk(stream, TOKENS, tmp_path), [broken], lambda n: None)
