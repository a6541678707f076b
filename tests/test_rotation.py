"""Rotations: orthogonal, against independent Hadamard matrices, stable from version to version; the same on activations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.convert.rotate import as_stored, make_rotation, matrix_of
from mlxmoe.errors import UserError
from mlxmoe.kernels import HADAMARD_BLOCKS, ReferenceKernels, has_rotation
from mlxmoe.rotation import (
    NAMES,
    PLAIN,
    STORED,
    RotationRule,
    dense,
    fits,
    hadamard_size,
    make_turn,
    plain_rotation,
    random_orthogonal,
    random_signs,
    rotate,
    sylvester,
    turn_nbytes,
    turned,
)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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


# What a file depends on --------------------------------------------------------------------------------------------------


def test_signs_are_the_bits_of_pcg64_written_out() -> None:
    """PCG64 in plain integers (O'Neill's XSL-RR 128/64), seeded as NumPy seeds it: other signs, and every file is noise."""
    mask = (1 << 128) - 1
    state = np.random.PCG64(12).state["state"]
    value, bits = state["state"], []
    for _ in range(40):
        value = (value * 0x2360ED051FC65DA44385DF649FCCF645 + state["inc"]) & mask
        turn, word = value >> 122, (value >> 64) ^ value & (1 << 64) - 1
        word = (word >> turn | word << (64 - turn)) & (1 << 64) - 1
        bits += [word >> 31 & 1, word >> 63]
    np.testing.assert_array_equal(random_signs(79, 12), np.where(bits, 1, -1)[:79])
    assert "".join("+" if s > 0 else "-" for s in random_signs(24, 0)) == "+++------+++++++++++-++-"


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_rotated_as_the_moments_were(name: str) -> None:
    """R of the runtime, made from the rule and the stored matrix, against R as a dense matrix."""
    x = gaussian(5, 3, 128)
    rotation = as_stored(
        make_rotation(name, 128, 3, x[0], gaussian(2, 8, 128), np.eye(128, dtype=np.float32)[None], 2, 64)
    )
    matrix = matrix_of(rotation) if name in STORED else None
    turn = make_turn(RotationRule(name, 3), 128, matrix, mx.float32)
    np.testing.assert_allclose(np.array(turned(mx.array(x), turn)), x @ dense(rotation).T, atol=1e-5)
    taken = 0 if turn is None else turn.signs.nbytes + (turn.matrix.nbytes if turn.matrix is not None else 0)
    assert turn_nbytes(RotationRule(name, 3), 128, mx.float32) == taken


@pytest.mark.parametrize("name", ["random", "hadamard", "block-hadamard-64"])
def test_a_rotated_row_does_not_depend_on_the_others(name: str) -> None:
    rotation = plain_rotation(name, 192 if name.startswith("block") else 128)
    columns = len(rotation.signs)
    turn = make_turn(RotationRule(name), columns, matrix_of(rotation), mx.float32)
    assert turn is not None
    x = mx.array(gaussian(33, columns))
    rows = mx.concatenate([turn(x[i : i + 1]) for i in range(33)])
    assert mx.array_equal(turn(x), rows)
    assert mx.array_equal(turn(x[:32].reshape(4, 8, 1, columns)).reshape(32, columns), rows[:32])


def test_activations_keep_their_type() -> None:
    x = mx.array(gaussian(4, 128)).astype(mx.float16)
    for name in ("random", "block-hadamard-64"):
        turn = make_turn(RotationRule(name), 128, matrix_of(plain_rotation(name, 128)), mx.float16)
        assert turned(x, turn).dtype == mx.float16


def test_which_rotations_have_kernels() -> None:
    assert [name for name in NAMES if has_rotation(name, 128)] == [name for name in PLAIN if name != "random"]
    assert not has_rotation("hadamard", 32)
    assert not has_rotation("hadamard", 2 * max(HADAMARD_BLOCKS))
    assert hadamard_size("hadamard", 512) == 512
    assert hadamard_size("block-hadamard-64", 512) == 64
