"""Watched experts: what is kept is what the block computed with, in every architecture, and the layer is as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import write_architecture

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.source import PROJECTIONS, Source
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.watch import Seen, watched
from mlxmoe.models import ExpertSite

TOKENS = mx.array(np.random.RandomState(3).randint(0, 256, (2, 24)))
ARCHITECTURES = (
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss"),
    *("gemma4_text", "nemotron_h"),
)


class Opened:
    """The first layer with experts of a toy model, loaded, with hidden states for it."""

    def __init__(self, folder: Path, case: str, **changes: Any):
        if case in ("olmoe", "mixtral"):
            changes["intermediate_size"] = 96
        source = Source(open_checkpoint(write_architecture(folder / case, case, **changes)), 32)
        self.stream, self.site = LayerStream(source), source.sites[0]
        self.index = next(
            i for i in range(len(self.stream.layers)) if self.site.path.startswith(self.stream.path(i) + ".")
        )
        hidden = self.stream.embed(TOKENS)
        for i in range(self.index):
            with self.stream.loaded(i):
                hidden = self.stream.run(i, TOKENS, hidden)
                mx.eval(hidden)
        self.hidden = hidden
        self.layer: Any = self.stream.layers[self.index]

    def run(self) -> np.ndarray:
        return np.array(self.stream.run(self.index, TOKENS, self.hidden).astype(mx.float32))

    def seen(self) -> tuple[np.ndarray, Seen]:
        with watched(self.layer, self.stream.path(self.index), self.site) as watch:
            output = self.run()
            return output, watch.take()


def block_of(opened: Opened) -> tuple[Any, Any]:
    """The module around the experts, and the experts."""
    modules = dict(opened.layer.named_modules())
    inside = opened.site.path.removeprefix(opened.stream.path(opened.index) + ".")
    return modules[inside.rpartition(".")[0]], modules[inside]


class Heard:
    """In the place of a block: keeps its arguments and its result, nothing else."""

    def __init__(self, block: Any):
        self.block, self.args, self.result = block, (), None

    def __call__(self, *args: Any) -> Any:
        self.args, self.result = args, self.block(*args)
        return self.result


def experts_by_hand(opened: Opened, x: np.ndarray) -> np.ndarray:
    """float64 [T, E, D]: outputs of every expert for every row, from the weights by plain products."""
    _, experts = block_of(opened)
    names = PROJECTIONS[opened.site.kind]
    weights = [np.array(experts[name]["weight"].astype(mx.float32), np.float64) for name in names]
    biases = [np.array(experts[name]["bias"].astype(mx.float32)) if "bias" in experts[name] else 0.0 for name in names]
    parts = [np.einsum("tk,enk->ten", x, w) + b for w, b in zip(weights[:-1], biases[:-1], strict=True)]
    given = [mx.array(part.astype(np.float32)) for part in parts]
    hidden = experts.activation(given[1], given[0]) if len(given) == 2 else experts.activation(given[0])
    return np.einsum("tef,edf->ted", np.array(hidden, np.float64), weights[-1]) + biases[-1]


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_weights_and_outputs_make_up_the_block(case: str, tmp_path: Path) -> None:
    """sum over the chosen of weight * output is what the block gives less what it gives when its experts give nothing."""
    opened = Opened(tmp_path, case)
    with opened.stream.loaded(opened.index):
        plain = opened.run()
        output, seen = opened.seen()
        np.testing.assert_allclose(output, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())

        block, experts = block_of(opened)
        parent = opened.site.path.removeprefix(opened.stream.path(opened.index) + ".").rpartition(".")[0]
        owner: Any = opened.layer
        for name in parent.split(".")[:-1]:
            owner = owner[name]
        heard = Heard(block)
        owner[parent.rpartition(".")[2]] = heard
        opened.run()
        owner[parent.rpartition(".")[2]] = block
        last = experts[PROJECTIONS[opened.site.kind][-1]]
        outputs = experts_by_hand(opened, np.array(seen.inputs.astype(mx.float32), np.float64))
        for name in ("weight", "bias"):
            if name in last:
                last[name] = mx.zeros_like(last[name])
        added = np.array(heard.result - heard.block(*heard.args)).reshape(len(seen.chosen), -1)

    chosen = np.take_along_axis(outputs, seen.chosen[:, :, None], axis=1)
    np.testing.assert_allclose((seen.weights[:, :, None] * chosen).sum(axis=1), added, atol=2e-4 * np.abs(added).max())
    got = np.array(seen.routed.outputs)
    np.testing.assert_allclose(got, outputs[seen.routed.tokens, seen.routed.experts], atol=2e-5 * np.abs(outputs).max())


def test_every_pair_once_in_the_order_of_the_experts(tmp_path: Path) -> None:
    opened = Opened(tmp_path, "qwen3_moe")
    with opened.stream.loaded(opened.index):
        _, seen = opened.seen()
    assert (np.diff(seen.routed.experts) >= 0).all()
    pairs = sorted(zip(seen.routed.tokens.tolist(), seen.routed.experts.tolist(), strict=True))
    assert pairs == sorted((t, e) for t, row in enumerate(seen.chosen.tolist()) for e in row)
    np.testing.assert_array_equal(np.array(seen.routed.inputs), np.array(seen.inputs)[seen.routed.tokens])


def test_experts_that_work_in_fewer_dimensions(tmp_path: Path) -> None:
    """Behind the experts' sum lies a projection: weights come back through it. Nemotron's own gate says what they are."""
    opened = Opened(tmp_path, "nemotron_h", moe_latent_size=32)
    with opened.stream.loaded(opened.index):
        _, seen = opened.seen()
        block, _ = block_of(opened)
        heard = Heard(block)
        opened.layer["mixer"] = heard
        opened.run()
        chosen, weights = block.gate(heard.args[0])
    assert seen.inputs.shape[-1] == 32
    np.testing.assert_array_equal(np.array(chosen).reshape(seen.chosen.shape), seen.chosen)
    np.testing.assert_allclose(seen.weights, np.array(weights).reshape(seen.chosen.shape), rtol=1e-3)


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen2_moe"])
def test_shared_expert(case: str, tmp_path: Path) -> None:
    opened = Opened(tmp_path, case)
    with opened.stream.loaded(opened.index):
        _, seen = opened.seen()
        block, _ = block_of(opened)
        shared = block["shared_experts" if case == "deepseek_v3" else "shared_expert"]
        assert seen.shared is not None
        np.testing.assert_allclose(np.array(seen.shared.inputs), np.array(seen.inputs))
        np.testing.assert_allclose(np.array(seen.shared.outputs), np.array(shared(seen.inputs)), rtol=1e-5, atol=1e-6)
        down = np.array(shared.down_proj.weight.astype(mx.float32))
        by_hand = np.array(seen.shared.hidden) @ down.T
        np.testing.assert_allclose(np.array(seen.shared.outputs), by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["deepseek_v3", "gemma4_text"])
def test_the_layer_is_as_it_was(case: str, tmp_path: Path) -> None:
    opened = Opened(tmp_path, case)
    before = dict(opened.layer.named_modules())
    with pytest.raises(KeyError), watched(opened.layer, opened.stream.path(opened.index), opened.site):
        raise KeyError("anything")
    after = dict(opened.layer.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())


def test_outputs_for_other_rows(tmp_path: Path) -> None:
    opened = Opened(tmp_path, "qwen3_moe")
    site: ExpertSite = opened.site
    rows = np.random.default_rng(0).standard_normal((6, site.input_dims)).astype(np.float32)
    experts = np.array([0, 0, 1, 2, 2, 3])
    with opened.stream.loaded(opened.index):
        with watched(opened.layer, opened.stream.path(opened.index), site) as watch:
            got = np.array(watch.outputs(mx.array(rows), experts))
        wanted = experts_by_hand(opened, rows.astype(np.float64))[np.arange(6), experts]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
