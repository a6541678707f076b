"""The choice between the kernels and MLX's built-ins, on a stand-in for the GPU: its kernels are the reference, with a
fault or a delay."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from mlxmoe import kernel_choice
from mlxmoe.checkpoint import DEMO
from mlxmoe.experts import ExpertLayer, stock_banks
from mlxmoe.files import write_atomically
from mlxmoe.kernel_choice import (
    BUILTINS,
    EXPERT_KERNELS,
    KERNELS,
    DeviceFacts,
    LayerShape,
    Record,
    Timing,
    all_cases,
    check,
    expert_cases,
    kernels_hash,
    layer_candidates,
    metal_facts,
    phase_tokens,
    record_path,
    run_checks,
    select,
    select_all,
    timing_key,
    tune,
)
from mlxmoe.kernels import PHASES, MetalKernels, ReferenceKernels
from mlxmoe.models import num_experts_per_token
from mlxmoe.plan import Plan
from mlxmoe.residency import merged_storage

FACTS = DeviceFacts("Apple M1 Pro", "applegpu_g13s", "Darwin 26.1", "0.32.4", "abc")
LAYER = LayerShape(64, 32, 6, 2, 32, 32, (2, 4), "float32")
METHODS = (*EXPERT_KERNELS, "hadamard_blocks", "route")


class Gpu:
    """Makes kernels that count their calls and pass every result through `fault`; its clock moves with every call."""

    def __init__(self, fault: Callable[[Any], Any] = lambda result: result, method: str = "", seconds: float = 1.0):
        self.fault, self.method, self.seconds = fault, method, seconds
        self.now, self.made, self.calls = 0.0, 0, 0
        self.last: Any = None

    def clock(self) -> float:
        return self.now

    def make(self) -> Any:
        self.made += 1
        kernels: Any = ReferenceKernels()
        self.last = kernels
        for name in METHODS:
            setattr(kernels, name, self._wrapped(name, getattr(kernels, name)))
        return kernels

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            self.now += self.seconds
            result = original(*args)
            return self.fault(result) if name == self.method else result

        return call


def fails(_: Any) -> Any:
    raise RuntimeError("[metal::Device] Unable to build metal library from source\nx.metal:7:1: error: no such type\n")


FAULTS = {
    "failed": (fails, "x.metal:7:1: error: no such type"),
    "differs": (lambda result: result * 1.01, "error 1.0e-02"),
    "nan": (lambda result: mx.where(result > 0, mx.nan, result), "not finite"),
    "shape": (lambda result: result[:1], "shape (1, "),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every GPU is checked with, narrower, and fewer repetitions."""
    monkeypatch.setattr(kernel_choice, "_REPEATS", 1)
    small = kernel_choice.small_layer
    monkeypatch.setattr(kernel_choice, "small_layer", lambda *a: dataclasses.replace(small(*a), width=128, hidden=64))


@pytest.fixture
def builtin_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu, float], None]:
    """Lets MLX's built-in products take their time on the clock of a stand-in."""
    original = mx.gather_qmm

    def install(gpu: Gpu, seconds: float) -> None:
        def call(*args: Any, **options: Any) -> mx.array:
            gpu.now += seconds
            return original(*args, **options)

        monkeypatch.setattr(mx, "gather_qmm", call)

    return install


def choose(gpu: Gpu, path: Path, layer: LayerShape = LAYER, facts: DeviceFacts = FACTS) -> tuple[Any, str, list[str]]:
    said: list[str] = []
    kernels, reason, _ = select(layer, facts, gpu.make, path, gpu.clock, said.append)
    return kernels, reason, said


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def test_every_kernel_type_and_format_is_checked() -> None:
    found = {(case.kernel, case.dtype, case.variant.split(" D=")[0]) for case in all_cases()}
    formats = ("planes 2/3/4/6/8/10/12/14/16 bit", "affine 4 bit", "mxfp4 4 bit")
    expected = {(kernel, name) for kernel in EXPERT_KERNELS for name in formats}
    expected.add(("expert_gate_up", "rotated planes 2/3/4/6/8/10/12/14/16 bit"))
    expected |= {("hadamard_blocks", "blocks of 128"), ("hadamard_blocks", "blocks of 1024")}
    expected |= {("route", "softmax"), ("route", "sigmoid in groups")}
    assert found == {(kernel, dtype, name) for kernel, name in expected for dtype in ("float16", "bfloat16")}


def test_right_kernels_pass_with_the_error_of_rounding() -> None:
    found = check(ReferenceKernels(), expert_cases(dataclasses.replace(LAYER, dtype="float16")))
    assert [one.status for one in found] == ["ok"] * 3
    assert all(1e-5 < one.error < 5e-4 for one in found)


@pytest.mark.parametrize("method", EXPERT_KERNELS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_its_kernel_and_nowhere_else(name: str, method: str) -> None:
    fault, reason = FAULTS[name]
    found = {one.kernel: one for one in check(Gpu(fault, method).make(), expert_cases(LAYER))}
    assert {kernel for kernel, one in found.items() if one.status != "ok"} == {method}
    assert found[method].status == ("failed" if name == "failed" else "differs")
    assert reason in found[method].reason
    assert (found[method].error is None) == (name != "differs")


def test_faults_of_rotation_and_routing_are_found() -> None:
    cases = [case for case in all_cases() if case.kernel in ("hadamard_blocks", "route") and case.dtype == "float16"]
    rotated = check(Gpu(lambda y: -y, "hadamard_blocks").make(), cases)
    assert [one.status for one in rotated] == ["differs", "differs", "ok", "ok"]
    swapped = check(Gpu(lambda r: r._replace(experts=r.experts[:, ::-1]), "route").make(), cases)
    assert [one.reason for one in swapped[2:]] == ["other experts than the reference chooses"] * 2
    weighed = check(Gpu(lambda r: r._replace(weights=r.weights * 1.001), "route").make(), cases)
    assert [one.status for one in weighed] == ["ok", "ok", "differs", "differs"]


def test_a_wrong_epilogue_is_found() -> None:
    """Signs left out, and the transform left out."""
    (case,) = [case for case in all_cases() if case.variant.startswith("rotated") and case.dtype == "float16"]
    right = ReferenceKernels()
    assert [one.status for one in check(right, [case])] == ["ok"]
    for wrong in (lambda rotation: rotation._replace(signs=mx.ones_like(rotation.signs)), lambda rotation: None):
        kernels: Any = ReferenceKernels()
        kernels.expert_gate_up = lambda *args, wrong=wrong: right.expert_gate_up(*args[:-1], wrong(args[-1]))
        assert [one.status for one in check(kernels, [case])] == ["differs"]


def test_faults_at_evaluation_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX compiles a kernel when its output is evaluated, not when it is launched."""
    launched: list[mx.array] = []
    evaluate = mx.eval

    def late(*arrays: Any) -> None:
        if any(array is one for _, array in tree_flatten(arrays) for one in launched):
            fails(None)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", late)
    found = check(Gpu(lambda y: launched.append(y) or y, "expert_down").make(), expert_cases(LAYER))
    assert [one.status for one in found] == ["ok", "failed", "ok"]


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def test_the_fastest_by_median_is_kept_whatever_the_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_REPEATS", 11)
    now, calls = 0.0, {"a": 0, "b": 0}
    order = []

    def candidate(name: str, seconds: float, outlier: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            calls[name] += 1
            order.append(name)
            now += outlier if calls[name] in (1, 5) else seconds

        return call

    found = tune({"a": candidate("a", 2, 0.001), "b": candidate("b", 1, 100)}, lambda: now)
    assert found.seconds == pytest.approx({"a": 2, "b": 1})
    assert found.fastest == "b"
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert calls == {"a": 13, "b": 13}


def test_the_warm_up_does_not_count() -> None:
    now = 0.0
    seconds = iter([100, 100, 1])

    def candidate() -> None:
        nonlocal now
        now += next(seconds)

    assert tune({"a": candidate}, lambda: now).seconds == {"a": 1}


def test_what_raises_is_left_out_of_the_timing() -> None:
    def broken() -> None:
        fails(None)

    found = tune({"a": broken, "b": lambda: None})
    assert found.fastest == "b"
    assert found.failures == {"a": "x.metal:7:1: error: no such type"}
    assert tune({"a": broken}).fastest is None


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize(("phase", "tokens", "calls"), [("decode", 8, 8), ("prefill", 170, 1)])
def test_both_candidates_run_the_layer(activation: str, phase: str, tokens: int, calls: int) -> None:
    """Two levels: the built-ins take two products for every projection, the kernels one launch, and one for gate and up
    together at decode."""
    gpu, layer = Gpu(), dataclasses.replace(LAYER, activation=kernel_choice.Activation(activation), bias=True)
    outputs: list[mx.array] = []
    original, products = mx.gather_qmm, []
    projections = 2 if activation == "relu2" else 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "gather_qmm", lambda *a, **k: products.append(k["bits"]) or original(*a, **k))
        candidates = layer_candidates(layer, gpu.make(), phase)  # which takes hold of the product
        patch.setattr(mx, "eval", outputs.extend)
        candidates[KERNELS]()
        launched = gpu.calls
        assert (len(products), launched) == (0, 16 if phase == "decode" else projections)
        candidates[BUILTINS]()
        assert (len(products), gpu.calls) == (calls * 2 * projections, launched)
    assert {array.shape for array in outputs} == {(tokens // calls, 2, 64)}
    assert all(mx.all(mx.isfinite(array)).item() for array in outputs)


def test_the_built_ins_hold_16_bits_as_the_loader_does() -> None:
    """Two fields of 8 bits, in one bucket with 12 bits; the kernels' planes as they are."""
    layer = dataclasses.replace(LAYER, levels=(2, 12, 16))
    banks = kernel_choice._random_banks(layer)
    module = kernel_choice._builtin_layer(layer, banks)
    levels, storage = kernel_choice._levels(layer), merged_storage(kernel_choice.DTYPES[layer.dtype])
    assert module.gate.nbytes == sum(storage.nbytes(banks.gate.shape, level) for level in levels)
    x, experts = mx.ones((2, layer.width)), mx.array([[0, 1], [2, 1]])
    assert module(x, experts).shape == (2, 2, layer.width)
    assert mx.all(mx.isfinite(module(x, experts))).item()
    narrow = dataclasses.replace(LAYER, levels=(2, 8))
    for shape, factor in ((layer, 2), (narrow, 1)):
        cases = {case.kernel: case.tolerance for case in expert_cases(shape)}
        assert cases["expert_gemm"] == factor * cases["expert_down"] == factor * cases["expert_gate_up"]


@pytest.mark.parametrize(("codec", "levels"), [("affine", (3,)), ("affine", (4, 6)), ("mxfp4", (4,))])
@pytest.mark.parametrize("phase", PHASES)
def test_both_candidates_of_a_stock_format_compute_the_same(codec: str, levels: tuple[int, ...], phase: str) -> None:
    layer = dataclasses.replace(LAYER, codec=codec, levels=levels, bias=True)
    outputs: list[mx.array] = []
    candidates = layer_candidates(layer, ReferenceKernels(), phase)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "eval", outputs.append)
        candidates[KERNELS]()
        candidates[BUILTINS]()
    for ours, theirs in zip(*outputs, strict=True):
        assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_timed_chunk_loads_its_experts_as_the_model_would() -> None:
    """256 tokens of 8 in 128 experts are 16 rows an expert: so are 32 tokens where 16 experts stand for the 128."""
    layer = dataclasses.replace(LAYER, experts=128, active=8)
    assert (phase_tokens(layer, "prefill"), phase_tokens(layer, "decode")) == (32, 8)
    few = dataclasses.replace(LAYER, experts=4000, active=2)
    assert phase_tokens(few, "prefill") * 2 > 4  # still more pairs than experts: the kernel of prefill


def test_a_layer_of_a_plan() -> None:
    plan = Plan.load(DEMO)
    active = num_experts_per_token(json.loads((DEMO / "config.json").read_text()))
    layer = LayerShape.of_plan(plan.layers[0], active, mx.bfloat16, LAYER.activation)
    assert (layer.width, layer.hidden, layer.experts, layer.active, layer.dtype) == (256, 128, 32, 4, "bfloat16")
    assert set(layer.levels) <= set(plan.level_histogram())
    assert layer.levels == tuple(sorted(layer.levels))


@pytest.mark.parametrize(("bits", "mode"), [((4, 4, 4), "affine"), ((3, 3, 6), "affine"), ((4, 4, 4), "mxfp4")])
def test_a_layer_of_a_stock_checkpoint(bits: tuple[int, ...], mode: str) -> None:
    switch = SwitchGLU(128, 64, 6)
    for name, width in zip(("gate_proj", "up_proj", "down_proj"), bits, strict=True):
        switch[name] = switch[name].to_quantized(32, width, mode=mode)
    banks = stock_banks(ExpertLayer.from_switch(switch))
    assert banks is not None
    layer = LayerShape.of_stock(banks, 2, mx.float16)
    levels = tuple(dict.fromkeys(bits))
    assert layer == LayerShape(128, 64, 6, 2, 32, 32, levels, "float16", LAYER.activation, False, mode)
    made = kernel_choice._random_banks(layer)
    assert [made.gate.format[:2], made.down.format[:2]] == [(mode, bits[0]), (mode, bits[2])]


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def test_without_metal_there_is_nothing_to_choose(tmp_path: Path) -> None:
    gpu, said = Gpu(), []
    choice = select(LAYER, None, gpu.make, tmp_path / "record.json", gpu.clock, said.append)
    assert choice[:2] == (None, "MLX's built-in products: there is no Metal GPU")
    assert (gpu.made, said, list(tmp_path.iterdir())) == (0, [], [])


def test_kernels_that_are_right_and_faster_are_used(tmp_path: Path, builtin_seconds: Any) -> None:
    gpu = Gpu(seconds=1e-6)
    builtin_seconds(gpu, 1e-6)
    kernels, reason, said = choose(gpu, tmp_path / "deep" / "record.json")
    assert kernels is not None
    # decode: 2 launches a layer against 6 products, of two levels; prefill: 3 launches against them, for 170 tokens
    times = "decode: kernels 2 us, builtins 6 us; prefill: kernels 0.0176 us, builtins 0.0353 us; a layer and token"
    assert reason == f"Metal kernels: faster here ({times})"
    assert said == ["checking the Metal kernels on this GPU; this happens once"]


def test_slow_kernels_are_not_used(tmp_path: Path, builtin_seconds: Any) -> None:
    gpu = Gpu(seconds=4e-6)
    builtin_seconds(gpu, 1e-6)
    kernels, reason, said = choose(gpu, tmp_path / "record.json")
    assert kernels is None
    times = "decode: kernels 8 us, builtins 6 us; prefill: kernels 0.0706 us, builtins 0.0353 us; a layer and token"
    assert reason == f"MLX built-in products: faster here ({times})"
    assert not any("warning" in line for line in said)


def timed(decode: tuple[float, float], prefill: tuple[float, float], layer: LayerShape) -> dict[str, Timing]:
    """Timings of a layer from seconds a token: of the kernels and of the built-ins."""
    return {
        phase: Timing(
            {name: s * phase_tokens(layer, phase) for name, s in zip((KERNELS, BUILTINS), each, strict=True)}, {}
        )
        for phase, each in (("decode", decode), ("prefill", prefill))
    }


STOCK_LAYER = dataclasses.replace(LAYER, codec="affine", levels=(4,))
FASTEST = [
    # decode, prefill (kernels, built-ins), then who computes what: of planes, and of a stock format
    ((1, 2), (1, 2), PHASES, PHASES),
    ((2, 1), (2, 1), (), ()),
    ((1, 4), (2, 1), PHASES, ("decode",)),  # planes: 3 against 5
    ((3, 4), (9, 1), (), ("decode",)),  # planes: 12 against 5
    ((4, 3), (1, 9), PHASES, ("prefill",)),
]


@pytest.mark.parametrize(("decode", "prefill", "of_planes", "of_stock"), FASTEST)
def test_each_phase_has_its_say(
    decode: tuple[float, float], prefill: tuple[float, float], of_planes: tuple[str, ...], of_stock: tuple[str, ...]
) -> None:
    for layer, expected in ((LAYER, of_planes), (STOCK_LAYER, of_stock)):
        kernels = ReferenceKernels()
        choice = kernel_choice._fastest(layer, kernels, timed(decode, prefill, layer))
        assert choice.phases == expected
        assert choice.kernels is (kernels if expected else None)
        told = {(): "MLX built-in products: ", PHASES: "Metal kernels: "}
        assert choice.reason.startswith(told.get(expected, f"Metal kernels at {''.join(expected)}: "))


def test_builtins_that_fail_at_a_phase_leave_it_to_the_kernels() -> None:
    timings = timed((2, 1), (2, 1), STOCK_LAYER)
    timings["prefill"] = Timing({KERNELS: 1.0}, {BUILTINS: "no such product"})
    assert kernel_choice._fastest(STOCK_LAYER, ReferenceKernels(), timings).phases == ("prefill",)
    assert kernel_choice._fastest(LAYER, ReferenceKernels(), timings).phases == PHASES


BOTH, NONE = PHASES, None
SELECTED = [
    ([BOTH, BOTH], PHASES),
    ([BOTH, ("decode",)], ("decode",)),
    ([("decode",), ("prefill",)], ()),
    ([BOTH, NONE], ()),
]


@pytest.mark.parametrize(("each", "expected"), SELECTED)
def test_layers_that_differ_share_one_choice(
    each: list[tuple[str, ...] | None], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [dataclasses.replace(LAYER, experts=8 + i) for i in range(len(each))]
    kernels, asked = ReferenceKernels(), []

    def select_one(layer: LayerShape, *_: Any) -> kernel_choice.Choice:
        asked.append(layer)
        phases = each[layers.index(layer)]
        return kernel_choice.Choice(kernels, f"{phases}", phases) if phases else kernel_choice.Choice(None, "None")

    monkeypatch.setattr(kernel_choice, "select", select_one)
    choice = select_all([*layers, *layers], FACTS)
    assert asked == layers  # equal ones once
    assert choice.phases == expected
    assert choice.kernels is (kernels if expected else None)
    assert choice.reason == f"{min(each, key=lambda phases: len(phases or ()))}"


def test_a_stock_format_is_checked_and_timed(tmp_path: Path, builtin_seconds: Any) -> None:
    """Slow at prefill only: 3 launches against 3 products, and at decode 2 against 3."""
    gpu = Gpu(seconds=1.2e-6)
    builtin_seconds(gpu, 1e-6)
    path = tmp_path / "record.json"
    choice = select(STOCK_LAYER, FACTS, gpu.make, path, gpu.clock, lambda _: None)
    assert choice.phases == ("decode",)
    assert choice.reason.startswith(
        "Metal kernels at decode: faster here (decode: kernels 2.4 us, builtins 3 us; prefill: "
    )
    record = Record.load(path, FACTS)
    assert set(record.timings) == {timing_key(STOCK_LAYER, phase) for phase in PHASES}
    variants = {one.variant.split(" D=")[0] for one in record.checks.values() if one.kernel == "expert_down"}
    assert variants == {"affine 4 bit"}
    assert choose(Gpu(fails, "expert_gemm", 0), tmp_path / "other.json", STOCK_LAYER)[0] is None
    again = Gpu(seconds=0)
    assert select(STOCK_LAYER, FACTS, again.make, path, again.clock, lambda _: None) == choice._replace(
        kernels=again.last
    )
    assert again.calls == 0


@pytest.mark.parametrize("method", EXPERT_KERNELS)
@pytest.mark.parametrize("name", FAULTS)
def test_one_bad_kernel_means_the_builtins_and_one_line_says_so(name: str, method: str, tmp_path: Path) -> None:
    fault, reason = FAULTS[name]
    for _ in range(2):  # measured, then from the record: the user is told every time
        kernels, why, said = choose(Gpu(fault, method, seconds=0), tmp_path / "record.json")
        assert kernels is None
        (warning,) = [line for line in said if line.startswith("warning: ")]
        assert method in warning
        assert reason in warning
        assert "mlxmoe doctor" in warning
        assert "\n" not in warning
        assert method in why


def test_a_kernel_that_no_model_needs_may_be_wrong(tmp_path: Path) -> None:
    assert choose(Gpu(fails, "hadamard_blocks", 0), tmp_path / "record.json")[0] is not None


@pytest.mark.parametrize("phase", PHASES)
def test_kernels_that_fail_in_the_model_only(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right when checked, and an error when timed as the model would run them."""
    candidates = {KERNELS: lambda: None, BUILTINS: lambda: None}
    broken = {KERNELS: lambda: fails(None), BUILTINS: lambda: None}
    monkeypatch.setattr(kernel_choice, "layer_candidates", lambda *a: broken if a[-1] == phase else candidates)
    kernels, _, said = choose(Gpu(), tmp_path / "record.json")
    assert kernels is None
    assert f"at {phase}" in said[-1]
    assert "no such type" in said[-1]
    assert said[-1].startswith("warning: ")


def test_the_shape_of_the_model_is_checked_as_well(tmp_path: Path) -> None:
    wrong_when_small = Gpu(lambda y: y if y.shape[-1] != LAYER.hidden else -y, "expert_gate_up", 0)
    kernels, _, said = choose(wrong_when_small, tmp_path / "record.json")
    assert kernels is None
    assert "expert_gate_up" in said[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------------


def test_a_second_start_measures_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    first, second = Gpu(seconds=0), Gpu(seconds=0)
    assert choose(first, path)[0] is not None
    kernels, _, said = choose(second, path)
    assert kernels is not None
    assert (first.calls > 0, second.calls, said) == (True, 0, [])
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_another_shape_is_measured_and_the_first_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    choose(Gpu(seconds=0), path)
    other = Gpu(seconds=0)
    choose(other, path, dataclasses.replace(LAYER, hidden=64))
    assert other.calls > 0
    assert len(Record.load(path, FACTS).timings) == 4
    again = Gpu(seconds=0)
    choose(again, path)
    assert again.calls == 0


@pytest.mark.parametrize("field", DeviceFacts._fields)
def test_a_record_of_another_machine_or_version_is_void(field: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    choose(Gpu(fails, "expert_down"), path)
    changed = Gpu(seconds=0)
    assert choose(changed, path, facts=FACTS._replace(**{field: "other"}))[0] is not None
    assert changed.calls > 0


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces what lies under all but the last of `keys` by the last."""

    def change(record: dict[str, Any]) -> None:
        *way, last, value = keys
        inner: Any = record
        for key in way:
            inner = inner[key]
        inner[last] = value

    return change


DAMAGE = {
    "format": put("format", 0),
    "checks": put("checks", None),
    "a check": put("checks", 0, {"kernel": "expert_down"}),
    "status": put("checks", 0, "status", "fine"),
    "reason": put("checks", 0, "reason", 3),
    "error": put("checks", 0, "error", "small"),
    "timings": put("timings", []),
    "a timing": put("timings", "x", {"seconds": {"kernels": "1"}, "failures": {}}),
    "unfinished": put("unfinished", "no"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_as_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    choose(Gpu(seconds=0), path)
    record = json.loads(path.read_text())
    DAMAGE[name](record)
    path.write_text(json.dumps(record))
    assert Record.load(path, FACTS) == Record(FACTS)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}"])
def test_what_is_no_record_is_as_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(data)
    assert Record.load(tmp_path / "record.json", FACTS) == Record(FACTS)
    assert choose(Gpu(seconds=0), tmp_path / "record.json")[0] is not None


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path, record = tmp_path / "record.json", Record(FACTS)
    run_checks(record, Gpu(fails, "expert_down").make(), expert_cases(LAYER), path)
    record.timings["shape"] = tune({"a": lambda: None, "b": lambda: fails(None)})
    record.save(path)
    assert Record.load(path, FACTS) == record
    assert [one.status for one in record.checks.values()] == ["ok", "failed", "ok"]


def test_a_check_that_ends_the_process_is_not_tried_again(tmp_path: Path) -> None:
    """A GPU fault aborts: what is on disk while a check runs is what the next start finds."""
    path, seen = tmp_path / "record.json", []
    choose(Gpu(lambda y: seen.append(path.read_bytes()) or y, "expert_gemm", 0), path)
    assert not json.loads(path.read_bytes())["unfinished"]
    path.write_bytes(seen[0])
    gpu = Gpu()
    kernels, _, said = choose(gpu, path)
    assert kernels is None
    assert gpu.calls == 0
    assert said == [
        "warning: MLX's built-in products instead of the Metal kernels: a check of them did not come to its end on this "
        "GPU; `mlxmoe doctor` shows more"
    ]


def test_ctrl_c_during_a_check_leaves_no_mark(tmp_path: Path) -> None:
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(Gpu(interrupted, "expert_down"), tmp_path / "record.json")
    assert choose(Gpu(seconds=0), tmp_path / "record.json")[0] is not None


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert choose(Gpu(seconds=0), tmp_path / "file" / "record.json")[0] is not None
    assert "will be checked again next time" in capsys.readouterr().err


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_choice.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("record.json", "old")]


def test_where_the_record_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert record_path() == tmp_path / "mlxmoe" / "kernels.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    for system, folder in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(kernel_choice.sys, "platform", system)
        assert record_path() == Path("/home/someone") / folder / "mlxmoe" / "kernels.json"


def test_facts_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetalKernels, "available", staticmethod(lambda: False))
    assert metal_facts() is None
    monkeypatch.setattr(MetalKernels, "available", staticmethod(lambda: True))
    assert (metal_facts() is None) == (mx.default_device() == mx.cpu)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1", "architecture": "applegpu_g13g"})
    facts = metal_facts()
    assert facts is not None
    assert facts[:2] == ("Apple M1", "applegpu_g13g")
    assert facts.mlx == mx.__version__
    assert facts.kernels == kernels_hash()


def test_the_hash_sees_every_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metal").mkdir()
    for name in ("metal/a.metal", "metal/b.h", "kernels.py", "metal/README.md"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(kernel_choice.resources, "files", lambda _: tmp_path)
    seen = [kernels_hash()]
    for name in ("metal/a.metal", "metal/b.h", "kernels.py"):
        (tmp_path / name).write_text("2")
        seen.append(kernels_hash())
    assert len({*seen}) == 4
    (tmp_path / "metal/README.md").write_text("2")
    assert kernels_hash() == seen[-1]


def test_checks_of_one_type_do_not_stand_for_another(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = Record(FACTS)
    for layer in (kernel_choice.small_layer("float32"), LAYER):
        run_checks(record, ReferenceKernels(), expert_cases(layer), path)
    assert len(record.checks) == 6
    assert choose(Gpu(fails, "expert_gemm", 0), path, dataclasses.replace(LAYER, dtype="float16"))[0] is None
    assert choose(Gpu(fails, "expert_gemm", 0), path, dataclasses.replace(LAYER, dtype="bfloat16"))[0] is None


def test_builtins_hold_every_expert() -> None:
    """The stand-in for the built-in path is the module that the loader makes."""
    banks = kernel_choice._random_banks(LAYER)
    layer = kernel_choice._builtin_layer(LAYER, banks)
    assert isinstance(layer, ExpertLayer)
    assert layer.num_experts == banks.gate.num_experts == 4
