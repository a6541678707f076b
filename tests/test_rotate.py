"""Rotations: orthogonal, undone exactly, against independent Hadamard matrices; DFRot's objective; the choice by error."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from mlxmoe.convert.calibrated import measure_experts, pack_experts
from mlxmoe.convert.gptq import DAMPING
from mlxmoe.convert.rotate import (
    AUTO,
    CANDIDATES,
    CHOICES,
    WORTHWHILE_DB,
    Rotated,
    Sample,
    as_stored,
    check_rotation,
    choose_rotation,
    dfrot,
    dfrot_loss,
    longest_rules,
    make_rotation,
    massive_tokens,
    quantized_activations,
    rotated_error,
    sampled_rotation,
)
from mlxmoe.convert.stats import Moments
from mlxmoe.errors import UserError
from mlxmoe.formats import PLANE_WIDTHS, MatrixShape, dequantize_codes, join_planes, unpack_codes
from mlxmoe.rotation import (
    FITTED,
    NAMES,
    PLAIN,
    STORED,
    LayerRotations,
    Rotation,
    RotationRule,
    dense,
    fits,
    plain_rotation,
    rotate,
    rotate_moments,
    sylvester,
    unrotate,
)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def activations(tokens: int = 96, columns: int = 64, massive: int = 8) -> np.ndarray:
    """Gaussian tokens; the first `massive` have two huge values and little else."""
    x = gaussian(tokens, columns, seed=5)
    x[:massive] *= 0.05
    x[:massive, 3], x[:massive, 17] = 300.0, -200.0
    return x


def made(name: str, columns: int = 128, seed: int = 0) -> Rotation:
    x, w = activations(columns=columns), gaussian(2, 8, columns, seed=3)
    return make_rotation(name, columns, seed, x, w, (x.T @ x)[None], 2, 64)


@pytest.mark.parametrize("name", NAMES)
def test_a_rotation_is_orthogonal_and_leaves_products_alone(name: str) -> None:
    rotation = made(name)
    assert rotation.name == name
    matrix = dense(rotation).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(128), atol=2e-5)
    w, x = gaussian(16, 128, seed=1), gaussian(5, 128, seed=2)
    np.testing.assert_allclose(rotate(x, rotation), x @ matrix.T, atol=1e-4)  # R x, row by row
    np.testing.assert_allclose(rotate(x, rotation) @ rotate(w, rotation).T, x @ w.T, atol=2e-4)
    np.testing.assert_allclose(unrotate(rotate(x, rotation), rotation), x, atol=2e-5)
    moments = x.T @ x
    np.testing.assert_allclose(rotate_moments(moments, rotation), matrix @ moments @ matrix.T, atol=1e-3)


def test_activations_are_rounded_to_even_steps_of_each_token() -> None:
    x = np.array([[7.0, -3.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(quantized_activations(x, 4), [[7, -3, 1, 0], [0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(quantized_activations(x, 4, clip=0.5)[0], [3.5, -3.5, 0.5, 0], atol=1e-6)


def test_massive_tokens_are_those_that_stand_out() -> None:
    np.testing.assert_array_equal(massive_tokens(activations()), np.arange(96) < 8)


@pytest.mark.parametrize("gamma", [1, 50, 200])
def test_dfrot_lowers_its_own_loss(gamma: float) -> None:
    x = activations()
    massive = massive_tokens(x)
    before = dfrot_loss(rotate(x, plain_rotation("randomised-hadamard", 64)), massive, gamma)
    after = dfrot_loss(rotate(x, dfrot(x, gamma)), massive, gamma)
    assert after < 0.97 * before


def test_one_step_of_dfrot_is_scipys_procrustes() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x = activations()
    start = dense(plain_rotation("randomised-hadamard", 64, seed=2))
    weight = np.sqrt(np.where(massive_tokens(x), 100.0, 1.0))[:, None]
    turned = x @ start.T
    step, _ = linalg.orthogonal_procrustes(weight * turned, weight * quantized_activations(turned, 4))
    np.testing.assert_allclose(dense(dfrot(x, 100, seed=2, iterations=1)), step.T @ start, atol=1e-4)


def test_dfrots_loss_is_the_written_out_sum() -> None:
    x, massive = gaussian(6, 8), np.array([True, True, False, False, False, False])
    expected = sum((50 if t < 2 else 1) * float(((x[t] - quantized_activations(x[t], 4)) ** 2).sum()) for t in range(6))
    assert dfrot_loss(x, massive, 50) == pytest.approx(expected, rel=1e-5)


def test_a_larger_gamma_serves_massive_tokens_more() -> None:
    x = activations()
    massive = massive_tokens(x)
    low, high = (rotate(x, dfrot(x, gamma)) for gamma in (0.01, 200))
    assert dfrot_loss(high, massive, 1e9) < dfrot_loss(low, massive, 1e9)


def test_the_adaptive_one_is_the_best_of_its_kind() -> None:
    x, w = activations(columns=64), gaussian(2, 8, 64, seed=3)
    moments = (x.T @ x)[None]
    errors = {n: rotated_error(w, moments, make_rotation(n, 64, 0, x, w, moments, 2, 64), 2, 64) for n in FITTED}
    assert errors["dfrot-adaptive"] == min(errors.values())


def test_outliers_call_for_a_rotation_and_light_tails_do_not() -> None:
    """Two-valued weights are coded without error as they are: every rotation makes them worse."""
    even = np.eye(128, dtype=np.float32)[None]
    two_valued = np.sign(gaussian(2, 16, 128))
    choice = choose_rotation(two_valued, even, bits=2, group_size=64)
    assert choice.name == "none"
    assert max(gain for name, gain in choice.gains.items() if name != "none") < -3
    spiky = gaussian(2, 16, 128) * np.where(np.arange(128) % 16 == 0, 20, 1).astype(np.float32)
    choice = choose_rotation(spiky, even, bits=2, group_size=64)
    assert choice.name != "none"
    assert choice.gains[choice.name] == max(choice.gains.values()) > WORTHWHILE_DB
    assert set(choice.gains) == set(PLAIN)


def test_the_gain_is_the_ratio_of_errors_and_a_small_one_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"none": 100.0, "random": 94.0, "block-hadamard-64": 200.0}
    monkeypatch.setattr("mlxmoe.convert.rotate.rotated_error", lambda w, h, rotation, bits, size: errors[rotation.name])
    choice = choose_rotation(gaussian(1, 4, 192), np.eye(192, dtype=np.float32)[None], names=tuple(errors))
    assert choice.gains["random"] == pytest.approx(0.2687, abs=1e-4)
    assert choice.gains["block-hadamard-64"] == pytest.approx(-3.0103, abs=1e-4)
    assert choice.name == "none"


def test_what_is_stored() -> None:
    assert [made(name).nbytes for name in PLAIN] == [0, 2 * 128 * 128, 0, 16, 16, 16]
    assert made("dfrot-100").nbytes == 2 * 128 * 128


def test_bad_input() -> None:
    with pytest.raises(UserError, match="no plain rotation"):
        plain_rotation("householder", 64)
    with pytest.raises(UserError, match="there are none"):
        make_rotation("dfrot-50", 64)
    with pytest.raises(UserError, match="not a power of two"):
        sylvester(96)


# Of a layer -----------------------------------------------------------------------------------------------------------

SHAPES = (
    MatrixShape("gate_proj", 16, 128, 64),
    MatrixShape("up_proj", 16, 128, 64),
    MatrixShape("down_proj", 128, 64, 32),
)


def moments_of(x: np.ndarray, experts: int, rows: int) -> Moments:
    """Of experts that all see the same inputs, whose rows all count alike."""
    hessian = np.broadcast_to((x.T @ x / len(x)).astype(np.float32), (experts, x.shape[1], x.shape[1]))
    return Moments(hessian, np.ones((experts, rows)), np.full(experts, len(x)), 1.0, x)


def test_what_pays_is_chosen_for_each_of_a_layers_inputs() -> None:
    """Two-valued weights are exact as they are; spiky ones are not."""
    two_valued = Sample(np.sign(gaussian(3, 16, 128)), np.stack([np.eye(128, dtype=np.float32)] * 3))
    spiky = gaussian(2, 128, 64) * np.where(np.arange(64) % 16 == 0, 20, 1).astype(np.float32)
    hidden = Sample(spiky, np.stack([np.eye(64, dtype=np.float32)] * 2))
    rotated = sampled_rotation(AUTO, SHAPES, (two_valued, hidden), bits=2, seed=1)
    assert rotated.inputs.name == "none"
    assert rotated.hidden.name in CANDIDATES
    assert [rotated.of(p, 3).name for p in range(3)] == ["none", "none", rotated.hidden.name]
    assert [rotated.of(p, 2).name for p in range(2)] == ["none", rotated.hidden.name]
    assert rotated.rules(1) == LayerRotations(RotationRule(), RotationRule(rotated.hidden.name, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_layers_rotations_are_kept_whole(name: str) -> None:
    x, w = activations(columns=128), gaussian(2, 8, 128, seed=3)
    samples = tuple(Sample(w[..., :k], (x[:, :k].T @ x[:, :k])[None].repeat(2, 0), x[:, :k]) for k in (128, 64))
    if not fits(name, 64):
        name = "block-hadamard-64"
    rotated = sampled_rotation(name, SHAPES, samples, bits=2, seed=4)
    again = Rotated.from_arrays(rotated.arrays(), SHAPES, 4)
    for before, after in zip(rotated, again, strict=True):
        assert before.name == after.name
        np.testing.assert_array_equal(dense(before), dense(after))
    assert again.rules(4) == rotated.rules(4)
    for rule, rotation in zip(rotated.rules(4), rotated, strict=True):
        assert rule.crc32 == (zlib.crc32(rotation.block.astype(np.float16).tobytes()) if name in STORED else 0)


@pytest.mark.parametrize("name", CHOICES)
def test_no_rule_is_longer_than_was_counted(name: str) -> None:
    counted = len(json.dumps(longest_rules(name, 7)))
    for chosen in (*CANDIDATES, "none") if name == AUTO else (name,):
        rule = RotationRule(chosen, 0 if chosen == "none" else 7, 4294967295 if chosen in STORED else 0)
        assert len(json.dumps((rule, rule))) <= counted


@pytest.mark.parametrize("name", ["none", "random", "block-hadamard-64"])
def test_experts_are_coded_behind_a_rotation(name: str) -> None:
    """What is stored is W R'; values and errors are those of the matrix rotated back."""
    weight, x = gaussian(3, 16, 128, seed=1), gaussian(200, 128, seed=2) * np.linspace(0.2, 2, 128, dtype=np.float32)
    moments, rotation = moments_of(x, 3, 16), as_stored(plain_rotation(name, 128, 6))
    packed = pack_experts(weight, moments, [2, 4, 2], SHAPES[0], 0.0, rotation)
    for e, (matrix, errors, values) in enumerate(packed):
        codes = join_planes([unpack_codes(p, w, 128) for p, w in zip(matrix.planes, PLANE_WIDTHS, strict=False)])
        stored = np.array(dequantize_codes(codes, matrix.scales, matrix.level))
        np.testing.assert_allclose(values, stored @ dense(rotation), atol=1e-5)
        own, left = (loss_of(d, x) for d in (weight[e], weight[e] - values))
        assert errors[-1] == pytest.approx(left / own, rel=1e-2)
        assert errors[-1] < {2: 0.2, 4: 0.02}[matrix.level]


def loss_of(difference: np.ndarray, x: np.ndarray) -> float:
    """Squared error of the outputs, the damping counted in."""
    damping = DAMPING * float(np.square(x).sum()) / x.size
    return float(np.square(difference @ x.T).sum() / len(x) + damping * np.square(difference).sum())


def test_measured_errors_are_those_behind_the_rotation_and_values_are_rotated_back() -> None:
    weight = gaussian(2, 16, 128, seed=1) * np.where(np.arange(128) % 16 == 0, 20, 1).astype(np.float32)
    moments, rotation = moments_of(gaussian(300, 128, seed=2), 2, 16), plain_rotation("hadamard", 128)
    seen: dict[int, np.ndarray] = {}
    look = {"rotation": rotation, "seen": lambda part, i, values: seen.update({i: values})}
    turned = measure_experts(weight, moments, [2, 8], 64, **look)  # type: ignore[arg-type]
    plain = measure_experts(weight, moments, [2, 8], 64)
    np.testing.assert_allclose(turned.norms, plain.norms, rtol=1e-4)
    assert (turned.errors[:, 0] < 0.5 * plain.errors[:, 0]).all()
    np.testing.assert_allclose(seen[1], weight, atol=0.02 * np.abs(weight).max())


def test_a_name_that_does_not_fit_is_refused() -> None:
    check_rotation("block-hadamard-64", SHAPES)
    check_rotation(AUTO, (MatrixShape("fc1", 8, 96, 32), MatrixShape("fc2", 96, 8, 32)))
    with pytest.raises(UserError, match="does not fit the 64 columns of down_proj"):
        check_rotation("block-hadamard-128", SHAPES)
    with pytest.raises(UserError, match="does not fit the 96 columns of fc1, which are not a power of two"):
        check_rotation("dfrot-50", (MatrixShape("fc1", 8, 96, 32), MatrixShape("fc2", 96, 64, 32)))
