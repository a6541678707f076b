"""bench/cache_attempts.py: its arithmetic, and that its first row is the policy that it is called after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_replay import random_trace

from mlxmoe.bench.cache_attempts import HORIZON, advanced, delayed, fitted, results, running_mean, uses_ahead
from mlxmoe.errors import UserError
from mlxmoe.policies import Lfu
from mlxmoe.replay import belady, replay
from mlxmoe.trace import Trace


def scored(trace: Trace) -> Trace:
    scores = np.random.default_rng(0).random((*trace.experts.shape[:2], trace.num_experts))
    return replace(trace, scores=scores.astype(np.float16))


def test_running_mean() -> None:
    values = np.array([[4.0], [0.0], [8.0], [0.0]])
    assert running_mean(values, 0.5)[:, 0].tolist() == [2, 1, 4.5, 2.25]
    assert running_mean(values, 0.5, [0, 3])[:, 0].tolist() == [2, 1, 4.5, 0]
    assert running_mean(values, 0.0).tolist() == values.tolist()


def test_shifts() -> None:
    values = np.array([[1.0], [2.0], [3.0]])
    assert delayed(values)[:, 0].tolist() == [0, 1, 2]
    assert advanced(values, 2)[:, 0].tolist() == [3, 0, 0]


def test_uses_ahead() -> None:
    uses = np.array([[0.0], [1.0], [0.0], [1.0]])
    later = [1 + HORIZON**2, HORIZON, 1, 0]
    assert uses_ahead(uses)[:, 0] == pytest.approx([(1 - HORIZON) * value for value in later])


def test_least_squares() -> None:
    rng = np.random.default_rng(0)
    inputs, weights = rng.normal(size=(50, 3)), rng.normal(size=(3, 2))
    assert fitted(inputs, inputs @ weights, 1e-9) == pytest.approx(weights)


def test_results() -> None:
    trace = scored(random_trace(5, tokens=400))
    found = results(trace)
    held_out = trace.halves()[1]
    for column, slots in enumerate((2, 4, 6)):
        lfu = replay(held_out, lambda layer, n: Lfu(8, n, 0.98), [slots] * 2).hits.sum()
        # The attempt has seen the first half, and so knows popularity when the other one begins
        expected = lfu / belady(held_out, [slots] * 2).hits.sum()
        assert found["count of uses, decay 0.98 (lfu)"][column] == pytest.approx(expected, abs=0.05)
    assert all(0 < share <= 1 for shares in found.values() for share in shares)
    knowing = found["lfu that knows the next two"]
    assert (
        knowing[1] > found["lfu that knows the next token's choice"][1] > found["linear in its own uses and scores"][1]
    )


def test_scores_are_needed() -> None:
    with pytest.raises(UserError, match="no router scores"):
        results(random_trace(0))
