"""Streamed experts on the kernels: nothing overlaps in the arena, whatever fits finds a place, and not a bit changes."""

from __future__ import annotations

import errno
import functools
import os
import random
import time
from collections.abc import Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_checkpoints import VECTORS, convert, prepare, write_architecture, write_qwen3

from mlxmoe import loading
from mlxmoe.arena import ArenaShelf, Frames, Slot, arena_slack, num_frames, slack_nbytes
from mlxmoe.blocks import FusedBlock
from mlxmoe.errors import UserError
from mlxmoe.expert_memory import ExpertMemory
from mlxmoe.experts import KernelExperts
from mlxmoe.formats import MatrixShape, num_planes
from mlxmoe.gates import gate_scores
from mlxmoe.kernels import TABLE_FACTOR, TABLE_PLANES, TABLE_SCALES, Activation, ReferenceKernels
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.plan import ExpertEntry, LayerPlan
from mlxmoe.reader import Read, Reader
from mlxmoe.residency import PLANES
from mlxmoe.shelves import Busy
from mlxmoe.store import ExpertStore, layer_header, layer_records, read_span
from mlxmoe.streaming import Beside, StreamedExperts

pytestmark = pytest.mark.usefixtures("limits")

FRAME = 64


class Tenants(RuleBasedStateMachine):
    """Parts come and go and are moved. The model is a map of bytes: who has which."""

    @initialize(
        smaller=st.sets(st.sampled_from([2, 4, 8, 16, 32]), min_size=1, max_size=3),
        capacity=st.integers(FRAME, 12 * FRAME),
    )
    def start(self, smaller: set[int], capacity: int) -> None:
        self.divisions = (1, *sorted(smaller))
        self.capacity = capacity
        self.frames = Frames(num_frames(capacity, FRAME, self.divisions), self.divisions)
        self.slots: dict[Hashable, Slot] = {}
        self.fixed: set[Hashable] = set()
        self.next = 0

    def nbytes(self, slot: Slot) -> range:
        size = FRAME // self.divisions[slot.kind]
        start = slot.frame * FRAME + slot.place * size
        return range(start, start + size)

    @property
    def taken(self) -> int:
        return sum(len(self.nbytes(slot)) for slot in self.slots.values())

    def consolidate(self, fixed: set[Hashable]) -> bool:
        moves = self.frames.consolidate(lambda owner: owner not in fixed)
        for owner, source, target in moves or ():
            assert self.slots[owner] == source
            assert owner not in fixed
            self.slots[owner] = target
        return moves is not None

    @rule(data=st.data(), count=st.integers(1, 12))
    def come(self, data: st.DataObject, count: int) -> None:
        """As many parts of a kind as there is room for by their bytes: all of them find a place."""
        kind = data.draw(st.integers(0, len(self.divisions) - 1))
        for _ in range(count):
            if self.taken + FRAME // self.divisions[kind] > self.capacity:
                return
            while (slot := self.frames.take(kind, self.next)) is None:
                if not self.consolidate(self.fixed):
                    self.fixed.clear()
                    assert self.consolidate(self.fixed)
            self.slots[self.next] = slot
            self.next += 1

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), count=st.integers(1, 12))
    def go(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.slots))):
            owner = data.draw(st.sampled_from(sorted(self.slots)))
            self.frames.give(self.slots.pop(owner))
            self.fixed.discard(owner)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def fix(self, data: st.DataObject) -> None:
        self.fixed |= data.draw(st.sets(st.sampled_from(sorted(self.slots))))

    @invariant()
    def nothing_overlaps(self) -> None:
        if not hasattr(self, "frames"):
            return
        self.frames.check()
        places = [place for slot in self.slots.values() for place in self.nbytes(slot)]
        assert len(places) == len(set(places))
        assert all(0 <= place < self.capacity + slack_nbytes(FRAME, self.divisions) for place in places)


Tenants.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_tenants = Tenants.TestCase


def test_the_slack_is_needed() -> None:
    """Worked by hand: two halves alone in their frames and a full frame are two frames' bytes, and take three."""
    assert num_frames(2 * FRAME, FRAME, (1, 2)) == 2
    assert num_frames(2 * FRAME + FRAME // 2, FRAME, (1, 2)) == 3
    frames = Frames(3, (1, 2))
    halves = [frames.take(1, name) for name in "abcd"]
    for slot in halves[1:3]:
        assert slot is not None
        frames.give(slot)
    assert frames.take(0, "whole") == Slot(0, 2, 0)
    assert frames.take(0, "another") is None
    assert frames.consolidate(lambda owner: owner == "b") is None
    assert frames.consolidate(lambda owner: owner == "d") == [("d", Slot(1, 1, 1), Slot(1, 0, 1))]
    assert frames.take(0, "another") == Slot(0, 1, 0)


# -- models --------------------------------------------------------------------------------------------------------------

CONTEXT = 128
PROMPT = mx.array([[5 + i * 7 % 250 for i in range(40)]])
# Not the variants of an architecture, nor those around a text model that is there itself
CASES = sorted(
    {path.stem for path in VECTORS.glob("*.json") if "-" not in path.stem} - {"gemma4", "qwen3_5_moe"} | {"nemotron_h"}
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 experts, 4 of them for a token, half of the matrices in 3 bit and half in 4."""
    root = tmp_path_factory.mktemp("arena")
    dims = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 24, "num_hidden_layers": 2}
    write_qwen3(root / "source", num_experts_per_tok=4, **dims)
    assert convert(root / "source", root / "converted", "--bpw", "8", "--expert-bits", "2,3,4,6,8") == 0
    return root / "converted"


def resident(source: Path) -> Loaded:
    loaded = open_model(source, RuntimeConfig(1 << 30, CONTEXT, kernels=ReferenceKernels()))
    assert loaded.report.mode == "resident"
    return loaded


def stream(source: Path, share: float = 0.0, **settings: Any) -> Loaded:
    """Opens a model `share` of the way from the least memory that works to what everything takes."""
    config = RuntimeConfig(None, CONTEXT, **{"threads": 3, "direct": False, "kernels": ReferenceKernels(), **settings})
    prepared = prepare(source, config)
    memory = prepared.streaming(0).least_memory + int(share * sum(shape.total for shape in prepared.streamed_shapes))
    return loading._open_streamed(prepared, memory, config)


def experts(loaded: Loaded) -> ExpertMemory:
    assert isinstance(loaded.experts, ExpertMemory)
    return loaded.experts


def shelves(loaded: Loaded) -> list[ArenaShelf]:
    found = [layer._shelf for layer in experts(loaded).layers]
    assert all(isinstance(shelf, ArenaShelf) for shelf in found)
    return found  # type: ignore[return-value]


def same(first: mx.array, second: mx.array) -> bool:
    """Bit for bit."""
    return bool(mx.array_equal(first, second).item())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_resident_models(tmp_path: Path, case: str) -> None:
    """Of every architecture: a chunk that needs all experts, and single tokens. Both models run on the same kernels."""
    width = {"intermediate_size": 96} if case in ("mixtral", "olmoe") else {}  # of their experts
    write_architecture(tmp_path / "source", case, **width)
    assert convert(tmp_path / "source", tmp_path / "converted", "--bpw", "9") == 0
    model = resident(tmp_path / "converted").model
    loaded = stream(tmp_path / "converted", 0.1)
    for tokens in (PROMPT, *mx.split(PROMPT[:, :5], 5, axis=1)):
        assert same(loaded.model(tokens), model(tokens))
    experts(loaded).check()
    totals = experts(loaded).totals()
    assert totals.hits > 0
    assert totals.evictions > 0
    experts(loaded).close()


def test_a_known_routing_rule_keeps_its_block(mixed: Path) -> None:
    """The streamed model has the resident one's fused blocks, with other experts in them."""
    loaded = stream(mixed)
    modules = sorted(loaded.model.named_modules())
    blocks = [module for _, module in modules if isinstance(module, FusedBlock)]
    assert [id(block.experts) for block in blocks] == list(map(id, experts(loaded).layers))
    assert not any(isinstance(module, KernelExperts) for _, module in loaded.model.named_modules())
    assert "kernels" in loaded.report.products
    experts(loaded).close()


@pytest.mark.parametrize(
    ("share", "prefetch"), [(0.0, "off"), (0.2, "off"), (1.0, "off"), (0.1, "previous"), (0.0, "router")]
)
def test_tokens_and_short_prompts(mixed: Path, share: float, prefetch: str) -> None:
    """Six tokens are decoded, by waves where their experts do not fit, and seven are a chunk."""
    model, loaded = resident(mixed).model, stream(mixed, share, prefetch=prefetch)
    for start, count in [(0, 6), (6, 7), (13, 2), *((start, 1) for start in range(15, 21))]:
        tokens = PROMPT[:, start : start + count]
        assert same(loaded.model(tokens), model(tokens))
    experts(loaded).check()
    experts(loaded).close()


@pytest.mark.parametrize("kernels", [ReferenceKernels(), None], ids=["kernels", "built-ins"])
def test_experts_with_a_narrower_input(tmp_path: Path, kernels: ReferenceKernels | None) -> None:
    """Shared experts and router read another array than the routed experts: neither is computed from theirs."""
    write_architecture(tmp_path / "source", "nemotron_h", moe_latent_size=32)
    assert convert(tmp_path / "source", tmp_path / "converted", "--bpw", "9") == 0
    model = open_model(tmp_path / "converted", RuntimeConfig(1 << 30, CONTEXT, kernels=kernels)).model
    loaded = stream(tmp_path / "converted", kernels=kernels)
    for tokens in (PROMPT, PROMPT[:, :1], PROMPT[:, 1:2]):
        assert same(loaded.model(tokens), model(tokens))
    blocks = [module for _, module in loaded.model.named_modules() if "fc1_latent_proj" in module]
    assert blocks
    assert all(gate_scores(block, 4) is None for block in blocks)
    experts(loaded).close()


def twin_layers(source: Path) -> list[KernelExperts]:
    """The resident experts, in the order of the layers."""
    modules = sorted(resident(source).model.named_modules())
    return [module for _, module in modules if isinstance(module, KernelExperts)]


@pytest.fixture
def layers(mixed: Path) -> Iterator[tuple[StreamedExperts, KernelExperts]]:
    """A layer with room for one token's experts, and the resident one."""
    loaded = stream(mixed)
    yield experts(loaded).layers[0], twin_layers(mixed)[0]
    experts(loaded).close()


def test_random_steps(monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
    """Calls of both kinds, failing reads and other budgets among them, checked after each."""
    rng = random.Random(0)

    def sometimes(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if rng.random() < 0.02:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(loading, "Reader", functools.partial(Reader, preadv=sometimes))
    loaded, twins = stream(mixed, 0.1, threads=2), twin_layers(mixed)
    memory = experts(loaded)
    x = mx.array(np.random.default_rng(1).standard_normal((1, 9, 64)).astype(np.float32))
    least = sum(shape.least for shape in memory._shapes)
    failed = 0
    for step in range(160):
        index, tokens = rng.randrange(2), rng.choice([1, 1, 1, 5, 9])
        layer, twin = memory.layers[index], twins[index]
        chosen = mx.array([rng.sample(range(24), 4) for _ in range(tokens)], dtype=mx.uint32)
        weights = mx.array(np.random.default_rng(step).random((tokens, 4)).astype(np.float32))
        if step % 20 == 19:
            memory.resize(rng.randint(least, memory.total))
        try:
            if rng.random() < 0.6:
                pair = [experts.weighted(x[:, :tokens], chosen, weights) for experts in (layer, twin)]
            else:
                pair = [experts(x[:, :tokens], chosen[None]) for experts in (layer, twin)]
            if rng.random() < 0.5:
                assert same(*pair)
        except UserError:
            failed += 1
        memory.check()
    assert failed > 3
    memory.close()


def test_experts_that_cannot_be_moved_yet_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[StreamedExperts, KernelExperts]
) -> None:
    """Whatever is read by a graph or filled by a thread is waited for, and no more."""
    rng, reads, refused = random.Random(1), ArenaShelf.reads, []

    def sometimes(self: ArenaShelf, expert: int, busy: Collection[int] = ()) -> list[Read]:
        if busy and rng.random() < 0.5:
            refused.append(expert)
            raise Busy
        return reads(self, expert, busy)

    monkeypatch.setattr(ArenaShelf, "reads", sometimes)
    x = mx.array(np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32))
    for step in range(20):
        tokens = rng.choice([1, 3, 9])
        chosen = mx.array([rng.sample(range(24), 4) for _ in range(tokens)], dtype=mx.uint32)
        weights = mx.array(np.random.default_rng(step).random((tokens, 4)).astype(np.float32))
        assert same(*(experts.weighted(x[:tokens], chosen, weights) for experts in layers))
        assert same(*(experts(x[:tokens], chosen) for experts in layers))
        layers[0].check()
    assert len(refused) > 10


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("wanted", ["none", "three", "all"])
def test_room_that_was_taken_for_a_wrong_guess(
    monkeypatch: pytest.MonkeyPatch, mixed: Path, weighted: bool, wanted: str
) -> None:
    """Four experts are being read ahead, which is all that there is room for. Or not wrong, but not the first wanted."""

    def slow(*arguments: Any) -> int:
        time.sleep(0.02)
        return os.preadv(*arguments)

    monkeypatch.setattr(loading, "Reader", functools.partial(Reader, preadv=slow))
    loaded, twin = stream(mixed), twin_layers(mixed)[0]
    layer = experts(loaded).layers[0]
    largest = sorted(range(24), key=lambda e: layer.sizes[e])[-8:]
    for expert in largest[4:]:
        layer.fetch_ahead(expert)
    assert len(layer.cache.loading) == 4
    chosen = {"none": [largest[:4]], "three": [largest[3:7]], "all": np.arange(24).reshape(6, 4).tolist()}[wanted]
    x = mx.array(np.random.default_rng(0).standard_normal((len(chosen), 64)).astype(np.float32))
    chosen, weights = mx.array(chosen, dtype=mx.uint32), mx.full((len(chosen), 4), 0.25)
    if weighted:
        assert same(layer.weighted(x, chosen, weights), twin.weighted(x, chosen, weights))
    else:
        assert same(layer(x, chosen), twin(x, chosen))
    layer.check()
    experts(loaded).close()


def test_reads_past_the_page_cache_change_no_bit(mixed: Path) -> None:
    loaded = stream(mixed, 0.1, direct=True)
    assert same(loaded.model(PROMPT), resident(mixed).model(PROMPT))
    experts(loaded).close()


def test_the_kernels_of_a_call_do_not_depend_on_what_is_there(mixed: Path) -> None:
    """Six tokens have as many pairs as there are experts: decoding, and one more is a chunk, however it is divided."""
    called: list[str] = []

    class Watched(ReferenceKernels):
        def expert_gate_up(self, *arguments: Any) -> mx.array:
            called.append("decode")
            return super().expert_gate_up(*arguments)

        def expert_gemm(self, *arguments: Any) -> mx.array:
            called.append("prefill")
            return super().expert_gemm(*arguments)

    loaded = stream(mixed, 0.2, kernels=Watched())
    layer = experts(loaded).layers[0]
    chosen = mx.array([[(t + 7 * i) % 24 for i in range(4)] for t in range(7)], dtype=mx.uint32)
    for tokens, kind in ((6, "decode"), (7, "prefill")):
        called.clear()
        mx.eval(layer(mx.zeros((tokens, 64)), chosen[:tokens]))
        mx.eval(layer.weighted(mx.zeros((tokens, 64)), chosen[:tokens], mx.ones((tokens, 4))))
        assert set(called) == {kind}
        assert len(called) > 4
    experts(loaded).close()


def test_a_token_takes_one_dispatch_more_where_something_is_missing(mixed: Path) -> None:
    """First products of what is there and of what comes, and one last product over all; the resident two where all is."""
    called: list[str] = []

    class Watched(ReferenceKernels):
        def expert_gate_up(self, x: mx.array, experts: mx.array, *arguments: Any) -> mx.array:
            called.append(f"gate_up {sorted(experts.reshape(-1).tolist())}")
            return super().expert_gate_up(x, experts, *arguments)

        def expert_down(self, hidden: mx.array, experts: mx.array, *arguments: Any) -> mx.array:
            called.append(f"down {experts.reshape(-1).tolist()}")
            return super().expert_down(hidden, experts, *arguments)

    loaded = stream(mixed, 0.5, kernels=Watched())
    layer = experts(loaded).layers[0]
    for chosen in ([7, 2, 5, 3], [5, 9, 2, 8], [9, 5, 8, 2]):
        mx.eval(layer.weighted(mx.zeros((1, 64)), mx.array([chosen], dtype=mx.uint32), mx.ones((1, 4))))
    assert called == [
        *("gate_up [2, 3, 5, 7]", "down [7, 2, 5, 3]"),
        *("gate_up [2, 5]", "gate_up [8, 9]", "down [5, 9, 2, 8]"),
        *("gate_up [2, 5, 8, 9]", "down [9, 5, 8, 2]"),
    ]
    experts(loaded).close()


def test_a_graph_that_was_not_evaluated_keeps_its_experts(layers: tuple[StreamedExperts, KernelExperts]) -> None:
    """Its inputs would be overwritten by the calls after it, which have room for no more than one token's experts."""
    layer, twin = layers
    rng = np.random.default_rng(0)
    x, weights = mx.array(rng.standard_normal((1, 64)).astype(np.float32)), mx.full((1, 4), 0.25)
    choices = [mx.array(rng.choice(24, (1, 4), replace=False).astype(np.uint32)) for _ in range(12)]
    lazy = [layer.weighted(x, chosen, weights) for chosen in choices]
    for output, chosen in zip(reversed(lazy), reversed(choices), strict=True):
        assert same(output, twin.weighted(x, chosen, weights))


def test_shared_experts_run_while_others_are_read(tmp_path: Path) -> None:
    """In a fused block too, and once."""
    write_architecture(tmp_path / "source", "deepseek_v3")
    assert convert(tmp_path / "source", tmp_path / "converted", "--bpw", "9") == 0
    loaded = stream(tmp_path / "converted")
    (block, *_) = [module for _, module in loaded.model.named_modules() if isinstance(module, FusedBlock)]
    beside = block.shared_experts
    assert isinstance(beside, Beside)
    calls: list[str] = []
    start, inner = beside.start, beside.module
    beside.start = lambda x: (calls.append("early"), start(x))  # type: ignore[method-assign,assignment]

    class Counted(type(inner)):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            calls.append("computed")
            return super().__call__(x)

    inner.__class__ = Counted
    for _ in range(2):
        mx.eval(loaded.model(PROMPT[:, :1]))
    assert calls == ["early", "computed", "computed"]
    calls.clear()
    mx.eval(loaded.model(PROMPT[:, :4]))  # by waves, each of which finds experts missing
    assert calls.count("early") > 1
    assert calls.count("computed") == 1
    experts(loaded).close()


# -- the arena -----------------------------------------------------------------------------------------------------------


def carry_out(shelf: ArenaShelf, expert: int, busy: Sequence[int] = ()) -> None:
    for read in shelf.reads(expert, busy):
        assert read.finish is None
        assert read.destinations is not None
        parts = zip(read.span.parts, read.destinations, strict=True)
        buffers = [bytearray(p.nbytes) if p.field == "padding" else d for p, d in parts]
        read_span(read.span, buffers)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> LayerPlan:
    """Experts of all levels, of random bits. The last projection has the smaller groups, so larger scales.

    Many with one 1-bit plane to a matrix and many with none: so halves of frames are often left behind."""
    levels = random.Random(0).choices([(3, 3, 3), (2, 2, 2), (8, 8, 8), (6, 6, 6), (3, 2, 2)], k=44)
    levels += [(2, 4, 8), (4, 4, 4), (8, 6, 2), (3, 4, 6)]
    return write_layer(tmp_path_factory.mktemp("layer") / "experts.safetensors", levels)


def write_layer(path: Path, levels: Sequence[tuple[int, ...]]) -> LayerPlan:
    """A file of random bits, and its layer."""
    shapes = tuple(MatrixShape(*row) for row in [("gate", 32, 64, 64), ("up", 32, 64, 64), ("down", 64, 32, 32)])
    rng = np.random.default_rng(0)
    entries = tuple(ExpertEntry(row, (), (), (0,) * max(map(num_planes, row))) for row in levels)
    layer = LayerPlan(0, "experts", "glu", str(path), shapes, (), entries)
    records = b"".join(rng.bytes(nbytes) for *_, nbytes in layer_records(layer))
    path.write_bytes(layer_header(layer) + records)
    return layer


@pytest.fixture
def store(layer: LayerPlan) -> Iterator[ExpertStore]:
    with ExpertStore(Path(), (layer,)) as store:
        yield store


def make_shelf(store: ExpertStore, layer: LayerPlan, capacity: int) -> ArenaShelf:
    return ArenaShelf(store, layer, Activation("swiglu"), (None,) * 3, ReferenceKernels(), capacity)


def matrices(shelf: ArenaShelf, expert: int) -> list[mx.array]:
    banks = [bank for bank in shelf.banks[:3] if bank is not None]
    return [bank.dequantize(expert) for bank in banks]


def equal(first: list[mx.array], second: list[mx.array]) -> bool:
    return all(mx.array_equal(a, b, equal_nan=True).item() for a, b in zip(first, second, strict=True))


def test_parts_lie_where_the_table_says(store: ExpertStore, layer: LayerPlan) -> None:
    """Each part of the file, found through the table as the kernels find it, and by nothing else."""
    check_parts(store, layer)


def test_parts_above_8_bits_lie_where_the_table_says(tmp_path: Path) -> None:
    layer = write_layer(tmp_path / "experts.safetensors", [(16, 16, 16), (2, 4, 16), (16, 3, 8), (2, 2, 2)])
    with ExpertStore(Path(), (layer,)) as store:
        check_parts(store, layer)


def check_parts(store: ExpertStore, layer: LayerPlan) -> None:
    shelf = make_shelf(store, layer, sum(PLANES.experts_nbytes(layer)))
    for expert in range(len(shelf.sizes)):
        carry_out(shelf, expert)
    for expert in range(len(shelf.sizes)):
        (span,) = store.spans(0, expert)
        record = np.empty(span.nbytes, np.uint8)
        read_span(span, [record.data])
        for part, data in zip(span.parts, np.split(record, np.cumsum([p.nbytes for p in span.parts])), strict=False):
            if part.field == "padding":
                continue
            bank: Any = shelf.banks[part.projection]
            row = np.array(bank.table[expert])
            assert row[0] == layer.experts[expert].levels[part.projection]
            assert row.view(np.float32)[TABLE_FACTOR] == 1.0
            start = row[TABLE_SCALES if part.field == "scales" else TABLE_PLANES[int(part.field[-1])]]
            assert start % 4 == 0
            assert np.array(bank.words[int(start) : int(start) + part.nbytes // 4]).tobytes() == data.tobytes()


def test_experts_of_all_levels_come_and_go(store: ExpertStore, layer: LayerPlan) -> None:
    """Whoever fits is placed, if need be by moving others, and after every step all are what the file says. Who is busy
    stays where it is, and a refusal takes nothing."""
    whole = make_shelf(store, layer, sum(PLANES.experts_nbytes(layer)))
    everybody = range(len(whole.sizes))
    for expert in everybody:
        carry_out(whole, expert)
    rng = random.Random(0)
    capacity = sum(whole.sizes) * 3 // 4
    shelf = make_shelf(store, layer, capacity)
    refused = moved = 0
    for step in range(400):
        here = list(shelf.filled)
        expert = rng.choice([e for e in everybody if e not in here])
        rng.shuffle(here)
        while sum(shelf.sizes[e] for e in (*here, expert)) > capacity:
            shelf.drop(here.pop())
        before, busy = {e: dict(shelf._slots[e]) for e in here}, here[: rng.randint(0, len(here))]
        try:
            carry_out(shelf, expert, busy)
        except Busy:
            refused += 1
            assert set(shelf.filled) == set(here)
            carry_out(shelf, expert)
        else:
            assert all(shelf._slots[e] == before[e] for e in busy)
        shelf._frames.check()
        elsewhere = [e for e in here if shelf._slots[e] != before[e]]
        moved += bool(elsewhere)
        for e in elsewhere if step % 20 else shelf.filled:
            assert equal(matrices(shelf, e), matrices(whole, e))
    assert refused > 2
    assert 5 < moved < 400 // 20  # rare


def test_another_capacity_keeps_what_is_there(store: ExpertStore, layer: LayerPlan) -> None:
    shelf = make_shelf(store, layer, sum(PLANES.experts_nbytes(layer)))
    for expert in range(22):
        carry_out(shelf, expert)
    for expert in set(range(22)) - {3, 9, 21}:
        shelf.drop(expert)
    wanted = [matrices(shelf, expert) for expert in (3, 9, 21)]
    for capacity in (sum(shelf.sizes[e] for e in (3, 9, 21)), sum(shelf.sizes) // 2, 1 << 24):
        shelf.resize(capacity)
        assert shelf.nbytes <= min(capacity, sum(shelf.sizes)) + arena_slack(layer)
        assert set(shelf.filled) == {3, 9, 21}
        assert all(equal(matrices(shelf, e), kept) for e, kept in zip((3, 9, 21), wanted, strict=True))


def test_bytes_are_what_is_counted(monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
    """An expert takes what the kernels' resident experts take, and the arenas what the budget says and its slack."""
    whole = resident(mixed)
    config = RuntimeConfig(context=CONTEXT, kernels=ReferenceKernels(), threads=3)
    prepared = prepare(mixed, config)
    assert sum(shape.total for shape in prepared.streamed_shapes) == whole.report.nbytes_experts
    assert prepared.plan is not None
    for share in (0.0, 0.3, 1.0):
        loaded = stream(mixed, share)
        arenas = [shelf.nbytes for shelf in shelves(loaded)]
        for layer, plan, nbytes in zip(experts(loaded).layers, prepared.plan.layers, arenas, strict=True):
            assert nbytes <= layer.cache.capacity + arena_slack(plan)
        assert sum(arenas) <= loaded.report.nbytes_experts + prepared.nbytes_slack
        assert loaded.report.nbytes <= loaded.report.memory
        experts(loaded).close()
    slack, least = sum(map(arena_slack, prepared.plan.layers)), prepared.streaming(0).least_memory
    assert slack < 2 * sum(2 * plan.projections[0].plane_nbytes(0) for plan in prepared.plan.layers)
    monkeypatch.setattr("mlxmoe.prepared.arena_slack", lambda layer: 1_000_000)
    assert prepared.streaming(0).least_memory == least + 2 * 1_000_000 - slack
