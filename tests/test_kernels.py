"""Kernels against their reference, executed by metalsim from the exact text that MLX would compile.

Bars: error within output rounding, no finding of any detector, the same bits in every order of execution, weights and
scales read once.
"""

from __future__ import annotations

import argparse
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
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU

from mlxmoe.bench import kernels as bench_kernels
from mlxmoe.errors import UserError
from mlxmoe.formats import LEVELS, PLANE_WIDTHS, MatrixShape, PackedMatrix, num_planes, pack_codes
from mlxmoe.kernels import (
    ACTIVATIONS,
    TABLE_WIDTH,
    UNIT,
    Activation,
    Bank,
    ExpertBanks,
    MetalKernels,
    PlaneBank,
    QuantizedBank,
    ReferenceKernels,
    activation_of,
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
MIXED = [2, 3, 4, 6, 8, 2, 4]  # levels of the experts of a bank: every level, and unequal neighbours
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
    return PlaneBank.from_matrices(matrices(len(levels), rows, columns, group_size, seed=seed), levels, added)


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
    run: Run, x: mx.array, experts: mx.array, gate: Bank, up: Bank | None, activation: Activation
) -> None:
    found = run.kernels.expert_gate_up(x, experts, gate, up, activation)
    run.clean()
    assert found.dtype == x.dtype
    exact = REFERENCE.expert_gate_up(x.astype(mx.float32), experts, gate, up, activation)
    assert error(found, exact) <= TOLERANCE[x.dtype]


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


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(6, 64, 64), (4, 768, 128), (2, 2880, 64)])
def test_a_bank_holds_the_resident_planes_and_nothing_else(rows: int, columns: int, group_size: int) -> None:
    shape = MatrixShape("w", rows, columns, group_size)
    bank = PlaneBank.from_matrices(matrices(len(MIXED), rows, columns, group_size), MIXED)
    assert bank.words.nbytes == sum(shape.code_nbytes(level) for level in MIXED)
    assert bank.scales.nbytes == len(MIXED) * shape.scales_nbytes
    assert bank.nbytes == bank.words.nbytes + bank.scales.nbytes + len(MIXED) * 32


def test_a_bank_means_what_the_planes_mean() -> None:
    whole = matrices(len(MIXED), 5, 96, 32)
    bank = PlaneBank.from_matrices(whole, MIXED)
    for expert, (matrix, level) in enumerate(zip(whole, MIXED, strict=True)):
        # scales of a lower level are rounded to float16 once more
        assert mx.allclose(bank.dequantize(expert), unpack(matrix, level), rtol=6e-4, atol=0)
        if level == matrix.level:
            assert mx.array_equal(bank.dequantize(expert), unpack(matrix, level))


def test_planes_start_on_16_bytes_where_rows_are_odd() -> None:
    bank = PlaneBank.from_matrices(matrices(3, 3, 96, 32), [3, 4, 8])
    used = [offset for row in bank.table.tolist() for offset in row[1 : 1 + num_planes(row[0])]]
    assert len({*used}) == len(used)
    assert all(offset % 4 == 0 for offset in used)


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


def test_down_with_more_experts_than_simdgroups(sim: Run) -> None:
    levels = [2] * 12
    down, experts = plane_bank(levels, 10, 64, 64), routing(2, 11, 12)
    check_down(sim, random((2, 11, 64), mx.float16), experts, random((2, 11), mx.float16, 4), down)


def test_one_expert_may_be_chosen_twice(sim: Run) -> None:
    down, experts = plane_bank(MIXED, 10, 64, 64), mx.array([[3, 3, 0, 3]], mx.uint32)
    check_down(sim, random((1, 4, 64), mx.float16), experts, random((1, 4), mx.float32, 4), down)


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
    signs = mx.where(random((columns,), mx.float32, 5) < 0, -1.0, 1.0).astype(mx.float16)
    found = sim.kernels.hadamard_blocks(x, signs, block)
    sim.clean()
    assert error(found, REFERENCE.hadamard_blocks(x.astype(mx.float32), signs, block)) <= TOLERANCE[dtype]


def test_the_transform_is_its_own_inverse_up_to_the_signs() -> None:
    x, signs = random((2, 128), mx.float32), mx.array([1.0, -1.0] * 64)
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
    hidden = random((3, 4, 128), mx.float16, 6)
    order, offsets, _ = sort_by_expert(experts, len(MIXED))
    logits = random((3, 64), mx.float16)
    return [
        kernels.expert_gate_up(x, experts, gate, up, SWIGLU),
        kernels.expert_down(hidden, experts, random((3, 4), mx.float32, 7), gate),
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
    assert len(run.results) == 5
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
    enumerations = [("SWIGLU", "SWIGLU_OAI", "GEGLU", "RELU2"), ("SOFTMAX", "SIGMOID", "SOFTMAX_CHOSEN")]
    assert enumerations == [tuple(name.upper() for name in names) for names in (ACTIVATIONS, SCORES)]
    expected = {name: str(value) for names in enumerations for value, name in enumerate(names)}
    sizes = {"UNIT": UNIT, "TABLE_WIDTH": TABLE_WIDTH, "BN": 32, "PAD": 8, "ROWS_PER_SIMDGROUP": 16}
    assert constants == expected | {name: str(size) for name, size in sizes.items()}


@pytest.mark.parametrize("level", [2, 4])
def test_weights_and_scales_are_read_once(level: int) -> None:
    require()
    run = simulated(profile=True)
    levels, experts = [level] * 6, mx.array([[4, 1, 5]], mx.uint32)
    gate, up = plane_bank(levels, 16, 512, 128), plane_bank(levels, 16, 512, 128, seed=2)
    run.kernels.expert_gate_up(random((1, 512), mx.float16), experts, gate, up, SWIGLU)
    buffers = run.last().buffers
    words, scales = 3 * 16 * 512 * level // 8, 3 * 16 * 4 * 2
    for name in ("gate", "up"):
        assert buffers[f"{name}_words"].requested == buffers[f"{name}_words"].unique_read == words
        assert buffers[f"{name}_words"].lane_utilisation == 1.0
        # the four lanes of a group ask for its scale in the same instruction
        assert buffers[f"{name}_scales"].requested == 4 * scales
        assert buffers[f"{name}_scales"].unique_read == scales
        assert buffers[f"{name}_scales"].simd_instructions == buffers[f"{name}_words"].simd_instructions // (level - 1)
    assert buffers["hidden"].stored == 3 * 16 * 2

    run.kernels.expert_down(random((1, 3, 512), mx.float16), experts, mx.ones((1, 3)), gate)
    buffers = run.last().buffers
    assert buffers["words"].requested == buffers["words"].unique_read == words
    assert buffers["scales"].unique_read == scales
    assert buffers["out"].stored == 16 * 2


def test_an_expert_of_one_tile_is_read_once_at_prefill() -> None:
    require()
    run = simulated()
    bank, experts = plane_bank([2, 4, 8], 32, 128, 64), mx.array([[0]] * 30 + [[1]] * 20 + [[2]] * 25, mx.uint32)
    check_gemm(run, random((75, 128), mx.float16), experts, bank)
    words = run.last().buffers["words"]
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
        assert row["words_requested"] == row["scales_read"] == 1.0
        assert row["findings"] == 0
        assert row["microseconds"] is None
    gate_up = report["rows"][0]
    assert gate_up["weight_nbytes"] == 2 * 4 * 128 * 256 * 17 // 64  # 2 bits, and 16 a group of 128
    assert gate_up["all_read"] <= 1.02
    assert gate_up["simple_per_weight"] <= 2.5
    assert gate_up["complex_per_weight"] <= 0.3


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
    assert all(row["words_requested"] is None for row in report["rows"])
