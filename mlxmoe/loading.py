"""load(path) -> (model, tokenizer), ready for mlx_lm.stream_generate, under a hard memory ceiling.

A source is a converted folder, an unconverted Hugging Face folder, a stock MLX checkpoint or a Hub id. The model is
mlx-lm's own class through mlx-lm's own loader (`load_model(get_model_classes=...)`), its routed experts replaced by
ExpertLayer. What the budget allows is decided before a byte of weights is read: the trunk and the KV cache are known from
shapes alone, and what is left belongs to the experts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from mlxmoe.arena import ArenaShelf, arena_sizes, arena_slack
from mlxmoe.banks import plane_layer
from mlxmoe.blocks import fused_block
from mlxmoe.cache import LayerCache
from mlxmoe.checkpoint import Checkpoint, open_checkpoint
from mlxmoe.elastic import ElasticMemory, LevelledLayer, MergedLevels, PlaneLevels
from mlxmoe.errors import UserError
from mlxmoe.expert_memory import ExpertMemory, LayerBytes, Place, choose_pinned, split_budget
from mlxmoe.experts import ExpertLayer, KernelExperts, PlaneLinear, stock_banks
from mlxmoe.formats import PLANE_WIDTHS, SCALE_NBYTES
from mlxmoe.gates import experts_see_the_input, gate_scores
from mlxmoe.kernel_choice import Choice, LayerShape, metal_facts, select, select_all
from mlxmoe.kernels import TABLE_WIDTH, ExpertBanks, MetalKernels, ReferenceKernels, activation_of
from mlxmoe.models import (
    expert_sites,
    max_context,
    model_classes,
    named_arrays,
    num_experts_per_token,
    text_config,
)
from mlxmoe.plan import FileEntry, LayerPlan, Plan
from mlxmoe.reader import DEFAULT_THREADS, Paced, Reader, probe
from mlxmoe.repack import Manifest, RepackedStore, repacked_class
from mlxmoe.residency import Residency, smallest_residency, solve_residency
from mlxmoe.runtime import DEFAULT_CONTEXT, DEFAULTS, RuntimeConfig
from mlxmoe.shelves import MergedShelf, Shelf, SlotShelf, merged_sizes
from mlxmoe.stacked import StackedStore, StockSource, read_layer
from mlxmoe.store import PAGE, ExpertSource, ExpertStore
from mlxmoe.streaming import Beside, StreamedExperts
from mlxmoe.units import format_size, parse_size

SHARED = ("shared_experts", "shared_expert")  # what blocks call the experts that every token goes to
PREFILL_UNIT = 32  # tokens per prefill chunk: the smallest, and what others are multiples of
# The most. On a CPU larger chunks gain nothing, and Ctrl-C has to wait for one to end.
PREFILL_MAX_GPU, PREFILL_MAX_CPU = 2048, 256


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and why. Bytes are bytes of memory, not of files."""

    source: str
    folder: Path
    architecture: str
    kind: str  # converted, huggingface or mlx
    mode: str  # resident (all that is written), elastic (reduced to fit), streaming (exact, read when missing)
    context: int  # tokens that memory is reserved for
    prefill_step: int = 2048  # tokens per prefill chunk that the reserve holds; pass it as prefill_step_size
    nbytes_file: int = 0
    nbytes_experts: int = 0
    nbytes_trunk: int = 0
    nbytes_kv: int = 0
    nbytes_buffers: int = 0
    memory: int = 0
    levels: dict[int, int] = field(default_factory=dict)  # level -> expert matrices resident at it
    products: str = ""  # what computes the experts' products, and why
    streaming: str = ""  # what part of the experts there is room for, and how the others are read
    expected_loss: float | None = None
    written_loss: float | None = None  # with everything that the file holds
    expected_kld: float | None = None  # mean, to the source, in nats; where the folder holds a forecast

    @property
    def nbytes(self) -> int:
        return self.nbytes_experts + self.nbytes_trunk + self.nbytes_kv + self.nbytes_buffers

    def lines(self) -> list[str]:
        """For the person at the terminal."""
        lines = [
            f"{self.source}: {self.architecture}, {self.kind}, {self.mode}; {format_size(self.nbytes)} of "
            f"{format_size(self.memory)}: experts {format_size(self.nbytes_experts)}, other weights "
            f"{format_size(self.nbytes_trunk)}, {self.context} tokens of context {format_size(self.nbytes_kv)}, "
            f"buffers {format_size(self.nbytes_buffers)}"
        ]
        if self.levels:
            total = sum(self.levels.values())
            shares = ", ".join(f"{100 * n / total:.0f} % at {level} bit" for level, n in self.levels.items())
            loss = f"expected loss {self.expected_loss:.3g}"
            if self.mode == "elastic":
                loss += f" ({self.written_loss:.3g} with the whole file)"
            if self.expected_kld is not None:
                loss += f"; KLD to the original about {self.expected_kld:.3g} nats"
            lines.append(f"expert matrices: {shares}; {loss}")
        if self.streaming:
            lines.append(self.streaming)
        if mx.default_device() != mx.cpu:
            lines.append(f"experts run on {self.products}")
        return lines

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "architecture": self.architecture,
            "kind": self.kind,
            "mode": self.mode,
            "context": self.context,
            "memory": self.memory,
            "bytes_file": self.nbytes_file,
            "bytes_resident": self.nbytes,
            "bytes_experts": self.nbytes_experts,
            "bytes_trunk": self.nbytes_trunk,
            "bytes_kv": self.nbytes_kv,
            "bytes_buffers": self.nbytes_buffers,
            "levels": {str(level): n for level, n in self.levels.items()},
            "products": self.products,
            "expected_loss": self.expected_loss,
            "expected_kld": self.expected_kld,
        }


class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: Any  # mlx_lm's TokenizerWrapper
    report: LoadReport
    # What holds the experts and can give some of their memory back: of a streamed model, of one whose levels can change
    experts: ExpertMemory | None = None
    elastic: ElasticMemory | None = None


def load(
    source: str | Path | None = None, memory: str | int | None = None, context: int | None = None
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) for mlx_lm.stream_generate. `source` None is the demo model; `memory` such as "8GB".

    The ceiling counts on prefill in chunks of `open_model(...).report.prefill_step` tokens: for prompts longer than that,
    pass it to stream_generate as prefill_step_size (the commands do), whose own default is 2048.
    Raises UserError (a ValueError) for bad input, and when the model does not fit, with the least that would work.
    """
    loaded = open_model(source, RuntimeConfig(parse_size(memory) if memory is not None else None, context))
    return loaded.model, loaded.tokenizer


class Reserve(NamedTuple):
    """Bytes kept for activations and growth of the cache, and the tokens per prefill chunk that they suffice for."""

    nbytes: int
    prefill_step: int


class Streaming(NamedTuple):
    """A budget for streamed experts in bytes, what is kept beside it, and the least memory in all that is enough."""

    budget: int
    reserve: Reserve
    least_memory: int


class Prepared(NamedTuple):
    """A model that is known by its shapes: nothing of its weights is read yet. Bytes are bytes of memory."""

    checkpoint: Checkpoint
    model: nn.Module  # lazy weights in the activation's precision; a converted folder's experts are empty
    config: dict[str, Any]  # as mlx-lm reads it
    plan: Plan | None
    context: int
    nbytes_trunk: int
    nbytes_experts: int  # 0 for a converted folder: that is what the budget decides
    nbytes_kv: int
    kernels: MetalKernels | ReferenceKernels | None  # what the experts run on; None: MLX's built-ins
    phases: tuple[str, ...]  # what the kernels compute; only of a stock checkpoint can built-ins compute the rest
    products: str  # the same in words, with the reason
    active: int  # experts per token
    threads: int  # the most that read experts
    nbytes_largest_trunk: int  # the largest array that is no expert's
    nbytes_largest: int  # the largest array that is read: as long as it is stacked and cast, it is there twice

    def reserve(self, memory: int) -> Reserve:
        """What is kept free for buffers under a memory budget."""
        reserve = _reserve(self.checkpoint.config, self.context, self.nbytes_kv, memory, self.nbytes_least)
        # While weights are read there is no cache yet: its bytes serve as well.
        return reserve._replace(nbytes=max(reserve.nbytes, self.nbytes_largest - self.nbytes_kv))

    @property
    def group_nbytes(self) -> int:
        """Memory per group of expert weights: a float16 scale, or a scale and a bias in the activation's precision."""
        return SCALE_NBYTES if self.kernels is not None else 2 * activation_dtype(self.checkpoint.config).size

    @property
    def nbytes_least(self) -> int:
        """Bytes without buffers that it cannot run with less of: of a converted folder with the base planes only."""
        nbytes_base = smallest_residency(self.plan, self.group_nbytes) if self.plan is not None else self.nbytes_experts
        return self.nbytes_trunk + nbytes_base + self.nbytes_kv

    @property
    def streamed_shapes(self) -> list[LayerBytes]:
        """What the experts of each layer take when they are streamed."""
        if self.plan is None:
            layers = _expert_layers(self.model).values()
            return [
                LayerBytes((layer.nbytes // layer.num_experts,) * layer.num_experts, self.active) for layer in layers
            ]
        if self.kernels is not None:
            return [LayerBytes(arena_sizes(layer), self.active) for layer in self.plan.layers]
        dtype = activation_dtype(self.checkpoint.config)
        return [LayerBytes(merged_sizes(layer, dtype), self.active) for layer in self.plan.layers]

    @property
    def nbytes_slack(self) -> int:
        """What streamed experts may take beyond their budget: the kernels' arenas are whole frames, records whole pages."""
        if self.plan is None or self.kernels is None:
            return 0
        pages = 2 * self.threads * len(PLANE_WIDTHS) * PAGE
        return pages + sum(map(arena_slack, self.plan.layers))

    def streaming(self, memory: int) -> Streaming:
        """How a memory budget is spent when experts are streamed; less than `least_memory` is not enough for it."""
        shapes = self.streamed_shapes
        least = sum(shape.least for shape in shapes)
        # An expert on its way, of each thread: as it lies in the file, and what it is converted with
        scratch = 2 * self.threads * max(max(shape.sizes) for shape in shapes) + self.nbytes_slack
        beside = self.nbytes_trunk + self.nbytes_kv + scratch
        reserve = _reserve(self.checkpoint.config, self.context, self.nbytes_kv, memory, beside + least)
        # While the trunk is read there are no experts and no cache yet: their bytes serve as well.
        nbytes = max(reserve.nbytes, self.nbytes_largest_trunk - self.nbytes_kv - least - scratch)
        budget = memory - beside - nbytes
        return Streaming(budget, reserve._replace(nbytes=nbytes + scratch), beside + nbytes + least)

    def nbytes_fixed(self, memory: int) -> int:
        """Everything beside the experts that the budget decides about."""
        return self.nbytes_trunk + self.nbytes_experts + self.nbytes_kv + self.reserve(memory).nbytes


def prepare(source: str | Path | None, config: RuntimeConfig = DEFAULTS) -> Prepared:
    """Opens and checks a model and adds up what it needs, without reading its weights. Raises UserError."""
    checkpoint = open_checkpoint(source)
    context = _context(checkpoint, config)
    plan = Plan.load(checkpoint.folder) if checkpoint.kind == "converted" else None
    model, model_config = _load_trunk(checkpoint, plan)
    nbytes_kv = _kv_nbytes(model, context)
    nbytes_each = [array.nbytes for array in named_arrays(model.parameters()).values()]
    nbytes_experts = 0 if plan is not None else sum(layer.nbytes for layer in _expert_layers(model).values())
    nbytes_trunk = sum(nbytes_each) - nbytes_experts
    choice = _choose_kernels(config, checkpoint, model, plan)
    if plan is not None and choice.kernels is not None:
        matrices = sum(len(layer.experts) * len(layer.projections) for layer in plan.layers)
        nbytes_trunk += matrices * TABLE_WIDTH * mx.int32.size
    return Prepared(
        *(checkpoint, model, model_config, plan, context, nbytes_trunk, nbytes_experts, nbytes_kv),
        kernels=choice.kernels,
        phases=choice.phases,
        products=choice.reason,
        active=num_experts_per_token(checkpoint.config),
        threads=config.threads or DEFAULT_THREADS,
        nbytes_largest_trunk=max(array.nbytes for array in _trunk_arrays(model)),
        nbytes_largest=max(nbytes_each),
    )


def _choose_kernels(config: RuntimeConfig, checkpoint: Checkpoint, model: nn.Module, plan: Plan | None) -> Choice:
    """What the experts run on. On a GPU that is not on record yet this takes some seconds."""
    layers = _expert_layers(model)
    activations = [activation_of(layer.activation) for layer in layers.values()]
    stock = [stock_banks(layer) for layer in layers.values()] if plan is None else []
    if config.kernels is None or not layers or not all(activations) or not all(stock):
        return Choice(None, "MLX's built-in products")
    if config.kernels != "auto":
        return Choice(config.kernels, "the project's kernels, as asked for")
    active, dtype = num_experts_per_token(checkpoint.config), activation_dtype(checkpoint.config)
    if plan is None:
        return select_all([LayerShape.of_stock(banks, active, dtype) for banks in stock if banks], metal_facts())
    first = plan.layers[0]
    activation, bias = activations[0], "bias" in layers[first.path].projections[0]
    assert activation is not None
    return select(LayerShape.of_plan(first, active, dtype, activation, bias), metal_facts())


def choose_residency(prepared: Prepared, memory: int) -> Residency:
    """What of a converted folder is resident under `memory` bytes in all, at least smallest_memory(prepared)."""
    assert prepared.plan is not None
    budget = memory - prepared.nbytes_fixed(memory)
    return solve_residency(prepared.plan, budget, prepared.group_nbytes, _widens(prepared))


def _widens(prepared: Prepared) -> bool:
    """A built-in product costs per weight, not per byte, on the CPU backend: there, spare memory buys fewer calls."""
    return mx.default_device() == mx.cpu and prepared.kernels is None


def smallest_memory(prepared: Prepared) -> int:
    """The least --memory with which no expert has to be read while the model runs."""
    return prepared.nbytes_least + prepared.reserve(0).nbytes


def smallest_streaming(prepared: Prepared) -> int:
    """The least --memory that works."""
    return min(prepared.streaming(0).least_memory, smallest_memory(prepared))


def full_memory(prepared: Prepared) -> int:
    """The least --memory with which every expert is resident as it is written."""
    if prepared.plan is None:
        return smallest_memory(prepared)
    experts = solve_residency(prepared.plan, None, prepared.group_nbytes, widen=False).nbytes
    # What is kept for buffers grows with the memory, so the least that leaves room for the experts has to be looked for
    low = prepared.nbytes_fixed(0) + experts
    high = 2 * low + (1 << 30)
    while low < high:
        middle = (low + high) // 2
        if middle - prepared.nbytes_fixed(middle) >= experts:
            high = middle
        else:
            low = middle + 1
    return low


def open_model(source: str | Path | None, config: RuntimeConfig = DEFAULTS) -> Loaded:
    """Like `load`, and says what was chosen. Sets MLX's memory limit and cache limit for this process."""
    prepared = prepare(source, config)
    memory = config.memory or machine_memory()
    if memory < (full_memory(prepared) if config.exact else smallest_memory(prepared)):
        return _open_streamed(prepared, memory, config)
    return _open_resident(prepared, memory, config.adapt)


def _open_resident(prepared: Prepared, memory: int, adapt: bool) -> Loaded:
    """All experts in memory: a converted folder's at the levels that fit."""
    residency = choose_residency(prepared, memory) if prepared.plan is not None else None
    reserve = prepared.reserve(memory)
    if prepared.checkpoint.kind == "repacked":
        tokenizer = _read(prepared, memory, reserve, _trunk_arrays(prepared.model))
        _read_repacked(prepared)
    else:
        tokenizer = _read(prepared, memory, reserve, named_arrays(prepared.model.parameters()).values())
    elastic = _fill(prepared, residency, adapt) if residency is not None else None
    if prepared.plan is None and prepared.kernels is not None:
        _use_kernels(prepared, _stock_banks(prepared))
    nbytes_experts = residency.nbytes if residency is not None else prepared.nbytes_experts
    report = replace(_report(prepared, memory, reserve, "resident", nbytes_experts), products=prepared.products)
    if residency is not None:
        report = replace(
            report,
            mode="elastic" if residency.reduced else "resident",
            levels=residency.histogram(),
        )
        report = _with_loss(report, prepared, residency.expected_loss)
    return Loaded(prepared.model, tokenizer, report, elastic=elastic)


def _open_streamed(prepared: Prepared, memory: int, config: RuntimeConfig) -> Loaded:
    """Every expert as it is written, read when a token needs it and it is not there."""
    streaming = prepared.streaming(memory)
    if memory < streaming.least_memory:
        raise _too_small(prepared, memory)
    if config.pin and prepared.plan is None:
        raise UserError(
            f"{prepared.checkpoint.name} does not say which experts are frequent, so none can be pinned",
            "leave out --pin, or convert the checkpoint",
        )
    with ExitStack() as stack:
        source = stack.enter_context(closing(expert_source(prepared)))
        way = _way_of_reading(source, config)
        tokenizer = _read(prepared, memory, streaming.reserve, _trunk_arrays(prepared.model))
        preadv = Paced(config.read_rate) if config.read_rate else os.preadv
        reader = stack.enter_context(Reader(way.threads, way.direct, preadv))
        experts = _stream(prepared, source, reader, streaming.budget, config)
        stack.pop_all()
    share = experts.capacity / experts.total
    report = replace(
        _report(prepared, memory, streaming.reserve, "streaming", experts.capacity),
        streaming=f"room for {100 * share:.0f} % of the experts; the others are read when they are needed, by {way}",
    )
    if prepared.plan is not None:
        report = replace(report, products=prepared.products, levels=prepared.plan.level_histogram())
        report = _with_loss(report, prepared, prepared.plan.expected_loss)
    return Loaded(prepared.model, tokenizer, report, experts)


def _with_loss(report: LoadReport, prepared: Prepared, expected_loss: float) -> LoadReport:
    forecast = prepared.plan.forecast if prepared.plan is not None else None
    kld = forecast.kld(expected_loss) if forecast is not None else None
    return replace(report, expected_loss=expected_loss, expected_kld=kld)


def expert_source(prepared: Prepared) -> ExpertSource:
    """Where the experts' bytes lie. Raises UserError for a layout that cannot be read expert by expert."""
    if prepared.plan is not None:
        return ExpertStore(prepared.checkpoint.folder, prepared.plan.layers)
    if prepared.checkpoint.kind == "repacked":
        return RepackedStore(prepared.checkpoint.folder)
    return StackedStore(prepared.checkpoint)


class _Way(NamedTuple):
    """How experts are read: by how many threads, and whether past the page cache."""

    threads: int
    direct: bool

    def __str__(self) -> str:
        return f"{self.threads} threads, {'past' if self.direct else 'through'} the page cache"


def _way_of_reading(source: ExpertSource, config: RuntimeConfig) -> _Way:
    """What was asked for, and for the rest what a probe of the disk says."""
    if config.threads is not None and config.direct is not None:
        return _Way(config.threads, config.direct)
    first = source.layers[0]
    spans = [span for e in range(first.num_experts) for span in source.spans(first.layer, e)]
    found = probe(spans)
    return _Way(config.threads or found.threads, found.direct if config.direct is None else config.direct)


def _stream(
    prepared: Prepared, source: ExpertSource, reader: Reader, budget: int, config: RuntimeConfig
) -> ExpertMemory:
    """Puts StreamedExperts in the place of every expert layer."""
    layers = _expert_layers(prepared.model)
    plans = {layer.path: layer for layer in prepared.plan.layers} if prepared.plan is not None else {}
    shapes = prepared.streamed_shapes
    capacities = split_budget(shapes, budget, _wanted(source, shapes, config))
    places: list[Place] = []
    shared: list[tuple[str, nn.Module]] = []
    for (number, path, _), shape, capacity in zip(source.layers, shapes, capacities, strict=True):
        layer = layers[path]
        shelf = _shelf(prepared, source, number, layer, plans.get(path), capacity)
        slots = capacity * len(shape.sizes) // shape.total
        frequencies = _frequencies(prepared.plan, number)
        policy = config.make_policy(number, len(shape.sizes), slots, frequencies)
        pinned = choose_pinned(shape, int(config.pin * (capacity - shape.least)), frequencies)
        cache = LayerCache(shape.sizes, capacity, policy, pinned)
        block_path = path.rpartition(".")[0]
        block = _module(prepared.model, block_path)
        beside = _beside(block)
        gate = gate_scores(block, layer.num_experts)
        places.append(Place(shelf, cache, prepared.active, list(beside.values()), gate))
        shared += [(f"{block_path}.{name}", module) for name, module in beside.items()]
    prepared.model.update_modules(tree_unflatten(shared))
    experts = ExpertMemory(source, reader, places, config.prefetch)
    replaced = [
        _on_kernels(prepared, path, place.shelf.banks, streamed)
        if isinstance(place.shelf, ArenaShelf)
        else (path, streamed)
        for (_, path, _), place, streamed in zip(source.layers, places, experts.layers, strict=True)
    ]
    prepared.model.update_modules(tree_unflatten(replaced))
    return experts


def _shelf(
    prepared: Prepared, source: ExpertSource, number: int, layer: ExpertLayer, plan: LayerPlan | None, capacity: int
) -> Shelf:
    """Where the experts of a layer lie while they are streamed."""
    if plan is None:
        return SlotShelf(cast(StockSource, source), number, layer, capacity)
    biases = [projection.get("bias") for projection in layer.projections]
    if prepared.kernels is None:
        return MergedShelf(source, plan, layer.activation, biases, activation_dtype(prepared.checkpoint.config))
    activation = activation_of(layer.activation)
    assert activation is not None
    return ArenaShelf(source, plan, activation, biases, prepared.kernels, capacity)


def _wanted(source: ExpertSource, shapes: Sequence[LayerBytes], config: RuntimeConfig) -> list[float] | None:
    """The bytes that a saved choice gives each layer, at the budget that it was made for."""
    if isinstance(config.policy, str):
        return None
    slots = {choice.layer: choice.slots for choice in config.policy.layers}
    return [
        shape.total * slots.get(layer.layer, 0) / layer.num_experts
        for layer, shape in zip(source.layers, shapes, strict=True)
    ]


def _frequencies(plan: Plan | None, number: int) -> list[float] | None:
    """What the plan says an expert of a layer weighs: for the static policy."""
    if plan is None:
        return None
    (layer,) = (layer for layer in plan.layers if layer.layer == number)
    return [sum(weights) for weights in zip(*layer.weights, strict=True)]


def _beside(block: nn.Module) -> dict[str, Beside]:
    """What a block computes on the same input as its experts."""
    if not experts_see_the_input(block):
        return {}
    return {name: Beside(block[name]) for name in SHARED if isinstance(block.get(name), nn.Module)}


def _read(prepared: Prepared, memory: int, reserve: Reserve, arrays: Iterable[mx.array]) -> Any:
    """Sets MLX's limits, reads these weights, and returns the tokenizer."""
    tokenizer = _load_tokenizer(prepared.checkpoint, prepared.config)
    if prepared.plan is not None:
        _verify_trunk(prepared.checkpoint, prepared.plan.files)
    elif prepared.checkpoint.kind == "repacked":
        _verify_trunk(prepared.checkpoint, Manifest.load(prepared.checkpoint.folder).files)
    _limit_memory(memory, reserve.nbytes)
    for array in arrays:
        mx.eval(array)  # one after the other, so that only one is there twice
    return tokenizer


def _read_repacked(prepared: Prepared) -> None:
    """All experts of a repacked folder, layer by layer."""
    dtype = activation_dtype(prepared.checkpoint.config)
    with closing(RepackedStore(prepared.checkpoint.folder)) as store, Reader(prepared.threads) as reader:
        for layer in store.layers:
            arrays = {name: _cast(array, dtype) for name, array in read_layer(store, reader, layer.layer).items()}
            mx.eval(arrays)
            prepared.model.update(tree_unflatten(list(arrays.items())))


def _report(prepared: Prepared, memory: int, reserve: Reserve, mode: str, nbytes_experts: int) -> LoadReport:
    checkpoint = prepared.checkpoint
    return LoadReport(
        source=checkpoint.name,
        folder=checkpoint.folder,
        architecture=checkpoint.config["model_type"],
        kind=checkpoint.kind,
        mode=mode,
        context=prepared.context,
        prefill_step=reserve.prefill_step,
        nbytes_file=checkpoint.nbytes,
        nbytes_experts=nbytes_experts,
        nbytes_trunk=prepared.nbytes_trunk,
        nbytes_kv=prepared.nbytes_kv,
        nbytes_buffers=reserve.nbytes,
        memory=memory,
        products="MLX's built-in products",
        written_loss=prepared.plan.expected_loss if prepared.plan is not None else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The model around the experts
# ---------------------------------------------------------------------------------------------------------------------


def _load_trunk(checkpoint: Checkpoint, plan: Plan | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model with lazy weights in the activation's precision, and its config. Converted: the experts are empty."""

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = model_classes(config)
        if plan is not None:
            return _converted(model_class, plan), args_class
        if checkpoint.kind == "repacked":
            with closing(RepackedStore(checkpoint.folder)) as store:
                return repacked_class(model_class, store), args_class
        return model_class, args_class

    try:
        model, config = load_model(checkpoint.folder, lazy=True, get_model_classes=classes)
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        reason = str(error).split("\n")[0].strip()
        raise UserError(
            f"{checkpoint.name}: weights and config.json do not belong together ({reason})",
            "the checkpoint is incomplete or damaged: copy or download it again",
        ) from error
    if plan is None:
        replaced = [(site.path, ExpertLayer.from_switch(_module(model, site.path))) for site in expert_sites(model)]
        model.update_modules(tree_unflatten(replaced))
    dtype = activation_dtype(checkpoint.config)
    model.update(tree_map(lambda array: _cast(array, dtype), model.parameters()))
    return model, config


def _converted(model_class: Any, plan: Plan) -> Any:
    """The model class with empty plane experts, whose trunk on disk already carries the model's own names."""

    class Converted(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            layers = {layer.path: layer for layer in plan.layers}
            replaced = []
            for site in expert_sites(self):
                layer = layers.get(site.path)
                if layer is None or len(layer.experts) != site.num_experts:
                    raise UserError(
                        f"the plan does not fit the model: {site.path} has {site.num_experts} experts",
                        "config.json and plan.json do not belong together: convert the model again",
                    )
                activation = _module(self, site.path).activation
                parts = {s.name: PlaneLinear(s, site.num_experts, site.has_bias) for s in layer.projections}
                replaced.append((site.path, ExpertLayer(parts, activation, site.num_experts)))
            self.update_modules(tree_unflatten(replaced))

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return weights

    return Converted


def _module(model: nn.Module, path: str) -> Any:
    """The submodule at a dotted path."""
    for part in path.split("."):
        model = model[int(part)] if isinstance(model, list) else model[part]
    return model


def _expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Module path -> layer, in the order of the layers."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, ExpertLayer)}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))


def _trunk_arrays(model: nn.Module) -> list[mx.array]:
    """Every weight but those of the routed experts; their biases are trunk."""
    prefixes = tuple(f"{path}." for path in _expert_layers(model))
    arrays = named_arrays(model.parameters())
    return [a for name, a in arrays.items() if not name.startswith(prefixes) or name.endswith(".bias")]


def activation_dtype(config: dict[str, Any]) -> mx.Dtype:
    """float32 on the CPU backend (its products accumulate in the activation's precision, and expert products exist in
    float32 only); on a GPU the checkpoint's 16-bit type, float16 on M1 and M2, which have no bfloat16 arithmetic."""
    if mx.default_device() == mx.cpu:
        return mx.float32
    name = str(config.get("dtype") or config.get("torch_dtype") or text_config(config).get("dtype") or "bfloat16")
    if name != "bfloat16":
        return mx.float16
    return mx.float16 if re.search(r"g1[34]", str(mx.device_info().get("architecture", ""))) else mx.bfloat16


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """16-bit floats take the activation's type; float32 stays (routers and their biases are kept in it on purpose)."""
    return array.astype(dtype) if array.dtype in (mx.float16, mx.bfloat16) else array


def _load_tokenizer(checkpoint: Checkpoint, model_config: dict[str, Any]) -> Any:
    try:
        tokenizer = load_tokenizer(checkpoint.folder, eos_token_ids=model_config.get("eos_token_id"))
        if len(tokenizer.get_vocab()) < 2:  # what transformers makes of a folder without one
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{checkpoint.name} has no usable tokenizer ({reason})",
            "copy tokenizer.json and tokenizer_config.json of the original model into the folder",
        ) from error
    return tokenizer


def _verify_trunk(checkpoint: Checkpoint, files: Mapping[str, FileEntry]) -> None:
    """Compares the trunk files with the folder's list of SHA-256. Expert records have a checksum each, verified as they are
    read."""
    names = {path.name for path in checkpoint.shards}
    for name, entry in files.items():
        path = checkpoint.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing", "the folder is incomplete: copy or convert it again")
        if name not in names and name != "config.json":
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        if digest.hexdigest() != entry.sha256:
            raise UserError(f"{path} is not what was written: its SHA-256 differs", "copy or convert the folder again")


def _digest(file: Any) -> Any:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def _context(checkpoint: Checkpoint, config: RuntimeConfig) -> int:
    longest = max_context(checkpoint.config)
    if config.context is None:
        return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if config.context < 1 or (longest is not None and config.context > longest):
        raise UserError(
            f"a context of {config.context} tokens is not within 1 to {longest}, the model's longest",
            "give --context a smaller number",
        )
    return config.context


def machine_memory() -> int:
    """What a model may take when nobody says: MLX's recommended working set on a GPU, else three quarters of the RAM."""
    if mx.default_device() != mx.cpu:
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def _kv_nbytes(model: nn.Module, context: int) -> int:
    """Bytes of the prompt cache after `context` tokens, from the shapes of a graph that is built and never evaluated."""
    cache = make_prompt_cache(model)
    model(mx.zeros((1, context), mx.int32), cache=cache)
    return sum(array.nbytes for array in named_arrays([entry.state for entry in cache]).values())


def _reserve(config: dict[str, Any], context: int, nbytes_kv: int, memory: int, nbytes_least: int) -> Reserve:
    """Room for what is alive beside weights and cache: an eighth of the memory or what is left beside `nbytes_least`, but
    no more than the largest prefill chunk needs and no less than the smallest does. So the least memory does work, and
    more memory never leaves less for the experts.

    An estimate from above, checked against measured peaks in tests/test_memory.py: the attention scores of a chunk over
    the whole context, held several times while masked and normalised (where attention is not fused: the CPU backend, and
    latent attention, whose keys and values are also unpacked for the whole context), or the sorted pairs of an expert
    layer; the cache once more while it grows; the logits of one position.
    """
    text = text_config(config)
    itemsize = activation_dtype(config).size
    heads, hidden = int(text.get("num_attention_heads") or 1), int(text["hidden_size"])
    expert = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or hidden)
    # Products at several field widths compute every pair at each of them
    pairs = num_experts_per_token(config) * (8 * hidden + 8 * expert) * itemsize
    latent = heads * (int(text.get("qk_nope_head_dim") or 0) + int(text.get("v_head_dim") or 0))
    fused = mx.default_device() != mx.cpu and not latent
    per_token = max(0 if fused else 6 * heads * context * itemsize, pairs) + 12 * hidden * itemsize
    fixed = nbytes_kv + 2 * latent * context * itemsize + 16 * int(text["vocab_size"])
    most = PREFILL_MAX_CPU if mx.default_device() == mx.cpu else PREFILL_MAX_GPU
    share = min(memory // 8, memory - nbytes_least, fixed + most * per_token)
    nbytes = max(share, fixed + PREFILL_UNIT * per_token)
    return Reserve(nbytes, (nbytes - fixed) // per_token // PREFILL_UNIT * PREFILL_UNIT)


def _too_small(prepared: Prepared, memory: int) -> UserError:
    least = smallest_streaming(prepared)
    hint = (
        "a shorter --context needs less" if prepared.plan is not None else "or convert it to fewer bits: mlxmoe convert"
    )
    return UserError(
        f"{prepared.checkpoint.name} does not fit in {format_size(memory)}: it needs at least {least} bytes",
        f"give --memory {-(-least // 1_000_000)}MB or more; {hint}",
    )


def _limit_memory(memory: int, nbytes_buffers: int) -> None:
    """Tells MLX the ceiling; freed buffers are kept for reuse only as far as the reserve for buffers goes."""
    mx.set_memory_limit(memory)
    mx.set_cache_limit(nbytes_buffers)
    if mx.default_device() != mx.cpu:
        mx.set_wired_limit(min(memory, int(mx.device_info()["max_recommended_working_set_size"])))


# ---------------------------------------------------------------------------------------------------------------------
# The experts of a converted folder
# ---------------------------------------------------------------------------------------------------------------------


def _fill(prepared: Prepared, residency: Residency, adapt: bool) -> ElasticMemory:
    """Reads the resident planes and gives every layer its experts: merged for MLX's built-ins, or as they are for the
    kernels, whose layers take the place of the built-ins'."""
    assert prepared.plan is not None
    plan, folder, modules = prepared.plan, prepared.checkpoint.folder, _expert_layers(prepared.model)
    layers: list[LevelledLayer] = []
    banks: list[tuple[str, ExpertBanks]] = []
    with ExpertStore(folder, plan.layers) as store:
        for layer, levels, widths in zip(plan.layers, residency.levels, residency.widths, strict=True):
            module = modules[layer.path]
            if prepared.kernels is None:
                layers.append(MergedLevels(layer, module, activation_dtype(prepared.checkpoint.config)))
                layers[-1].fill(store, levels, widths)
            else:
                banks.append((layer.path, _resident_banks(store, layer, levels, module)))
    for (_, experts), layer in zip(_use_kernels(prepared, banks), plan.layers, strict=False):
        layers.append(PlaneLevels(layer, experts, _biases(modules[layer.path])))
    return ElasticMemory(plan, folder, layers, residency, prepared.group_nbytes, _widens(prepared), adapt)


def _biases(module: ExpertLayer) -> list[mx.array | None]:
    return [projection.get("bias") for projection in module.projections]


def _resident_banks(
    store: ExpertStore, layer: LayerPlan, levels: Sequence[tuple[int, ...]], module: ExpertLayer
) -> ExpertBanks:
    """Of a layer of a converted folder, read now."""
    activation = activation_of(module.activation)
    assert activation is not None
    first, *between, last = plane_layer(store, layer, levels, _biases(module))
    return ExpertBanks(first, between[0] if between else None, last, activation)


def _stock_banks(prepared: Prepared) -> Iterator[tuple[str, ExpertBanks]]:
    """Of a stock checkpoint, sharing its arrays."""
    for path, layer in _expert_layers(prepared.model).items():
        banks = stock_banks(layer, prepared.phases)
        assert banks is not None
        yield path, banks


def _use_kernels(prepared: Prepared, banks: Iterable[tuple[str, ExpertBanks]]) -> list[tuple[str, KernelExperts]]:
    """Puts the kernels in the place of MLX's built-ins: module path -> experts of a layer."""
    placed, replaced = [], []
    for path, each in banks:
        assert prepared.kernels is not None
        placed.append((path, KernelExperts(each, prepared.kernels)))
        replaced.append(_on_kernels(prepared, path, each, placed[-1][1]))
    prepared.model.update_modules(tree_unflatten(replaced))
    return placed


def _on_kernels(
    prepared: Prepared, path: str, banks: ExpertBanks, experts: KernelExperts | StreamedExperts
) -> tuple[str, nn.Module]:
    """What takes which place in the model: where the block's routing rule is known the block itself, with these experts,
    because its router and weighting are kernels as well; else the experts."""
    assert prepared.kernels is not None
    block_path, family = path.rpartition(".")[0], model_classes(prepared.config)[1].name
    block = fused_block(_module(prepared.model, block_path), banks, prepared.kernels, family)
    if block is None:
        return path, experts
    block.update_modules({"experts": experts})
    return block_path, block
