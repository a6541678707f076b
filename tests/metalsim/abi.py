"""The runtime library: built once, loaded with its symbols visible to kernels, called through these structures.

Each structure has a twin of the same name and order in runtime/abi.h.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .toolchain import CACHE, CLANGXX, RUNTIME

_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64

# in the order of `enum Kind` in runtime/abi.h
KINDS = (
    "",
    "OUT_OF_BOUNDS",
    "WILD_POINTER",
    "RACE_READ_AFTER_WRITE",
    "RACE_WRITE_AFTER_READ",
    "RACE_WRITE_AFTER_WRITE",
    "SAME_VALUE_WRITE",
    "WRITTEN_TWICE",
    "WRITE_TO_INPUT",
    "UNINITIALISED_THREADGROUP",
    "UNINITIALISED_OUTPUT",
    "DIVERGENT_BARRIER",
    "DIVERGENT_SIMD",
    "DIVERGENT_SIMD_BARRIER",
    "INACTIVE_LANE",
    "THREADGROUP_OUT_OF_BOUNDS",
    "THREADGROUP_TOO_BIG",
    "ARRAY_OUT_OF_BOUNDS",
    "MISALIGNED",
    "DIVISION_BY_ZERO",
    "LIVELOCK",
    "FAULT",
    "TIMEOUT",
)
OTHER_THREADGROUP = 1  # in the info of a race


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Buffer(ctypes.Structure):
    """One kernel buffer: where its bytes are, and what the runtime counted on it."""

    _fields_: ClassVar = [
        *_fields(_U64, "host size"),
        *_fields(_U32, "readonly init"),
        *_fields(_U64, "base loads load_bytes stores store_bytes unique_read unique_written unwritten rewritten"),
        *_fields(_U64, "lines simd_instructions active_lanes simd_bytes"),
    ]


class Report(ctypes.Structure):
    """One finding, with code addresses."""

    _fields_: ClassVar = [
        *_fields(_U32, "kind count"),
        *_fields(_U64, "pc pc2"),
        ("memory", ctypes.c_int32),
        *_fields(_U32, "threadgroup thread other_thread"),
        ("offset", _U64),
        *_fields(_U32, "size info"),
    ]


class Launch(ctypes.Structure):
    """One dispatch: what to run, and the counters that come back."""

    _fields_: ClassVar = [
        ("entry", _U64),
        *_fields(_U32 * 3, "grid group"),
        *_fields(_U32, "buffer_count schedule"),
        ("seed", _U64),
        *_fields(_U32, "check profile max_reports grid_counts_groups"),
        ("time_limit", _U64),
        ("buffers", ctypes.POINTER(Buffer)),
        ("reports", ctypes.POINTER(Report)),
        *_fields(_U32, "report_count aborted"),
        *_fields(_U64, "threads simd_operations partial_simd_operations barriers simd_barriers atomics switches"),
        *_fields(_U64, "threadgroup_bytes threadgroup_loads threadgroup_stores module_low module_high"),
    ]


class Kernel(NamedTuple):
    """A loaded shared object. low, high: where its code and constants are."""

    library: Any
    entry: int
    low: int
    high: int


@functools.cache
def runtime() -> Any:
    """The runtime library, built when its sources changed."""
    sources = sorted(RUNTIME.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    made = CACHE / f"runtime-{digest}.so"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = made.with_suffix(f".{os.getpid()}")
        units = [str(path) for path in sources if path.suffix == ".cpp"]
        flags = ["-O2", "-std=c++17", "-march=x86-64-v3", "-fPIC", "-shared", "-Wall"]
        subprocess.run([CLANGXX, *flags, "-o", str(beside), *units], check=True)
        beside.replace(made)
    library = ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    library.msl_variable_name.restype = ctypes.c_char_p
    library.msl_sizes.restype = _U64
    for index, structure in enumerate((Launch, Buffer, Report)):
        assert library.msl_sizes(index) == ctypes.sizeof(structure), f"abi.py and runtime/abi.h differ: {structure}"
    return library


@functools.cache
def load(path: Path) -> Kernel:
    """Loads a kernel's shared object."""
    runtime()
    library = ctypes.CDLL(str(path))
    entry = ctypes.cast(library.msl_entry, ctypes.c_void_p).value
    assert entry is not None
    low, high = mapped(path)
    return Kernel(library, entry, low, high)


def mapped(path: Path) -> tuple[int, int]:
    """The address range of a loaded library."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.rstrip().endswith(str(path)):
            ranges.append([int(part, 16) for part in line.split()[0].split("-")])
    return min(begin for begin, _ in ranges), max(end for _, end in ranges)
