"""Which planes are resident: the plan's levels reduced, deterministically, to what the memory budget holds.

Pure: from a plan and a number of bytes to a level per (layer, expert, projection). Memory counts what the runtime really
keeps, which is not what the file takes: merged codes plus a scale and a bias per group in the activation's precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxmoe.budget import Option, allocate, smallest_nbytes
from mlxmoe.formats import ABSENT, FIELD_BITS, LEVELS, SCALE_NBYTES, MatrixShape, field_width
from mlxmoe.plan import ExpertEntry, LayerPlan, Plan

# levels[i][e][p]: bits of projection p of expert e in the i-th layer of the plan
Levels = list[list[tuple[int, ...]]]


# Field widths that MLX's CPU products unpack quickly; 3-bit fields take about 1.15 times as long as 4-bit ones.
# 16: two fields of 8 bits.
_QUICK_WIDTHS = (2, 4, 6, 8, 16)


class Residency(NamedTuple):
    """levels[i][e][p] as resident, widths[i][p]: field width that all experts of a projection share (0: each its own),
    bytes of memory, the expected loss of experts and trunk, and whether anything was reduced."""

    levels: Levels
    widths: list[tuple[int, ...]]
    nbytes: int
    expected_loss: float
    reduced: bool

    def histogram(self) -> dict[int, int]:
        counts = Counter(level for layer in self.levels for expert in layer for level in expert)
        return {level: count for level, count in sorted(counts.items()) if level != ABSENT}


class Storage(NamedTuple):
    """What expert matrices take in memory. `group_nbytes`: per group of weights in one field. `merged`: codes lie in fields
    that MLX's built-in products know, above 8 bits in two of them with scales and biases of their own."""

    group_nbytes: int
    merged: bool

    def nbytes(self, shape: MatrixShape, level: int) -> int:
        """Of one expert matrix, or one in fields of `level` bits."""
        if level == ABSENT:
            return 0
        width = field_width(level) if self.merged else level
        fields = 2 if self.merged and width > FIELD_BITS else 1
        return shape.code_nbytes(width) + fields * self.group_nbytes * shape.num_groups

    def experts_nbytes(self, layer: LayerPlan) -> tuple[int, ...]:
        """Of each expert of a layer at its written levels."""
        return tuple(
            sum(self.nbytes(shape, level) for shape, level in zip(layer.projections, entry.levels, strict=True))
            for entry in layer.experts
        )


PLANES = Storage(SCALE_NBYTES, merged=False)  # for the kernels: planes and scales as they are written


def merged_storage(dtype: mx.Dtype) -> Storage:
    """For MLX's built-in products: a scale and a bias in the activations' type."""
    return Storage(2 * dtype.size, merged=True)


def solve_residency(plan: Plan, budget: int | None, storage: Storage, widen: bool) -> Residency:
    """The levels with the least expected loss in `budget` bytes (None: everything that is written).

    `widen`: where bytes are left, give all experts of a projection fields of one width, so that a call is one product.
    It changes no result (experts.Bucket) and pays where a product costs per weight and not per byte: on the CPU backend.
    Raises ValueError when the base planes alone exceed the budget; see `smallest_residency`.
    """
    items = _options(plan, storage)
    written = [max(options, key=lambda option: option.label) for options in items]
    chosen = written if budget is None or _total(written) <= budget else allocate(items, budget)
    flat = iter(chosen)
    levels = [[tuple(next(flat).label for _ in layer.projections) for _ in layer.experts] for layer in plan.layers]
    nbytes = _total(chosen)
    widths = [(0,) * len(layer.projections) for layer in plan.layers]
    if widen:
        left = None if budget is None else budget - nbytes
        widths, extra = _widen(plan.layers, levels, storage, left)
        nbytes += extra
    trunk_loss = sum(entry.weight * entry.error for entry in plan.trunk.values())
    loss = trunk_loss + sum(option.loss for option in chosen)
    return Residency(levels, widths, nbytes, loss, chosen != written)


class Swap(NamedTuple):
    """Two experts of a layer that exchange the levels of one projection: no byte more, and less loss."""

    projection: int
    promoted: int
    demoted: int


def choose_swaps(layer: LayerPlan, levels: Sequence[tuple[int, ...]], uses: Sequence[int], most: int) -> list[Swap]:
    """At most `most` exchanges that lower the expected loss, the best first; an expert takes part in one per projection.

    The plan's weight of an expert is scaled by how often it was chosen of late against the mean: (uses + mean) /
    (2 * mean), so that half of the weight stays the plan's. uses[e]: choices since the last time.
    """
    mean = sum(uses) / len(uses)
    if not mean:
        return []
    found: list[tuple[float, Swap]] = []
    for p in range(len(layer.projections)):
        weights = [w * (n + mean) / (2 * mean) for w, n in zip(layer.weights[p], uses, strict=True)]
        found += [
            (gain, Swap(p, low, high))
            for low, entry in enumerate(layer.experts)
            for high, other in enumerate(layer.experts)
            if levels[low][p] < levels[high][p] <= entry.levels[p]
            and (gain := _exchange(entry, other, p, levels[low][p], levels[high][p], weights[low], weights[high])) > 0
        ]
    chosen: list[Swap] = []
    busy: set[tuple[int, int]] = set()
    for _, swap in sorted(found, key=lambda item: (-item[0], item[1])):
        pair = {(swap.projection, swap.promoted), (swap.projection, swap.demoted)}
        if len(chosen) < most and not pair & busy:
            chosen.append(swap)
            busy |= pair
    return chosen


def _exchange(
    promoted: ExpertEntry, demoted: ExpertEntry, p: int, low: int, high: int, weight: float, other: float
) -> float:
    """The expected loss that an exchange of levels saves."""
    first, second = LEVELS.index(low), LEVELS.index(high)
    saved = weight * (promoted.errors[p][first] - promoted.errors[p][second])
    return saved - other * (demoted.errors[p][first] - demoted.errors[p][second])


def smallest_residency(plan: Plan, storage: Storage) -> int:
    """Bytes of memory with only the base plane of every expert."""
    return smallest_nbytes(_options(plan, storage))


def _total(chosen: list[Option]) -> int:
    return sum(option.nbytes for option in chosen)


def _options(plan: Plan, storage: Storage) -> list[list[Option]]:
    return [
        [
            Option(level, storage.nbytes(shape, level), layer.weights[p][e] * error)
            for level, error in zip(LEVELS, expert.errors[p], strict=False)
        ]
        or [Option(ABSENT, 0, 0.0)]
        for layer in plan.layers
        for e, expert in enumerate(layer.experts)
        for p, shape in enumerate(layer.projections)
    ]


def _widen(
    layers: tuple[LayerPlan, ...], levels: Levels, storage: Storage, left: int | None
) -> tuple[list[tuple[int, ...]], int]:
    """Field width per (layer, projection), in layer order while the bytes last (None: no limit), and bytes spent."""
    widths, spent = [], 0
    for layer, experts in zip(layers, levels, strict=True):
        row = []
        for p, shape in enumerate(layer.projections):
            here = [expert[p] for expert in experts if expert[p] != ABSENT]
            widest = min(width for width in _QUICK_WIDTHS if width >= max(here, default=0))
            extra = sum(storage.nbytes(shape, widest) - storage.nbytes(shape, level) for level in here)
            fits = left is None or spent + extra <= left
            row.append(widest if fits else 0)
            spent += extra if fits else 0
        widths.append(tuple(row))
    return widths, spent
