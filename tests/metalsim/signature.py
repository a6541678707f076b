"""A kernel's parameter list, and the `msl_entry` function that calls it with the runtime's values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from .rewrite import matching, split_arguments, strip_comments

# Metal attribute -> field of `struct msl_ti` (shim/msl_runtime.h); None = always zero
_VECTOR_ATTRIBUTES: dict[str, str | None] = {
    "thread_position_in_grid": "tpig",
    "thread_position_in_threadgroup": "tpit",
    "threadgroup_position_in_grid": "tgpig",
    "threads_per_threadgroup": "tptg",
    "dispatch_threads_per_threadgroup": "dtptg",
    "threadgroups_per_grid": "tgpg",
    "threads_per_grid": "tpg",
    "grid_size": "tpg",
    "grid_origin": None,
}
_SCALAR_ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": "ti->sgi",
    "thread_index_in_simdgroup": "ti->lane",
    "thread_index_in_threadgroup": "ti->tit",
    "quadgroup_index_in_threadgroup": "ti->qgi",
    "thread_index_in_quadgroup": "ti->tiq",
    "simdgroups_per_threadgroup": "ti->sgptg",
    "dispatch_simdgroups_per_threadgroup": "ti->sgptg",
    "quadgroups_per_threadgroup": "ti->qgptg",
    "dispatch_quadgroups_per_threadgroup": "ti->qgptg",
    "threads_per_simdgroup": "32",
    "thread_execution_width": "32",
}


class Parameter(NamedTuple):
    """One parameter: a buffer or threadgroup memory (with its slot), or an attribute (named in `attribute`)."""

    kind: Literal["buffer", "threadgroup", "attribute"]
    type: str
    name: str
    slot: int = -1
    attribute: str = ""


def parse_kernel(text: str, function: str) -> list[Parameter]:
    """The parameters of `function` in Metal text. A parameter without attribute is the next buffer, as in Metal.

    Raises ValueError when the text does not hold the function.
    """
    text = strip_comments(text)
    head = re.search(rf"\bvoid\s+{re.escape(function)}\s*\(", text)
    if head is None:
        raise ValueError(f"no kernel {function} in the text")
    inside = text[head.end() : matching(text, head.end() - 1, "(", ")")]
    parameters: list[Parameter] = []
    next_buffer = 0
    for each in split_arguments(inside):
        if not each.strip():
            continue
        parameter = _parse_parameter(each, next_buffer)
        if parameter.kind == "buffer":
            next_buffer = parameter.slot + 1
        parameters.append(parameter)
    return parameters


def _parse_parameter(text: str, next_buffer: int) -> Parameter:
    attribute = re.search(r"\[\[\s*(\w+)\s*(?:\((\d+)\))?\s*(?:,[^\]]*)?\]\]", text)
    declaration = re.sub(r"\[\[.*?\]\]", "", text, flags=re.DOTALL).strip()
    match = re.search(r"(\w+)\s*$", declaration)
    if match is None:
        raise ValueError(f"cannot read the kernel parameter {text.strip()!r}")
    name, kind = match.group(1), declaration[: match.start()].strip()
    if attribute is None:
        return Parameter("buffer", kind, name, next_buffer)
    if attribute.group(1) == "buffer":
        return Parameter("buffer", kind, name, int(attribute.group(2)))
    if attribute.group(1) == "threadgroup":
        return Parameter("threadgroup", kind, name, int(attribute.group(2)))
    return Parameter("attribute", kind, name, attribute=attribute.group(1))


def entry(function: str, template: str, parameters: list[Parameter], threadgroup_bytes: Mapping[int, int]) -> str:
    """Text of `msl_entry(ti, bufs)`, which the runtime calls once per thread.

    template: the arguments in angle brackets, or "". threadgroup_bytes: size of each [[threadgroup(n)]] argument.
    """
    lines = [_argument(index, each, threadgroup_bytes) for index, each in enumerate(parameters)]
    names = ", ".join(f"a{index}" for index in range(len(parameters)))
    return "\n".join(
        [
            '\n#line 1 "msl_entry"',
            # the entry reads the runtime's own structures: none of the kernel's accesses
            'extern "C" __attribute__((no_sanitize("kernel-address", "alignment")))',
            "void msl_entry(const thread msl_ti* ti, const thread ulong* bufs) {",
            *lines,
            f"  {function}{template}({names});",
            "}\n",
        ]
    )


def _argument(index: int, parameter: Parameter, threadgroup_bytes: Mapping[int, int]) -> str:
    kind, slot = parameter.type, parameter.slot
    if parameter.kind == "buffer":
        space = "device" if re.search(r"\bdevice\b", kind) else "constant"
        shape = "pointer" if "*" in kind else "reference"
        return f"  msl_{space}_{shape} a{index}{{bufs[{slot}]}};"
    if parameter.kind == "threadgroup":
        size = threadgroup_bytes.get(slot, 0)
        site = 0x7000000 + slot
        return f'  msl_threadgroup_pointer a{index}{{msl_tg_alloc({site}u, {size}, 16, "{parameter.name}")}};'
    return f"  {kind} a{index} = {_attribute_value(parameter)};"


def _attribute_value(parameter: Parameter) -> str:
    kind, attribute = parameter.type, parameter.attribute
    if attribute in _SCALAR_ATTRIBUTES:
        return f"({kind}){_SCALAR_ATTRIBUTES[attribute]}"
    if attribute not in _VECTOR_ATTRIBUTES:
        raise ValueError(f"metalsim does not know the kernel attribute [[{attribute}]]")
    field = _VECTOR_ATTRIBUTES[attribute]
    if field is None:
        return f"({kind})0"
    width = re.search(r"([234])$", kind)
    if width is None:
        return f"({kind})ti->{field}[0]"
    parts = ", ".join(f"({kind[:-1]})ti->{field}[{axis}]" for axis in range(int(width.group(1))))
    return f"({kind}){{{parts}}}"
