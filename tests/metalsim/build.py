"""A translation unit from kernel text, and a shared object from the unit. Built things are kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from .rewrite import rewrite
from .toolchain import (
    CACHE,
    CHECKS,
    CHECKS_OF_THE_SOURCE,
    CLANG,
    CODE,
    LANGUAGE,
    WARNINGS,
    source_hash,
    write_atomically,
)

MLX_VERSION = importlib.metadata.version("mlx")
MLX_HEADERS = Path(mx.__file__).parent / "include"
MLX_UTILS = "mlx/backend/metal/kernels/utils.h"  # what MLX puts before every custom kernel
_MESSAGE = re.compile(r"([^\s:]+):(\d+):\d+: (.*)")


class CompileError(Exception):
    """The text is not valid Metal as far as clang and the lint can tell; one line per mistake."""


class Flavour(NamedTuple):
    """How a unit is compiled: with a call at every access, and at which optimisation level."""

    check: bool = True
    optimise: str = "-O2"

    def flags(self) -> list[str]:
        checks = CHECKS + (CHECKS_OF_THE_SOURCE if self.optimise == "-O0" else [])
        return [*CODE, self.optimise, *(checks if self.check else [])]


class Unit(NamedTuple):
    """A translation unit. prelude: the shim and MLX's headers, which clang reads once and keeps; text: the kernel."""

    prelude: str
    text: str


def unit(
    text: str,
    entry: str,
    *,
    includes: Sequence[str] = (MLX_UTILS,),
    constants: Mapping[int, str] | None = None,
    before: str = "",
) -> Unit:
    """The shim, MLX's headers, the rewritten text and its entry.

    constants: function constants by index, as C++ literals. before: text for the last of the headers.
    """
    defined = [f"#define MSL_FC_{index} {value}" for index, value in (constants or {}).items()]
    included = [f'#include "{name}"' for name in includes]
    included.insert(-1, before)
    prelude = ["#include <metal_stdlib>", *defined, *included, "using namespace metal;", ""]
    return Unit("\n".join(prelude), rewrite(text) + entry)


def marked(text: str, header: str, source: str, name: str) -> str:
    """Adds #line marks, so that a finding names a line of the caller's own header or source string."""
    lines = text.split("\n")
    begin = text.rindex(source) if source else len(text)
    header_lines = header.count("\n") + 1 if header else 0
    source_line = text[:begin].count("\n")
    return "\n".join(
        [
            f'#line 1 "{name}.header"',
            *lines[:header_lines],
            f'#line 1 "{name}.signature"',
            *lines[header_lines:source_line],
            f'#line 1 "{name}.source"',
            *lines[source_line:],
        ]
    )


@functools.cache
def mlx_headers() -> Path:
    """The installed MLX's kernel headers, rewritten, as an include folder."""
    folder = CACHE / f"mlx-{MLX_VERSION}-{source_hash()}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=CACHE))
    for path in (MLX_HEADERS / "mlx/backend/metal/kernels").rglob("*.h"):
        written = building / path.relative_to(MLX_HEADERS)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(rewrite(path.read_text()))
    try:
        building.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(building)
    return folder


def keyed(built: Unit, flags: Sequence[str]) -> str:
    """The name under which everything made from this unit with these flags is kept."""
    parts = [*built, *flags, source_hash(), MLX_VERSION, _clang_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@functools.cache
def _clang_version() -> str:
    return subprocess.run([CLANG, "--version"], capture_output=True, text=True, check=True).stdout


def front_end_flags() -> list[str]:
    """Flags under which clang reads a unit, whatever it then makes of it."""
    return [*LANGUAGE, *WARNINGS, "-I" + str(mlx_headers())]


@functools.lru_cache(maxsize=64)
def precompiled(prelude: str, flags: tuple[str, ...]) -> Path:
    """The prelude, read by clang under these flags."""
    made = CACHE / "preludes" / f"{keyed(Unit(prelude, ''), flags)}.pch"
    if made.exists():
        return made
    source = made.with_suffix(".clcpp")
    write_atomically(source, prelude)
    beside = made.with_suffix(f".{os.getpid()}")
    # without timestamps: a fresh checkout has new ones, and the key holds the contents
    emit = ["-c", "-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp"]
    run = subprocess.run([CLANG, *flags, *emit, str(source), "-o", str(beside)], capture_output=True, text=True)
    if run.returncode:
        raise CompileError("\n".join(diagnostics(run.stderr, failed=True)))
    beside.replace(made)
    return made


def clang(built: Unit, flags: Sequence[str], source: Path, action: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Writes the unit's text to `source` and runs clang on it with its prelude."""
    prelude = precompiled(built.prelude, tuple(flags))
    write_atomically(source, built.text)
    command = [CLANG, *flags, "-include-pch", str(prelude), *action, str(source)]
    return subprocess.run(command, capture_output=True, text=True)


def compile_unit(built: Unit, flavour: Flavour = Flavour()) -> Path:  # noqa: B008 an immutable tuple
    """Unit -> shared object with `msl_entry`. Raises CompileError."""
    flags = [*front_end_flags(), *flavour.flags()]
    # dlopen keeps objects by path, so the path holds the hash
    made = CACHE / "kernels" / f"{keyed(built, flags)}.so"
    if made.exists():
        return made
    compiled = made.with_suffix(f".{os.getpid()}.o")
    run = clang(built, flags, made.with_suffix(".clcpp"), ["-c", "-o", str(compiled)])
    mistakes = diagnostics(run.stderr, failed=run.returncode != 0)
    if mistakes:
        compiled.unlink(missing_ok=True)
        raise CompileError("\n".join(mistakes))
    link_shared(compiled, made)
    return made


def link_shared(compiled: Path, made: Path) -> None:
    """Object file -> shared object, removing the former."""
    linked = compiled.with_suffix(".linked")
    subprocess.run([CLANG, "-shared", "-o", str(linked), str(compiled)], check=True)
    linked.replace(made)
    compiled.unlink()


def diagnostics(stderr: str, *, failed: bool) -> list[str]:
    """One line per mistake: errors, and what clang only warns of (any implicit conversion to bfloat, a huge stack)."""
    found: list[str] = []
    in_shim = False  # the error before was in the shim: the kernel's own line is in a note
    for line in stderr.splitlines():
        match = _MESSAGE.match(line)
        if match is None:
            continue
        path, number, message = match.groups()
        where = f"{path.rsplit('/', 1)[-1]}:{number}"
        if failed and message.startswith(("error:", "fatal error:")):
            if "'msl_ctor'" in message:
                message = "error: no constructor of this vector takes these components"
            found.append(f"{where}: {message}")
            in_shim = "/shim/" in path
        elif in_shim and message.startswith("note: in instantiation") and "/shim/" not in path:
            found[-1] = f"{where}: {found[-1].split(': ', 1)[1]}"
            in_shim = False
        elif "Wimplicit-float-conversion" in message and "__bf16'" in message.rsplit(" to ", 1)[-1]:
            detail = message.split("precision: ", 1)[-1].split(" [-W", 1)[0]
            found.append(f"{where}: error: Metal has no implicit conversion to bfloat: {detail}")
        elif "Wframe-larger-than" in message:
            found.append(f"{where}: error: a thread's own arrays are too big: {message.split(' in ', 1)[0]}")
    if failed and not found:
        found = [stderr.strip()]
    return list(dict.fromkeys(found))
