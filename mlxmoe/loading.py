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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from mlxmoe.banks import fill_buckets, plane_banks
from mlxmoe.blocks import fused_block
from mlxmoe.checkpoint import Checkpoint, open_checkpoint
from mlxmoe.errors import UserError
from mlxmoe.experts import ExpertLayer, KernelExperts, PlaneLinear
from mlxmoe.formats import SCALE_NBYTES
from mlxmoe.kernel_choice import Choice, LayerShape, metal_facts, select
from mlxmoe.kernels import TABLE_WIDTH, ExpertBanks, MetalKernels, ReferenceKernels, activation_of
from mlxmoe.models import (
    expert_sites,
    max_context,
    model_classes,
    named_arrays,
    num_experts_per_token,
    text_config,
)
from mlxmoe.plan import Plan
from mlxmoe.residency import Residency, smallest_residency, solve_residency
from mlxmoe.units import format_size, parse_size

DEFAULT_CONTEXT = 8192  # tokens that memory is reserved for when nobody says
PREFILL_UNIT = 32  # tokens per prefill chunk: the smallest, and what others are multiples of
# The most. On a CPU larger chunks gain nothing, and Ctrl-C has to wait for one to end.
PREFILL_MAX_GPU, PREFILL_MAX_CPU = 2048, 256


@dataclass(frozen=True)
class RuntimeConfig:
    """How to run a model. `memory`: hard ceiling in bytes over weights, KV cache and buffers (None: what the machine
    offers). `context`: tokens to reserve memory for (None: the model's, at most DEFAULT_CONTEXT)."""

    memory: int | None = None
    context: int | None = None
    # What a converted folder's experts run on. "auto": on a Metal GPU on which they were checked and are the faster ones,
    # the project's kernels (kernel_choice.py); None: MLX's built-in products.
    kernels: MetalKernels | ReferenceKernels | Literal["auto"] | None = "auto"


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and why. Bytes are bytes of memory, not of files."""

    source: str
    folder: Path
    architecture: str
    kind: str  # converted, huggingface or mlx
    mode: str  # resident (all that is written), elastic (reduced to fit)
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
    expected_loss: float | None = None
    written_loss: float | None = None  # with everything that the file holds

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
            lines.append(f"expert matrices: {shares}; {loss}")
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
        }


class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: Any  # mlx_lm's TokenizerWrapper
    report: LoadReport


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
    products: str  # the same in words, with the reason
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

    def nbytes_fixed(self, memory: int) -> int:
        """Everything beside the experts that the budget decides about."""
        return self.nbytes_trunk + self.nbytes_experts + self.nbytes_kv + self.reserve(memory).nbytes


def prepare(source: str | Path | None, config: RuntimeConfig = RuntimeConfig()) -> Prepared:
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
        products=choice.reason,
        nbytes_largest=max(nbytes_each),
    )


def _choose_kernels(config: RuntimeConfig, checkpoint: Checkpoint, model: nn.Module, plan: Plan | None) -> Choice:
    """What the experts run on. On a GPU that is not on record yet this takes some seconds."""
    layers = _expert_layers(model)
    activations = [activation_of(layer.activation) for layer in layers.values()]
    if plan is None or config.kernels is None or not all(activations):
        return Choice(None, "MLX's built-in products")
    if config.kernels != "auto":
        return Choice(config.kernels, "the project's kernels, as asked for")
    first = plan.layers[0]
    activation, bias = activations[0], "bias" in layers[first.path].projections[0]
    assert activation is not None
    active, dtype = num_experts_per_token(checkpoint.config), activation_dtype(checkpoint.config)
    return select(LayerShape.of_plan(first, active, dtype, activation, bias), metal_facts())


def choose_residency(prepared: Prepared, memory: int) -> Residency:
    """What of a converted folder is resident under `memory` bytes in all. Raises UserError when the bases do not fit."""
    assert prepared.plan is not None
    # A built-in product costs per weight, not per byte, on the CPU backend: there, spare memory buys fewer calls.
    widen = mx.default_device() == mx.cpu and prepared.kernels is None
    try:
        return solve_residency(prepared.plan, memory - prepared.nbytes_fixed(memory), prepared.group_nbytes, widen)
    except ValueError:
        least = smallest_memory(prepared)
        raise _too_small(prepared.checkpoint, memory, least, "a shorter --context needs less") from None


def smallest_memory(prepared: Prepared) -> int:
    """The least --memory that works."""
    return prepared.nbytes_least + prepared.reserve(0).nbytes


def full_memory(prepared: Prepared) -> int:
    """The least --memory with which everything that a converted folder holds is resident."""
    assert prepared.plan is not None
    return prepared.nbytes_fixed(0) + solve_residency(prepared.plan, None, prepared.group_nbytes, widen=False).nbytes


def open_model(source: str | Path | None, config: RuntimeConfig = RuntimeConfig()) -> Loaded:
    """Like `load`, and says what was chosen. Sets MLX's memory limit and cache limit for this process."""
    prepared = prepare(source, config)
    checkpoint, plan = prepared.checkpoint, prepared.plan
    memory = config.memory or machine_memory()
    residency = choose_residency(prepared, memory) if plan is not None else None
    if plan is None and prepared.nbytes_fixed(memory) > memory:
        raise _too_small(checkpoint, memory, smallest_memory(prepared), "or convert it to fewer bits: mlxmoe convert")
    tokenizer = _load_tokenizer(checkpoint, prepared.config)
    if plan is not None:
        _verify_trunk(checkpoint, plan)
    reserve = prepared.reserve(memory)
    _limit_memory(memory, reserve.nbytes)
    for array in named_arrays(prepared.model.parameters()).values():
        mx.eval(array)  # one after the other, so that only one is there twice
    if plan is not None and residency is not None:
        _fill(prepared, residency)
    report = LoadReport(
        source=checkpoint.name,
        folder=checkpoint.folder,
        architecture=checkpoint.config["model_type"],
        kind=checkpoint.kind,
        mode="elastic" if residency is not None and residency.reduced else "resident",
        context=prepared.context,
        prefill_step=reserve.prefill_step,
        nbytes_file=checkpoint.nbytes,
        nbytes_experts=residency.nbytes if residency is not None else prepared.nbytes_experts,
        nbytes_trunk=prepared.nbytes_trunk,
        nbytes_kv=prepared.nbytes_kv,
        nbytes_buffers=reserve.nbytes,
        memory=memory,
        products=prepared.products,
        levels=residency.histogram() if residency is not None else {},
        expected_loss=residency.expected_loss if residency is not None else None,
        written_loss=plan.expected_loss if plan is not None else None,
    )
    return Loaded(prepared.model, tokenizer, report)


# ---------------------------------------------------------------------------------------------------------------------
# The model around the experts
# ---------------------------------------------------------------------------------------------------------------------


def _load_trunk(checkpoint: Checkpoint, plan: Plan | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model with lazy weights in the activation's precision, and its config. Converted: the experts are empty."""

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = model_classes(config)
        return (_converted(model_class, plan) if plan is not None else model_class), args_class

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
    """Module path -> layer."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ExpertLayer)}


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


def _verify_trunk(checkpoint: Checkpoint, plan: Plan) -> None:
    """Compares the trunk files with the plan's SHA-256. Expert records have a checksum each, verified as they are read."""
    names = {path.name for path in checkpoint.shards}
    for name, entry in plan.files.items():
        path = checkpoint.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing", "the folder is incomplete: copy or convert it again")
        if name not in names and name != "config.json":
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        if digest.hexdigest() != entry.sha256:
            raise UserError(
                f"{path} is not what was converted: its SHA-256 differs", "copy or convert the folder again"
            )


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
    pairs = num_experts_per_token(config) * (4 * hidden + 4 * expert) * itemsize
    latent = heads * (int(text.get("qk_nope_head_dim") or 0) + int(text.get("v_head_dim") or 0))
    fused = mx.default_device() != mx.cpu and not latent
    per_token = max(0 if fused else 6 * heads * context * itemsize, pairs) + 12 * hidden * itemsize
    fixed = nbytes_kv + 2 * latent * context * itemsize + 16 * int(text["vocab_size"])
    most = PREFILL_MAX_CPU if mx.default_device() == mx.cpu else PREFILL_MAX_GPU
    share = min(memory // 8, memory - nbytes_least, fixed + most * per_token)
    nbytes = max(share, fixed + PREFILL_UNIT * per_token)
    return Reserve(nbytes, (nbytes - fixed) // per_token // PREFILL_UNIT * PREFILL_UNIT)


def _too_small(checkpoint: Checkpoint, memory: int, least: int, hint: str) -> UserError:
    return UserError(
        f"{checkpoint.name} does not fit in {format_size(memory)}: it needs at least {least} bytes",
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


def _fill(prepared: Prepared, residency: Residency) -> None:
    """Reads the resident planes and gives every layer its experts: merged for MLX's built-ins, or as they are for the
    kernels, whose layers take the place of the built-ins'."""
    assert prepared.plan is not None
    layers, folder = _expert_layers(prepared.model), prepared.checkpoint.folder
    if prepared.kernels is None:
        fill_buckets(layers, folder, prepared.plan, residency, activation_dtype(prepared.checkpoint.config))
        return
    family = model_classes(prepared.config)[1].name
    replaced: list[tuple[str, nn.Module]] = []
    for path, (first, *between, last) in plane_banks(layers, folder, prepared.plan, residency):
        activation = activation_of(layers[path].activation)
        assert activation is not None
        banks = ExpertBanks(first, between[0] if between else None, last, activation)
        # Where the block's routing rule is known, the block itself: its router and weighting are kernels as well.
        block_path = path.rpartition(".")[0]
        block = fused_block(_module(prepared.model, block_path), banks, prepared.kernels, family)
        replaced.append((block_path, block) if block is not None else (path, KernelExperts(banks, prepared.kernels)))
    prepared.model.update_modules(tree_unflatten(replaced))
