"""Line-preserving rewriting of Metal text into what clang accepts as C++ for OpenCL 2021.

The two languages share address spaces, vectors and templates; what differs is rewritten here, and nothing else. Every
pass keeps the newlines, so that a finding's line is a line of the kernel's own text. docs/metalsim.md lists the
constructs that stay uncovered.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

_VECTOR = r"(?:metal::)?(?:bool|char|uchar|short|ushort|int|uint|long|ulong|half|float|bfloat)[234]"
_LITERAL_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)
_FUNCTION_CONSTANT = re.compile(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\s*\((\d+)\)\s*\]\]\s*;")
_ATTRIBUTE = re.compile(r'\[\[(?:[^\[\]"]|"[^"]*")*\]\]')
_INSTANTIATION = re.compile(r"template\s+(?:kernel\s+)?decltype\([^;]*;")
_BFLOAT_CAST = re.compile(r"static_cast\s*<\s*(bfloat16_t|bfloat)\s*>\s*\(")
_BFLOAT_LITERAL = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)bf\b")
_THREAD_METHOD = re.compile(r"\)(\s*)(const\s+)?thread\b(\s*)(noexcept\b\s*)?(?=[{:;])")
_CONSTANT_METHOD = re.compile(r"(\)\s*(?:const\s+)?)constant\b(?=\s*(?:noexcept\b\s*)?[{:;])")
_CLASS_NAME = re.compile(r"\b(?:struct|class)\s+(?:alignas\s*\([^;{]*?\)\s*)?(\w+)")
_VECTOR_VARIABLE = re.compile(rf"((?:^|[;{{}}])\s*(?:const\s+)?)({_VECTOR})\s+(\w+)\s*\(", re.MULTILINE)
_VECTOR_CALL = re.compile(rf"(?<![\w:.~])({_VECTOR})\s*\(")
_VEC_TEMPLATE = re.compile(r"(?<![\w:])(?:metal::)?vec\s*<")
# what follows `float2 name(` when it is a function's parameter list and not constructor arguments
_PARAMETERS = re.compile(
    r"\s*(const|device|thread|constant|threadgroup|typename)\b"
    r"|\s*\w+\s*[&*]?\s+\w+\s*[,)]?\s*$"
    r"|\s*[\w:]+\s+\w+\s*,"
)
_THREADGROUP = re.compile(r"(?<!\w)threadgroup\b")
_KERNEL = re.compile(r"\[\[\s*kernel\s*\]\]|\bkernel\s+void\b")
_TOKEN = re.compile(r"[<>()\[\]]|\w+|::|[*&=,]")


def strip_comments(text: str) -> str:
    """Blanks comments, keeping newlines and string literals."""

    def blank(match: re.Match[str]) -> str:
        found = match.group(0)
        return found if found[0] in "\"'" else re.sub(r"[^\n]", " ", found)

    return _LITERAL_OR_COMMENT.sub(blank, text)


def matching(text: str, start: int, opening: str, closing: str) -> int:
    """The index of the bracket that closes the one at `start`. Raises ValueError when there is none."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == opening:
            depth += 1
        elif text[index] == closing:
            depth -= 1
            if depth == 0:
                return index
    raise ValueError(f"no {closing!r} closes the {opening!r} at {text[start : start + 40]!r}")


def split_arguments(text: str) -> list[str]:
    """Splits at the commas outside all brackets."""
    parts, depth, begin = [], 0, 0
    for index, char in enumerate(text):
        if char in "([{<":
            depth += 1
        elif char in ")]}>":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[begin:index])
            begin = index + 1
    parts.append(text[begin:])
    return parts


def rewrite(text: str) -> str:
    """Metal text -> text for `clang -x clcpp` with the shim, line for line."""
    text = strip_comments(text)
    text = _FUNCTION_CONSTANT.sub(r"constant \1 \2 = MSL_FC_\3;", text)
    text = _ATTRIBUTE.sub(_blank_attribute, text)
    # `template [[host_name]] decltype(...)`: the generated entry instantiates the kernel instead
    text = _INSTANTIATION.sub(_only_newlines, text)
    text = _threadgroup_variables(text)
    text = _vector_constructors(text)
    # clang refuses half -> __bf16; the way through float is exact
    text = _BFLOAT_CAST.sub(r"(\1)(float)(", text)
    text = _member_qualifiers(text)
    return _BFLOAT_LITERAL.sub(_bfloat_literal, text)


def _only_newlines(match: re.Match[str]) -> str:
    return "\n" * match.group(0).count("\n")


def _blank_attribute(match: re.Match[str]) -> str:
    """Removes `[[...]]`, but not the `[[` of an index expression; a macro's backslashes stay."""
    found = match.group(0)
    return re.sub(r"[^\n\\]", "", found) if re.search(r"[A-Za-z]", found) else found


def _bfloat_literal(match: re.Match[str]) -> str:
    digits = match.group(1)
    return f"((bfloat){digits if '.' in digits else digits + '.0'}f)"


def _substitute(text: str, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], tuple[str, int] | None]) -> str:
    """Like re.sub, but `replace` also says where the replaced text ends; None leaves the match."""
    out, done = [], 0
    for match in pattern.finditer(text):
        if match.start() < done:
            continue
        replaced = replace(match)
        if replaced is None:
            continue
        out.append(text[done : match.start()])
        out.append(replaced[0])
        done = replaced[1]
    out.append(text[done:])
    return "".join(out)


# ---------------------------------------------------------------- threadgroup variables


def _threadgroup_variables(text: str) -> str:
    """`threadgroup float a[8];` -> a reference into the memory that the runtime hands out.

    OpenCL allows such variables in `__kernel` functions only, and a `__kernel` cannot be a template.
    """

    def replace(match: re.Match[str]) -> tuple[str, int] | None:
        declaration = _threadgroup_declaration(text, match)
        if declaration is None:
            return None
        body, split, end = declaration
        kind = body[:split].strip()
        declared = "".join(_threadgroup_variable(kind, each, match.start()) for each in split_arguments(body[split:]))
        lines = text[match.start() : end + 1].count("\n")
        return declared.replace("\n", " ") + "\n" * lines, end + 1

    return _substitute(text, _THREADGROUP, replace)


def _threadgroup_declaration(text: str, match: re.Match[str]) -> tuple[str, int, int] | None:
    """What stands between `threadgroup` and `;`, where in it the first name begins, and where the `;` is in the text.

    None when no variable is declared here.
    """
    if not _begins_statement(text, match.start()):
        return None
    end = text.find(";", match.end())
    if end < 0:
        return None
    body = re.sub(r"=\s*\{[^{};]*\}\s*$", "", text[match.end() : end])  # Metal ignores such initialisers
    if "{" in body:
        return None
    body = re.sub(r"alignas\s*\([^)]*\)", "", body)
    split = _first_declarator(body)
    return None if split is None else (body, split, end)


def threadgroup_outside_kernel(text: str) -> list[int]:
    """Positions of threadgroup variables that are not in a [[kernel]] function, which Metal rejects."""
    text = strip_comments(text)
    inside = []
    for marker in _KERNEL.finditer(text):
        body = text.find("{", marker.end())
        if body >= 0:
            inside.append((body, matching(text, body, "{", "}")))
    return [
        match.start()
        for match in _THREADGROUP.finditer(text)
        if _threadgroup_declaration(text, match) and not any(low < match.start() < high for low, high in inside)
    ]


def _threadgroup_variable(kind: str, declarator: str, position: int) -> str:
    match = re.match(r"\s*(\w+)\s*(.*)$", declarator, re.DOTALL)
    assert match, declarator
    name, dims = match.group(1), match.group(2).strip()
    # the site tells the runtime that two threads mean the same variable
    site = int(hashlib.sha256(f"{position} {name}".encode()).hexdigest()[:7], 16)
    return (
        f"threadgroup {kind} (&{name}){dims} = *(threadgroup {kind} (*){dims})"
        f'msl_tg_alloc({site}u, sizeof({kind}{dims}), alignof({kind}), "{name}");'
    )


def _begins_statement(text: str, position: int) -> bool:
    before = text[:position].rstrip()
    if not before or before[-1] in "{};":
        return True
    line_start = text.rfind("\n", 0, position)
    previous = text[text.rfind("\n", 0, line_start) + 1 : line_start] if line_start > 0 else ""
    return previous.strip().startswith("#")


def _first_declarator(body: str) -> int | None:
    """Where the first declared name begins; None when this is no variable (a pointer, a parameter)."""
    depth = 0
    for token in _TOKEN.finditer(body):
        text = token.group(0)
        if text in "<(":
            depth += 1
        elif text in ">)":
            depth -= 1
        elif depth == 0 and text in "*&=":
            return None
        elif depth == 0 and re.match(r"[A-Za-z_]\w*$", text):
            rest = body[token.end() :].lstrip()
            if (not rest or rest[0] in "[,") and body[: token.start()].strip():
                return token.start()
    return None


# ---------------------------------------------------------------- vector constructors


def _vector_constructors(text: str) -> str:
    """`float4(a, b, c, d)` and `vec<T, 4>(...)` -> `msl_ctor<...>(...)`: clang has no such constructors."""
    text = _VECTOR_VARIABLE.sub(lambda match: _vector_variable(text, match), text)
    text = _VECTOR_CALL.sub(lambda match: _vector_call(match), text)

    def replace(match: re.Match[str]) -> tuple[str, int] | None:
        end = matching(text, match.end() - 1, "<", ">") + 1
        if not text[end:].lstrip().startswith("(") or _after_operator(text, match.start()):
            return None
        return f"msl_ctor<{text[match.start() : end]}>", end

    return _substitute(text, _VEC_TEMPLATE, replace)


def _vector_variable(text: str, match: re.Match[str]) -> str:
    """`int2 a(x, y);` -> `int2 a = int2(x, y);`, unless it declares a function."""
    try:
        end = matching(text, match.end() - 1, "(", ")")
    except ValueError:
        return match.group(0)
    arguments = text[match.end() : end]
    follows = text[end + 1 : end + 40].lstrip()[:1]
    if follows not in (";", ",") or not arguments.strip() or _PARAMETERS.match(arguments):
        return match.group(0)
    return f"{match.group(1)}{match.group(2)} {match.group(3)} = {match.group(2)}("


def _vector_call(match: re.Match[str]) -> str:
    return match.group(0) if _after_operator(match.string, match.start()) else f"msl_ctor<{match.group(1)}>("


def _after_operator(text: str, position: int) -> bool:
    return re.search(r"operator\s*$", text[max(0, position - 20) : position]) is not None


# ---------------------------------------------------------------- member functions


def _member_qualifiers(text: str) -> str:
    """Drops `thread` from constructors and conversion operators, and makes a method's `constant` the bare keyword.

    A temporary has no address space in clang, so a `thread` constructor could not make one; ordinary methods must keep
    the qualifier, or `thread X& get() thread` no longer binds. `constant` is a macro that adds const.
    """
    classes = set(_CLASS_NAME.findall(text))

    def replace(match: re.Match[str]) -> tuple[str, int] | None:
        head = text[: _opening_before(text, match.start())][-200:]
        name = re.search(r"(\w+)\s*$", head)
        conversion = re.search(r"\boperator\s+[\w:<>, *&]+\s*$", head)
        constructor = (name and name.group(1) in classes) or text[match.end()] == ":"
        if not conversion and not constructor:
            return None
        kept = [match.group(1), match.group(2) or "", match.group(3), match.group(4) or ""]
        return ")" + "".join(kept), match.end()

    text = _substitute(text, _THREAD_METHOD, replace)
    return _CONSTANT_METHOD.sub(r"\1__constant", text)


def _opening_before(text: str, closing: int) -> int:
    """The index of the `(` that the `)` at `closing` closes, or 0."""
    depth = 0
    for index in range(closing, -1, -1):
        if text[index] == ")":
            depth += 1
        elif text[index] == "(":
            depth -= 1
            if depth == 0:
                return index
    return 0
