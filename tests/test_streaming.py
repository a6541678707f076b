"""Streamed experts: the same bits as with all of them in memory, each read once, and nothing lost when something fails."""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert as mlx_lm_convert
from toy_checkpoints import convert, prepare, write_architecture, write_qwen3

from mlxmoe import loading
from mlxmoe.cli import main
from mlxmoe.errors import UserError
from mlxmoe.expert_memory import ExpertMemory, LayerBytes, choose_pinned, split_budget
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.policies import POLICIES
from mlxmoe.prepared import expert_layers, full_memory, smallest_streaming
from mlxmoe.reader import Reader
from mlxmoe.streaming import Beside, group_pairs

pytestmark = pytest.mark.usefixtures("limits")

CONTEXT = 128
PROMPT = mx.array([[5 + i * 7 % 250 for i in range(70)]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as it can come: unconverted, in stock 4 bit, converted to mixed levels, and other architectures."""
    root = tmp_path_factory.mktemp("streaming")
    dims = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 24, "num_hidden_layers": 2}
    hugging_face = write_qwen3(root / "huggingface", **dims)
    mlx_lm_convert(str(hugging_face), str(root / "stock"), quantize=True, q_bits=4, q_group_size=64)
    assert main(["repack", str(root / "stock"), str(root / "repacked")]) == 0
    assert convert(hugging_face, root / "converted", "--bpw", "12.5", "--expert-bits", "2,3,4,6,8") == 0
    for case in ("gpt_oss", "deepseek_v3", "nemotron_h"):
        write_architecture(root / case, case)
        assert convert(root / case, root / f"{case}-converted", "--bpw", "9") == 0
    return {path.name: path for path in root.iterdir()}


def stream(source: Path, share: float = 0.0, **settings: Any) -> Loaded:
    """Opens a model `share` of the way from the least memory that works to what everything takes."""
    prepared = prepare(source, RuntimeConfig(context=CONTEXT))
    least = prepared.streaming(0).least_memory
    memory = least + int(share * sum(sum(shape.sizes) for shape in prepared.streamed_shapes))
    chosen = {"threads": 3, "direct": False, **settings}
    loaded = loading._open_streamed(prepared, memory, RuntimeConfig(memory, CONTEXT, **chosen))
    assert loaded.report.mode == "streaming"
    return loaded


def experts(loaded: Loaded) -> ExpertMemory:
    assert loaded.experts is not None
    return loaded.experts


def resident_logits(source: Path, tokens: mx.array = PROMPT) -> mx.array:
    logits = open_model(source, RuntimeConfig(1 << 30, CONTEXT)).model(tokens)
    mx.eval(logits)
    return logits


def same(first: mx.array, second: mx.array) -> bool:
    """Bit for bit."""
    return bool(mx.array_equal(first, second).item())


SOURCES = ("converted", "stock", "repacked", "huggingface", "gpt_oss", "gpt_oss-converted", "deepseek_v3",
           "deepseek_v3-converted", "nemotron_h", "nemotron_h-converted")  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_logits_are_the_resident_models(sources: dict[str, Path], source: str, share: float) -> None:
    """Of a chunk that needs more experts than there is room for, of single tokens, and of the chunk again."""
    loaded = stream(sources[source], share)
    single = mx.array([[17]])
    wanted, wanted_single = resident_logits(sources[source]), resident_logits(sources[source], single)
    assert same(loaded.model(PROMPT), wanted)
    assert same(loaded.model(single), wanted_single)
    assert same(loaded.model(PROMPT), wanted)
    experts(loaded).check()
    experts(loaded).close()


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"belady"}))
@pytest.mark.parametrize("threads", [1, 5])
def test_policy_and_threads_change_no_bit(sources: dict[str, Path], policy: str, threads: int) -> None:
    loaded = stream(sources["converted"], 0.2, policy=policy, threads=threads)
    for tokens in (PROMPT, PROMPT[:, :1], PROMPT[:, 30:33]):
        assert same(loaded.model(tokens), resident_logits(sources["converted"], tokens))
    experts(loaded).check()
    experts(loaded).close()


def test_reads_past_the_page_cache_change_no_bit(sources: dict[str, Path]) -> None:
    for source in ("converted", "stock"):
        loaded = stream(sources[source], 0.2, direct=True)
        assert same(loaded.model(PROMPT), resident_logits(sources[source]))
        experts(loaded).close()


def test_the_disk_is_probed_when_nobody_says(sources: dict[str, Path]) -> None:
    loaded = stream(sources["stock"], threads=None, direct=None)
    assert same(loaded.model(PROMPT), resident_logits(sources["stock"]))
    experts(loaded).close()


class Watch:
    """Stands in for os.preadv: counts, and does what `instead` says for the n-th read."""

    def __init__(self, instead: dict[int, Callable[..., int]] | None = None):
        self.offsets: list[tuple[int, int]] = []
        self.instead = instead or {}
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        with self._lock:
            count = len(self.offsets)
            self.offsets.append((descriptor, offset))
        return self.instead.get(count, os.preadv)(descriptor, buffers, offset)


def watched(monkeypatch: pytest.MonkeyPatch, source: Path, watch: Watch, share: float = 0.0, **settings: Any) -> Loaded:
    monkeypatch.setattr(loading, "Reader", functools.partial(Reader, preadv=watch))
    return stream(source, share, **settings)


def test_a_repacked_checkpoint_is_the_one_it_was_made_from(sources: dict[str, Path]) -> None:
    """Resident as well; and a change of its other weights is found."""
    assert same(resident_logits(sources["repacked"]), resident_logits(sources["stock"]))
    report = open_model(sources["repacked"], RuntimeConfig(1 << 30, CONTEXT)).report
    assert (report.kind, report.mode) == ("repacked", "resident")


def test_each_needed_expert_is_read_once_per_chunk(monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path]) -> None:
    """In file order, however little room there is."""
    watch = Watch()
    loaded = watched(monkeypatch, sources["converted"], watch, threads=1)
    mx.eval(loaded.model(PROMPT))
    totals = experts(loaded).totals()
    assert len(watch.offsets) == len(set(watch.offsets)) == totals.misses
    assert totals.hits == 0
    assert watch.offsets == sorted(watch.offsets, key=lambda place: [p[0] for p in watch.offsets].index(place[0]))
    per_file: dict[int, list[int]] = {}
    for descriptor, offset in watch.offsets:
        per_file.setdefault(descriptor, []).append(offset)
    assert all(offsets == sorted(offsets) for offsets in per_file.values())
    experts(loaded).close()


def test_nothing_is_read_twice_where_all_fit(monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path]) -> None:
    watch = Watch()
    loaded = watched(monkeypatch, sources["converted"], watch, 1.0)
    for tokens in (PROMPT, PROMPT, PROMPT[:, :1]):
        mx.eval(loaded.model(tokens))
    assert len(watch.offsets) == len(set(watch.offsets)) <= 48
    assert experts(loaded).totals().evictions == 0
    experts(loaded).close()


def test_the_host_reads_the_routing_once_per_layer(sources: dict[str, Path]) -> None:
    loaded = stream(sources["converted"])
    for _ in range(3):
        mx.eval(loaded.model(PROMPT))
    assert experts(loaded).counts.host_reads == 3 * 2
    experts(loaded).close()


def test_resident_and_elastic_models_read_nothing_on_the_host(sources: dict[str, Path]) -> None:
    """While a graph is traced, MLX refuses to evaluate: whoever looked at the routing would fail, as streaming does."""
    config = RuntimeConfig(1 << 30, CONTEXT)
    for source in ("converted", "stock"):
        model = open_model(sources[source], config).model
        assert same(mx.compile(lambda tokens, model=model: model(tokens))(PROMPT[:, :1]), model(PROMPT[:, :1]))
    streamed = stream(sources["converted"])
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)eval"):
        mx.compile(lambda tokens: streamed.model(tokens))(PROMPT[:, :1])
    experts(streamed).close()


def test_shared_experts_run_while_others_are_read(sources: dict[str, Path]) -> None:
    """They are computed once: early where something is missing, by the block itself where nothing is."""
    loaded = stream(sources["deepseek_v3-converted"], 1.0)
    (beside, *_) = [module for _, module in loaded.model.named_modules() if isinstance(module, Beside)]
    calls: list[str] = []
    inner, start = beside.module, beside.start

    class Counted(type(inner)):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            calls.append("computed")
            return super().__call__(x)

    inner.__class__ = Counted
    beside.start = lambda x: (calls.append("early"), start(x))  # type: ignore[method-assign]
    mx.eval(loaded.model(PROMPT))
    assert calls == ["early", "computed"]
    calls.clear()
    mx.eval(loaded.model(PROMPT))
    assert calls == ["computed"]
    experts(loaded).close()


def test_a_graph_that_was_not_evaluated_keeps_its_experts(sources: dict[str, Path]) -> None:
    """Its inputs would be overwritten by the calls after it, which have room for no more than one token's experts."""
    for source in ("converted", "stock"):
        loaded = stream(sources[source])
        (layer, *_) = experts(loaded).layers
        resident = open_model(sources[source], RuntimeConfig(1 << 30, CONTEXT)).model
        (twin, *_) = expert_layers(resident).values()
        rng = np.random.default_rng(0)
        x = mx.array(rng.standard_normal((1, 64)).astype(np.float32))
        choices = [mx.array(rng.choice(24, (1, 4), replace=False).astype(np.uint32)) for _ in range(12)]
        lazy = [layer(x, indices) for indices in choices]
        for output, indices in zip(reversed(lazy), reversed(choices), strict=True):
            assert same(output, twin(x, indices))
        experts(loaded).close()


def test_pairs_are_grouped_by_expert() -> None:
    groups = group_pairs(np.array([[3, 1], [1, 0], [3, 2]]))
    assert {e: (g.pairs.tolist(), g.tokens.tolist()) for e, g in groups.items()} == {
        0: ([3], [1]),
        1: ([1, 2], [0, 1]),
        2: ([5], [2]),
        3: ([0, 4], [0, 2]),
    }
    assert list(groups) == [0, 1, 2, 3]


# -- faults -------------------------------------------------------------------------------------------------------------


def broken(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("source", ["converted", "stock"])
@pytest.mark.parametrize("fails", [0, 7, 20])
def test_a_failed_read_is_said_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path], source: str, fails: int
) -> None:
    loaded = watched(monkeypatch, sources[source], Watch({fails: broken}), 0.1)
    with pytest.raises(UserError, match=r"layer \d, expert \d+ cannot be read: .*error"):
        mx.eval(loaded.model(PROMPT))
    experts(loaded).check()
    assert same(loaded.model(PROMPT), resident_logits(sources[source]))
    experts(loaded).check()
    experts(loaded).close()


@pytest.mark.parametrize("interrupted", [0, 9])
def test_ctrl_c_while_waiting(monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path], interrupted: int) -> None:
    """The read that was waited for is still under way when the next question comes."""
    release = threading.Event()

    def slow(*arguments: Any) -> int:
        release.wait(10)
        return os.preadv(*arguments)

    loaded = watched(monkeypatch, sources["converted"], Watch({interrupted: slow}), 0.1)
    waits = iter(range(1000))

    def wait(ticket: Any, timeout: float | None = None) -> bool:
        if next(waits) == interrupted:
            raise KeyboardInterrupt
        return bool(original(ticket, timeout))

    from mlxmoe.reader import Ticket

    original = Ticket.wait
    monkeypatch.setattr(Ticket, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        mx.eval(loaded.model(PROMPT))
    experts(loaded).check()
    release.set()
    assert same(loaded.model(PROMPT), resident_logits(sources["converted"]))
    experts(loaded).check()
    experts(loaded).close()


def test_a_file_that_is_cut_short_while_running(sources: dict[str, Path], tmp_path: Path) -> None:
    """And one that is put back again: what is in memory stays, what is not is read afresh."""
    folder = tmp_path / "copy"
    shutil.copytree(sources["converted"], folder)
    loaded = stream(folder, 0.1)
    wanted = resident_logits(folder)
    (store, *_) = sorted(folder.glob("experts-*.safetensors"))
    data = store.read_bytes()
    with open(store, "r+b") as file:
        file.truncate(len(data) // 3)
    with pytest.raises(UserError, match="ends early"):
        mx.eval(loaded.model(PROMPT))
    with open(store, "r+b") as file:
        file.write(data)
    assert same(loaded.model(PROMPT), wanted)
    experts(loaded).close()


def test_a_wrong_checksum_is_found_at_the_first_read(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sources["converted"], folder)
    (store, *_) = sorted(folder.glob("experts-*.safetensors"))
    with open(store, "r+b") as file:
        file.seek(store.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    loaded = stream(folder, 0.1)
    with pytest.raises(UserError, match="wrong checksum"):
        mx.eval(loaded.model(PROMPT))
    experts(loaded).check()
    experts(loaded).close()


def test_two_models_on_one_store(sources: dict[str, Path]) -> None:
    first, second = stream(sources["converted"], 0.1), stream(sources["converted"], 0.3)
    wanted = resident_logits(sources["converted"])
    assert same(first.model(PROMPT), wanted)
    assert same(second.model(PROMPT), wanted)
    experts(first).close()
    assert same(second.model(PROMPT), wanted)
    experts(second).close()


# -- the budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["converted", "stock", "gpt_oss"])
def test_another_budget_while_running(sources: dict[str, Path], source: str) -> None:
    """Less, the least, and more again; the bits stay, and so do the experts that still fit."""
    loaded = stream(sources[source], 0.8)
    memory, wanted = experts(loaded), resident_logits(sources[source])
    assert same(loaded.model(PROMPT), wanted)
    least = prepare(sources[source], RuntimeConfig(context=CONTEXT)).streamed_shapes
    for budget in (memory.capacity // 2, sum(shape.least for shape in least), memory.capacity):
        memory.resize(budget)
        memory.check()
        assert 0 < memory.nbytes <= memory.capacity <= budget
        assert same(loaded.model(PROMPT), wanted)
        assert same(loaded.model(PROMPT[:, :1]), resident_logits(sources[source], PROMPT[:, :1]))
    with pytest.raises(UserError, match="one token do not fit"):
        memory.resize(least[0].least)
    assert same(loaded.model(PROMPT), wanted)
    memory.close()


def test_the_budget_is_split_in_proportion() -> None:
    layers = [LayerBytes([10] * 8, 2), LayerBytes([30] * 8, 2)]
    assert split_budget(layers, 80) == [20, 60]
    assert split_budget(layers, 200) == [50, 150]
    assert split_budget(layers, 10_000) == [80, 240]
    with pytest.raises(ValueError, match="79 bytes for experts that need 80"):
        split_budget(layers, 79)


def test_exact_streams_where_a_reduced_model_would_fit(sources: dict[str, Path]) -> None:
    prepared = prepare(sources["converted"], RuntimeConfig(context=CONTEXT))
    memory = full_memory(prepared) - 1
    assert open_model(sources["converted"], RuntimeConfig(memory, CONTEXT)).report.mode == "elastic"
    exact = RuntimeConfig(memory, CONTEXT, exact=True, threads=2, direct=False)
    loaded = open_model(sources["converted"], exact)
    assert loaded.report.mode == "streaming"
    assert same(loaded.model(PROMPT), resident_logits(sources["converted"]))
    experts(loaded).close()
    enough = RuntimeConfig(full_memory(prepared), CONTEXT, exact=True)
    assert open_model(sources["converted"], enough).report.mode == "resident"


def test_the_static_policy_needs_something_to_go_by(sources: dict[str, Path]) -> None:
    """A plan says what an expert weighs, a stock checkpoint does not."""
    experts(stream(sources["converted"], 0.2, policy="static")).close()
    with pytest.raises(UserError, match="the static policy has nothing to go by"):
        stream(sources["stock"], 0.2, policy="static")


def test_pinned_experts_are_read_once(monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path]) -> None:
    """The most frequent by the plan, as many as their share of the room holds; a stock checkpoint does not know any."""
    watch = Watch()
    loaded = watched(monkeypatch, sources["converted"], watch, 0.3, pin=1.0)
    wanted = resident_logits(sources["converted"])
    for _ in range(3):
        assert same(loaded.model(PROMPT), wanted)
        experts(loaded).check()
    totals = experts(loaded).totals()
    # Those that the prompt wanted were read for the first one only
    pinned = sum(len(layer.cache.pinned & layer.cache.present) for layer in experts(loaded).layers)
    assert pinned > 2
    assert totals.hits >= 2 * pinned
    assert sum(watch.offsets.count(place) == 1 for place in set(watch.offsets)) >= pinned
    assert any(watch.offsets.count(place) == 3 for place in watch.offsets)
    experts(loaded).close()
    with pytest.raises(UserError, match="none can be pinned"):
        stream(sources["stock"], 0.2, pin=0.5)
    assert choose_pinned(LayerBytes([10, 20, 10, 10], 1), 30, [0.1, 0.9, 0.5, 0.2]) == [1, 2]
    assert choose_pinned(LayerBytes([10, 20, 10, 10], 1), 30, None) == []


def test_less_than_one_token_needs_is_refused(sources: dict[str, Path]) -> None:
    for source in ("converted", "stock"):
        least = smallest_streaming(prepare(sources[source], RuntimeConfig(context=CONTEXT)))
        with pytest.raises(UserError, match=f"at least {least} bytes"):
            open_model(sources[source], RuntimeConfig(least - 1, CONTEXT))


@pytest.mark.parametrize("source", ["converted", "stock"])
def test_random_steps(monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path], source: str) -> None:
    """2,500 layer calls of all kinds, failing and interrupted reads and other budgets among them, checked after each."""
    rng = random.Random(0)

    def sometimes(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return broken() if rng.random() < 0.01 else os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(loading, "Reader", functools.partial(Reader, preadv=sometimes))
    loaded = stream(sources[source], 0.1, threads=2)
    memory = experts(loaded)
    resident = open_model(sources[source], RuntimeConfig(1 << 30, CONTEXT)).model
    pairs = list(zip(memory.layers, expert_layers(resident).values(), strict=True))
    x = mx.array(np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32))
    full = sum(sum(shape.sizes) for shape in prepare(sources[source]).streamed_shapes)
    failed = 0
    for step in range(2500):
        layer, twin = rng.choice(pairs)
        tokens = rng.choice([1, 1, 1, 6])
        indices = mx.array([rng.sample(range(24), 4) for _ in range(tokens)], dtype=mx.uint32)
        if step % 100 == 99:
            memory.resize(rng.randint(full // 4, full))
        try:
            output = layer(x[:tokens], indices)
            if rng.random() < 0.3:
                assert same(output, twin(x[:tokens], indices))
        except UserError:
            failed += 1
        memory.check()
    assert failed > 10
    memory.close()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["converted", "stock"])
def test_ten_thousand_steps_of_answers(monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path], source: str) -> None:
    """Answers that are begun, cancelled, reset and interrupted by failing reads, at changing budgets."""
    from mlxmoe.session import Engine

    rng = random.Random(1)

    def sometimes(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return broken() if rng.random() < 0.0005 else os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(loading, "Reader", functools.partial(Reader, preadv=sometimes))
    loaded = stream(sources[source], 0.2, threads=2, prefetch="previous")
    memory, engine = experts(loaded), Engine(loaded)
    steps = failures = 0
    while steps < 10_000:
        if rng.random() < 0.2:
            memory.resize(rng.randint(memory.least, memory.total))
        if rng.random() < 0.3:
            engine.forget()
        answer = engine.stream([rng.randrange(250) for _ in range(rng.choice([1, 3, 20]))])
        try:
            for _ in range(rng.choice([1, 5, 40])):
                if next(answer, None) is None:
                    break
                steps += 1
                memory.check()
                if rng.random() < 0.02:
                    engine.stop()
        except UserError:
            failures += 1
        answer.close()
        memory.check()
    assert failures > 5
    wanted = Engine(open_model(sources[source], RuntimeConfig(1 << 30, CONTEXT)), max_tokens=20)
    prompt = list(range(5, 60, 3))
    engine.forget()
    for _ in range(20):  # reads fail at random
        try:
            engine.max_tokens = 20
            text = "".join(engine.stream(prompt))
            break
        except UserError:
            continue
    assert text == "".join(wanted.stream(prompt))
    memory.close()
