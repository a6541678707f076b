"""Executed instructions by class: how much arithmetic a kernel does per weight.

The kernel is compiled to LLVM IR with the checks left out, a counter is added to every basic block, and the counters are
read after a run: executions of a block times the instructions in it. An instruction on a vector counts once per element,
since Apple's GPUs are scalar. What the shim does inside a simd operation is not counted; the operation itself is.

The classes are those of Apple's pipes as far as they are known (docs/metalsim.md): `simple` runs at the full rate;
`complex` (integer multiply, shifts, conversions between integers and floats, bit scans) at a quarter; `special` are
divisions and transcendental functions; `free` are width changes of operands and moves that a register machine does not
execute. Apple's compiler is another one than clang: the numbers compare kernels, they do not time them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from . import abi
from .build import CompileError, Flavour, Unit, clang, diagnostics, front_end_flags, keyed, link_shared
from .toolchain import CACHE, CLANG, write_atomically

CLASSES = ("simple", "complex", "special", "free", "address", "memory", "control", "simd", "matrix")

_OPCODES = {
    "simple": ["fadd", "fsub", "fmul", "fneg", "add", "sub", "and", "or", "xor", "icmp", "fcmp", "select"],
    "complex": ["mul", "shl", "lshr", "ashr", "sitofp", "uitofp", "fptosi", "fptoui"],
    "special": ["fdiv", "frem", "sdiv", "udiv", "srem", "urem"],
    "free": [
        *("bitcast", "zext", "sext", "trunc", "fpext", "fptrunc", "ptrtoint", "inttoptr", "addrspacecast"),
        *("extractelement", "insertelement", "shufflevector", "extractvalue", "insertvalue"),
        *("phi", "freeze", "alloca"),
    ],
    "address": ["getelementptr"],
    "memory": ["load", "store"],
    "control": ["br", "switch", "ret", "unreachable"],
}
_INTRINSICS = {
    "simple": [
        *("fma", "fmuladd", "minnum", "maxnum", "fabs", "copysign"),
        *("smin", "smax", "umin", "umax", "abs", "usub", "sadd", "uadd"),
    ],
    "complex": [
        *("fshl", "fshr", "bswap", "bitreverse", "ctlz", "cttz", "ctpop"),
        *("floor", "ceil", "trunc", "rint", "round", "nearbyint"),
    ],
    "special": ["sqrt"],
    "memory": ["memcpy", "memset", "memmove"],
    "none": ["lifetime", "assume", "experimental", "dbg"],
}
_CLASS_OF_OPCODE = {opcode: kind for kind, opcodes in _OPCODES.items() for opcode in opcodes}
_CLASS_OF_INTRINSIC = {name: kind for kind, names in _INTRINSICS.items() for name in names}
_SHIM_INSIDES = ("msl/simdgroup.h", "msl/matrix.h", "msl/atomic.h")
_ENTRY = "msl_entry"
_MATRIX_MULTIPLY = 23  # MSL_MATRIX_MULTIPLY in shim/msl/simdgroup.h

_ASSIGNED = re.compile(r"\s+(?:%\S+ = )?(?:(?:tail|musttail|notail) )?(\w+)")
_CALLED = re.compile(r"@([\w.$]+)\(")
_WIDTH = re.compile(r"<(\d+) x ")
_LOCATION = re.compile(r"!dbg !(\d+)")
_METADATA = re.compile(r"!(\d+) = (?:distinct )?!(\w+)\((.*)\)$")
_REFERENCE = re.compile(r"(\w+): !(\d+)")
_LABEL = re.compile(r"^[-\w.$]+:")


@dataclass(frozen=True)
class Operations:
    """Executed operations. by_line: `file:line` of the kernel -> class -> number. by_function: the same with all that a
    function of the kernel called, whether or not it was inlined."""

    total: Counter[str] = field(default_factory=Counter)
    by_line: dict[str, Counter[str]] = field(default_factory=dict)
    by_function: dict[str, Counter[str]] = field(default_factory=dict)

    def per(self, weights: float) -> dict[str, float]:
        """Operations of each class per weight."""
        return {name: self.total[name] / weights for name in CLASSES}

    def marginal(self, smaller: Operations, weights: float) -> dict[str, float]:
        """Operations per weight of the inner loop: what a longer run of the same kernel did more than a shorter one,
        for `weights` more weights. What happens once per thread or row cancels."""
        return {name: (self.total[name] - smaller.total[name]) / weights for name in CLASSES}


class _Place(NamedTuple):
    """Where an instruction comes from: the kernel's own line, and all functions that it is in."""

    line: str
    functions: tuple[str, ...]
    inside_shim: bool


class _Block(NamedTuple):
    """What one execution of a basic block costs, per place."""

    costs: dict[_Place, Counter[str]]


class Counted(NamedTuple):
    """A kernel with counters in its blocks."""

    path: Path
    blocks: list[_Block]

    def reset(self) -> None:
        """Sets all counters to zero."""
        counters = self._counters()
        ctypes.memset(ctypes.byref(counters), 0, ctypes.sizeof(counters))

    def read(self) -> Operations:
        """What was executed since the reset."""
        operations = Operations()
        for executed, block in zip(self._counters(), self.blocks, strict=True):
            if not executed:
                continue
            for place, costs in block.costs.items():
                counted = Counter({name: number * executed for name, number in costs.items()})
                operations.total.update(counted)
                operations.by_line.setdefault(place.line, Counter()).update(counted)
                for function in place.functions:
                    operations.by_function.setdefault(function, Counter()).update(counted)
        return operations

    def _counters(self) -> ctypes.Array[ctypes.c_uint64]:
        array = ctypes.c_uint64 * len(self.blocks)
        return array.in_dll(abi.load(self.path).library, "msl_block_counts")


@functools.lru_cache(maxsize=64)
def compile_counted(built: Unit) -> Counted:
    """Unit -> shared object whose blocks count their executions. Raises CompileError."""
    flags = [*front_end_flags(), *Flavour(check=False).flags()]
    base = CACHE / "counted" / keyed(built, [*flags, Path(__file__).read_text()])
    made, ir = base.with_suffix(".so"), base.with_suffix(".ll")
    if not ir.exists():
        run = clang(built, flags, base.with_suffix(".clcpp"), ["-S", "-emit-llvm", "-o", "-"])
        mistakes = diagnostics(run.stderr, failed=run.returncode != 0)
        if mistakes:
            raise CompileError("\n".join(mistakes))
        write_atomically(ir, run.stdout)
    text, blocks = instrument(ir.read_text())
    if not made.exists():
        counting = base.with_suffix(f".{os.getpid()}.counting.ll")
        write_atomically(counting, text)
        compiled = base.with_suffix(f".{os.getpid()}.o")
        # the IR is optimised already, and more of it would move code between the counters
        flags = ["-O1", "-Xclang", "-disable-llvm-passes", "-fPIC", "-march=x86-64-v3", "-Wno-everything"]
        subprocess.run([CLANG, *flags, "-c", str(counting), "-o", str(compiled)], check=True)
        counting.unlink()
        link_shared(compiled, made)
    return Counted(made, blocks)


# ---------------------------------------------------------------- reading IR


def instrument(ir: str) -> tuple[str, list[_Block]]:
    """Adds a counter to each basic block of LLVM IR; says what each block costs."""
    places = _Places(ir)
    blocks: list[_Block] = []
    out: list[str] = []
    in_function = waiting = False
    for line in ir.splitlines():
        if line.startswith("define "):
            in_function = waiting = True
            blocks.append(_Block({}))
        elif in_function and line.startswith("}"):
            in_function = False
        elif in_function and _LABEL.match(line):
            if not waiting:  # the entry block of a function may have a label, too
                blocks.append(_Block({}))
                waiting = True
        elif in_function and line.startswith("  ") and not line.startswith("   "):
            if waiting and " = phi " not in line:
                out += _increment(len(blocks) - 1)
                waiting = False
            _add(blocks[-1], line, places)
        out.append(line)
    count = len(blocks)
    out.append(f"@msl_block_counts = global [{count} x i64] zeroinitializer, align 16")
    return "\n".join(part.replace("[0 x i64], ptr @msl", f"[{count} x i64], ptr @msl") for part in out), blocks


def _increment(block: int) -> Iterator[str]:
    """Named values leave the numbering of the unnamed ones alone."""
    counter = f"getelementptr ([0 x i64], ptr @msl_block_counts, i64 0, i64 {block})"
    yield f"  %msl.old.{block} = load i64, ptr {counter}, align 8"
    yield f"  %msl.new.{block} = add i64 %msl.old.{block}, 1"
    yield f"  store i64 %msl.new.{block}, ptr {counter}, align 8"


def _add(block: _Block, line: str, places: _Places) -> None:
    kind, number = cost(line)
    if kind == "none":
        return
    match = _LOCATION.search(line)
    place = places.of(match.group(1)) if match else _Place("?", (), False)
    if place.inside_shim and kind not in ("simd", "matrix"):
        return
    block.costs.setdefault(place, Counter())[kind] += number


def cost(line: str) -> tuple[str, int]:
    """Class of one line of IR, and how many scalar operations it is."""
    match = _ASSIGNED.match(line)
    opcode = match.group(1) if match else ""
    instruction = line.split(", !dbg", 1)[0]
    if opcode == "call":
        return _call_cost(instruction)
    kind = _CLASS_OF_OPCODE.get(opcode, "none")
    if opcode in ("fpext", "fptrunc") and "bfloat" in instruction:
        kind = "simple"  # 16-bit operands are free as half, not as bfloat on every chip
    if kind in ("memory", "control", "address", "none"):
        return kind, 1
    return kind, _lanes(instruction)


def _lanes(instruction: str) -> int:
    width = _WIDTH.search(instruction)
    return int(width.group(1)) if width else 1


def _call_cost(instruction: str) -> tuple[str, int]:
    match = _CALLED.search(instruction)
    if match is None:
        return "control", 1
    name = match.group(1)
    if name.startswith("llvm."):
        return _CLASS_OF_INTRINSIC.get(name.split(".")[1], "simple"), _lanes(instruction)
    if name in ("msl_xch", "msl_qxch"):
        multiply = instruction.endswith(f"i32 noundef {_MATRIX_MULTIPLY})") or f" {_MATRIX_MULTIPLY}) #" in instruction
        return ("matrix" if multiply else "simd"), 1
    if name in ("msl_tgbarrier", "msl_sgbarrier", "msl_atomic"):
        return "simd", 1
    if name.startswith("msl_"):
        return ("none" if name in ("msl_bad_lane", "msl_tg_alloc") else "special"), 1
    return "control", 1


class _Places:
    """Debug locations of a module. of(n) follows !n through scopes and inlining."""

    def __init__(self, ir: str) -> None:
        self._nodes: dict[str, tuple[str, str]] = {}
        for line in ir.splitlines():
            if line.startswith("!"):
                match = _METADATA.match(line)
                if match:
                    self._nodes[match.group(1)] = (match.group(2), match.group(3))
        self._known: dict[str, _Place] = {}

    def of(self, location: str) -> _Place:
        if location not in self._known:
            self._known[location] = self._find(location)
        return self._known[location]

    def _find(self, location: str) -> _Place:
        """Walks outwards through the inlined calls, to the kernel's own text and on to the entry."""
        line, inside_simd = "?", False
        functions: list[str] = []
        at: str | None = location
        while at is not None:
            fields = self._fields(at)
            file, function = self._scope(fields["scope"])
            if "/shim/" not in file and file != _ENTRY:
                line = line if functions else f"{file.rsplit('/', 1)[-1]}:{self._number(at)}"
                functions.append(function)
            elif not functions:
                inside_simd |= file.endswith(_SHIM_INSIDES)
            at = fields.get("inlinedAt")
        # without a function of the kernel's own it is the entry's work: MLX has none
        return _Place(line, tuple(dict.fromkeys(functions)), inside_simd or not functions)

    def _fields(self, node: str) -> dict[str, str]:
        return dict(_REFERENCE.findall(self._nodes[node][1]))

    def _number(self, location: str) -> str:
        match = re.search(r"line: (\d+)", self._nodes[location][1])
        return match.group(1) if match else "0"

    def _scope(self, node: str) -> tuple[str, str]:
        """File of the innermost scope that has one, and name of the function."""
        file, function = "", ""
        at: str | None = node
        while at is not None and at in self._nodes:
            kind, text = self._nodes[at]
            fields = self._fields(at)
            if not file and "file" in fields:
                match = re.search(r'filename: "([^"]*)"', self._nodes[fields["file"]][1])
                file = match.group(1) if match else ""
            if kind == "DISubprogram":
                match = re.search(r'name: "([^"]*)"', text)
                function = match.group(1) if match else ""
                break
            at = fields.get("scope")
        return file, function


def summary(operations: Mapping[str, float]) -> str:
    """`simple 2.03 complex 0.11 ...`, classes that occur."""
    return " ".join(f"{name} {operations[name]:.2f}" for name in CLASSES if operations[name])
