"""Where the experts of a streamed layer lie in memory, and their products: one Shelf per layer.

A shelf stores and computes, it decides nothing: cache.py says who comes and who goes. Reader threads fill it through the
reads it hands out; everything else is called by one thread.

    MergedShelf   a converted folder on MLX's built-in products: every present expert in arrays of its own
    SlotShelf     a stock or repacked MLX checkpoint: equal slots, filled with the bytes of the file

Shapes: P pairs, T tokens, D model dim, N rows and K columns of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlxmoe.banks import MergedBank
from mlxmoe.copies import ONE_COPY, Copies, combined
from mlxmoe.experts import ExpertLayer, add_halves
from mlxmoe.formats import ABSENT, FIELD_BITS, array_bytes, field_width, num_planes, read_floats, write_floats
from mlxmoe.plan import LayerPlan
from mlxmoe.reader import Read
from mlxmoe.residency import merged_storage
from mlxmoe.rotation import turned
from mlxmoe.stacked import ARRAY_DTYPES, StockSource
from mlxmoe.store import ExpertSource, Span


class Group(NamedTuple):
    """The pairs of one expert in a call: their places among all pairs, and the token of each."""

    expert: int
    pairs: np.ndarray
    tokens: np.ndarray


class Busy(Exception):
    """What is being read or filled would have to be moved: ask again when it is not."""


class Shelf(Protocol):
    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of memory that each expert takes."""
        ...

    @property
    def filled(self) -> Collection[int]:
        """The experts that memory was taken for."""
        ...

    def reads(self, expert: int, busy: Collection[int] = ()) -> list[Read]:
        """Takes memory for an absent expert and says what fills it. Whoever calls has made room. Other experts may be
        moved for it, but for the `busy` ones, which a graph reads or a read fills: raises Busy where one would have to,
        and has done nothing."""
        ...

    def drop(self, expert: int) -> None:
        """Gives its memory up, filled or not. No graph may be about to read it, and no read to fill it."""
        ...

    def resize(self, capacity: int) -> None:
        """The experts' new ceiling in bytes: gives back what is above it. No graph may be about to read anything."""
        ...

    def outputs(self, x: mx.array, groups: Sequence[Group], num_pairs: int) -> mx.array:
        """x [T, D] -> the output of each pair [P, D], in the order of the groups, whose experts are all filled.
        `num_pairs`: of the whole call, of which these may be a part."""
        ...


class MergedShelf:
    """The experts of a converted layer at their written levels, merged for MLX's built-in products (see MergedBank).

    Memory of an expert that leaves serves the next one of the same levels.
    """

    def __init__(
        self,
        source: ExpertSource,
        layer: LayerPlan,
        activation: Callable[..., mx.array],
        biases: Sequence[mx.array | None],
        dtype: mx.Dtype,
        copies: Copies = ONE_COPY,
    ):
        """biases: [E, N] per projection, or None. copies: as ExpertLayer has them."""
        self._copies = copies
        self._source, self._layer, self._activation, self._dtype = source, layer, activation, dtype
        self._biases = tuple(biases)
        self._filled: dict[int, list[MergedBank]] = {}
        self._spare: dict[tuple[int, ...], list[list[MergedBank]]] = {}
        self.sizes = merged_storage(dtype).experts_nbytes(layer)

    def reads(self, expert: int, busy: Collection[int] = ()) -> list[Read]:
        levels = self._layer.experts[expert].levels
        banks = self._spare[levels].pop() if self._spare.get(levels) else self._allocate(levels)
        self._filled[expert] = banks
        (span,) = self._source.spans(self._layer.layer, expert)

        def merge(parts: Sequence[np.ndarray]) -> None:
            arrays = {(part.projection, part.field): data for part, data in zip(span.parts, parts, strict=True)}
            for bank, (p, level) in zip(banks, _present(levels), strict=True):
                planes = [arrays[p, f"plane{j}"] for j in range(num_planes(level))]
                bank.write(0, planes, arrays[p, "scales"].view(np.float16), 1.0)

        return [Read(span, [None] * len(span.parts), merge)]

    def _allocate(self, levels: tuple[int, ...]) -> list[MergedBank]:
        self._spare.clear()  # memory of other levels would come on top
        return [
            MergedBank(self._layer.projections[p], field_width(level), 1, self._dtype) for p, level in _present(levels)
        ]

    def drop(self, expert: int) -> None:
        self._spare.setdefault(self._layer.experts[expert].levels, []).append(self._filled.pop(expert))

    def resize(self, capacity: int) -> None:
        self._spare.clear()

    @property
    def filled(self) -> Collection[int]:
        return self._filled.keys()

    def outputs(self, x: mx.array, groups: Sequence[Group], num_pairs: int) -> mx.array:
        turned_x = [turned(x, turns.inputs) for turns in self._copies.turns]
        log_norms = self._copies.log_norms(x)
        outputs = [self._output(group, turned_x, log_norms) for group in groups]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _output(self, group: Group, turned_x: Sequence[mx.array], log_norms: mx.array | None) -> mx.array:
        """x [T, D] as every copy expects it, and what a selector goes by [T] -> the output of each of the group's pairs
        [n, D]."""
        outputs = [
            self._copy_output(copy, group.expert, x if len(x) == 1 else x[mx.array(group.tokens)])
            for copy, x in enumerate(turned_x[: self._layer.num_copies(group.expert)])
        ]
        if log_norms is not None:
            log_norms = log_norms[mx.array(group.tokens)]
        return combined(outputs, self._copies, mx.array(group.expert), log_norms)

    def _copy_output(self, copy: int, expert: int, x: mx.array) -> mx.array:
        """x [n, D] -> [n, D]."""
        count = self._layer.num_matrices
        *first, last = range(copy * count, (copy + 1) * count)
        hidden = [self._product(p, expert, x) for p in first]
        activated = self._activation(hidden[1], hidden[0]) if len(hidden) == 2 else self._activation(hidden[0])
        return self._product(last, expert, turned(activated, self._copies.turns[copy].hidden))

    def _product(self, projection: int, expert: int, x: mx.array) -> mx.array:
        shape, bias = self._layer.projections[projection], self._biases[projection]
        bits, words, scales, biases = self._filled[expert][projection].arrays
        y = mx.quantized_matmul(
            x, words[0], scales[0], biases[0], transpose=True, group_size=shape.group_size, bits=min(bits, FIELD_BITS)
        )
        y = y if bits <= FIELD_BITS else add_halves(y)
        return y if bias is None else y + bias[expert]


class SlotShelf:
    """The experts of a layer in MLX's own formats, in slots of one size: banks [slots, ...] that the reads fill directly.

    `module` is the layer as mlx-lm's loader has made it, with arrays that nobody has read; it gets the banks instead, so
    that its products, biases and activation are those of the resident layer. Floats of another type than the model's are
    converted on the way.
    """

    def __init__(self, source: StockSource, layer: int, module: ExpertLayer, capacity: int):
        self._source, self._layer, self._module = source, layer, module
        self._matrices = source.stock[layer].matrices
        self.sizes = (module.nbytes // module.num_experts,) * module.num_experts
        self._slots: dict[int, int] = {}
        self._biases = [np.array(p["bias"].astype(mx.float32)) if "bias" in p else None for p in module.projections]
        self._banks: dict[tuple[int, str], _Bank] = {}
        self._free: list[int] = []
        self._allocate(capacity)

    @property
    def filled(self) -> Collection[int]:
        return self._slots.keys()

    def reads(self, expert: int, busy: Collection[int] = ()) -> list[Read]:
        slot = self._slots[expert] = self._free.pop()
        for p, bias in enumerate(self._biases):
            if bias is not None:
                self._banks[p, "bias"].write(slot, bias[expert])
        return [self._read(span, slot) for span in self._source.spans(self._layer, expert)]

    def _read(self, span: Span, slot: int) -> Read:
        banks = [self._banks.get((part.projection, part.field)) for part in span.parts]
        direct = [bank.rows[slot] if bank is not None and bank.stored == bank.dtype else None for bank in banks]

        def convert(parts: Sequence[np.ndarray]) -> None:
            for bank, data in zip(banks, parts, strict=True):
                if bank is not None and bank.stored != bank.dtype:
                    bank.write(slot, read_floats(data, bank.stored))

        whole = all(row is not None for row in direct)
        return Read(span, direct, None if whole else convert)

    def drop(self, expert: int) -> None:
        self._free.append(self._slots.pop(expert))

    def resize(self, capacity: int) -> None:
        """Keeps what is filled, in the first slots."""
        kept = list(self._slots.items())
        self._allocate(capacity, [slot for _, slot in kept])
        self._slots = {expert: slot for slot, (expert, _) in enumerate(kept)}

    def _allocate(self, capacity: int, kept: Sequence[int] = ()) -> None:
        """Banks for as many slots as fit; the first are copies of the slots `kept`."""
        slots = min(capacity // self.sizes[0], len(self.sizes))
        self._free = list(range(slots - 1, len(kept) - 1, -1))
        for p, (matrix, projection) in enumerate(zip(self._matrices, self._module.projections, strict=True)):
            fields = {field.name: (field.shape, ARRAY_DTYPES[field.dtype]) for field in matrix.fields}
            if "bias" in projection:
                fields["bias"] = (projection["bias"].shape[1:], mx.float32)
            for name, (shape, stored) in fields.items():
                bank = _Bank(slots, shape, stored, projection[name].dtype)
                if kept:
                    bank.rows[: len(kept)] = self._banks[p, name].rows[list(kept)]
                self._banks[p, name] = bank
                projection[name] = bank.array

    def outputs(self, x: mx.array, groups: Sequence[Group], num_pairs: int) -> mx.array:
        slots = mx.array(np.concatenate([np.full(len(g.pairs), self._slots[g.expert], np.uint32) for g in groups]))
        tokens = mx.array(np.concatenate([group.tokens for group in groups]))
        return self._module.pairs(x[tokens], slots)


class _Bank:
    """An array [slots, ...] of the model's type, written in place row by row, and the type it has in the file."""

    def __init__(self, slots: int, shape: Sequence[int], stored: mx.Dtype, dtype: mx.Dtype):
        self.stored, self.dtype = stored, dtype
        self.array = mx.zeros((slots, *shape), dtype)
        mx.eval(self.array)
        self.rows = np.frombuffer(array_bytes(self.array), np.uint8).reshape(slots, -1)

    def write(self, slot: int, values: np.ndarray) -> None:
        """values: float32."""
        write_floats(values, self.rows[slot], self.dtype)


def _present(levels: Sequence[int]) -> list[tuple[int, int]]:
    """Projection and level of the matrices that an expert has: those of further copies come last."""
    return [(p, level) for p, level in enumerate(levels) if level != ABSENT]
