"""Replicas: which rotations, which experts, how outputs are combined. Every rule against a formula worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.convert.config import Replication, parse_replicas
from mlxmoe.convert.quantize import clip_search, encode
from mlxmoe.convert.replicas import (
    COPIES,
    POOL,
    adaptive_budgets,
    benefit,
    choose_replicated,
    combine,
    conservative,
    copies_per_expert,
    copy_seeds,
    copy_settings,
    ensemble_error,
    error_lines,
    fit_selection,
    group,
    learned_weights,
    mean_weights,
    most_different,
    output_weights,
    runtime_weights,
    sensitivity,
    similarity,
    similarity_matrix,
    variance_weights,
    vote,
)
from mlxmoe.formats import MatrixShape
from mlxmoe.plan import ExpertEntry, LayerPlan, Replicas, Selection
from mlxmoe.rotation import UNROTATED, LayerRotations, Rotation, RotationRule, plain_rotation, rotate, unrotate


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# -- rotations --------------------------------------------------------------------------------------------------------


def test_rotations_that_round_alike_are_the_same() -> None:
    """Rows in another order and with other signs: nothing changes for a symmetric quantizer."""
    first = plain_rotation("randomised-hadamard", 64, seed=1)
    order = np.random.default_rng(0).permutation(64)
    mirrored = Rotation("mirror", first.signs, -first.block[order])
    assert similarity(first, mirrored) == pytest.approx(1, abs=1e-6)
    assert similarity(first, plain_rotation("none", 64)) == pytest.approx(1 / 8, abs=1e-6)  # every entry is 64^-1/2


def test_similarity_by_hand() -> None:
    """30 degrees: every axis is nearest to one at cos 30."""
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    turned = Rotation("turn", np.ones(2, np.float32), np.array([[cos, -sin], [sin, cos]], np.float32))
    matrix = similarity_matrix([plain_rotation("none", 2), turned])
    np.testing.assert_allclose(matrix, [[1, np.sqrt(3) / 2], [np.sqrt(3) / 2, 1]], atol=1e-6)


def test_the_least_similar_pair_and_then_the_largest_sum_of_angles() -> None:
    similarities = np.array([[1, 0.9, 0.8, 0.3], [0.9, 1, 0.1, 0.5], [0.8, 0.1, 1, 0.6], [0.3, 0.5, 0.6, 1]])
    assert most_different(similarities, 1) == [0]
    assert most_different(similarities, 2) == [1, 2]
    # arccos 0.9 + arccos 0.8 = 1.09 for the first, arccos 0.5 + arccos 0.6 = 1.97 for the last
    assert most_different(similarities, 3) == [1, 2, 3]
    assert most_different(similarities, 4) == [1, 2, 3, 0]


def test_settings_progress_from_copy_to_copy() -> None:
    first, second, third = copy_settings(3, "mixed")
    assert [s.rotation for s in (first, second, third)] == [0, 1, 2]
    assert [s.activation_bits for s in (first, second, third)] == [8, 16, 16]
    assert [s.stochastic for s in (first, second, third)] == [False, True, True]
    assert [s.shift for s in (first, second, third)] == pytest.approx([0, 1 / 3, 2 / 3])
    assert [s.group_size for s in (first, second, third)] == [128, 64, 32]
    assert {s.rotation for s in copy_settings(3, "activation")} == {0}
    assert {(s.stochastic, s.clip, s.group_size) for s in copy_settings(3, "rotation")} == {(False, 1.0, 128)}


# -- experts ----------------------------------------------------------------------------------------------------------


def test_groups_and_their_copies() -> None:
    assert group(0.01, 0.1, shared=True) == "shared"
    assert group(0.11, 0.9) == "frequent"
    assert group(0.1, 0.71) == "domain"
    assert group(0.1, 0.7) == "specialised"
    assert [COPIES[name] for name in ("shared", "frequent", "domain", "specialised")] == [3, 2, 2, 1]


def test_sensitivity_and_benefit_by_hand() -> None:
    scores = sensitivity(np.array([2.0, 1.0]), np.array([0.0, 4.0]), np.array([0.5, 0.25]))
    np.testing.assert_allclose(scores, [0.5 + 0 + 0.2, 0.25 + 0.3 + 0.1])
    np.testing.assert_allclose(benefit(scores, np.array([0.5, 0.25]), np.array([0.0, 1.0])), [0.35, 0.325])
    np.testing.assert_array_equal(sensitivity(np.zeros(2), np.zeros(2), np.zeros(2)), [0, 0])


def test_the_budget_takes_the_best() -> None:
    scores = np.array([1.0, 5, 3, 3, 2, 0, 0, 0, 0, 4])
    np.testing.assert_array_equal(np.flatnonzero(choose_replicated(scores, 0.30)), [1, 2, 9])
    assert choose_replicated(scores, 0.0).sum() == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0.16, 0.44))
def test_adaptive_budgets_have_their_mean_and_their_limits(scores: list[float], mean: float) -> None:
    budgets = adaptive_budgets(np.array(scores), mean)
    assert budgets.mean() == pytest.approx(mean, abs=1e-6)
    assert budgets.min() >= 0.15
    assert budgets.max() <= 0.45
    assert (np.diff(budgets[np.argsort(scores, kind="stable")]) >= 0).all()


def test_adaptive_budgets_by_hand() -> None:
    """0.1 and 0.2 per unit of score: the first is held at 0.15, so the second has the rest of the mean."""
    np.testing.assert_allclose(adaptive_budgets(np.array([1.0, 2.0]), 0.225), [0.15, 0.30], atol=1e-9)
    np.testing.assert_allclose(adaptive_budgets(np.array([1.0, 9.0]), 0.25), [0.15, 0.35], atol=1e-9)


def test_what_copies_can_give_is_what_they_do_give() -> None:
    """Rotated copies of Gaussian weights at 2 bits, against the formula; and one bit more gives more than two copies."""
    w = random(64, 128).astype(np.float32)

    def coded(bits: int, seed: int) -> np.ndarray:
        rotation = plain_rotation("randomised-hadamard", 128, seed)
        groups = rotate(w, rotation)
        scales = clip_search(groups, bits)[0].astype(np.float32)
        return unrotate((encode(groups, scales, bits) - np.float32(((1 << bits) - 1) / 2)) * scales[:, None], rotation)

    def error(value: np.ndarray) -> float:
        gain = np.vdot(w, value) / np.vdot(value, value)
        return float(np.square(w - gain * value).sum() / np.square(w).sum())

    single = error(coded(2, 0))
    pair = error((coded(2, 0) + coded(2, 1)) / 2)
    assert pair == pytest.approx(ensemble_error(single, 2), rel=0.06)  # copies are nearly, not quite independent
    assert error(coded(3, 0)) < 0.6 * pair
    assert ensemble_error(0.1175, 2) == pytest.approx(10**-1.205, rel=0.005)  # research note: -12.05 dB


# -- combining --------------------------------------------------------------------------------------------------------


def test_mean_and_weighted_sums() -> None:
    outputs = random(3, 4, 5)
    np.testing.assert_allclose(combine(outputs, mean_weights(3)), outputs.mean(axis=0))
    per_token = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2]])
    np.testing.assert_allclose(combine(outputs, per_token)[3], 2 * outputs[2, 3])
    np.testing.assert_allclose(combine(outputs, per_token)[1], outputs[1, 1])


def test_variance_weights_by_hand() -> None:
    np.testing.assert_allclose(variance_weights(np.array([1.0, 3.0])), [0.75, 0.25])
    np.testing.assert_allclose(variance_weights(np.array([0.0, 3.0, 0.0])), [0.5, 0, 0.5])


def test_learned_weights_find_the_mixture() -> None:
    outputs = random(3, 50, 7)
    target = 0.5 * outputs[0] - 0.25 * outputs[1] + 2 * outputs[2]
    np.testing.assert_allclose(learned_weights(outputs, target), [0.5, -0.25, 2], atol=1e-4)
    noisy = target + 3 * random(50, 7, seed=1)
    flat = outputs.reshape(3, -1)
    np.testing.assert_allclose(
        learned_weights(outputs, noisy), np.linalg.lstsq(flat.T, noisy.reshape(-1), rcond=None)[0], atol=1e-3
    )


def test_learned_weights_of_equal_copies_are_their_mean() -> None:
    """The normal equations have no unique solution there."""
    output = random(1, 20, 4)
    np.testing.assert_allclose(learned_weights(np.repeat(output, 2, axis=0), output[0]), [0.5, 0.5], atol=1e-6)


def test_lines_of_errors_are_those_of_a_polynomial_fit() -> None:
    norms, errors = np.exp(random(30)), np.exp(random(2, 30, seed=1))
    expected = [np.polyfit(np.log(norms), np.log(row), 1) for row in errors]
    np.testing.assert_allclose(error_lines(norms, errors), np.transpose(expected), rtol=1e-6, atol=1e-9)


def test_what_a_copy_is_chosen_by_is_of_each_expert_with_copies() -> None:
    """Expert 0 has 20 inputs and lines of its own, expert 1 nine and those of all, expert 2 no further copy, expert 3 inputs
    that spread too much."""
    experts = np.repeat([0, 1, 2, 3], [20, 9, 30, 12])
    norms = np.exp(0.1 * random(len(experts)))
    norms[experts == 3] = [0.1, 2.0] * 6
    powers = np.array([[2.0, 1.0, 5.0, 3.0], [1.0, 2.0, 7.0, 1.0]])  # of each copy and expert
    errors = norms ** powers[:, experts]
    found = fit_selection(norms, experts, errors, np.array([2, 2, 1, 2]), careful=True)
    slopes, intercepts = np.array(found.slopes), np.array(found.intercepts)
    np.testing.assert_allclose(slopes[:, [0, 3]], powers[:, [0, 3]], atol=1e-6)
    np.testing.assert_allclose(intercepts[:, [0, 3]], 0, atol=1e-6)
    rows = experts != 2
    of_all = [np.polyfit(np.log(norms[rows]), np.log(row[rows]), 1) for row in errors]
    np.testing.assert_allclose([slopes[:, 1], intercepts[:, 1]], np.transpose(of_all), rtol=1e-6)
    assert not slopes[:, 2].any()
    assert not intercepts[:, 2].any()
    np.testing.assert_allclose(found.usual, [norms[:20].mean(), 0, 0, 0])
    assert fit_selection(norms, experts, errors, np.array([2, 2, 1, 2]), careful=False) == found._replace(usual=None)


def test_without_any_input_no_copy_is_expected_to_be_better() -> None:
    found = fit_selection(np.zeros(0), np.zeros(0, int), np.zeros((2, 0)), np.array([2, 1]), careful=True)
    assert found == Selection(((0, 0), (0, 0)), ((0, 0), (0, 0)), (0, 0))


def test_votes_and_ties() -> None:
    first, second = [3.0, 2.0, 0.0], [0.0, 1.0, 0.5]
    scores = np.array([[first, first], [second, second], [[0.0, 9.0, 0.0], [0.0, 0.0, 1.0]]])
    # token 0: classes 0, 1, 1. Token 1: one vote each, sums 3, 3, 1.5: the first of the largest
    np.testing.assert_array_equal(vote(scores), [1, 0])
    scores[0, 1, 1] = 2.5
    np.testing.assert_array_equal(vote(scores), [1, 1])


def test_conservative_mode() -> None:
    calm = np.full(10, 2.0)
    assert not conservative(calm, known_domain=True)
    assert conservative(calm[:9], known_domain=True)
    assert conservative(calm, known_domain=False)
    wild = np.array([1.0, 3.0] * 5)  # standard deviation 1 = mean / 2: not above
    assert not conservative(wild, known_domain=True)
    assert conservative(np.array([0.9, 3.0] * 5), known_domain=True)
    weights = np.array([0.8, 0.2])
    np.testing.assert_array_equal(runtime_weights(weights, calm, True), weights)
    np.testing.assert_array_equal(runtime_weights(weights, calm, False), [0.5, 0.5])


# -- of a file --------------------------------------------------------------------------------------------------------


def test_a_given_first_rotation_is_kept_and_the_others_are_the_least_like_it() -> None:
    similarities = np.array([[1, 0.9, 0.5, 0.6], [0.9, 1, 0.1, 0.2], [0.5, 0.1, 1, 0.3], [0.6, 0.2, 0.3, 1]])
    assert most_different(similarities, 2) == [1, 2]
    assert most_different(similarities, 2, first=0) == [0, 2]
    assert most_different(similarities, 3, first=0) == [0, 2, 3]
    assert most_different(similarities, 1, first=3) == [3]


def test_seeds_of_copies_are_those_of_the_least_similar_rotations() -> None:
    first, second = copy_seeds("randomised-hadamard", 64, 2, 40)
    assert first == 40
    pool = {seed: plain_rotation("randomised-hadamard", 64, seed) for seed in range(40, 40 + POOL)}
    likeness = {s: similarity_matrix([pool[40], r])[0, 1] for s, r in pool.items() if s != 40}
    assert second == min(likeness, key=lambda seed: likeness[seed])
    assert len(set(copy_seeds("block-hadamard-64", 128, 3, 0))) == 3


def test_how_many_copies() -> None:
    scores = [np.array([1.0, 5, 3, 0.5, 2]), np.array([10.0, 50, 30, 5, 20])]
    by_sensitivity = copies_per_expert(Replication("sensitivity", 0.4, 3), scores, 0)
    assert [list(layer) for layer in by_sensitivity] == [[1, 3, 3, 1, 1]] * 2
    random = copies_per_expert(Replication("random", 0.4), scores, 1)
    assert [sum(layer == 2) for layer in random] == [2, 2]
    assert np.any(np.array(random) != copies_per_expert(Replication("random", 0.4), scores, 2))
    # The second layer has ten times the score: what clip(lambda * score, 15 %, 45 %) of mean 30 % gives
    adaptive = copies_per_expert(Replication("adaptive", 0.30), [np.repeat(s, 4) for s in scores], 0)
    assert [int((layer == 2).sum()) for layer in adaptive] == [int(0.15 * 20), int(0.45 * 20)]
    unknown = copies_per_expert(Replication("adaptive", 0.30), [np.zeros(20)] * 2, 0)
    assert [int((layer == 2).sum()) for layer in unknown] == [9, 9]  # as many as any layer can have


def test_what_outputs_of_copies_count() -> None:
    shapes = tuple(MatrixShape(name, 8, 32, 32) for name in ("fc1", "fc2", "fc1_2", "fc2_2"))
    both = ExpertEntry((2, 3) * 2, ((0.3,), (0.4, 0.1), (0.1,), (0.4, 0.1)), ((), (0.9,)) * 2)
    one = ExpertEntry((2, 3, 0, 0), ((0.3,), (0.4, 0.1), (), ()), ((), (0.9,), (), ()))
    learned = Replicas((UNROTATED,), ((0.62345678, 1.0), (0.3, 0.0)))
    rotations = LayerRotations(RotationRule("hadamard"), RotationRule("hadamard"))
    layer = LayerPlan(0, "m", "mlp", "f", shapes, ((1.0, 1.0),) * 4, (both, one), rotations, learned)
    assert [layer.num_copies(e) for e in (0, 1)] == [2, 1]
    assert output_weights(Replication(combine="mean"), layer) == [[0.5, 1.0], [0.5, 0.0]]
    # errors 0.4 and 0.2: one third and two thirds
    assert output_weights(Replication(combine="variance"), layer) == [[0.3333, 1.0], [0.6667, 0.0]]
    assert output_weights(Replication(combine="learned"), layer) == [[0.6235, 1.0], [0.3, 0.0]]


def test_how_replicas_are_asked_for() -> None:
    assert parse_replicas("sensitivity", "mean") == Replication("sensitivity", 0.30, 2, "mean")
    assert parse_replicas("adaptive:0.2", "variance") == Replication("adaptive", 0.2, 2, "variance")
    assert parse_replicas("random:0.5:3", "learned") == Replication("random", 0.5, 3, "learned")
