"""Which resident expert has to make room: eviction policies, and the small file that says which one a model is run with.

One policy object per layer. The runtime's cache and the replay of a trace (replay.py) call the same objects, so a hit rate
that was replayed is the one that the runtime has. A policy decides and stores nothing: it never learns what an expert is.
docs/caching.md has the equations, the sources and what each was measured to give.

Shapes: E experts of the layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlxmoe.errors import UserError
from mlxmoe.files import write_atomically

CHOICE_FORMAT = "mlxmoe-cache-choice"
CHOICE_VERSION = 1


class Policy(Protocol):
    """What is told of one layer's traffic, and asked when a slot is needed. Experts are indices in the layer.

    A step calls routed(), then per miss victim() and evicted() where the slots are full, and admitted(). An expert may be
    admitted without having been routed (at load, by a prefetch) and evicted without having been a victim.
    """

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """The experts that one step has chosen. `scores` [E]: what the router ranked them by, where it is known."""

    def admitted(self, expert: int) -> None:
        """`expert` is resident from now on."""

    def evicted(self, expert: int) -> None:
        """`expert` is no longer resident."""

    def victim(self, candidates: Collection[int]) -> int:
        """The one of these resident experts that is worth least. Changes nothing; the same again for the same history.
        Candidates are never empty, and never hold an expert of the step or a pinned one."""


class Lru:
    """Least recently used. An expert that was admitted unasked counts as used then."""

    def __init__(self, num_experts: int, capacity: int) -> None:
        self._step = 0
        self._last = [0] * num_experts

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        self._step += 1
        for expert in experts:
            self._last[expert] = self._step

    def admitted(self, expert: int) -> None:
        self._last[expert] = self._step

    def evicted(self, expert: int) -> None:
        pass

    def victim(self, candidates: Collection[int]) -> int:
        return _least(candidates, self._last)

    def newest(self, experts: Collection[int], count: int) -> set[int]:
        """The `count` most recently used of some experts."""
        return set(sorted(experts, key=lambda e: (-self._last[e], e))[:count])


class Lfu:
    """Least frequently used, old uses counting less: value = sum over uses of decay^(steps since).

    The combined recency and frequency of LRFU (Lee et al., IEEE Trans. Computers 50(12), 2001, section 2.2) with
    F(x) = decay^x: decay 1 never forgets, decay 1/2 or less is LRU. What was learnt of an expert outlives its eviction.
    """

    def __init__(self, num_experts: int, capacity: int, decay: float = 0.98) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"a decay of {decay} is not above 0 and at most 1")
        self._growth = 1 / decay
        self._weight = 1.0  # of a use now; instead of all values shrinking, this grows
        self._values = [0.0] * num_experts

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        self._weight *= self._growth
        if self._weight > _LARGEST:
            self._values = [value / self._weight for value in self._values]
            self._weight = 1.0
        for expert in experts:
            self._values[expert] += self._weight

    def admitted(self, expert: int) -> None:
        pass

    def evicted(self, expert: int) -> None:
        pass

    def victim(self, candidates: Collection[int]) -> int:
        return _least(candidates, self._values)


class Lfru:
    """Least frequent, recently used: the `privileged` share of the slots goes to the most recently used experts, and of
    the others the least frequently used leaves (Bilal and Kang, IEEE Access 5, 2017, section IV).

    Their frequency is counted over a window; here it decays, as in Lfu.
    """

    def __init__(self, num_experts: int, capacity: int, privileged: float = 0.25, decay: float = 0.98) -> None:
        if not 0 <= privileged <= 1:
            raise ValueError(f"a privileged share of {privileged} is not within 0 and 1")
        self._privileged = math.floor(privileged * capacity)
        self._recency = Lru(num_experts, capacity)
        self._frequency = Lfu(num_experts, capacity, decay)
        self._resident: set[int] = set()

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        self._recency.routed(experts)
        self._frequency.routed(experts)

    def admitted(self, expert: int) -> None:
        self._resident.add(expert)
        self._recency.admitted(expert)

    def evicted(self, expert: int) -> None:
        self._resident.remove(expert)

    def victim(self, candidates: Collection[int]) -> int:
        others = set(candidates) - self._recency.newest(self._resident, self._privileged)
        return self._frequency.victim(others) if others else self._recency.victim(candidates)


class S3Fifo:
    """Three queues: new experts in a small one of `small` of the slots, those used again in a main one, and the names of
    those that left the small one (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1).
    """

    def __init__(self, num_experts: int, capacity: int, small: float = 0.1) -> None:
        if not 0 <= small <= 1:
            raise ValueError(f"a small queue of {small} of the slots is not within 0 and 1")
        self._small_slots = max(1, math.floor(small * capacity))
        self._ghosts_kept = max(1, capacity - self._small_slots)
        self._small: list[int] = []  # oldest first, as the others
        self._main: list[int] = []
        self._ghosts: list[int] = []
        self._uses: dict[int, int] = {}  # of the resident ones, since they were admitted or last passed over; at most 3

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        for expert in experts:
            if expert in self._uses:
                self._uses[expert] = min(self._uses[expert] + 1, 3)

    def admitted(self, expert: int) -> None:
        self._uses[expert] = 0
        if expert in self._ghosts:
            self._ghosts.remove(expert)
            self._main.append(expert)
        else:
            self._small.append(expert)

    def evicted(self, expert: int) -> None:
        self._walk(self._small, self._main, self._uses, {expert})
        if expert in self._small:
            self._small.remove(expert)
            self._ghosts = [*self._ghosts, expert][-self._ghosts_kept :]
        else:
            self._main.remove(expert)
        del self._uses[expert]

    def victim(self, candidates: Collection[int]) -> int:
        assert self._uses.keys() >= set(candidates), "only what is resident can leave"
        return self._walk(list(self._small), list(self._main), dict(self._uses), candidates)

    def _walk(self, small: list[int], main: list[int], uses: dict[int, int], stop: Collection[int]) -> int:
        """Passes over the queues, promoting and reinserting what was used, up to the first unused expert in `stop`, which
        it returns. evicted() so repeats, with the victim alone in `stop`, exactly the moves that led victim() to it."""
        first, second = (small, main) if len(small) >= self._small_slots or not main else (main, small)
        for queue in cycle((first, second)):
            for expert in tuple(queue):
                if uses[expert] > (1 if queue is small else 0):
                    uses[expert] = 0 if queue is small else uses[expert] - 1
                    queue.remove(expert)
                    main.append(expert)
                elif expert in stop:
                    return expert
        raise AssertionError("there is no end to a cycle")


class LeastStale:
    """What was not chosen in the last step or the one before is stale, and leaves first, in the order of loading; then
    the others in that order.

    After Least-Stale of SpecMD (Hoang et al., arXiv:2602.03921), as far as its abstract tells. There all layers share one
    cache, and what it avoids is that a layer evicts what the next one needs: slots per layer rule that out in any case.
    """

    def __init__(self, num_experts: int, capacity: int) -> None:
        self._loads = 0
        self._loaded = [0] * num_experts
        self._latest: frozenset[int] = frozenset()
        self._fresh: frozenset[int] = frozenset()

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        before, self._latest = self._latest, frozenset(experts)
        self._fresh = before | self._latest

    def admitted(self, expert: int) -> None:
        self._loads += 1
        self._loaded[expert] = self._loads

    def evicted(self, expert: int) -> None:
        pass

    def victim(self, candidates: Collection[int]) -> int:
        return _least(set(candidates) - self._fresh or candidates, self._loaded)


class Static:
    """The same experts always: the least frequent by a table [E] that was counted before (a trace, the plan) leaves."""

    def __init__(self, num_experts: int, capacity: int, frequencies: Sequence[float] | None = None) -> None:
        self._frequencies = [0.0] * num_experts if frequencies is None else list(frequencies)
        if len(self._frequencies) != num_experts:
            raise ValueError(f"{len(self._frequencies)} frequencies for {num_experts} experts")

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        pass

    def admitted(self, expert: int) -> None:
        pass

    def evicted(self, expert: int) -> None:
        pass

    def victim(self, candidates: Collection[int]) -> int:
        return _least(candidates, self._frequencies)


class Belady:
    """The expert whose next use lies farthest ahead: the bound, since it needs `future`, the choices of all steps
    (Belady, IBM Systems Journal 5(2), 1966; optimal: Mattson et al., IBM Systems Journal 9(2), 1970)."""

    def __init__(self, num_experts: int, capacity: int, future: Sequence[Sequence[int]] = ()) -> None:
        uses: list[list[int]] = [[] for _ in range(num_experts)]
        for step, experts in enumerate(future):
            for expert in experts:
                uses[expert].append(step)
        self._uses = [iter(steps) for steps in uses]
        self._sooner = [-next(steps, math.inf) for steps in self._uses]  # minus the step of the next use

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        for expert in experts:
            self._sooner[expert] = -next(self._uses[expert], math.inf)

    def admitted(self, expert: int) -> None:
        pass

    def evicted(self, expert: int) -> None:
        pass

    def victim(self, candidates: Collection[int]) -> int:
        return _least(candidates, self._sooner)


_LARGEST = 1e200  # a weight beyond which doubles would come near their end


def _least(candidates: Collection[int], values: Sequence[float]) -> int:
    """The candidate of the least value, of equals the lowest."""
    return min(sorted(candidates), key=values.__getitem__)


# factory(num_experts, capacity, **parameters); parameters are plain JSON values, and all have a default
POLICIES: dict[str, Callable[..., Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "lfru": Lfru,
    "s3-fifo": S3Fifo,
    "least-stale": LeastStale,
    "static": Static,
    "belady": Belady,
}
OFFLINE = ("belady",)  # of no use to a run, which does not know its future


# ---------------------------------------------------------------------------------------------------------------------
# What a model is run with
# ---------------------------------------------------------------------------------------------------------------------


class LayerChoice(NamedTuple):
    """Slots (experts resident at a time) of one layer, and what its policy takes beside the common parameters."""

    layer: int  # as the model counts
    slots: int
    parameters: dict[str, Any] = {}  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class CacheChoice:
    """A policy, its parameters and the slots per layer, as `mlxmoe explain --save` writes them. `model`: SHA-256 of the
    config.json that it was made for."""

    policy: str
    parameters: dict[str, Any]
    layers: tuple[LayerChoice, ...]
    num_experts: int
    model: str = ""
    note: dict[str, Any] = field(default_factory=dict)  # how it was measured; for people

    def make(self, layer: int, capacity: int | None = None) -> Policy:
        """A fresh policy object for a layer, for its slots or for `capacity`. KeyError for a layer without experts."""
        found = {choice.layer: choice for choice in self.layers}[layer]
        slots = found.slots if capacity is None else capacity
        return POLICIES[self.policy](self.num_experts, slots, **self.parameters, **found.parameters)


def save_choice(choice: CacheChoice, path: Path) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    layers = [{"layer": c.layer, "slots": c.slots, "parameters": c.parameters} for c in choice.layers]
    write_atomically(
        path,
        json.dumps(
            {
                "format": CHOICE_FORMAT,
                "version": CHOICE_VERSION,
                "policy": choice.policy,
                "parameters": choice.parameters,
                "num_experts": choice.num_experts,
                "model": choice.model,
                "note": choice.note,
                "layers": layers,
            },
            indent=1,
        )
        + "\n",
    )


def load_choice(path: Path) -> CacheChoice:
    """Reads and checks what save_choice wrote. Raises UserError for anything else."""
    hint = "write it again with mlxmoe explain --save"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the cache choice {path} cannot be read: {error.strerror}", hint) from None
    except ValueError as error:
        raise UserError(f"the cache choice {path} is not JSON: {error}", hint) from None
    if not isinstance(content, dict) or content.get("format") != CHOICE_FORMAT:
        raise UserError(f"{path} is not a cache choice", hint)
    version = content.get("version")
    if not isinstance(version, int) or version > CHOICE_VERSION:
        raise UserError(f"{path} has version {version}, this mlxmoe reads up to {CHOICE_VERSION}", "upgrade mlxmoe")
    try:
        layers = tuple(LayerChoice(c["layer"], c["slots"], dict(c["parameters"])) for c in content["layers"])
        choice = CacheChoice(
            policy=content["policy"],
            parameters=dict(content["parameters"]),
            layers=layers,
            num_experts=content["num_experts"],
            model=content["model"],
            note=dict(content["note"]),
        )
        _check_choice(choice)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is damaged: {reason}", hint) from error
    return choice


def _check_choice(choice: CacheChoice) -> None:
    """Raises ValueError or TypeError with the reason for a choice that nothing can be run with."""
    if choice.policy in OFFLINE:
        raise ValueError(f"{choice.policy} needs the future")
    if not choice.layers:
        raise ValueError("it names no layer")
    seen: set[int] = set()
    for layer, slots, own in choice.layers:
        if layer in seen:
            raise ValueError(f"it names layer {layer} twice")
        seen.add(layer)
        if type(slots) is not int or not 1 <= slots <= choice.num_experts:
            raise ValueError(f"layer {layer} has {slots} slots for {choice.num_experts} experts")
        check_parameters(choice.policy, {**choice.parameters, **own}, choice.num_experts)


def check_parameters(name: str, parameters: Mapping[str, Any], num_experts: int) -> None:
    """Raises UserError for a policy that is not there, or parameters that it does not take."""
    if name not in POLICIES:
        raise UserError(f"there is no cache policy {name!r}", f"one of {', '.join(POLICIES)}")
    try:
        POLICIES[name](num_experts, 1, **parameters)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the cache policy {name} cannot be made: {error}", "docs/caching.md has its parameters"
        ) from None
