"""load(path) -> (model, tokenizer), ready for mlx_lm.stream_generate, under a hard memory ceiling.

A source is a converted folder, an unconverted Hugging Face folder, a stock MLX checkpoint or a Hub id. The model is
mlx-lm's own class through mlx-lm's own loader (`load_model(get_model_classes=...)`), its routed experts replaced by
ExpertLayer. What the budget allows is decided before a byte of weights is read: the trunk and the KV cache are known from
shapes alone, and what is left belongs to the experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_tokenizer

from mlxmoe.arena import ArenaShelf
from mlxmoe.banks import layer_copies, plane_layer
from mlxmoe.blocks import fused_block
from mlxmoe.cache import LayerCache
from mlxmoe.checkpoint import Checkpoint
from mlxmoe.elastic import ElasticMemory, LevelledLayer, MergedLevels, PlaneLevels
from mlxmoe.errors import UserError
from mlxmoe.expert_memory import ExpertMemory, LayerBytes, Place, choose_pinned, split_budget
from mlxmoe.experts import ExpertLayer, KernelExperts, stock_banks
from mlxmoe.gates import experts_see_the_input, gate_scores
from mlxmoe.kernels import ExpertBanks, Rotation, activation_of
from mlxmoe.models import (
    model_classes,
    named_arrays,
)
from mlxmoe.plan import FileEntry, LayerPlan, Plan, copy_share
from mlxmoe.prepared import (
    Prepared,
    Reserve,
    activation_dtype,
    cast_floats,
    choose_residency,
    expert_layers,
    full_memory,
    machine_memory,
    module_at,
    prepare,
    smallest_memory,
    smallest_streaming,
    trunk_arrays,
    widens,
)
from mlxmoe.reader import Paced, Reader, probe
from mlxmoe.repack import Manifest, RepackedStore
from mlxmoe.residency import Residency
from mlxmoe.runtime import DEFAULTS, RuntimeConfig
from mlxmoe.shelves import MergedShelf, Shelf, SlotShelf
from mlxmoe.stacked import StackedStore, StockSource, read_layer
from mlxmoe.store import ExpertSource, ExpertStore
from mlxmoe.streaming import Beside, StreamedExperts
from mlxmoe.units import format_size, parse_size

SHARED = ("shared_experts", "shared_expert")  # what blocks call the experts that every token goes to


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
        tokenizer = _read(prepared, memory, reserve, trunk_arrays(prepared.model))
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
        tokenizer = _read(prepared, memory, streaming.reserve, trunk_arrays(prepared.model))
        slowed = {"preadv": Paced(config.read_rate)} if config.read_rate is not None else {}
        reader = stack.enter_context(Reader(way.threads, way.direct, **slowed))
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
    layers = expert_layers(prepared.model)
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
        block = module_at(prepared.model, block_path)
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
    dtype = activation_dtype(prepared.checkpoint.config)
    biases, copies = _biases(layer), layer_copies(cast(ExpertStore, source), plan, dtype)
    if prepared.kernels is None:
        return MergedShelf(source, plan, layer.activation, biases, dtype, copies)
    activation = activation_of(layer.activation)
    assert activation is not None
    return ArenaShelf(source, plan, activation, biases, prepared.kernels, capacity, copies.turns[0])


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
    first = zip(*layer.weights[: layer.num_matrices], strict=True)
    selective = layer.replicas is not None and layer.replicas.selection is not None
    return [sum(weights) / copy_share(layer.num_copies(e), selective) for e, weights in enumerate(first)]


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
            arrays = {name: cast_floats(array, dtype) for name, array in read_layer(store, reader, layer.layer).items()}
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
    plan, folder, modules = prepared.plan, prepared.checkpoint.folder, expert_layers(prepared.model)
    dtype = activation_dtype(prepared.checkpoint.config)
    layers: list[LevelledLayer] = []
    banks: list[tuple[str, ExpertBanks]] = []
    with ExpertStore(folder, plan.layers) as store:
        for layer, levels, widths in zip(plan.layers, residency.levels, residency.widths, strict=True):
            module = modules[layer.path]
            module.copies = layer_copies(store, layer, dtype)
            if prepared.kernels is None:
                layers.append(MergedLevels(layer, module, dtype))
                layers[-1].fill(store, levels, widths)
            else:
                banks.append((layer.path, _resident_banks(store, layer, levels, module)))
    for (_, experts), layer in zip(_use_kernels(prepared, banks), plan.layers, strict=False):
        layers.append(PlaneLevels(layer, experts, _biases(modules[layer.path])))
    return ElasticMemory(plan, folder, layers, residency, prepared.storage, widens(prepared), adapt)


def _biases(module: ExpertLayer) -> list[mx.array | None]:
    return [projection.get("bias") for projection in module.projections]


def _resident_banks(
    store: ExpertStore, layer: LayerPlan, levels: Sequence[tuple[int, ...]], module: ExpertLayer
) -> ExpertBanks:
    """Of a layer of a converted folder, read now."""
    activation = activation_of(module.activation)
    assert activation is not None
    first, *between, last = plane_layer(store, layer, levels, _biases(module))
    (turns,) = module.copies.turns
    rotation, input_rotation = Rotation.of_turn(turns.hidden), Rotation.of_turn(turns.inputs)
    up = between[0] if between else None
    return ExpertBanks(first, up, last, activation, rotation, input_rotation=input_rotation)


def _stock_banks(prepared: Prepared) -> Iterator[tuple[str, ExpertBanks]]:
    """Of a stock checkpoint, sharing its arrays."""
    for path, layer in expert_layers(prepared.model).items():
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
    block = fused_block(module_at(prepared.model, block_path), banks, prepared.kernels, family)
    if block is None:
        return path, experts
    block.update_modules({"experts": experts})
    return block_path, block
