"""Spending bytes where they reduce the loss most: one solver for the converter (bits) and the loader (planes).

Each item has options of growing size and falling loss, of which exactly one is taken. On the convex hull of an item's
options the best set for any Lagrange multiplier is found by taking upgrades in the order of loss saved per byte; between
two multipliers the bytes left over are filled with whatever upgrade still fits. Against the exact integer optimum (SciPy's
MILP, tests/test_budget.py) the loss given away is that of at most one upgrade.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to hold an item: a label for the caller (bits, level), its bytes and its loss."""

    label: int
    nbytes: int
    loss: float


def convex_hull(options: Sequence[Option]) -> list[Option]:
    """The options worth taking at some price per byte, smallest first. Needs at least one option."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue  # more bytes for no gain
        while hull and option.nbytes == hull[-1].nbytes:
            hull.pop()
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(small: Option, large: Option) -> float:
    return (small.loss - large.loss) / (large.nbytes - small.nbytes)


def smallest_nbytes(items: Sequence[Sequence[Option]]) -> int:
    return sum(min(option.nbytes for option in options) for options in items)


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option per item, total bytes <= budget, least total loss on the hull; the same input gives the same output.

    Raises ValueError when even the smallest options exceed the budget (callers know how to say it).
    """
    hulls = [convex_hull(options) for options in items]
    chosen = [0] * len(hulls)
    left = budget - sum(hull[0].nbytes for hull in hulls)
    if left < 0:
        raise ValueError(f"the smallest options exceed the budget by {-left} bytes")
    upgrades = [
        (-_slope(hull[i], hull[i + 1]), item, i + 1) for item, hull in enumerate(hulls) for i in range(len(hull) - 1)
    ]
    upgrades.sort()
    for _, item, step in upgrades:
        cost = hulls[item][step].nbytes - hulls[item][step - 1].nbytes
        if chosen[item] == step - 1 and cost <= left:
            chosen[item] = step
            left -= cost
    return [hull[i] for hull, i in zip(hulls, chosen, strict=True)]
