"""The bookkeeping of streaming against a plain model of it, over random histories."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlxmoe.cache import LayerCache
from mlxmoe.policies import POLICIES, Lru

ONLINE = sorted(set(POLICIES) - {"belady"})
NUM_EXPERTS = 8


class Histories(RuleBasedStateMachine):
    """Whatever is asked in whatever order: what is resident is what the answers said, and never more than fits."""

    @initialize(
        policy=st.sampled_from(ONLINE),
        sizes=st.lists(st.integers(1, 9), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
        room=st.integers(0, 40),
        pinned=st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=2),
    )
    def start(self, policy: str, sizes: list[int], room: int, pinned: set[int]) -> None:
        self.sizes, self.pinned = sizes, pinned
        self.capacity = max(sizes) + room
        self.cache = LayerCache(sizes, self.capacity, POLICIES[policy](NUM_EXPERTS, 4), pinned)
        self.present: set[int] = set()
        self.loading: set[int] = set()
        self.held: list[list[int]] = []
        self.hits = self.misses = 0

    @rule(experts=st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=4, unique=True))
    def routed(self, experts: list[int]) -> None:
        self.cache.routed(experts)
        self.hits += len(self.present & set(experts))
        self.misses += len(set(experts) - self.present)

    @rule(data=st.data(), keep=st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=3))
    def admit(self, data: st.DataObject, keep: set[int]) -> None:
        absent = sorted(set(range(NUM_EXPERTS)) - self.present - self.loading)
        if not absent:
            return
        expert = data.draw(st.sampled_from(absent))
        evictable = self.present - self.pinned - keep - {e for held in self.held for e in held}
        free = self.capacity - sum(self.sizes[e] for e in self.present | self.loading)
        evicted = self.cache.admit(expert, keep)
        if evicted is None:
            assert free + sum(self.sizes[e] for e in evictable) < self.sizes[expert]
            return
        assert set(evicted) <= evictable
        assert len(set(evicted)) == len(evicted)
        # No one left for nothing: without the last victim there would not have been room
        if evicted:
            assert free + sum(self.sizes[e] for e in evicted[:-1]) < self.sizes[expert]
        self.present -= set(evicted)
        self.loading.add(expert)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), arrives=st.booleans())
    def finish(self, data: st.DataObject, arrives: bool) -> None:
        expert = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(expert)
        if arrives:
            self.present.add(expert)
            self.cache.arrived(expert)
        else:
            self.cache.abandon(expert)

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        experts = data.draw(st.lists(st.sampled_from(sorted(self.present)), min_size=1, max_size=3, unique=True))
        self.held.append(experts)
        self.cache.hold(experts)

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.cache.release(self.held.pop())

    @precondition(lambda self: not self.held and not self.loading)
    @rule(room=st.integers(0, 40))
    def resize(self, room: int) -> None:
        self.capacity = max(self.sizes) + room
        evicted = self.cache.resize(self.capacity)
        self.present -= set(evicted)
        if evicted and set(evicted) & self.pinned:
            assert self.present <= self.pinned

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            assert self.cache.present == self.present
            assert self.cache.loading == self.loading
            assert self.cache.nbytes == sum(self.sizes[e] for e in self.present | self.loading)
            assert (self.cache.counts.hits, self.cache.counts.misses) == (self.hits, self.misses)


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_histories = Histories.TestCase


def test_the_policy_chooses_who_leaves() -> None:
    """Worked by hand: three equal slots, least recently used."""
    cache = LayerCache([10] * 5, 30, Lru(5, 3))
    for expert in (0, 1, 2):
        assert cache.admit(expert) == []
        cache.arrived(expert)
    cache.routed([0])
    cache.routed([2])
    assert cache.admit(3) == [1]
    cache.arrived(3)
    assert cache.admit(4, keep=[0]) == [2]
    assert cache.counts.evictions == 2


def test_a_large_expert_takes_the_room_of_several() -> None:
    cache = LayerCache([10, 10, 10, 25], 30, Lru(4, 3))
    for expert in (0, 1, 2):
        cache.admit(expert)
        cache.arrived(expert)
    assert cache.admit(3) == [0, 1, 2]
    assert cache.nbytes == 25


def test_what_a_graph_reads_stays() -> None:
    cache = LayerCache([10] * 3, 20, Lru(3, 2))
    for expert in (0, 1):
        cache.admit(expert)
        cache.arrived(expert)
    cache.hold([0, 1])
    cache.hold([0])
    assert cache.admit(2) is None
    cache.release([0, 1])
    assert cache.admit(2) == [1]  # 0 is held once more


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: setattr(cache, "_nbytes", 5),
        lambda cache: cache._present.add(7),
        lambda cache: cache._held.update([6]),
        lambda cache: cache._loading.add(0),
        lambda cache: setattr(cache, "_capacity", 5),
    ],
)
def test_check_finds_what_is_wrong(damage: object) -> None:
    cache = LayerCache([10] * 8, 80, Lru(8, 8))
    cache.admit(0)
    cache.arrived(0)
    cache.check()
    damage(cache)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        cache.check()
