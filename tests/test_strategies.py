"""Sharing out bytes evenly, by benefit, by other scores: worked examples, and SciPy's integer optimum for the even one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from mlxmoe.budget import Option, allocate, smallest_nbytes
from mlxmoe.convert.strategies import by_benefit, by_score, tie, untie

LEVELS = (2, 3, 4)


def random_items(count: int, seed: int) -> list[list[Option]]:
    """Items of equal sizes and of losses that spread over two orders of magnitude."""
    weights = 10 ** np.random.RandomState(seed).uniform(-2, 0, count)
    return [[Option(b, 10 * b, float(w) * 4.0**-b) for b in LEVELS] for w in weights]


def spent(chosen: list[Option]) -> int:
    return sum(option.nbytes for option in chosen)


def test_tied_items_add_up_and_come_back() -> None:
    items = [[Option(2, 10, 4.0), Option(3, 15, 1.0)], [Option(2, 20, 8.0), Option(3, 30, 2.0)]]
    tied = tie([*items, items[0]], ["a", "b", "a"])
    assert tied.items == [[Option(2, 20, 8.0), Option(3, 30, 2.0)], items[1]]
    assert tied.members == [[0, 2], [1]]
    found = untie([tied.items[0][1], tied.items[1][0]], tied, [*items, items[0]])
    assert found == [Option(3, 15, 1.0), Option(2, 20, 8.0), Option(3, 15, 1.0)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_even_levels_are_close_to_the_optimum_with_equal_levels(share: float) -> None:
    """SciPy's MILP over single items, with a row for every pair of tied items that says they are equal."""
    items, groups = random_items(24, 1), [k % 6 for k in range(24)]
    low, high = smallest_nbytes(items), sum(options[-1].nbytes for options in items)
    budget = int(low + share * (high - low))
    tied = tie(items, groups)
    chosen = untie(allocate(tied.items, budget), tied, items)
    assert spent(chosen) <= budget
    for group in range(6):
        assert len({o.label for o, g in zip(chosen, groups, strict=True) if g == group}) == 1
    size, count = len(LEVELS), len(items)
    rows = []
    for k in range(6, count):
        for j in range(size):
            row = np.zeros(size * count)
            row[k * size + j], row[(k - 6) * size + j] = 1, -1
            rows.append(row)
    flat = [option for options in items for option in options]
    one_each = np.kron(np.eye(count), np.ones(size))
    best = milp(
        [option.loss for option in flat],
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array(rows), 0, 0),
            LinearConstraint([[option.nbytes for option in flat]], 0, budget),
        ],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
    )
    assert best.success
    loss = sum(option.loss for option in chosen)
    largest_step = max(a.loss - b.loss for options in tied.items for a, b in itertools.pairwise(options))
    assert best.fun <= loss * (1 + 1e-9)
    assert loss <= best.fun + largest_step


def test_benefit_serves_the_greatest_first() -> None:
    """Experts 0 and 1 of two matrices each; a step of one expert costs 20 bytes."""
    items = [[Option(b, 10 * b, 1.0) for b in LEVELS] for _ in range(4)]
    experts, benefits = [0, 1, 0, 1], [0.1, 0.7]

    def labels(budget: int) -> list[int]:
        return [option.label for option in by_benefit(items, experts, benefits, budget)]

    assert labels(80) == [2, 2, 2, 2]
    assert labels(99) == [2, 2, 2, 2]
    assert labels(100) == [2, 3, 2, 3]
    assert labels(120) == [3, 3, 3, 3]  # the second round begins when the first is over
    assert labels(140) == [3, 4, 3, 4]
    assert labels(1000) == [4, 4, 4, 4]
    with pytest.raises(ValueError, match="exceed the budget by 1 bytes"):
        labels(79)


@given(st.integers(0, 9), st.integers(0, 600))
def test_benefit_keeps_the_budget_and_the_order(seed: int, spare: int) -> None:
    items = random_items(20, seed)
    benefits = list(np.random.RandomState(seed).uniform(size=10))
    experts = [k % 10 for k in range(20)]
    chosen = by_benefit(items, experts, benefits, smallest_nbytes(items) + spare)
    assert spent(chosen) <= smallest_nbytes(items) + spare
    levels = [chosen[e].label for e in np.argsort([-b for b in benefits])]
    assert levels == sorted(levels, reverse=True)
    assert max(levels) - min(levels) <= 1


def test_by_score_takes_bytes_from_the_scores_and_losses_from_the_items() -> None:
    items = random_items(6, 2)
    scores = [[Option(o.label, o.nbytes, o.loss * factor) for o in options]
              for options, factor in zip(items, (1, 1, 100, 1, 1, 1), strict=True)]  # fmt: skip
    budget = smallest_nbytes(items) + 20
    chosen = by_score(items, scores, budget)
    assert [option.label for option in chosen] == [2, 2, 4, 2, 2, 2]
    assert chosen[2] == items[2][2]
