"""The allocation against SciPy's exact integer optimum and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from mlxmoe.budget import Option, allocate, convex_hull, smallest_nbytes

Items = list[list[Option]]


def random_items(count: int, seed: int) -> Items:
    """Losses that fall by about a factor of four per bit, as quantization errors do, with spread between items."""
    random = np.random.RandomState(seed)
    items = []
    for _ in range(count):
        weight, size = 10 ** random.uniform(-2, 0), int(random.randint(50, 150))
        spread = random.uniform(0.7, 1.3, 5)
        items.append([Option(b, size * b, weight * 4.0**-b * spread[i]) for i, b in enumerate((2, 3, 4, 6, 8))])
    return items


def total(chosen: list[Option]) -> tuple[int, float]:
    return sum(o.nbytes for o in chosen), sum(o.loss for o in chosen)


def exact_optimum(items: Items, budget: int) -> float:
    """The integer optimum: one binary variable per option, one option per item, bytes under the budget."""
    flat = [(i, option) for i, options in enumerate(items) for option in options]
    one_each = np.array([[float(i == j) for i, _ in flat] for j in range(len(items))])
    nbytes = np.array([[float(option.nbytes) for _, option in flat]])
    result = milp(
        [option.loss for _, option in flat],
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(nbytes, 0, budget)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    assert result.success
    return float(result.fun)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_close_to_the_integer_optimum(seed: int, share: float) -> None:
    """Gives away at most one upgrade's worth: the largest that was not taken."""
    items = random_items(60, seed)
    low, high = smallest_nbytes(items), sum(max(o.nbytes for o in options) for options in items)
    budget = int(low + share * (high - low))
    chosen = allocate(items, budget)
    nbytes, loss = total(chosen)
    assert nbytes <= budget
    best = exact_optimum(items, budget)
    assert best <= loss * (1 + 1e-9)
    untaken = [
        a.loss - b.loss
        for options, option in zip(items, chosen, strict=True)
        for a, b in itertools.pairwise(convex_hull(options))
        if a.nbytes >= option.nbytes
    ]
    assert loss <= best + max(untaken)
    assert loss <= 1.05 * best


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.integers(0, 60),
)
def test_against_brute_force(raw: list[list[tuple[int, int]]], spare: int) -> None:
    """Any options at all (equal sizes, rising losses): within budget, and within one upgrade of the best."""
    items = [[Option(i, n, float(loss)) for i, (n, loss) in enumerate(options)] for options in raw]
    budget = smallest_nbytes(items) + spare
    nbytes, loss = total(allocate(items, budget))
    best = min(total(list(combo))[1] for combo in itertools.product(*items) if total(list(combo))[0] <= budget)
    largest_step = max(
        (a.loss - b.loss for options in items for a, b in itertools.pairwise(convex_hull(options))), default=0.0
    )
    assert nbytes <= budget
    assert best <= loss <= best + largest_step


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000)), min_size=1, max_size=8))
def test_hull_is_convex_and_keeps_the_ends(raw: list[tuple[int, int]]) -> None:
    options = [Option(i, n, loss / 7) for i, (n, loss) in enumerate(raw)]
    hull = convex_hull(options)
    slopes = [(a.loss - b.loss) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(hull)]
    assert all(s > 0 for s in slopes)
    assert all(a > b for a, b in itertools.pairwise(slopes))
    assert hull[0].nbytes == min(o.nbytes for o in options)
    assert hull[-1].loss == min(o.loss for o in options)


def test_more_bytes_never_lose() -> None:
    items = random_items(30, 7)
    low, high = smallest_nbytes(items), sum(max(o.nbytes for o in options) for options in items)
    losses = [total(allocate(items, budget))[1] for budget in range(low, high + 1, (high - low) // 97)]
    # Filling gaps greedily may trade a little; the curve as a whole falls.
    assert all(later <= 1.02 * earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]


def test_same_input_same_output_and_too_small_raises() -> None:
    items = random_items(20, 3)
    budget = smallest_nbytes(items) + 1000
    assert allocate(items, budget) == allocate(items, budget)
    assert allocate(items, smallest_nbytes(items)) == [min(options) for options in items]
    with pytest.raises(ValueError, match="exceed the budget by 1 bytes"):
        allocate(items, smallest_nbytes(items) - 1)
