"""Statistics of a layer's matrices gathered by running it forward and backward over the calibration text."""

from __future__ import annotations

from collections.abc import Callable

from mlxmoe.convert.layers import Layers
from mlxmoe.convert.stats import Accumulator, Moments
from mlxmoe.convert.stream import Backward
from mlxmoe.rotation import FITTED

INPUTS_PER_BATCH = 256  # that are kept of every matrix for rotations that are fitted to them


def differentiate(layers: Layers, i: int, kind: str, keep: str | None = None) -> dict[str, Moments]:
    """By module path: of a loaded layer at its hidden states of a kind, by the gradients behind it. `keep`: spills the
    gradients before it under that kind as well."""
    walk = layers.walk

    def run(rows: slice, paths: list[str]) -> Backward:
        hidden, gradient = walk.read(kind, i, rows), walk.read("gradient", i + 1, rows)
        return walk.stream.differentiate(i, walk.batch(rows), hidden, gradient, paths)

    return _gather(layers, i, run, keep)


def draw(layers: Layers, kind: str, keep: str | None = None) -> dict[str, Moments]:
    """Of what lies behind the last layer, for next tokens that are drawn there. `keep`: spills the gradients of their
    log-probability under that kind as well."""
    walk, i = layers.walk, layers.last

    def run(rows: slice, paths: list[str]) -> Backward:
        seed = (layers.config.seed << 32) + rows.start
        return walk.stream.sample(walk.batch(rows), walk.read(kind, i, rows), paths, seed)

    return _gather(layers, i, run, keep)


def _gather(
    layers: Layers, i: int, run: Callable[[slice, list[str]], Backward], keep: str | None
) -> dict[str, Moments]:
    """Sums the records of all batches."""
    walk, sampled = layers.walk, INPUTS_PER_BATCH if layers.config.rotation in FITTED else 0
    sums = {t.module: Accumulator(t.module, dense=len(t.shape) == 2) for t in layers.trunk[i]}
    for path in layers.projections(i):
        sums[path] = Accumulator(path, layers.sites[i].num_experts, sample=sampled)
    with walk.spill(keep or "", i) as write:
        for rows in walk.batches():
            done = run(rows, list(sums))
            for path, record in done.records.items():
                sums[path].add(record, walk.batch(rows).size)
            if keep:
                write(rows, done.gradient)
    return {path: each.moments() for path, each in sums.items()}
