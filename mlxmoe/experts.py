"""The routed experts of a layer as the model calls them: ExpertLayer, and the plane codec's products.

ExpertLayer stands where mlx-lm's model classes have a SwitchGLU or SwitchMLP and is called the same way; the router and
the weighting of the experts' outputs stay in mlx-lm's block. Its projections are either mlx-lm's own switch layers (an
unconverted or stock MLX checkpoint) or PlaneLinear (a converted one), whose columns may expect rotated values.

Shapes: T tokens, A active experts per token, E experts, D model dim, F expert dim, N rows and K columns of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchMLP

from mlxmoe.copies import ONE_COPY, Copies, combined
from mlxmoe.formats import FIELD_BITS, MatrixShape
from mlxmoe.kernels import (
    DECODE,
    PHASES,
    PREFILL,
    ExpertBanks,
    MetalKernels,
    QuantizedBank,
    ReferenceKernels,
    activation_of,
    expert_outputs,
    weighted_outputs,
)
from mlxmoe.rotation import turned

SORT_FROM = 64  # (token, expert) pairs from which it pays to touch the experts in order (as mlx-lm does)


class Bucket(NamedTuple):
    """Expert matrices held in fields of one width: words [n, N, W] uint32, scales and biases [n, N, K/G].

    A field may be wider than the code in it: value = scale * code + bias does not depend on the field's width.

    `bits` 16: words [n, 2 N, W] in fields of 8 bits, scales and biases [n, 2 N, K/G], and a row's product is the sum of
    those with rows r and N + r. With the first 8 of L bits in row r and the L - 8 below in row N + r, s the code's scale:
    s * 2^(L-8) * (high - 128) + s * (low + 1/2) = s * (code - (2^L - 1)/2), so that scales and biases are s times a power
    of two. Rows N + r of a code of at most 8 bits are zero.
    """

    bits: int
    words: mx.array
    scales: mx.array
    biases: mx.array

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.biases.nbytes


class PlaneLinear(nn.Module):
    """One projection of all experts of a layer, each at its own resident level; called like mlx-lm's SwitchLinear.

    Experts lie in one bucket per field width. With one bucket a call is one built-in product; with several, each bucket
    computes all pairs and the pairs that are not its own are masked, so that the host never has to read the routing.
    `partial`: experts may be missing, and the product with one is 0.
    """

    def __init__(self, shape: MatrixShape, num_experts: int, has_bias: bool, partial: bool = False):
        super().__init__()
        self.shape, self.partial = shape, partial
        self.num_experts = num_experts
        if has_bias:
            self.bias = mx.zeros((num_experts, shape.rows))
        self._held = _Held([], [], False, False)

    def fill(self, buckets: Sequence[tuple[Sequence[int], Bucket]]) -> None:
        """Sets what is resident: for each bucket the experts in it, in row order, and its arrays. Every expert once (or
        not at all, of a partial one), or none at all."""
        self._held.products = [_product(bucket, self.shape.group_size) for _, bucket in buckets]
        self._held.nbytes = sum(bucket.nbytes for _, bucket in buckets)
        self.place([experts for experts, _ in buckets])

    def place(self, rows_of_buckets: Sequence[Sequence[int]]) -> None:
        """The experts of each bucket in row order, where what is in the buckets was exchanged."""
        found = sorted(e for experts in rows_of_buckets for e in experts)
        everyone = list(range(self.num_experts))
        assert found in ([], everyone) or (self.partial and len(set(found)) == len(found))
        self._held.whole = len(rows_of_buckets) == 1 and found == everyone
        self._held.in_order = self._held.whole and list(rows_of_buckets[0]) == found
        self._held.rows = []
        for experts in rows_of_buckets:
            rows = [-1] * self.num_experts
            for row, expert in enumerate(experts):
                rows[expert] = row
            self._held.rows.append(mx.array(rows, mx.int32))

    @property
    def nbytes(self) -> int:
        """Resident bytes of the expert matrices, without the bias (which is an ordinary parameter)."""
        return self._held.nbytes

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, K] with the expert of each row in indices [...] -> [..., 1, N]."""
        held = self._held
        if held.in_order:
            y = held.products[0](x, indices, sorted_indices)
        elif held.whole:
            y = held.products[0](x, held.rows[0][indices], False)
        else:
            # No bucket at all gives zeros: the shape of the result, for tracing a model whose experts are not read yet.
            y = mx.zeros((*indices.shape, 1, self.shape.rows), x.dtype)
            for product, rows in zip(held.products, held.rows, strict=True):
                row = rows[indices]
                part = product(x, mx.maximum(row, 0), False)
                y = mx.where((row >= 0)[..., None, None], part, y)
        if "bias" in self:
            y = y + mx.expand_dims(self["bias"][indices], -2)
        return y


_Product = Callable[[mx.array, mx.array, bool], mx.array]


@dataclass
class _Held:
    """What a PlaneLinear holds, in one plain object: a module's own lists and arrays are looked up through its dict, which
    costs a decoded token more than the rest of building its graph. `whole`: one bucket with all experts; `in_order`: and its
    rows are their numbers."""

    products: list[_Product]
    rows: list[mx.array]
    whole: bool
    in_order: bool
    nbytes: int = 0


def _product(bucket: Bucket, group_size: int) -> _Product:
    """(x, rows, sorted) -> the product with the rows of a bucket."""
    bits, words, scales, biases = bucket
    gather = partial(mx.gather_qmm, transpose=True, group_size=group_size, bits=min(bits, FIELD_BITS))

    def product(x: mx.array, rows: mx.array, sorted_indices: bool) -> mx.array:
        return gather(x, words, scales, biases, rhs_indices=rows, sorted_indices=sorted_indices)

    def halved(x: mx.array, rows: mx.array, sorted_indices: bool) -> mx.array:
        return add_halves(product(x, rows, sorted_indices))

    return product if bits <= FIELD_BITS else halved


def add_halves(y: mx.array) -> mx.array:
    """Products [..., 2 N] with both halves of codes in two fields (see Bucket) -> [..., N]."""
    rows = y.shape[-1] // 2
    return y[..., :rows] + y[..., rows:]


class Choices:
    """What a layer's router chose, kept for whoever asks between two tokens; nothing is kept unless `watched`."""

    def __init__(self) -> None:
        self.watched = False
        self._seen: list[mx.array] = []

    def note(self, indices: mx.array) -> None:
        if self.watched:
            self._seen.append(indices)

    def take(self) -> np.ndarray:
        """The chosen experts since the last time, one entry per pair. Waits for those that are not computed yet."""
        seen, self._seen = self._seen, []
        return np.concatenate([np.array(indices).reshape(-1) for indices in seen] or [np.zeros(0, np.int64)])


class ExpertLayer(nn.Module):
    """The routed experts of one layer. Children carry mlx-lm's names, so checkpoints load into it unchanged.

    layer(x, indices): x [..., D], indices [..., A] int -> [..., A, D], the output of each chosen expert, unweighted.
    `copies`: what the projections expect of their inputs, and how the outputs of several copies are put together; the
    projections of every further copy follow those of the first.
    """

    def __init__(
        self,
        projections: Mapping[str, nn.Module],
        activation: Callable[..., mx.array],
        num_experts: int,
        copies: Copies = ONE_COPY,
    ):
        super().__init__()
        self.activation = activation
        self.num_experts = num_experts
        self.copies = copies
        self._names = tuple(projections)
        self.choices = Choices()
        for name, module in projections.items():
            setattr(self, name, module)

    @classmethod
    def from_switch(cls, switch: SwitchGLU | SwitchMLP) -> ExpertLayer:
        """Takes over the projections of a loaded mlx-lm layer, whatever their precision."""
        names = ("gate_proj", "up_proj", "down_proj") if isinstance(switch, SwitchGLU) else ("fc1", "fc2")
        projections = {name: switch[name] for name in names}
        return cls(projections, switch.activation, next(iter(projections.values())).num_experts)

    @property
    def projections(self) -> list[Any]:
        return [self[name] for name in self._names]

    @property
    def nbytes(self) -> int:
        """Resident bytes of all experts of the layer."""
        return sum(
            module.nbytes if isinstance(module, PlaneLinear) else sum(a.nbytes for a in module.parameters().values())
            for module in self.projections
        )

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.choices.note(indices)
        outputs = [self._outputs(copy, x, indices) for copy in range(len(self.copies.turns))]
        log_norms = self.copies.log_norms(x)
        return combined(outputs, self.copies, indices, None if log_norms is None else log_norms[..., None])

    def _outputs(self, copy: int, x: mx.array, indices: mx.array) -> mx.array:
        """As the call, of one copy of each expert."""
        x = turned(x, self.copies.turns[copy].inputs)
        if indices.size < SORT_FROM:
            return self._experts(copy, mx.expand_dims(x, (-2, -3)), indices, False).squeeze(-2)
        # Many pairs: in the order of the experts, so that each expert's weights are touched once in a run.
        *lead, active = indices.shape
        flat = indices.flatten()
        order = mx.argsort(flat)
        pairs = mx.expand_dims(x.reshape(-1, x.shape[-1])[order // active], -2)
        y = self._experts(copy, pairs, flat[order], True).squeeze(-2)
        return y[mx.argsort(order)].reshape(*lead, active, -1)

    def pairs(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [P, D] with the expert of each row in experts [P] -> [P, D]. For experts of one copy, unrotated."""
        return self._experts(0, mx.expand_dims(x, -2), experts, False).squeeze(-2)

    def _experts(self, copy: int, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        count = len(self._names) // len(self.copies.turns)
        *first, last = self.projections[copy * count : (copy + 1) * count]
        hidden = [projection(x, indices, sorted_indices=sorted_indices) for projection in first]
        if len(hidden) == 2:
            gate, up = hidden
            activated = self.activation(up, gate)
        else:
            activated = self.activation(hidden[0])
        return last(turned(activated, self.copies.turns[copy].hidden), indices, sorted_indices=sorted_indices)


def stock_banks(layer: ExpertLayer, phases: Collection[str] = PHASES) -> ExpertBanks | None:
    """The experts of a loaded checkpoint in a stock MLX format as the kernels read them, sharing their arrays: no memory.

    Phases that are not in `phases` stay with `layer`. None where a kernel lacks the format or the activation, or the
    projections are in several formats (gate and up must agree in bits, too).
    """
    activation = activation_of(layer.activation)
    banks = [
        QuantizedBank.from_linear(linear) if isinstance(linear, QuantizedSwitchLinear) else None
        for linear in layer.projections
    ]
    first, *between, last = banks
    if activation is None or first is None or last is None:
        return None
    up = between[0] if between else None
    if (between and up is None) or first.mode != last.mode or (up is not None and up.format != first.format):
        return None
    decode, prefill = (layer if phase not in phases else None for phase in (DECODE, PREFILL))
    return ExpertBanks(first, up, last, activation, decode=decode, prefill=prefill)


class KernelExperts(nn.Module):
    """The routed experts of one layer through the project's kernels, straight from their resident bits.

    Called like ExpertLayer. Rows do not depend on what else is in a call beyond the choice between the decode and the
    prefill kernels, which goes by the number of pairs.
    """

    def __init__(self, banks: ExpertBanks, kernels: MetalKernels | ReferenceKernels):
        super().__init__()
        self._banks, self._kernels = banks, kernels
        self.choices = Choices()

    @property
    def banks(self) -> ExpertBanks:
        return self._banks

    def fill(self, banks: ExpertBanks) -> None:
        """Other banks, from now on. No graph may be about to read the old ones, which are freed."""
        self._banks = banks

    @property
    def num_experts(self) -> int:
        return self._banks.gate.num_experts

    @property
    def nbytes(self) -> int:
        """Resident bytes of all experts of the layer, without biases."""
        return sum(bank.nbytes for bank in self._banks[:3] if bank is not None)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x [..., D], indices [..., A] int -> [..., A, D]."""
        self.choices.note(indices)
        flat = indices.reshape(-1, indices.shape[-1]).astype(mx.uint32)
        outputs = expert_outputs(self._kernels, self._banks, x.reshape(-1, x.shape[-1]), flat)
        return outputs.reshape(*indices.shape, x.shape[-1])

    def weighted(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [..., D], experts and router weights [T, A] -> the weighted sum of the chosen experts' outputs [..., D]."""
        self.choices.note(experts)
        rows = x.reshape(-1, x.shape[-1])
        return weighted_outputs(self._kernels, self._banks, rows, experts, weights).reshape(x.shape)
