"""The experts of a converted folder that are all in memory, at levels that may change between two tokens.

A smaller budget drops refinement planes, a larger one reads them back (`resize`); with `adapt`, experts that are chosen
often exchange levels with ones that are not. Neither is done while a graph is running: the caller sees to that. Output
depends on the levels alone, so a budget gives the same output every time; with `adapt`, a budget and a history do.

Shapes: E experts, N rows of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxmoe.banks import Rows, fill_layer, plane_layer, read_matrix, resident_factor
from mlxmoe.errors import UserError
from mlxmoe.experts import Choices, ExpertLayer, KernelExperts
from mlxmoe.formats import num_planes
from mlxmoe.kernels import PlaneBank
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.residency import Residency, Storage, Swap, choose_swaps, smallest_residency, solve_residency
from mlxmoe.store import ExpertStore
from mlxmoe.units import format_size

ADAPT_EVERY = 64  # tokens between two rounds of exchanges
SWAPS_PER_LAYER = 2  # in a round: each reads two expert matrices


class LevelledLayer(Protocol):
    """A layer whose experts' levels can change. No graph may be about to read it while they do."""

    @property
    def choices(self) -> Choices: ...

    def fill(self, store: ExpertStore, levels: Sequence[tuple[int, ...]], widths: tuple[int, ...]) -> None:
        """Reads what these levels take; what the layer held is freed first."""
        ...

    def exchange(self, store: ExpertStore, swap: Swap, low: int, high: int) -> None:
        """The promoted expert goes from `low` to `high`, the demoted one the other way."""
        ...


class MergedLevels:
    """For MLX's built-in products: merged codes, in rows of a bank per field width."""

    def __init__(self, layer: LayerPlan, module: ExpertLayer, dtype: mx.Dtype):
        self._layer, self._module, self._dtype = layer, module, dtype
        self._rows: list[Rows] = []
        self.choices = module.choices

    def fill(self, store: ExpertStore, levels: Sequence[tuple[int, ...]], widths: tuple[int, ...]) -> None:
        self._rows = []
        self._rows = fill_layer(self._module, store, self._layer, levels, widths, self._dtype)

    def exchange(self, store: ExpertStore, swap: Swap, low: int, high: int) -> None:
        """Each takes the other's row, unless rows are of one width: then it stays in its own."""
        p, pair, rows = swap.projection, (swap.promoted, swap.demoted), self._rows[swap.projection]
        places = {expert: (bank, row) for experts, bank in rows for row, expert in enumerate(experts)}
        new = dict(zip(pair, (high, low), strict=True))
        matrices = {expert: read_matrix(store, self._layer, expert, p, level) for expert, level in new.items()}
        if places[pair[0]][0] is not places[pair[1]][0]:
            places |= {pair[0]: places[pair[1]], pair[1]: places[pair[0]]}
            for experts, _ in rows:
                experts[:] = [{pair[0]: pair[1], pair[1]: pair[0]}.get(e, e) for e in experts]
        for expert, level in new.items():
            bank, row = places[expert]
            factor = resident_factor(self._layer.experts[expert], p, level)
            bank.write(row, matrices[expert].planes, matrices[expert].scales, factor)
        self._module[self._layer.projections[p].name].place([experts for experts, _ in rows])


class PlaneLevels:
    """For the project's kernels: planes as they are. biases: [E, N] per projection, or None."""

    def __init__(self, layer: LayerPlan, module: KernelExperts, biases: Sequence[mx.array | None]):
        self._layer, self._module, self._biases = layer, module, tuple(biases)
        self.choices = module.choices

    def fill(self, store: ExpertStore, levels: Sequence[tuple[int, ...]], widths: tuple[int, ...]) -> None:
        nothing = PlaneBank(self._layer.projections[0], mx.zeros((0,), mx.uint32), mx.zeros((0, 0), mx.int32))
        empty = self._module.banks._replace(gate=nothing, up=nothing, down=nothing)
        self._module.fill(empty)
        mx.clear_cache()
        first, *between, last = plane_layer(store, self._layer, levels, self._biases)
        self._module.fill(empty._replace(gate=first, up=between[0] if between else None, down=last))

    def exchange(self, store: ExpertStore, swap: Swap, low: int, high: int) -> None:
        """The promoted expert's refinement is read into the places of the demoted one's."""
        p, pair = swap.projection, (swap.promoted, swap.demoted)
        bank = [bank for bank in self._module.banks[:3] if bank is not None][p]
        assert isinstance(bank, PlaneBank)
        planes = read_matrix(store, self._layer, swap.promoted, p, high).planes[num_planes(low) :]
        first, second = (
            resident_factor(self._layer.experts[e], p, level) for e, level in zip(pair, (high, low), strict=True)
        )
        bank.exchange(swap.promoted, swap.demoted, planes, (first, second))


class ElasticMemory:
    """All layers of a model under one budget of bytes. `layers`: one for each of the plan's.

    `storage` and `widen` as in solve_residency. The folder's files are open only while it reads. A read that fails
    raises UserError and leaves the layer that was being read without experts, so the model cannot be used after it.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        layers: Sequence[LevelledLayer],
        residency: Residency,
        storage: Storage,
        widen: bool,
        adapt: bool = False,
    ):
        self._plan, self._folder, self._layers = plan, folder, layers
        self._storage, self._widen = storage, widen
        self._adapt, self._tokens, self.swaps = adapt, 0, 0
        self.residency = residency
        for layer in layers:
            layer.choices.watched = adapt

    @property
    def nbytes(self) -> int:
        """Bytes that experts take."""
        return self.residency.nbytes

    @property
    def capacity(self) -> int:
        """The same: nothing is kept free."""
        return self.nbytes

    @property
    def least(self) -> int:
        """The smallest budget: base planes only."""
        return smallest_residency(self._plan, self._storage)

    @property
    def full(self) -> int:
        """The budget from which everything that is written is resident."""
        return solve_residency(self._plan, None, self._storage, widen=False).nbytes

    def resize(self, budget: int) -> None:
        """Another budget in bytes for the experts, from now on. Reads the layers that change, one at a time. Raises
        UserError, and changes nothing, where not even the base planes fit."""
        try:
            residency = solve_residency(self._plan, budget, self._storage, self._widen)
        except ValueError:
            raise UserError(
                f"the base planes of the experts do not fit in {budget} bytes", f"they need {self.least} bytes"
            ) from None
        before, self.residency = self.residency, residency
        # Layers that shrink first: what they give back is what the others grow into
        changes = [
            (self._layer_nbytes(residency, i) - self._layer_nbytes(before, i), i)
            for i in range(len(self._layers))
            if (before.levels[i], before.widths[i]) != (residency.levels[i], residency.widths[i])
        ]
        with ExpertStore(self._folder, self._plan.layers) as store:
            for _, i in sorted(changes):
                self._layers[i].fill(store, residency.levels[i], residency.widths[i])

    def _layer_nbytes(self, residency: Residency, i: int) -> int:
        layer, widths = self._plan.layers[i], residency.widths[i]
        return sum(
            self._storage.nbytes(shape, widths[p] or levels[p])
            for levels in residency.levels[i]
            for p, shape in enumerate(layer.projections)
        )

    def between_tokens(self) -> bool:
        """Counts a token. Returns whether a round of exchanges is due, for which `adapt` is to be called."""
        self._tokens += 1
        return self._adapt and self._tokens % ADAPT_EVERY == 0

    def adapt(self) -> int:
        """One round of exchanges, by what was chosen since the last one. Returns how many there were."""
        done = 0
        with ExpertStore(self._folder, self._plan.layers) as store:
            for layer, plan, levels in zip(self._layers, self._plan.layers, self.residency.levels, strict=True):
                uses = np.bincount(layer.choices.take(), minlength=len(plan.experts))
                for swap in choose_swaps(plan, levels, uses.tolist(), SWAPS_PER_LAYER):
                    p, pair = swap.projection, (swap.promoted, swap.demoted)
                    low, high = (levels[e][p] for e in pair)
                    layer.exchange(store, swap, low, high)
                    for expert, level in zip(pair, (high, low), strict=True):
                        levels[expert] = (*levels[expert][:p], level, *levels[expert][p + 1 :])
                    done += 1
        self.swaps += done
        return done

    def line(self) -> str:
        """For the person at the terminal."""
        shares = ", ".join(f"{count} at {level} bit" for level, count in self.residency.histogram().items())
        return f"expert matrices: {shares}, {format_size(self.nbytes)}; {self.swaps} exchanges of levels"

    def as_json(self) -> dict[str, Any]:
        levels = {str(level): count for level, count in self.residency.histogram().items()}
        return {"bytes_held": self.nbytes, "levels": levels, "swaps": self.swaps}
