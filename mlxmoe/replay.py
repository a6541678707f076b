"""Replays a trace: what a policy's hit rate would have been with so many slots per layer, and which policy that speaks for.

The rules are the runtime's. All experts of a step are needed at once: those that are resident are hits, the others misses,
which are admitted one after the other, each in the place of the policy's victim among the residents that are neither of
this step nor pinned. Where there is none, a miss is used and not kept. A layer starts with its pinned experts only.

Shapes: T tokens, L layers, A active experts per token, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from mlxmoe.policies import POLICIES, Belady, Policy
from mlxmoe.trace import Trace

PolicyOf = Callable[[int, int], Policy]  # (index of the layer in the trace, slots) -> a fresh policy


class Replay(NamedTuple):
    """hits uint8 [T, L]: of the A experts of each step, how many were resident."""

    hits: np.ndarray
    active: int  # A

    @property
    def misses(self) -> np.ndarray:
        """[T, L]."""
        return self.active - self.hits

    @property
    def hit_rate(self) -> float:
        return float(self.hits.mean()) / self.active

    @property
    def layer_hit_rates(self) -> np.ndarray:
        """[L]."""
        return self.hits.mean(axis=0) / self.active


def replay(
    trace: Trace, policy_of: PolicyOf, slots: Sequence[int], pinned: Sequence[Collection[int]] | None = None
) -> Replay:
    """Hits of a policy with slots[l] experts resident in layer l, of which pinned[l] always are (and take a slot)."""
    hits = np.empty(trace.experts.shape[:2], np.uint8)
    for layer, capacity in enumerate(slots):
        scores = None if trace.scores is None else trace.scores[:, layer].astype(np.float32)
        held = pinned[layer] if pinned is not None else ()
        hits[:, layer] = replay_layer(trace.experts[:, layer], policy_of(layer, capacity), capacity, held, scores)
    return Replay(hits, trace.experts.shape[-1])


def replay_layer(
    experts: np.ndarray, policy: Policy, slots: int, pinned: Collection[int] = (), scores: np.ndarray | None = None
) -> np.ndarray:
    """experts [T, A] of one layer, scores [T, E] or None -> hits [T]. `policy` must be fresh."""
    assert len(pinned) <= slots
    resident = set(pinned)
    for expert in sorted(pinned):
        policy.admitted(expert)
    hits = np.empty(len(experts), np.uint8)
    for step, own in enumerate(experts.tolist()):
        policy.routed(own, None if scores is None else scores[step])
        missing = [expert for expert in own if expert not in resident]
        hits[step] = len(own) - len(missing)
        for expert in missing:
            if len(resident) >= slots:
                candidates = resident.difference(own, pinned)
                if not candidates:
                    break
                victim = policy.victim(candidates)
                resident.remove(victim)
                policy.evicted(victim)
            resident.add(expert)
            policy.admitted(expert)
    return hits


def belady(trace: Trace, slots: Sequence[int], pinned: Sequence[Collection[int]] | None = None) -> Replay:
    """The best that any policy could have done with these slots, by the same rules."""
    futures = [trace.experts[:, layer].tolist() for layer in range(len(trace.layers))]
    return replay(trace, lambda layer, n: Belady(trace.num_experts, n, futures[layer]), slots, pinned)


# ---------------------------------------------------------------------------------------------------------------------
# Which policy, and how the slots are split over the layers
# ---------------------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A policy with the parameters that all layers share."""

    policy: str
    parameters: tuple[tuple[str, float], ...] = ()


def _grid(policy: str, **values: Sequence[float]) -> list[Candidate]:
    return [Candidate(policy, tuple(zip(values, row, strict=True))) for row in product(*values.values())]


# What is tried of each policy; the parameters are fitted on the first half of a trace
CANDIDATES: dict[str, list[Candidate]] = {
    "lru": _grid("lru"),
    "lfu": _grid("lfu", decay=(0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)),
    "lfru": _grid("lfru", privileged=(0.25, 0.5), decay=(0.97, 0.99)),
    "s3-fifo": _grid("s3-fifo", small=(0.1, 0.25)),
    "least-stale": _grid("least-stale"),
    "static": _grid("static"),
}
BELADY = Candidate("belady")
CURVE_POINTS = 16  # slot counts that a curve is replayed at; between them it is taken as straight


class HitRates:
    """Hit rates over one trace by candidate, layer and slots, each replayed once. `frequencies` [L, E]: what `static` goes
    by. `replayed` is called after each replay of a layer."""

    def __init__(self, trace: Trace, frequencies: np.ndarray, replayed: Callable[[], object] = lambda: None) -> None:
        self.trace = trace
        self._frequencies = frequencies
        self._replayed = replayed
        self._known: dict[tuple[Candidate, int, int], float] = {}

    def layer(self, candidate: Candidate, layer: int, slots: int) -> float:
        """Share of the choices of layer index `layer` that `slots` slots would have hit."""
        key = (candidate, layer, slots)
        if key not in self._known:
            experts = self.trace.experts[:, layer]
            policy = self._policy(candidate, layer, slots)
            self._known[key] = float(replay_layer(experts, policy, slots).mean()) / experts.shape[-1]
            self._replayed()
        return self._known[key]

    def mean(self, candidate: Candidate, slots: Sequence[int]) -> float:
        """Over all layers, with slots[l] of them in layer l."""
        return float(np.mean([self.layer(candidate, layer, n) for layer, n in enumerate(slots)]))

    def curves(self, candidate: Candidate) -> np.ndarray:
        """float64 [L, E + 1]: hit rate by slots; -inf for fewer slots than one step needs."""
        num_experts, active = self.trace.num_experts, self.trace.experts.shape[-1]
        points = np.unique(np.linspace(active, num_experts, min(CURVE_POINTS, num_experts - active + 1)).astype(int))
        curves = np.full((len(self.trace.layers), num_experts + 1), -np.inf)
        for layer in range(len(self.trace.layers)):
            known = [self.layer(candidate, layer, int(n)) for n in points]
            curves[layer, active:] = np.interp(range(active, num_experts + 1), points, known)
        return curves

    def _policy(self, candidate: Candidate, layer: int, slots: int) -> Policy:
        own: dict[str, Any] = {}
        if candidate == BELADY:
            own = {"future": self.trace.experts[:, layer].tolist()}
        elif candidate.policy == "static":
            own = {"frequencies": self._frequencies[layer].tolist()}
        return POLICIES[candidate.policy](self.trace.num_experts, slots, **dict(candidate.parameters), **own)


def frequencies(trace: Trace) -> np.ndarray:
    """int64 [L, E]: how often each expert was chosen."""
    return np.stack([np.bincount(e.ravel(), minlength=trace.num_experts) for e in np.moveaxis(trace.experts, 1, 0)])


def split_slots(curves: np.ndarray, total: int) -> list[int]:
    """The slots per layer, `total` in all, with the highest sum of hit rates curves [L, E + 1]. Exact: a knapsack over the
    layers, O(L * E * total)."""
    best, chosen = np.full(total + 1, -np.inf), []
    best[0] = 0.0
    for curve in curves:
        sums = np.full((len(curve), total + 1), -np.inf)
        for n in np.flatnonzero(np.isfinite(curve[: total + 1])):
            sums[n, n:] = best[: total + 1 - n] + curve[n]
        chosen.append(sums.argmax(axis=0))
        best = sums.max(axis=0)
    assert np.isfinite(best[total]), "no layer may have fewer slots than a step needs"
    slots: list[int] = []
    for layer in reversed(chosen):
        slots.append(int(layer[total]))
        total -= slots[-1]
    return slots[::-1]


class Outcome(NamedTuple):
    """One policy at one budget, its parameters fitted on the first half. Hit rates with the same slots in every layer."""

    candidate: Candidate
    fitted: float  # on the first half
    held_out: float  # on the other


class Budget(NamedTuple):
    """What is known of one budget. `slots`: the choice's split; every hit rate but Outcome.fitted is of the held-out half.

    `belady`: the bound with the same slots everywhere; `bound`: Belady with the best split for it, known in hindsight.
    """

    residency: float
    equal: int  # slots per layer when all have the same
    outcomes: list[Outcome]
    belady: float
    bound: float
    candidate: Candidate
    slots: list[int]
    hit_rate: float

    @property
    def lru(self) -> float:
        return next(o.held_out for o in self.outcomes if o.candidate.policy == "lru")


class Study:
    """Fits on the first half of a trace, judges on the other."""

    def __init__(self, trace: Trace, replayed: Callable[[], object] = lambda: None) -> None:
        first, second = trace.halves()
        counts = frequencies(first)
        self.num_experts, self.active = trace.num_experts, trace.experts.shape[-1]
        self.frequencies = counts
        self._fit, self._held_out = HitRates(first, counts, replayed), HitRates(second, counts, replayed)
        # Whether another split pays is found out inside the first half: planned on one quarter, tried on the next
        self._quarters = [HitRates(part, counts, replayed) for part in first.halves()]

    def budget(self, residency: float) -> Budget:
        """Chooses for slots for this share of the experts, at least as many as a step needs.

        The policy is the best on the first half of those that are no worse than LRU on the other.
        """
        layers = len(self.frequencies)
        equal = max(self.active, round(residency * self.num_experts))
        same = [equal] * layers
        outcomes = []
        for candidates in CANDIDATES.values():
            best = max(candidates, key=lambda c: self._fit.mean(c, same))
            outcomes.append(Outcome(best, self._fit.mean(best, same), self._held_out.mean(best, same)))
        lru = next(o.held_out for o in outcomes if o.candidate.policy == "lru")
        chosen = max((o for o in outcomes if o.held_out >= lru), key=lambda o: o.fitted).candidate
        slots = self._split(chosen, same)
        if self._held_out.mean(chosen, slots) < lru:
            slots = same
        total = equal * layers
        bound = self._held_out.mean(BELADY, split_slots(self._held_out.curves(BELADY), total))
        belady = self._held_out.mean(BELADY, same)
        hit_rate = self._held_out.mean(chosen, slots)
        return Budget(residency, equal, outcomes, belady, max(bound, belady), chosen, slots, hit_rate)

    def _split(self, candidate: Candidate, same: list[int]) -> list[int]:
        """The split that the first half suggests, or the same slots for all where that was no gain inside it."""
        total = sum(same)
        planned = split_slots(self._quarters[0].curves(candidate), total)
        if self._quarters[1].mean(candidate, planned) <= self._quarters[1].mean(candidate, same):
            return same
        return split_slots(self._fit.curves(candidate), total)
