"""A model run layer by layer: the same numbers as the whole model gives, forward and backward, in every architecture."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from toy_checkpoints import write_architecture, write_qwen3

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.gptq import output_errors
from mlxmoe.convert.source import Source
from mlxmoe.convert.stats import Accumulator
from mlxmoe.convert.stream import LayerStream

ARCHITECTURES = (
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "olmoe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "gemma4_text",
    "nemotron_h",
)
TOKENS = mx.array(np.random.RandomState(0).randint(0, 256, (2, 48)))


def opened(folder: Path, case: str) -> tuple[Source, LayerStream, mx.array]:
    """A toy model, streamed, and the logits of the same model as a whole, both in float32."""
    changes = {"intermediate_size": 96} if case in ("olmoe", "mixtral") else {}
    source = Source(open_checkpoint(write_architecture(folder / case, case, **changes)), 32)
    whole = source.build()
    whole.load_weights([(n, a.astype(mx.float32)) for n, a in source.tensors().items()], strict=False)
    return source, LayerStream(source), whole(TOKENS)


def hidden_states(stream: LayerStream) -> list[mx.array]:
    """What goes into every layer, and what comes out of the last."""
    states = [stream.embed(TOKENS)]
    for i in range(len(stream.layers)):
        with stream.loaded(i):
            states.append(stream.run(i, TOKENS, states[-1]))
            mx.eval(states[-1])
    return states


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_layers_in_turn_are_the_whole_model(case: str, tmp_path: Path) -> None:
    source, stream, wanted = opened(tmp_path, case)
    stream._stand_ins[-1].given = hidden_states(stream)[-1]
    np.testing.assert_allclose(np.array(stream.model(TOKENS)), np.array(wanted), atol=2e-5, rtol=1e-4)
    assert source.sites


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_next"])
def test_gradients_are_those_of_the_whole_model(case: str, tmp_path: Path) -> None:
    """Of the drawn tokens' log-probability: at the first layer's input, and at the weights of a recorded matrix, which are
    its records' gradients' transpose times inputs."""
    source, stream, _ = opened(tmp_path, case)
    states = hidden_states(stream)
    after = stream.sample(TOKENS, states[-1], [], seed=5)
    site = source.sites[0]
    path = f"{site.path}.down_proj"
    gradient, record = after.gradient, None
    for i in reversed(range(len(stream.layers))):
        with stream.loaded(i):
            mine = [path] if path.startswith(stream.path(i) + ".") else []
            done = stream.differentiate(i, TOKENS, states[i], gradient, mine)
            gradient, record = done.gradient, done.records.get(path, record)
    assert record is not None
    assert record.experts is not None

    whole = source.build()
    whole.train()
    weights = {n: a.astype(mx.float32) for n, a in source.tensors().items()}
    whole.load_weights(list(weights.items()), strict=False)
    logits = stream.model  # the draw of `sample`: the same key over the same logits
    stream._stand_ins[-1].given = states[-1]
    drawn = mx.random.categorical(logits(TOKENS).astype(mx.float32), key=mx.random.key(5))

    def loss(weight: mx.array) -> mx.array:
        whole.update(tree_unflatten([(f"{path}.weight", weight)]))
        logs = whole(TOKENS)
        logs = logs - mx.logsumexp(logs, axis=-1, keepdims=True)
        return mx.take_along_axis(logs, drawn[..., None], -1).sum()

    wanted = np.array(mx.grad(loss)(weights[f"{path}.weight"]))
    for e in range(site.num_experts):
        rows = record.experts == e
        got = record.gradients[rows].T @ record.inputs[rows]
        np.testing.assert_allclose(got, wanted[e], atol=2e-4 * np.abs(wanted).max(), rtol=1e-3)


@pytest.mark.parametrize("projection", ["up_proj", "down_proj"])
def test_loss_foretells_the_divergence(projection: str, tmp_path: Path) -> None:
    """Noise of 2 % in the last layer's experts: half of sum rho e H e' is the KL divergence that it causes, up to the noise
    of drawn tokens and what lies off the diagonal. Every expert is chosen: where routing is as close to ties as that of
    random weights, noise changes it, which no gradient foretells."""
    source = Source(open_checkpoint(write_qwen3(tmp_path / "source", num_experts=2, num_hidden_layers=2)), 32)
    stream = LayerStream(source)
    tokens = mx.array(np.random.RandomState(1).randint(0, 256, (8, 128)))
    hidden = [stream.embed(tokens)]
    site = source.sites[-1]
    path = f"{site.path}.{projection}"
    with stream.loaded(0):
        hidden.append(stream.run(0, tokens, hidden[0]))
        mx.eval(hidden)
    with stream.loaded(1):
        last = stream.run(1, tokens, hidden[1])
        sums = Accumulator(path, site.num_experts)
        gradient = stream.sample(tokens, last, [], seed=0).gradient
        sums.add(stream.differentiate(1, tokens, hidden[1], gradient, [path]).records[path], tokens.size)
        before = logits_behind(stream, tokens, last)
        weight = stream.weight(f"{path}.weight")
        noise = np.random.RandomState(2).standard_normal(weight.shape).astype(np.float32)
        noise *= 0.02 * np.linalg.norm(weight) / np.linalg.norm(noise)
        stream.replace([(f"{path}.weight", weight + noise)])
        after = logits_behind(stream, tokens, stream.run(1, tokens, hidden[1]))
        measured = (mx.exp(before) * (before - after)).sum(axis=-1).mean().item()
    moments = sums.moments()
    predicted = output_errors(noise, moments.hessian, moments.row_weights).sum() / 2
    assert predicted == pytest.approx(measured, rel=0.3)


def logits_behind(stream: LayerStream, tokens: mx.array, hidden: mx.array) -> mx.array:
    """Log-probabilities of the head for hidden states behind the last layer, evaluated."""
    stream._stand_ins[-1].given = hidden
    logits = stream.model(tokens)
    stream._stand_ins[-1].given = None
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logs)
    return logs


def test_weights_are_dropped_behind_a_layer(tmp_path: Path) -> None:
    _, stream, _ = opened(tmp_path, "qwen3_moe")
    with stream.loaded(1):
        assert np.abs(stream.weight("model.layers.1.mlp.switch_mlp.up_proj.weight")).sum() > 0
    assert not np.abs(stream.weight("model.layers.1.mlp.switch_mlp.up_proj.weight")).any()


def test_replaced_weights_are_used(tmp_path: Path) -> None:
    _, stream, _ = opened(tmp_path, "qwen3_moe")
    name = "model.layers.0.self_attn.o_proj.weight"
    states = stream.embed(TOKENS)
    with stream.loaded(0):
        before = stream.run(0, TOKENS, states)
        stream.replace([(name, 2 * stream.weight(name))])
        after = stream.run(0, TOKENS, states)
        mx.eval(before, after)
    assert not np.allclose(np.array(before), np.array(after))


def test_an_embedding_that_is_the_head_is_recorded_as_the_head(tmp_path: Path) -> None:
    """Its gradients are those of the logits: the drawn token's one-hot less the probabilities."""
    source = Source(open_checkpoint(write_architecture(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True)), 32)
    stream = LayerStream(source)
    hidden = hidden_states(stream)[-1]
    path = "model.embed_tokens"
    record = stream.sample(TOKENS, hidden, [path], seed=3).records[path]
    probabilities = np.exp(np.array(logits_behind(stream, TOKENS, hidden))).reshape(-1, record.outputs.shape[1])
    difference = record.gradients + probabilities
    np.testing.assert_allclose(difference.max(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(difference.sum(axis=1), 1, rtol=1e-4)
