"""What Metal rejects and clang accepts, found in clang's AST and in the text.

Every pointer and reference has an address space (clang makes an unqualified one generic). No arithmetic mixes half and
bfloat (clang converts one to the other; Metal has no such conversion). Threadgroup variables are declared in kernel
functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .build import CompileError, Flavour, Unit, clang, front_end_flags, keyed
from .rewrite import threadgroup_outside_kernel
from .toolchain import CACHE, write_atomically

_MARK = re.compile(r'^#line (\d+) "([^"]+)"$', re.MULTILINE)
_TYPE = re.compile(r"'([^']*)'(?::'([^']*)')?")
_LOCATION = re.compile(r"([^\s<>,]+):(\d+):\d+")
_NOWHERE = re.compile(r"<<invalid sloc>>|<invalid sloc>|<scratch space>:\d+:\d+")
_NOT_THE_KERNEL = ("/shim/", "/mlx/backend/", "msl_entry", "<built-in>", ".clcpp")
_DECLARATION = re.compile(
    r"\b(?:VarDecl|ParmVarDecl|FieldDecl|TypedefDecl|TypeAliasDecl)\b.*:\d+ (?:(?:used|referenced|invalid|implicit) )*"
    r"(?!(?:used|referenced|implicit|invalid) )[A-Za-z_]\w* '(?:const |volatile )*__generic"
)
_CAST = re.compile(
    r"\b(?:CStyleCastExpr|CXXStaticCastExpr|CXXReinterpretCastExpr|CXXFunctionalCastExpr)\b.*__generic [^']*\*'"
)


def lint(built: Unit, flavour: Flavour) -> None:
    """Raises CompileError when the unit's text breaks a rule. A clean unit is remembered.

    The prelude is left out of the dump, since clang has it precompiled; flavour: the one that it was made for.
    """
    flags = [*front_end_flags(), *flavour.flags()]
    clean = CACHE / "lint" / keyed(built, flags)
    if clean.exists():
        return
    run = clang(built, flags, clean.with_suffix(".clcpp"), ["-w", "-fsyntax-only", "-Xclang", "-ast-dump"])
    found = list(dict.fromkeys(mistakes(run.stdout)))
    if found:
        raise CompileError("\n".join(found))
    if run.returncode == 0:  # compile_unit reports what clang itself rejects
        write_atomically(clean, "")


def lint_text(text: str) -> None:
    """Raises CompileError when text (with its #line marks) declares threadgroup variables outside kernel functions.

    Clang does not see them: rewrite.py has made them something else.
    """
    found = []
    for position in threadgroup_outside_kernel(text):
        mark = list(_MARK.finditer(text, 0, position))[-1]
        line = int(mark.group(1)) + text.count("\n", mark.end(), position) - 1
        found.append(f"{mark.group(2)}:{line}: error: a threadgroup variable outside a kernel function")
    if found:
        raise CompileError("\n".join(found))


def mistakes(dump: str) -> Iterator[str]:
    """Walks an AST dump. Locations are relative: a line may name only what changed since the line before."""
    file, line, cast_to = "", "?", ""
    for row in dump.splitlines():
        head = _NOWHERE.sub("", row.split("'", 1)[0])
        for name, number in _LOCATION.findall(head):
            if name != "line":
                file = name
            line = number
        if not file or any(part in file for part in _NOT_THE_KERNEL):
            continue
        where = f"{file.rsplit('/', 1)[-1]}:{line}"
        # the row after a cast is what it casts
        kind = _expression_type(row)
        if {cast_to, kind} == {"half", "__bf16"}:
            yield f"{where}: error: Metal has no arithmetic of half with bfloat: cast one of them"
        implicit = "ImplicitCastExpr" in row and "<FloatingCast>" in row and "part_of_explicit_cast" not in row
        cast_to = kind if implicit else ""
        if "__generic" in row and (_DECLARATION.search(row) or _CAST.search(row)):
            named = row.split("'", 2)[1]
            yield f"{where}: error: pointer or reference without address space: {named}"


def _expression_type(row: str) -> str:
    """The first type of a row, behind its typedefs and without its address space: `'float16_t':'half'` is half."""
    match = _TYPE.search(row)
    return (match.group(2) or match.group(1)).rsplit(" ", 1)[-1] if match else ""
