"""metalsim executes the text that MLX writes, with MLX's launch rules and Metal's library."""

from __future__ import annotations

import time

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim import toolchain
from metalsim.build import MLX_HEADERS
from metalsim.capture import KernelSource, capture
from metalsim.rewrite import rewrite
from metalsim.signature import parse_kernel

LANES = 32


@pytest.fixture
def clang() -> None:
    metalsim.require()


# ---------------------------------------------------------------- the text


def captured_text(inputs: list[mx.array], source: str, **kernel: object) -> str:
    names = tuple(f"in{index}" for index in range(len(inputs)))
    given: dict = {"header": "", "atomic_outputs": False} | kernel
    template = given.pop("template", [])
    written = KernelSource("k", names, ("out",), source, **given)
    return capture(written, inputs, [mx.float32], template).text


def test_the_text_is_what_mlx_writes() -> None:
    text = captured_text(
        [mx.zeros((4, 4), dtype=mx.float16), mx.array(2.0), mx.array([1, 2, 3])],
        "out[thread_position_in_grid.x] = in0[0] * in1 + in0_strides[0];",
        header="// mine\n",
        template=[("T", mx.bfloat16), ("N", 5), ("B", True)],
    )
    assert text.startswith("// mine\ntemplate <typename T, int N, bool B>\n[[kernel]] void custom_kernel_k_")
    for part in (
        "const device float16_t* in0 [[buffer(0)]]",
        "const constant int64_t* in0_strides [[buffer(1)]]",
        "const constant float& in1 [[buffer(2)]]",
        "const constant int32_t* in2 [[buffer(3)]]",
        "device float* out [[buffer(4)]]",
        "uint3 thread_position_in_grid [[thread_position_in_grid]]",
        'template [[host_name("custom_kernel_k_',
    ):
        assert part in text


def test_fewer_than_eight_elements_are_another_text() -> None:
    texts = {size: captured_text([mx.zeros((size,))], "out[0] = in0[0];") for size in (1, 7, 8, 1000)}
    assert texts[1] == texts[7]
    assert texts[8] == texts[1000]
    assert "const constant float* in0" in texts[7]
    assert "const device float* in0" in texts[8]


def test_capturing_leaves_stdout_alone(capfd) -> None:
    print("before")
    captured_text([mx.zeros((9,))], "out[0] = in0[0] + 1;")
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("name", ["quantized.h", "steel/gemm/mma.h", "softmax.h", "utils.h", "sort.h"])
def test_rewriting_keeps_every_line_in_its_place(name) -> None:
    text = (MLX_HEADERS / "mlx/backend/metal/kernels" / name).read_text()
    assert rewrite(text).count("\n") == text.count("\n")


def test_constructs_over_several_lines_keep_their_lines() -> None:
    text = """
        /* a comment
           of two lines */
        [[kernel]] void f(uint t
            [[thread_position_in_grid
            ]]) {
            threadgroup float a[4],
                b[8];
            float4 v = float4(1, 2,
                              3, 4);
        }
        template [[host_name("f")]] [[kernel]]
            decltype(f<1,
                       2>) f<1, 2>;
        last
    """
    rewritten = rewrite(text)
    assert rewritten.count("\n") == text.count("\n")
    assert rewritten.splitlines().index("        last") == text.splitlines().index("        last")


def test_parameters_take_their_buffers_in_order() -> None:
    text = """
        // void f(device int* no) a comment
        [[kernel]] void f(const device float* a [[buffer(3)]], constant int& b,
          device T* c [[buffer(11), function_constant(x)]], threadgroup float* d [[threadgroup(1)]],
          uint3 e [[thread_position_in_grid]]) {}
    """
    found = [(each.kind, each.name, each.slot, each.attribute) for each in parse_kernel(text, "f")]
    assert found == [
        ("buffer", "a", 3, ""),
        ("buffer", "b", 4, ""),
        ("buffer", "c", 11, ""),
        ("threadgroup", "d", 1, ""),
        ("attribute", "e", -1, "thread_position_in_grid"),
    ]


# ---------------------------------------------------------------- launches


def run(
    source: str, inputs: list, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32, **options: object
) -> metalsim.Result:
    defaults: dict = {"grid": (LANES, 1, 1), "threadgroup": (LANES, 1, 1), "name": "k"}
    result = metalsim.run(
        source,
        input_names=[f"in{index}" for index in range(len(inputs))],
        output_names=["out"],
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[dtype],
        **(defaults | options),
    )
    assert not result.findings, result.report()
    return result


def test_the_grid_counts_threads_and_edge_groups_are_smaller(clang) -> None:
    source = """
        uint3 p = thread_position_in_grid;
        out[p.y * 10 + p.x] = threads_per_threadgroup.x * 100 + threads_per_threadgroup.y * 10
                            + threadgroups_per_grid.x + simdgroups_per_threadgroup;
    """
    result = run(source, [], (3, 10), mx.uint32, grid=(10, 3, 1), threadgroup=(4, 2, 1))
    widths, heights = [4] * 8 + [2] * 2, [2, 2, 1]
    assert result.outputs[0].tolist() == [[w * 100 + h * 10 + 3 + 1 for w in widths] for h in heights]
    assert result.counters.threads == 30


def test_a_group_larger_than_the_grid_shrinks(clang) -> None:
    sizes = "threads_per_threadgroup.x * 100 + dispatch_threads_per_threadgroup.x"
    result = run(f"out[thread_position_in_grid.x] = {sizes};", [], (5,), mx.uint32, grid=(5, 1, 1))
    assert result.outputs[0].tolist() == [505] * 5


def test_more_buffers_than_metal_has_are_refused(clang) -> None:
    with pytest.raises(ValueError, match="32 buffers"):
        run("out[0] = in0[0] + in30[0];", [mx.zeros((8,))] * 31, (1,))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint16, mx.int64, mx.bool_])
def test_every_dtype_goes_in_and_out(dtype, clang) -> None:
    values = mx.array([0, 1, 1, 0, 1, 0, 0, 1] * 4).astype(dtype)
    result = run("out[thread_position_in_grid.x] = in0[thread_position_in_grid.x];", [values], (LANES,), dtype)
    assert result.outputs[0].dtype == dtype
    assert mx.array_equal(result.outputs[0], values)


def test_numpy_arrays_scalars_shapes_and_strides(clang) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = in0[i / in0_shape[1] * in0_strides[0] + i % in0_shape[1] * in0_strides[1]] * in1 + in0_ndim;
    """
    values = np.arange(LANES, dtype=np.float32).reshape(4, 8)
    result = run(source, [values, np.float32(3)], (LANES,))
    assert result.outputs[0].tolist() == [3 * value + 2 for value in range(LANES)]


def test_an_initial_value_is_there_for_what_is_not_written(clang) -> None:
    result = run("if (thread_position_in_grid.x < 2) out[thread_position_in_grid.x] = 1;", [], (4,), init_value=7)
    assert result.outputs[0].tolist() == [1, 1, 7, 7]


def test_the_stand_in_is_called_like_mx_fast_metal_kernel(clang) -> None:
    seen: list[tuple[str, metalsim.Result]] = []
    arguments: dict = {
        "name": "double_it",
        "input_names": ["a"],
        "output_names": ["out"],
        "source": "out[thread_position_in_grid.x] = T(2) * a[thread_position_in_grid.x];",
    }
    call: dict = {
        "inputs": [mx.arange(16, dtype=mx.float32)],
        "template": [("T", mx.float32)],
        "grid": (16, 1, 1),
        "threadgroup": (16, 1, 1),
        "output_shapes": [(16,)],
        "output_dtypes": [mx.float32],
    }
    mx.fast.metal_kernel(**arguments)  # accepts the same words
    kernel = metalsim.metal_kernel(**arguments, on_result=lambda name, result: seen.append((name, result)))
    assert kernel(**call)[0].tolist() == [2.0 * value for value in range(16)]
    assert [name for name, _ in seen] == ["double_it"]
    with pytest.raises(AssertionError, match="UNWRITTEN_OUTPUT"):
        metalsim.metal_kernel(**arguments)(**(call | {"grid": (8, 1, 1)}))
    with pytest.raises(ValueError, match="row-contiguous"):
        metalsim.metal_kernel(**arguments, ensure_row_contiguous=False)


def test_findings_name_lines_of_header_and_source(clang) -> None:
    header = "// line 1\ntemplate <typename T>\nT fetch(const device T* p, uint i) { return p[i + 1]; }"
    result = metalsim.run(
        "uint i = thread_position_in_grid.x;\n\nout[i] = fetch(a, i);",
        header,
        name="k",
        input_names=["a"],
        output_names=["out"],
        inputs=[mx.arange(8, dtype=mx.float32)],
        output_shapes=[(8,)],
        output_dtypes=[mx.float32],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
    )
    assert [(each.kind, each.where) for each in result.findings] == [("OUT_OF_BOUNDS", "k.header:3 <- k.source:3")]
    assert (result.findings[0].memory, result.findings[0].offset, result.findings[0].thread) == ("a", 32, 7)


def test_a_profile_without_checks_is_refused(clang) -> None:
    with pytest.raises(ValueError, match="profile needs check"):
        run("out[thread_position_in_grid.x] = 1;", [], (LANES,), check=False, profile=True)


def test_a_warm_case_takes_less_than_a_second(clang) -> None:
    source = "out[thread_position_in_grid.x] = 1;"
    run(source, [], (LANES,))
    begin = time.perf_counter()
    run(source, [], (LANES,))
    assert time.perf_counter() - begin < 1


# ---------------------------------------------------------------- Metal's library


def lanes(expression: str, clang: None = None, dtype: mx.Dtype = mx.float32) -> list:
    """The expression for each lane of one simdgroup; `i` is the lane, `v` is lane * lane."""
    source = f"uint i = thread_index_in_simdgroup; float v = float(i * i); out[i] = {expression};"
    return run(source, [], (LANES,), dtype).outputs[0].tolist()


SQUARES = [float(lane * lane) for lane in range(LANES)]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_sum(v)", [sum(SQUARES)] * LANES),
        ("simd_max(v)", [961.0] * LANES),
        ("simd_min(v + 1)", [1.0] * LANES),
        ("simd_product(v < 3 ? 2.0f : 1.0f)", [4.0] * LANES),
        ("simd_prefix_inclusive_sum(v)", np.cumsum(SQUARES).tolist()),
        ("simd_prefix_exclusive_sum(v)", [0.0, *np.cumsum(SQUARES)[:-1].tolist()]),
        ("simd_shuffle(v, ushort(31 - i))", SQUARES[::-1]),
        ("simd_broadcast(v, 5)", [25.0] * LANES),
        ("simd_broadcast_first(v + 3)", [3.0] * LANES),
        ("simd_shuffle_xor(v, 3)", [SQUARES[lane ^ 3] for lane in range(LANES)]),
        ("simd_shuffle_down(v, 2)", [*SQUARES[2:], *SQUARES[-2:]]),
        ("simd_shuffle_up(v, 2)", [*SQUARES[:2], *SQUARES[:-2]]),
        ("simd_shuffle_rotate_down(v, 2)", [*SQUARES[2:], *SQUARES[:2]]),
        ("simd_shuffle_rotate_up(v, 2)", [*SQUARES[-2:], *SQUARES[:-2]]),
        ("simd_shuffle_and_fill_down(v, -v, 2)", [*SQUARES[2:], -SQUARES[0], -SQUARES[1]]),
        ("simd_shuffle_and_fill_up(v, -v, 2)", [-SQUARES[30], -SQUARES[31], *SQUARES[:-2]]),
        ("quad_sum(v)", [sum(SQUARES[lane // 4 * 4 :][:4]) for lane in range(LANES)]),
        ("quad_shuffle_xor(v, 1)", [SQUARES[lane ^ 1] for lane in range(LANES)]),
        ("float(simd_any(i == 4)) + 2 * float(simd_all(i < 32)) + 4 * float(simd_all(i < 31))", [3.0] * LANES),
        ("float(popcount(uint(ulong(simd_ballot(i % 3 == 0)))))", [11.0] * LANES),
        ("float(simd_is_first())", [1.0] + [0.0] * 31),
    ],
)
def test_simd_operations(expression, expected, clang) -> None:
    assert lanes(expression) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("float(as_type<ushort>(half(1.5h)))", 0x3E00),
        ("float(as_type<half2>(0x3C003E00u).x) + 10 * float(as_type<half2>(0x3C003E00u).y)", 11.5),
        ("float(extract_bits(0xABCDu, 4u, 8u))", 0xBC),
        ("float(popcount(0xF0F0u)) + 100 * float(clz(1u))", 3108),
        ("dot(float4(1, 2, 3, 4), float4(1, 1, 2, 2))", 17),
        ("clamp(5.0f, 0.0f, 2.0f) + max(1, 3) + min(2u, 7u) + select(10.0f, 20.0f, true)", 27),
        ("float4(float2(1, 2), float2(3, 4)).wzyx.y", 3),
        ("fma(2.0f, 3.0f, 4.0f) + rsqrt(4.0f) + precise::sqrt(9.0f) + fast::exp(0.0f)", 14.5),
        ("float(bfloat(1.0f + 1.0f / 256)) + float(half(2049.0f))", 2049),
    ],
)
def test_scalar_and_vector_functions(expression, expected, clang) -> None:
    assert lanes(expression)[0] == expected


def test_simdgroup_matrices_multiply(clang) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 8, 16)).astype(np.float32)
    source = """
        simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), left, right;
        for (ushort k = 0; k < 16; k += 8) {
            simdgroup_load(left, in0 + k, 16);
            simdgroup_load(right, in1 + k, 16, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(sum, left, right, sum);
        }
        simdgroup_store(sum, out, 8);
    """
    result = run(source, [a, b], (8, 8))
    np.testing.assert_allclose(np.array(result.outputs[0]), a @ b.T, rtol=2e-6, atol=1e-6)


# ---------------------------------------------------------------- without clang


def test_a_missing_clang_is_a_skip_and_in_ci_a_failure(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CI", "false")
    assert "clang" in (toolchain.missing() or "") or toolchain.missing() == "metalsim runs on x86-64 Linux"
    with pytest.raises(pytest.skip.Exception):
        metalsim.require()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception):
        metalsim.require()
