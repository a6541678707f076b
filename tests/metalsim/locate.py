"""Code addresses -> lines of the kernel's text, with the calls that were inlined there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

# a return address is behind its call; the call may have been merged or lack a line, so look a little further back
_STEPS_BACK = (1, 6, 12, 20)
_NOT_THE_KERNEL = ("/shim/", "msl_entry", "??")


def locate(path: Path, base: int, addresses: Iterable[int]) -> dict[int, str]:
    """`file:line <- file:line` for each address: the innermost place, then up to two callers."""
    wanted = sorted({address for address in addresses if address})
    if not wanted:
        return {}
    probes = [address - base - back for address in wanted for back in _STEPS_BACK]
    answers = _addr2line(path, probes)
    found = {}
    for index, address in enumerate(wanted):
        tries = answers[index * len(_STEPS_BACK) : (index + 1) * len(_STEPS_BACK)]
        lines = next((each for each in map(_own_lines, tries) if each), [])
        found[address] = " <- ".join(lines[:3]) or "an unknown line"
    return found


def _addr2line(path: Path, offsets: list[int]) -> list[list[str]]:
    run = subprocess.run(
        ["addr2line", "-a", "-i", "-e", str(path)],
        input="\n".join(hex(offset) for offset in offsets),
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[list[str]] = []
    for line in run.stdout.splitlines():
        if re.fullmatch(r"0x[0-9a-f]+", line):
            answers.append([])
        else:
            answers[-1].append(re.sub(r" \(discriminator.*", "", line))
    return answers


def _own_lines(answer: list[str]) -> list[str]:
    """Without the shim, the entry and places that have no line; file names without their folders."""
    kept = [line for line in answer if not any(part in line for part in _NOT_THE_KERNEL)]
    return [line.rsplit("/", 1)[-1] for line in kept if not line.endswith((":?", ":0"))]
