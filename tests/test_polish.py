"""Scales refined after the codes: gradients against differences, least squares against worked numbers, losses that fall."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import SMALL, write_qwen3

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.polish import (
    HELD_BACK,
    MOST_TOKENS,
    Descent,
    Metric,
    Normal,
    Share,
    Slopes,
    Stored,
    View,
    fit_factors,
    layer_metric,
    measure_metric,
    normal_equations,
    parameters,
    polish_factors,
    polish_layer,
    polish_model,
    refine,
    share_windows,
    slopes,
    weight_gradient,
)
from mlxmoe.convert.quantize import affine_search
from mlxmoe.convert.source import Source
from mlxmoe.convert.stream import LayerStream, Record
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.write import pack_matrix
from mlxmoe.formats import MatrixShape, PackedMatrix, dequantize_codes, join_planes, level_scale, unpack_codes
from mlxmoe.rotation import IDENTITY, plain_rotation, rotate


def experts(levels: tuple[int, ...] = (2, 3), rotation: str = "none", seed: int = 0) -> tuple[np.ndarray, Stored]:
    """float32 [E, 8, 64], and what is stored of it behind a rotation."""
    weights, packed = packed_experts(levels, rotation, seed)
    return weights, Stored.experts(packed, plain_rotation(rotation, 64))


def packed_experts(levels: tuple[int, ...], rotation: str, seed: int = 0) -> tuple[np.ndarray, list[PackedMatrix]]:
    weights = np.random.RandomState(seed).standard_normal((len(levels), 8, 64)).astype(np.float32)
    shape, turn = MatrixShape("up_proj", 8, 64, 32), plain_rotation(rotation, 64)
    return weights, [pack_matrix(rotate(w, turn), shape, n).matrix for w, n in zip(weights, levels, strict=True)]


def trunk(seed: int = 0, bits: int = 3) -> tuple[np.ndarray, Stored]:
    weight = np.random.RandomState(seed).standard_normal((8, 64)).astype(np.float32)
    return weight, Stored.trunk(affine_search(weight.reshape(-1, 32), bits), weight.shape)


# Stored matrices ------------------------------------------------------------------------------------------------------


def values_of(packed: PackedMatrix, level: int) -> np.ndarray:
    """float32 [8, 64]: what a stored matrix stands for at a level, by the definition of the format."""
    planes = [unpack_codes(words, width, 64) for words, width in zip(packed.planes, (2, 1, 1, 2), strict=False)]
    count = (2, 3, 4, 6).index(level) + 1
    factor = level_scale(packed.level, level, packed.gains.get(level, 1.0))
    return np.array(dequantize_codes(join_planes(planes[:count]), packed.scales.astype(mx.float32) * factor, level))


@pytest.mark.parametrize("rotation", ["none", "block-hadamard-64"])
def test_values_are_those_of_the_format(rotation: str) -> None:
    shape, turn = MatrixShape("up_proj", 8, 64, 32), plain_rotation(rotation, 64, seed=3)
    weight = np.random.RandomState(1).standard_normal((8, 64)).astype(np.float32)
    packed = pack_matrix(weight, shape, 4).matrix
    wanted = values_of(packed, 4)
    stored = Stored.experts([packed], turn)
    np.testing.assert_allclose(rotate(stored.values()[0], turn), wanted, atol=1e-6)
    again = stored.repacked(0, packed)
    assert (np.array(again.scales) == np.array(packed.scales)).all()


@pytest.mark.parametrize("rotation", ["none", "block-hadamard-64"])
@pytest.mark.parametrize("level", [2, 3, 4])
def test_values_at_a_lower_level_are_those_of_the_format(level: int, rotation: str) -> None:
    """Of experts that are written at 4 and 3 bits: those that have no more than the level stay as they are."""
    _, packed = packed_experts((4, 3, 6), rotation)
    whole, turn = Stored.experts(packed, plain_rotation(rotation, 64)), plain_rotation(rotation, 64)
    lowered = whole.lowered(packed, level)
    for matrix, found in zip(packed, lowered.values(), strict=True):
        np.testing.assert_allclose(rotate(found, turn), values_of(matrix, min(level, matrix.level)), atol=2e-6)
    assert lowered.scales is whole.scales, "the scales are those of every level"
    assert lowered.codes is whole.codes
    lowered.gains *= np.array([0.9, 0.8, 0.7], np.float32)  # type: ignore[operator]
    again = [lowered.repacked(e, matrix) for e, matrix in enumerate(packed)]
    for before, after, factor in zip(packed, again, (0.9, 0.8, 0.7), strict=True):
        assert after.gains.keys() == before.gains.keys()
        moved = {n: after.gains[n] / gain for n, gain in before.gains.items() if after.gains[n] != gain}
        assert moved == ({level: pytest.approx(factor)} if before.level > level else {})


def test_scales_above_8_bits_have_no_slope() -> None:
    """Beside others of the same module, which have theirs."""
    weights, stored = experts((2, 16, 8))
    np.testing.assert_allclose(stored.values()[1], weights[1], atol=1e-4)
    assert list(stored.free) == [True, False, True]
    found = stored.slopes(np.ones_like(weights) * np.sign(stored.values()))["scales"]
    assert [bool((of_expert != 0).all()) for of_expert in found] == [True, False, True]
    assert not found[1].any()


def test_factors_of_some_are_the_least_squares_with_the_others_at_1() -> None:
    normal = Normal(np.array([[4.0, 1.0, 1.0], [1.0, 3.0, 1.0], [1.0, 1.0, 2.0]]), np.array([1.0, 0.5, 0.9]))
    free = np.array([True, False, True])
    found = fit_factors(normal, free, ridge=0.0)
    np.testing.assert_allclose(found[free] - 1, np.linalg.solve([[4, 1], [1, 2]], [1.0, 0.9]))
    assert found[1] == 1


def test_an_affine_matrix_keeps_its_codes() -> None:
    weight = np.random.RandomState(1).standard_normal((8, 64)).astype(np.float32)
    coded = affine_search(weight.reshape(-1, 32), 4)
    stored = Stored.trunk(coded, weight.shape)
    values = coded.codes * coded.scales.astype(np.float32)[:, None] + coded.biases.astype(np.float32)[:, None]
    np.testing.assert_allclose(stored.values()[0], values.reshape(weight.shape), rtol=1e-6)
    stored.scales *= 1.5
    again = stored.recoded(coded)
    assert (again.codes == coded.codes).all()
    np.testing.assert_allclose(again.scales, 1.5 * coded.scales, rtol=1e-3)
    assert (again.biases == coded.biases).all()


@pytest.mark.parametrize("kind", ["experts", "rotated", "lowered", "trunk"])
def test_slopes_are_differences_of_the_loss(kind: str) -> None:
    """loss = sum of target * values is linear: its change is the slope times the change of a scale, bias or gain, exactly.
    Scales move by steps that float16 holds."""
    if kind == "lowered":
        _, packed = packed_experts((4, 3), "block-hadamard-64")
        stored = Stored.experts(packed, plain_rotation("block-hadamard-64", 64)).lowered(packed, 2)
    else:
        _, stored = (
            trunk() if kind == "trunk" else experts(rotation="block-hadamard-64" if kind == "rotated" else "none")
        )
    for parameter in stored.parameters().values():
        parameter.values[:] = np.round(parameter.values * 64) / 64 + 1 / 64
    target = np.random.RandomState(5).standard_normal(stored.codes.shape).astype(np.float32)
    found = stored.slopes(target)
    more = {"trunk": ["biases"], "lowered": ["gains-2"]}.get(kind, [])
    assert list(found) == list(stored.parameters()) == ["scales", *more]
    for name, parameter in stored.parameters().items():
        for index in [(0, 0, 0), (-1, 5, 1)] if parameter.values.ndim == 3 else [0, 1]:
            before = np.vdot(target, stored.values())
            parameter.values[index] += 1 / 16
            slope = found[name][index]
            assert (np.vdot(target, stored.values()) - before) * 16 == pytest.approx(slope, rel=1e-3, abs=2e-3)
            parameter.values[index] -= 1 / 16


def test_the_gain_of_what_is_not_lowered_stays() -> None:
    """An expert of 2 bits beside one of 4, read at 3."""
    weights, packed = packed_experts((2, 4), "none")
    found = Stored.experts(packed, IDENTITY).lowered(packed, 3).slopes(weights)["gains-3"]
    assert found[0] == 0
    assert found[1] != 0


def test_weight_gradients_of_every_expert() -> None:
    random = np.random.RandomState(0)
    x, g = random.standard_normal((40, 6)).astype(np.float32), random.standard_normal((40, 3)).astype(np.float32)
    chosen = random.randint(0, 3, 40)  # the fourth expert has no token
    found = weight_gradient(Record(x, g, chosen, g), 4)
    wanted = np.zeros((4, 3, 6))
    for e, inputs, gradient in zip(chosen, x, g, strict=True):
        wanted[e] += np.outer(gradient, inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(weight_gradient(Record(x, g, None, g), 1)[0], g.T @ x, rtol=1e-6)


# Descent --------------------------------------------------------------------------------------------------------------


def test_windows_are_shared_once() -> None:
    share = share_windows(20, 512)
    assert share is not None
    rows = np.concatenate([*share.steps, *share.held_back])
    assert sorted(rows) == list(range(20))
    assert {len(step) for step in share.steps} == {2}
    assert sum(map(len, share.held_back)) == 20 // HELD_BACK
    many = share_windows(64, 512)
    assert many is not None
    assert [len(step) for step in (*many.steps, *many.held_back)] == [4] * 16
    few = share_windows(2, 512)
    assert few is not None
    assert [list(s) for s in (*few.steps, *few.held_back)] == [[0], [1]]
    assert share_windows(1, 512) is None
    most = share_windows(1000, 512)
    assert most is not None
    assert sum(map(len, (*most.steps, *most.held_back))) * 512 == MOST_TOKENS


def regression(seed: int = 0) -> tuple[Stored, np.ndarray, np.ndarray]:
    """A matrix of the trunk whose scales and biases were disturbed, inputs [16, 8, K] and what the weight gives for them."""
    weight, stored = trunk(seed)
    stored.scales *= np.random.RandomState(1).uniform(0.9, 1.1, stored.scales.shape).astype(np.float32)
    inputs = np.random.RandomState(2).standard_normal((16, 8, 64)).astype(np.float32)
    return stored, inputs, inputs @ weight.T


def test_descent_finds_least_squares() -> None:
    """The loss of one matrix is quadratic in its scales and biases, so that the least one is a linear solve."""
    stored, inputs, target = regression()
    flat, wanted = inputs.reshape(-1, 64), target.reshape(-1, 8)
    grouped, codes = flat.reshape(len(flat), 2, 32), stored.codes.reshape(8, 2, 32).astype(np.float32)

    def least() -> float:
        total = 0.0
        for r in range(8):
            columns = np.concatenate([np.einsum("tkg,kg->tk", grouped, codes[r]), grouped.sum(-1)], axis=1)
            total += float(np.linalg.lstsq(columns.astype(np.float64), wanted[:, r], rcond=None)[1][0]) / 2
        return total

    def loss() -> float:
        return float(np.square(flat @ stored.values()[0].T - wanted).sum()) / 2

    whole = View(1.0, {"m": stored})
    start, descent = loss(), Descent(parameters([whole]), steps=600, rate=0.02)
    for _ in range(600):
        rest = flat @ stored.values()[0].T - wanted
        descent.step(slopes(whole, {"m": Record(flat, rest, None, rest)}))
    assert loss() < 1.01 * least() < 0.95 * start


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_loss_on_what_is_held_back_never_rises(direction: float) -> None:
    """Whatever the gradients are: with the sign turned the start is kept, bit for bit."""
    stored, inputs, target = regression()
    whole = View(1.0, {"m": stored})
    moved = parameters([whole])
    before = {name: parameter.values.copy() for name, parameter in moved.items()}
    current = {"values": stored.values()[0]}

    def rest(rows: np.ndarray) -> np.ndarray:
        return (inputs[rows] @ current["values"].T - target[rows]).reshape(-1, 8)

    def down(rows: np.ndarray) -> Slopes:
        return slopes(whole, {"m": Record(inputs[rows].reshape(-1, 64), direction * rest(rows), None, rest(rows))})

    def loss(rows: np.ndarray) -> float:
        return float(np.square(rest(rows)).sum())

    def put() -> None:
        current["values"] = stored.values()[0]

    share = Share([np.arange(i, i + 2) for i in range(0, 12, 2)], [np.arange(12, 16)])
    outcome = refine(moved, share, loss, down, put, seed=0)
    assert loss(np.arange(12, 16)) == pytest.approx(outcome.after, rel=1e-6)
    if direction > 0:
        assert outcome.after < 0.9 * outcome.before
    else:
        assert outcome.after == outcome.before
        assert all((parameter.values == before[name]).all() for name, parameter in moved.items())


# What outputs are worth -----------------------------------------------------------------------------------------------


def test_metric_is_the_mean_outer_product() -> None:
    gradients = np.random.RandomState(0).standard_normal((3, 5, 4)).astype(np.float32) * np.array([1, 2, 3, 0.1])
    metric = measure_metric([gradients[:2].astype(np.float32), gradients[2:].astype(np.float32)])
    flat = gradients.reshape(-1, 4)
    wanted = sum(np.outer(g, g) for g in flat) / len(flat)
    np.testing.assert_allclose(metric.outputs, wanted + 0.05 * np.trace(wanted) / 4 * np.eye(4), rtol=1e-5, atol=1e-6)
    square = (flat**2).mean(axis=1)
    np.testing.assert_allclose(metric.tokens.reshape(-1), (square / square.mean() + 0.5) / 1.5, rtol=1e-5)
    difference = np.random.RandomState(1).standard_normal((1, 5, 4)).astype(np.float32)
    found, slope = metric.error(np.array([2]), difference)
    written = [metric.tokens[2, t] * d @ metric.outputs @ d / 2 for t, d in enumerate(difference[0])]
    assert found == pytest.approx(sum(written), rel=1e-5)
    step = 1e-2 * np.random.RandomState(2).standard_normal(difference.shape).astype(np.float32)
    ends = [metric.error(np.array([2]), difference + sign * step)[0] for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float(np.vdot(slope, step)), rel=1e-3)


def test_nothing_is_worth_anything() -> None:
    metric = measure_metric([np.zeros((2, 3, 4), np.float32)])
    assert (metric.outputs == np.eye(4)).all()
    assert (metric.tokens == 1).all()


# Factors --------------------------------------------------------------------------------------------------------------


def test_factors_of_a_worked_example() -> None:
    """Two experts, D = 1. Token 1 goes to both with weights 1 and 2: they add 1 and 4, where 6 is wanted; token 2 to the
    first and the third with weights 1 and 1: 2 and 0 where 2 is wanted. Least squares without a ridge: 1 + d_0 from token 2
    is 1, then 1 + 4 (1 + d_1) = 6."""
    outputs = np.array([[1.0], [2.0], [2.0], [0.0]], np.float32)
    rest = np.array([[[6.0 - 5.0], [2.0 - 2.0 + 1e-9]]], np.float32)
    gates = np.array([[1.0], [2.0], [1.0], [1.0]], np.float32)
    gradients = gates * np.repeat(rest.reshape(2, 1), 2, axis=0)
    record = Record(np.zeros((4, 1), np.float32), gradients, np.array([0, 1, 0, 2]), outputs)
    metric = Metric(np.eye(1, dtype=np.float32), np.ones((1, 2), np.float32))
    normal = normal_equations(record, rest, metric, np.array([0]), 4)
    np.testing.assert_allclose(normal.matrix[:3, :3], [[1 + 4, 4, 0], [4, 16, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(normal.right, [1, 4, 0, 0], atol=1e-6)
    np.testing.assert_allclose(fit_factors(normal, ridge=0.0), [1, 1.25, 1, 1], atol=1e-6)
    damped = fit_factors(normal, ridge=1.0)
    wanted = 1 + np.linalg.solve([[10, 4], [4, 32]], [1, 4])
    np.testing.assert_allclose(damped[:2], wanted, rtol=1e-6)


def test_factors_stay_within_bounds() -> None:
    assert list(fit_factors(Normal(np.eye(3), np.array([5.0, -5.0, 0.0])), ridge=0.0)) == [2.0, 0.5, 1.0]


# In a model -----------------------------------------------------------------------------------------------------------


class Opened:
    """A toy model walked with random tokens, its layers' matrices coded at 2 bits, without their better neighbours."""

    def __init__(self, folder: Path):
        self.source = Source(open_checkpoint(write_qwen3(folder / "source", **SMALL)), 32)
        tokens = np.random.RandomState(0).randint(0, 256, (12, 24)).astype(np.int32)
        self.walk = Walk(LayerStream(self.source), tokens, folder)
        self.stream = self.walk.stream
        self.last = len(self.stream.layers)
        self.walk.embed("hidden")
        for i in range(self.last):
            with self.stream.loaded(i):
                self.walk.advance(i, "hidden")
        with self.walk.spill("gradient", 1) as write:
            for rows in self.walk.batches():
                shape = (*tokens[rows].shape, SMALL["hidden_size"])
                write(rows, mx.array(np.random.RandomState(1).standard_normal(shape).astype(np.float32)))
        share = share_windows(*tokens.shape)
        assert share is not None
        self.share = Share(np.array_split(np.concatenate(share.steps), 4), share.held_back)
        self.packed: dict[str, list[PackedMatrix]] = {}  # of the experts that were coded last

    def coded(self, i: int, level: int = 2) -> dict[str, Stored]:
        """Of a loaded layer, or (behind the last) the head; experts at a level."""
        found = {}
        inside = [t for t in self.source.trunk if t.tensor_class and t.name.startswith(self.stream.path(i) + ".")]
        for tensor in inside if i < self.last else [t for t in self.source.trunk if t.tensor_class == "head"]:
            weight = self.stream.weight(tensor.name)
            found[tensor.module] = Stored.trunk(affine_search(weight.reshape(-1, 32), 2), weight.shape)
        site = self.source.sites[i] if i < self.last else None
        for shape in self.source.shapes[site.path] if site else ():
            stack = self.stream.weight(f"{site.path}.{shape.name}.weight")  # type: ignore[union-attr]
            packed = [pack_matrix(weight, shape, level).matrix for weight in stack]
            self.packed[f"{site.path}.{shape.name}"] = packed  # type: ignore[union-attr]
            found[f"{site.path}.{shape.name}"] = Stored.experts(packed, IDENTITY)  # type: ignore[union-attr]
        return found


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(tmp_path_factory.mktemp("polish"))


def test_a_layer_comes_nearer_to_the_original(opened: Opened) -> None:
    with opened.stream.loaded(0):
        stored = opened.coded(0)
        outcome = polish_layer(opened.walk, 0, "hidden", "hidden", [View(1.0, stored)], opened.share, seed=0)
        assert outcome.after < 0.98 * outcome.before
        for path, matrix in stored.items():  # what is in the model is what is stored
            found = opened.stream.weight(f"{path}.weight")
            np.testing.assert_array_equal(found.reshape(matrix.codes.shape), matrix.values())


def test_a_layer_comes_nearer_at_every_level_that_counts(opened: Opened) -> None:
    """Experts of 3 bits, read at 2 as well. What is counted falls; what is in the model at the end is what is written, and a
    reading that counts nothing gets less than one that does."""

    def losses(weight: float) -> list[float]:
        with opened.stream.loaded(0):
            stored = opened.coded(0, 3)
            lowered = {p: m.lowered(opened.packed[p], 2) if p in opened.packed else m for p, m in stored.items()}
            views = [View(1.0, stored), View(weight, lowered)]
            outcome = polish_layer(opened.walk, 0, "hidden", "hidden", views, opened.share, seed=0)
            assert outcome.after < 0.98 * outcome.before
            for path, matrix in stored.items():
                found = opened.stream.weight(f"{path}.weight")
                np.testing.assert_array_equal(found.reshape(matrix.codes.shape), matrix.values())
            return [_loss(opened, view) for view in views]

    (full, _), (compromise, low) = losses(0.0), losses(4.0)
    assert full < compromise
    with opened.stream.loaded(0):
        stored = opened.coded(0, 3)
        start = {p: m.lowered(opened.packed[p], 2) if p in opened.packed else m for p, m in stored.items()}
        assert low < 0.98 * _loss(opened, View(1.0, start))


def _loss(opened: Opened, view: View) -> float:
    """The mean square of what layer 0 gives away, by the original's hidden states."""
    opened.stream.replace((f"{path}.weight", matrix.values()) for path, matrix in view.matrices.items())
    rows = np.concatenate(opened.share.held_back)
    found = opened.stream.run(0, opened.walk.batch(rows), opened.walk.read("hidden", 0, rows)).astype(mx.float32)
    difference = np.array(found - opened.walk.read("hidden", 1, rows).astype(mx.float32))
    return layer_metric(opened.walk, 0).error(rows, difference)[0]


def test_one_factor_for_every_expert(opened: Opened) -> None:
    """Experts that were made too small are made large again; the fold is a product of the scales."""
    site = opened.source.sites[0]
    path = f"{site.path}.down_proj"
    with opened.stream.loaded(0):
        last = opened.coded(0)[path]
        wanted, before = np.array([1.0, 0.8, 1.25, 1.0]), last.scales.copy()
        weight = opened.stream.weight(f"{path}.weight")
        opened.stream.replace([(f"{path}.weight", weight / wanted[:, None, None])])
        found = polish_factors(opened.walk, 0, "hidden", "hidden", site.path, last)
    np.testing.assert_allclose(found, wanted, rtol=0.01)  # the ridge is 1 %
    np.testing.assert_allclose(last.scales, before * found[:, None, None], rtol=1e-6)


def test_the_model_comes_nearer_to_the_original(opened: Opened) -> None:
    with ExitStack() as layers:
        for i in range(opened.last):
            layers.enter_context(opened.stream.loaded(i))
        stored = {path: m for i in range(opened.last + 1) for path, m in opened.coded(i).items()}
        steps: list[int] = []
        outcome = polish_model(opened.walk, stored, {}, opened.share, 0, steps.append)
        assert outcome.after < 0.98 * outcome.before
        assert sum(steps) == 3 * len(opened.share.steps)
