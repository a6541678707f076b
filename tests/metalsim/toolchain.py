"""Where clang is, where built things are kept, and which flags make clang read Metal."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "metalsim"
SHIM = HERE / "shim"
RUNTIME = HERE / "runtime"

CLANG = "clang-19"  # 14 to 16 lack bfloat arithmetic; another version may print another AST, which lint.py reads
CLANGXX = "clang++-19"

# generic address space stays on: without it no class temporary compiles; lint.py restores Metal's strictness
_EXTENSIONS = (
    "-all,+cl_khr_fp16,+__cl_clang_function_pointers,+__cl_clang_variadic_functions,+__opencl_c_generic_address_space"
)
LANGUAGE = [
    *("-x", "clcpp", "-cl-std=clc++2021"),
    "-cl-no-stdinc",  # OpenCL's own min, dot, exp would collide with `using namespace metal`
    "-D__METAL__=1",
    *("-target", "x86_64-linux-gnu", "-march=x86-64-v3"),
    *("-Xclang", f"-cl-ext={_EXTENSIONS}"),  # the driver refuses a plain -cl-ext; -all makes 1.0 a float, as in Metal
    "-ffp-contract=on",
    *("-Xclang", "-fbfloat16-excess-precision=none"),  # every bfloat operation rounds, as every half operation does
    "-I" + str(SHIM),
]
CODE = [
    "-fPIC",
    *("-gdwarf-4", "-g1"),  # lines for the findings; addr2line loses inlined calls in DWARF 5
    "-fno-vectorize",  # a load stays the load that one lane asks for
    "-fno-slp-vectorize",
    "-fno-strict-aliasing",
    "-ftrivial-auto-var-init=pattern",  # an unset variable is a visible wrong number, the same one every time
]
WARNINGS = [
    "-Wno-everything",
    "-Wimplicit-float-conversion",  # build.py turns the bfloat ones into errors
    "-Wframe-larger-than=65536",  # a thread's stack here is 256 KiB; on a GPU this would be long since spilled
    "-fno-color-diagnostics",
    "-fno-caret-diagnostics",
]
CHECKS = [
    # outline mode: a call before every load and store, which runtime/ answers
    "-fsanitize=kernel-address",
    *("-mllvm", "-asan-instrumentation-with-call-threshold=0"),
    *("-mllvm", "-asan-stack=0"),
    *("-mllvm", "-asan-globals=0"),
    *("-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"),
    "-fsanitize=array-bounds,integer-divide-by-zero",
    "-fsanitize-recover=array-bounds,integer-divide-by-zero",
]
# A possible report between two loads makes clang load again, which would spoil the byte counts of optimised code.
CHECKS_OF_THE_SOURCE = ["-fsanitize=alignment", "-fsanitize-recover=alignment"]


def missing() -> str | None:
    """Why kernels cannot be executed on this machine, or None when they can."""
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        return "metalsim runs on x86-64 Linux"
    for program in (CLANG, CLANGXX):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt-get install --no-install-recommends clang-19)"
    return None


def require() -> None:
    """Called by a test that executes kernels: skips it visibly without clang; in CI (CI=true) that is a failure."""
    import pytest

    reason = missing()
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def source_hash() -> str:
    """Changes with every file that decides what a unit compiles to, or whether it is accepted."""
    files = [path for path in SHIM.rglob("*") if path.is_file()]
    files += [HERE / name for name in ("rewrite.py", "build.py", "lint.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Writes beside and renames: another process may be building the same thing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
