"""Streamed experts of a converted folder on the project's kernels: the planes of a layer lie in one arena, as in the file.

Frames says which bytes belong to whom and is bookkeeping only; ArenaShelf is the Shelf (shelves.py) over it. An expert
need not lie in one piece: the kernels find every plane through a table, so its parts are placed one by one. A 2-bit plane
is a frame. Smaller parts are 1-bit planes, two to a frame, and the scales of a matrix, 4 to 16 to a frame; a frame belongs
to parts of one size as long as it holds any. However experts of different levels come and go, all frames of a size but
one can be filled to the last byte, so what is lost has a bound: see num_frames.

Shapes: P pairs, T tokens, A active experts per token, E experts, D model dim, F expert dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.formats import MatrixShape, array_bytes, num_planes
from mlxmoe.kernels import (
    PREFILL,
    TABLE_FACTOR,
    TABLE_PLANES,
    TABLE_SCALES,
    TABLE_WIDTH,
    Activation,
    ExpertBanks,
    MetalKernels,
    PlaneBank,
    ReferenceKernels,
    Rotation,
    expert_outputs,
    hidden_values,
    phase_of,
    prefill_outputs,
    weighted_outputs,
)
from mlxmoe.plan import LayerPlan
from mlxmoe.reader import Read
from mlxmoe.residency import PLANES
from mlxmoe.rotation import NO_TURNS, LayerTurns
from mlxmoe.shelves import Busy, Group
from mlxmoe.store import ExpertSource

# ---------------------------------------------------------------------------------------------------------------------
# Who has which bytes
# ---------------------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """The place-th slot of a frame whose slots are of the kind-th size."""

    kind: int
    frame: int
    place: int


class Move(NamedTuple):
    """What a slot held is to lie in another one of its size."""

    owner: Any
    source: Slot
    target: Slot


class Frames:
    """Equal frames, each of which is divided, while anything of it is taken, into `divisions[kind]` equal slots."""

    def __init__(self, num_frames: int, divisions: Sequence[int]):
        self._divisions = tuple(divisions)
        self._free = list(range(num_frames - 1, -1, -1))
        self._owners: list[dict[int, dict[int, Hashable]]] = [{} for _ in divisions]  # kind -> frame -> place -> owner
        self._open: list[set[int]] = [set() for _ in divisions]  # kind -> its frames that have a free place

    def take(self, kind: int, owner: Hashable) -> Slot | None:
        """A slot, in the fullest frame that has a free one; None where there is none and no frame is free."""
        owners = self._owners[kind]
        if self._open[kind]:
            frame = max(self._open[kind], key=lambda frame: (len(owners[frame]), -frame))
        elif self._free:
            frame = self._free.pop()
            owners[frame] = {}
            self._open[kind].add(frame)
        else:
            return None
        place = next(p for p in range(self._divisions[kind]) if p not in owners[frame])
        owners[frame][place] = owner
        if len(owners[frame]) == self._divisions[kind]:
            self._open[kind].remove(frame)
        return Slot(kind, frame, place)

    def give(self, slot: Slot) -> None:
        """Takes a slot back, and its frame where that was the last."""
        kind, frame, place = slot
        del self._owners[kind][frame][place]
        self._open[kind].add(frame)
        if not self._owners[kind][frame]:
            self._release(kind, frame)

    def consolidate(self, movable: Callable[[Any], bool]) -> list[Move] | None:
        """Empties one frame into others that are divided the same way, and says what moved. None, and nothing changes,
        where that is not possible, or not without what is not `movable`."""
        for kind, places in enumerate(self._divisions):
            owners, opened = self._owners[kind], self._open[kind]
            if sum(places - len(owners[frame]) for frame in opened) < places:
                continue
            for frame in sorted(opened, key=lambda frame: (len(owners[frame]), frame)):
                if all(map(movable, owners[frame].values())):
                    return self._empty(kind, frame)
        return None

    def _empty(self, kind: int, frame: int) -> list[Move]:
        """The other frames have room for all that is in this one."""
        self._open[kind].remove(frame)
        moves = []
        for place, owner in self._owners[kind][frame].items():
            target = self.take(kind, owner)
            assert target is not None
            moves.append(Move(owner, Slot(kind, frame, place), target))
        self._release(kind, frame)
        return moves

    def _release(self, kind: int, frame: int) -> None:
        del self._owners[kind][frame]
        self._open[kind].discard(frame)
        self._free.append(frame)

    def check(self) -> None:
        """Asserts what must hold after every operation."""
        used = [frame for owners in self._owners for frame in owners]
        assert len(set(used + self._free)) == len(used) + len(self._free)
        for owners, opened, places in zip(self._owners, self._open, self._divisions, strict=True):
            assert opened == {frame for frame, held in owners.items() if len(held) < places}
            assert all(held and held.keys() <= set(range(places)) for held in owners.values())


def num_frames(capacity: int, frame_nbytes: int, divisions: Sequence[int]) -> int:
    """The frames in which anything of `capacity` bytes in all can be placed, with consolidation where necessary.

    Where nothing can be consolidated, a kind has less than a frame of free slots, so at most frame - slot bytes. Where
    moreover a slot of kind k is wanted and there is none, nor a free frame, k has no free slot at all: what is taken is at
    least all frames less frame - slot of every other kind. With more than capacity + slack - frame bytes of frames that is
    more than capacity - slot of k, so the wanted slot was above the capacity.
    """
    return (capacity + slack_nbytes(frame_nbytes, divisions)) // frame_nbytes


def slack_nbytes(frame_nbytes: int, divisions: Sequence[int]) -> int:
    """The most bytes by which num_frames exceeds a capacity: less than a frame for each kind of part below a frame."""
    return sum(frame_nbytes - frame_nbytes // places for places in divisions)


# ---------------------------------------------------------------------------------------------------------------------
# The experts of a layer
# ---------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the parts of a layer's experts are placed: bytes of a frame, and into how many slots of each kind one goes."""

    frame_nbytes: int
    divisions: tuple[int, ...]

    @classmethod
    def of(cls, projections: Sequence[MatrixShape]) -> Layout:
        """Every projection of an expert has as many weights, so their planes have one size."""
        (frame,) = {shape.plane_nbytes(0) for shape in projections}
        sizes = {shape.plane_nbytes(1) for shape in projections} | {shape.scales_nbytes for shape in projections}
        assert all(frame % size == 0 for size in sizes)
        return cls(frame, (1, *sorted(frame // size for size in sizes)))

    def kind(self, nbytes: int) -> int:
        """Of a part of that size."""
        return self.divisions.index(self.frame_nbytes // nbytes)

    def start(self, slot: Slot) -> int:
        """The byte of the arena that a slot begins at."""
        return slot.frame * self.frame_nbytes + slot.place * (self.frame_nbytes // self.divisions[slot.kind])


def arena_slack(layer: LayerPlan) -> int:
    """The most bytes that a layer's arena has beyond its experts' capacity."""
    return slack_nbytes(*Layout.of(layer.projections))


class _Owner(NamedTuple):
    """A part of an expert: which projection's, and which field of it."""

    expert: int
    projection: int
    field: str


_ENTRIES = {"scales": TABLE_SCALES, **{f"plane{j}": entry for j, entry in enumerate(TABLE_PLANES)}}  # of a table's row


class ArenaShelf:
    """The experts of a converted layer at their written levels, for the kernels; reads go from the file into the arena.

    Allocates the arena: num_frames of its capacity, no more than all experts need, and a table per projection (see
    PlaneBank). Products are those of KernelExperts, to the last bit.
    """

    def __init__(
        self,
        source: ExpertSource,
        layer: LayerPlan,
        activation: Activation,
        biases: Sequence[mx.array | None],
        kernels: MetalKernels | ReferenceKernels,
        capacity: int,
        turns: LayerTurns = NO_TURNS,
    ):
        """biases: [E, N] per projection, or None. turns: Hadamard transforms that there are kernels for."""
        self._source, self._layer, self._kernels = source, layer, kernels
        self._turns = turns
        self._activation, self._biases = activation, tuple(biases)
        self._layout = Layout.of(layer.projections)
        self._slots: dict[int, dict[_Owner, Slot]] = {}
        self.sizes = PLANES.experts_nbytes(layer)
        self._tables = [mx.zeros((len(layer.experts), TABLE_WIDTH), mx.int32) for _ in layer.projections]
        mx.eval(self._tables)
        self._rows = [np.frombuffer(array_bytes(t), np.int32).reshape(t.shape) for t in self._tables]
        self._allocate(capacity)

    @property
    def filled(self) -> Collection[int]:
        return self._slots.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of the arena, taken or not."""
        return self._bytes.nbytes

    def reads(self, expert: int, busy: Collection[int] = ()) -> list[Read]:
        (span,) = self._source.spans(self._layer.layer, expert)
        slots = self._slots[expert] = {}
        wanted = {_Owner(expert, p.projection, p.field): p.nbytes for p in span.parts if p.field != "padding"}
        fixed = frozenset(busy)
        for owner, nbytes in wanted.items():
            kind = self._layout.kind(nbytes)
            while (slot := self._frames.take(kind, owner)) is None:
                if not self._consolidate(fixed):
                    self.drop(expert)
                    raise Busy
            slots[owner] = slot
        self._point(expert)
        places = [slots.get(_Owner(expert, part.projection, part.field)) for part in span.parts]
        return [Read(span, [self._memory(slot) if slot is not None else None for slot in places])]

    def drop(self, expert: int) -> None:
        for slot in self._slots.pop(expert).values():
            self._frames.give(slot)

    def resize(self, capacity: int) -> None:
        """Keeps what is filled: for as long as it is copied, both arenas are there."""
        before, kept = self._bytes, self._slots
        self._allocate(capacity)
        self._slots = {}
        for expert, slots in kept.items():
            self._slots[expert] = {}
            for owner, slot in slots.items():
                target = self._frames.take(slot.kind, owner)
                assert target is not None  # nothing has been given back: one frame of a kind is open at most
                self._copy(before, slot, target)
                self._slots[expert][owner] = target
            self._point(expert)

    def outputs(self, x: mx.array, groups: Sequence[Group], num_pairs: int) -> mx.array:
        if phase_of(num_pairs, len(self.sizes)) == PREFILL:
            return self._prefill(x, groups)
        tokens, experts = _pairs(groups)
        return expert_outputs(self._kernels, self.banks, x[mx.array(tokens)], mx.array(experts)[:, None])[:, 0]

    def weighted(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [T, D], experts and router weights [T, A], all of them filled -> the weighted sum of their outputs [T, D]."""
        return weighted_outputs(self._kernels, self.banks, x, experts, weights)

    def first_products(self, x: mx.array, groups: Sequence[Group]) -> mx.array:
        """x [T, D] -> the first half of `weighted` for decoding: the hidden values of each pair [P, F], in the order of the
        groups, whose experts are all filled."""
        tokens, experts = (mx.array(values) for values in _pairs(groups))
        if len(x) == 1:
            return hidden_values(self._kernels, self.banks, x, experts[None])[0]
        return hidden_values(self._kernels, self.banks, x[tokens], experts[:, None])[:, 0]

    def last_products(self, hidden: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """hidden [T, A, F], experts and router weights [T, A], all of them filled -> the other half [T, D]."""
        return self._kernels.expert_down(hidden, experts, weights, self.banks.down)

    def _prefill(self, x: mx.array, groups: Sequence[Group]) -> mx.array:
        """Expert by expert, in ascending order."""
        tokens, experts = _pairs(groups)
        offsets = np.searchsorted(experts, np.arange(len(self.sizes) + 1)).astype(np.int32)
        return prefill_outputs(self._kernels, self.banks, x, mx.array(tokens), mx.array(offsets))

    def _allocate(self, capacity: int) -> None:
        """An empty arena and the banks that lie in it."""
        frame_nbytes, divisions = self._layout
        frames = min(num_frames(capacity, *self._layout), self._frames_of_all())
        self._frames = Frames(frames, divisions)
        words = mx.zeros((frames * frame_nbytes // 4,), mx.uint32)
        mx.eval(words)
        self._bytes = array_bytes(words)
        banks = [
            PlaneBank(shape, words, table, bias)
            for shape, table, bias in zip(self._layer.projections, self._tables, self._biases, strict=True)
        ]
        up = banks[1] if len(banks) == 3 else None
        rotation, input_rotation = Rotation.of_turn(self._turns.hidden), Rotation.of_turn(self._turns.inputs)
        self.banks = ExpertBanks(*(banks[0], up, banks[-1], self._activation, rotation), input_rotation=input_rotation)

    def _frames_of_all(self) -> int:
        """What all experts need."""
        divisions = self._layout.divisions
        taken = [0] * len(divisions)
        for entry in self._layer.experts:
            for shape, level in zip(self._layer.projections, entry.levels, strict=True):
                for nbytes in [*(shape.plane_nbytes(j) for j in range(num_planes(level))), shape.scales_nbytes]:
                    taken[self._layout.kind(nbytes)] += 1
        return sum(-(-count // places) for count, places in zip(taken, divisions, strict=True))

    def _consolidate(self, fixed: Collection[int]) -> bool:
        """Frees a frame; False where parts of `fixed` experts are in the way."""
        moves = self._frames.consolidate(lambda owner: owner.expert not in fixed)
        for owner, source, target in moves or ():
            self._copy(self._bytes, source, target)
            self._slots[owner.expert][owner] = target
            self._point(owner.expert)
        return moves is not None

    def _point(self, expert: int) -> None:
        """Writes the expert's rows of the tables: where its parts lie, each at the level that was written."""
        for rows, level in zip(self._rows, self._layer.experts[expert].levels, strict=True):
            rows[expert, 0] = level
            rows[expert].view(np.float32)[TABLE_FACTOR] = 1.0
        for owner, slot in self._slots[expert].items():
            self._rows[owner.projection][expert, _ENTRIES[owner.field]] = self._layout.start(slot) // 4

    def _memory(self, slot: Slot) -> memoryview:
        start = self._layout.start(slot)
        return self._bytes[start : start + self._layout.frame_nbytes // self._layout.divisions[slot.kind]]

    def _copy(self, arena: memoryview, source: Slot, target: Slot) -> None:
        start, view = self._layout.start(source), self._memory(target)
        view[:] = arena[start : start + view.nbytes]


def _pairs(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Token and expert of each pair [P], uint32, in the order of the groups."""
    tokens = np.concatenate([group.tokens for group in groups]).astype(np.uint32)
    return tokens, np.concatenate([np.full(len(group.pairs), group.expert, np.uint32) for group in groups])
