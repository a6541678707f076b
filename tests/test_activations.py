"""Statistics of experts: every number against a dense computation in NumPy on what the whole model does, in one piece."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from scipy import stats as scipy_stats
from toy_checkpoints import edit_weights, write_architecture
from whole_model import whole

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert import activations
from mlxmoe.convert.activations import (
    ExpertNumbers,
    LayerNumbers,
    Magnitudes,
    Massive,
    Routed,
    Threshold,
    confidence,
    domain_shares,
    gather,
    kinds,
    lift,
    load_variation,
    specialisation,
    super_experts,
)
from mlxmoe.convert.domains import Windows
from mlxmoe.convert.source import Source
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError

LENGTH = 40
NEVER = 1  # the expert that no token is sent to
WINDOWS = Windows(
    np.random.RandomState(5).randint(0, 256, (7, LENGTH)).astype(np.int32),
    ("code", "prose"),
    np.array([0, 0, 0, 0, 1, 1, 1]),
)


def measured(folder: Path, threshold: Threshold, monkeypatch: pytest.MonkeyPatch) -> list[LayerNumbers]:
    """In three batches, the last one smaller."""
    monkeypatch.setattr("mlxmoe.convert.walk._BATCH_TOKENS", 3 * LENGTH)
    source = Source(open_checkpoint(folder), 32)
    work = folder.parent / "work"
    work.mkdir()
    steps: list[int] = []
    found = gather(Walk(LayerStream(source), WINDOWS.tokens, work), WINDOWS, source.sites, threshold, steps.append)
    assert list(work.iterdir()) == []
    assert sum(steps) == len(found)
    return found


# -- the dense computation ---------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """Of one layer with experts: its block, what goes into it [T, D], what comes out of the layer [T, D]."""

    block: Any
    inputs: np.ndarray
    behind: np.ndarray


def dense(folder: Path, layer: int) -> Dense:
    model = whole(folder, WINDOWS.tokens)
    return Dense(model.layers[layer].mlp, model.block_inputs[layer], model.behind[layer])


class Expected(NamedTuple):
    """The numbers of one expert's tokens: their rows in the text, gate weights, inputs, hidden values and outputs."""

    tokens: np.ndarray
    gates: np.ndarray
    inputs: np.ndarray
    hidden: np.ndarray
    outputs: np.ndarray


def expected(dense: Dense) -> tuple[np.ndarray, np.ndarray, list[Expected]]:
    """Chosen experts [T, A], their weights [T, A] by the block's own gate, and every expert's tokens."""
    chosen, weights = (np.array(a) for a in dense.block.gate(mx.array(dense.inputs.astype(np.float32))))
    experts = dense.block.switch_mlp
    gate, up, down = (
        np.array(experts[n].weight.astype(mx.float32), np.float64) for n in ("gate_proj", "up_proj", "down_proj")
    )
    found = []
    for e in range(len(gate)):
        tokens, slots = np.nonzero(chosen == e)
        x = dense.inputs[tokens]
        g = x @ gate[e].T
        hidden = g / (1 + np.exp(-g)) * (x @ up[e].T)
        found.append(Expected(tokens, weights[tokens, slots].astype(np.float64), x, hidden, hidden @ down[e].T))
    return chosen, weights, found


def top_share(rows: np.ndarray, weights: np.ndarray) -> float:
    eigenvalues = np.linalg.eigvalsh(sum(w * np.outer(x, x) for w, x in zip(weights, rows, strict=True)))
    return float(eigenvalues[-1] / eigenvalues.sum())


def bin_edge(value: float) -> float:
    """The lower end of the 64th of an octave that a number lies in."""
    octave = 2.0 ** math.floor(math.log2(value))
    return octave * (1 + math.floor(64 * (value / octave - 1)) / 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """DeepSeek-V3's architecture: a dense layer, sigmoid scores with a bias, a shared expert; one expert is never chosen."""
    path = write_architecture(tmp_path / "model", "deepseek_v3")

    def exclude(weights: dict[str, mx.array]) -> None:
        for name in weights:
            if name.endswith("e_score_correction_bias"):
                bias = np.array(weights[name].astype(mx.float32))
                bias[NEVER] = -9
                weights[name] = mx.array(bias)

    edit_weights(path, exclude)
    return path


@pytest.mark.parametrize("threshold", [Threshold(4.0), Threshold(20.0, "median"), Threshold(0.001, "absolute")])
def test_every_number_is_that_of_a_dense_computation(
    threshold: Threshold, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = measured(folder, threshold, monkeypatch)
    assert [layer.routed is not None for layer in layers] == [False] + [True] * (len(layers) - 1)
    number = len(layers) - 1
    whole = dense(folder, number)
    chosen, weights, wanted = expected(whole)
    layer = layers[number]
    assert layer.layer == number
    routed = layer.routed
    assert routed is not None
    got = routed.experts
    domain_of = np.repeat(WINDOWS.domain, LENGTH)

    hidden = np.concatenate([e.hidden for e in wanted])
    scale = {"rms": np.sqrt(np.square(hidden).mean()), "median": np.median(np.abs(hidden)), "absolute": 1.0}
    assert routed.hidden.rms == pytest.approx(scale["rms"], rel=1e-5)
    assert routed.hidden.median == pytest.approx(scale["median"], rel=1 / 64)
    assert routed.hidden.threshold == pytest.approx(threshold.factor * scale[threshold.scale], rel=1 / 64)
    edge = bin_edge(routed.hidden.threshold)
    assert got.tokens[NEVER] == 0
    for e, one in enumerate(wanted):
        numbers = ExpertNumbers(*(column[e] for column in got))
        assert numbers.tokens == len(one.tokens)
        assert numbers.domains.tolist() == [(domain_of[one.tokens] == d).sum() for d in (0, 1)]
        if not len(one.tokens):
            assert all(np.isnan(value) for value in numbers[2:])
            continue
        total = one.gates.sum()
        assert numbers.gate == pytest.approx(one.gates.mean(), rel=1e-4)
        assert numbers.input_trace == pytest.approx((one.gates @ np.square(one.inputs).sum(1)) / total, rel=1e-4)
        assert numbers.hidden_trace == pytest.approx((one.gates @ np.square(one.hidden).sum(1)) / total, rel=1e-4)
        assert numbers.input_top == pytest.approx(top_share(one.inputs, one.gates), rel=1e-3)
        assert numbers.hidden_top == pytest.approx(top_share(one.hidden, one.gates), rel=1e-3)
        assert numbers.input_kurtosis == pytest.approx(scipy_stats.kurtosis(one.inputs, None, fisher=False), rel=1e-3)
        assert numbers.hidden_kurtosis == pytest.approx(scipy_stats.kurtosis(one.hidden, None, fisher=False), rel=1e-3)
        assert numbers.reap == pytest.approx((one.gates * np.linalg.norm(one.outputs, axis=1)).mean(), rel=1e-4)
        assert numbers.largest == pytest.approx(np.abs(one.outputs).max(), rel=1e-4)
        assert numbers.massive == pytest.approx((np.abs(one.hidden) >= edge).mean(), abs=2 / one.hidden.size)
    assert 0 < np.nanmean(got.massive) < 1

    together = np.zeros_like(routed.together)
    for row in chosen:
        for pair in itertools.product(row, row):
            together[pair] += 1
    np.testing.assert_array_equal(routed.together, together)
    assert routed.active == chosen.shape[1]
    assert routed.confidence == pytest.approx((weights.max(1) / weights.sum(1)).mean(), rel=1e-4)

    shared = whole.block.shared_experts
    x = mx.array(whole.inputs.astype(np.float32))
    shared_hidden = np.array(mx.sigmoid(shared.gate_proj(x)) * shared.gate_proj(x) * shared.up_proj(x), np.float64)
    assert routed.shared is not None
    assert routed.shared.tokens.tolist() == [WINDOWS.tokens.size]
    assert routed.shared.reap[0] == pytest.approx(np.linalg.norm(np.array(shared(x)), axis=1).mean(), rel=1e-4)
    wanted_kurtosis = scipy_stats.kurtosis(shared_hidden, None, fisher=False)
    assert routed.shared.hidden_kurtosis[0] == pytest.approx(wanted_kurtosis, rel=1e-3)
    assert routed.shared.massive[0] == pytest.approx((np.abs(shared_hidden) >= edge).mean(), abs=2 / shared_hidden.size)


def test_triggers_are_the_largest_values_and_where_they_stand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = measured(folder, Threshold(4.0), monkeypatch)
    number = len(layers) - 1
    whole = dense(folder, number)
    _, _, wanted = expected(whole)
    rows = sorted(
        (
            (np.abs(h).max(), e, int(t))
            for e, one in enumerate(wanted)
            for t, h in zip(one.tokens, one.hidden, strict=True)
        ),
        reverse=True,
    )
    routed = layers[number].routed
    assert routed is not None
    for trigger, (magnitude, expert, token) in zip(routed.hidden.triggers, rows, strict=False):
        assert trigger.magnitude == pytest.approx(magnitude, rel=1e-4)
        assert (trigger.expert, trigger.window, trigger.position) == (expert, *divmod(token, LENGTH))
    assert len(routed.hidden.triggers) == activations.NUM_TRIGGERS
    assert routed.hidden.largest == pytest.approx(rows[0][0], rel=1e-4)
    large = [token % LENGTH for magnitude, _, token in rows if magnitude >= routed.hidden.threshold]
    assert routed.hidden.first == pytest.approx(np.mean(np.array(large) == 0))

    stream, behind = layers[number].stream, whole.behind
    assert stream.rms == pytest.approx(np.sqrt(np.square(behind).mean()), rel=1e-4)
    assert stream.median == pytest.approx(np.median(np.abs(behind)), rel=1 / 32)
    heights = np.abs(behind).max(axis=1)
    assert stream.largest == pytest.approx(heights.max(), rel=1e-4)
    first = stream.triggers[0]
    assert (first.expert, first.window, first.position) == (-1, *divmod(int(heights.argmax()), LENGTH))
    share = (np.abs(behind) >= bin_edge(stream.threshold)).mean()
    assert stream.share.tolist() == pytest.approx([share], abs=2 / behind.size)


@pytest.mark.parametrize("case", ["gemma4_text", "nemotron_h"])
def test_architectures(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_watch.py has what is seen of them; here that every layer with experts has all of its numbers."""
    layers = measured(write_architecture(tmp_path / "model", case), Threshold(), monkeypatch)
    routed = [layer.routed for layer in layers if layer.routed is not None]
    assert routed
    for one in routed:
        assert one.experts.tokens.sum() == WINDOWS.tokens.size * one.active
        seen = one.experts.tokens > 0
        assert all(np.isfinite(column[seen]).all() for column in one.experts)
        assert 0 < one.confidence <= 1


def test_too_large_moments_have_no_eigenvalue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 columns of the inputs fit, 96 of the hidden values do not; all else is there."""
    experts = 8
    source = Source(open_checkpoint(folder), 32)
    assert (source.sites[0].num_experts, source.sites[0].input_dims, source.sites[0].hidden_dims) == (experts, 64, 96)
    monkeypatch.setattr(activations, "MOMENT_NBYTES", 4 * experts * 64 * 64)
    numbers = measured(folder, Threshold(), monkeypatch)[-1].routed
    assert numbers is not None
    seen = numbers.experts.tokens > 0
    assert np.isfinite(numbers.experts.input_top[seen]).all()
    assert np.isnan(numbers.experts.hidden_top).all()
    assert np.isfinite(numbers.experts.hidden_trace[seen]).all()


def test_values_that_are_not_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(weights: dict[str, mx.array]) -> None:
        name = next(name for name in weights if name.endswith("switch_mlp.up_proj.weight"))
        weights[name] = weights[name] * mx.inf

    edit_weights(folder, spoil)
    with pytest.raises(UserError, match="are not finite"):
        measured(folder, Threshold(), monkeypatch)


# -- magnitudes --------------------------------------------------------------------------------------------------------


def test_magnitudes_by_group_and_in_parts() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((50, 12)) * np.exp(rng.standard_normal((50, 1)))).astype(np.float32)
    values[0, 0], values[30, 3] = 1.5, -1.5
    whole, parts = Magnitudes(3), Magnitudes(3)
    whole.add(values, np.array([0, 20, 20, 50]))
    parts.add(values[:20], np.array([0, 20, 20, 20]))
    parts.add(values[20:], np.array([0, 0, 0, 30]))
    np.testing.assert_array_equal(whole.counts, parts.counts)
    np.testing.assert_array_equal(whole.rows, np.abs(values).max(axis=1))
    np.testing.assert_array_equal(parts.rows, whole.rows)
    assert whole.rms == pytest.approx(float(np.sqrt(np.square(values, dtype=np.float64).mean())))
    share = whole.share(1.5)  # an edge of a bin: exact
    assert share[0] == (np.abs(values[:20]) >= 1.5).mean()
    assert np.isnan(share[1])
    assert share[2] == (np.abs(values[20:]) >= 1.5).mean()
    assert whole.median <= np.median(np.abs(values)) <= whole.median * (1 + 1 / 32)


def test_thresholds_that_are_none() -> None:
    with pytest.raises(UserError, match="no scale 'mean'"):
        Threshold(10.0, "mean")
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="is not a positive number"):
            Threshold(factor)


# -- what the numbers say ----------------------------------------------------------------------------------------------


def test_confidence_by_hand() -> None:
    weights = np.array([[0.5, 0.25, 0.25], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert confidence(weights).tolist() == [0.5, 0.75, 0.0]


def test_shares_count_every_domain_alike() -> None:
    """Twice as much text of the first domain: 20 of 200 tokens and 10 of 100 are the same rate."""
    shares = domain_shares(np.array([[20, 10], [20, 0], [0, 0]]), np.array([200, 100]))
    assert shares[:2].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert np.isnan(shares[2]).all()


def test_kinds_by_hand() -> None:
    tokens = np.array([500, 500])
    domains = np.array([[101, 0], [100, 0], [71, 29], [69, 31], [0, 0]])
    assert kinds(domains, tokens) == ["general", "domain", "domain", "specialised", "never"]


def test_lift_by_hand() -> None:
    """Four tokens, two of four experts each: 0 and 1 always together."""
    choices = [(0, 1), (0, 1), (2, 3), (2, 3)]
    together = np.zeros((4, 4), np.int64)
    for pair in choices:
        for a, b in itertools.product(pair, pair):
            together[a, b] += 1
    lifts = lift(together, 2, 4)
    # P(both) = 1/2, P(one) P(other) = 1/4; of a random pair of four: 1/6 against 1/4
    assert lifts[0, 1] == pytest.approx((1 / 2) / (1 / 4) / (4 / 6))
    assert lifts[0, 2] == 0
    assert np.isnan(np.diag(lifts)).all()


def test_lift_of_random_choices_is_one() -> None:
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((40_000, 9)), axis=1)[:, :3]
    one_hot = np.zeros((len(chosen), 9), np.int64)
    np.put_along_axis(one_hot, chosen, 1, axis=1)
    lifts = lift(one_hot.T @ one_hot, 3, len(chosen))
    np.testing.assert_allclose(lifts[~np.eye(9, dtype=bool)], 1, atol=0.06)


def test_lift_where_nothing_can_be_together() -> None:
    assert np.isnan(lift(np.diag([3, 2]), 1, 5)).all()


def test_specialisation_by_hand() -> None:
    """An expert per domain says all of it, log2 3 bits; the same experts for all say nothing."""
    assert specialisation(np.diag([10, 20, 30]), np.array([10, 20, 30])) == pytest.approx(math.log2(3))
    assert specialisation(np.array([[10, 20], [30, 60]]), np.array([40, 80])) == pytest.approx(0, abs=1e-12)
    # one of two experts says a domain for sure, the other nothing: H(domain) - P(expert 1) H(domain | expert 1)
    joint = np.array([[2, 0], [2, 4]])
    conditional = -(1 / 3) * math.log2(1 / 3) - (2 / 3) * math.log2(2 / 3)
    assert specialisation(joint, np.array([4, 4])) == pytest.approx(1 - 0.75 * conditional)


def test_load_variation_by_hand() -> None:
    assert load_variation(np.array([5, 5, 5])) == 0
    assert load_variation(np.array([0, 10])) == 1


def layer_of(number: int, largest: list[float], height: float) -> LayerNumbers:
    """A layer whose experts' largest outputs, and the largest hidden state behind it, are given."""
    nothing = np.zeros(len(largest))
    numbers = ExpertNumbers(*[nothing] * len(ExpertNumbers._fields))._replace(largest=np.array(largest))
    stream = Massive(1.0, 1.0, height, 10.0, np.zeros(1), math.nan, ())
    routed = Routed(numbers, np.zeros((len(largest),) * 2, np.int64), 2, 0.5, stream, None)
    return LayerNumbers(number, f"model.layers.{number}", stream, routed)


def test_super_experts_by_hand() -> None:
    """Of 600 experts, 3 lie above the 99.5th percentile; one of them below a tenth of the largest; one in a layer behind
    those in which the hidden states grow."""
    small = [1.0] * 199
    layers = [
        layer_of(0, [900.0, *small], 30.0),
        layer_of(1, [80.0, *small], 600.0),
        layer_of(2, [1000.0, *small], 1000.0),
    ]
    found = super_experts(layers)
    assert [(e.layer, e.expert, e.largest) for e in found] == [(0, 0, 900.0)]
    higher = [*layers[:1], layer_of(1, [101.0, *small], 600.0), layers[2]]
    assert [(e.layer, e.expert) for e in super_experts(higher)] == [(0, 0), (1, 0)]
    late = [layers[0], layers[1]._replace(stream=layers[1].stream._replace(largest=400.0)), layers[2]]
    assert [(e.layer, e.expert) for e in super_experts(late)] == [(2, 0), (0, 0)]


def test_no_super_experts_where_nothing_was_chosen() -> None:
    assert super_experts([layer_of(0, [math.nan, math.nan], 1.0)]) == []
