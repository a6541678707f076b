"""Sizes as people write them: 900MB, 9GB (powers of ten), 9GiB (powers of two)."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from mlxmoe.errors import UserError

_FACTORS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _FACTORS |= {_prefix: 1000**_power, f"{_prefix}B": 1000**_power}
    _FACTORS |= {f"{_prefix}I": 1024**_power, f"{_prefix}IB": 1024**_power}
_LARGEST = 2**63 - 1  # what a file system or an allocator can count
_HINT = "write it as 900MB, 9GB or 9GiB"


def parse_size(size: str | float) -> int:
    """Bytes of a size such as ``9GB``, ``1.5 GiB``, ``4096`` or ``8e9``, cut to whole bytes; text is read exactly.

    Raises UserError for anything else, below one byte or above 2**63 - 1.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*", size)
        factor = _FACTORS.get(match[2].upper()) if match else None
        if match is None or factor is None:
            raise UserError(f"{size!r} is not a size", _HINT)
        nbytes = Fraction(match[1]) * factor
    elif math.isfinite(size):
        nbytes = Fraction(size)
    else:
        raise UserError(f"{size} is not a size", _HINT)
    if nbytes < 1:
        raise UserError(f"a size must be one byte or more, found {size}", _HINT)
    if nbytes > _LARGEST:
        raise UserError(f"a size of {size} is more than any machine holds", _HINT)
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """``9.17 MB``: three significant digits, powers of ten, as disks and --size count."""
    number, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(number) < 999.5:  # what rounds to 1000 is 1 of the next
            break
        number, unit = number / 1000, larger
    whole = unit == "B" or abs(number) >= 999.5
    return f"{number:.0f} {unit}" if whole else f"{number:.3g} {unit}"
