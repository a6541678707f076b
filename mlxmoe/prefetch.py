"""Which experts to read before they are asked for, and whether reading ahead pays at all.

Pure: predictors rank the experts of a layer from what was seen, a Controller decides per layer from measured times how
many leading ranks to fetch, InFlight bounds the bytes that are asked for and not yet used. Nothing here reads a file, a
clock or an array of MLX: the runtime hands over routing, router scores and seconds, and carries the answers out.

Reading ahead loses more often than it wins: it pays only where waiting for records takes longer than computing, and only
for the leading ranks. So it is off until a trial on this machine with this model has shown a gain, and it is tried again.

`layer` counts the layers with routed experts, from 0 in the order in which a token passes them. A step is one decoded
token; prefill is not predicted, as it needs most experts anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np


class Predictor(Protocol):
    """Ranks the experts that a layer may need next. Deterministic: equal experts come in the order of their number."""

    def observe(self, layer: int, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """The router of `layer` chose `experts` for the current token. Called once per layer and token, in order."""

    def predict(self, layer: int, scores: np.ndarray | None = None) -> list[int]:
        """Experts of `layer`, most probable first, each once; empty where nothing is known. Changes nothing.

        scores [E]: what the router of `layer` says about the hidden state at hand, where the caller has worked it out.
        """


class PreviousToken:
    """What the layer chose for the token before, which it often chooses again (A. Eliseev and D. Mazur, Fast Inference
    of Mixture-of-Experts Language Models with Offloading, arXiv 2312.17238, section 3.1).

    Ranked by the router's scores at that time where they were given, else in the order in which they were given.
    """

    def __init__(self) -> None:
        self._ranked: dict[int, list[int]] = {}

    def observe(self, layer: int, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        ranked = list(dict.fromkeys(int(e) for e in experts))
        if scores is not None:
            ranked.sort(key=lambda e: (-float(scores[e]), e))
        self._ranked[layer] = ranked

    def predict(self, layer: int, scores: np.ndarray | None = None) -> list[int]:
        return list(self._ranked.get(layer, []))


class NextRouter:
    """The layer's own router, on a hidden state from before the layer (arXiv 2312.17238, section 3.2: layers change the
    residual stream little). Whatever grows with the router's preference serves as scores: logits or probabilities."""

    def observe(self, layer: int, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        pass

    def predict(self, layer: int, scores: np.ndarray | None = None) -> list[int]:
        return [] if scores is None else _descending(scores)


class CoActivation:
    """P(expert of this layer | experts of the layer before), from a trace.

    conditional [layers - 1, E, E] float32: [l, s, e] is the share of the tokens which chose s in layer l that chose e in
    layer l + 1: the inter-layer affinity of J. Yao et al., Exploiting Inter-Layer Expert Affinity for Accelerating
    Mixture-of-Experts Model Inference, arXiv 2401.08383. The rows of the experts at hand are summed.
    """

    def __init__(self, conditional: np.ndarray):
        assert conditional.ndim == 3
        assert conditional.shape[1] == conditional.shape[2]
        self._conditional = conditional
        self._last: dict[int, list[int]] = {}

    @classmethod
    def from_trace(cls, experts: np.ndarray, num_experts: int) -> CoActivation:
        """experts [tokens, layers, A] int: the chosen experts of every token and layer."""
        tokens, layers, _ = experts.shape
        conditional = np.zeros((layers - 1, num_experts, num_experts), np.float32)
        chosen = np.zeros((tokens, layers, num_experts), np.float32)
        np.put_along_axis(chosen, experts.astype(np.int64), 1.0, axis=2)
        for layer in range(layers - 1):
            together = chosen[:, layer].T @ chosen[:, layer + 1]
            times = np.maximum(chosen[:, layer].sum(axis=0), 1.0)
            conditional[layer] = together / times[:, None]
        return cls(conditional)

    def observe(self, layer: int, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        self._last[layer] = [int(e) for e in experts]

    def predict(self, layer: int, scores: np.ndarray | None = None) -> list[int]:
        before = self._last.get(layer - 1)
        if not before:
            return []
        likely = self._conditional[layer - 1][before].sum(axis=0)
        return [e for e in _descending(likely) if likely[e] > 0]


class Frequency:
    """The most popular experts of the layer, earlier tokens counting less: every observation is worth 1 / decay times
    the one before. counts [layers, E]: where to start, from a plan or a trace."""

    def __init__(self, counts: np.ndarray, decay: float = 0.99):
        assert counts.ndim == 2
        assert 0 < decay <= 1
        self._counts = counts.astype(np.float64)
        self._decay = decay

    def observe(self, layer: int, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        self._counts[layer] *= self._decay
        self._counts[layer, list(experts)] += 1.0

    def predict(self, layer: int, scores: np.ndarray | None = None) -> list[int]:
        return [e for e in _descending(self._counts[layer]) if self._counts[layer, e] > 0]


def _descending(values: np.ndarray) -> list[int]:
    return [int(e) for e in np.argsort(-np.asarray(values, np.float64), kind="stable")]


# ---------------------------------------------------------------------------------------------------------------------
# What is under way
# ---------------------------------------------------------------------------------------------------------------------


class Settled(NamedTuple):
    """What became of a layer's prefetches once its router has spoken. What is wasted and not read yet is to be cancelled."""

    useful: list[int]
    wasted: list[int]
    wasted_nbytes: int


class InFlight:
    """Prefetches that were asked for and whose layer has not been routed yet: at most `limit_nbytes` of them."""

    def __init__(self, limit_nbytes: int):
        self._limit = limit_nbytes
        self._nbytes: dict[int, dict[int, int]] = {}  # layer -> expert -> bytes

    @property
    def nbytes(self) -> int:
        return sum(sum(experts.values()) for experts in self._nbytes.values())

    def start(
        self, layer: int, ranked: Sequence[int], ranks: int, resident: Container[int], nbytes: Callable[[int], int]
    ) -> list[int]:
        """The experts to ask for now, best first, which count as under way from here on: of the first `ranks` those
        that are neither resident nor asked for, as far as the limit goes. nbytes(expert): what reading it takes."""
        under_way = self._nbytes.setdefault(layer, {})
        started = []
        free = self._limit - self.nbytes
        for expert in ranked[:ranks]:
            if expert in resident or expert in under_way:
                continue
            cost = nbytes(expert)
            if cost > free:
                break  # a worse rank must not take the place of a better one
            under_way[expert] = cost
            free -= cost
            started.append(expert)
        return started

    def settle(self, layer: int, used: Container[int]) -> Settled:
        """The layer was routed to `used`: nothing of it is under way any more."""
        asked = self._nbytes.pop(layer, {})
        wasted = [expert for expert in asked if expert not in used]
        return Settled([e for e in asked if e in used], wasted, sum(asked[e] for e in wasted))

    def clear(self) -> list[tuple[int, int]]:
        """Forgets everything, as when an answer is stopped: the (layer, expert) pairs to cancel."""
        pairs = [(layer, expert) for layer, experts in self._nbytes.items() for expert in experts]
        self._nbytes.clear()
        return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Whether it pays
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControllerConfig:
    """When to read ahead. Lengths are in steps, gains are shares of the time without prefetch."""

    ranks: int = 4  # leading ranks considered at most
    least_precision: float = 0.5  # of a rank, so that it is fetched
    epoch: int = 8  # steps of one half of a trial's pair
    settle: int = 1  # of them not counted: what the half before has begun is still under way
    pairs: int = 4  # off and on halves compared in one trial
    enter: float = 0.05  # gain from which a layer is turned on
    leave: float = 0.02  # gain below which it is turned off again
    watch: int = 32  # steps measured without prefetch before the first trial
    watch_longest: int = 4096  # doubled up to here after every trial that did not pay
    hold: int = 1024  # steps until what is on is tried again

    def __post_init__(self) -> None:
        assert 0 <= self.settle < self.epoch
        assert 0 <= self.leave <= self.enter


class LayerReport(NamedTuple):
    """One layer since the start. Seconds are means per step of the last trial, gain is their median over its pairs;
    None before the first trial. precision, recall: over the considered ranks, None without any prediction."""

    layer: int
    on: bool
    precision: float | None
    recall: float | None
    seconds_off: float | None
    seconds_on: float | None
    gain: float | None
    wasted_nbytes: int


class PrefetchReport(NamedTuple):
    """All layers together; `seconds_saved` per step: what the last trial measured over all layers (negative: a loss)."""

    layers: list[LayerReport]
    steps: int
    steps_on: int  # in which at least one layer was to fetch
    trials: int
    precision: float | None
    recall: float | None
    seconds_saved: float | None
    wasted_nbytes: int

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "layers": [layer._asdict() for layer in self.layers]}


class _Half(NamedTuple):
    """Seconds per layer in a run of steps with prefetch on or off."""

    miss: np.ndarray  # [layers] waiting for records
    compute: np.ndarray  # [layers] everything else
    counted: int

    @classmethod
    def empty(cls, num_layers: int) -> _Half:
        return cls(np.zeros(num_layers), np.zeros(num_layers), 0)

    @property
    def seconds(self) -> np.ndarray:
        """Mean per step and layer [layers]."""
        return (self.miss + self.compute) / max(self.counted, 1)


class Trial(NamedTuple):
    """Means per step over all pairs and the median gain, per layer, and the seconds saved over all layers."""

    off: np.ndarray
    on: np.ndarray
    gain: np.ndarray
    waits: np.ndarray  # [layers] bool: without prefetch, misses take longer than computing
    saved: float

    @classmethod
    def of(cls, off: Sequence[_Half], on: Sequence[_Half]) -> Trial:
        """Entry i of both was measured back to back. The median over pairs is what one slow moment does not move."""
        before, after = np.array([half.seconds for half in off]), np.array([half.seconds for half in on])
        gain = np.median(1 - after / np.maximum(before, 1e-12), axis=0)
        waits = sum(half.miss for half in off) > sum(half.compute for half in off)
        saved = float(np.median((before - after).sum(axis=1)))
        return cls(before.mean(axis=0), after.mean(axis=0), gain, np.asarray(waits), saved)


@dataclass
class _Account:
    """Predictions of one layer: per rank how often there was one and how often it was used, and the totals."""

    seen: np.ndarray
    hit: np.ndarray
    predicted: int = 0
    correct: int = 0
    used: int = 0
    wasted_nbytes: int = 0


@dataclass
class Controller:
    """Turns prefetch on per layer where it was measured to pay, and off where it does not.

    Three phases. *watch*: off, until some layer waits longer for records than it computes. *trial*: those layers are on
    and off in turn (off on, on off, ...), and the medians over neighbouring halves are compared. *hold*: the layers that
    gained at least `enter` stay on until the next trial, in which `leave` is enough to stay; if the layers together did
    not gain, all are off, since one layer's reading ahead delays another's misses. After a trial without success the
    next is twice as far away. The same seconds give the same decisions.
    """

    num_layers: int
    config: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        self._accounts = [
            _Account(np.zeros(self.config.ranks), np.zeros(self.config.ranks)) for _ in range(self.num_layers)
        ]
        self._phase: Literal["watch", "trial", "hold"] = "watch"
        self._watch = self.config.watch
        self._tried: set[int] = set()  # layers that are on in the on halves of this trial
        self._on: set[int] = set()  # layers that stay on
        self._halves: list[_Half] = []
        self._half = _Half.empty(self.num_layers)
        self._done = 0  # steps of this half
        self._layer = -1  # the last one recorded
        self._steps = self._steps_on = self._trials = 0
        self._trial: Trial | None = None

    def wants(self, layer: int) -> int:
        """How many leading ranks of a prediction for `layer` to fetch now; 0: none."""
        return self._ranks(layer) if layer in self._active() else 0

    def record(
        self,
        layer: int,
        miss_seconds: float,
        compute_seconds: float,
        predicted: Sequence[int],
        used: Iterable[int],
        wasted_nbytes: int = 0,
    ) -> None:
        """What one layer did in one step, called in the order of the layers. A step ends with the last layer, or where a
        layer is not above the one before. `miss_seconds`: spent waiting for records; `compute_seconds`: the rest of the
        layer's time; `predicted` ranked, also where nothing was fetched; `used`: what the router chose; `wasted_nbytes`:
        read and not used."""
        if layer <= self._layer:
            self._end_step()
        self._layer = layer
        if self._phase != "trial" or self._done >= self.config.settle:
            self._half.miss[layer] += miss_seconds
            self._half.compute[layer] += compute_seconds
        chosen = set(used)
        account = self._accounts[layer]
        considered = [expert in chosen for expert in predicted[: self.config.ranks]]
        account.seen[: len(considered)] += 1
        account.hit[: len(considered)] += considered
        account.predicted += len(considered)
        account.correct += sum(considered)
        account.used += len(chosen)
        account.wasted_nbytes += wasted_nbytes
        if layer == self.num_layers - 1:
            self._end_step()

    def report(self) -> PrefetchReport:
        trial = self._trial
        layers = [
            LayerReport(
                layer,
                layer in self._on,
                _share(account.correct, account.predicted),
                _share(account.correct, account.used) if account.predicted else None,
                float(trial.off[layer]) if trial else None,
                float(trial.on[layer]) if trial else None,
                float(trial.gain[layer]) if trial else None,
                account.wasted_nbytes,
            )
            for layer, account in enumerate(self._accounts)
        ]
        predicted = sum(a.predicted for a in self._accounts)
        correct = sum(a.correct for a in self._accounts)
        used = sum(a.used for a in self._accounts)
        return PrefetchReport(
            layers,
            self._steps + (self._layer >= 0),
            self._steps_on + (self._layer >= 0 and bool(self._active())),
            self._trials,
            _share(correct, predicted),
            _share(correct, used) if predicted else None,
            trial.saved if trial else None,
            sum(a.wasted_nbytes for a in self._accounts),
        )

    def _ranks(self, layer: int) -> int:
        """The leading ranks that were right often enough of late; all of them while nothing is known."""
        account = self._accounts[layer]
        for rank in range(self.config.ranks):
            if account.seen[rank] and account.hit[rank] < self.config.least_precision * account.seen[rank]:
                return rank
        return self.config.ranks

    def _active(self) -> set[int]:
        if self._phase == "trial":
            return self._tried if self._is_on_half() else set()
        return self._on

    def _is_on_half(self) -> bool:
        return len(self._halves) % 4 in (1, 2)  # off on, on off: neither always goes first

    def _end_step(self) -> None:
        self._layer = -1
        self._steps += 1
        self._steps_on += bool(self._active())
        if self._phase != "trial" or self._done >= self.config.settle:
            self._half = self._half._replace(counted=self._half.counted + 1)
        self._done += 1
        length = {"watch": self._watch, "trial": self.config.epoch, "hold": self.config.hold}[self._phase]
        if self._done >= length:
            self._end_half()

    def _end_half(self) -> None:
        half, self._half, self._done = self._half, _Half.empty(self.num_layers), 0
        if self._phase == "trial":
            self._halves.append(half)
            if len(self._halves) == 2 * self.config.pairs:
                self._judge()
            return
        for account in self._accounts:  # what was right long ago counts less
            account.seen /= 2
            account.hit /= 2
        self._tried = self._on | {
            layer for layer in range(self.num_layers) if half.miss[layer] > half.compute[layer] and self._ranks(layer)
        }
        self._halves = []
        self._phase = "trial" if self._tried else "watch"

    def _judge(self) -> None:
        pairs = list(zip(self._halves[::2], self._halves[1::2], strict=True))
        trial = Trial.of(*zip(*((b, a) if i % 2 else (a, b) for i, (a, b) in enumerate(pairs)), strict=True))
        self._trial = trial
        self._trials += 1
        config = self.config
        paying = {
            layer
            for layer in self._tried
            if trial.waits[layer] and trial.gain[layer] >= (config.leave if layer in self._on else config.enter)
        }
        self._on = paying if trial.saved > 0 else set()
        self._phase = "hold" if self._on else "watch"
        self._watch = config.watch if self._on else min(2 * self._watch, config.watch_longest)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
