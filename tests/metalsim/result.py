"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from .operations import Operations


@dataclass(frozen=True)
class Finding:
    """A defect. kind is one of abi.KINDS or UNWRITTEN_OUTPUT; docs/metalsim.md says how to read each.

    where, other: `file:line <- inlined at` of this access and of the one that it conflicts with.
    memory: buffer or threadgroup variable; offset and size in bytes. thread: index in its threadgroup.
    """

    kind: str
    where: str = ""
    other: str = ""
    memory: str = ""
    offset: int = 0
    size: int = 0
    count: int = 1
    threadgroup: int = 0
    thread: int = 0
    detail: str = ""

    def __str__(self) -> str:
        parts = [self.kind]
        if self.memory:
            parts.append(f"{self.memory}+{self.offset} ({self.size} bytes)")
        if self.where:
            parts.append(f"at {self.where}")
        if self.other:
            parts.append(f"against {self.other}")
        if self.detail:
            parts.append(self.detail)
        parts.append(f"[threadgroup {self.threadgroup} thread {self.thread}, {self.count} times]")
        return " ".join(parts)


@dataclass(frozen=True)
class BufferStats:
    """Traffic of one buffer. All but the first three need check=True, the last three profile=True.

    requested: bytes that the loads of all lanes asked for; stored: bytes that stores wrote.
    unique_read, unique_written: distinct bytes of the dispatch (what DRAM must deliver at least).
    line_bytes: 128 x the distinct 128 B lines of each threadgroup, summed (traffic if each had a perfect L1).
    simd_bytes: bytes asked for by simdgroups, where a byte that several lanes of one instruction want counts once.
    simd_instructions: memory instructions of simdgroups; lane_utilisation: active lanes in them, 0 to 1.
    """

    nbytes: int
    requested: int
    stored: int
    unique_read: int
    unique_written: int
    line_bytes: int
    simd_bytes: int
    simd_instructions: int
    lane_utilisation: float


@dataclass(frozen=True)
class Counters:
    """Totals of a dispatch."""

    threads: int
    barriers: int
    simd_barriers: int
    simd_operations: int
    partial_simd_operations: int
    atomics: int
    threadgroup_bytes: int
    threadgroup_loads: int
    threadgroup_stores: int
    switches: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """outputs: as mx.fast.metal_kernel returns them. text: what MLX would have compiled. operations: with count=True."""

    outputs: list[mx.array]
    findings: list[Finding]
    counters: Counters
    buffers: dict[str, BufferStats]
    text: str = ""
    operations: Operations = field(default_factory=Operations)

    def kinds(self) -> set[str]:
        """The kinds of finding; empty for a clean run."""
        return {finding.kind for finding in self.findings}

    def report(self) -> str:
        """All findings, one per line."""
        return "\n".join(map(str, self.findings)) or "no findings"
