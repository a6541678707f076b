"""The Metal kernels of metal/ as Python functions, and their meaning: MetalKernels and ReferenceKernels have the same
methods. docs/kernels.md has layouts, launches and measured traffic.

Owns what lies in memory for the kernels (PlaneBank), the launch geometry and the kernel objects. Which experts are
resident at which level is decided elsewhere, and so is when a kernel is used instead of MLX's built-ins.

MetalKernels takes the factory that makes a kernel from its text: mx.fast.metal_kernel on a Mac, metalsim's stand-in in
the tests, which so execute this very code and the same text.

Shapes: T tokens, A active experts per token, P = T * A pairs, E experts, D model dim, F expert dim, N rows and K columns
of a projection, G group size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU

from mlxmoe.formats import (
    NARROW_LEVELS,
    PLANE_WIDTHS,
    MatrixShape,
    PackedMatrix,
    array_bytes,
    dequantize_codes,
    join_planes,
    level_scale,
    num_planes,
    unpack_codes,
    words_per_row,
)
from mlxmoe.rotation import Turn, hadamard_size
from mlxmoe.router import SCORES, Router, Routing
from mlxmoe.router import route as route_reference

# The same names and values in metal/
UNIT = 32  # columns that one lane takes at a time
TABLE_WIDTH = 12  # level, word offset of each of up to 5 planes, and:
TABLE_SCALES = 6  # word offset of the scales
TABLE_FACTOR = 7  # float32 factor on them
TABLE_BEYOND = 8  # word offset of each plane above 8 bits: of a lower level, 8 entries are all that is read
TABLE_PLANES = (1, 2, 3, 4, 5, *range(TABLE_BEYOND, TABLE_WIDTH))  # of each plane
ACTIVATIONS = ("swiglu", "swiglu_oai", "geglu", "relu2")
HADAMARD_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
EPILOGUE_BLOCKS = (64, 128)  # of these, those that expert_gate_up transforms itself

PHASES = DECODE, PREFILL = "decode", "prefill"

_ALIGNMENT = 4  # words: planes and scales start on 16 bytes
_ROWS = 8  # products that share one read of the activations
_MAX_SIMDGROUPS = 8
_TILE_OUTPUTS = 32  # BN in metal/expert_prefill.metal

MetalKernel = Callable[..., list[mx.array]]
MetalKernelFactory = Callable[..., MetalKernel]


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels read
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlaneBank:
    """One projection of all experts of a layer, each at its own level, as tight as the planes themselves.

    words uint32 [W]: the resident planes and the scales of every expert, anywhere; other projections may lie between them.
    A plane is the packed words of its rows and needs 8 bytes of alignment (1-bit planes: 4), scales are float16 [N, K/G]
    as they are written and need 4. table int32 [E, TABLE_WIDTH]: level, word offset of each of up to five planes, word
    offset of the scales, the bits of the float32 factor on them, 2^(written - level) * gain, and word offsets of the planes
    above 8 bits. bias [E, N] or None.
    """

    shape: MatrixShape
    words: mx.array
    table: mx.array
    bias: mx.array | None = None

    @property
    def num_experts(self) -> int:
        return self.table.shape[0]

    @property
    def nbytes(self) -> int:
        """Resident bytes of the expert matrices, without the bias (an ordinary parameter of the model), whatever else
        lies in `words`."""
        codes = sum(self.shape.code_nbytes(level) for level in self._rows[:, 0].tolist())
        return codes + self.num_experts * self.shape.scales_nbytes + self.table.nbytes

    @classmethod
    def empty(cls, shape: MatrixShape, levels: Sequence[int], bias: mx.array | None = None) -> PlaneBank:
        """A bank of its own for experts of these levels, all zero: fill it with write_plane and write_scales before its
        first use. Expert after expert, planes and then scales, each starting on 16 bytes (no byte is lost for that where
        K is a multiple of 64 and N of 8)."""
        table = np.zeros((len(levels), TABLE_WIDTH), np.int32)
        end = 0
        for expert, level in enumerate(levels):
            table[expert, 0] = level
            parts = [(TABLE_PLANES[plane], shape.plane_nbytes(plane)) for plane in range(num_planes(level))]
            for entry, nbytes in [*parts, (TABLE_SCALES, shape.scales_nbytes)]:
                table[expert, entry] = end
                end += -(-nbytes // 4 // _ALIGNMENT) * _ALIGNMENT
        words = mx.zeros((end,), mx.uint32)
        mx.eval(words)
        return cls(shape, words, mx.array(table), bias)

    @classmethod
    def from_matrices(
        cls, matrices: Sequence[PackedMatrix], levels: Sequence[int], bias: mx.array | None = None
    ) -> PlaneBank:
        """The first `levels[e]` bits of every expert's matrix."""
        bank = cls.empty(matrices[0].shape, levels, bias)
        for expert, (matrix, level) in enumerate(zip(matrices, levels, strict=True)):
            for plane in range(num_planes(level)):
                bank.write_plane(expert, plane, array_bytes(matrix.planes[plane]))
            factor = level_scale(matrix.level, level, matrix.gains.get(level, 1.0))
            bank.write_scales(expert, array_bytes(matrix.scales), factor)
        return bank

    def write_plane(self, expert: int, plane: int, data: Any) -> None:
        """Copies one packed plane (any buffer of plane_nbytes bytes) into place. No kernel may be reading the bank."""
        self._write(self._rows[expert, TABLE_PLANES[plane]], self.shape.plane_nbytes(plane), data)

    def write_scales(self, expert: int, scales: Any, factor: float) -> None:
        """Copies the scales of one expert (any buffer of scales_nbytes bytes, float16 [N, K/G] as they are written) into
        place and sets the factor of its level. No kernel may be reading the bank."""
        self._write(self._rows[expert, TABLE_SCALES], self.shape.scales_nbytes, scales)
        self._rows.view(np.float32)[expert, TABLE_FACTOR] = factor

    def exchange(self, promoted: int, demoted: int, planes: Sequence[Any], factors: tuple[float, float]) -> None:
        """`promoted` takes the level of `demoted` and the places of its last planes, which it fills with its own
        `planes` (as write_plane takes them), and `demoted` keeps its first ones. `factors`: on the scales of the two at
        their new levels. No kernel may be reading the bank."""
        table = np.frombuffer(array_bytes(self.table), np.int32).reshape(self.table.shape)
        low, high = (num_planes(int(table[e, 0])) for e in (promoted, demoted))
        assert high - low == len(planes) > 0
        moved = list(TABLE_PLANES[low:high])
        table[promoted, moved], table[demoted, moved] = table[demoted, moved].copy(), 0
        table[[promoted, demoted], 0] = table[[demoted, promoted], 0]
        table.view(np.float32)[[promoted, demoted], TABLE_FACTOR] = factors
        for plane, data in enumerate(planes, start=low):
            self.write_plane(promoted, plane, data)

    def dequantize(self, expert: int) -> mx.array:
        """float32 [N, K]: what the words of one expert stand for. Reads the table on the host."""
        rows, columns = self.shape.rows, self.shape.columns
        entry = self._rows[expert]
        codes = []
        for plane, width in enumerate(PLANE_WIDTHS[: num_planes(int(entry[0]))]):
            start, row_words = int(entry[TABLE_PLANES[plane]]), words_per_row(columns, width)
            words = self.words[start : start + rows * row_words].reshape(rows, row_words)
            codes.append(unpack_codes(words, width, columns))
        start, num_groups = int(entry[TABLE_SCALES]), self.shape.num_groups
        scales = self.words[start : start + -(-num_groups // 2)].view(mx.float16)[:num_groups].reshape(rows, -1)
        factor = float(entry.view(np.float32)[TABLE_FACTOR])
        return dequantize_codes(join_planes(codes), scales.astype(mx.float32) * factor, int(entry[0]))

    @property
    def _rows(self) -> np.ndarray:
        """The table's own memory: int32 [E, TABLE_WIDTH]."""
        return np.frombuffer(array_bytes(self.table), np.int32).reshape(self.table.shape)

    def _write(self, word: Any, nbytes: int, data: Any) -> None:
        """Copies bytes into `words` from a word offset of the table on."""
        start = 4 * int(word)
        array_bytes(self.words)[start : start + nbytes] = memoryview(data).cast("B")


@dataclass(frozen=True)
class QuantizedBank:
    """One projection of all experts of a layer in a stock MLX format, as mlx-lm's QuantizedSwitchLinear holds it.

    words uint32 [E, N, K * bits / 32]. mode affine: scales and biases [E, N, K/G] of one float type, 2, 3, 4, 6 or 8 bits.
    mode mxfp4: scales uint8 [E, N, K/32] and no biases. bias [E, N] or None.
    """

    shape: MatrixShape
    words: mx.array
    scales: mx.array
    biases: mx.array | None
    bits: int
    mode: str = "affine"
    bias: mx.array | None = None

    @classmethod
    def from_linear(cls, linear: QuantizedSwitchLinear, name: str = "") -> QuantizedBank | None:
        """The bank of a loaded layer, sharing its arrays, or None for a format that has no kernel."""
        affine = linear.mode == "affine" and linear.bits in NARROW_LEVELS
        if not affine and not (linear.mode == "mxfp4" and linear.get("global_scale") is None):
            return None
        shape = MatrixShape(name, linear.output_dims, linear.input_dims, linear.group_size)
        bias = linear.get("bias")
        return cls(shape, linear.weight, linear.scales, linear.get("biases"), linear.bits, linear.mode, bias)

    @property
    def num_experts(self) -> int:
        return self.words.shape[0]

    @property
    def format(self) -> tuple[str, int, int, mx.Dtype, bool]:
        """What the gate and the up projection of a layer must agree in: mode, bits, group size, type of the scales, and
        whether there is a bias."""
        return self.mode, self.bits, self.shape.group_size, self.scales.dtype, self.bias is not None

    @property
    def nbytes(self) -> int:
        """Resident bytes of the expert matrices, without the bias."""
        return self.words.nbytes + self.scales.nbytes + (self.biases.nbytes if self.biases is not None else 0)

    def dequantize(self, expert: int) -> mx.array:
        """float32 [N, K]."""
        scales, biases = self.scales[expert], self.biases
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases[expert].astype(mx.float32)
        weight = mx.dequantize(
            self.words[expert], scales, biases, group_size=self.shape.group_size, bits=self.bits, mode=self.mode
        )
        return weight.astype(mx.float32)


Bank = PlaneBank | QuantizedBank


class _Format(NamedTuple):
    """How a bank looks to a kernel: its type in metal/, and the arrays that make it up, in the type's order."""

    metal_type: str
    arrays: tuple[str, ...]


_FORMATS = {
    "planes": _Format("PlaneBank", ("words", "table")),
    "affine": _Format("AffineBank<BITS, S>", ("words", "scales", "biases")),
    "mxfp4": _Format("Mxfp4Bank", ("words", "scales")),
}


def _format_name(bank: Bank) -> str:
    return "planes" if isinstance(bank, PlaneBank) else bank.mode


def _arrays(bank: Bank) -> list[mx.array]:
    return [getattr(bank, name) for name in _FORMATS[_format_name(bank)].arrays]


def _format_template(bank: Bank) -> list[tuple[str, Any]]:
    """The template arguments of the bank's type."""
    if _format_name(bank) != "affine":
        return []
    assert isinstance(bank, QuantizedBank)
    return [("BITS", bank.bits), ("S", bank.scales.dtype)]


class Activation(NamedTuple):
    """Between the first and the last projection; alpha and limit belong to swiglu_oai."""

    kind: str
    alpha: float = 0.0
    limit: float = 0.0


class Rotation(NamedTuple):
    """A signed block-Hadamard transform of the input or the hidden values: signs [D] or [F] of one layer, and values per
    block."""

    signs: mx.array
    block: int

    @classmethod
    def of_turn(cls, turn: Turn | None) -> Rotation | None:
        """Of a rotation that has_rotation says there is a kernel for."""
        return None if turn is None else cls(turn.signs, turn.block)


def has_rotation(name: str, columns: int) -> bool:
    """Whether the kernels have a rotation of rotation.NAMES for K columns."""
    return name == "none" or hadamard_size(name, columns) in HADAMARD_BLOCKS


def activation_of(module: Any) -> Activation | None:
    """The activation that a module of mlx-lm stands for, or None where the kernels have no such activation."""
    if isinstance(module, SwigluOAI):
        return Activation("swiglu_oai", module._alpha, module._limit)
    kinds = {SwiGLU: "swiglu", GeGLU: "geglu", nn.ReLU2: "relu2"}
    kind = kinds.get(type(module))
    return Activation(kind) if kind is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# The meaning
# ---------------------------------------------------------------------------------------------------------------------


class ReferenceKernels:
    """Every kernel in plain MLX built-ins and float32; results in the activations' type. Reads the routing on the host."""

    def expert_gate_up(
        self,
        x: mx.array,
        experts: mx.array,
        gate: Bank,
        up: Bank | None,
        activation: Activation,
        rotation: Rotation | None = None,
    ) -> mx.array:
        """x [T, D], experts [T, A] -> activated hidden values [T, A, F], rotated. `up` is None for relu2.

        Raises ValueError for blocks of a rotation that are none of HADAMARD_BLOCKS or do not divide F."""
        gates = _products(x, experts, gate)
        ups = _products(x, experts, up) if up is not None else gates
        hidden = _activate(gates, ups, activation)
        if rotation is not None:
            hidden = self.hadamard_blocks(hidden, *rotation)
        return hidden.astype(x.dtype)

    def expert_down(self, hidden: mx.array, experts: mx.array, weights: mx.array, down: Bank) -> mx.array:
        """hidden [T, A, F], experts [T, A], router weights [T, A] -> their weighted sum [T, D].

        An expert may lie in the bank several times: R rows of the bank are R of the A, with weight w/R each. Rows may
        repeat, and a weight may be 0."""
        products = _products(hidden, experts, down)
        return (products * weights.astype(mx.float32)[..., None]).sum(axis=1).astype(hidden.dtype)

    def expert_gemm(self, x: mx.array, rows: mx.array, offsets: mx.array, bank: Bank) -> mx.array:
        """x [R, K], rows [M] of it in the order of the experts, offsets int32 [E + 1] of each expert's first row in that
        order -> [M, N], each row's product with its expert, plus the bias."""
        starts = np.array(offsets)
        parts = [mx.zeros((0, bank.shape.rows))]
        for expert in range(bank.num_experts):
            mine = rows[int(starts[expert]) : int(starts[expert + 1])]
            if mine.size:
                product = x[mine].astype(mx.float32) @ bank.dequantize(expert).T
                parts.append(product if bank.bias is None else product + bank.bias[expert].astype(mx.float32))
        return mx.concatenate(parts).astype(x.dtype)

    def hadamard_blocks(self, x: mx.array, signs: mx.array, block: int) -> mx.array:
        """x [..., K] -> each block of `block` columns times signs [K], then the orthonormal Hadamard transform.

        Raises ValueError for a block that is none of HADAMARD_BLOCKS or does not divide K."""
        _check_blocks(block, x.shape[-1])
        signed = x.astype(mx.float32) * signs.astype(mx.float32)
        blocks = signed.reshape(*x.shape[:-1], -1, block)
        return mx.hadamard_transform(blocks, scale=block**-0.5).reshape(x.shape).astype(x.dtype)

    def route(self, logits: mx.array, bias: mx.array | None, router: Router) -> Routing:
        """See router.route."""
        return route_reference(logits, bias, router)


def _check_blocks(block: int, columns: int) -> None:
    if block not in HADAMARD_BLOCKS or columns % block != 0:
        raise ValueError(f"no Hadamard transform in blocks of {block} over {columns} columns")


def _activate(gates: mx.array, ups: mx.array, activation: Activation) -> mx.array:
    if activation.kind == "swiglu":
        return nn.silu(gates) * ups
    if activation.kind == "swiglu_oai":
        gates = mx.minimum(gates, activation.limit)
        ups = mx.clip(ups, -activation.limit, activation.limit)
        return (ups + 1) * gates * mx.sigmoid(activation.alpha * gates)
    if activation.kind == "geglu":
        return nn.gelu_approx(gates) * ups
    return mx.square(mx.maximum(gates, 0))


def _products(x: mx.array, experts: mx.array, bank: Bank) -> mx.array:
    """x [T, K] or [T, A, K], experts [T, A] -> float32 [T, A, N], with the bias."""
    routed = np.array(experts)
    weights = {expert: bank.dequantize(expert) for expert in np.unique(routed).tolist()}
    rows = []
    for token, chosen in enumerate(routed.tolist()):
        for slot, expert in enumerate(chosen):
            row = x[token] if x.ndim == 2 else x[token, slot]
            product = weights[expert] @ row.astype(mx.float32)
            rows.append(product if bank.bias is None else product + bank.bias[expert].astype(mx.float32))
    return mx.stack(rows).reshape(*experts.shape, bank.shape.rows)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


@cache
def metal_source(name: str) -> str:
    """A file of metal/ with the files of metal/ that it includes in their place: MLX compiles without include paths."""

    def expand(name: str, seen: set[str]) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (resources.files("mlxmoe") / "metal" / name).read_text(encoding="ascii")
        text = text.replace("#pragma once\n", "")
        return re.sub(r'^#include "([\w.]+)"$', lambda match: expand(match[1], seen), text, flags=re.MULTILINE)

    return expand(name, set())


class _Kernel(NamedTuple):
    """A kernel's text as mx.fast.metal_kernel takes it, without the choices that are template arguments."""

    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str


def _bank_inputs(prefix: str, name: str) -> tuple[str, ...]:
    return tuple(prefix + array for array in _FORMATS[name].arrays)


def _bank_value(prefix: str, name: str) -> str:
    """The expression that makes a bank from its arrays."""
    return f"{_FORMATS[name].metal_type}{{{', '.join(_bank_inputs(prefix, name))}}}"


@cache
def _gate_up(name: str, rotated: bool) -> _Kernel:
    gate, up = _bank_inputs("gate_", name), _bank_inputs("up_", name)
    inputs = ("x", "experts", *gate, *up, "gate_bias", "up_bias", "parameters")
    values = ", ".join(("x", "experts", _bank_value("gate_", name), _bank_value("up_", name), *inputs[-3:]))
    if not rotated:
        body = f"""expert_gate_up<T, D, F, A, G, LANES, ROWS, ACTIVATION, BIAS>(
    {values}, hidden, thread_position_in_grid, thread_index_in_simdgroup);"""
        return _Kernel(f"expert_gate_up_{name}", "expert_decode.metal", inputs, ("hidden",), body)
    body = f"""threadgroup float values[BLOCK];
expert_gate_up_rotated<T, D, F, A, G, LANES, ROWS, ACTIVATION, BIAS, BLOCK, SIMDGROUPS>(
    {values}, signs, hidden, values,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);"""
    return _Kernel(f"expert_gate_up_rotated_{name}", "expert_decode.metal", (*inputs, "signs"), ("hidden",), body)


@cache
def _down(name: str) -> _Kernel:
    return _Kernel(
        f"expert_down_{name}",
        "expert_decode.metal",
        ("x", "experts", "weights", *_bank_inputs("", name), "bias"),
        ("out",),
        f"""threadgroup float partial[SIMDGROUPS * ROWS * (32 / LANES)];
expert_down<T, D, F, A, G, LANES, ROWS, SIMDGROUPS, BIAS>(
    x, experts, weights, {_bank_value("", name)}, bias, out, partial,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);""",
    )


@cache
def _gemm(name: str) -> _Kernel:
    return _Kernel(
        f"expert_gemm_{name}",
        "expert_prefill.metal",
        ("x", "rows", "offsets", *_bank_inputs("", name), "bias"),
        ("out",),
        f"""threadgroup T x_tile[BM * (BK + PAD)];
threadgroup T code_tile[BN * (BK + PAD)];
threadgroup float scale_tile[8 * BN];
threadgroup float bias_tile[AFFINE ? 8 * BN : 1];
threadgroup float scratch[AFFINE ? BM * 8 : BM * 4];
expert_gemm<T, E, N, K, G, BM, BK, AFFINE, BIAS>(
    x, rows, offsets, {_bank_value("", name)}, bias, out,
    x_tile, code_tile, scale_tile, bias_tile, scratch,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);""",
    )


_HADAMARD = _Kernel(
    "hadamard_blocks",
    "hadamard.metal",
    ("x", "signs"),
    ("y",),
    """threadgroup float exchange[SIMDGROUPS > 1 ? BLOCK : 1];
hadamard_blocks<T, COLUMNS, BLOCK, SIMDGROUPS>(
    x, signs, y, exchange, threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);""",
)
_ROUTE = _Kernel(
    "route",
    "route.metal",
    ("logits", "bias", "parameters"),
    ("experts", "weights"),
    """threadgroup float values[TOP_GROUPS < GROUPS ? E : 1];
route<E, TOP_K, SCORE, BIAS, GROUPS, TOP_GROUPS, TOP2, NORMALISE>(
    logits, bias, parameters, experts, weights, values, threadgroup_position_in_grid.x, thread_index_in_simdgroup);""",
)


class MetalKernels:
    """The kernels on a GPU. `metal_kernel` makes a kernel from its text; None is mx.fast.metal_kernel.

    Activations are float16 or bfloat16 (or float32), sums float32. Nothing is read on the host and nothing waits.
    """

    def __init__(self, metal_kernel: MetalKernelFactory | None = None):
        self._metal_kernel: MetalKernelFactory = metal_kernel or cast(MetalKernelFactory, mx.fast.metal_kernel)
        self._made: dict[str, MetalKernel] = {}
        self._parameters: dict[Activation, mx.array] = {}
        self._router_parameters: dict[Router, mx.array] = {}

    @staticmethod
    def available() -> bool:
        """Whether this process has a Metal GPU."""
        return mx.metal.is_available()

    def expert_gate_up(
        self,
        x: mx.array,
        experts: mx.array,
        gate: Bank,
        up: Bank | None,
        activation: Activation,
        rotation: Rotation | None = None,
    ) -> mx.array:
        """As ReferenceKernels.expert_gate_up, in one dispatch; where choose_epilogue has no launch for the rotation, in a
        second one, which reads hidden values that were rounded to the type of x."""
        (tokens, columns), active, rows = x.shape, experts.shape[-1], gate.shape.rows
        lanes = choose_lanes(columns)
        rows_per_lane = _ROWS if up is None else _ROWS // 2
        tile = _tile(rows_per_lane, lanes)
        simdgroups = 0
        if rotation is not None:
            _check_blocks(rotation.block, rows)
            simdgroups = choose_epilogue(rotation.block, tile)
            if simdgroups == 0:
                return self.hadamard_blocks(self.expert_gate_up(x, experts, gate, up, activation), *rotation)
        second = gate if up is None else up
        assert _format_name(second) == _format_name(gate)
        assert _format_template(second) == _format_template(gate)
        with_bias = gate.bias is not None
        if activation not in self._parameters:
            self._parameters[activation] = mx.array([activation.alpha, activation.limit], mx.float32)
        inputs = [
            x,
            experts.reshape(-1),
            *_arrays(gate),
            *_arrays(second),
            *((gate.bias, second.bias) if with_bias else (x, x)),
            self._parameters[activation],
        ]
        template = [
            *(("T", x.dtype), ("D", columns), ("F", rows), ("A", active), ("G", gate.shape.group_size)),
            *(("LANES", lanes), ("ROWS", rows_per_lane)),
            *(("ACTIVATION", ACTIVATIONS.index(activation.kind)), ("BIAS", with_bias)),
            *_format_template(gate),
        ]
        grid, threadgroup = (32 * -(-rows // tile), tokens * active, 1), (64, 1, 1)
        if rotation is not None:
            inputs.append(rotation.signs)
            template += [("BLOCK", rotation.block), ("SIMDGROUPS", simdgroups)]
            threadgroup = (32 * simdgroups, 1, 1)
            grid = (threadgroup[0] * (rows // rotation.block), tokens * active, 1)
        (hidden,) = self._kernel(_gate_up(_format_name(gate), rotation is not None))(
            inputs=inputs,
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[(tokens, active, rows)],
            output_dtypes=[x.dtype],
        )
        return hidden

    def expert_down(self, hidden: mx.array, experts: mx.array, weights: mx.array, down: Bank) -> mx.array:
        """As ReferenceKernels.expert_down, in one dispatch; the order of the sums is fixed."""
        tokens, active, columns = hidden.shape
        rows, lanes = down.shape.rows, choose_lanes(columns)
        simdgroups = choose_simdgroups(active)
        (out,) = self._kernel(_down(_format_name(down)))(
            inputs=[
                hidden,
                experts.reshape(-1),
                weights.reshape(-1),
                *_arrays(down),
                down.bias if down.bias is not None else hidden,
            ],
            template=[
                *(("T", hidden.dtype), ("D", rows), ("F", columns), ("A", active), ("G", down.shape.group_size)),
                *(("LANES", lanes), ("ROWS", _ROWS), ("SIMDGROUPS", simdgroups), ("BIAS", down.bias is not None)),
                *_format_template(down),
            ],
            grid=(32 * simdgroups * -(-rows // _tile(_ROWS, lanes)), tokens, 1),
            threadgroup=(32 * simdgroups, 1, 1),
            output_shapes=[(tokens, rows)],
            output_dtypes=[hidden.dtype],
        )
        return out

    def hadamard_blocks(self, x: mx.array, signs: mx.array, block: int) -> mx.array:
        """As ReferenceKernels.hadamard_blocks, in one dispatch."""
        columns = x.shape[-1]
        _check_blocks(block, columns)
        simdgroups = max(1, block // 512)
        (y,) = self._kernel(_HADAMARD)(
            inputs=[x, signs],
            template=[("T", x.dtype), ("COLUMNS", columns), ("BLOCK", block), ("SIMDGROUPS", simdgroups)],
            grid=(32 * simdgroups * (x.size // block), 1, 1),
            threadgroup=(32 * simdgroups, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )
        return y

    def route(self, logits: mx.array, bias: mx.array | None, router: Router) -> Routing:
        """As router.route, in one dispatch."""
        tokens, num_experts = logits.shape
        if router not in self._router_parameters:
            self._router_parameters[router] = mx.array([router.epsilon, router.scaling], mx.float32)
        parameters = self._router_parameters[router]
        experts, weights = self._kernel(_ROUTE)(
            inputs=[logits, bias if bias is not None else parameters, parameters],
            template=[
                *(("E", num_experts), ("TOP_K", router.top_k), ("SCORE", SCORES.index(router.score))),
                *(("BIAS", bias is not None), ("GROUPS", router.num_groups), ("TOP_GROUPS", router.top_groups)),
                *(("TOP2", router.group_score == "top2"), ("NORMALISE", router.normalise)),
            ],
            grid=(32 * tokens, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(tokens, router.top_k)] * 2,
            output_dtypes=[mx.uint32, mx.float32],
        )
        return Routing(experts, weights)

    def expert_gemm(self, x: mx.array, rows: mx.array, offsets: mx.array, bank: Bank) -> mx.array:
        """As ReferenceKernels.expert_gemm, in one dispatch."""
        (total,), (_, columns), num_experts = rows.shape, x.shape, bank.num_experts
        tile_rows = choose_tile_rows(total, num_experts, x.dtype.size)
        outputs = bank.shape.rows
        (out,) = self._kernel(_gemm(_format_name(bank)))(
            inputs=[
                x,
                rows,
                offsets,
                *_arrays(bank),
                bank.bias if bank.bias is not None else x,
            ],
            template=[
                *(("T", x.dtype), ("E", num_experts), ("N", outputs), ("K", columns), ("G", bank.shape.group_size)),
                *(("BM", tile_rows), ("BK", min(64, bank.shape.group_size))),
                *(("AFFINE", _format_name(bank) == "affine"), ("BIAS", bank.bias is not None)),
                *_format_template(bank),
            ],
            # Which expert has how many rows is not known here: room for one partly filled tile per expert.
            grid=(2 * tile_rows * -(-outputs // _TILE_OUTPUTS), total // tile_rows + min(num_experts, total), 1),
            threadgroup=(2 * tile_rows, 1, 1),
            output_shapes=[(total, outputs)],
            output_dtypes=[x.dtype],
        )
        return out

    def _kernel(self, kernel: _Kernel) -> MetalKernel:
        """The kernel object, made once: MLX compiles it once per set of template arguments and types."""
        if kernel.name not in self._made:
            self._made[kernel.name] = self._metal_kernel(
                name=kernel.name,
                input_names=list(kernel.inputs),
                output_names=list(kernel.outputs),
                source=kernel.body,
                header=metal_source(kernel.file),
            )
        return self._made[kernel.name]


class ExpertBanks(NamedTuple):
    """The routed experts of one layer: gate, up and down, or the first and the last of two (`up` None). `rotation`: what
    the columns of down expect of the hidden values; `input_rotation`: those of gate and up of the input. `decode`,
    `prefill`: what computes that phase in place of the kernels, as expert_outputs does."""

    gate: Bank
    up: Bank | None
    down: Bank
    activation: Activation
    rotation: Rotation | None = None
    decode: Callable[[mx.array, mx.array], mx.array] | None = None
    prefill: Callable[[mx.array, mx.array], mx.array] | None = None
    input_rotation: Rotation | None = None


def phase_of(num_pairs: int, num_experts: int) -> str:
    """DECODE as long as there are no more (token, expert) pairs than experts: it reads an expert's weights once per pair,
    PREFILL once per expert but in tiles of 32 rows and more. (Where the two cross on a GPU has not been measured.)"""
    return PREFILL if num_pairs > num_experts else DECODE


def expert_outputs(
    kernels: MetalKernels | ReferenceKernels, banks: ExpertBanks, x: mx.array, experts: mx.array
) -> mx.array:
    """x [T, D], experts [T, A] -> the output of each chosen expert, unweighted [T, A, D]: what mlx-lm's blocks expect
    from their SwitchGLU. `weighted_outputs` is what a block that leaves the weighting to us should call."""
    phase = phase_of(experts.size, banks.gate.num_experts)
    builtin = banks.prefill if phase == PREFILL else banks.decode
    if builtin is not None:
        return builtin(x, experts)
    if phase == PREFILL:
        return _prefill(kernels, banks, x, experts)
    tokens, active = experts.shape
    hidden = hidden_values(kernels, banks, x, experts)
    pairs = hidden.reshape(tokens * active, 1, -1)
    weights = _ones(tokens * active)
    return kernels.expert_down(pairs, experts.reshape(-1, 1), weights, banks.down).reshape(tokens, active, -1)


def hidden_values(
    kernels: MetalKernels | ReferenceKernels, banks: ExpertBanks, x: mx.array, experts: mx.array
) -> mx.array:
    """x [T, D], experts [T, A] -> what `expert_down` expects of each pair [T, A, F]."""
    x = _rotated_input(kernels, banks, x)
    return kernels.expert_gate_up(x, experts, banks.gate, banks.up, banks.activation, banks.rotation)


def _rotated_input(kernels: MetalKernels | ReferenceKernels, banks: ExpertBanks, x: mx.array) -> mx.array:
    """x [T, D] as gate and up expect it."""
    return x if banks.input_rotation is None else kernels.hadamard_blocks(x, *banks.input_rotation)


@cache
def _ones(count: int) -> mx.array:
    """float32 [count, 1], made once: in the graph it would be a launch per layer."""
    return mx.array(np.ones((count, 1), np.float32))


def weighted_outputs(
    kernels: MetalKernels | ReferenceKernels, banks: ExpertBanks, x: mx.array, experts: mx.array, weights: mx.array
) -> mx.array:
    """x [T, D], experts and router weights [T, A] -> the layer's routed output [T, D]."""
    if phase_of(experts.size, banks.gate.num_experts) == PREFILL or banks.decode is not None:
        return weighted_sum(expert_outputs(kernels, banks, x, experts), weights)
    hidden = hidden_values(kernels, banks, x, experts)
    return kernels.expert_down(hidden, experts, weights, banks.down)


def weighted_sum(outputs: mx.array, weights: mx.array) -> mx.array:
    """outputs [T, A, D], router weights [T, A] -> [T, D], summed in float32."""
    weighted = outputs.astype(mx.float32) * weights.astype(mx.float32)[..., None]
    return weighted.sum(axis=1).astype(outputs.dtype)


def _prefill(kernels: MetalKernels | ReferenceKernels, banks: ExpertBanks, x: mx.array, experts: mx.array) -> mx.array:
    """As expert_outputs, expert by expert."""
    tokens, active = experts.shape
    order, offsets, inverse = sort_by_expert(experts, banks.gate.num_experts)
    outputs = prefill_outputs(kernels, banks, x, (order // active).astype(mx.uint32), offsets)
    return outputs[inverse].reshape(tokens, active, -1)


def prefill_outputs(
    kernels: MetalKernels | ReferenceKernels, banks: ExpertBanks, x: mx.array, rows: mx.array, offsets: mx.array
) -> mx.array:
    """x [T, D], rows [M] of it in the order of the experts, offsets int32 [E + 1] of each expert's first row in that order
    -> the output of each row's expert, unweighted [M, D]. A row does not depend on the others."""
    x = _rotated_input(kernels, banks, x)
    gates = kernels.expert_gemm(x, rows, offsets, banks.gate)
    ups = kernels.expert_gemm(x, rows, offsets, banks.up) if banks.up is not None else gates
    hidden = _activate(gates.astype(mx.float32), ups.astype(mx.float32), banks.activation).astype(x.dtype)
    if banks.rotation is not None:
        hidden = kernels.hadamard_blocks(hidden, *banks.rotation)
    return kernels.expert_gemm(hidden, mx.arange(rows.size, dtype=mx.uint32), offsets, banks.down)


def choose_lanes(columns: int) -> int:
    """Lanes of a simdgroup that share a row: the most that keep nine of ten busy, or else those that keep most busy.

    More lanes read longer runs of a row at once; fewer leave none idle where K is short or odd (768, 1408).
    """
    units = columns // UNIT
    busy = {lanes: units / (-(-units // lanes) * lanes) for lanes in (32, 16, 8, 4, 2, 1)}
    return next((lanes for lanes, share in busy.items() if share >= 0.9), max(busy, key=lambda lanes: busy[lanes]))


def choose_epilogue(block: int, tile: int) -> int:
    """Simdgroups that make one block of hidden values of expert_gate_up and its transform, a tile of rows at a time, or 0
    where there is no such launch: a large block would leave too few threadgroups, a tile must not be larger than one."""
    return min(_MAX_SIMDGROUPS, block // tile) if block in EPILOGUE_BLOCKS else 0


def choose_simdgroups(active: int) -> int:
    """Simdgroups of expert_down that share a token's experts: as even a split as _MAX_SIMDGROUPS allows."""
    return -(-active // -(-active // _MAX_SIMDGROUPS))


def choose_tile_rows(total: int, num_experts: int, itemsize: int = 2) -> int:
    """Rows of a tile of expert_gemm: enough that an expert of average load has its weights read once.

    At most 64 in float32, and 128 in 16 bits: 32 KiB of threadgroup memory hold no more.
    """
    average = total / num_experts
    sizes = (32, 64, 128) if itemsize == 2 else (32, 64)
    return next((rows for rows in sizes if average <= rows * 0.75), sizes[-1])


def sort_by_expert(experts: mx.array, num_experts: int) -> tuple[mx.array, mx.array, mx.array]:
    """experts [T, A] -> what expert_gemm needs and what undoes it, without a host read.

    order [P]: the pairs sorted by expert, ties in their own order. offsets int32 [E + 1]: where each expert's pairs
    start. inverse [P]: where each pair went.
    """
    flat = experts.reshape(-1)
    order = mx.argsort(flat)
    counts = mx.zeros((num_experts + 1,), mx.int32).at[flat.astype(mx.int32) + 1].add(1)
    return order, mx.cumsum(counts), mx.argsort(order)


def _tile(rows_per_lane: int, lanes: int) -> int:
    """Rows that one simdgroup computes."""
    return rows_per_lane * 32 // lanes
