"""Which experts of a layer are in memory: the bookkeeping of streaming, without I/O and without arrays.

LayerCache owns its layer's share of the budget and decides who leaves (through a Policy, policies.py); shelves.py owns
where experts lie, streaming.py when they are read. One thread calls it: readers only fill memory they were given.

An expert is absent, loading (its memory is taken, its bytes are on their way) or present. A present one may be held: a
graph that has not been evaluated reads it. Only a present expert that is neither held nor pinned is ever evicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlxmoe.policies import Policy


@dataclass
class CacheCounts:
    """What happened so far, in experts (one routed step counts an expert once) and bytes of memory filled."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    nbytes_filled: int = 0

    @property
    def hit_rate(self) -> float | None:
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


class LayerCache:
    """The experts of one layer under a ceiling of `capacity` bytes; sizes[e] is what expert e takes.

    `pinned` experts are never evicted once they are present; reading them is up to the caller.
    """

    def __init__(self, sizes: Sequence[int], capacity: int, policy: Policy, pinned: Collection[int] = ()):
        assert capacity >= max(sizes), "no room for a single expert"
        self._sizes = tuple(sizes)
        self._capacity = capacity
        self._policy = policy
        self._pinned = frozenset(pinned)
        self._present: set[int] = set()
        self._loading: set[int] = set()
        self._held: Counter[int] = Counter()
        self._nbytes = 0
        self.counts = CacheCounts()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes that present and loading experts take."""
        return self._nbytes

    @property
    def pinned(self) -> frozenset[int]:
        return self._pinned

    @property
    def present(self) -> frozenset[int]:
        return frozenset(self._present)

    @property
    def loading(self) -> frozenset[int]:
        return frozenset(self._loading)

    @property
    def held(self) -> frozenset[int]:
        """Present experts that a graph reads which is not evaluated yet."""
        return frozenset(self._held)

    def __contains__(self, expert: int) -> bool:
        return expert in self._present

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """The router chose these experts: counts hits and misses, and tells the policy. Changes no residency."""
        hits = sum(expert in self._present for expert in experts)
        self.counts.hits += hits
        self.counts.misses += len(experts) - hits
        self._policy.routed(experts, scores)

    def admit(self, expert: int, keep: Collection[int] = ()) -> list[int] | None:
        """Takes room for an absent expert, which is loading from now on. Returns who was evicted for it, or None (and
        changes nothing) where everything that could leave is in `keep`, held, pinned or loading itself."""
        assert expert not in self._present | self._loading
        evicted: list[int] = []
        candidates = self._evictable(keep)
        if self._free + sum(self._sizes[e] for e in candidates) < self._sizes[expert]:
            return None
        while self._free < self._sizes[expert]:
            victim = self._policy.victim(candidates)
            candidates.remove(victim)
            self._evict(victim)
            evicted.append(victim)
        self._loading.add(expert)
        self._nbytes += self._sizes[expert]
        return evicted

    def arrived(self, expert: int) -> None:
        """Its bytes are all there."""
        self._loading.remove(expert)
        self._present.add(expert)
        self._policy.admitted(expert)
        self.counts.nbytes_filled += self._sizes[expert]

    def abandon(self, expert: int) -> None:
        """It will not arrive: reading failed or was given up. Its room is free again."""
        self._loading.remove(expert)
        self._nbytes -= self._sizes[expert]

    def hold(self, experts: Iterable[int]) -> None:
        """A graph that is not evaluated yet reads them. Each hold takes a release."""
        for expert in experts:
            assert expert in self._present
            self._held[expert] += 1

    def release(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self._held[expert] -= 1
            assert self._held[expert] >= 0
        self._held += Counter()  # drops zeros

    def resize(self, capacity: int) -> list[int]:
        """Another ceiling. Returns who was evicted for it; nothing may be held or loading."""
        assert not self._held.keys() | self._loading
        assert capacity >= max(self._sizes)
        candidates, evicted = self._evictable(()), []
        self._capacity = capacity
        while self._free < 0:
            # Pinned experts go last: a ceiling is a ceiling
            victim = self._policy.victim(candidates or self._present)
            candidates.discard(victim)
            self._evict(victim)
            evicted.append(victim)
        return evicted

    @property
    def _free(self) -> int:
        return self._capacity - self._nbytes

    def _evictable(self, keep: Collection[int]) -> set[int]:
        return self._present - self._held.keys() - self._pinned - set(keep)

    def _evict(self, expert: int) -> None:
        self._present.remove(expert)
        self._nbytes -= self._sizes[expert]
        self._policy.evicted(expert)
        self.counts.evictions += 1

    def check(self) -> None:
        """Asserts what must hold after every operation."""
        assert not self._present & self._loading
        assert self._nbytes == sum(self._sizes[e] for e in self._present | self._loading)
        assert 0 <= self._nbytes <= self._capacity
        assert self._held.keys() <= self._present
        assert all(count > 0 for count in self._held.values())
