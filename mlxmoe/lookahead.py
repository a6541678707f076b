"""Reading ahead: while one layer of a decoded token is computed, the experts that the next one probably needs.

Joins prefetch.py (who is probable, and whether it pays) with streaming.py (which reads). A prediction changes when an
expert is read, never what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlxmoe.gates import ScoresFn
from mlxmoe.prefetch import Controller, Frequency, InFlight, NextRouter, Predictor, PreviousToken

PREDICTORS = ("auto", "router", "previous", "frequency", "off")


class Fetching(Protocol):
    """What reading ahead needs of a streamed layer."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each expert."""
        ...

    def absent(self, expert: int) -> bool: ...

    def fetch_ahead(self, expert: int) -> None:
        """Has it read after everything that is waited for, if there is room."""
        ...

    def give_up(self, expert: int) -> None:
        """Drops what was fetched ahead and is not there yet."""
        ...


def make_predictor(name: str, num_layers: int, num_experts: int, gates: Sequence[ScoresFn | None]) -> Predictor | None:
    """The predictor of a name in PREDICTORS; "auto" is the next router where all gates are known, else the previous
    token's choice. None for "off"."""
    if name == "off":
        return None
    if name == "router" or (name == "auto" and all(gate is not None for gate in gates)):
        return NextRouter()
    if name == "frequency":
        return Frequency(np.zeros((num_layers, num_experts)))
    return PreviousToken()


class Outcome(NamedTuple):
    """What was predicted for a layer, ranked, and the bytes that were asked for in vain."""

    predicted: list[int]
    wasted_nbytes: int


class Lookahead:
    """Reads ahead for the layers of one model. Layers are counted from 0 in the order in which a token passes them."""

    def __init__(
        self,
        layers: Sequence[Fetching],
        gates: Sequence[ScoresFn | None],
        predictor: Predictor,
        controller: Controller,
        limit_nbytes: int,
    ):
        self._layers, self._gates = layers, gates
        self._predictor, self._controller = predictor, controller
        self._in_flight = InFlight(limit_nbytes)
        self._predicted: list[int] = []  # for the layer that comes next

    def scores(self, layer: int, x: mx.array) -> mx.array | None:
        """The router of the layer after `layer` on this one's input x [1, D] -> [E], where somebody will look at it."""
        if not self._ranks(layer + 1) or not isinstance(self._predictor, NextRouter):
            return None
        gate = self._gates[layer + 1]
        return gate(x).reshape(-1) if gate is not None else None

    def fetch(self, layer: int, scores: mx.array | None) -> None:
        """Has experts of the layer after `layer` read ahead. `scores`: as `scores` gave them, evaluated."""
        ranks = self._ranks(layer + 1)
        if not ranks:
            return
        following = self._layers[layer + 1]
        ranked = self._predictor.predict(layer + 1, None if scores is None else np.array(scores))
        self._predicted = ranked[:ranks]
        here = [e for e in self._predicted if not following.absent(e)]
        for expert in self._in_flight.start(layer + 1, ranked, ranks, here, following.sizes.__getitem__):
            following.fetch_ahead(expert)

    def routed(self, layer: int, experts: Sequence[int]) -> Outcome:
        """The router of `layer` chose: predictions that were wrong are given up."""
        self._predictor.observe(layer, experts)
        settled = self._in_flight.settle(layer, experts)
        for expert in settled.wasted:
            self._layers[layer].give_up(expert)
        predicted, self._predicted = self._predicted, []
        return Outcome(predicted if layer else [], settled.wasted_nbytes)

    def record(
        self, layer: int, experts: Sequence[int], outcome: Outcome, miss_seconds: float, compute_seconds: float
    ) -> None:
        """What the layer took for this token: seconds of waiting for experts, and for everything before them."""
        self._controller.record(layer, miss_seconds, compute_seconds, outcome.predicted, experts, outcome.wasted_nbytes)

    def stop(self) -> None:
        """Gives up everything that is under way: another prompt comes, or another budget."""
        for layer, expert in self._in_flight.clear():
            self._layers[layer].give_up(expert)
        self._predicted = []

    def as_json(self) -> dict[str, Any]:
        return self._controller.report().as_json()

    def _ranks(self, layer: int) -> int:
        return self._controller.wants(layer) if layer < len(self._layers) else 0
