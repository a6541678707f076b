"""One dispatch of a compiled kernel over host arrays."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from . import abi
from .locate import locate
from .result import BufferStats, Counters, Finding

Schedule = Literal["forward", "reverse", "random", "round_robin"]
# in the order of `enum Schedule` in runtime/threads.cpp
SCHEDULES: tuple[Schedule, ...] = ("forward", "reverse", "random", "round_robin")
MAX_REPORTS = 200
MAX_THREADS = 1024
MAX_BUFFERS = 31


class Argument(NamedTuple):
    """A buffer: C-contiguous bytes. An "out" starts as 0xFF (NaN) and must be written; an "inout" keeps its values."""

    name: str
    array: np.ndarray
    access: Literal["in", "out", "inout"] = "in"


class Geometry(NamedTuple):
    """A launch: grid counts threads, as dispatchThreads does, or threadgroups, as dispatchThreadgroups does."""

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    grid_counts_threadgroups: bool = False


class Options(NamedTuple):
    """How to execute: with all detectors, with lane utilisation, in which order the threads run; whether to count."""

    check: bool = True
    profile: bool = False
    schedule: Schedule = "forward"
    seed: int = 1
    operations: bool = False  # counted in a run of its own
    time_limit: int = 120  # seconds


class Launched(NamedTuple):
    findings: list[Finding]
    counters: Counters
    buffers: dict[str, BufferStats]


def launch(path: Path, arguments: Sequence[Argument], geometry: Geometry, options: Options) -> Launched:
    """Runs the kernel; writes into the arrays that are not "in"."""
    if int(np.prod(geometry.threadgroup)) > MAX_THREADS:
        raise ValueError(f"threadgroup {geometry.threadgroup} has more than {MAX_THREADS} threads")
    if len(arguments) > MAX_BUFFERS:
        raise ValueError(f"{len(arguments)} buffers, and Metal has {MAX_BUFFERS}")
    if options.profile and not options.check:
        raise ValueError("profile needs check: only then is every access seen")
    kernel = abi.load(path)
    buffers = (abi.Buffer * len(arguments))(*map(_buffer, arguments))
    reports = (abi.Report * MAX_REPORTS)()
    record = abi.Launch(
        entry=kernel.entry,
        grid=(ctypes.c_uint32 * 3)(*geometry.grid),
        group=(ctypes.c_uint32 * 3)(*geometry.threadgroup),
        buffer_count=len(arguments),
        schedule=SCHEDULES.index(options.schedule),
        seed=options.seed,
        check=options.check,
        profile=options.profile,
        max_reports=MAX_REPORTS,
        grid_counts_groups=geometry.grid_counts_threadgroups,
        time_limit=options.time_limit,
        buffers=buffers,
        reports=reports,
        module_low=kernel.low,
        module_high=kernel.high,
    )
    begin = time.perf_counter()
    abi.runtime().msl_dispatch(ctypes.byref(record))
    seconds = time.perf_counter() - begin
    names = [argument.name for argument in arguments]
    findings = _findings(record, reports, path, kernel.low, names)
    if options.check and not record.aborted:
        findings += [
            Finding("UNWRITTEN_OUTPUT", memory=name, size=buffer.unwritten, detail="bytes were never written")
            for name, buffer in zip(names, buffers, strict=True)
            if buffer.unwritten
        ]
    stats = {name: _stats(buffer) for name, buffer in zip(names, buffers, strict=True)}
    return Launched(findings, _counters(record, seconds), stats)


def _buffer(argument: Argument) -> abi.Buffer:
    array = argument.array
    assert array.flags.c_contiguous, argument.name
    return abi.Buffer(
        host=array.ctypes.data,
        size=array.nbytes,
        readonly=argument.access == "in",
        init=argument.access == "inout",
    )


def _findings(
    record: abi.Launch, reports: ctypes.Array[abi.Report], path: Path, base: int, names: list[str]
) -> list[Finding]:
    raw = [reports[index] for index in range(record.report_count)]
    lines = locate(path, base, [address for report in raw for address in (report.pc, report.pc2)])
    return [
        Finding(
            kind=abi.KINDS[report.kind],
            where=lines.get(report.pc, ""),
            other=lines.get(report.pc2, ""),
            memory=_memory_name(report.memory, names),
            offset=ctypes.c_int64(report.offset).value,
            size=report.size,
            count=report.count,
            threadgroup=report.threadgroup,
            thread=report.thread,
            detail=_detail(report),
        )
        for report in raw
    ]


def _detail(report: abi.Report) -> str:
    kind = abi.KINDS[report.kind]
    if kind.startswith("RACE") or kind == "SAME_VALUE_WRITE":
        whose = " of another threadgroup" if report.info & abi.OTHER_THREADGROUP else ""
        return f"with thread {report.other_thread}{whose}"
    if kind in ("DIVERGENT_SIMD", "DIVERGENT_SIMD_BARRIER"):
        return f"lanes {report.info:#010x} only"
    if kind == "DIVERGENT_BARRIER":
        return f"{report.info} threads arrived"
    if kind == "INACTIVE_LANE":
        return f"lane {report.info}"
    if kind == "ARRAY_OUT_OF_BOUNDS":
        return f"index {ctypes.c_int64(report.offset).value}"
    return ""


def _memory_name(index: int, names: list[str]) -> str:
    """-1 = nothing in particular; below it, the threadgroup variables."""
    if index >= 0:
        return names[index]
    return abi.runtime().msl_variable_name(-2 - index).decode() if index <= -2 else ""


def _stats(buffer: abi.Buffer) -> BufferStats:
    instructions = buffer.simd_instructions
    return BufferStats(
        nbytes=buffer.size,
        requested=buffer.load_bytes,
        stored=buffer.store_bytes,
        unique_read=buffer.unique_read,
        unique_written=buffer.unique_written,
        line_bytes=buffer.lines * 128,
        simd_bytes=buffer.simd_bytes,
        simd_instructions=instructions,
        lane_utilisation=buffer.active_lanes / (32 * instructions) if instructions else 0.0,
    )


def _counters(record: abi.Launch, seconds: float) -> Counters:
    return Counters(
        threads=record.threads,
        barriers=record.barriers,
        simd_barriers=record.simd_barriers,
        simd_operations=record.simd_operations,
        partial_simd_operations=record.partial_simd_operations,
        atomics=record.atomics,
        threadgroup_bytes=record.threadgroup_bytes,
        threadgroup_loads=record.threadgroup_loads,
        threadgroup_stores=record.threadgroup_stores,
        switches=record.switches,
        seconds=seconds,
    )
