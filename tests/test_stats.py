"""Second moments of inputs and what outputs are worth: against the formulas written out, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from mlxmoe.convert.stats import BORROWED_TOKENS, EVEN_SHARE, Accumulator
from mlxmoe.convert.stream import Record
from mlxmoe.errors import UserError


def records(rows: int, experts: int, seed: int = 0, columns: int = 6, outputs: int = 3) -> Record:
    random = np.random.RandomState(seed)
    x, g, y = (random.standard_normal((rows, n)).astype(np.float32) for n in (columns, outputs, outputs))
    chosen = random.randint(0, experts, rows) if experts else None
    return Record(x, g, chosen, y)


def test_moments_are_the_written_out_sums() -> None:
    """Three batches with experts in any order, one expert without a token."""
    experts, total = 4, 0
    sums = Accumulator("layer", experts)
    batches = [records(n, experts - 1, seed=n) for n in (1, 40, 17)]
    for batch in batches:
        sums.add(batch, tokens=20)
        total += 20
    found = sums.moments()
    pairs = [
        (int(e), x.astype(np.float64), g.astype(np.float64))
        for b in batches
        for e, x, g in zip(b.experts if b.experts is not None else (), b.inputs, b.gradients, strict=True)
    ]
    mean = np.mean([np.mean(g**2) for *_, g in pairs])

    def weighted(chosen: list[tuple[int, np.ndarray, np.ndarray]]) -> np.ndarray:
        weights = [np.mean(g**2) + EVEN_SHARE * mean for *_, g in chosen]
        return sum(w * np.outer(x, x) for w, (_, x, _) in zip(weights, chosen, strict=True)) / sum(weights)  # type: ignore[no-any-return]

    layer = weighted(pairs)
    rho = np.array([sum((g**2 for o, _, g in pairs if o == e), np.zeros(3)) / total for e in range(experts)])
    for e in range(experts):
        own = [pair for pair in pairs if pair[0] == e]
        assert found.tokens[e] == len(own)
        part = len(own) / (len(own) + BORROWED_TOKENS)
        wanted = part * weighted(own) + (1 - part) * layer if own else layer
        np.testing.assert_allclose(found.hessian[e], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.row_weights, rho + 0.01 * rho.mean(axis=0), rtol=1e-5)
    worth = sum(np.mean(g**2) * (y @ y) for b in batches for g, y in zip(b.gradients, b.outputs, strict=True))
    assert found.outputs == pytest.approx(worth / total / 2, rel=1e-5)


def test_a_matrix_of_the_trunk_is_one_expert() -> None:
    sums = Accumulator("attention")
    batch = records(30, 0)
    sums.add(batch, tokens=30)
    found = sums.moments()
    assert found.hessian.shape == (1, 6, 6)
    np.testing.assert_allclose(found.row_weights[0], 1.01 * (batch.gradients**2).mean(axis=0), rtol=1e-5)


def test_without_own_inputs_only_the_outputs_count() -> None:
    sums = Accumulator("stacked", dense=False)
    sums.add(records(30, 0), tokens=30)
    assert sums.moments().hessian.shape == (0, 0, 0)
    assert sums.moments().outputs > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["inputs", "gradients"])
def test_not_finite_is_named(bad: float, part: str) -> None:
    batch = records(30, 2)
    getattr(batch, part)[3, 1] = bad
    sums = Accumulator("model.layers.7.mlp.up_proj", 2)
    with np.errstate(all="ignore"):
        sums.add(batch, tokens=30)
        with pytest.raises(UserError, match=r"the statistics of model.layers.7.mlp.up_proj are not finite"):
            sums.moments()
