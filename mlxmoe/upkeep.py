"""What is done between two tokens of an answer: experts give memory back when the machine runs short of it, and those
that are chosen often take precision from others where that was asked for (--adapt)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlxmoe.arguments import note
from mlxmoe.loading import Loaded
from mlxmoe.pressure import PressureWatch
from mlxmoe.units import format_size

SHRINK = 0.85  # of what experts take, each time that memory is found short


class Upkeep:
    """Called after every token. mlx-lm has the next one under way by then: before anything changes, it is waited for."""

    def __init__(self, loaded: Loaded, short: Callable[[], bool] | None = None):
        self._memory, self._elastic = loaded.experts or loaded.elastic, loaded.elastic
        self._short = PressureWatch() if short is None else short

    def __call__(self) -> None:
        if self._memory is not None and self._short():
            self._give_back()
        if self._elastic is not None and self._elastic.between_tokens():
            mx.synchronize(generation_stream)
            self._elastic.adapt()

    def _give_back(self) -> None:
        """Less for experts: refinements first where all are resident, else the least worth keeping."""
        memory = self._memory
        assert memory is not None
        budget = max(memory.least, int(SHRINK * memory.capacity))
        if budget < memory.capacity:
            mx.synchronize(generation_stream)
            memory.resize(budget)
            mx.clear_cache()
            note(f"memory is short on this machine: experts now take at most {format_size(memory.capacity)}")
