"""Kernels against their reference, executed by metalsim from the exact text that MLX would compile.

Bars: error within output rounding, no finding of any detector, the same bits in every order of execution, weights and
scales read once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metalsim import FIVE_SCHEDULES, Result, require
from metalsim import run as execute
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchMLP

from mlxmoe.bench import kernels as bench_kernels
from mlxmoe.errors import UserError
from mlxmoe.experts import ExpertLayer, KernelExperts, stock_banks
from mlxmoe.formats import (
    LEVELS,
    NARROW_LEVELS,
    PLANE_WIDTHS,
    MatrixShape,
    PackedMatrix,
    array_bytes,
    join_planes,
    level_scale,
    num_planes,
    pack_codes,
    unpack_codes,
)
from mlxmoe.kernels import (
    ACTIVATIONS,
    TABLE_BEYOND,
    TABLE_FACTOR,
    TABLE_PLANES,
    TABLE_SCALES,
    TABLE_WIDTH,
    UNIT,
    Activation,
    Bank,
    ExpertBanks,
    MetalKernels,
    PlaneBank,
    QuantizedBank,
    ReferenceKernels,
    Rotation,
    activation_of,
    choose_epilogue,
    choose_lanes,
    choose_simdgroups,
    choose_tile_rows,
    expert_outputs,
    metal_source,
    sort_by_expert,
    weighted_outputs,
)
from mlxmoe.reference import unpack
from mlxmoe.router import SCORES, Router
from mlxmoe.router import route as route_reference

# Largest error against the largest output: half a unit in the last place of the output's type
TOLERANCE = {mx.float32: 2e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}
DTYPES = (mx.float16, mx.bfloat16)
MIXED = [2, 3, 4, 6, 8, 2, 4]  # levels of the experts of a bank: every narrow one, and unequal neighbours
WIDE = [16, 2, 10, 8, 14, 12, 16]  # every level above 8 bits, and narrow ones between
REFERENCE = ReferenceKernels()
SWIGLU = Activation("swiglu")
SWIGLU_OAI = Activation("swiglu_oai", 1.702, 0.75)  # gpt-oss clamps at 7, where random values seldom come


class Run(NamedTuple):
    """Kernels, and what metalsim says of each launch; nothing on a GPU."""

    kernels: MetalKernels
    results: list[Result]

    def clean(self) -> None:
        """Every launch must have been without findings."""
        for result in self.results:
            assert not result.findings, result.report()

    def last(self) -> Result:
        """The last launch in metalsim, which must have been without findings."""
        self.clean()
        return self.results[-1]


def simulated(**options: Any) -> Run:
    results: list[Result] = []

    def factory(**kernel: Any) -> Callable[..., list[mx.array]]:
        def call(**launch: Any) -> list[mx.array]:
            results.append(execute(**kernel, **launch, **options))
            return results[-1].outputs

        return call

    return Run(MetalKernels(factory), results)


@pytest.fixture
def sim() -> Run:
    """metalsim, or the GPU where there is one: then these tests are the kernels' first real compiler and hardware."""
    if MetalKernels.available():
        return Run(MetalKernels(), [])
    require()
    return simulated()


def random(shape: Sequence[int], dtype: mx.Dtype, seed: int = 0, mean: float = 0.0) -> mx.array:
    values = np.random.RandomState(seed).standard_normal(shape) + mean
    return mx.array(values.astype(np.float32)).astype(dtype)


def matrices(
    experts: int, rows: int, columns: int, group_size: int, level: int = 8, seed: int = 1
) -> list[PackedMatrix]:
    """Random codes and scales: products do not ask whether a quantizer made them."""
    state, made = np.random.RandomState(seed), []
    for _ in range(experts):
        codes, planes, below = state.randint(0, 1 << level, (rows, columns)), [], level
        for width in PLANE_WIDTHS[: num_planes(level)]:
            below -= width
            planes.append(pack_codes(mx.array(((codes >> below) & ((1 << width) - 1)).astype(np.uint8)), width))
        scales = state.uniform(0.5, 2, (rows, columns // group_size)) / (2**level * np.sqrt(columns))
        shape = MatrixShape("w", rows, columns, group_size)
        gains = {low: 0.9 + 0.01 * low for low in LEVELS if low < level}
        made.append(PackedMatrix(shape, level, planes, mx.array(scales.astype(np.float16)), gains))
    return made


def plane_bank(
    levels: Sequence[int], rows: int, columns: int, group_size: int, bias: mx.Dtype | None = None, seed: int = 1
) -> PlaneBank:
    added = None if bias is None else random((len(levels), rows), bias, seed + 50)
    written = 8 if max(levels) <= 8 else 16
    return PlaneBank.from_matrices(matrices(len(levels), rows, columns, group_size, written, seed), levels, added)


def quantized_bank(
    experts: int, rows: int, columns: int, group_size: int, bits: int, mode: str, dtype: mx.Dtype, seed: int = 1
) -> QuantizedBank:
    weight = random((experts, rows, columns), mx.float32, seed) / columns**0.5
    words, scales, *biases = mx.quantize(weight.astype(dtype), group_size, bits, mode=mode)
    shape = MatrixShape("w", rows, columns, group_size)
    bias = random((experts, rows), dtype, seed + 50)
    return QuantizedBank(shape, words, scales, biases[0] if biases else None, bits, mode, bias)


def routing(tokens: int, active: int, experts: int, seed: int = 3) -> mx.array:
    """Distinct experts per token; tokens share experts as soon as there are more pairs than experts."""
    state = np.random.RandomState(seed)
    return mx.array(np.stack([state.permutation(experts)[:active] for _ in range(tokens)]).astype(np.uint32))


def error(found: mx.array, exact: mx.array) -> float:
    return (mx.abs(found.astype(mx.float32) - exact).max() / mx.abs(exact).max()).item()


def check_gate_up(
    run: Run,
    x: mx.array,
    experts: mx.array,
    gate: Bank,
    up: Bank | None,
    activation: Activation,
    rotation: Rotation | None = None,
    tolerance: float = 0.0,
) -> None:
    found = run.kernels.expert_gate_up(x, experts, gate, up, activation, rotation)
    run.clean()
    assert found.dtype == x.dtype
    exact = REFERENCE.expert_gate_up(x.astype(mx.float32), experts, gate, up, activation, rotation)
    assert error(found, exact) <= (tolerance or TOLERANCE[x.dtype])


def check_down(run: Run, hidden: mx.array, experts: mx.array, weights: mx.array, down: Bank) -> None:
    found = run.kernels.expert_down(hidden, experts, weights, down)
    run.clean()
    assert found.dtype == hidden.dtype
    exact = REFERENCE.expert_down(hidden.astype(mx.float32), experts, weights, down)
    assert error(found, exact) <= TOLERANCE[hidden.dtype]


def check_gemm(run: Run, x: mx.array, experts: mx.array, bank: Bank) -> None:
    order, offsets, _ = sort_by_expert(experts, bank.num_experts)
    rows = (order // experts.shape[-1]).astype(mx.uint32)
    found = run.kernels.expert_gemm(x, rows, offsets, bank)
    run.clean()
    exact = REFERENCE.expert_gemm(x.astype(mx.float32), rows, offsets, bank)
    assert error(found, exact) <= TOLERANCE[x.dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Banks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(8, 64, 64), (4, 768, 128), (8, 2880, 64)])
def test_a_bank_holds_the_resident_planes_and_their_scales_and_nothing_else(
    rows: int, columns: int, group_size: int
) -> None:
    shape = MatrixShape("w", rows, columns, group_size)
    bank = PlaneBank.from_matrices(matrices(len(MIXED), rows, columns, group_size), MIXED)
    assert bank.words.nbytes == sum(shape.code_nbytes(level) for level in MIXED) + len(MIXED) * shape.scales_nbytes
    assert bank.nbytes == bank.words.nbytes + len(MIXED) * 48


@pytest.mark.parametrize("levels", [MIXED, WIDE])
def test_a_bank_means_what_the_planes_mean(levels: list[int]) -> None:
    whole = matrices(len(levels), 5, 96, 32, 8 if levels is MIXED else 16)
    bank = PlaneBank.from_matrices(whole, levels)
    for expert, (matrix, level) in enumerate(zip(whole, levels, strict=True)):
        assert mx.array_equal(bank.dequantize(expert), unpack(matrix, level))


def test_an_exchange_of_16_bits_and_2() -> None:
    """Planes on both sides of the scales' entries of the table change hands."""
    whole = matrices(2, 5, 96, 32, 16)
    bank = PlaneBank.from_matrices(whole, [2, 16])
    factors = 1.0, level_scale(16, 2, whole[1].gains[2])
    bank.exchange(0, 1, [array_bytes(plane) for plane in whole[0].planes[1:]], factors)
    assert mx.array_equal(bank.dequantize(0), unpack(whole[0], 16))
    assert mx.array_equal(bank.dequantize(1), unpack(whole[1], 2))


def test_planes_and_scales_start_on_16_bytes_where_rows_are_odd() -> None:
    bank = PlaneBank.from_matrices(matrices(3, 3, 96, 32), [3, 4, 8])
    used = [row[entry] for row in bank.table.tolist() for entry in [*TABLE_PLANES[: num_planes(row[0])], TABLE_SCALES]]
    assert len({*used}) == len(used)
    assert all(offset % 4 == 0 for offset in used)


def scattered(banks: Sequence[PlaneBank], seed: int = 1) -> list[PlaneBank]:
    """The same banks in one array of words: planes and scales in any order with gaps between them, as closely aligned as
    they may lie."""
    state = np.random.RandomState(seed)
    tables = [np.array(bank.table) for bank in banks]
    parts = [
        (b, expert, entry)
        for b, table in enumerate(tables)
        for expert, row in enumerate(table)
        for entry in [*TABLE_PLANES[: num_planes(int(row[0]))], TABLE_SCALES]
    ]
    words: list[np.ndarray] = []
    end = 0
    for b, expert, entry in [parts[i] for i in state.permutation(len(parts))]:
        shape, start = banks[b].shape, int(tables[b][expert, entry])
        nbytes = shape.scales_nbytes if entry == TABLE_SCALES else shape.plane_nbytes(TABLE_PLANES.index(entry))
        gap = 1 if entry in (2, 3, TABLE_SCALES) else 1 + (end + 1) % 2  # 1-bit planes and scales: 4 bytes, others: 8
        tables[b][expert, entry] = end + gap
        words += [state.randint(0, 1 << 32, gap, np.uint32), np.array(banks[b].words[start : start + -(-nbytes // 4)])]
        end += gap + words[-1].size
    arena = mx.array(np.concatenate(words))
    return [
        dataclasses.replace(bank, words=arena, table=mx.array(table)) for bank, table in zip(banks, tables, strict=True)
    ]


def test_banks_may_share_their_words() -> None:
    banks = [plane_bank(MIXED, 5, 96, 32), plane_bank(MIXED[::-1], 12, 64, 64, seed=2)]
    shared = scattered(banks)
    for bank, other in zip(banks, shared, strict=True):
        assert bank.nbytes == other.nbytes < other.words.nbytes
        for expert in range(len(MIXED)):
            assert mx.array_equal(bank.dequantize(expert), other.dequantize(expert))


def test_an_expert_is_rewritten_in_place() -> None:
    """What streaming does: a record's bytes over those of another expert of the same levels."""
    first, second = matrices(2, 6, 64, 32, seed=1), matrices(2, 6, 64, 32, seed=2)
    bank = PlaneBank.from_matrices(first, [4, 2])
    for plane in range(3):
        bank.write_plane(0, plane, array_bytes(second[0].planes[plane]))
    bank.write_scales(0, array_bytes(second[0].scales), level_scale(8, 4, second[0].gains[4]))
    assert mx.array_equal(bank.dequantize(0), unpack(second[0], 4))
    assert mx.array_equal(bank.dequantize(1), unpack(first[1], 2))


def test_the_factor_is_kept_in_full_precision() -> None:
    """Scales that float16 cannot hold once they are multiplied."""
    tiny = matrices(1, 4, 64, 64)[0]
    tiny = tiny._replace(scales=mx.full(tiny.scales.shape, 6e-8, mx.float16), gains={2: 0.7})
    assert mx.array_equal(PlaneBank.from_matrices([tiny], [2]).dequantize(0), unpack(tiny, 2))
    large = tiny._replace(scales=mx.full(tiny.scales.shape, 6e4, mx.float16), gains={2: 1.0})
    assert mx.all(mx.isfinite(PlaneBank.from_matrices([large], [2]).dequantize(0))).item()


def test_banks_of_loaded_layers_share_their_arrays() -> None:
    def linear(bits: int, mode: str, group_size: int = 64) -> QuantizedSwitchLinear:
        return QuantizedSwitchLinear(128, 32, 4, bias=True, group_size=group_size, bits=bits, mode=mode)

    layer = linear(4, "affine")
    bank = QuantizedBank.from_linear(layer)
    assert bank is not None
    assert bank.words is layer.weight
    assert bank.nbytes == layer.weight.nbytes + layer.scales.nbytes + layer.biases.nbytes
    assert QuantizedBank.from_linear(linear(4, "mxfp4", 32)) is not None
    assert QuantizedBank.from_linear(linear(5, "affine")) is None
    assert QuantizedBank.from_linear(linear(4, "nvfp4", 16)) is None


def stock_layer(
    bits: Sequence[int] = (4, 4, 4), modes: Sequence[str] = ("affine",) * 3, group_size: int = 32
) -> ExpertLayer:
    switch = SwitchGLU(128, 64, 6, bias=True)
    for name, width, mode in zip(("gate_proj", "up_proj", "down_proj"), bits, modes, strict=True):
        switch[name] = switch[name].to_quantized(group_size, width, mode=mode)
    return ExpertLayer.from_switch(switch)


STOCK_LAYERS = [((bits,) * 3, ("affine",) * 3) for bits in NARROW_LEVELS] + [((4,) * 3, ("mxfp4",) * 3)]


@pytest.mark.parametrize(("bits", "modes"), [*STOCK_LAYERS, ((3, 3, 6), ("affine",) * 3)])
@pytest.mark.parametrize("tokens", [2, 20])  # decode and prefill
def test_a_stock_layer_without_its_builtins(bits: Sequence[int], modes: Sequence[str], tokens: int) -> None:
    layer = stock_layer(bits, modes)
    banks = stock_banks(layer)
    assert banks is not None
    assert banks.gate.words is layer.gate_proj.weight
    assert banks.decode is banks.prefill is None
    x, experts = random((tokens, 128), mx.float32), routing(tokens, 2, 6)
    assert error(KernelExperts(banks, REFERENCE)(x, experts), layer(x, experts)) <= TOLERANCE[mx.float32]


@pytest.mark.parametrize(
    "layer",
    [
        stock_layer((4, 3, 4)),  # gate and up differ
        stock_layer((5, 5, 5)),
        stock_layer((4, 4, 4), ("affine", "affine", "mxfp4")),
        ExpertLayer.from_switch(SwitchGLU(128, 64, 6)),  # not quantized
        ExpertLayer.from_switch(SwitchGLU(128, 64, 6, activation=nn.GELU())),
        ExpertLayer({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}, nn.ReLU2(), 6),
    ],
    ids=["bits of gate and up", "5 bits", "modes", "floats", "activation", "no experts"],
)
def test_layers_that_the_kernels_cannot_take_over(layer: ExpertLayer) -> None:
    assert stock_banks(layer) is None


def test_two_matrices_of_a_stock_layer() -> None:
    switch = SwitchMLP(128, 64, 6, activation=nn.ReLU2())
    nn.quantize(switch, group_size=64, bits=4)
    layer = ExpertLayer.from_switch(switch)
    banks = stock_banks(layer)
    assert banks is not None
    x, experts = random((2, 128), mx.float32), routing(2, 2, 6)
    assert error(KernelExperts(banks, REFERENCE)(x, experts), layer(x, experts)) <= TOLERANCE[mx.float32]


@pytest.mark.parametrize("phases", [("decode",), ("prefill",), ("decode", "prefill")])
@pytest.mark.parametrize("tokens", [2, 20])
def test_a_phase_may_stay_with_the_builtins(phases: tuple[str, ...], tokens: int) -> None:
    """The kernels here are wrong, so it shows who computed: weighted and unweighted."""

    class Wrong(ReferenceKernels):
        def expert_down(self, *arguments: Any) -> mx.array:
            return super().expert_down(*arguments) + 1

        def expert_gemm(self, *arguments: Any) -> mx.array:
            return super().expert_gemm(*arguments) + 1

    layer = stock_layer()
    banks = stock_banks(layer, phases)
    assert banks is not None
    module = KernelExperts(banks, Wrong())
    x, experts, weights = random((tokens, 128), mx.float32), routing(tokens, 2, 6), mx.full((tokens, 2), 0.5)
    by_kernels = ("decode" if tokens == 2 else "prefill") in phases
    expected = layer(x, experts)
    assert (error(module(x, experts), expected) > 0.01) == by_kernels
    assert (error(module.weighted(x, experts, weights), expected.mean(axis=1)) > 0.01) == by_kernels
    assert not module.parameters()


def test_activations_of_mlx_lm_are_known() -> None:
    assert activation_of(SwiGLU()) == Activation("swiglu")
    assert activation_of(SwigluOAI(1.5, 6.0)) == Activation("swiglu_oai", 1.5, 6.0)
    assert activation_of(GeGLU()) == Activation("geglu")
    assert activation_of(nn.ReLU2()) == Activation("relu2")
    assert activation_of(nn.GELU()) is None


@pytest.mark.parametrize(
    ("kind", "module"), [("swiglu", SwiGLU()), ("swiglu_oai", SwigluOAI(1.702, 0.75)), ("geglu", GeGLU())]
)
def test_reference_activations_are_those_of_mlx_lm(kind: str, module: nn.Module) -> None:
    gate, up = plane_bank([8], 64, 64, 64, mx.float32, 1), plane_bank([8], 64, 64, 64, mx.float32, 2)
    x, experts = random((3, 64), mx.float32) * 20, mx.zeros((3, 1), mx.uint32)
    found = REFERENCE.expert_gate_up(x, experts, gate, up, activation_of(module) or Activation(kind))
    bias = lambda bank: bank.bias[0]  # noqa: E731
    expected = module(x @ up.dequantize(0).T + bias(up), x @ gate.dequantize(0).T + bias(gate))
    assert mx.allclose(found[:, 0], expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Decode
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "rows", "group_size", "tokens", "active", "activation", "bias"),
    [
        (64, 20, 64, 1, 4, SWIGLU, False),  # fewer than 8 indices: another address space
        (768, 37, 128, 2, 5, Activation("geglu"), False),
        (1408, 9, 128, 8, 2, SWIGLU, False),
        (2880, 12, 64, 1, 7, SWIGLU_OAI, True),
    ],
)
def test_gate_up(
    sim: Run,
    dtype: mx.Dtype,
    columns: int,
    rows: int,
    group_size: int,
    tokens: int,
    active: int,
    activation: Activation,
    bias: bool,
) -> None:
    gate = plane_bank(MIXED, rows, columns, group_size, dtype if bias else None, 1)
    up = plane_bank(MIXED[::-1], rows, columns, group_size, dtype if bias else None, 2)
    experts = routing(tokens, active, len(MIXED))
    check_gate_up(sim, random((tokens, columns), dtype), experts, gate, up, activation)


def test_one_matrix_before_the_activation(sim: Run) -> None:
    first = plane_bank(MIXED, 19, 96, 32, mx.float16)
    check_gate_up(sim, random((2, 96), mx.float16), routing(2, 3, len(MIXED)), first, None, Activation("relu2"))


def rotation(columns: int, block: int, seed: int = 5) -> Rotation:
    signs = mx.where(random((columns,), mx.float32, seed) < 0, -1.0, 1.0)
    return Rotation(signs.astype(mx.float16), block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "rows", "group_size", "block", "activation", "bias"),
    [
        (64, 128, 64, 64, SWIGLU, False),  # a tile fills a block
        (768, 128, 128, 128, Activation("geglu"), False),  # 8 simdgroups with a tile each
        (1024, 192, 128, 64, SWIGLU_OAI, True),  # 8 simdgroups with two tiles each
        (128, 128, 32, 128, Activation("relu2"), False),
    ],
)
def test_the_rotated_epilogue(
    sim: Run, dtype: mx.Dtype, columns: int, rows: int, group_size: int, block: int, activation: Activation, bias: bool
) -> None:
    gate = plane_bank(MIXED, rows, columns, group_size, dtype if bias else None, 1)
    up = plane_bank(MIXED[::-1], rows, columns, group_size, dtype if bias else None, 2)
    second = None if activation.kind == "relu2" else up
    x, experts = random((2, columns), dtype), routing(2, 3, len(MIXED))
    check_gate_up(sim, x, experts, gate, second, activation, rotation(rows, block))
    assert len(sim.results) <= 1


def test_stock_formats_have_the_epilogue_as_well(sim: Run) -> None:
    gate, up = (quantized_bank(5, 64, 128, 64, 4, "affine", mx.float16, seed) for seed in (1, 2))
    check_gate_up(sim, random((2, 128), mx.float16), routing(2, 3, 5), gate, up, SWIGLU, rotation(64, 64))


@pytest.mark.parametrize(("columns", "block"), [(64, 256), (32, 64)])  # too large; smaller than a tile
def test_a_rotation_without_an_epilogue_is_a_second_dispatch(sim: Run, columns: int, block: int) -> None:
    gate, up = plane_bank(MIXED, 256, columns, 32), plane_bank(MIXED, 256, columns, 32, seed=2)
    x, experts = random((2, columns), mx.float16), routing(2, 3, len(MIXED))
    # hidden values are rounded before the transform and after it
    check_gate_up(sim, x, experts, gate, up, SWIGLU, rotation(256, block), 2 * TOLERANCE[mx.float16])
    assert len(sim.results) in (0, 2)


def test_the_epilogue_is_what_the_stand_alone_kernel_computes(sim: Run) -> None:
    gate, up = plane_bank(MIXED, 128, 96, 32), plane_bank(MIXED, 128, 96, 32, seed=2)
    x, experts = random((2, 96), mx.float32), routing(2, 3, len(MIXED))
    fused = sim.kernels.expert_gate_up(x, experts, gate, up, SWIGLU, rotation(128, 128))
    plain = sim.kernels.expert_gate_up(x, experts, gate, up, SWIGLU)
    sim.clean()
    assert mx.array_equal(fused, sim.kernels.hadamard_blocks(plain, *rotation(128, 128)))


@pytest.mark.parametrize(("rows", "block"), [(96, 64), (96, 96), (64, 32)])
def test_epilogues_that_do_not_fit(sim: Run, rows: int, block: int) -> None:
    bank, x, experts = plane_bank([2], rows, 64, 64), random((1, 64), mx.float16), mx.zeros((1, 1), mx.uint32)
    for kernels in (sim.kernels, REFERENCE):
        with pytest.raises(ValueError, match="no Hadamard transform"):
            kernels.expert_gate_up(x, experts, bank, bank, SWIGLU, rotation(rows, block))


@pytest.mark.parametrize("tokens", [2, 9])
def test_a_rotated_layer(tokens: int) -> None:
    """Decode and prefill: down sees rotated hidden values, and one that was rotated with them undoes it."""
    gate, up = plane_bank(MIXED, 64, 96, 32, seed=1), plane_bank(MIXED, 64, 96, 32, seed=2)
    down, turn = plane_bank(MIXED, 96, 64, 32, seed=3), rotation(64, 64)
    banks = ExpertBanks(gate, up, down, SWIGLU, turn)
    x, experts = random((tokens, 96), mx.float32), routing(tokens, 3, 7)
    weights = random((tokens, 3), mx.float32, 4)
    outputs = expert_outputs(REFERENCE, banks, x, experts)
    expert = int(experts[1, 2].item())
    hidden = nn.silu(gate.dequantize(expert) @ x[1]) * (up.dequantize(expert) @ x[1])
    rotated = mx.hadamard_transform(hidden * turn.signs.astype(mx.float32), scale=64**-0.5)
    assert mx.allclose(outputs[1, 2], down.dequantize(expert) @ rotated, rtol=1e-4, atol=1e-4)
    weighted = weighted_outputs(REFERENCE, banks, x, experts, weights)
    assert mx.allclose(weighted, (outputs * weights[..., None]).sum(axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "rows", "group_size", "tokens", "active", "bias"),
    [
        (64, 50, 64, 1, 4, False),
        (768, 12, 128, 3, 7, False),
        (1408, 33, 128, 8, 1, False),
        (2880, 9, 64, 1, 4, True),
    ],
)
def test_down(
    sim: Run, dtype: mx.Dtype, columns: int, rows: int, group_size: int, tokens: int, active: int, bias: bool
) -> None:
    down = plane_bank(MIXED, rows, columns, group_size, dtype if bias else None)
    hidden = random((tokens, active, columns), dtype)
    weights = mx.softmax(random((tokens, active), mx.float32, 9), axis=-1)
    check_down(sim, hidden, routing(tokens, active, len(MIXED)), weights, down)


@pytest.mark.parametrize("dtype", [*DTYPES, mx.float32])
def test_decode_above_8_bits(sim: Run, dtype: mx.Dtype) -> None:
    """All wide levels mixed with narrow ones in one call of each kernel: sums are float32, so nothing is less exact."""
    gate, up, down = (
        plane_bank(WIDE, *size, seed=seed) for seed, size in enumerate([(20, 96, 32)] * 2 + [(13, 64, 64)])
    )
    experts, weights = routing(2, 5, len(WIDE)), mx.softmax(random((2, 5), mx.float32, 9), axis=-1)
    check_gate_up(sim, random((2, 96), dtype), experts, gate, up, SWIGLU)
    check_down(sim, random((2, 5, 64), dtype), experts, weights, down)


def test_planes_above_8_bits_may_lie_anywhere(sim: Run) -> None:
    gate, up = scattered([plane_bank(WIDE, 13, 96, 32, seed=1), plane_bank(WIDE, 13, 96, 32, seed=2)])
    check_gate_up(sim, random((3, 96), mx.float16), routing(3, 3, len(WIDE)), gate, up, SWIGLU)


def test_down_with_more_experts_than_simdgroups(sim: Run) -> None:
    levels = [2] * 12
    down, experts = plane_bank(levels, 10, 64, 64), routing(2, 11, 12)
    check_down(sim, random((2, 11, 64), mx.float16), experts, random((2, 11), mx.float16, 4), down)


def test_one_expert_may_be_chosen_twice(sim: Run) -> None:
    down, experts = plane_bank(MIXED, 10, 64, 64), mx.array([[3, 3, 0, 3]], mx.uint32)
    check_down(sim, random((1, 4, 64), mx.float16), experts, random((1, 4), mx.float32, 4), down)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_that_share_their_words(sim: Run, dtype: mx.Dtype) -> None:
    """As streaming lays them out: a record of all projections lies as it was read."""
    gate, up, down = scattered(
        [plane_bank(MIXED, 13, 96, 32, seed=1), plane_bank(MIXED, 13, 96, 32, seed=2), plane_bank(MIXED, 11, 64, 64)]
    )
    experts = routing(3, 3, len(MIXED))
    check_gate_up(sim, random((3, 96), dtype), experts, gate, up, SWIGLU)
    check_down(sim, random((3, 3, 64), dtype), experts, random((3, 3), mx.float32, 4), down)
    check_gemm(sim, random((40, 96), dtype), routing(40, 3, len(MIXED)), gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_share_the_weight_of_an_expert(sim: Run, dtype: mx.Dtype, replicas: int) -> None:
    """R rows of a bank for each expert, chosen together with weights w/R: their mean, in one dispatch of each kernel."""
    chosen, levels = 3, MIXED * replicas
    gate, up = plane_bank(levels, 20, 64, 64, seed=1), plane_bank(levels, 20, 64, 64, seed=2)
    down = plane_bank(levels, 13, 32, 32, dtype, seed=3)
    experts, weights = routing(2, chosen, len(MIXED)), mx.softmax(random((2, chosen), mx.float32, 9), axis=-1)
    x, hidden = random((2, 64), dtype), random((2, chosen * replicas, 32), dtype)
    # the replicas of expert e: rows e, e + 7, ...
    rows = mx.concatenate([experts + len(MIXED) * r for r in range(replicas)], axis=-1)
    shares = mx.concatenate([weights / replicas] * replicas, axis=-1)
    check_gate_up(sim, x, rows, gate, up, SWIGLU)
    check_down(sim, hidden, rows, shares, down)
    assert len(sim.results) in (0, 2)

    mean = mx.zeros((2, 13))
    for token, slot, r in np.ndindex(2, chosen, replicas):
        row, place = int(rows[token, r * chosen + slot].item()), r * chosen + slot
        assert down.bias is not None
        product = down.dequantize(row) @ hidden[token, place].astype(mx.float32) + down.bias[row].astype(mx.float32)
        mean[token] += weights[token, slot] * product / replicas
    assert error(REFERENCE.expert_down(hidden.astype(mx.float32), rows, shares, down), mean) <= TOLERANCE[mx.float32]


def test_equal_replicas_are_the_expert_itself(sim: Run) -> None:
    """The same row four times with a quarter of the weight: powers of two round nothing, and sums have a fixed order."""
    down, hidden = plane_bank(MIXED, 10, 64, 64), random((2, 2, 64), mx.float32)
    experts, weights = routing(2, 2, len(MIXED)), random((2, 2), mx.float32, 4)
    once = sim.kernels.expert_down(hidden, experts, weights, down)
    four = sim.kernels.expert_down(
        mx.repeat(hidden, 4, 1), mx.repeat(experts, 4, 1), mx.repeat(weights / 4, 4, 1), down
    )
    sim.clean()
    assert error(four, once) <= TOLERANCE[mx.float32]


def test_an_expert_with_fewer_replicas_has_pairs_of_no_weight(sim: Run) -> None:
    down, hidden = plane_bank(MIXED, 10, 64, 64), random((1, 3, 64), mx.float16)
    found = sim.kernels.expert_down(hidden, mx.array([[2, 4, 4]], mx.uint32), mx.array([[0.5, 0.5, 0.0]]), down)
    sim.clean()
    exact = REFERENCE.expert_down(
        hidden[:, :2].astype(mx.float32), mx.array([[2, 4]], mx.uint32), mx.full((1, 2), 0.5), down
    )
    assert error(found, exact) <= TOLERANCE[mx.float16]


STOCK = [
    (2, "affine", 64),
    (3, "affine", 64),
    (4, "affine", 128),
    (6, "affine", 32),
    (8, "affine", 64),
    (4, "mxfp4", 32),
]


@pytest.mark.parametrize(("bits", "mode", "group_size", "dtype"), [(*s, DTYPES[i % 2]) for i, s in enumerate(STOCK)])
def test_stock_formats_at_decode(sim: Run, bits: int, mode: str, group_size: int, dtype: mx.Dtype) -> None:
    gate, up = (quantized_bank(5, 13, 384, group_size, bits, mode, dtype, seed) for seed in (1, 2))
    experts = routing(2, 3, 5)
    check_gate_up(sim, random((2, 384), dtype), experts, gate, up, SWIGLU_OAI)
    down = quantized_bank(5, 11, 128, group_size, bits, mode, dtype, 3)
    check_down(sim, random((2, 3, 128), dtype), experts, random((2, 3), mx.float32, 4), down)


@pytest.mark.parametrize("tokens", [3, 20])  # decode and prefill
def test_a_loaded_layer_of_mlx_lm(sim: Run, tokens: int) -> None:
    """All expert kernels in float32 against mlx-lm's SwitchGLU with and without the router's weights."""
    layer = SwitchGLU(128, 64, 6)
    nn.quantize(layer, group_size=32, bits=4)
    gate, up, down = (QuantizedBank.from_linear(layer[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    assert gate is not None
    assert down is not None
    banks = ExpertBanks(gate, up, down, SWIGLU)
    x, experts = random((tokens, 128), mx.float32), routing(tokens, 2, 6)
    weights = mx.softmax(random((tokens, 2), mx.float32, 7), axis=-1)
    expected = layer(x, experts)
    assert error(expert_outputs(sim.kernels, banks, x, experts), expected) <= TOLERANCE[mx.float32]
    weighted = (expected * weights[..., None]).sum(axis=-2)
    assert error(weighted_outputs(sim.kernels, banks, x, experts, weights), weighted) <= TOLERANCE[mx.float32]
    sim.clean()
    launched = {result.text.split("void custom_kernel_")[1][:11] for result in sim.results}
    assert not launched or launched == ({"expert_gate", "expert_down"} if tokens == 3 else {"expert_gemm"})


@pytest.mark.parametrize("tokens", [2, 9])
def test_layers_of_two_matrices(tokens: int) -> None:
    """SwitchMLP's kind, decode and prefill, in the reference."""
    first, second = plane_bank(MIXED, 64, 96, 32), plane_bank(MIXED, 96, 64, 32, seed=2)
    banks = ExpertBanks(first, None, second, Activation("relu2"))
    x, experts, weights = random((tokens, 96), mx.float32), routing(tokens, 3, 7), random((tokens, 3), mx.float32, 4)
    outputs = expert_outputs(REFERENCE, banks, x, experts)
    hidden = mx.square(mx.maximum(first.dequantize(int(experts[1, 2].item())) @ x[1], 0))
    assert mx.allclose(outputs[1, 2], second.dequantize(int(experts[1, 2].item())) @ hidden, rtol=1e-4, atol=1e-4)
    weighted = weighted_outputs(REFERENCE, banks, x, experts, weights)
    assert mx.allclose(weighted, (outputs * weights[..., None]).sum(axis=1), rtol=1e-4, atol=1e-4)


def test_banks_of_two_formats_are_refused(sim: Run) -> None:
    x, experts = random((1, 64), mx.float16), mx.zeros((1, 1), mx.uint32)
    affine = quantized_bank(1, 8, 64, 64, 4, "affine", mx.float16)
    with pytest.raises(AssertionError):
        sim.kernels.expert_gate_up(x, experts, affine, plane_bank([2], 8, 64, 64), SWIGLU)


# ---------------------------------------------------------------------------------------------------------------------
# Prefill
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "rows", "group_size", "tokens", "active"),
    [(128, 40, 64, 90, 3), (96, 33, 32, 3, 2), (256, 31, 128, 260, 4)],  # tiles of 64, 32 and 128 rows
)
def test_gemm(sim: Run, dtype: mx.Dtype, columns: int, rows: int, group_size: int, tokens: int, active: int) -> None:
    bank = plane_bank(MIXED, rows, columns, group_size, dtype)
    # the middle expert gets nothing
    experts = routing(tokens, active, len(MIXED) - 1)
    experts = experts + (experts >= 3).astype(mx.uint32)
    check_gemm(sim, random((tokens, columns), dtype), experts, bank)


@pytest.mark.parametrize("dtype", [*DTYPES, mx.float32])
def test_prefill_rounds_codes_above_8_bits_to_the_activations_type(sim: Run, dtype: mx.Dtype) -> None:
    """To nothing else: with codes rounded so the reference agrees within the rounding of the results. And against the codes
    as they are within twice that: each weight is off by half a unit at most, in either direction, and so is each result."""
    whole = matrices(len(WIDE), 33, 96, 32, 16)
    bank, x = PlaneBank.from_matrices(whole, WIDE), random((60, 96), dtype)
    order, offsets, _ = sort_by_expert(routing(60, 3, len(WIDE)), len(WIDE))
    found = sim.kernels.expert_gemm(x, (order // 3).astype(mx.uint32), offsets, bank)
    sim.clean()
    exact = REFERENCE.expert_gemm(x.astype(mx.float32), (order // 3).astype(mx.uint32), offsets, bank)
    assert error(found, exact) <= 2 * TOLERANCE[dtype]
    starts, parts = offsets.tolist(), []
    for e, (matrix, level) in enumerate(zip(whole, WIDE, strict=True)):
        planes = [
            unpack_codes(p, w, 96) for p, w in zip(matrix.planes[: num_planes(level)], PLANE_WIDTHS, strict=False)
        ]
        centred = (join_planes(planes).astype(mx.float32) - (2**level - 1) / 2).astype(dtype).astype(mx.float32)
        factor = level_scale(16, level, matrix.gains.get(level, 1.0))
        weight = centred * mx.repeat(matrix.scales.astype(mx.float32) * factor, 32, axis=1)
        parts.append(x[order[starts[e] : starts[e + 1]] // 3].astype(mx.float32) @ weight.T)
    assert error(found, mx.concatenate(parts)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("bits", "mode", "group_size"), STOCK)
def test_gemm_of_stock_formats(sim: Run, bits: int, mode: str, group_size: int) -> None:
    bank = quantized_bank(5, 34, 128, group_size, bits, mode, mx.bfloat16)
    # a mean far from zero is what an error in the affine bias would show in
    check_gemm(sim, random((20, 128), mx.bfloat16, mean=1.0), routing(20, 2, 5), bank)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_largest_tile_fits_threadgroup_memory(dtype: mx.Dtype) -> None:
    require()
    run = simulated()
    bank = quantized_bank(2, 8, 64, 64, 4, "affine", dtype)
    check_gemm(run, random((120, 64), dtype), routing(120, 2, 2), bank)
    assert 16384 < run.last().counters.threadgroup_bytes <= 32768


def test_sorting_by_expert() -> None:
    experts = mx.array([[2, 0], [2, 3], [0, 2]], mx.uint32)
    order, offsets, inverse = sort_by_expert(experts, 5)
    assert order.tolist() == [1, 4, 0, 2, 5, 3]
    assert offsets.tolist() == [0, 2, 2, 5, 6, 6]
    assert order[inverse].tolist() == list(range(6))


# ---------------------------------------------------------------------------------------------------------------------
# Routing and rotation
# ---------------------------------------------------------------------------------------------------------------------

ROUTERS = [
    Router(128, 8, "softmax", normalise=True),
    Router(60, 4, "softmax"),
    Router(32, 4, "softmax_chosen"),
    Router(64, 6, "softmax", 8, 3, "max", scaling=16.0),
    Router(256, 8, "sigmoid", 8, 4, "top2", True, 1e-20, 2.5),
    Router(5, 2, "sigmoid", normalise=True),
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: f"{router.num_experts}-{router.score}")
@pytest.mark.parametrize("biased", [False, True])
def test_route(sim: Run, router: Router, biased: bool) -> None:
    # logits on a coarse grid: many ties
    logits = (mx.round(random((3, router.num_experts), mx.float32) * 4) / 4).astype(mx.bfloat16)
    bias = random((router.num_experts,), mx.float32, 8) / 4 if biased else None
    found = sim.kernels.route(logits, bias, router)
    sim.clean()
    exact = route_reference(logits, bias, router)
    assert mx.array_equal(found.experts, exact.experts)
    assert mx.allclose(found.weights, exact.weights, rtol=1e-6, atol=0)


def test_a_router_of_nans_reads_nothing_out_of_bounds(sim: Run) -> None:
    found = sim.kernels.route(mx.full((1, 40), mx.nan), None, Router(40, 4))
    sim.clean()
    assert mx.all(found.experts < 40).item()


def test_among_equals_the_lowest_index_is_chosen() -> None:
    router = Router(8, 3, "softmax", num_groups=4, top_groups=2, group_score="max")
    assert route_reference(mx.zeros((1, 8)), None, router).experts.tolist() == [[0, 1, 2]]
    assert route_reference(mx.array([[0, 0, 1, 0, 0, 1, 1, 0.0]]), None, router).experts.tolist() == [[2, 5, 3]]


def test_equals_that_one_lane_holds(sim: Run) -> None:
    found = sim.kernels.route(mx.zeros((2, 100)), None, Router(100, 8))
    sim.clean()
    assert found.experts.tolist() == [list(range(8))] * 2


def test_the_bias_chooses_but_does_not_weigh() -> None:
    router = Router(4, 1, "sigmoid")
    found = route_reference(mx.array([[2.0, 0, 0, 0]]), mx.array([0, 0, 3.0, 0]), router)
    assert found.experts.tolist() == [[2]]
    assert found.weights.tolist() == [[0.5]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": 0},
        {"top_k": 0},
        {"top_k": 9},
        {"score": "tanh"},
        {"num_groups": 3},
        {"num_groups": 4, "top_groups": 5},
        {"num_groups": 8, "top_groups": 2},  # two best of one
    ],
)
def test_routers_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no router can do this"):
        Router(**{"num_experts": 8, "top_k": 2, **wrong})


@pytest.mark.parametrize(
    ("columns", "block", "dtype"),
    [(192, 64, mx.float16), (384, 128, mx.bfloat16), (1024, 512, mx.float16), (4096, 4096, mx.bfloat16)],
)
def test_hadamard_blocks(sim: Run, columns: int, block: int, dtype: mx.Dtype) -> None:
    x = random((2, columns), dtype)
    found = sim.kernels.hadamard_blocks(x, *rotation(columns, block))
    sim.clean()
    exact = REFERENCE.hadamard_blocks(x.astype(mx.float32), *rotation(columns, block))
    assert error(found, exact) <= TOLERANCE[dtype]


def test_the_transform_is_its_own_inverse_up_to_the_signs() -> None:
    x, signs = random((2, 128), mx.float32), rotation(128, 64).signs
    back = REFERENCE.hadamard_blocks(REFERENCE.hadamard_blocks(x, signs, 64), mx.ones((128,)), 64) * signs
    assert mx.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize(("columns", "block"), [(192, 128), (96, 96), (32, 32)])
def test_hadamard_blocks_that_do_not_fit(sim: Run, columns: int, block: int) -> None:
    with pytest.raises(ValueError, match="no Hadamard transform"):
        sim.kernels.hadamard_blocks(random((1, columns), mx.float16), mx.ones((columns,)), block)


# ---------------------------------------------------------------------------------------------------------------------
# Properties of every kernel
# ---------------------------------------------------------------------------------------------------------------------


def every_kernel(kernels: MetalKernels) -> list[mx.array]:
    """One small launch of each."""
    x, experts = random((3, 128), mx.float16), routing(3, 4, len(MIXED))
    gate, up = plane_bank(MIXED, 20, 128, 64), plane_bank(MIXED[::-1], 20, 128, 64, seed=2)
    wide = plane_bank(MIXED, 128, 128, 64)
    replicated = (  # three replicas each: more pairs than simdgroups
        random((3, 12, 128), mx.float16, 6),
        mx.concatenate([(experts + r) % len(MIXED) for r in range(3)], axis=-1),
        random((3, 12), mx.float32, 7) / 3,
    )
    hidden = random((3, 4, 128), mx.float16, 6)
    order, offsets, _ = sort_by_expert(experts, len(MIXED))
    logits = random((3, 64), mx.float16)
    return [
        kernels.expert_gate_up(x, experts, gate, up, SWIGLU),
        kernels.expert_gate_up(x, experts, wide, wide, SWIGLU, rotation(128, 64)),
        kernels.expert_down(hidden, experts, random((3, 4), mx.float32, 7), gate),
        kernels.expert_down(*replicated, gate),
        kernels.expert_gemm(x, (order // 4).astype(mx.uint32), offsets, gate),
        kernels.hadamard_blocks(random((1, 1024), mx.float16), mx.ones((1024,)), 1024),
        *kernels.route(logits, random((64,), mx.float32, 8), Router(64, 6, "sigmoid", 8, 3, "top2", True, 1e-20, 2.5)),
    ]


def test_the_same_bits_in_every_order_of_execution() -> None:
    require()
    outputs = [every_kernel(simulated(schedule=schedule, seed=seed).kernels) for schedule, seed in FIVE_SCHEDULES]
    for other in outputs[1:]:
        assert all(mx.array_equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_text_is_plain_and_buffers_fit_metals_table() -> None:
    require()
    run = simulated()
    every_kernel(run.kernels)
    assert len(run.results) == 7
    for result in run.results:
        assert result.text.isascii()
        assert 0 < result.text.count("[[buffer(") <= 31
        assert result.counters.threadgroup_bytes <= 32768


def test_sources_stand_alone() -> None:
    """MLX compiles text without include paths, and every file is complete without Python."""
    folder = resources.files("mlxmoe") / "metal"
    kernels = [file.name for file in folder.iterdir() if file.name.endswith(".metal")]
    assert sorted(kernels) == ["expert_decode.metal", "expert_prefill.metal", "hadamard.metal", "route.metal"]
    for name in kernels:
        text = metal_source(name)
        assert not re.search(r'#include "|#pragma once', text)
        assert text.count("constant constexpr int UNIT = 32;") <= 1
        assert "#include <metal_stdlib>" in text


def test_constants_agree_with_the_metal_files() -> None:
    text = metal_source("expert_decode.metal") + metal_source("expert_prefill.metal") + metal_source("route.metal")
    constants = dict(re.findall(r"constant constexpr int (\w+) = (\d+);", text))
    expected = {name.upper(): str(value) for names in (ACTIVATIONS, SCORES) for value, name in enumerate(names)}
    sizes = {"UNIT": UNIT, "BN": 32, "PAD": 8, "ROWS_PER_SIMDGROUP": 16}
    sizes |= {"TABLE_WIDTH": TABLE_WIDTH, "TABLE_SCALES": TABLE_SCALES, "TABLE_FACTOR": TABLE_FACTOR}
    sizes["TABLE_BEYOND"] = TABLE_BEYOND
    assert constants == expected | {name: str(size) for name, size in sizes.items()}


@pytest.mark.parametrize("level", [2, 4, 16])
def test_weights_and_scales_are_read_once(level: int) -> None:
    require()
    run = simulated(profile=True)
    levels, experts = [level] * 6, mx.array([[4, 1, 5]], mx.uint32)
    gate, up = plane_bank(levels, 16, 512, 128), plane_bank(levels, 16, 512, 128, seed=2)
    run.kernels.expert_gate_up(random((1, 512), mx.float16), experts, gate, up, SWIGLU)
    buffers = run.last().buffers
    words, scales = 3 * 16 * 512 * level // 8, 3 * 16 * 4 * 2
    for name in ("gate", "up"):
        read = buffers[f"{name}_words"]
        # the four lanes of a group ask for its scale in the same instruction
        assert read.requested == words + 4 * scales
        assert read.simd_bytes == read.unique_read == words + scales
        assert read.lane_utilisation == 1.0
        # an instruction for a unit of every plane, and one for its scale
        assert read.simd_instructions == 3 * 16 // 2 * (num_planes(level) + 1)
    assert buffers["hidden"].stored == 3 * 16 * 2
    # of a row of the table no more than the level needs
    assert buffers["gate_table"].unique_read == 3 * (32 if level <= 8 else 48)

    run.kernels.expert_down(random((1, 3, 512), mx.float16), experts, mx.ones((1, 3)), gate)
    buffers = run.last().buffers
    assert buffers["words"].simd_bytes == buffers["words"].unique_read == words + scales
    assert buffers["out"].stored == 16 * 2

    gate = plane_bank(levels, 64, 512, 128)
    run.kernels.expert_gate_up(random((1, 512), mx.float16), experts, gate, gate, SWIGLU, rotation(64, 64))
    buffers = run.last().buffers
    assert buffers["gate_words"].simd_bytes == buffers["gate_words"].unique_read == 4 * (words + scales)
    assert buffers["hidden"].stored == 3 * 64 * 2


def test_an_expert_of_one_tile_is_read_once_at_prefill() -> None:
    require()
    run = simulated()
    bank, experts = plane_bank([2, 4, 8], 32, 128, 64), mx.array([[0]] * 30 + [[1]] * 20 + [[2]] * 25, mx.uint32)
    check_gemm(run, random((75, 128), mx.float16), experts, bank)
    words = run.last().buffers["words"]
    # a scale stands on the diagonal of a matrix once, so no lane asks for it a second time
    assert words.requested == words.unique_read == bank.words.nbytes


def operations(columns: int, level: int) -> Any:
    """What one gate_up launch of 16 rows executes."""
    run = simulated(check=False, count=True, lint=False)
    bank = plane_bank([level], 16, columns, 128)
    run.kernels.expert_gate_up(random((1, columns), mx.float16), mx.zeros((1, 1), mx.uint32), bank, bank, SWIGLU)
    return run.results[-1].operations


# simple and complex operations per weight that an M1 Pro can issue while it reads the weights at 200 GB/s
@pytest.mark.parametrize(("level", "simple", "complex_"), [(2, 2.5, 0.3), (4, 6.8, 1.7)])
def test_arithmetic_of_the_inner_loop(level: int, simple: float, complex_: float) -> None:
    require()
    per_weight = operations(2048, level).marginal(operations(1024, level), 2 * 16 * 1024)
    assert 0.5 * level < per_weight["simple"] <= simple
    assert per_weight["complex"] <= complex_


@pytest.mark.parametrize(
    ("columns", "lanes"), [(64, 2), (128, 4), (512, 16), (768, 8), (1024, 32), (1408, 16), (2048, 32), (2880, 32)]
)
def test_lanes(columns: int, lanes: int) -> None:
    assert choose_lanes(columns) == lanes


def test_simdgroups_and_tiles() -> None:
    tiles = [(64, 4), (128, 4), (64, 16), (128, 64), (128, 128), (64, 128), (256, 4)]
    assert [choose_epilogue(block, tile) for block, tile in tiles] == [8, 8, 4, 2, 1, 0, 0]
    assert [choose_simdgroups(active) for active in (1, 2, 4, 6, 8, 10, 16, 22)] == [1, 2, 4, 6, 8, 5, 8, 8]
    assert [choose_tile_rows(total, 8) for total in (1, 192, 193, 384, 385, 100_000)] == [32, 32, 64, 64, 128, 128]
    assert choose_tile_rows(100_000, 8, 4) == 64


# ---------------------------------------------------------------------------------------------------------------------
# Whole projections of real models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "hidden", "group_size"),
    [(2048, 768, 128), (2880, 2880, 64), (2048, 1408, 128), (2048, 1024, 128), (2048, 512, 128), (256, 128, 128)],
)
def test_layers_of_real_models(sim: Run, dtype: mx.Dtype, width: int, hidden: int, group_size: int) -> None:
    levels = [2, 4, 3]
    gate = plane_bank(levels, hidden, width, group_size)
    down = plane_bank(levels, width, hidden, group_size, seed=3)
    experts, weights = mx.array([[2, 0]], mx.uint32), mx.array([[0.7, 0.3]])
    check_gate_up(sim, random((1, width), dtype), experts, gate, gate, SWIGLU)
    check_down(sim, random((1, 2, hidden), dtype), experts, weights, down)


# ---------------------------------------------------------------------------------------------------------------------
# mlxmoe bench kernels
# ---------------------------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench_kernels.add_arguments(parser)
    return bench_kernels.run(parser.parse_args(arguments))


def test_the_bench_table(capsys: pytest.CaptureFixture[str]) -> None:
    require()
    assert bench("--models", "demo", "--level", "2", "--prefill", "3", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["device"] == "metalsim"
    assert [row["kernel"] for row in report["rows"]] == ["expert_gate_up", "expert_down", "expert_gemm"]
    for row, line in zip(report["rows"], lines[1:], strict=False):
        assert line.startswith("demo")
        assert row["within_rounding"]
        assert row["requested"] == row["read"] == 1.0
        assert 1.0 < row["over_least"] < row["all_read"]
        assert row["findings"] == 0
        assert row["microseconds"] is None
    gate_up = report["rows"][0]
    assert gate_up["weight_nbytes"] == 2 * 4 * 128 * 256 * 17 // 64  # 2 bits, and 16 a group of 128
    assert gate_up["all_read"] <= 1.02
    assert gate_up["simple_per_weight"] <= 2.5
    assert gate_up["complex_per_weight"] <= 0.3
    assert all(row["over_least"] <= 1.02 for row in report["rows"])


def test_the_bench_of_the_rotated_epilogue(capsys: pytest.CaptureFixture[str]) -> None:
    require()
    assert bench("--models", "demo", "--level", "2", "--rotation", "128", "--json") == 0
    gate_up, _ = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert gate_up["requested"] == gate_up["read"] == 1.0
    assert gate_up["over_least"] <= 1.02
    with pytest.raises(UserError, match="the 2880 hidden values of gpt-oss-20b are no multiple of --rotation 128"):
        bench("--models", "gpt-oss-20b", "--rotation", "128")


def test_a_wrong_kernel_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    require()
    right = ReferenceKernels.expert_down
    monkeypatch.setattr(ReferenceKernels, "expert_down", lambda *arguments: right(*arguments) * 1.01)
    assert bench("--models", "demo", "--level", "2") == 1
    assert "expert_down of demo at 2 bits differs from its reference" in capsys.readouterr().err


class Unavailable:
    """metalsim on a machine that cannot run it."""

    @staticmethod
    def missing() -> str:
        return "clang-19 is not installed"


def test_the_bench_without_a_gpu_and_without_a_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metalsim", Unavailable)
    with pytest.raises(UserError, match="clang-19 is not installed"):
        bench("--models", "demo")
    monkeypatch.delitem(sys.modules, "metalsim")
    monkeypatch.setattr(bench_kernels, "__file__", "/nowhere/mlxmoe/bench/kernels.py")
    with pytest.raises(UserError, match="does not carry the simulator"):
        bench("--models", "demo")
    with pytest.raises(UserError, match="--prefill is -1"):
        bench("--prefill", "-1")


def test_the_bench_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Mac's path with the simulator for a GPU: it times, and says nothing of traffic."""
    require()

    class OnGPU(MetalKernels):
        def __init__(self) -> None:
            super().__init__(simulated(check=False).kernels._metal_kernel)

        @staticmethod
        def available() -> bool:
            return True

    monkeypatch.setattr(bench_kernels, "MetalKernels", OnGPU)
    monkeypatch.setattr(bench_kernels, "_REPEATS", 2)
    assert bench("--models", "demo", "--level", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["device"] == "metal"
    assert all(row["microseconds"] > 0 and row["gigabytes_per_second"] > 0 for row in report["rows"])
    assert all(row["requested"] is None for row in report["rows"])
