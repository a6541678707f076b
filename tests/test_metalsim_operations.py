"""The count of operations: exact on code whose operations are known, and what it says of MLX's own kernel."""

from __future__ import annotations

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim import mlx_kernels
from metalsim.launch import Options
from metalsim.operations import CLASSES, cost, instrument

IR = """\
define void @f(ptr %0, i32 %1) {
  %3 = icmp eq i32 %1, 0
  br i1 %3, label %4, label %9

4:                                                ; preds = %2, %4
  %5 = phi i32 [ 0, %2 ], [ %7, %4 ]
  %6 = getelementptr inbounds <4 x float>, ptr %0, i32 %5
  %7 = add nuw i32 %5, 1
  %8 = icmp eq i32 %7, 9
  br i1 %8, label %9, label %4

9:                                                ; preds = %4, %2
  ret void
}
"""


@pytest.fixture
def clang() -> None:
    metalsim.require()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  %5 = fmul float %3, %4, !dbg !12", ("simple", 1)),
        ("  %5 = and <4 x i32> %3, <i32 3, i32 3, i32 3, i32 3>", ("simple", 4)),
        ("  %5 = tail call float @llvm.fmuladd.f32(float %1, float %2, float %3)", ("simple", 1)),
        ("  %5 = call <2 x half> @llvm.fma.v2f16(<2 x half> %1, <2 x half> %2, <2 x half> %3)", ("simple", 2)),
        ("  %5 = select i1 %3, float %4, float %1", ("simple", 1)),
        ("  %5 = lshr exact i32 %3, 4", ("complex", 1)),
        ("  %5 = mul nsw i32 %3, 7", ("complex", 1)),
        ("  %5 = uitofp <4 x i32> %3 to <4 x float>", ("complex", 4)),
        ("  %5 = fdiv float %3, %4", ("special", 1)),
        ("  %5 = call float @msl_expf(float noundef %3) #4", ("special", 1)),
        ("  %5 = fpext half %3 to float", ("free", 1)),
        ("  %5 = fpext bfloat %3 to float", ("simple", 1)),
        ("  %5 = zext i16 %3 to i32", ("free", 1)),
        ("  %5 = getelementptr inbounds float, ptr %3, i64 %4", ("address", 1)),
        ("  %5 = load <4 x i32>, ptr %3, align 16", ("memory", 1)),
        ("  store float %3, ptr %4, align 4", ("memory", 1)),
        ("  br i1 %8, label %9, label %4", ("control", 1)),
        ("  %5 = call ptr @msl_xch(ptr noundef %3, i32 noundef 4, i32 noundef 15) #9", ("simd", 1)),
        ("  %5 = call ptr @msl_xch(ptr noundef %3, i32 noundef 16, i32 noundef 23) #9", ("matrix", 1)),
        ("  call void @msl_tgbarrier(i32 noundef 2) #9", ("simd", 1)),
        ("  call void @llvm.lifetime.start.p0(i64 4, ptr %3)", ("none", 1)),
    ],
)
def test_the_class_of_an_instruction(line: str, expected: tuple[str, int]) -> None:
    assert cost(line) == expected


def test_each_block_gets_a_counter_behind_its_phis() -> None:
    text, blocks = instrument(IR)
    costs = [dict(*each.costs.values()) for each in blocks]  # all from one place, which is unknown
    assert costs == [
        {"simple": 1, "control": 1},
        {"free": 1, "address": 1, "simple": 2, "control": 1},
        {"control": 1},
    ]
    lines = text.splitlines()
    assert lines[lines.index("  %5 = phi i32 [ 0, %2 ], [ %7, %4 ]") + 1].startswith("  %msl.old.1 = load i64")
    assert lines[-1] == "@msl_block_counts = global [3 x i64] zeroinitializer, align 16"


# one AND, one conversion and one FMA for each of the 16 weights in a word, which a shift brings down
DOT = """
    uint lane = thread_index_in_simdgroup;
    float sum = 0.0f;
    for (uint i = lane; i < WORDS; i += 32) {
        uint word = w[i];
        const device float* part = x + i * 16;
        #pragma clang loop unroll(full)
        for (uint j = 0; j < 16; j++) {
            sum += float(word & 3u) * part[j];
            word >>= 2;
        }
    }
    sum = simd_sum(sum);
    if (lane == 0) { out[0] = sum; }
"""


def count_dot(words: int) -> metalsim.Result:
    generator = np.random.default_rng(0)
    return metalsim.run(
        DOT,
        name="dot",
        input_names=["w", "x"],
        output_names=["out"],
        inputs=[
            generator.integers(0, 2**32, size=words, dtype=np.uint32),
            generator.normal(size=words * 16).astype(np.float32),
        ],
        output_shapes=[(1,)],
        output_dtypes=[mx.float32],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        template=[("WORDS", words)],
        count=True,
    )


def test_the_inner_loop_of_a_known_kernel(clang) -> None:
    long, short = count_dot(512), count_dot(256)
    assert not long.findings, long.report()
    per_weight = long.operations.marginal(short.operations, 256 * 16)
    assert 2.0 <= per_weight["simple"] <= 2.2  # and, fma; the rest is the loop over words
    assert 15 / 16 + 1 <= per_weight["complex"] <= 2.1  # a conversion, and a shift for all but the first
    assert per_weight["matrix"] == per_weight["special"] == 0
    # one reduction per lane, whatever the length
    assert long.operations.total["simd"] == short.operations.total["simd"] == 32
    assert per_weight["simd"] == 0
    assert set(long.operations.per(1)) == set(CLASSES)


def test_operations_are_told_apart_by_line_and_function(clang) -> None:
    header = """
float twice(float v) { return v + v; }
float thrice(float v) { return twice(v) + v; }
"""
    result = metalsim.run(
        "uint i = thread_position_in_grid.x;\nout[i] = thrice(a[i]);",
        header,
        name="k",
        input_names=["a"],
        output_names=["out"],
        inputs=[mx.arange(64, dtype=mx.float32)],
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        count=True,
    )
    assert not result.findings
    operations = result.operations
    assert operations.by_line["k.header:2"]["simple"] == 64
    assert operations.by_line["k.header:3"]["simple"] == 64
    assert operations.by_function["twice"]["simple"] == 64
    assert operations.by_function["thrice"]["simple"] == 128
    assert operations.by_line["k.source:2"]["memory"] == 128


def test_a_simd_operation_is_one_and_its_insides_are_none(clang) -> None:
    result = metalsim.run(
        "uint i = thread_position_in_grid.x;\nout[i] = simd_sum(a[i]);",
        name="k",
        input_names=["a"],
        output_names=["out"],
        inputs=[mx.arange(64, dtype=mx.float32)],
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        count=True,
    )
    there = result.operations.by_line["k.source:2"]
    assert (there["simd"], there["memory"], there["address"]) == (64, 128, 128)
    total = result.operations.total
    assert total["simple"] == total["complex"] == 0
    # what clang merged has lost its place, and is counted: one look into the result per lane
    assert total["memory"] <= 128 + 64 + 2


@pytest.mark.parametrize("bits", [2, 4])
def test_mlx_spends_a_conversion_on_each_weight(bits, clang) -> None:
    """affine_qmv_fast: AND, conversion and FMA per weight, and its share of scaling x for four rows at a time."""
    counted = []
    for K in (1024, 2048):
        weights = mlx_kernels.quantize(mx.random.normal((16, K)).astype(mx.float16), 64, bits)
        x = mx.random.normal((1, K)).astype(mx.float16)
        counted.append(mlx_kernels.qmv(x, weights, fast=True, options=Options(operations=True)).operations)
    per_weight = counted[1].marginal(counted[0], 16 * 1024)
    assert 1.0 <= per_weight["complex"] <= 1.2
    assert 2.5 <= per_weight["simple"] <= 3.3
