"""Routers adapted to quantized experts: the chapter's rules and TopK-MSE, against worked numbers and written-out sums."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import write_architecture

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.route import (
    Router,
    degradation,
    find_router,
    fit_router,
    fit_row,
    in_question,
    keep_inputs,
    lowered_bias,
)
from mlxmoe.convert.source import Source
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError


def test_bias_falls_by_half_of_the_degradation() -> None:
    """Relative squared errors 0.04 + 0.05 and 0: relative errors 0.3 and 0."""
    lost = degradation([(0.04, 0.0, 0.05), (0.0, 0.0, 0.0)])
    np.testing.assert_allclose(lost, [0.3, 0.0])
    np.testing.assert_allclose(lowered_bias(np.array([1.0, -2.0]), lost), [0.85, -2.0])


def test_a_third_of_the_experts_is_in_question() -> None:
    scores = np.random.RandomState(0).standard_normal((5, 24))
    chosen = in_question(scores, active=2)
    assert (chosen.sum(axis=1) == 8).all()
    for row, own in zip(scores, chosen, strict=True):
        assert row[own].min() > row[~own].max()
    assert (in_question(scores, active=6).sum(axis=1) == 12).all()
    assert in_question(scores[:, :3], active=2).all()


def test_a_row_of_a_worked_example() -> None:
    """D = 1: the quantized input is twice the original, so that half the weight gives the logits back, but for the ridge of
    5 % of the mean square (X' X = 4 * 4 = 16, of which the ridge is 0.8 with as many tokens as are borrowed)."""
    original, quantized = np.ones((128, 1)), 2 * np.ones((128, 1))
    found = fit_row(np.array([3.0]), original, quantized)
    assert found[0] == pytest.approx(3 - (512 / (512 + 0.05 * 512)) * 1.5)
    few = fit_row(np.array([3.0]), original[:4], quantized[:4])
    assert few[0] == pytest.approx(3 - (16 / (16 + 0.05 * 16 * 32)) * 1.5)
    assert fit_row(np.array([3.0]), original[:0], quantized[:0]) == [3.0]


def test_a_row_is_the_ridge_regression() -> None:
    """Against the same as ordinary least squares with further rows for the ridge."""
    random = np.random.RandomState(0)
    original = random.standard_normal((200, 6))
    quantized = original + 0.3 * random.standard_normal((200, 6))
    row = random.standard_normal(6)
    ridge = 0.05 * np.square(quantized).sum() / 6
    stacked = np.concatenate([quantized, np.sqrt(ridge) * np.eye(6)])
    wanted = np.linalg.lstsq(stacked, np.concatenate([original @ row, np.sqrt(ridge) * row]), rcond=None)[0]
    found = fit_row(row, original, quantized)
    np.testing.assert_allclose(found, wanted, rtol=1e-8)
    assert np.square(original @ row - quantized @ found).sum() < np.square(original @ row - quantized @ row).sum()


@pytest.mark.parametrize(
    ("case", "gate", "bias", "scaled"),
    [
        ("qwen3_moe", "model.layers.1.mlp.gate", None, ("weight",)),
        ("deepseek_v3", "model.layers.1.mlp.gate", "e_score_correction_bias", ("weight",)),
        ("gpt_oss", "model.layers.1.mlp.router", "bias", ("weight", "bias")),
    ],
)
def test_routers_are_found(case: str, gate: str, bias: str | None, scaled: tuple[str, ...], tmp_path: Path) -> None:
    source = Source(open_checkpoint(write_architecture(tmp_path / case, case)), 32)
    stream = LayerStream(source)
    site = next(s for s in source.sites if s.layer == 1)
    block = site.path.rpartition(".")[0]
    found = find_router(block, stream.module(block), site)
    assert found == Router(gate, f"{gate}.weight", bias and f"{gate}.{bias}", tuple(f"{gate}.{s}" for s in scaled))


def test_a_router_with_more_in_it_is_refused(tmp_path: Path) -> None:
    source = Source(open_checkpoint(write_architecture(tmp_path / "gemma4", "gemma4_text")), 32)
    stream, site = LayerStream(source), source.sites[0]
    block = site.path.rpartition(".")[0]
    with pytest.raises(UserError, match="is no single matrix on the experts' input"):
        find_router(block, stream.module(block), site)


def test_fitted_logits_are_nearer_to_the_original(tmp_path: Path) -> None:
    """With attention disturbed, the logits of the experts in question, against the written-out difference."""
    source = Source(open_checkpoint(write_architecture(tmp_path / "source", "deepseek_v3")), 32)
    tokens = np.random.RandomState(0).randint(0, 256, (8, 64)).astype(np.int32)
    walk = Walk(LayerStream(source), tokens, tmp_path)
    stream, site = walk.stream, source.sites[0]
    i = site.layer
    walk.embed("hidden")
    for before in range(i):
        with stream.loaded(before):
            walk.advance(before, "hidden")
    block = site.path.rpartition(".")[0]
    with stream.loaded(i):
        router = find_router(block, stream.module(block), site)
        keep_inputs(walk, i, "hidden", router, "router")
        name = f"{stream.path(i)}.self_attn.o_proj.weight"
        random = np.random.RandomState(1)
        weight = stream.weight(name)
        stream.replace([(name, weight + weight.std() * random.standard_normal(weight.shape).astype(np.float32))])
        own = stream.weight(router.weight)
        found = fit_router(walk, i, "hidden", router, stream.module(block), 2, "router")
        keep_inputs(walk, i, "hidden", router, "now")
        bias = stream.weight(str(router.bias))
    first, second = (np.load(walk.path(kind, i)).reshape(-1, own.shape[1]) for kind in ("router", "now"))
    assert not walk.path("router-coded", i).exists()
    scores = 1 / (1 + np.exp(-(first @ own.T))) + bias
    chosen = in_question(scores, 2)

    def error(weight: np.ndarray) -> float:
        return float(np.square((first @ own.T - second @ weight.T) * chosen).sum())

    assert error(found) < 0.9 * error(own)


def test_the_input_of_a_module_is_what_it_gets(tmp_path: Path) -> None:
    source = Source(open_checkpoint(write_architecture(tmp_path / "source", "qwen3_moe")), 32)
    stream = LayerStream(source)
    tokens = mx.array(np.random.RandomState(0).randint(0, 256, (2, 8)))
    hidden = stream.embed(tokens)
    with stream.loaded(1):
        layer = stream.layers[1]
        found = stream.inputs(1, tokens, hidden, f"{stream.path(1)}.mlp.gate")
        middle = hidden + layer.self_attn(layer.input_layernorm(hidden), "causal", None)
        wanted = layer.post_attention_layernorm(middle)
        np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-5)
