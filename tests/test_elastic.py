"""Levels that change while a model runs: other budgets, exchanges by what is chosen, and memory that runs short."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoints import convert, load_plan, prepare, stored_matrix, write_qwen3

from mlxmoe import pressure
from mlxmoe.elastic import ADAPT_EVERY, ElasticMemory
from mlxmoe.errors import UserError
from mlxmoe.experts import ExpertLayer, KernelExperts
from mlxmoe.formats import MatrixShape
from mlxmoe.kernels import PlaneBank, ReferenceKernels
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.plan import ExpertEntry, LayerPlan
from mlxmoe.prepared import full_memory, smallest_memory
from mlxmoe.pressure import PressureWatch
from mlxmoe.residency import PLANES, Swap, choose_swaps, merged_storage, solve_residency
from mlxmoe.session import Engine
from mlxmoe.upkeep import Upkeep

pytestmark = pytest.mark.usefixtures("limits")

CONTEXT = 128
PROMPT = mx.array([[5 + i * 7 % 250 for i in range(70)]])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    dims = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 24, "num_hidden_layers": 2}
    assert convert(write_qwen3(root / "source", **dims), root / "out", "--bpw", "13", "--expert-bits", "4,6,8") == 0
    return root / "out"


KERNELS = pytest.mark.parametrize("kernels", [None, ReferenceKernels()], ids=["built-ins", "kernels"])
Kernels = ReferenceKernels | None


def opened(converted: Path, share: float, kernels: Kernels, adapt: bool = False) -> tuple[Loaded, ElasticMemory]:
    """A model `share` of the way from base planes to everything that is written."""
    config = RuntimeConfig(None, CONTEXT, adapt=adapt, kernels=kernels)
    prepared = prepare(converted, config)
    least, full = smallest_memory(prepared), full_memory(prepared)
    loaded = open_model(converted, replace(config, memory=int(least + share * (full - least))))
    assert loaded.elastic is not None
    return loaded, loaded.elastic


@KERNELS
def test_another_budget_gives_what_loading_with_it_gives(converted: Path, kernels: Kernels) -> None:
    """Less and more, bit for bit, and the bytes that are counted are those that are held."""
    loaded, elastic = opened(converted, 1.0, kernels)
    plan = load_plan(converted)
    full, least = elastic.nbytes, elastic.least
    for budget in (least, (least + full) // 2, full, (3 * least + full) // 4):
        gc.collect()
        before = mx.get_active_memory()
        held = elastic.nbytes
        elastic.resize(budget)
        storage = merged_storage(mx.float32) if kernels is None else PLANES
        wanted = solve_residency(plan, budget, storage, widen=kernels is None)
        assert elastic.residency == wanted
        assert elastic.nbytes <= budget
        mx.clear_cache()
        assert mx.get_active_memory() - before == pytest.approx(elastic.nbytes - held, abs=1 << 14)
        twin, other = opened(converted, 0.5, kernels)
        other.resize(budget)
        assert bool(mx.array_equal(loaded.model(PROMPT), twin.model(PROMPT)).item())
        del twin, other
    with pytest.raises(UserError, match="base planes of the experts do not fit"):
        elastic.resize(least - 1)
    assert elastic.residency == wanted


@KERNELS
def test_every_matrix_is_the_file_at_its_level_after_exchanges(converted: Path, kernels: Kernels) -> None:
    """Against the definition of the format, read from the files without the runtime."""
    loaded, elastic = opened(converted, 0.4, kernels, adapt=True)
    rng = np.random.default_rng(0)
    held = elastic.nbytes
    layers = [m for _, m in loaded.model.named_modules() if isinstance(m, ExpertLayer | KernelExperts)]
    for _ in range(4):
        for layer in layers:
            hot = rng.choice(24, 6, replace=False)
            for _ in range(40):
                layer(mx.zeros((1, 64)), mx.array(rng.choice(hot, (1, 4))))
        assert elastic.adapt() > 0
    assert elastic.nbytes == held
    assert elastic.residency.levels != opened(converted, 0.4, kernels)[1].residency.levels
    paths = sorted(path for path, m in loaded.model.named_modules() if isinstance(m, ExpertLayer | KernelExperts))
    modules = dict(loaded.model.named_modules())
    for i, (plan, path) in enumerate(zip(load_plan(converted).layers, paths, strict=True)):
        for p, shape in enumerate(plan.projections):
            found = matrices(modules[path], p, shape)
            for expert in range(24):
                level = elastic.residency.levels[i][expert][p]
                wanted = stored_matrix(converted, plan, expert, p, level)
                np.testing.assert_allclose(found[expert], wanted, atol=2e-6 * float(np.abs(wanted).max()))


def matrices(module: ExpertLayer | KernelExperts, projection: int, shape: MatrixShape) -> np.ndarray:
    """float32 [E, N, K]: what a layer's products stand for."""
    if isinstance(module, KernelExperts):
        bank = module.banks[projection]
        assert isinstance(bank, PlaneBank)
        return np.stack([np.array(bank.dequantize(expert)) for expert in range(24)])
    identity = mx.broadcast_to(mx.eye(shape.columns)[None], (24, shape.columns, shape.columns))
    indices = mx.broadcast_to(mx.arange(24)[:, None], (24, shape.columns))
    products = module[shape.name](mx.expand_dims(identity, -2), indices)
    return np.array(products).squeeze(-2).transpose(0, 2, 1)


def layer_of(written: list[int], weights: list[float]) -> LayerPlan:
    """One projection; errors fall to a quarter with each bit."""
    levels = (2, 3, 4, 6, 8)
    entries = tuple(ExpertEntry((w,), (tuple(4.0**-level for level in levels if level <= w),), ((),)) for w in written)
    return LayerPlan(0, "layers.0", "glu", "f", (), (tuple(weights),), entries)._replace(projections=(None,))  # type: ignore[arg-type]


def test_a_hot_expert_takes_the_level_of_a_cold_one() -> None:
    layer = layer_of([4, 4, 4], [1.0, 1.0, 1.0])
    levels = [(2,), (4,), (2,)]
    assert choose_swaps(layer, levels, [90, 0, 5], 2) == [Swap(0, 0, 1)]
    assert choose_swaps(layer, levels, [0, 90, 5], 2) == []
    assert choose_swaps(layer, levels, [0, 0, 0], 2) == []
    # nothing is written for it beyond what it has
    assert choose_swaps(layer_of([2, 4, 4], [1.0] * 3), levels, [90, 0, 5], 2) == [Swap(0, 2, 1)]


def test_exchanges_are_the_best_and_few() -> None:
    layer = layer_of([4] * 6, [1.0] * 6)
    levels = [(2,), (2,), (2,), (4,), (4,), (4,)]
    uses = [100, 80, 60, 0, 10, 20]
    assert choose_swaps(layer, levels, uses, 1) == [Swap(0, 0, 3)]
    assert choose_swaps(layer, levels, uses, 9) == [Swap(0, 0, 3), Swap(0, 1, 4), Swap(0, 2, 5)]


def test_exchanges_happen_while_an_answer_is_given() -> None:
    """The demo model, at a budget that reduces it; without --adapt nothing moves."""
    prepared = prepare(None, RuntimeConfig(context=CONTEXT))
    memory = (smallest_memory(prepared) + full_memory(prepared)) // 2
    for adapt in (False, True):
        loaded = open_model(None, RuntimeConfig(memory, CONTEXT, adapt=adapt))
        assert loaded.elastic is not None
        engine = Engine(loaded, max_tokens=ADAPT_EVERY + 2)
        assert "".join(engine.stream(engine.encode_raw("Once upon a time")))
        assert (loaded.elastic.swaps > 0) == adapt
        assert f"{loaded.elastic.swaps} exchanges" in loaded.elastic.line()


# -- memory that runs short ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_experts_give_memory_back(exact: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Down to the least and no further, while an answer is given, which is then the answer of a smaller model."""
    prepared = prepare(None, RuntimeConfig(context=CONTEXT))
    memory = (smallest_memory(prepared) + 3 * full_memory(prepared)) // 4
    loaded = open_model(None, RuntimeConfig(memory, CONTEXT, exact=exact, threads=2, direct=False))
    holder = loaded.experts or loaded.elastic
    assert holder is not None
    before = holder.capacity
    engine = Engine(loaded, max_tokens=20)
    engine._upkeep = Upkeep(loaded, lambda: True)
    text = "".join(engine.stream(engine.encode_raw("Once upon a time")))
    assert holder.capacity == pytest.approx(holder.least, rel=0.01)
    assert holder.capacity < before
    notes = capsys.readouterr().err.splitlines()
    assert all("memory is short on this machine: experts now take at most" in line for line in notes)
    assert 1 <= len(notes) <= 15
    if exact:
        assert loaded.experts is not None
        resident = Engine(open_model(None, RuntimeConfig(1 << 30, CONTEXT)), max_tokens=20)
        assert text == "".join(resident.stream(resident.encode_raw("Once upon a time")))
        loaded.experts.check()
        loaded.experts.close()


def test_the_system_is_not_asked_at_every_token() -> None:
    now = iter([0.0, 0.5, 1.0, 3.0, 3.0, 3.5, 6.0, 6.0])
    asked: list[int] = []
    watch = PressureWatch(lambda: asked.append(1) is None, lambda: next(now))
    assert [watch(), watch(), watch(), watch(), watch()] == [False, False, True, False, True]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable: 30 kB\n", 0.03),
        ("MemTotal: 1000 kB\nMemAvailable: 900 kB\n", 0.9),
        ("MemTotal: 1000 kB\nMemFree: 5 kB\n", 1.0),
        ("", 1.0),
    ],
)
def test_what_linux_calls_available(tmp_path: Path, text: str, share: float) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert pressure._linux_available(tmp_path / "meminfo") == share
    assert pressure._linux_available(tmp_path / "nothing") == 1.0


def test_this_machine_answers() -> None:
    assert pressure.is_short() in (True, False)
