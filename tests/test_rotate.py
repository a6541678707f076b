"""Rotations: orthogonal, undone exactly, against independent Hadamard matrices; DFRot's objective; the choice by error."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.convert.rotate import (
    FITTED,
    NAMES,
    PLAIN,
    WORTHWHILE_DB,
    Rotation,
    choose_rotation,
    dense,
    dfrot,
    dfrot_loss,
    fits,
    make_rotation,
    massive_tokens,
    plain_rotation,
    quantized_activations,
    random_orthogonal,
    rotate,
    rotate_moments,
    rotated_error,
    sylvester,
    unrotate,
)
from mlxmoe.errors import UserError


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


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(PLAIN), st.integers(0, 1 << 20), st.sampled_from([64, 128, 192, 384]))
def test_lengths_are_kept_for_any_seed_and_width(name: str, seed: int, columns: int) -> None:
    if not fits(name, columns):
        with pytest.raises(UserError, match=r"power of two|does not fit"):
            plain_rotation(name, columns, seed)
        return
    x = gaussian(3, columns, seed=seed % 7)
    turned = rotate(x, plain_rotation(name, columns, seed))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 64, 256])
def test_sylvester_is_scipys_hadamard_matrix_and_mlxs_transform(size: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    np.testing.assert_allclose(sylvester(size), linalg.hadamard(size) / np.sqrt(size), rtol=1e-6)
    x = gaussian(4, size)
    np.testing.assert_allclose(x @ sylvester(size).T, np.array(mx.hadamard_transform(mx.array(x))), atol=1e-5)


def test_the_block_form_is_what_the_runtimes_kernel_computes() -> None:
    from mlxmoe.kernels import ReferenceKernels

    rotation, x = plain_rotation("block-hadamard-128", 384, seed=4), gaussian(3, 384)
    expected = ReferenceKernels().hadamard_blocks(mx.array(x), mx.array(rotation.signs), 128)
    np.testing.assert_allclose(rotate(x, rotation), np.array(expected), atol=1e-5)


def test_random_orthogonal_matrices_have_no_preferred_sign() -> None:
    """Without the sign fix the mean of the trace is far from 0."""
    traces = [np.trace(random_orthogonal(8, seed)) for seed in range(300)]
    assert abs(np.mean(traces)) < 0.25  # its standard error is 1/sqrt(300) = 0.06; without the fix about -2


def test_signs_before_the_hadamard_matrix_change_the_rounding_and_behind_it_do_not() -> None:
    w = gaussian(1, 64)
    signs = plain_rotation("randomised-hadamard", 64, seed=1).signs
    behind = w @ sylvester(64).T * signs
    before = rotate(w, plain_rotation("randomised-hadamard", 64, seed=1))
    plain = w @ sylvester(64).T
    np.testing.assert_array_equal(np.sort(np.abs(behind)), np.sort(np.abs(plain)))
    assert not np.allclose(np.sort(np.abs(before)), np.sort(np.abs(plain)))


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
