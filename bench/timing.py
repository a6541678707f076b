"""Repeated measurements and what may be said about them on a machine that other programs use too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Spread(NamedTuple):
    """The median of several measurements, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        assert values
        return cls(statistics.median(values), min(values), max(values))

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in self._asdict().items()}


class Ratio(NamedTuple):
    """Candidate over baseline. `low` and `high` are over the pairs of neighbouring measurements."""

    of_medians: float
    median_of_pairs: float
    low: float
    high: float

    @classmethod
    def of(cls, candidate: Sequence[float], baseline: Sequence[float]) -> Ratio:
        """Entry i of both was measured back to back, so that a slow moment of the machine strikes both alike."""
        assert candidate
        assert len(candidate) == len(baseline)
        pairs = [a / b for a, b in zip(candidate, baseline, strict=True)]
        of_medians = statistics.median(candidate) / statistics.median(baseline)
        return cls(of_medians, statistics.median(pairs), min(pairs), max(pairs))

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self._asdict().items()}


def interleave(runs: Sequence[Callable[[], T]], repeats: int, after: Callable[[], Any] = lambda: None) -> list[list[T]]:
    """Calls every run `repeats` times: A B, B A, A B, ... Returns the results per run, in order of time.

    The order alternates because whoever runs second finds warm caches, or a machine that has slowed down.
    `after` is called after each measurement (a progress bar).
    """
    results: list[list[T]] = [[] for _ in runs]
    for repeat in range(repeats):
        order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            results[i].append(runs[i]())
            after()
    return results
