"""Cache policies against plain restatements of their definitions, and the file that says which one a model is run with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.errors import UserError
from mlxmoe.policies import (
    OFFLINE,
    POLICIES,
    CacheChoice,
    LayerChoice,
    Lfu,
    Lru,
    Policy,
    S3Fifo,
    check_parameters,
    load_choice,
    save_choice,
)
from mlxmoe.replay import replay_layer

E = 8  # experts


@st.composite
def traffic(draw: st.DrawFn, active: int | None = None) -> tuple[np.ndarray, int]:
    """Choices [T, A] of up to 40 steps, and slots for them."""
    active = draw(st.integers(1, 3)) if active is None else active
    step = st.lists(st.integers(0, E - 1), min_size=active, max_size=active, unique=True)
    steps = draw(st.lists(step, min_size=1, max_size=40))
    return np.array(steps), draw(st.integers(active, E))


def parameters(name: str, experts: np.ndarray) -> dict[str, Any]:
    """What a policy cannot do without, or what shows more of it in few slots."""
    own: dict[str, dict[str, Any]] = {
        "belady": {"future": experts.tolist()},
        "static": {"frequencies": [3, 1, 4, 1, 5, 9, 2, 6]},
        "lfru": {"privileged": 0.5},
    }
    return own.get(name, {})


class Witness:
    """Passes everything on to `policy`, keeps the history, and compares each victim with what the history asks for."""

    def __init__(self, policy: Policy, check: Callable[[Witness, Collection[int], int], None]) -> None:
        self.policy, self.check = policy, check
        self.steps: list[list[int]] = []
        self.admissions: list[tuple[int, int]] = []  # (steps so far, expert)
        self.resident: set[int] = set()
        self.victims = 0

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        self.steps.append(list(experts))
        self.policy.routed(experts, scores)

    def admitted(self, expert: int) -> None:
        self.admissions.append((len(self.steps), expert))
        self.resident.add(expert)
        self.policy.admitted(expert)

    def evicted(self, expert: int) -> None:
        self.resident.remove(expert)
        self.policy.evicted(expert)

    def victim(self, candidates: Collection[int]) -> int:
        found = self.policy.victim(candidates)
        assert found in candidates
        self.check(self, candidates, found)
        self.victims += 1
        return found

    # -- what definitions are written in -----------------------------------------------------------------------------------

    def last_use(self, expert: int) -> int:
        """The number of the step in which it was last chosen or admitted, from 1."""
        used = [n for n, step in enumerate(self.steps, 1) if expert in step]
        return max([*used, *(n for n, e in self.admissions if e == expert)])

    def uses(self, expert: int, decay: float) -> float:
        return math.fsum(decay ** (len(self.steps) - n) for n, step in enumerate(self.steps, 1) if expert in step)

    def last_load(self, expert: int) -> int:
        return max(i for i, (_, e) in enumerate(self.admissions) if e == expert)


def least(candidates: Collection[int], value: Callable[[int], Any]) -> int:
    return min(candidates, key=lambda e: (value(e), e))


def lru(history: Witness, candidates: Collection[int], found: int) -> None:
    assert found == least(candidates, history.last_use)


def lfu(history: Witness, candidates: Collection[int], found: int) -> None:
    # sums of the same powers in another order: equal up to rounding
    best = min(history.uses(e, 0.98) for e in candidates)
    assert history.uses(found, 0.98) == pytest.approx(best, rel=1e-12)


def lfru(history: Witness, candidates: Collection[int], found: int, capacity: int) -> None:
    newest = sorted(history.resident, key=lambda e: (-history.last_use(e), e))[: capacity // 2]
    others = set(candidates) - set(newest)
    if others:
        lfu(history, others, found)
    else:
        lru(history, candidates, found)


def least_stale(history: Witness, candidates: Collection[int], found: int) -> None:
    fresh = {e for step in history.steps[-2:] for e in step}
    assert found == min(candidates, key=lambda e: (e in fresh, history.last_load(e)))


def static(history: Witness, candidates: Collection[int], found: int) -> None:
    assert found == least(candidates, lambda e: (3, 1, 4, 1, 5, 9, 2, 6)[e])


def belady(history: Witness, candidates: Collection[int], found: int, future: np.ndarray) -> None:
    ahead = [set(step) for step in future.tolist()[len(history.steps) :]]
    next_use = {e: next((n for n, step in enumerate(ahead) if e in step), math.inf) for e in candidates}
    assert found == least(candidates, lambda e: -next_use[e])


@pytest.mark.parametrize("name", ["lru", "lfu", "lfru", "least-stale", "static", "belady"])
@settings(deadline=None)
@given(case=traffic())
def test_victim_is_what_the_definition_says(name: str, case: tuple[np.ndarray, int]) -> None:
    experts, slots = case
    checks: dict[str, Callable[[Witness, Collection[int], int], None]] = {
        "lru": lru,
        "lfu": lfu,
        "lfru": lambda h, c, f: lfru(h, c, f, slots),
        "least-stale": least_stale,
        "static": static,
        "belady": lambda h, c, f: belady(h, c, f, experts),
    }
    replay_layer(experts, Witness(POLICIES[name](E, slots, **parameters(name, experts)), checks[name]), slots)


class PaperS3Fifo:
    """Algorithm 1 of the S3-FIFO paper, evicting as it looks. What may not leave is passed over and keeps its place."""

    def __init__(self, capacity: int) -> None:
        self.small_slots = max(1, capacity // 10)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.ghost_slots = max(1, capacity - self.small_slots)
        self.freq: dict[int, int] = {}

    def hit(self, expert: int) -> None:
        self.freq[expert] = min(3, self.freq[expert] + 1)

    def insert(self, expert: int) -> None:
        (self.main if expert in self.ghost else self.small).append(expert)
        self.ghost = [e for e in self.ghost if e != expert]
        self.freq[expert] = 0

    def evict(self, candidates: Collection[int]) -> int:
        turn = self.evict_small if len(self.small) >= self.small_slots or not self.main else self.evict_main
        while True:
            found = turn(candidates)
            if found is not None:
                del self.freq[found]
                return found
            turn = self.evict_main if turn == self.evict_small else self.evict_small

    def evict_small(self, candidates: Collection[int]) -> int | None:
        for expert in list(self.small):
            if self.freq[expert] > 1:
                self.small.remove(expert)
                self.main.append(expert)
                self.freq[expert] = 0
            elif expert in candidates:
                self.small.remove(expert)
                self.ghost = [*self.ghost, expert][-self.ghost_slots :]
                return expert
        return None

    def evict_main(self, candidates: Collection[int]) -> int | None:
        for expert in list(self.main):
            if self.freq[expert] > 0:
                self.main.remove(expert)
                self.main.append(expert)
                self.freq[expert] -= 1
            elif expert in candidates:
                self.main.remove(expert)
                return expert
        return None


@settings(deadline=None)
@given(case=traffic())
def test_s3_fifo_evicts_as_the_paper_does(case: tuple[np.ndarray, int]) -> None:
    experts, slots = case
    policy, paper = S3Fifo(E, slots), PaperS3Fifo(slots)
    resident: set[int] = set()
    for own in experts.tolist():
        policy.routed(own)
        missing = [e for e in own if e not in resident]
        for expert in resident.intersection(own):
            paper.hit(expert)
        for expert in missing:
            if len(resident) == slots:
                candidates = resident.difference(own)
                victim = policy.victim(candidates)
                assert victim == paper.evict(candidates)
                policy.evicted(victim)
                resident.remove(victim)
            policy.admitted(expert)
            paper.insert(expert)
            resident.add(expert)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(case=traffic(), data=st.data())
def test_asking_changes_nothing(name: str, case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    """A policy that is asked for victims of any candidates, in any order, decides as one that is not."""
    experts, slots = case

    class Asked(Witness):
        def victim(self, candidates: Collection[int]) -> int:
            chosen = data.draw(st.sets(st.sampled_from(sorted(candidates)), min_size=1))
            assert self.policy.victim(chosen) in chosen
            first = self.policy.victim(sorted(candidates, reverse=True))
            assert first == self.policy.victim(candidates)
            return first

    asked = Asked(POLICIES[name](E, slots, **parameters(name, experts)), lambda *_: None)
    plain = POLICIES[name](E, slots, **parameters(name, experts))
    assert replay_layer(experts, asked, slots).tolist() == replay_layer(experts, plain, slots).tolist()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_history_is_allowed(name: str, data: st.DataObject) -> None:
    """Experts that are loaded unasked, evicted for other reasons, routed and never admitted."""
    policy = POLICIES[name](E, 4)
    resident: set[int] = set()
    for _ in range(data.draw(st.integers(1, 30))):
        what = data.draw(st.sampled_from(["routed", "admitted", "evicted", "victim"]))
        if what == "routed":
            policy.routed(data.draw(st.lists(st.integers(0, E - 1), max_size=3, unique=True)), None)
        elif what == "admitted" and len(resident) < E:
            expert = data.draw(st.sampled_from(sorted(set(range(E)) - resident)))
            resident.add(expert)
            policy.admitted(expert)
        elif what == "evicted" and resident:
            expert = data.draw(st.sampled_from(sorted(resident)))
            resident.remove(expert)
            policy.evicted(expert)
        elif what == "victim" and resident:
            candidates = data.draw(st.sets(st.sampled_from(sorted(resident)), min_size=1))
            assert policy.victim(candidates) in candidates


@settings(deadline=None)
@given(case=traffic(active=1))
def test_strong_decay_is_recency(case: tuple[np.ndarray, int]) -> None:
    """With one expert a step, so that no two are equally old (Lee et al. 2001, property 2)."""
    experts, slots = case
    frequent, recent = Lfu(E, slots, decay=0.4), Lru(E, slots)
    assert replay_layer(experts, frequent, slots).tolist() == replay_layer(experts, recent, slots).tolist()


def test_frequencies_outlast_the_range_of_doubles() -> None:
    """0.9^-20000 is beyond any double; the order of two experts is what it would be without the growing weight."""
    policy = Lfu(3, 2, decay=0.9)
    for step in range(20_000):
        policy.routed([step % 3 == 0, 2])
    values = [0.0, 0.0, 0.0]
    for step in range(20_000):
        values = [0.9 * v + (e in (step % 3 == 0, 2)) for e, v in enumerate(values)]
    assert [policy.victim(pair) for pair in ([0, 1], [1, 2], [0, 2])] == [
        min(pair, key=values.__getitem__) for pair in ([0, 1], [1, 2], [0, 2])
    ]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True), min_size=1, max_size=8),
    slots=st.integers(2, 4),
)
def test_no_order_of_evictions_beats_belady(steps: list[list[int]], slots: int) -> None:
    """Against an exhaustive search over all evictions by the rules of the replay."""

    def most_hits(step: int, resident: frozenset[int]) -> int:
        if step == len(steps):
            return 0
        own = frozenset(steps[step])
        missing = own - resident
        room = max(0, len(resident) + len(missing) - slots)
        after = [resident]
        for _ in range(room):
            after = list({kept - {victim} for kept in after for victim in kept - own})
        return len(own & resident) + max(most_hits(step + 1, kept | own) for kept in after)

    experts = np.array(steps)
    assert replay_layer(experts, POLICIES["belady"](5, slots, steps), slots).sum() == most_hits(0, frozenset())


# -- parameters and the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given_parameters", "words"),
    [
        ("mru", {}, "no cache policy 'mru'"),
        ("lfu", {"decay": 0.0}, "a decay of 0.0"),
        ("lfu", {"decay": 1.5}, "a decay of 1.5"),
        ("lfu", {"speed": 1}, "unexpected keyword argument 'speed'"),
        ("lfru", {"privileged": 2}, "a privileged share of 2"),
        ("s3-fifo", {"small": -1}, "a small queue of -1"),
        ("static", {"frequencies": [1, 2]}, "2 frequencies for 8 experts"),
    ],
)
def test_bad_parameters(name: str, given_parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_parameters(name, given_parameters, E)


def choice(policy: str = "lfu", **common: float) -> CacheChoice:
    own: dict[str, Any] = {"frequencies": list(range(E))} if policy == "static" else {}
    layers = (LayerChoice(1, 3, own), LayerChoice(4, 5, own))
    return CacheChoice(policy, common, layers, E, "ab" * 32, {"residency": 0.5})


@pytest.mark.parametrize(
    "saved", [choice(decay=0.9), choice("static"), choice("lru"), choice("s3-fifo", small=0.25)], ids=lambda c: c.policy
)
def test_choice_comes_back(saved: CacheChoice, tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    save_choice(saved, path)
    assert load_choice(path) == saved
    policy = load_choice(path).make(4)
    assert type(policy) is POLICIES[saved.policy]
    policy.routed([1, 2])
    for expert in (1, 2):
        policy.admitted(expert)
    assert policy.victim([1, 2]) in (1, 2)


def test_choice_makes_policies_with_its_parameters() -> None:
    """decay 0.4 forgets: expert 0 was used often, expert 1 last."""
    forgetful, steady = choice(decay=0.4).make(1), choice(decay=1.0).make(1)
    for policy in (forgetful, steady):
        for expert in (0, 0, 0, 1):
            policy.routed([expert])
    assert (forgetful.victim([0, 1]), steady.victim([0, 1])) == (0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "is not a cache choice"),
        ({"version": 2}, "has version 2, this mlxmoe reads up to 1"),
        ({"version": None}, "has version None"),
        ({"policy": "mru"}, "no cache policy 'mru'"),
        ({"policy": "belady"}, "belady needs the future"),
        ({"policy": ["lru"]}, "is damaged"),
        ({"parameters": {"decay": 2}}, "a decay of 2"),
        ({"parameters": {"speed": 2}}, "unexpected keyword argument 'speed'"),
        ({"parameters": None}, "is damaged"),
        ({"num_experts": 4}, "layer 4 has 5 slots for 4 experts"),
        ({"num_experts": "8"}, "is damaged"),
        ({"layers": []}, "names no layer"),
        ({"layers": [{"layer": 1, "slots": 3, "parameters": {}}] * 2}, "names layer 1 twice"),
        ({"layers": [{"layer": 1, "parameters": {}}]}, "it lacks 'slots'"),
        ({"layers": [{"layer": 1, "slots": 0, "parameters": {}}]}, "layer 1 has 0 slots"),
        ({"layers": [{"layer": 1, "slots": 2.5, "parameters": {}}]}, "is damaged"),
        ({"note": None}, "is damaged"),
    ],
)
def test_choice_that_cannot_be_used(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    save_choice(choice(decay=0.9), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        load_choice(path)


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "is not a cache")])
def test_file_that_is_no_choice(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=words):
        load_choice(tmp_path / "c.json")


def test_offline_policies_are_policies() -> None:
    assert set(OFFLINE) < set(POLICIES)
