"""The experts of a streamed model: ExpertMemory owns their budget, the store they come from and the threads that read.

Built by the loader in place of the resident experts; the model calls its StreamedExperts, the commands ask it for counts
and may give it another budget between two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlxmoe.cache import CacheCounts, LayerCache
from mlxmoe.errors import UserError
from mlxmoe.gates import ScoresFn
from mlxmoe.lookahead import Lookahead, make_predictor
from mlxmoe.prefetch import Controller
from mlxmoe.reader import Reader
from mlxmoe.shelves import Shelf
from mlxmoe.store import ExpertSource
from mlxmoe.streaming import Beside, Running, StreamCounts, StreamedExperts
from mlxmoe.units import format_size


class LayerBytes(NamedTuple):
    """Bytes of memory of each expert of a layer, and how many of them a token is sent to."""

    sizes: Sequence[int]
    active: int

    @property
    def least(self) -> int:
        """Any experts that one token may choose, all at once."""
        return sum(sorted(self.sizes)[-self.active :])

    @property
    def total(self) -> int:
        return sum(self.sizes)


class Place(NamedTuple):
    """One layer to be streamed. `beside`: what its block computes on the same input; `gate`: its router's scores."""

    shelf: Shelf
    cache: LayerCache
    active: int
    beside: Sequence[Beside] = ()
    gate: ScoresFn | None = None


def split_budget(layers: Sequence[LayerBytes], budget: int, wanted: Sequence[float] | None = None) -> list[int]:
    """Bytes for each layer: what it needs, and of the rest a share in proportion to what it wants beyond that (None: all
    of its experts), but never more than all of them take. Raises ValueError below the sum of what the layers need."""
    least = sum(layer.least for layer in layers)
    if budget < least:
        raise ValueError(f"{budget} bytes for experts that need {least}")
    capacities = [float(layer.least) for layer in layers]
    weights = [
        max(1.0, wish - layer.least) for wish, layer in zip(wanted or [x.total for x in layers], layers, strict=True)
    ]
    growing = {i for i, layer in enumerate(layers) if layer.total > layer.least}
    while growing and budget - sum(capacities) >= 1:
        scale = (budget - sum(capacities)) / sum(weights[i] for i in growing)
        for i in tuple(growing):
            capacities[i] = min(layers[i].total, capacities[i] + scale * weights[i])
            if capacities[i] == layers[i].total:
                growing.remove(i)
    return [math.floor(capacity) for capacity in capacities]


def choose_pinned(layer: LayerBytes, budget: int, frequencies: Sequence[float] | None) -> list[int]:
    """The most frequent experts of a layer that fit in `budget` bytes together; none where frequencies are unknown."""
    pinned: list[int] = []
    for expert in (
        sorted(range(len(layer.sizes)), key=lambda e: (-frequencies[e], e)) if frequencies is not None else ()
    ):
        if layer.sizes[expert] > budget:
            break
        pinned.append(expert)
        budget -= layer.sizes[expert]
    return pinned


class ExpertMemory:
    """All streamed layers of a model under one budget in bytes. Owns the source and the reader.

    Not for use by several threads at once, as the model is not either.
    """

    def __init__(self, source: ExpertSource, reader: Reader, places: Sequence[Place], prefetch: str = "off"):
        self._source, self._reader = source, reader
        self._shapes = [LayerBytes(place.shelf.sizes, place.active) for place in places]
        self._running, self.counts = Running(), StreamCounts()
        self.layers = [
            StreamedExperts(place.shelf, place.cache, reader, self._running, self.counts, place.beside)
            for place in places
        ]
        self._lookahead = self._read_ahead([place.gate for place in places], prefetch)

    def _read_ahead(self, gates: Sequence[ScoresFn | None], prefetch: str) -> Lookahead | None:
        most = max(len(shape.sizes) for shape in self._shapes)
        predictor = make_predictor(prefetch, len(self.layers), most, gates)
        if predictor is None:
            return None
        # What one layer takes of the budget is the most that may be on its way unasked
        limit = min(layer.cache.capacity for layer in self.layers) // 2
        lookahead = Lookahead(self.layers, gates, predictor, Controller(len(self.layers)), limit)
        for index, layer in enumerate(self.layers):
            layer.follow(lookahead, index)
        return lookahead

    @property
    def capacity(self) -> int:
        """The most bytes that experts take."""
        return sum(layer.cache.capacity for layer in self.layers)

    @property
    def least(self) -> int:
        """The smallest budget: the experts of one token."""
        return sum(shape.least for shape in self._shapes)

    @property
    def total(self) -> int:
        """Bytes that all experts would take."""
        return sum(shape.total for shape in self._shapes)

    @property
    def nbytes(self) -> int:
        """Bytes that experts take now."""
        return sum(layer.cache.nbytes for layer in self.layers)

    def resize(self, budget: int) -> None:
        """Another budget, from now on. Waits for what is being computed and read. Raises UserError, and changes nothing,
        below what a token needs."""
        try:
            wanted = [layer.cache.capacity for layer in self.layers]
            capacities = split_budget(self._shapes, budget, wanted)
        except ValueError:
            raise UserError(
                f"the experts of one token do not fit in {budget} bytes", f"they need at least {self.least} bytes"
            ) from None
        if self._lookahead is not None:
            self._lookahead.stop()
        self._running.settle()
        for layer, capacity in zip(self.layers, capacities, strict=True):
            layer.resize(capacity)

    def totals(self) -> CacheCounts:
        """Counts over all layers."""
        counts = [layer.cache.counts for layer in self.layers]
        return CacheCounts(*(sum(getattr(c, name) for c in counts) for name in vars(CacheCounts())))

    def line(self) -> str:
        """For the person at the terminal: how it went so far."""
        totals = self.totals()
        asked = totals.hits + totals.misses
        share = f"{100 * totals.hits / asked:.0f} % of {asked}" if asked else "none"
        return (
            f"experts in memory when needed: {share}; {format_size(totals.nbytes_filled)} read, "
            f"{self.counts.wait_seconds:.2f} s waited for them"
        )

    def as_json(self) -> dict[str, Any]:
        totals = self.totals()
        return {
            "bytes_capacity": self.capacity,
            "bytes_held": self.nbytes,
            "hits": totals.hits,
            "misses": totals.misses,
            "hit_rate": totals.hit_rate,
            "bytes_filled": totals.nbytes_filled,
            "host_reads": self.counts.host_reads,
            "wait_seconds": self.counts.wait_seconds,
            "compute_seconds": self.counts.compute_seconds,
            "prefetch": self._lookahead.as_json() if self._lookahead is not None else None,
        }

    def check(self) -> None:
        """Asserts what must hold between two calls."""
        for layer in self.layers:
            layer.check()

    def close(self) -> None:
        """Ends the threads and closes the files. The model cannot be used after it."""
        self._running.settle()
        self._reader.close()
        self._source.close()
