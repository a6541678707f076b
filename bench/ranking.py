"""Rank correlation with an interval: how well one number orders what another one measures.

Shapes: n items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

_RESAMPLES = 1000


def ranks(values: np.ndarray) -> np.ndarray:
    """float64 [n]: from 0, the mean rank where values are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of the ranks; 0 where one side is constant."""
    a, b = ranks(x) - (len(x) - 1) / 2, ranks(y) - (len(y) - 1) / 2
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """tau-b: pairs in the same order less pairs in the other, over those that are not tied; 0 where one side is constant."""
    a, b = (np.sign(v[:, None] - v[None]) for v in (x, y))
    size = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / size) if size else 0.0


class Correlation(NamedTuple):
    """A rank correlation and its 95 % interval over resampled items."""

    value: float
    low: float
    high: float


def correlation(
    measure: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray, strata: Sequence[int] = ()
) -> Correlation:
    """With the percentiles of a bootstrap over the items; strata: numbers of items that are resampled among themselves, in
    the order of the items (default: all of them)."""
    random = np.random.default_rng(0)
    bounds = np.cumsum([0, *(strata or [len(x)])])
    found = []
    for _ in range(_RESAMPLES):
        draw = np.concatenate([random.integers(low, high, high - low) for low, high in pairwise(bounds)])
        found.append(measure(x[draw], y[draw]))
    low, high = np.percentile(found, [2.5, 97.5])
    return Correlation(measure(x, y), float(low), float(high))
