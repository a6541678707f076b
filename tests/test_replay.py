"""Replays by hand and against the bound, the split of slots against exhaustive search, and what is chosen from a trace."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.policies import OFFLINE, POLICIES, Lru, Static
from mlxmoe.replay import (
    BELADY,
    CANDIDATES,
    Candidate,
    HitRates,
    Study,
    belady,
    frequencies,
    replay,
    replay_layer,
    split_slots,
)
from mlxmoe.trace import Trace

ONLINE = [name for name in POLICIES if name not in OFFLINE]


def trace_of(experts: Any, num_experts: int, starts: Sequence[int] = (0,)) -> Trace:
    """experts [T, L, A]."""
    array = np.sort(np.array(experts, np.uint8), axis=-1)
    return Trace(array, np.array(starts), tuple(range(array.shape[1])), num_experts)


def random_trace(seed: int, tokens: int = 120, layers: int = 2, num_experts: int = 8, active: int = 2) -> Trace:
    """Zipf-like popularity, different in each layer, with runs: some of a token's experts are those of the one before."""
    rng = np.random.default_rng(seed)
    popularity = [rng.permutation(1 / np.arange(1, num_experts + 1)) for _ in range(layers)]
    experts = np.empty((tokens, layers, active), np.uint8)
    for layer, weights in enumerate(popularity):
        shares = weights / weights.sum()
        for token in range(tokens):
            if token and rng.random() < 0.5:
                experts[token, layer] = experts[token - 1, layer]
            else:
                experts[token, layer] = rng.choice(num_experts, active, replace=False, p=shares)
    return trace_of(experts, num_experts, (0, tokens // 2))


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_replay_by_hand() -> None:
    """Three slots, LRU, two experts a step."""
    steps = [[0, 1], [1, 2], [0, 3], [0, 1], [1, 4]]
    # 1 leaves for 3 (1 and 2 are as old), 2 for 1, 3 for 4
    assert replay_layer(np.array(steps), Lru(5, 3), 3).tolist() == [0, 1, 1, 1, 1]


def test_a_step_never_evicts_its_own() -> None:
    """One slot less than a step needs: the last miss is used and not kept, and the others stay."""
    steps = np.array([[0, 1, 2], [0, 1, 2], [2, 3, 4]])
    assert replay_layer(steps, Lru(5, 2), 2).tolist() == [0, 2, 0]


def test_pinned_experts_stay_and_take_a_slot() -> None:
    steps = np.array([[0], [1], [2], [7], [1], [2]])
    assert replay_layer(steps, Lru(8, 2), 2, pinned=[7]).tolist() == [0, 0, 0, 1, 0, 0]
    assert replay_layer(steps, Lru(8, 3), 3, pinned=[7]).tolist() == [0, 0, 0, 1, 1, 1]


def test_replay_goes_layer_by_layer() -> None:
    trace = trace_of([[[0], [5]], [[1], [5]], [[0], [6]]], 8)
    result = replay(trace, lambda layer, slots: Lru(8, slots), [1, 2])
    assert result.hits.tolist() == [[0, 0], [0, 1], [0, 0]]
    assert result.misses.tolist() == [[1, 1], [1, 0], [1, 1]]
    assert result.layer_hit_rates.tolist() == [0, 1 / 3]
    assert result.hit_rate == pytest.approx(1 / 6)


def test_policies_are_given_the_scores() -> None:
    seen: list[Any] = []

    class Curious(Lru):
        def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
            seen.append(scores)
            super().routed(experts)

    trace = trace_of([[[0]], [[1]]], 2)
    scores = np.array([[[0.75, 0.25]], [[0.25, 0.75]]], np.float16)
    replay(Trace(trace.experts, trace.starts, (0,), 2, scores), lambda layer, slots: Curious(2, slots), [1])
    assert np.array(seen).tolist() == scores[:, 0].tolist()


@pytest.mark.parametrize("name", ONLINE)
@given(seed=st.integers(0, 10**6), slots=st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_belady_is_a_bound(name: str, seed: int, slots: int) -> None:
    trace = random_trace(seed, 60)
    bound = belady(trace, [slots] * 2)
    found = replay(trace, lambda layer, n: POLICIES[name](8, n), [slots] * 2)
    assert (found.hits.sum(axis=0) <= bound.hits.sum(axis=0)).all()
    if slots == 8:
        distinct = [len(np.unique(trace.experts[:, layer])) for layer in range(2)]
        assert found.misses.sum(axis=0).tolist() == distinct  # each expert is read once


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_frequencies() -> None:
    trace = trace_of([[[0, 1], [2, 3]], [[0, 2], [2, 3]]], 4)
    assert frequencies(trace).tolist() == [[2, 1, 1, 0], [0, 0, 2, 2]]


@settings(deadline=None)
@given(
    curves=st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=3), active=st.integers(1, 2)
)
def test_split_is_the_best_there_is(curves: list[list[float]], active: int) -> None:
    """Hit rates for 1 to 4 slots of up to 3 layers, of which each needs `active`; not even monotone ones."""
    table = np.array([[-np.inf, *curve] for curve in curves])
    table[:, :active] = -np.inf
    for total in range(active * len(curves), 4 * len(curves) + 1):
        slots = split_slots(table, total)
        assert sum(slots) == total
        possible = [s for s in product(range(active, 5), repeat=len(curves)) if sum(s) == total]
        best = max(sum(table[layer, n] for layer, n in enumerate(s)) for s in possible)
        assert sum(table[layer, n] for layer, n in enumerate(slots)) == pytest.approx(best)


def test_hit_rates_are_those_of_a_replay() -> None:
    trace, replays = random_trace(3), []
    rates = HitRates(trace, frequencies(trace), lambda: replays.append(1))
    expected = replay(trace, lambda layer, n: POLICIES["lfu"](8, n, decay=0.9), [3, 5]).hit_rate
    candidate = Candidate("lfu", (("decay", 0.9),))
    assert rates.mean(candidate, [3, 5]) == pytest.approx(expected)
    assert rates.mean(candidate, [3, 5]) == pytest.approx(expected)
    assert len(replays) == 2  # what is known is not replayed again
    assert rates.mean(BELADY, [3, 5]) == pytest.approx(belady(trace, [3, 5]).hit_rate)
    static = replay(trace, lambda layer, n: Static(8, n, frequencies(trace)[layer].tolist()), [3, 5]).hit_rate
    assert rates.mean(Candidate("static"), [3, 5]) == pytest.approx(static)
    curves = rates.curves(candidate)
    assert curves.shape == (2, 9)
    assert np.isneginf(curves[:, :2]).all()
    assert curves[0, 3] + curves[1, 5] == pytest.approx(2 * expected)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), residency=st.sampled_from([0.1, 0.4, 0.5, 0.75, 1.0]))
def test_choice_is_never_below_lru_nor_above_the_bound(seed: int, residency: float) -> None:
    trace = random_trace(seed)
    budget = Study(trace).budget(residency)
    assert sum(budget.slots) == 2 * budget.equal
    assert min(budget.slots) >= 2
    assert budget.lru <= budget.hit_rate <= budget.bound + 1e-12
    held_out = trace.halves()[1]
    parameters = dict(budget.candidate.parameters)
    own = {"frequencies": frequencies(trace.halves()[0])} if budget.candidate.policy == "static" else {}

    def policy(layer: int, slots: int) -> Any:
        return POLICIES[budget.candidate.policy](8, slots, **parameters, **{k: v[layer] for k, v in own.items()})

    assert replay(held_out, policy, budget.slots).hit_rate == pytest.approx(budget.hit_rate)
    assert {o.candidate.policy for o in budget.outcomes} == set(CANDIDATES)


def test_what_loses_to_lru_on_the_other_half_is_not_chosen() -> None:
    """Two experts are popular in the first half and used once in the other, in which three others take turns."""
    first = [[[e]] for e in [0, 1, 2, 3, 0, 1, 4, 5] * 12]
    second = [[[e]] for e in [0, 1, *([6, 6, 7, 7, 8, 8] * 15)]]
    budget = Study(trace_of(first + second, 9, (0, len(first)))).budget(3 / 9)
    best = max(budget.outcomes, key=lambda o: o.fitted)
    held_out = {o.candidate.policy: o.held_out for o in budget.outcomes}
    assert best.held_out < held_out["lru"]
    assert held_out[budget.candidate.policy] >= held_out["lru"]


def test_slots_go_where_they_pay() -> None:
    """One layer goes round six experts, the other stays with two: no equal split is as good."""
    experts = [[[t % 6], [t // 20 % 2]] for t in range(400)]
    budget = Study(trace_of(experts, 8, (0, 100, 200, 300))).budget(0.5)
    assert budget.equal == 4
    assert budget.slots == [6, 2]
    assert budget.hit_rate == budget.bound > budget.belady
