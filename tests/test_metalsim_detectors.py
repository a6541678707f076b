"""Each detector of metalsim finds its seeded defect, at the line of the defect, and is silent on the clean twin."""

from __future__ import annotations

from collections.abc import Sequence

import metalsim
import mlx.core as mx
import numpy as np
import pytest

THREADS = 128
ROWS, COLUMNS = 6, 1000
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

# One row per threadgroup: four simdgroups sum parts of a dot product and meet in threadgroup memory.
GEMV = """
    constexpr uint SIMDGROUPS = 4;
    threadgroup float part[SIMDGROUPS];
    uint row = threadgroup_position_in_grid.x;
    uint t = thread_position_in_threadgroup.x;
    uint sg = simdgroup_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup;
    float acc = 0.0f;
    for (uint k = t; k < COLUMNS; k += SIMDGROUPS * 32) {
        acc += float(w[row * COLUMNS + k]) * float(x[k]);
    }
    acc = simd_sum(acc);
    if (lane == 0) { part[sg] = acc; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t == 0) {
        float sum = 0.0f;
        for (uint i = 0; i < SIMDGROUPS; i++) { sum += part[i]; }
        out[row] = T(sum);
    }
"""


@pytest.fixture(autouse=True)
def clang() -> None:
    metalsim.require()


@pytest.fixture(scope="module")
def operands() -> tuple[mx.array, mx.array, np.ndarray]:
    """w [ROWS, COLUMNS], x [COLUMNS], and their product in float32."""
    generator = np.random.default_rng(0)
    w = mx.array(generator.normal(size=(ROWS, COLUMNS)).astype(np.float16))
    x = mx.array(generator.normal(size=COLUMNS).astype(np.float16))
    return w, x, np.array(w.astype(mx.float32) @ x.astype(mx.float32))


def run_gemv(source: str, operands: tuple[mx.array, mx.array, np.ndarray], **options: object) -> metalsim.Result:
    w, x, _ = operands
    return metalsim.run(
        source,
        name="gemv",
        input_names=["w", "x"],
        output_names=["out"],
        inputs=[w, x],
        output_shapes=[(ROWS,)],
        output_dtypes=[mx.float16],
        grid=(ROWS * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        template=[("T", mx.float16), ("COLUMNS", COLUMNS)],
        **options,  # type: ignore[arg-type]
    )


def line_of(source: str, text: str) -> str:
    """`gemv.source:N` for the line that holds `text`."""
    return f"gemv.source:{source[: source.index(text)].count(chr(10)) + 1}"


def edited(*edits: tuple[str, str]) -> str:
    source = GEMV
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("schedule", metalsim.SCHEDULES)
def test_the_clean_kernel_has_no_findings_and_the_right_result(schedule, operands) -> None:
    result = run_gemv(GEMV, operands, schedule=schedule)
    assert not result.findings, result.report()
    np.testing.assert_allclose(np.array(result.outputs[0].astype(mx.float32)), operands[2], rtol=1e-3)


# name, edits of the clean kernel, kind that must be found, text on the line that must be named
DEFECTS: list[tuple[str, list[tuple[str, str]], str, str]] = [
    ("no barrier", [(BARRIER, "")], "UNINITIALISED_THREADGROUP", "part[i]"),
    ("no barrier, the race", [(BARRIER, "")], "RACE_WRITE_AFTER_READ", "part[sg] = acc"),
    (
        "barrier for no memory",
        [("mem_flags::mem_threadgroup", "mem_flags::mem_none")],
        "RACE_READ_AFTER_WRITE",
        "part[i]",
    ),
    ("barrier for device memory", [("mem_threadgroup)", "mem_device)")], "RACE_READ_AFTER_WRITE", "part[i]"),
    (
        "a simdgroup barrier instead",
        [("threadgroup_barrier(", "simdgroup_barrier(")],
        "UNINITIALISED_THREADGROUP",
        "part[i]",
    ),
    ("one read too many", [("k < COLUMNS;", "k < COLUMNS + 8;")], "OUT_OF_BOUNDS", "float(x[k])"),
    ("a read before the buffer", [("float(x[k])", "float(x[int(k) - 1])")], "OUT_OF_BOUNDS", "x[int(k)"),
    ("a read far outside", [("float(x[k])", "float(x[k + 100000000])")], "OUT_OF_BOUNDS", "float(x[k"),
    ("a null pointer", [("float acc = 0.0f;", "float acc = *(device float*)(ulong)(8 * t);")], "WILD_POINTER", "ulong"),
    ("past threadgroup memory", [("i < SIMDGROUPS;", "i <= SIMDGROUPS;")], "THREADGROUP_OUT_OF_BOUNDS", "part[i]"),
    ("one simdgroup does not write", [("lane == 0)", "lane == 0 && sg != 2)")], "UNINITIALISED_THREADGROUP", "part[i]"),
    ("the output is read first", [("out[row] = T", "out[row] += T")], "UNINITIALISED_OUTPUT", "out[row]"),
    (
        "a barrier for half",
        [("threadgroup_barrier(", "if (sg < 2) threadgroup_barrier(")],
        "DIVERGENT_BARRIER",
        "sg < 2",
    ),
    (
        "a return before the barrier",
        [("acc = simd_sum", "if (t >= 96) return;\n    acc = simd_sum")],
        "DIVERGENT_BARRIER",
        BARRIER,
    ),
    ("a sum of some lanes", [("acc = simd_sum", "if (lane < 20) acc = simd_sum")], "DIVERGENT_SIMD", "lane < 20"),
    (
        "a simdgroup barrier for some",
        [("acc = simd_sum", "if (lane < 20) simdgroup_barrier(mem_flags::mem_threadgroup);\n    acc = simd_sum")],
        "DIVERGENT_SIMD_BARRIER",
        "lane < 20",
    ),
    (
        "a shuffle from a lane that is away",
        [("acc = simd_sum(acc)", "if (lane < 20) acc = simd_shuffle_down(acc, 4)")],
        "INACTIVE_LANE",
        "lane < 20",
    ),
    (
        "two threads, two values",
        [("if (t == 0) {", "if (t < 2) {"), ("T(sum)", "T(sum + t)")],
        "RACE_WRITE_AFTER_WRITE",
        "out[row]",
    ),
    ("two threads, one value", [("if (t == 0) {", "if (t < 2) {")], "SAME_VALUE_WRITE", "out[row]"),
    ("two threadgroups", [("out[row] =", "out[row / 2] =")], "RACE_WRITE_AFTER_WRITE", "out[row / 2]"),
    (
        "twice by one thread",
        [
            ("out[row] = T(sum);", "out[row] = T(0); " + BARRIER + " out[row] = T(sum);"),
            ("if (t == 0) {", "{"),
            ("out[row]", "if (t == 0) out[row]"),
        ],
        "WRITTEN_TWICE",
        "T(0)",
    ),
    ("an output that nobody writes", [("out[row] =", "if (row != 5) out[row] =")], "UNWRITTEN_OUTPUT", ""),
    (
        "a write to an input",
        [("out[row] =", "((device half*)x)[row] = T(1); out[row] =")],
        "WRITE_TO_INPUT",
        "device half*",
    ),
    (
        "lanes that meet without a barrier",
        [("acc = simd_sum", "threadgroup float met[128]; met[t] = acc; acc += met[t ^ 1];\n    acc = simd_sum")],
        "RACE_READ_AFTER_WRITE",
        "met[t ^ 1]",
    ),
    (
        "a vector load off its boundary",
        [("float acc = 0.0f;", "half4 v = *(const device half4*)(x + 2); float acc = float(v.x + v.w);")],
        "MISALIGNED",
        "half4",
    ),
    (
        "past an array of the thread",
        [("float acc = 0.0f;", "float a[4] = {1, 2, 3, 4}; float acc = a[min(t, 4u)];")],
        "ARRAY_OUT_OF_BOUNDS",
        "float a[4]",
    ),
    ("division by zero", [("float acc = 0.0f;", "float acc = float(7u / t);")], "DIVISION_BY_ZERO", "7u / t"),
    ("too much threadgroup memory", [("part[SIMDGROUPS]", "part[9000]")], "THREADGROUP_TOO_BIG", ""),
]


@pytest.mark.parametrize(("edits", "kind", "place"), [case[1:] for case in DEFECTS], ids=[case[0] for case in DEFECTS])
def test_a_defect_is_found_at_its_line(edits, kind, place, operands) -> None:
    source = edited(*edits)
    result = run_gemv(source, operands)
    assert kind in result.kinds(), result.report()
    places = [finding.where for finding in result.findings if finding.kind == kind]
    if place:
        assert any(where.split(" <- ")[0] == line_of(source, place) for where in places), result.report()


# edits that look like a defect above and are none
TWINS: list[tuple[str, list[tuple[str, str]]]] = [
    ("both flags", [("mem_flags::mem_threadgroup", "mem_flags::mem_threadgroup | mem_flags::mem_device")]),
    ("a barrier in uniform flow", [("threadgroup_barrier(", "if (row < 100) threadgroup_barrier(")]),
    ("a return of whole simdgroups after the barrier", [("if (t == 0) {", "if (t >= 32) return;\n    if (t == 0) {")]),
    ("a sum in a branch that all lanes take", [("acc = simd_sum", "if (sg < 5) acc = simd_sum")]),
    (
        "a sum by one simdgroup",
        [
            ("float sum = 0.0f;", "float sum = 0.0f;"),
            ("if (t == 0) {", "if (sg == 0) simd_sum(acc);\n    if (t == 0) {"),
        ],
    ),
    (
        "a shuffle that all lanes take",
        [("acc = simd_sum(acc)", "for (ushort d = 16; d > 0; d /= 2) acc += simd_shuffle_xor(acc, d)")],
    ),
    (
        "lanes that meet at a simdgroup barrier",
        [
            (
                "acc = simd_sum",
                "threadgroup float met[128]; met[t] = acc;\n    simdgroup_barrier(mem_flags::mem_threadgroup);\n"
                "    acc += 0 * met[t ^ 1];\n    acc = simd_sum",
            )
        ],
    ),
    (
        "a vector load on its boundary",
        [("float acc = 0.0f;", "half4 v = *(const device half4*)(x + 4); float acc = 0 * float(v.x + v.w);")],
    ),
    ("inside an array of the thread", [("float acc = 0.0f;", "float a[4] = {0, 0, 0, 0}; float acc = a[min(t, 3u)];")]),
    ("division by a number", [("float acc = 0.0f;", "float acc = 0 * float(7u / (t + 1));")]),
    ("all of threadgroup memory", [("part[SIMDGROUPS]", "part[8192]")]),
]


@pytest.mark.parametrize("edits", [case[1] for case in TWINS], ids=[case[0] for case in TWINS])
def test_the_clean_twin_passes(edits, operands) -> None:
    result = run_gemv(edited(*edits), operands)
    assert not result.findings, result.report()
    np.testing.assert_allclose(np.array(result.outputs[0].astype(mx.float32)), operands[2], rtol=1e-3)


def test_a_read_far_outside_ends_the_run_before_it_happens(operands) -> None:
    result = run_gemv(edited(("float(x[k])", "float(x[k + 100000000])")), operands)
    assert result.kinds() == {"OUT_OF_BOUNDS"}, result.report()
    assert [finding.count for finding in result.findings] == [1]


def test_the_race_check_needs_no_luck_with_the_order(operands) -> None:
    """With a barrier for the wrong memory every schedule gives the right result; each run finds the race all the same."""
    source = edited(("mem_threadgroup)", "mem_none)"))
    for schedule, seed in metalsim.FIVE_SCHEDULES:
        result = run_gemv(source, operands, schedule=schedule, seed=seed)
        np.testing.assert_allclose(np.array(result.outputs[0].astype(mx.float32)), operands[2], rtol=1e-3)
        assert "RACE_READ_AFTER_WRITE" in result.kinds(), (schedule, seed)


@pytest.mark.parametrize(("offset", "kinds"), [(2, {"MISALIGNED"}), (4, {"MISALIGNED"}), (8, set())])
def test_without_optimisation_every_promise_of_alignment_is_checked(offset, kinds, operands) -> None:
    """A float4 at 8 of 16 bytes: the optimised run looks at 8 bytes of alignment only."""
    load = f"float4 v = *(const device float4*)(x + {offset}); float acc = float(as_type<half2>(v.w).x);"
    result = run_gemv(edited(("float acc = 0.0f;", load)), operands, optimise="-O0")
    assert result.kinds() == kinds, result.report()


# ---------------------------------------------------------------- small kernels


def run_small(
    source: str,
    inputs: Sequence[mx.array] = (),
    size: int = 64,
    threads: int = 64,
    dtype: mx.Dtype = mx.uint32,
    **options: object,
) -> metalsim.Result:
    """A kernel with inputs in0, in1, ... and one output, one threadgroup of 64 threads by default."""
    defaults: dict[str, object] = {"grid": (threads, 1, 1), "threadgroup": (64, 1, 1), "name": "small"}
    return metalsim.run(
        "uint t = thread_position_in_grid.x;\n" + source,
        input_names=[f"in{index}" for index in range(len(inputs))],
        output_names=["out"],
        inputs=inputs,
        output_shapes=[(size,)],
        output_dtypes=[dtype],
        **(defaults | options),  # type: ignore[arg-type]
    )


def test_atomics_do_not_race_with_each_other_but_with_plain_writes() -> None:
    atomic = "atomic_fetch_add_explicit(&out[t % 4], t, memory_order_relaxed);"
    options = {"size": 4, "init_value": 0, "atomic_outputs": True}
    clean = run_small(atomic, **options)
    assert not clean.findings, clean.report()
    assert clean.outputs[0].tolist() == [sum(range(first, 64, 4)) for first in range(4)]
    for schedule in ("forward", "reverse"):  # plain after atomic, atomic after plain
        mixed = run_small(atomic + "\nif (t == 63) *(device uint*)&out[0] = 1;", schedule=schedule, **options)
        assert "RACE_WRITE_AFTER_WRITE" in mixed.kinds(), mixed.report()


def test_a_thread_that_waits_for_nobody_is_a_livelock() -> None:
    wait = "while (atomic_load_explicit(&out[1], memory_order_relaxed) == 0) {}\n"
    store = "if (t == 63) atomic_store_explicit(&out[1], 1u, memory_order_relaxed);\n"
    options = {"size": 2, "init_value": 0, "atomic_outputs": True}
    assert run_small(wait + store, **options).kinds() == {"LIVELOCK"}
    assert not run_small(store + wait, **options).findings


@pytest.mark.parametrize("check", [True, False])
def test_a_thread_that_never_ends_is_stopped(check) -> None:
    body = "volatile uint spin = 1; while (spin) {} out[t] = t;"
    result = run_small(body, check=check, time_limit=1)
    assert [(finding.kind, finding.where) for finding in result.findings] == [("TIMEOUT", "small.source:2")]


def test_an_array_that_no_thread_can_hold_is_rejected() -> None:
    body = "volatile uint a[{n}]; for (uint i = 0; i < {n}; i++) a[{n} - 1 - i] = i; out[t] = a[t];"
    with pytest.raises(metalsim.CompileError, match="too big"):
        run_small(body.format(n=100_000))
    assert not run_small(body.format(n=4000)).findings


def test_a_read_only_buffer_may_be_read_by_all_and_neighbours_may_be_written() -> None:
    result = run_small("out[t] = in0[0] + in0[t];", [mx.arange(64, dtype=mx.uint32)])
    assert not result.findings, result.report()
    assert result.outputs[0].tolist() == list(range(64))


def test_readers_of_two_simdgroups_are_both_remembered() -> None:
    """The later reader is in the writer's own simdgroup and behind a barrier; the earlier one in another is not."""
    body = """
        threadgroup uint shared[1];
        if (t == 0) shared[0] = 7;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint seen = t == 40 || t == 1 ? shared[0] : 0;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (t == WRITER) shared[0] = seen;
        out[t] = seen;
    """
    for schedule in ("forward", "reverse"):
        racing = run_small(body.replace("WRITER", "2"), schedule=schedule)
        assert racing.kinds() & {"RACE_WRITE_AFTER_READ", "RACE_READ_AFTER_WRITE"}, racing.report()
    clean = run_small(body.replace("t == 40 || t == 1", "t == 1").replace("WRITER", "2"))
    assert not clean.findings, clean.report()


def test_a_simdgroup_barrier_orders_its_own_simdgroup_only() -> None:
    """The reader passed a simdgroup barrier after the write of another simdgroup, which orders nothing between them."""
    body = """
        threadgroup uint shared[64];
        shared[t] = t;
        if (t < 32) simdgroup_barrier(mem_flags::mem_threadgroup);
        out[t] = shared[READ];
    """
    racing = run_small(body.replace("READ", "t < 32 ? t + 32 : t"), schedule="reverse")
    assert racing.kinds() == {"RACE_READ_AFTER_WRITE"}, racing.report()
    assert not run_small(body.replace("READ", "t < 32 ? t ^ 1 : t")).findings


def test_the_last_reader_does_not_hide_the_one_before() -> None:
    """Lanes 1 and 2 read, then lane 2 writes: no race with itself, but one with lane 1."""
    body = """
        threadgroup uint shared[1];
        if (t == 0) shared[0] = 7;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint seen = READERS ? shared[0] : 0;
        if (t == 2) shared[0] = seen + 1;
        out[t] = seen;
    """
    racing = run_small(body.replace("READERS", "(t == 1 || t == 2)"))
    assert racing.kinds() == {"RACE_WRITE_AFTER_READ"}, racing.report()
    assert not run_small(body.replace("READERS", "t == 2")).findings


def test_a_reader_in_another_threadgroup_is_remembered() -> None:
    """Both threadgroups read the value that the second then changes."""
    options = {"size": 128, "threads": 128, "init_value": 1}
    body = "uint seen = READ; if (t == 64) out[0] = seen + 1; if (t == 0) out[1] = seen;"
    racing = run_small(body.replace("READ", "t == 0 || t == 64 ? out[0] : 0"), **options)
    assert racing.kinds() == {"RACE_WRITE_AFTER_READ"}, racing.report()
    assert racing.findings[0].detail.endswith("of another threadgroup")
    assert not run_small(body.replace("READ", "t == 64 ? out[0] : 0"), **options).findings


# ---------------------------------------------------------------- typing

# name, statement that Metal rejects, twin that it accepts; x is `const device half*`
TYPING = [
    (
        "device to threadgroup pointer",
        "threadgroup const half* p = x; acc = p[0];",
        "const device half* p = x; acc = p[0];",
    ),
    ("device to thread pointer", "thread const half* p = x; acc = p[0];", "thread float* p = &acc; *p = 1;"),
    ("pointer without address space", "const half* p = x; acc = p[0];", "device const half* p = x; acc = p[0];"),
    ("reference without address space", "float& r = acc; r = 1;", "thread float& r = acc; r = 1;"),
    ("cast to a pointer without address space", "acc = *(half*)x;", "acc = *(const device half*)x;"),
    ("write to a const input", "x[0] = 0.0h;", "acc = x[0];"),
    ("min of float and half", "acc = min(acc, x[0]);", "acc = min(acc, float(x[0]));"),
    ("min of int and uint", "acc = min(1, t);", "acc = min(1u, t);"),
    ("exp of an int", "acc = exp(1);", "acc = exp(1.0);"),
    ("implicit float to bfloat", "bfloat b = acc; acc = b;", "bfloat b = bfloat(acc); acc = b;"),
    ("half to bfloat", "bfloat b = x[0]; acc = b;", "bfloat b = bfloat(float(x[0])); acc = b;"),
    ("half times bfloat", "bfloat b = bfloat(acc); acc = x[0] * b;", "bfloat b = bfloat(acc); acc = float(x[0]) * b;"),
    ("half plus bfloat", "bfloat b = bfloat(acc); b = b + bfloat(1); acc = b + x[0];", "half h = acc; acc = h + x[0];"),
    (
        "half compared with bfloat",
        "bfloat b = bfloat(acc); if (b < x[0]) acc = 1;",
        "half h = acc; if (h < x[0]) acc = 1;",
    ),
    ("half4 times float", "half4 b = half4(x[0]); b = b * acc;", "half4 b = half4(x[0]); b = b * half(acc);"),
    ("float4 from half4", "float4 c = half4(x[0]); acc = c.x;", "float4 c = float4(half4(x[0])); acc = c.x;"),
    (
        "a vector of three of four",
        "float4 v = float4(acc, acc, acc); acc = v.x;",
        "float4 v = float4(acc, acc, acc, acc); acc = v.x;",
    ),
    ("the C++ library", "acc = std::max(0.0f, 1.0f);", "acc = metal::max(0.0f, 1.0f);"),
    ("a name that is not there", "acc = fastest_exp(acc);", "acc = fast::exp(acc);"),
]


@pytest.mark.parametrize(("wrong", "right"), [case[1:] for case in TYPING], ids=[case[0] for case in TYPING])
def test_what_metal_rejects_is_rejected_at_its_line(wrong, right, operands) -> None:
    source = edited(("float acc = 0.0f;", f"float acc = 0.0f; {wrong} acc = 0.0f;"))
    with pytest.raises(metalsim.CompileError) as raised:
        run_gemv(source, operands)
    assert line_of(source, wrong) + ": error:" in str(raised.value)
    run_gemv(edited(("float acc = 0.0f;", f"float acc = 0.0f; {right} acc = 0.0f;")), operands)


def test_a_threadgroup_variable_is_declared_in_the_kernel(operands) -> None:
    helper = "// a helper\nfloat meet(threadgroup float* there, uint t) {{\n  {}\n  return float(t);\n}}"
    source = edited(("float acc = 0.0f;", "float acc = 0 * meet(part, t);"))
    run_gemv(source, operands, header=helper.format("threadgroup float* other = there;"))
    with pytest.raises(metalsim.CompileError, match=r"gemv.header:3: error: a threadgroup variable outside"):
        run_gemv(source, operands, header=helper.format("threadgroup float own[4];"))


def test_metal_literals_are_floats_and_halves_convert(operands) -> None:
    accepted = "acc = acc * 2.0 + 1.0; half h = acc; h = acc * 2.0f; acc = 0.0bf;"
    run_gemv(edited(("float acc = 0.0f;", f"float acc = 0.0f; {accepted}")), operands)


@pytest.mark.parametrize("statement", ["*(device float*)(ulong)8 = 1;", "if (t == 0) out[0] = 7u / in0[0];"])
def test_an_unchecked_run_survives_what_the_cpu_stops(statement) -> None:
    """Without checks nothing warns before the access: the trap itself is the finding."""
    zero = mx.zeros((64,), dtype=mx.uint32)
    result = run_small(f"out[t] = t;\n{statement}", [zero], check=False)
    assert [(finding.kind, finding.where) for finding in result.findings] == [("FAULT", "small.source:3")]
    assert not run_small("out[t] = t;", [zero], check=False).findings
