"""Executing a custom kernel: the calling convention of mx.fast.metal_kernel, and its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .build import Flavour, Unit, compile_unit, marked, unit
from .capture import CapturedKernel, KernelSource, capture
from .launch import Argument, Geometry, Options, Schedule, launch
from .lint import lint as lint_unit
from .lint import lint_text
from .operations import Operations, compile_counted
from .result import Result
from .signature import entry

Template = Sequence[tuple[str, Any]]
Array = mx.array | np.ndarray
Triple = tuple[int, int, int]

# five orders of execution, for tests of determinism
FIVE_SCHEDULES: tuple[tuple[Schedule, int], ...] = (
    ("forward", 1),
    ("reverse", 1),
    ("round_robin", 1),
    ("random", 1),
    ("random", 2),
)


def run(
    source: str,
    header: str = "",
    *,
    name: str = "kernel",
    input_names: Sequence[str],
    output_names: Sequence[str],
    inputs: Sequence[Array],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: Triple,
    threadgroup: Triple,
    template: Template = (),
    init_value: float | None = None,
    atomic_outputs: bool = False,
    check: bool = True,
    profile: bool = False,
    count: bool = False,
    schedule: Schedule = "forward",
    seed: int = 1,
    lint: bool = True,
    optimise: str = "-O2",
    time_limit: int = 120,
) -> Result:
    """Executes the text that mx.fast.metal_kernel would compile for these arguments.

    The arguments up to atomic_outputs mean what they mean to mx.fast.metal_kernel; grid counts threads.
    check: all detectors and byte counts, about three times slower. profile: also simd instructions and lane utilisation
    per buffer. count: runs once more and counts operations (operations.py). schedule, seed: the order in which threads,
    simdgroups and threadgroups run. lint: Metal's typing rules that clang lacks. optimise: -O0 shows the accesses that
    the source has, -O2 those that are left. time_limit: seconds of execution, after which the run ends as a finding.
    Findings name lines of `header` and `source` (`NAME.source:3`), or what a #line in them says.

    Raises CompileError when the text is not valid Metal as far as is known.
    """
    arrays = [each if isinstance(each, mx.array) else mx.array(each) for each in inputs]
    kernel = KernelSource(name, tuple(input_names), tuple(output_names), source, header, atomic_outputs)
    captured = capture(kernel, arrays, output_dtypes, template)
    flavour = Flavour(check, optimise)
    text = marked(captured.text, header, source, name)
    built = unit(text, entry(captured.function, captured.template, captured.parameters, {}))
    if lint:
        lint_text(text)
        lint_unit(built, flavour)
    path = compile_unit(built, flavour)
    outputs = [_output(shape, dtype, init_value) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
    arguments = _arguments(captured, kernel, arrays, outputs, init_value is not None)
    group = (min(threadgroup[0], grid[0]), min(threadgroup[1], grid[1]), min(threadgroup[2], grid[2]))
    geometry = Geometry(grid, group)
    operations = count_operations(built, arguments, geometry) if count else Operations()
    launched = launch(path, arguments, geometry, Options(check, profile, schedule, seed, time_limit=time_limit))
    return Result(
        outputs=[from_host(array, dtype) for array, dtype in zip(outputs, output_dtypes, strict=True)],
        findings=launched.findings,
        counters=launched.counters,
        buffers=launched.buffers,
        operations=operations,
        text=captured.text,
    )


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    *,
    on_result: Callable[[str, Result], None] | None = None,
    check: bool = True,
    profile: bool = False,
    schedule: Schedule = "forward",
    seed: int = 1,
) -> Callable[..., list[mx.array]]:
    """A stand-in for mx.fast.metal_kernel whose kernels are executed here, at once, when they are called.

    on_result receives the kernel's name and the Result of each call; without it, a finding raises AssertionError.
    ensure_row_contiguous=False is refused: strides of an mx.array are not visible from Python.
    """
    if not ensure_row_contiguous:
        raise ValueError("metalsim executes row-contiguous inputs only")

    def call(
        *,
        inputs: Sequence[Array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Triple,
        threadgroup: Triple,
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        result = run(
            source,
            header,
            name=name,
            input_names=input_names,
            output_names=output_names,
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template or (),
            init_value=init_value,
            atomic_outputs=atomic_outputs,
            check=check,
            profile=profile,
            schedule=schedule,
            seed=seed,
        )
        if verbose:
            print(result.text)
        if on_result is not None:
            on_result(name, result)
        elif result.findings:
            raise AssertionError(f"{name}:\n{result.report()}")
        return result.outputs

    return call


def count_operations(built: Unit, arguments: Sequence[Argument], geometry: Geometry) -> Operations:
    """Runs a unit with counters in its blocks. Outputs are left as they are."""
    counted = compile_counted(built)
    scratch = [each if each.access == "in" else each._replace(array=each.array.copy()) for each in arguments]
    counted.reset()
    launch(counted.path, scratch, geometry, Options(check=False))
    return counted.read()


# ---------------------------------------------------------------- host arrays


def to_host(array: mx.array) -> np.ndarray:
    """Row-contiguous bytes; bfloat16, which numpy lacks, as uint16."""
    viewed = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    # ascontiguousarray makes a scalar an array of one, which is another signature
    return np.ascontiguousarray(np.array(viewed)).reshape(array.shape)


def from_host(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Undoes to_host."""
    made: mx.array = mx.array(array)
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made


def _output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> np.ndarray:
    # mx.full gives integers for bool
    return to_host(mx.full(list(shape), init_value or 0).astype(dtype))


def _arguments(
    captured: CapturedKernel,
    kernel: KernelSource,
    inputs: Sequence[mx.array],
    outputs: Sequence[np.ndarray],
    initialised: bool,
) -> list[Argument]:
    """One argument per buffer of the signature; MLX adds NAME_shape, NAME_strides and NAME_ndim when they are used."""
    given = {name: Argument(name, to_host(array)) for name, array in zip(kernel.input_names, inputs, strict=True)}
    for name, output in zip(kernel.output_names, outputs, strict=True):
        given[name] = Argument(name, output, "inout" if initialised else "out")
    for name, array in zip(kernel.input_names, inputs, strict=True):
        strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        given.setdefault(f"{name}_shape", Argument(f"{name}_shape", np.array(array.shape, np.int32)))
        given.setdefault(f"{name}_strides", Argument(f"{name}_strides", np.array(strides, np.int64)))
        given.setdefault(f"{name}_ndim", Argument(f"{name}_ndim", np.array([array.ndim], np.int32)))
    buffers = [each for each in captured.parameters if each.kind == "buffer"]
    return [given[each.name] for each in sorted(buffers, key=lambda each: each.slot)]
