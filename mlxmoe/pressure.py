"""Whether the machine runs short of memory, as its own system says: asked between tokens, so that experts give way before
something else fails.

macOS: the kernel's own level (kern.memorystatus_vm_pressure_level: 1 normal, 2 warning, 4 critical). Linux: what
/proc/meminfo calls available. Elsewhere nothing is known, and nothing is ever short.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

ASK_EVERY = 2.0  # seconds
LEAST_AVAILABLE = 0.04  # of the machine's memory
_NORMAL = 1


def is_short() -> bool:
    """What the system says now."""
    if sys.platform == "darwin":
        return _macos_level() > _NORMAL
    return _linux_available() < LEAST_AVAILABLE


def _macos_level() -> int:
    level, size = ctypes.c_int(_NORMAL), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    name = b"kern.memorystatus_vm_pressure_level"
    if libc.sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, 0):
        return _NORMAL
    return level.value


def _linux_available(path: Path = Path("/proc/meminfo")) -> float:
    """Share of the memory that could be had without swapping; 1 where the system does not say."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 1.0
    found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest.split()}
    total, available = found.get("MemTotal", 0), found.get("MemAvailable")
    return available / total if total and available is not None else 1.0


class PressureWatch:
    """Asks no more often than every ASK_EVERY seconds."""

    def __init__(self, short: Callable[[], bool] = is_short, clock: Callable[[], float] = time.monotonic):
        self._short, self._clock = short, clock
        self._asked = clock()

    def __call__(self) -> bool:
        """Whether memory is short; False also where it was asked a moment ago."""
        if self._clock() - self._asked < ASK_EVERY:
            return False
        self._asked = self._clock()
        return self._short()
