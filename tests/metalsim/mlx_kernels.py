"""MLX's own Metal kernels, unmodified from the installed package, with the launch that MLX gives them.

They are metalsim's proof of itself: what it says of them must agree with MLX's CPU operations. Each function returns a
Result whose one output has the dtype of x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .build import MLX_HEADERS, MLX_UTILS, Flavour, compile_unit, unit
from .execute import count_operations, from_host, to_host
from .launch import Argument, Geometry, Options, launch
from .operations import Operations
from .result import Result
from .signature import entry, parse_kernel

_KERNELS = Path("mlx/backend/metal/kernels")
_GEMM = str(_KERNELS / "steel/gemm/gemm.h")
_QUANTIZED_UTILS = str(_KERNELS / "quantized_utils.h")
_METAL_NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
_ALIGNED = {200: "true", 201: "true", 202: "true"}  # function constants of the steel kernels: M, N, K are whole tiles


class MLXKernel(NamedTuple):
    """A kernel in one of MLX's headers, instantiated."""

    header: str  # in MLX's kernels folder
    function: str
    template: str
    includes: Sequence[str] = (MLX_UTILS,)
    constants: Mapping[int, str] = {}
    before: str = ""  # text that MLX puts before the header


class Quantized(NamedTuple):
    """What mx.quantize returns, with its settings. words [..., N, K * bits / 32]."""

    words: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


def quantize(weights: mx.array, group_size: int, bits: int) -> Quantized:
    """mx.quantize in affine mode."""
    words, scales, biases = mx.quantize(weights, group_size=group_size, bits=bits)
    return Quantized(words, scales, biases, group_size, bits)


def execute(
    kernel: MLXKernel, buffers: Sequence[np.ndarray], output: int, geometry: Geometry, dtype: mx.Dtype, options: Options
) -> Result:
    """Runs a kernel on buffers in the order of their indices; `output` is the index of the one that it writes."""
    header = str(_KERNELS / kernel.header)
    text = kernel.before + (MLX_HEADERS / header).read_text()
    parameters = parse_kernel(text, kernel.function)
    # the header is part of the prelude: its many instances then share one reading of it
    built = unit(
        "",
        entry(kernel.function, kernel.template, parameters, {}),
        includes=[*kernel.includes, header],
        constants=kernel.constants,
        before=kernel.before,
    )
    path = compile_unit(built, Flavour(options.check))
    names = {each.slot: each.name for each in parameters if each.kind == "buffer"}
    arguments = [
        Argument(names[index], np.atleast_1d(array), "out" if index == output else "in")
        for index, array in enumerate(buffers)
    ]
    operations = count_operations(built, arguments, geometry) if options.operations else Operations()
    launched = launch(path, arguments, geometry, options)
    return Result(
        outputs=[from_host(buffers[output], dtype)],
        findings=launched.findings,
        counters=launched.counters,
        buffers=launched.buffers,
        operations=operations,
        text=text,
    )


def qmv(x: mx.array, weights: Quantized, *, fast: bool, options: Options = Options()) -> Result:  # noqa: B008
    """affine_qmv and affine_qmv_fast: x [M, K] -> [M, N]. The fast one wants N % 8 == 0 and K % 512 == 0."""
    M, K = x.shape
    N = weights.words.shape[0]
    template = f"<{_METAL_NAMES[x.dtype]}, {weights.group_size}, {weights.bits}, false"
    kernel = _quantized("affine_qmv_fast" if fast else "affine_qmv", template + (", false>" if fast else ">"))
    y = to_host(mx.zeros((M, N), dtype=x.dtype))
    no_batch = [_ints(1), _ints(M, K), _longs(0, 0), _ints(1), _ints(1), _longs(0), _longs(0), _longs(0)]
    buffers = [*_hosts(weights), to_host(x), y, _ints(K), _ints(N), *no_batch]
    geometry = Geometry((M, (N + 7) // 8, 1), (32, 2, 1), True)
    return execute(kernel, buffers, 4, geometry, x.dtype, options)


def qmm(x: mx.array, weights: Quantized, *, options: Options = Options()) -> Result:  # noqa: B008
    """affine_qmm_t: x [M, K] -> [M, N] in tiles of 32, with simdgroup matrices. N % 32 == 0."""
    M, K = x.shape
    N = weights.words.shape[0]
    kernel = _quantized("affine_qmm_t", f"<{_METAL_NAMES[x.dtype]}, {weights.group_size}, {weights.bits}, true, false>")
    y = to_host(mx.zeros((M, N), dtype=x.dtype))
    no_batch = [_ints(1), _ints(M, K), _longs(0, 0), _ints(1), _ints(1), _longs(0), _longs(0), _longs(0)]
    buffers = [*_hosts(weights), to_host(x), y, _ints(K), _ints(N), _ints(M), *no_batch]
    geometry = Geometry(((N + 31) // 32, (M + 31) // 32, 1), (32, 2, 2), True)
    return execute(kernel, buffers, 4, geometry, x.dtype, options)


def gather_qmv(
    x: mx.array,
    weights: Quantized,
    tokens: Sequence[int],
    experts: Sequence[int],
    *,
    fast: bool,
    options: Options = Options(),  # noqa: B008
) -> Result:
    """affine_gather_qmv and its fast form: x [T, 1, K], words [E, N, .] -> [pairs, 1, N] for (token, expert) pairs."""
    T, M, K = x.shape
    E, N, words = weights.words.shape
    groups = weights.scales.shape[-1]
    pairs = len(experts)
    kernel = _quantized(
        "affine_gather_qmv_fast" if fast else "affine_gather_qmv",
        f"<{_METAL_NAMES[x.dtype]}, {weights.group_size}, {weights.bits}>",
    )
    y = to_host(mx.zeros((pairs, M, N), dtype=x.dtype))
    buffers = [
        *(*_hosts(weights), to_host(x), np.array(tokens, np.uint32), np.array(experts, np.uint32), y),
        *(_ints(K), _ints(N)),
        *(_ints(1), _ints(T, M, K), _longs(M * K, K, 1)),
        *(_ints(1), _ints(E, N, words), _longs(N * words, words, 1)),
        *(_longs(N * groups, groups, 1), _longs(N * groups, groups, 1)),
        *(_ints(1), _ints(pairs), _longs(1), _longs(1)),
    ]
    geometry = Geometry((M, (N + 7) // 8, pairs), (32, 2, 1), True)
    return execute(kernel, buffers, 6, geometry, x.dtype, options)


def gather_qmm(
    x: mx.array,
    weights: Quantized,
    rows_per_expert: Sequence[int],
    *,
    options: Options = Options(),  # noqa: B008
) -> Result:
    """affine_gather_qmm_rhs: x [rows, K], sorted by expert -> [rows, N]; experts may be empty. N % 32 == 0."""
    tile_rows, tile_columns = 16, 32
    M, K = x.shape
    E, N, _ = weights.words.shape
    kernel = _quantized(
        "affine_gather_qmm_rhs",
        f"<{_METAL_NAMES[x.dtype]}, {weights.group_size}, {weights.bits}, {tile_rows}, {tile_columns}, 32, 1, 2, true>",
        {**_ALIGNED, 200: "false"},
    )
    starts = np.cumsum([0, *rows_per_expert[:-1]]).astype(np.int32)
    y = to_host(mx.zeros((M, N), dtype=x.dtype))
    buffers = [to_host(x), *_hosts(weights), starts, y, _ints(M), _ints(N), _ints(K), _ints(E)]
    tiles = sum((rows + tile_rows - 1) // tile_rows for rows in rows_per_expert)
    geometry = Geometry((N // tile_columns, tiles + 2, 1), (32, 2, 1), True)
    return execute(kernel, buffers, 5, geometry, x.dtype, options)


def hadamard(x: mx.array, *, options: Options = Options()) -> Result:  # noqa: B008
    """hadamard_n: x [rows, N] -> the same shape, scaled by 1 / sqrt(N). N is a power of two."""
    rows, N = x.shape
    radix = min(N, 16)
    kernel = MLXKernel(
        "hadamard.h",
        "hadamard_n",
        f"<{_METAL_NAMES[x.dtype]}, {N}, {radix}, 4>",
        # MLX generates this function for sizes m * 2^k; hadamard_n does not call it
        before="METAL_FUNC void hadamard_radix_m(thread float *x) {}\n",
    )
    buffers = [to_host(x), to_host(mx.zeros_like(x)), np.array([N**-0.5], np.float32)]
    return execute(kernel, buffers, 1, Geometry((1, rows, 1), (N // radix, 1, 1), True), x.dtype, options)


def softmax(x: mx.array, *, options: Options = Options()) -> Result:  # noqa: B008
    """softmax_single_row: x [rows, N] -> the same shape; N of at most 4096."""
    rows, N = x.shape
    reads = 4
    threads = (-(-N // reads) + 31) // 32 * 32
    kernel = MLXKernel(
        "softmax.h",
        "softmax_single_row",
        f"<{_METAL_NAMES[x.dtype]}, float, {reads}>",
        before=f"#define SOFTMAX_N_READS {reads}\n",
    )
    buffers = [to_host(x), to_host(mx.zeros_like(x)), _ints(N)]
    return execute(kernel, buffers, 1, Geometry((rows, 1, 1), (threads, 1, 1), True), x.dtype, options)


def sdpa_vector(q: mx.array, k: mx.array, v: mx.array, *, options: Options = Options()) -> Result:  # noqa: B008
    """sdpa_vector without mask: q [1, H, 1, D], k and v [1, H_kv, L, D] -> [1, H, 1, D]."""
    _, heads, _, D = q.shape
    _, kv_heads, length, _ = k.shape
    constants = dict.fromkeys(range(20, 26), "false")
    kernel = MLXKernel(
        "sdpa_vector.h", "sdpa_vector", f"<{_METAL_NAMES[q.dtype]}, {D}>", constants={**constants, 26: "0"}
    )
    strides = [np.array([stride], np.uint64) for stride in (length * D, D, length * D, D)]
    unused = [np.zeros(1, np.int32)] * 7
    scale = np.array([D**-0.5], np.float32)
    buffers = [to_host(q), to_host(k), to_host(v), to_host(mx.zeros_like(q))]
    buffers += [_ints(heads // kv_heads), _ints(length), *strides, scale, *unused]
    return execute(kernel, buffers, 3, Geometry((heads, 1, 1), (1024, 1, 1), True), q.dtype, options)


def _quantized(function: str, template: str, constants: Mapping[int, str] = _ALIGNED) -> MLXKernel:
    return MLXKernel("quantized.h", function, template, (MLX_UTILS, _GEMM, _QUANTIZED_UTILS), constants)


def _hosts(weights: Quantized) -> list[np.ndarray]:
    return [to_host(weights.words), to_host(weights.scales), to_host(weights.biases)]


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _longs(*values: int) -> np.ndarray:
    return np.array(values, np.int64)
