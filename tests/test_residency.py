"""What stays resident under a budget: pure, deterministic, and never more bytes than allowed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxmoe.formats import LEVELS, MatrixShape, num_planes
from mlxmoe.plan import ExpertEntry, LayerPlan, Plan, TrunkEntry
from mlxmoe.residency import Residency, choose_swaps, merged_storage, smallest_residency, solve_residency

SHAPES = (
    MatrixShape("gate_proj", 64, 128, 128),
    MatrixShape("up_proj", 64, 128, 128),
    MatrixShape("down_proj", 128, 64, 64),
)
STORAGE = merged_storage(mx.float32)


def make_plan(seed: int = 0, num_layers: int = 2, num_experts: int = 5) -> Plan:
    """Random levels; errors that fall by a factor of four per bit, with spread; weights that differ between experts."""
    random = np.random.RandomState(seed)
    layers = []
    for layer in range(num_layers):
        experts = []
        for _ in range(num_experts):
            levels = tuple(int(random.choice(LEVELS)) for _ in SHAPES)
            errors = tuple(
                tuple(4.0**-lower * random.uniform(0.8, 1.2) for lower in LEVELS[: num_planes(level)])
                for level in levels
            )
            experts.append(ExpertEntry(levels, errors, tuple((0.9,) * (num_planes(level) - 1) for level in levels)))
        weights = tuple(tuple(random.uniform(0.1, 1, num_experts)) for _ in SHAPES)
        layers.append(LayerPlan(layer, f"layers.{layer}", "glu", f"experts-{layer}", SHAPES, weights, tuple(experts)))
    trunk = {"lm_head.weight": TrunkEntry("head", 6, 64, 0.01, 1.2)}
    return Plan("toy", {}, {}, 1, tuple(layers), trunk, 0.5)


def nbytes_of(residency: Residency) -> int:
    """Counted again, matrix by matrix."""
    return sum(
        STORAGE.nbytes(shape, widths[p] or expert[p])
        for layer, widths in zip(residency.levels, residency.widths, strict=True)
        for expert in layer
        for p, shape in enumerate(SHAPES)
    )


def test_resident_bytes_by_hand() -> None:
    """64 x 128 codes of 3 bits are 3,072 bytes; 64 groups with a float32 scale and bias each are 512."""
    assert STORAGE.nbytes(SHAPES[0], 3) == 64 * 128 * 3 // 8 + 64 * 2 * 4 == 3584


@pytest.mark.parametrize("widen", [False, True])
def test_no_budget_keeps_everything(widen: bool) -> None:
    plan = make_plan()
    residency = solve_residency(plan, None, STORAGE, widen)
    assert residency.levels == [[expert.levels for expert in layer.experts] for layer in plan.layers]
    assert not residency.reduced
    assert residency.nbytes == nbytes_of(residency)
    written = sum(
        layer.weights[p][e] * expert.errors[p][-1]
        for layer in plan.layers
        for e, expert in enumerate(layer.experts)
        for p in range(3)
    )
    assert residency.expected_loss == pytest.approx(written + 1.2 * 0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widen", [False, True])
def test_every_budget_is_kept_and_more_never_hurts(seed: int, widen: bool) -> None:
    plan = make_plan(seed)
    low = smallest_residency(plan, STORAGE)
    high = solve_residency(plan, None, STORAGE, widen).nbytes
    previous = float("inf")
    for budget in range(low, high + 1, max(1, (high - low) // 40)):
        residency = solve_residency(plan, budget, STORAGE, widen)
        assert residency.nbytes == nbytes_of(residency) <= budget
        assert residency.expected_loss <= previous * 1.02  # a gap filled greedily may be traded for a better upgrade
        previous = residency.expected_loss
        for layer, levels in zip(plan.layers, residency.levels, strict=True):
            for expert, kept in zip(layer.experts, levels, strict=True):
                assert all(a <= b for a, b in zip(kept, expert.levels, strict=True))
    assert not solve_residency(plan, high, STORAGE, widen).reduced


def test_widening_only_spends_what_is_left() -> None:
    """The levels are those without widening; widths cover them and are ones that unpack quickly."""
    plan = make_plan(1)
    low, high = smallest_residency(plan, STORAGE), solve_residency(plan, None, STORAGE, True).nbytes
    widened = 0
    for budget in np.linspace(low, high, 9).astype(int).tolist():
        narrow, wide = (solve_residency(plan, budget, STORAGE, widen) for widen in (False, True))
        assert narrow.levels == wide.levels
        assert all(width == 0 for row in narrow.widths for width in row)
        for layer, widths in zip(wide.levels, wide.widths, strict=True):
            for p, width in enumerate(widths):
                assert width in (0, 2, 4, 6, 8, 16)
                assert width == 0 or width >= max(expert[p] for expert in layer)
                widened += width > 0
    assert widened > 0


def test_the_least_that_works_works_and_a_byte_less_does_not() -> None:
    plan = make_plan()
    least = smallest_residency(plan, STORAGE)
    residency = solve_residency(plan, least, STORAGE, True)
    assert residency.nbytes <= least
    assert residency.histogram() == {2: 30}
    with pytest.raises(ValueError, match="exceed the budget by 1 bytes"):
        solve_residency(plan, least - 1, STORAGE, True)


def test_sensitive_experts_keep_their_planes_longest() -> None:
    """Two experts that differ only in weight: at a budget for one upgrade, the heavier one has it."""
    entry = ExpertEntry((4, 4, 4), ((0.1, 0.03, 0.008),) * 3, ((0.9, 0.97),) * 3)
    layer = LayerPlan(0, "m", "glu", "f", SHAPES, ((0.1, 0.9),) * 3, (entry, entry))
    plan = replace(make_plan(), layers=(layer,))
    extra = STORAGE.nbytes(SHAPES[0], 4) - STORAGE.nbytes(SHAPES[0], 2)
    levels = solve_residency(plan, smallest_residency(plan, STORAGE) + 3 * extra, STORAGE, False).levels[0]
    assert all(light <= heavy for light, heavy in zip(*levels, strict=True))
    assert sum(levels[1]) > sum(levels[0])


def test_same_input_same_levels() -> None:
    budgets = [smallest_residency(make_plan(), STORAGE) + 4000 * i for i in range(5)]
    first, second = ([solve_residency(make_plan(), b, STORAGE, True) for b in budgets] for _ in range(2))
    assert first == second
    assert len({str(r.levels) for r in first}) > 1
    assert all(a.expected_loss > b.expected_loss for a, b in itertools.pairwise(first))


def test_matrices_that_are_not_there_take_no_memory_and_no_width() -> None:
    """A second copy of the second expert only: what is counted is what three matrices take."""
    shapes = (SHAPES[0]._replace(name="fc1"), SHAPES[0]._replace(name="fc2"))
    shapes += tuple(shape._replace(name=shape.name + "_2") for shape in shapes)
    single = ExpertEntry((2, 2, 0, 0), ((0.1,), (0.1,), (), ()), ((), (), (), ()))
    double = ExpertEntry((2, 3, 2, 3), ((0.1,), (0.1, 0.02), (0.1,), (0.1, 0.02)), ((), (0.9,), (), (0.9,)))
    layer = LayerPlan(0, "m", "mlp", "f", shapes, ((1.0, 1.0),) * 4, (single, double))
    plan = Plan("toy", {}, {}, 1, (layer,), {}, 0.5)
    everything = solve_residency(plan, None, STORAGE, widen=False)
    assert everything.levels == [[(2, 2, 0, 0), (2, 3, 2, 3)]]
    assert everything.histogram() == {2: 4, 3: 2}
    shape = shapes[0]
    assert everything.nbytes == 4 * STORAGE.nbytes(shape, 2) + 2 * STORAGE.nbytes(shape, 3)
    widened = solve_residency(plan, None, STORAGE, widen=True)
    assert widened.widths == [(2, 4, 2, 4)]
    assert widened.nbytes == 3 * STORAGE.nbytes(shape, 2) + 3 * STORAGE.nbytes(shape, 4)
    least = solve_residency(plan, smallest_residency(plan, STORAGE), STORAGE, widen=False)
    assert least.levels == [[(2, 2, 0, 0), (2, 2, 2, 2)]]
    assert choose_swaps(layer, least.levels[0], [0, 100], 4) == []
