"""The tables of docs/metalsim.md: `PYTHONPATH=tests python -m metalsim.measure`.

What metalsim says of MLX's own kernels: errors against float32 CPU operations, times, bytes and operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from . import mlx_kernels
from .launch import Options
from .mlx_kernels import Quantized, quantize
from .operations import summary
from .result import Result

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
UNCHECKED = Options(check=False)


def wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def error(result: Result, reference: mx.array) -> float:
    """Largest error over the largest value of the reference."""
    expected = np.array(reference)
    return float(np.abs(np.array(wide(result.outputs[0])) - expected).max() / np.abs(expected).max())


def row(name: str, call: Callable[..., Result], reference: mx.array) -> None:
    """One line: error, seconds of the first call, then milliseconds of execution with and without checks."""
    begin = time.perf_counter()
    checked = call(options=Options())
    first = time.perf_counter() - begin
    unchecked = call(options=UNCHECKED)
    print(
        f"| {name} | {error(checked, reference):.1e} | {first:.2f} s | {checked.counters.seconds * 1e3:.1f} ms "
        f"| {unchecked.counters.seconds * 1e3:.1f} ms | {' '.join(sorted(checked.kinds())) or 'none'} |"
    )


def product(x: mx.array, weights: Quantized) -> mx.array:
    scales, biases = wide(weights.scales), wide(weights.biases)
    return mx.quantized_matmul(wide(x), weights.words, scales, biases, True, weights.group_size, weights.bits)


def errors() -> None:
    """Each kernel in each dtype, 4 bits where it is quantized."""
    for name, dtype in DTYPES.items():
        weights = quantize(mx.random.normal((64, 1024)).astype(dtype), 64, 4)
        x = mx.random.normal((2, 1024)).astype(dtype)
        row(f"affine_qmv_fast {name}", partial(mlx_kernels.qmv, x, weights, fast=True), product(x, weights))
        row(f"affine_qmv {name}", partial(mlx_kernels.qmv, x, weights, fast=False), product(x, weights))
        x = mx.random.normal((32, 1024)).astype(dtype)
        row(f"affine_qmm_t {name}", partial(mlx_kernels.qmm, x, weights), product(x, weights))
        x = mx.random.normal((6, 1024)).astype(dtype)
        row(f"hadamard_n {name}", partial(mlx_kernels.hadamard, x), mx.hadamard_transform(wide(x)))
        row(f"softmax_single_row {name}", partial(mlx_kernels.softmax, x), mx.softmax(wide(x), axis=-1))
        q = mx.random.normal((1, 8, 1, 128)).astype(dtype)
        k, v = (mx.random.normal((1, 2, 77, 128)).astype(dtype) for _ in range(2))
        attention = mx.fast.scaled_dot_product_attention(wide(q), wide(k), wide(v), scale=128**-0.5)
        row(f"sdpa_vector {name}", partial(mlx_kernels.sdpa_vector, q, k, v), attention)


def traffic() -> None:
    """affine_gather_qmv_fast with 8 experts of 768 x 2048: bytes over the bytes that must be read."""
    experts = list(range(8))
    for bits in (2, 3, 4, 8):
        weights = quantize(mx.random.normal((8, 768, 2048)).astype(mx.float16), 64, bits)
        x = mx.random.normal((1, 1, 2048)).astype(mx.float16)
        options = Options(profile=True)
        result = mlx_kernels.gather_qmv(x, weights, [0] * 8, experts, fast=True, options=options)
        buffers = result.buffers
        names = ("w", "scales", "biases")
        least = sum(buffers[name].nbytes for name in names)
        asked = sum(buffers[name].simd_bytes for name in names)
        unique = sum(buffers[name].unique_read for name in names)
        lines = sum(buffers[name].line_bytes for name in (*names, "x"))
        print(
            f"| {bits} | {least:,} | {asked / least:.3f} | {unique / least:.3f} | {lines / (least + x.nbytes):.3f} "
            f"| {buffers['w'].lane_utilisation:.2f} | {result.counters.seconds:.2f} s |"
        )


def operations() -> None:
    """affine_qmv_fast: operations per weight of its inner loop."""
    for name in ("float16", "bfloat16"):
        for bits in (1, 2, 3, 4, 8):
            counted = []
            for K in (1024, 2048):
                weights = quantize(mx.random.normal((16, K)).astype(DTYPES[name]), 64, bits)
                x = mx.random.normal((1, K)).astype(DTYPES[name])
                result = mlx_kernels.qmv(x, weights, fast=True, options=Options(operations=True))
                counted.append(result.operations)
            print(f"| {name} | {bits} | {summary(counted[1].marginal(counted[0], 16 * 1024))} |")


if __name__ == "__main__":
    mx.random.seed(0)
    errors()
    traffic()
    operations()
