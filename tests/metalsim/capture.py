"""The exact text that mx.fast.metal_kernel compiles, printed by MLX itself.

Inside mx.export_function a metal_kernel call is legal without Metal, and verbose=True prints the generated source. It
goes to the C++ stdout, so file descriptor 1 is what has to be caught.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import mlx.core as mx

from .signature import Parameter, parse_kernel

_FENCED = re.compile(r"```\n(.*)\n```", re.DOTALL)
_KERNEL = re.compile(r"\[\[kernel\]\]\s+void\s+(custom_kernel_\w+)\s*\(")
_INSTANCE = re.compile(r"decltype\((custom_kernel_\w+)(<[^;]*>)\)")


class KernelSource(NamedTuple):
    """What is handed to mx.fast.metal_kernel. Hashable, so that captured text can be kept."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    atomic_outputs: bool


class CapturedKernel(NamedTuple):
    """text: all that MLX wrote. function: the kernel's name. template: its arguments in angle brackets, or ""."""

    text: str
    function: str
    template: str
    parameters: list[Parameter]


def capture(
    kernel: KernelSource,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]],
) -> CapturedKernel:
    """The text for these inputs. MLX looks at rank, dtype and whether there are fewer than 8 elements."""
    shapes = tuple((array.dtype, array.ndim, min(array.size, 8)) for array in inputs)
    return _capture(kernel, shapes, tuple(output_dtypes), tuple(template))


@functools.lru_cache(maxsize=1024)
def _capture(
    kernel: KernelSource,
    shapes: tuple[tuple[mx.Dtype, int, int], ...],
    output_dtypes: tuple[mx.Dtype, ...],
    template: tuple[tuple[str, Any], ...],
) -> CapturedKernel:
    inputs = [mx.zeros([size] + [1] * (rank - 1) if rank else [], dtype=dtype) for dtype, rank, size in shapes]
    metal_kernel: Any = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        source=kernel.source,
        header=kernel.header,
        atomic_outputs=kernel.atomic_outputs,
    )

    def call(*arrays: mx.array) -> list[mx.array]:
        return metal_kernel(
            inputs=list(arrays),
            template=list(template),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)] * len(output_dtypes),
            output_dtypes=list(output_dtypes),
            verbose=True,
        )

    printed = _printed(lambda folder: mx.export_function(str(folder / "kernel.mlxfn"), call, *inputs))
    fenced = _FENCED.search(printed)
    if fenced is None:
        raise RuntimeError(f"MLX printed no kernel source, but {printed[:200]!r}")
    text = fenced.group(1)
    function = _KERNEL.findall(text)[-1]
    instance = _INSTANCE.search(text)
    return CapturedKernel(text, function, instance.group(2) if instance else "", parse_kernel(text, function))


def _printed(action: Callable[[Path], object]) -> str:
    """What the action writes to file descriptor 1."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as caught:
        with _stdout_to(caught):
            action(Path(folder))
        caught.seek(0)
        return caught.read().decode()


@contextmanager
def _stdout_to(file: IO[bytes]) -> Iterator[None]:
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)  # what C code wrote before belongs to the caller
    saved = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
