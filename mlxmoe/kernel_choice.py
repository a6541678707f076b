"""Whether the kernels are used on this machine: each is compared with its reference on the user's GPU, and timed against
MLX's built-in products on the model's shapes. What was found is kept in a record until GPU, system, MLX or kernels change.

Owns the checks, the record and the choice. `mlxmoe doctor` prints them, the loader asks `select`.

Shapes: T tokens, A active experts per token, E experts, D model dim, F expert dim, K columns, G group size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import resources
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlxmoe.arguments import note
from mlxmoe.copies import Copies
from mlxmoe.experts import Bucket, ExpertLayer, KernelExperts, PlaneLinear
from mlxmoe.files import write_atomically
from mlxmoe.formats import FIELD_BITS, LEVELS, MatrixShape, array_bytes, field_width, words_per_row
from mlxmoe.kernels import (
    PHASES,
    PREFILL,
    Activation,
    Bank,
    ExpertBanks,
    MetalKernels,
    PlaneBank,
    QuantizedBank,
    ReferenceKernels,
    Rotation,
    has_rotation,
    sort_by_expert,
)
from mlxmoe.plan import LayerPlan
from mlxmoe.rotation import LayerTurns, Turn, hadamard_size
from mlxmoe.router import Router

Kernels = MetalKernels | ReferenceKernels
Clock = Callable[[], float]

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
# Largest error against the largest output: half a unit in the last place of the output's type
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 2e-6}
# Router weights are float32, through the GPU's own exp
ROUTE_TOLERANCE = 1e-4
EXPERT_KERNELS = ("expert_gate_up", "expert_down", "expert_gemm")
OK, DIFFERS, FAILED = "ok", "differs", "failed"
KERNELS, BUILTINS = "kernels", "builtins"  # what is timed

_RECORD_FORMAT = 1
_WARM_UP, _REPEATS = 2, 11
_ROUTINGS = 8  # tokens per timed call at decode: the launch of one alone would be most of its time
_CHUNK = 256  # tokens of a prefill chunk
_REFERENCE = ReferenceKernels()
_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "swiglu": nn.silu,
    "swiglu_oai": nn.silu,
    "geglu": nn.gelu_approx,
    "relu2": nn.relu2,
}
_SWIGLU = Activation("swiglu")


def has_kernels(layer: LayerPlan) -> bool:
    """Whether the kernels can run a converted layer, as far as its rotations and copies go."""
    return layer.replicas is None and all(
        has_rotation(r.name, k) for r, k in zip(layer.rotations, layer.rotated_columns, strict=True)
    )


class DeviceFacts(NamedTuple):
    """What a record holds for: any difference makes it void. `kernels` is a hash of their text and launches."""

    gpu: str
    architecture: str
    system: str
    mlx: str
    kernels: str


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer: D, F, E, A, group sizes along D and F, and the levels that its experts have.

    `codec`: planes, affine or mxfp4; the levels of these two are the bits of the first projections and of the last, once
    where they agree. `dtype`: of the activations. `rotation`: block of the hidden values' rotation, 0 without.
    """

    width: int
    hidden: int
    experts: int
    active: int
    group_size: int
    hidden_group_size: int
    levels: tuple[int, ...]
    dtype: str
    activation: Activation = _SWIGLU
    bias: bool = False
    codec: str = "planes"
    rotation: int = 0

    @classmethod
    def of_plan(
        cls, layer: LayerPlan, active: int, dtype: mx.Dtype, activation: Activation, bias: bool = False
    ) -> LayerShape:
        """A converted layer as its file has it; a memory budget can only lower the levels of its experts."""
        first, last = layer.projections[0], layer.projections[-1]
        levels = tuple(sorted({level for expert in layer.experts for level in expert.levels}))
        sizes = first.columns, first.rows, len(layer.experts), active, first.group_size, last.group_size
        block = hadamard_size(layer.rotations.hidden.name, last.columns)
        return cls(*sizes, levels, _name(dtype), activation, bias, rotation=block)

    @classmethod
    def of_stock(cls, banks: ExpertBanks, active: int, dtype: mx.Dtype) -> LayerShape:
        """A layer of a stock checkpoint, from experts.stock_banks."""
        first, last = banks.gate, banks.down
        assert isinstance(first, QuantizedBank)
        assert isinstance(last, QuantizedBank)
        levels = tuple(dict.fromkeys((first.bits, last.bits)))
        sizes = first.shape.columns, first.shape.rows, first.num_experts, active
        groups = first.shape.group_size, last.shape.group_size
        return cls(*sizes, *groups, levels, _name(dtype), banks.activation, first.bias is not None, first.mode)

    @property
    def name(self) -> str:
        """One line, the key of what was measured for it."""
        kind, alpha, limit = self.activation.kind, self.activation.alpha, self.activation.limit
        activation = f"{kind}({alpha:g},{limit:g})" if kind == "swiglu_oai" else kind
        format_name = f"{'rotated ' if self.rotation else ''}{self.codec} {'/'.join(map(str, self.levels))} bit"
        sizes = f"D={self.width} F={self.hidden} E={self.experts} A={self.active}"
        groups = f"G={self.group_size},{self.hidden_group_size}"
        rotation = f" R={self.rotation}" if self.rotation else ""
        return f"{format_name} {sizes} {groups} {activation}{' bias' if self.bias else ''}{rotation}"


@dataclass(frozen=True)
class Check:
    """One kernel against its reference. `error`: largest error over largest output, None where there is none."""

    kernel: str
    dtype: str
    variant: str
    status: str
    error: float | None = None
    reason: str = ""

    @property
    def key(self) -> str:
        return check_key(self.kernel, self.dtype, self.variant)


class Timing(NamedTuple):
    """Median seconds of every candidate that ran, and the error of every one that did not."""

    seconds: dict[str, float]
    failures: dict[str, str]

    @property
    def fastest(self) -> str | None:
        """The first of the candidates named in `seconds` that none beats."""
        return min(self.seconds, key=lambda name: self.seconds[name], default=None)


class Choice(NamedTuple):
    """The kernels to use, or None for MLX's built-ins, and one line that says why. `phases`: what the kernels
    compute, if any; only of a stock format can MLX's built-ins compute the rest, since both read the same arrays."""

    kernels: Kernels | None
    reason: str
    phases: tuple[str, ...] = PHASES


class Case(NamedTuple):
    """A launch on fixed inputs. `launch(kernels, dtype)`: with activations of that type; integers must come out equal."""

    kernel: str
    dtype: str
    variant: str
    launch: Callable[[Kernels, mx.Dtype], tuple[mx.array, ...]]
    tolerance: float

    @property
    def key(self) -> str:
        return check_key(self.kernel, self.dtype, self.variant)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1]


def check_key(kernel: str, dtype: str, variant: str) -> str:
    """What a check goes by in the record."""
    return f"{kernel} {dtype} {variant}"


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def metal_facts() -> DeviceFacts | None:
    """The facts of this process's GPU, or None where the kernels cannot run: no Metal, or MLX was sent to the CPU."""
    if not MetalKernels.available() or mx.default_device() == mx.cpu:
        return None
    device = mx.device_info()
    system = f"{platform.system()} {platform.mac_ver()[0] or platform.release()}"
    names = str(device.get("device_name", "")), str(device.get("architecture", ""))
    return DeviceFacts(*names, system, version("mlx"), kernels_hash())


def kernels_hash() -> str:
    """SHA-256 over every text in metal/ and over kernels.py, which holds the launches."""
    package = resources.files("mlxmoe")
    texts = [file for file in (package / "metal").iterdir() if file.name.endswith((".metal", ".h"))]
    digest = hashlib.sha256()
    for file in [*sorted(texts, key=lambda file: file.name), package / "kernels.py"]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def record_path() -> Path:
    """Where the record lies: $XDG_CACHE_HOME/mlxmoe, else ~/Library/Caches/mlxmoe on macOS and ~/.cache/mlxmoe."""
    home = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(home)) / "mlxmoe" / "kernels.json"


# ---------------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What is known about the kernels on one machine. `unfinished`: checks began and the process ended in them."""

    facts: DeviceFacts
    checks: dict[str, Check] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    unfinished: bool = False

    @classmethod
    def load(cls, path: Path, facts: DeviceFacts) -> Record:
        """The record at `path`; an empty one where there is none, it is damaged, or it is of other facts."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] == _RECORD_FORMAT and found["facts"] == facts._asdict():
                return cls(facts, *_read_results(found), _typed(found["unfinished"], bool))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # as if absent: everything in it can be measured again
        return cls(facts)

    def save(self, path: Path) -> None:
        """Writes it whole or not at all. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.as_json(), indent=1) + "\n")

    def as_json(self) -> dict[str, Any]:
        return {
            "format": _RECORD_FORMAT,
            "facts": self.facts._asdict(),
            "unfinished": self.unfinished,
            "checks": [asdict(check) for check in self.checks.values()],
            "timings": {key: timing._asdict() for key, timing in self.timings.items()},
        }


def _read_results(found: dict[str, Any]) -> tuple[dict[str, Check], dict[str, Timing]]:
    """Raises one of load's errors for what no record holds."""
    checks = [Check(**row) for row in found["checks"]]
    for check in checks:
        texts = check.kernel, check.dtype, check.variant, check.reason
        if check.status not in (OK, DIFFERS, FAILED) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"no check: {check}")
        if check.error is not None:
            _typed(check.error, float)
    timings = {}
    for key, row in found["timings"].items():
        seconds = {str(name): _typed(value, float) for name, value in row["seconds"].items()}
        timings[key] = Timing(seconds, {str(name): _typed(text, str) for name, text in row["failures"].items()})
    return {check.key: check for check in checks}, timings


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check(kernels: Kernels, cases: Iterable[Case]) -> list[Check]:
    """Runs every case on `kernels` and on the reference (on the CPU, in float32). Waits for each."""
    return [_check(kernels, case) for case in cases]


def _check(kernels: Kernels, case: Case) -> Check:
    name = case.kernel, case.dtype, case.variant
    with mx.stream(mx.cpu):
        expected = case.launch(_REFERENCE, mx.float32)
        mx.eval(expected)
    try:
        found = case.launch(kernels, DTYPES[case.dtype])
        mx.eval(found)
    except (RuntimeError, ValueError) as error:  # what MLX makes of a compiler's message
        return Check(*name, FAILED, None, _first_line(error))
    with mx.stream(mx.cpu):
        return _compared(name, found, expected, case.tolerance)


def _compared(
    name: tuple[str, str, str], found: Sequence[mx.array], expected: Sequence[mx.array], tolerance: float
) -> Check:
    worst = 0.0
    for one, exact in zip(found, expected, strict=True):
        if one.shape != exact.shape:
            return Check(*name, DIFFERS, None, f"shape {one.shape} where {exact.shape} is expected")
        if not mx.issubdtype(exact.dtype, mx.floating):
            if not mx.array_equal(one, exact).item():
                return Check(*name, DIFFERS, None, "other experts than the reference chooses")
            continue
        values = one.astype(mx.float32)
        if not mx.all(mx.isfinite(values)).item():
            return Check(*name, DIFFERS, None, "values that are not finite")
        ratio = mx.abs(values - exact).max() / mx.abs(exact).max()
        worst = max(worst, float(np.asarray(ratio)))
    if worst > tolerance:
        return Check(*name, DIFFERS, worst, f"error {worst:.1e}, at most {tolerance:.0e} is rounding")
    return Check(*name, OK, worst)


def _first_line(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong, or the first of any other."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])[:300]


def small_layer(dtype: str, codec: str = "planes", bits: tuple[int, ...] = (4,)) -> LayerShape:
    """What every GPU is checked with: all levels in one bank (a stock format: `bits`), biases, a wide and a narrow
    projection."""
    group_size = 32 if codec == "mxfp4" else 64
    levels = LEVELS if codec == "planes" else bits
    return LayerShape(1024, 192, 7, 4, group_size, group_size, levels, dtype, bias=True, codec=codec)


def all_cases() -> Iterator[Case]:
    """Every kernel in both 16-bit types: experts in planes and in stock formats, rotation, routing."""
    for dtype in ("float16", "bfloat16"):
        for codec in ("planes", "affine", "mxfp4"):
            yield from expert_cases(small_layer(dtype, codec))
        rotated = dataclasses.replace(small_layer(dtype), rotation=64)
        yield from (case for case in expert_cases(rotated) if case.kernel == "expert_gate_up")
        yield from (_hadamard_case(dtype, block) for block in (128, 1024))
        yield from route_cases(dtype)


def route_cases(dtype: str) -> list[Case]:
    """The routing kernel: the two kinds of score, with a bias and in groups."""
    return [
        _route_case(dtype, "softmax", Router(128, 8, normalise=True)),
        _route_case(dtype, "sigmoid in groups", Router(64, 6, "sigmoid", 8, 3, "top2", True, 1e-20, 2.5)),
    ]


def expert_cases(layer: LayerShape) -> list[Case]:
    """The three expert kernels on random experts of this shape: two tokens at decode, and a
    chunk of twelve."""
    banks = _random_banks(layer)
    experts = _routings(layer, banks.gate.num_experts, 2)
    chunk = _routings(layer, banks.gate.num_experts, 12)
    order, offsets, _ = sort_by_expert(chunk, banks.gate.num_experts)
    rows = (order // layer.active).astype(mx.uint32)
    x, hidden = _normal((12, layer.width), 5, layer), _normal((2, layer.active, layer.hidden), 6, layer)
    weights = mx.softmax(_normal((2, layer.active), 7, layer).astype(mx.float32), axis=-1)

    def gate_up(kernels: Kernels, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        rows = x[:2].astype(dtype)
        return (kernels.expert_gate_up(rows, experts, banks.gate, banks.up, layer.activation, banks.rotation),)

    def down(kernels: Kernels, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        return (kernels.expert_down(hidden.astype(dtype), experts, weights, banks.down),)

    def gemm(kernels: Kernels, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        return (kernels.expert_gemm(x.astype(dtype), rows, offsets, banks.gate),)

    rounding = TOLERANCE[layer.dtype]
    # Prefill rounds codes above 8 bits to the activations' type, as it rounds the results: each by half a unit
    longer = layer.codec == "planes" and max(layer.levels) > FIELD_BITS
    tolerances = rounding, rounding, 2 * rounding if longer else rounding
    launches = zip(EXPERT_KERNELS, (gate_up, down, gemm), tolerances, strict=True)
    return [Case(kernel, layer.dtype, layer.name, launch, tolerance) for kernel, launch, tolerance in launches]


def _hadamard_case(dtype: str, block: int) -> Case:
    x, signs = mx.random.normal((2, 1024), key=mx.random.key(8)).astype(DTYPES[dtype]), _signs(1024)

    def launch(kernels: Kernels, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        return (kernels.hadamard_blocks(x.astype(dtype), signs, block),)

    return Case("hadamard_blocks", dtype, f"blocks of {block}", launch, TOLERANCE[dtype])


def _route_case(dtype: str, variant: str, router: Router) -> Case:
    logits = mx.random.normal((4, router.num_experts), key=mx.random.key(9)).astype(DTYPES[dtype])
    bias = mx.linspace(-0.1, 0.1, router.num_experts) if router.score == "sigmoid" else None

    def launch(kernels: Kernels, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        return tuple(kernels.route(logits.astype(dtype), bias, router))

    return Case("route", dtype, variant, launch, ROUTE_TOLERANCE)


def _routings(layer: LayerShape, num_experts: int, tokens: int) -> mx.array:
    """uint32 [T, A], distinct experts per token."""
    state = np.random.RandomState(3)
    return mx.array(np.stack([state.permutation(num_experts)[: layer.active] for _ in range(tokens)]).astype(np.uint32))


def _normal(shape: tuple[int, ...], seed: int, layer: LayerShape) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(DTYPES[layer.dtype])


def _signs(columns: int) -> mx.array:
    return mx.array([1.0, -1.0, -1.0, 1.0] * (columns // 4))


def _levels(layer: LayerShape) -> list[int]:
    """The levels of the experts that stand for a layer: all of its levels, and enough experts that calls differ."""
    number = max(min(layer.experts, 2 * layer.active), len(layer.levels))
    return [layer.levels[i % len(layer.levels)] for i in range(number)]


def _random_banks(layer: LayerShape) -> ExpertBanks:
    """Any bits are codes: nothing has to be quantized."""
    inner = MatrixShape("gate", layer.hidden, layer.width, layer.group_size)
    outer = MatrixShape("down", layer.width, layer.hidden, layer.hidden_group_size)
    bits = layer.levels[0], layer.levels[-1]
    up = _random_bank(layer, inner, 2, bits[0]) if layer.activation.kind != "relu2" else None
    rotation = Rotation(_signs(layer.hidden), layer.rotation) if layer.rotation else None
    first, last = _random_bank(layer, inner, 1, bits[0]), _random_bank(layer, outer, 3, bits[1])
    return ExpertBanks(first, up, last, layer.activation, rotation)


def _random_bank(layer: LayerShape, shape: MatrixShape, seed: int, bits: int) -> Bank:
    """`bits`: of a stock format; experts in planes have the layer's levels."""
    levels, dtype = _levels(layer), DTYPES[layer.dtype]
    bias = _normal((len(levels), shape.rows), seed + 20, layer) if layer.bias else None
    if layer.codec == "planes":
        empty = PlaneBank.empty(shape, levels, bias)
        bank = dataclasses.replace(empty, words=_bits(empty.words.shape, seed))
        for expert, scales in enumerate(_scales(shape, levels, seed).astype(mx.float16)):
            bank.write_scales(expert, array_bytes(scales), 1.0)
        return bank
    words = _bits((len(levels), shape.rows, words_per_row(shape.columns, bits)), seed)
    if layer.codec == "mxfp4":
        groups = (len(levels), shape.rows, shape.columns // shape.group_size)
        exponent = 126 - round(math.log2(shape.columns) / 2)
        scales = mx.random.randint(exponent - 1, exponent + 2, groups, key=mx.random.key(seed + 10)).astype(mx.uint8)
        return QuantizedBank(shape, words, scales, None, bits, layer.codec, bias)
    scales = _scales(shape, [bits] * len(levels), seed).astype(dtype)
    return QuantizedBank(shape, words, scales, -scales * (2**bits - 1) / 2, bits, layer.codec, bias)


def _bits(shape: tuple[int, ...], seed: int) -> mx.array:
    """Random uint32."""
    data = np.random.RandomState(seed).bytes(4 * math.prod(shape))
    return mx.array(np.frombuffer(data, np.uint32).reshape(shape))


def _scales(shape: MatrixShape, levels: Sequence[int], seed: int) -> mx.array:
    """float32 [E, N, K/G] that give products of order 1 at every level."""
    size = (len(levels), shape.rows, shape.columns // shape.group_size)
    step = mx.array([2.0**-level for level in levels])[:, None, None]
    return mx.random.uniform(2, 6, size, key=mx.random.key(seed + 10)) * step / shape.columns**0.5


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def tune(candidates: Mapping[str, Callable[[], object]], clock: Clock = time.perf_counter) -> Timing:
    """Times the candidates, A B, B A, ..., after warming up each. A candidate returns when its work is done; one that
    raises is left out."""
    running, failures = dict(candidates), {}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(_WARM_UP + _REPEATS):
        # The order alternates: whoever runs second finds warm caches, or a machine that has slowed down
        for name in list(running) if repeat % 2 == 0 else reversed(list(running)):
            start = clock()
            try:
                running[name]()
            except (RuntimeError, ValueError) as error:
                failures[name] = _first_line(error)
                del running[name]
                continue
            if repeat >= _WARM_UP:
                samples[name].append(clock() - start)
    return Timing({name: statistics.median(samples[name]) for name in running}, failures)


def layer_candidates(layer: LayerShape, kernels: Kernels, phase: str) -> dict[str, Callable[[], object]]:
    """A layer as the model would run it, both ways, for phase_tokens tokens. At decode they come one by one."""
    banks, tokens = _random_banks(layer), phase_tokens(layer, phase)
    experts = _routings(layer, banks.gate.num_experts, tokens)
    calls = 1 if phase == PREFILL else tokens
    x = _normal((calls, tokens // calls, layer.width), 5, layer)
    experts = experts.reshape(*x.shape[:2], layer.active)

    def candidate(module: KernelExperts | ExpertLayer) -> Callable[[], object]:
        return lambda: mx.eval([module(x[i], experts[i]) for i in range(calls)])

    return {KERNELS: candidate(KernelExperts(banks, kernels)), BUILTINS: candidate(_builtin_layer(layer, banks))}


def phase_tokens(layer: LayerShape, phase: str) -> int:
    """Tokens of one timed call. At prefill as many as give an expert the rows that it has in a chunk of _CHUNK tokens: the
    banks that stand for a layer hold fewer experts than it has."""
    num_experts = len(_levels(layer))
    least = num_experts // layer.active + 1  # with fewer a chunk would run on the kernels of decode
    return max(_CHUNK * num_experts // layer.experts, least) if phase == PREFILL else _ROUTINGS


def _builtin_layer(layer: LayerShape, banks: ExpertBanks) -> ExpertLayer:
    """The same shapes for MLX's products: a stock format as it is; planes with merged codes, a bucket per level."""
    levels, projections = _levels(layer), {}
    for name, bank in zip(("gate", "up", "down"), banks[:3], strict=True):
        if isinstance(bank, QuantizedBank):
            projections[name] = _stock_linear(bank)
        elif bank is not None:
            projections[name] = _merged_linear(bank, levels, DTYPES[layer.dtype])
    activation = _ACTIVATIONS[layer.activation.kind]
    glu: Callable[..., mx.array] = lambda up, gate: activation(gate) * up  # noqa: E731
    module = ExpertLayer(projections, glu if banks.up is not None else activation, len(levels))
    if banks.rotation is not None:
        module.copies = Copies((LayerTurns(hidden=Turn(*banks.rotation)),))
    return module


def _stock_linear(bank: QuantizedBank) -> nn.Module:
    """mlx-lm's module around the arrays of a bank."""
    group_size = bank.shape.group_size
    linear = QuantizedSwitchLinear(group_size, 1, 1, bias=False, group_size=group_size, bits=bank.bits, mode=bank.mode)
    linear.weight, linear.scales, linear.biases = bank.words, bank.scales, bank.biases
    if bank.bias is not None:
        linear.bias = bank.bias
    return linear


def _merged_linear(bank: PlaneBank, levels: Sequence[int], dtype: mx.Dtype) -> PlaneLinear:
    """Values are of no account: the time does not depend on them."""
    shape = bank.shape
    linear = PlaneLinear(shape, len(levels), bank.bias is not None)
    if bank.bias is not None:
        linear.bias = bank.bias
    buckets = []
    widths = [field_width(level) for level in levels]
    for width in sorted(set(widths)):
        mine = [expert for expert, of_expert in enumerate(widths) if of_expert == width]
        bits = min(width, FIELD_BITS)
        held = shape._replace(rows=shape.rows * (width // bits))
        scales = _scales(held, [bits] * len(mine), width)
        words = _bits((len(mine), held.rows, words_per_row(shape.columns, bits)), width)
        biases = -scales * (2**bits - 1) / 2
        buckets.append((mine, Bucket(width, words, scales.astype(dtype), biases.astype(dtype))))
    linear.fill(buckets)
    mx.eval([bucket for _, bucket in buckets])
    return linear


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def select(
    layer: LayerShape,
    facts: DeviceFacts | None,
    make: Callable[[], Kernels] = MetalKernels,
    path: Path | None = None,
    clock: Clock = time.perf_counter,
    say: Callable[[str], None] = note,
) -> Choice:
    """The kernels for a model whose experts have this shape, or MLX's built-ins.

    Experts in planes lie in memory for one of the two: what takes less for a token read and a token written together.
    Of a stock format each phase goes to the faster. `facts`: of metal_facts. Takes some seconds where the record at `path`
    (None: record_path) knows nothing of this GPU or this shape, and writes it. A kernel that is wrong or does not run is
    told to the user through `say`.
    """
    if facts is None:
        return Choice(None, "MLX's built-in products: there is no Metal GPU")
    path = path or record_path()
    record = Record.load(path, facts)
    if record.unfinished:
        return _refused("a check of them did not come to its end on this GPU", say)
    kernels, layers = make(), (small_layer(layer.dtype, layer.codec, layer.levels), layer)
    needed = [check_key(kernel, layer.dtype, each.name) for each in layers for kernel in EXPERT_KERNELS]
    needed += [check_key(case.kernel, case.dtype, case.variant) for case in route_cases(layer.dtype)]
    if any(key not in record.checks for key in needed):
        say("checking the Metal kernels on this GPU; this happens once")
        cases = chain(route_cases(layer.dtype), *map(expert_cases, layers))
        run_checks(record, kernels, cases, path)
    for key in needed:
        found = record.checks[key]
        if found.status != OK:
            return _refused(f"{found.kernel} in {found.dtype} {found.status} on this GPU ({found.reason})", say)
    timings = _timings(record, layer, kernels, path, clock)
    for phase, timing in timings.items():
        if KERNELS in timing.failures:
            return _refused(f"they failed at {phase} on this GPU ({timing.failures[KERNELS]})", say)
    return _fastest(layer, kernels, timings)


def select_all(
    layers: Iterable[LayerShape],
    facts: DeviceFacts | None,
    make: Callable[[], Kernels] = MetalKernels,
    path: Path | None = None,
    clock: Clock = time.perf_counter,
    say: Callable[[str], None] = note,
) -> Choice:
    """As select, for a model whose layers differ: the phases that are the kernels' in all of them."""
    choices = [select(layer, facts, make, path, clock, say) for layer in dict.fromkeys(layers)]
    phases = tuple(phase for phase in PHASES if all(c.kernels is not None and phase in c.phases for c in choices))
    fewest = min(choices, key=lambda choice: len(choice.phases) if choice.kernels is not None else 0)
    return Choice(fewest.kernels if phases else None, fewest.reason, phases)


def timing_key(layer: LayerShape, phase: str) -> str:
    """What a timing goes by in the record."""
    return f"{phase} {layer.dtype} {layer.name}"


def _timings(record: Record, layer: LayerShape, kernels: Kernels, path: Path, clock: Clock) -> dict[str, Timing]:
    """Both phases of a layer, from the record; what it lacks is timed and written to it."""
    missing = [phase for phase in PHASES if timing_key(layer, phase) not in record.timings]
    if missing:
        with _guarded(record, path):
            for phase in missing:
                record.timings[timing_key(layer, phase)] = tune(layer_candidates(layer, kernels, phase), clock)
        mx.clear_cache()
    return {phase: record.timings[timing_key(layer, phase)] for phase in PHASES}


def _fastest(layer: LayerShape, kernels: Kernels, timings: Mapping[str, Timing]) -> Choice:
    """Of kernels and built-ins, all of whose timings are of one layer."""
    seconds = {
        phase: {name: taken / phase_tokens(layer, phase) for name, taken in timing.seconds.items()}
        for phase, timing in timings.items()
    }
    told = "; ".join(
        f"{phase}: " + ", ".join(f"{name} {1e6 * taken:.3g} us" for name, taken in per_token.items())
        for phase, per_token in seconds.items()
    )
    if layer.codec == "planes":
        sums = [sum(per_token.get(name, math.inf) for per_token in seconds.values()) for name in (KERNELS, BUILTINS)]
        phases: tuple[str, ...] = PHASES if sums[0] <= sums[1] else ()
    else:
        phases = tuple(phase for phase, timing in timings.items() if timing.fastest == KERNELS)
    where = "" if phases == PHASES else f" at {' and '.join(phases)}"
    name = f"Metal kernels{where}" if phases else "MLX built-in products"
    return Choice(kernels if phases else None, f"{name}: faster here ({told}; a layer and token)", phases)


def run_checks(record: Record, kernels: Kernels, cases: Iterable[Case], path: Path) -> list[Check]:
    """Runs the checks and puts their results into the record, which it writes to `path`."""
    with _guarded(record, path):
        checks = check(kernels, cases)
        record.checks |= {one.key: one for one in checks}
    return checks


@contextmanager
def _guarded(record: Record, path: Path) -> Iterator[None]:
    """A GPU fault ends the process, and no except clause runs: until this block ends, the record on disk says so.

    A record that cannot be written costs time at the next start, no more: a note, no error.
    """
    record.unfinished = True
    with suppress(OSError):
        record.save(path)
    try:
        yield
    finally:
        record.unfinished = False
        try:
            record.save(path)
        except OSError as error:
            note(f"the kernels will be checked again next time: {path} cannot be written ({error.strerror})")


def _refused(reason: str, say: Callable[[str], None]) -> Choice:
    say(f"warning: MLX's built-in products instead of the Metal kernels: {reason}; `mlxmoe doctor` shows more")
    return Choice(None, f"MLX's built-in products: {reason}")
