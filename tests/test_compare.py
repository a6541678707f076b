"""Two versions of a model layer by layer: against the two whole models and plain NumPy on what goes on in them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import edit_weights, write_architecture
from whole_model import Whole, whole

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.compare import LayerChange, compare
from mlxmoe.convert.domains import Windows
from mlxmoe.convert.source import Source
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError

LENGTH = 32
TOKENS = np.random.RandomState(1).randint(0, 256, (5, LENGTH)).astype(np.int32)
WINDOWS = Windows(TOKENS, ("a", "b"), np.array([0, 0, 1, 1, 1]))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with noise in the routed and shared experts and in the attention of every layer."""
    first = write_architecture(tmp_path / "first", "deepseek_v3")
    second = write_architecture(tmp_path / "second", "deepseek_v3")
    rng = np.random.default_rng(0)

    def disturb(weights: dict[str, mx.array]) -> None:
        for name, array in weights.items():
            if "experts" in name or "switch_mlp" in name or "self_attn" in name:
                noise = rng.standard_normal(array.shape).astype(np.float32)
                scale = 0.1 * mx.sqrt(mx.square(array.astype(mx.float32)).mean())
                weights[name] = (array.astype(mx.float32) + scale * mx.array(noise)).astype(array.dtype)

    edit_weights(second, disturb)
    return first, second


def compared(first: Path, second: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[LayerChange]:
    """In three batches, the last one smaller."""
    monkeypatch.setattr("mlxmoe.convert.walk._BATCH_TOKENS", 2 * LENGTH)
    sources = [Source(open_checkpoint(path), 32) for path in (first, second)]
    folder.mkdir()
    walks = [Walk(LayerStream(source), TOKENS, folder) for source in sources]
    steps: list[int] = []
    changes = compare(walks[0], walks[1], WINDOWS, sources[0].sites, steps.append)
    assert list(folder.iterdir()) == []
    assert sum(steps) == len(changes)
    return changes


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def rows(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


def test_against_both_whole_models(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = compared(*folders, tmp_path / "work", monkeypatch)
    first, second = (whole(folder, TOKENS) for folder in folders)
    assert len(changes) == len(first.layers)
    mask = mx.tril(mx.ones((LENGTH, LENGTH), mx.bool_))
    for i, change in enumerate(changes):
        assert change.layer == i
        assert change.stream_error == pytest.approx(relative(second.behind[i], first.behind[i]), rel=1e-3)
        shaped = rows(first.before[i]).reshape(*TOKENS.shape, -1)
        alone = np.array(second.layers[i](shaped, mask)).reshape(first.before[i].shape)
        own = relative(alone - first.before[i], first.behind[i] - first.before[i])
        assert change.own_error == pytest.approx(own, rel=1e-3)
        if change.routing is None:
            assert (change.experts, change.shared) == (None, None)
            continue
        check_routing(change, first, second, i)
        check_experts(change, first, second, i)
    assert changes[0].routing is None
    assert changes[-1].routing is not None


def check_routing(change: LayerChange, first: Whole, second: Whole, i: int) -> None:
    """Each model's own gate, on what reaches it."""
    choices = []
    for model in (first, second):
        chosen, weights = (np.array(a) for a in model.layers[i].mlp.gate(rows(model.block_inputs[i])))
        choices.append([dict(zip(c.tolist(), w.tolist(), strict=True)) for c, w in zip(chosen, weights, strict=True)])
    pairs = list(zip(*choices, strict=True))
    routing = change.routing
    assert routing is not None
    assert routing.top1 == pytest.approx(
        np.mean([max(a, key=a.__getitem__) == max(b, key=b.__getitem__) for a, b in pairs])
    )
    assert routing.topk == pytest.approx(np.mean([len(a.keys() & b.keys()) / len(a) for a, b in pairs]))
    assert routing.changed == pytest.approx(np.mean([a.keys() != b.keys() for a, b in pairs]))
    assert 0 < routing.changed < 1, "the noise is to change some tokens' experts"
    sure = [np.mean([max(token.values()) / sum(token.values()) for token in side]) for side in choices]
    assert [routing.confidence_reference, routing.confidence] == pytest.approx(sure, rel=1e-4)


def check_experts(change: LayerChange, first: Whole, second: Whole, i: int) -> None:
    """Both models' experts on the inputs that the first one sends to each."""
    x = first.block_inputs[i]
    chosen = np.array(first.layers[i].mlp.gate(rows(x))[0])
    domain = np.repeat(WINDOWS.domain, LENGTH)
    errors = change.experts
    assert errors is not None
    for e in range(len(errors.errors)):
        tokens = np.nonzero((chosen == e).any(axis=1))[0]
        assert errors.domains[e].tolist() == [(domain[tokens] == d).sum() for d in (0, 1)]
        outputs = []
        for model in (first, second):
            experts = model.layers[i].mlp.switch_mlp
            gate, up, down = (np.array(experts[n].weight[e]) for n in ("gate_proj", "up_proj", "down_proj"))
            g = x[tokens] @ gate.T
            outputs.append((g / (1 + np.exp(-g)) * (x[tokens] @ up.T)) @ down.T)
        assert errors.relative[e] == pytest.approx(relative(outputs[1], outputs[0]), rel=1e-3)
    shared = [np.array(model.layers[i].mlp.shared_experts(rows(x))) for model in (first, second)]
    assert change.shared == pytest.approx(relative(shared[1], shared[0]), rel=1e-3)


def test_a_model_and_itself(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in compared(folders[0], folders[0], tmp_path / "work", monkeypatch):
        assert (change.stream_error, change.own_error) == (0, 0)
        if change.routing is not None and change.experts is not None:
            assert change.routing[:3] == (1, 1, 0)
            assert change.routing.confidence == change.routing.confidence_reference
            assert not change.experts.errors.any()
            assert change.shared == 0


def test_models_of_different_depth(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = write_architecture(tmp_path / "shallow", "deepseek_v3", num_hidden_layers=2)
    with pytest.raises(UserError, match="the reference has 3 layers, the model 2"):
        compared(folders[0], shallow, tmp_path / "work", monkeypatch)
