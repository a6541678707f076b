"""How outputs of copies are combined: every rule against a formula over numpy arrays, token by token."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxmoe.copies import ONE_COPY, Copies, Selector, combined

C, T, A, E, D = 3, 40, 2, 5, 8


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_copies_are_added_up_each_with_its_weight() -> None:
    outputs = gaussian(C, T, A, D)
    weights = np.array([[0.5, 1.0, 0.2], [0.5, 0.0, 0.3], [0.0, 0.0, 0.4]], np.float32)
    experts = np.random.default_rng(1).integers(0, 3, (T, A))
    expected = np.einsum("ctad,cta->tad", outputs, weights[:, experts])
    each = list(map(mx.array, outputs))
    found = combined(each, Copies(weights=mx.array(weights)), mx.array(experts))
    np.testing.assert_allclose(np.array(found), expected, atol=1e-6)
    assert combined(each[:1], ONE_COPY, mx.array(experts)) is each[0]


@pytest.fixture
def fixed() -> np.ndarray:
    """Weights [C, E] of experts with three, two and one copies."""
    present = np.array([3, 2, 1, 3, 2])
    return np.where(np.arange(C)[:, None] < present, 1 / present, 0).astype(np.float32)


def by_hand(
    outputs: np.ndarray, norms: np.ndarray, fixed: np.ndarray, lines: np.ndarray, usual: np.ndarray | None
) -> np.ndarray:
    """One expert's output [D] at an input of norm `norms`, from those of its copies [C, D]; lines [2, C], usual a number."""
    present = np.flatnonzero(fixed)
    if usual is not None and abs(norms - usual) >= usual / 2:
        return np.mean(outputs[present], axis=0)
    return outputs[min(present, key=lambda c: lines[0, c] * np.log(norms) + lines[1, c])]


@pytest.mark.parametrize("careful", [False, True])
def test_the_copy_of_least_expected_error_is_chosen(careful: bool, fixed: np.ndarray) -> None:
    outputs, lines = gaussian(C, T, A, D, seed=1), gaussian(2, C, E, seed=2)
    x = gaussian(T, D, seed=3) * np.exp(gaussian(T, 1, seed=4))
    experts = np.random.default_rng(5).integers(0, E, (T, A))
    usual = np.array([2.0, 3.0, 0.0, 0.0, 4.0], np.float32) if careful else None
    selector = Selector(*map(mx.array, lines), None if usual is None else mx.log(mx.array(usual)))
    copies, norms = Copies(weights=mx.array(fixed), selector=selector), np.linalg.norm(x, axis=1)
    expected = np.stack(
        [
            [
                by_hand(outputs[:, t, a], norms[t], fixed[:, e], lines[:, :, e], None if usual is None else usual[e])
                for a, e in enumerate(experts[t])
            ]
            for t in range(T)
        ]
    )
    log_norms = copies.log_norms(mx.array(x))
    assert log_norms is not None
    found = combined(list(map(mx.array, outputs)), copies, mx.array(experts), log_norms[:, None])
    np.testing.assert_allclose(np.array(found), expected, atol=1e-6)
    for e in range(E):  # the pairs of one expert, of which copies that it lacks may be left out
        t, a = np.nonzero(experts == e)
        few = [mx.array(outputs[c, t, a]) for c in range(np.count_nonzero(fixed[:, e]))]
        alone = combined(few, copies, mx.array(e), log_norms[mx.array(t)])
        assert (np.array(alone) == np.array(found)[t, a]).all()


def test_equal_errors_take_the_first_and_an_input_of_zero_is_an_input(fixed: np.ndarray) -> None:
    outputs = gaussian(C, 1, D)
    equal = Copies(weights=mx.array(fixed), selector=Selector(mx.ones((C, E)), mx.zeros((C, E))))
    log_norms = equal.log_norms(mx.zeros((1, D)))
    found = combined(list(map(mx.array, outputs)), equal, mx.array([0]), log_norms)
    assert (np.array(found) == outputs[0]).all()
    level = Selector(mx.zeros((C, E)), mx.broadcast_to(mx.array([[1.0], [0.0], [2.0]]), (C, E)))
    found = combined(list(map(mx.array, outputs)), replace(equal, selector=level), mx.array([0]), log_norms)
    assert (np.array(found) == outputs[1]).all()
    assert ONE_COPY.log_norms(mx.zeros((1, D))) is None
