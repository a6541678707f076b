"""metalsim: executes Metal kernel text on a Linux CPU and checks what it does. docs/metalsim.md explains it."""

from .build import CompileError
from .execute import FIVE_SCHEDULES, metal_kernel, run
from .launch import SCHEDULES
from .operations import Operations
from .result import BufferStats, Counters, Finding, Result
from .toolchain import missing, require

__all__ = [
    "FIVE_SCHEDULES",
    "SCHEDULES",
    "BufferStats",
    "CompileError",
    "Counters",
    "Finding",
    "Operations",
    "Result",
    "metal_kernel",
    "missing",
    "require",
    "run",
]
