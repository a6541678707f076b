"""metalsim's proof of itself: MLX's own kernels, unmodified, against MLX's CPU operations.

The reference is the CPU operation on inputs cast to float32: MLX's own float16 and bfloat16 products on the CPU
accumulate in low precision and are off by up to a tenth.
"""

from __future__ import annotations

import itertools

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim import mlx_kernels
from metalsim.launch import Options
from metalsim.mlx_kernels import Quantized

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Largest error over the largest value of the reference: the rounding of the result (half a unit in the last place is
# 4.9e-4 and 3.9e-3 relative to the value itself), and for float32 another order of summation.
TOLERANCE = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4.2e-3}
# At one bit MLX's kernel adds eight neighbours of x in the type of x before it goes on in float32.
TOLERANCE_1_BIT = {"float32": 2e-6, "float16": 1.2e-3, "bfloat16": 1.2e-2}
# Hadamard and softmax results are rounded once more on the way.
ROUNDED_TWICE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}

BITS = (1, 2, 3, 4, 8)
GROUPS = (32, 64, 128)
ALL_FORMATS = list(itertools.product(DTYPES, BITS, GROUPS))
# every dtype, bit width and group size once or twice; -m slow runs all of them
FORMATS = [("float32", 4, 64), ("float16", 2, 64), ("float16", 3, 128), ("bfloat16", 1, 32), ("bfloat16", 8, 64)]


def formats(few: list[tuple[str, int, int]]) -> list:
    """The few by default, the rest with the slow mark."""
    rest = [each for each in ALL_FORMATS if each not in few]
    return [*few, *(pytest.param(*each, marks=pytest.mark.slow) for each in rest)]


@pytest.fixture(autouse=True)
def clang() -> None:
    metalsim.require()


def values(seed: int, *shape: int, dtype: str = "float32") -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(DTYPES[dtype])


def wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def tolerance(dtype: str, bits: int) -> float:
    return TOLERANCE_1_BIT[dtype] if bits == 1 else TOLERANCE[dtype]


def product(x: mx.array, weights: Quantized) -> mx.array:
    scales, biases = wide(weights.scales), wide(weights.biases)
    return mx.quantized_matmul(wide(x), weights.words, scales, biases, True, weights.group_size, weights.bits)


def check(result: metalsim.Result, reference: mx.array, largest: float, allowed: frozenset[str] = frozenset()) -> None:
    assert result.kinds() <= allowed, result.report()
    expected = np.array(reference)
    error = np.abs(np.array(wide(result.outputs[0])) - expected).max() / np.abs(expected).max()
    assert error <= largest


@pytest.mark.parametrize(("dtype", "bits", "group"), formats(FORMATS))
def test_qmv_fast(dtype: str, bits: int, group: int) -> None:
    weights = mlx_kernels.quantize(values(1, 64, 1024, dtype=dtype), group, bits)
    x = values(2, 2, 1024, dtype=dtype)
    check(mlx_kernels.qmv(x, weights, fast=True), product(x, weights), tolerance(dtype, bits))


# the last tile of rows is computed twice when N is no multiple of 8: the same values, by two threadgroups
@pytest.mark.parametrize(("N", "K", "allowed"), [(8, 384, set()), (33, 1152, {"SAME_VALUE_WRITE"}), (5, 768, set())])
@pytest.mark.parametrize(("dtype", "bits", "group"), formats([("float16", 3, 64), ("bfloat16", 4, 32)]))
def test_qmv_of_odd_shapes(dtype: str, bits: int, group: int, N: int, K: int, allowed: set[str]) -> None:
    weights = mlx_kernels.quantize(values(1, N, K, dtype=dtype), group, bits)
    x = values(2, 1, K, dtype=dtype)
    check(mlx_kernels.qmv(x, weights, fast=False), product(x, weights), tolerance(dtype, bits), frozenset(allowed))


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "general"])
@pytest.mark.parametrize(("dtype", "bits", "group"), formats([("float16", 2, 128), ("bfloat16", 4, 64)]))
def test_gather_qmv(dtype: str, bits: int, group: int, fast: bool) -> None:
    weights = mlx_kernels.quantize(values(1, 5, 64, 512, dtype=dtype), group, bits)
    x = values(2, 2, 1, 512, dtype=dtype)
    tokens, experts = [0, 0, 1, 1], [4, 1, 1, 0]
    result = mlx_kernels.gather_qmv(x, weights, tokens, experts, fast=fast)
    reference = mx.gather_qmm(
        wide(x),
        weights.words,
        wide(weights.scales),
        wide(weights.biases),
        mx.array(tokens, mx.uint32),
        mx.array(experts, mx.uint32),
        transpose=True,
        group_size=group,
        bits=bits,
    )
    check(result, reference, tolerance(dtype, bits))


@pytest.mark.parametrize("M", [32, 45])
@pytest.mark.parametrize(("dtype", "bits", "group"), formats([("float32", 8, 64), ("bfloat16", 2, 64)]))
def test_qmm(dtype: str, bits: int, group: int, M: int) -> None:
    weights = mlx_kernels.quantize(values(1, 96, 256, dtype=dtype), group, bits)
    x = values(2, M, 256, dtype=dtype)
    check(mlx_kernels.qmm(x, weights), product(x, weights), tolerance(dtype, bits))


@pytest.mark.parametrize(("dtype", "bits", "group"), formats([("float16", 4, 64)]))
def test_gather_qmm_with_ragged_and_empty_experts(dtype: str, bits: int, group: int) -> None:
    rows = [3, 0, 17, 16, 9]
    weights = mlx_kernels.quantize(values(1, len(rows), 96, 256, dtype=dtype), group, bits)
    x = values(2, sum(rows), 256, dtype=dtype)
    experts = np.repeat(np.arange(len(rows)), rows).astype(np.uint32)
    reference = mx.gather_qmm(
        wide(x)[:, None, :],
        weights.words,
        wide(weights.scales),
        wide(weights.biases),
        rhs_indices=mx.array(experts),
        transpose=True,
        group_size=group,
        bits=bits,
    )[:, 0]
    check(mlx_kernels.gather_qmm(x, weights, rows), reference, tolerance(dtype, bits))


def sizes(few: list[tuple[str, int]], more: list[int]) -> list:
    rest = [each for each in itertools.product(DTYPES, more) if each not in few]
    return [*few, *(pytest.param(*each, marks=pytest.mark.slow) for each in rest)]


@pytest.mark.parametrize(("dtype", "N"), sizes([("float32", 128), ("bfloat16", 1024)], [64, 128, 1024, 2048, 4096]))
def test_hadamard(dtype: str, N: int) -> None:
    x = values(1, 6, N, dtype=dtype)
    check(mlx_kernels.hadamard(x), mx.hadamard_transform(wide(x)), ROUNDED_TWICE[dtype])


@pytest.mark.parametrize(("dtype", "N"), sizes([("float32", 1000), ("float16", 33)], [31, 64, 128, 4096]))
def test_softmax(dtype: str, N: int) -> None:
    x = values(1, 5, N, dtype=dtype)
    check(mlx_kernels.softmax(x), mx.softmax(wide(x), axis=-1), ROUNDED_TWICE[dtype])


@pytest.mark.parametrize(("dtype", "D"), sizes([("float16", 128)], [64, 128]))
def test_sdpa_vector(dtype: str, D: int) -> None:
    q, k, v = (
        values(1, 1, 8, 1, D, dtype=dtype),
        values(2, 1, 2, 77, D, dtype=dtype),
        values(3, 1, 2, 77, D, dtype=dtype),
    )
    reference = mx.fast.scaled_dot_product_attention(wide(q), wide(k), wide(v), scale=D**-0.5)
    check(mlx_kernels.sdpa_vector(q, k, v), reference, TOLERANCE[dtype])


def test_five_schedules_give_the_same_bits() -> None:
    weights = mlx_kernels.quantize(values(1, 3, 64, 512, dtype="bfloat16"), 64, 4)
    x = values(2, 2, 1, 512, dtype="bfloat16")
    results = []
    for schedule, seed in metalsim.FIVE_SCHEDULES:
        options = Options(schedule=schedule, seed=seed)
        results.append(mlx_kernels.gather_qmv(x, weights, [0, 1], [2, 0], fast=True, options=options).outputs[0])
    assert all(mx.array_equal(results[0], other) for other in results[1:])


def test_weights_are_requested_once_and_counted_exactly() -> None:
    """affine_gather_qmv_fast reads each chosen expert's words, scales and biases once, and x once per threadgroup."""
    weights = mlx_kernels.quantize(values(1, 3, 64, 512, dtype="float16"), 64, 4)
    x = values(2, 1, 1, 512, dtype="float16")
    result = mlx_kernels.gather_qmv(x, weights, [0, 0], [2, 0], fast=True, options=Options(profile=True))
    buffers = result.buffers
    of_two_experts = {
        name: 2 * getattr(weights, part)[0].nbytes for name, part in (("w", "words"), ("scales", "scales"))
    }
    for name, minimum in of_two_experts.items():
        assert buffers[name].simd_bytes == buffers[name].unique_read == buffers[name].line_bytes == minimum
    assert buffers["w"].requested == of_two_experts["w"]
    assert buffers["scales"].requested == 4 * of_two_experts["scales"]  # a lane has 16 weights, a scale is for 64
    assert buffers["w"].lane_utilisation == 1.0
    assert buffers["x"].unique_read == x.nbytes
    assert buffers["x"].line_bytes == 2 * (64 // 8) * x.nbytes  # two pairs, a threadgroup for 8 rows each
    assert buffers["y"].unique_written == buffers["y"].stored == 2 * 64 * 2
