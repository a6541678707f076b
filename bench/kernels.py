"""`mlxmoe bench kernels`: are the Metal kernels right, and what do they read and compute, on the shapes of real models.

On a Mac the kernels run on the GPU and are timed. Anywhere else metalsim executes the same text (a checkout with
tests/metalsim and clang-19 is needed) and says what was read and how much arithmetic was done; it says nothing of time.
docs/kernels.md defines the columns.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.arguments import note, print_json
from mlxmoe.errors import UserError
from mlxmoe.formats import GROUP_SIZES, LEVELS, NARROW_LEVELS, MatrixShape, choose_group_size, num_planes
from mlxmoe.kernels import (
    EPILOGUE_BLOCKS,
    Activation,
    MetalKernels,
    PlaneBank,
    ReferenceKernels,
    Rotation,
    sort_by_expert,
)

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}
# Largest error against the largest output: half a unit in the last place
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3}
_MIXED = (2, 4, 3)  # levels of the chosen experts, in turn
_REPEATS = 20


class LayerShape(NamedTuple):
    """The routed experts of one layer as a token sees them: model dim, expert dim, experts per token."""

    width: int
    hidden: int
    active: int
    activation: Activation = Activation("swiglu")
    bias: bool = False


MODELS = {
    "qwen3-30b-a3b": LayerShape(2048, 768, 8),
    "gpt-oss-20b": LayerShape(2880, 2880, 4, Activation("swiglu_oai", 1.702, 7.0), True),
    "deepseek-v2-lite": LayerShape(2048, 1408, 6),
    "olmoe": LayerShape(2048, 1024, 8),
    "mixtral": LayerShape(4096, 14336, 2),
    "qwen3-next": LayerShape(2048, 512, 10),
    "demo": LayerShape(256, 128, 4),
}


@dataclass(frozen=True)
class Row:
    """One kernel on one layer. `weight_nbytes`: codes and scales of the chosen experts. None where it was not measured.

    requested: bytes of `words` that simdgroup instructions asked for, over weight_nbytes; read: distinct bytes of them;
    all_read: all distinct bytes of the dispatch, over weight_nbytes; over_least: the same over weights, activations and
    routing together, which no kernel can do without.
    """

    model: str
    kernel: str
    level: str
    dtype: str
    error: float
    within_rounding: bool
    weight_nbytes: int
    requested: float | None = None
    read: float | None = None
    all_read: float | None = None
    over_least: float | None = None
    simple_per_weight: float | None = None
    complex_per_weight: float | None = None
    findings: int | None = None
    microseconds: float | None = None
    gigabytes_per_second: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(MODELS),
        metavar="MODEL",
        help=f"layer shapes: {', '.join(MODELS)} (default: all)",
    )
    parser.add_argument(
        "--level",
        nargs="+",
        choices=[*map(str, LEVELS), "mixed"],
        help="bits of every chosen expert, or 2, 4 and 3 in turn (default: 2 mixed)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="activations (default: %(default)s)")
    parser.add_argument(
        "--prefill",
        type=int,
        metavar="TOKENS",
        help="also the gate product of so many tokens, each sent to all experts of the bank (default: not measured)",
    )
    parser.add_argument(
        "--rotation",
        type=int,
        choices=EPILOGUE_BLOCKS,
        help="block of the Hadamard transform that ends expert_gate_up (default: none)",
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the table; status 1 when a kernel is wrong."""
    if args.prefill is not None and args.prefill < 1:
        raise UserError(f"--prefill is {args.prefill}, expected 1 or more", "leave it out to measure decode only")
    models = args.models or list(MODELS)
    for model in models:
        if args.rotation and MODELS[model].hidden % args.rotation:
            found = f"the {MODELS[model].hidden} hidden values of {model} are no multiple of --rotation {args.rotation}"
            raise UserError(found, "name other layers with --models, or another block")
    rows = []
    bench = _on_gpu if MetalKernels.available() else _simulator()
    print(_heading())
    for model in models:
        for level in args.level or ("2", "mixed"):
            for row in bench(_Setting(model, level, args.dtype, args.prefill or 0, args.rotation or 0)):
                print(_line(row), flush=True)
                rows.append(row)
    if not MetalKernels.available():
        print(_mlx_line())
    if args.json:
        print_json({"device": "metal" if MetalKernels.available() else "metalsim", "rows": [asdict(r) for r in rows]})
    wrong = [row for row in rows if not row.within_rounding or row.findings]
    for row in wrong:
        note(f"{row.kernel} of {row.model} at {row.level} bits differs from its reference: please report this table")
    return 1 if wrong else 0


# ---------------------------------------------------------------------------------------------------------------------
# One layer
# ---------------------------------------------------------------------------------------------------------------------


class _Setting(NamedTuple):
    """What of a model is measured: tokens of prefill and block of the rotation, 0 for none."""

    model: str
    level: str
    dtype: str
    prefill: int
    rotation: int


class _Case(NamedTuple):
    """A kernel's launch and its reference, the banks whose chosen experts it reads, and what else it has to read."""

    kernel: str
    launch: Callable[[MetalKernels], mx.array]
    exact: mx.array
    banks: tuple[PlaneBank, ...]
    others: tuple[mx.array, ...]

    @property
    def weight_nbytes(self) -> int:
        """Codes and scales."""
        return sum(bank.nbytes - bank.table.nbytes for bank in self.banks)

    @property
    def least_nbytes(self) -> int:
        """The least that any kernel could read for this result."""
        biases = [bank.bias.nbytes for bank in self.banks if bank.bias is not None]
        return self.weight_nbytes + sum(array.nbytes for array in self.others) + sum(biases)


def _cases(setting: _Setting) -> list[_Case]:
    """Both decode kernels of one token, and the gate product of the tokens of prefill.

    The banks hold the chosen experts only: which ones they are does not change a byte.
    """
    _, level, dtype, prefill, block = setting
    layer = MODELS[setting.model]
    levels = [_MIXED[i % len(_MIXED)] if level == "mixed" else int(level) for i in range(layer.active)]
    gate, up = (_bank(levels, layer.hidden, layer.width, layer.bias, seed) for seed in (1, 2))
    down = _bank(levels, layer.width, layer.hidden, layer.bias, 3)
    state = np.random.RandomState(0)
    x = mx.array(state.standard_normal((1, layer.width)).astype(np.float32)).astype(DTYPES[dtype])
    hidden = mx.array(state.standard_normal((1, layer.active, layer.hidden)).astype(np.float32)).astype(DTYPES[dtype])
    experts = mx.array(state.permutation(layer.active)[None].astype(np.uint32))
    weights = mx.array(state.dirichlet(np.ones(layer.active))[None].astype(np.float32))
    signs = mx.array(state.choice([-1.0, 1.0], layer.hidden).astype(np.float16))
    rotation = Rotation(signs, block) if block else None
    reference = ReferenceKernels()
    exact_hidden = reference.expert_gate_up(x.astype(mx.float32), experts, gate, up, layer.activation, rotation)
    exact = reference.expert_down(hidden.astype(mx.float32), experts, weights, down)
    cases = [
        _Case(
            "expert_gate_up",
            lambda kernels: kernels.expert_gate_up(x, experts, gate, up, layer.activation, rotation),
            exact_hidden,
            (gate, up),
            (x, experts, signs) if block else (x, experts),
        ),
        _Case(
            "expert_down",
            lambda kernels: kernels.expert_down(hidden, experts, weights, down),
            exact,
            (down,),
            (hidden, experts, weights),
        ),
    ]
    if prefill:
        many = mx.array(state.standard_normal((prefill, layer.width)).astype(np.float32)).astype(DTYPES[dtype])
        order, offsets, _ = sort_by_expert(mx.broadcast_to(experts, (prefill, layer.active)), layer.active)
        rows = (order // layer.active).astype(mx.uint32)
        exact = reference.expert_gemm(many.astype(mx.float32), rows, offsets, gate)
        cases.append(
            _Case(
                "expert_gemm",
                lambda kernels: kernels.expert_gemm(many, rows, offsets, gate),
                exact,
                (gate,),
                (many, rows, offsets),
            )
        )
    return cases


def _bank(levels: Sequence[int], rows: int, columns: int, bias: bool, seed: int) -> PlaneBank:
    """Random codes and scales."""
    shape = MatrixShape("w", rows, columns, choose_group_size(columns, GROUP_SIZES[0]))
    state = np.random.RandomState(seed)
    added = mx.array(state.standard_normal((len(levels), rows)).astype(np.float16)) if bias else None
    bank = PlaneBank.empty(shape, levels, added)
    for expert, level in enumerate(levels):
        for plane in range(num_planes(level)):
            bank.write_plane(expert, plane, state.bytes(shape.plane_nbytes(plane)))
        scales = state.uniform(0.5, 1.5, shape.num_groups) / (2**level * columns**0.5)
        bank.write_scales(expert, scales.astype(np.float16), 1.0)
    return bank


def _row(case: _Case, found: mx.array, setting: _Setting, **measured: Any) -> Row:
    error = float(np.array(mx.abs(found.astype(mx.float32) - case.exact).max() / mx.abs(case.exact).max()))
    # prefill rounds codes above 8 bits to the activations' type, as it rounds the results
    rounded = 2 if case.kernel == "expert_gemm" and setting.level not in ("mixed", *map(str, NARROW_LEVELS)) else 1
    within = error <= rounded * TOLERANCE[setting.dtype]
    named = setting.model, case.kernel, setting.level, setting.dtype
    return Row(*named, error, within, case.weight_nbytes, **measured)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU, and in the simulator
# ---------------------------------------------------------------------------------------------------------------------


def _on_gpu(setting: _Setting) -> list[Row]:
    kernels, rows = MetalKernels(), []
    for case in _cases(setting):
        found = case.launch(kernels)
        mx.eval(found)
        seconds = []
        for _ in range(_REPEATS):
            # many launches in one evaluation, so that its fixed cost does not count
            start = time.perf_counter()
            mx.eval([case.launch(kernels) for _ in range(_REPEATS)])
            seconds.append((time.perf_counter() - start) / _REPEATS)
        row = _row(case, found, setting)
        rows.append(
            Row(
                **{
                    **asdict(row),
                    "microseconds": median(seconds) * 1e6,
                    "gigabytes_per_second": row.weight_nbytes / median(seconds) / 1e9,
                }
            )
        )
    return rows


def _simulator() -> Callable[[_Setting], list[Row]]:
    """The same measurement in metalsim. Raises UserError where it is not at hand."""
    metalsim = _load_metalsim()
    reason = metalsim.missing()
    if reason is not None:
        raise UserError(f"the kernels cannot be executed here: {reason}", "install it, or run this on a Mac")

    def bench(setting: _Setting) -> list[Row]:
        rows = []
        for case in _cases(setting):
            results: list[Any] = []

            def factory(results: list[Any] = results, **kernel: Any) -> Callable[..., list[mx.array]]:
                def call(**launch: Any) -> list[mx.array]:
                    results.append(metalsim.run(**kernel, **launch, profile=True, count=True))
                    return results[-1].outputs

                return call

            found = case.launch(MetalKernels(factory))
            rows.append(_row(case, found, setting, **_measured(case, results[-1])))
        return rows

    return bench


def _measured(case: _Case, result: Any) -> dict[str, Any]:
    weights = sum(bank.num_experts * bank.shape.num_weights for bank in case.banks)
    of_words = [stats for name, stats in result.buffers.items() if name.endswith("words")]
    all_read = sum(stats.unique_read for stats in result.buffers.values())
    per_weight = result.operations.per(weights)
    return {
        "requested": sum(stats.simd_bytes for stats in of_words) / case.weight_nbytes,
        "read": sum(stats.unique_read for stats in of_words) / case.weight_nbytes,
        "all_read": all_read / case.weight_nbytes,
        "over_least": all_read / case.least_nbytes,
        "simple_per_weight": per_weight["simple"],
        "complex_per_weight": per_weight["complex"],
        "findings": len(result.findings),
    }


def _mlx_line() -> str:
    """The arithmetic of MLX's own kernel at 2 bits by the same counter: 8 rows of 2048 columns in groups of 64."""
    mlx_kernels = importlib.import_module("metalsim.mlx_kernels")
    options = importlib.import_module("metalsim.launch").Options(check=False, operations=True)
    state = np.random.RandomState(0)
    weights = mlx_kernels.quantize(mx.array(state.standard_normal((1, 8, 2048)), mx.float16), 64, 2)
    x = mx.array(state.standard_normal((1, 1, 2048)), mx.float16)
    per_weight = mlx_kernels.gather_qmv(x, weights, [0], [0], fast=True, options=options).operations.per(8 * 2048)
    return (
        "MLX's affine_gather_qmv_fast at 2 bits, by the same counter: "
        f"simple {per_weight['simple']:.2f}, complex {per_weight['complex']:.2f} per weight"
    )


def _load_metalsim() -> Any:
    """tests/metalsim of this checkout as a module: it is no part of the package."""
    if "metalsim" not in sys.modules:
        folder = Path(__file__).resolve().parents[1] / "tests" / "metalsim"
        file = folder / "__init__.py"
        if not file.is_file():
            raise UserError(
                "this machine has no Metal GPU, and an installed package does not carry the simulator",
                "run this on a Mac, or from a checkout of the project",
            )
        spec = importlib.util.spec_from_file_location("metalsim", file, submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["metalsim"] = module
        spec.loader.exec_module(module)
    return sys.modules["metalsim"]


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("model", "model", "{:<17}"),
    ("kernel", "kernel", "{:<15}"),
    ("level", "bits", "{:<6}"),
    ("error", "error", "{:>8.1e}"),
    ("weight_nbytes", "bytes", "{:>11}"),
    ("requested", "asked", "{:>6.3f}"),
    ("read", "read", "{:>6.3f}"),
    ("all_read", "all", "{:>6.3f}"),
    ("over_least", "least", "{:>6.3f}"),
    ("simple_per_weight", "simple", "{:>7.2f}"),
    ("complex_per_weight", "complex", "{:>8.2f}"),
    ("findings", "found", "{:>6}"),
    ("microseconds", "us", "{:>8.1f}"),
    ("gigabytes_per_second", "GB/s", "{:>6.1f}"),
)


def _heading() -> str:
    return " ".join(_width(template).format(title) for _, title, template in _COLUMNS)


def _line(row: Row) -> str:
    values = ((getattr(row, name), template) for name, _, template in _COLUMNS)
    return " ".join(template.format(v) if v is not None else _width(template).format("-") for v, template in values)


def _width(template: str) -> str:
    """The template of a column for text: without its number format."""
    return template.split(".")[0].rstrip("}") + "}"
