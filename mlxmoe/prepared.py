"""A model that is known by its shapes, and what it needs of memory: decided before a byte of weights is read.

The trunk and the KV cache are known from shapes alone, buffers by an estimate from above, and what a budget leaves belongs
to the experts. loading.py reads the weights then.
"""

from __future__ import annotations

import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlxmoe.arena import arena_slack
from mlxmoe.banks import copies_nbytes
from mlxmoe.checkpoint import Checkpoint, open_checkpoint
from mlxmoe.copies import Copies
from mlxmoe.errors import UserError
from mlxmoe.expert_memory import LayerBytes
from mlxmoe.experts import ExpertLayer, PlaneLinear, stock_banks
from mlxmoe.kernel_choice import Choice, LayerShape, has_kernels, metal_facts, select, select_all
from mlxmoe.kernels import TABLE_WIDTH, MetalKernels, ReferenceKernels, activation_of
from mlxmoe.models import expert_sites, max_context, model_classes, named_arrays, num_experts_per_token, text_config
from mlxmoe.plan import Plan
from mlxmoe.reader import DEFAULT_THREADS
from mlxmoe.repack import RepackedStore, repacked_class
from mlxmoe.residency import PLANES, Residency, Storage, merged_storage, smallest_residency, solve_residency
from mlxmoe.rotation import NO_TURNS
from mlxmoe.runtime import DEFAULT_CONTEXT, DEFAULTS, RuntimeConfig
from mlxmoe.store import PAGE

PREFILL_UNIT = 32  # tokens per prefill chunk: the smallest, and what others are multiples of
# The most. On a CPU larger chunks gain nothing, and Ctrl-C has to wait for one to end.
PREFILL_MAX_GPU, PREFILL_MAX_CPU = 2048, 256


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
    def storage(self) -> Storage:
        """What the experts of a converted folder take in memory."""
        return PLANES if self.kernels is not None else merged_storage(activation_dtype(self.checkpoint.config))

    @property
    def nbytes_least(self) -> int:
        """Bytes without buffers that it cannot run with less of: of a converted folder with the base planes only."""
        nbytes_base = smallest_residency(self.plan, self.storage) if self.plan is not None else self.nbytes_experts
        return self.nbytes_trunk + nbytes_base + self.nbytes_kv

    @property
    def streamed_shapes(self) -> list[LayerBytes]:
        """What the experts of each layer take when they are streamed."""
        if self.plan is None:
            layers = expert_layers(self.model).values()
            return [
                LayerBytes((layer.nbytes // layer.num_experts,) * layer.num_experts, self.active) for layer in layers
            ]
        return [LayerBytes(self.storage.experts_nbytes(layer), self.active) for layer in self.plan.layers]

    @property
    def nbytes_slack(self) -> int:
        """What streamed experts may take beyond their budget: the kernels' arenas are whole frames, records whole pages."""
        if self.plan is None or self.kernels is None:
            return 0
        planes = max(entry.num_planes for layer in self.plan.layers for entry in layer.experts)
        pages = 2 * self.threads * planes * PAGE
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
    nbytes_experts = 0 if plan is not None else sum(layer.nbytes for layer in expert_layers(model).values())
    nbytes_trunk = sum(nbytes_each) - nbytes_experts
    choice = _choose_kernels(config, checkpoint, model, plan)
    if plan is not None:
        nbytes_trunk += sum(copies_nbytes(layer, activation_dtype(checkpoint.config)) for layer in plan.layers)
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
        nbytes_largest_trunk=max(array.nbytes for array in trunk_arrays(model)),
        nbytes_largest=max(nbytes_each),
    )


def _choose_kernels(config: RuntimeConfig, checkpoint: Checkpoint, model: nn.Module, plan: Plan | None) -> Choice:
    """What the experts run on. On a GPU that is not on record yet this takes some seconds."""
    layers = expert_layers(model)
    activations = [activation_of(layer.activation) for layer in layers.values()]
    stock = [stock_banks(layer) for layer in layers.values()] if plan is None else []
    if config.kernels is None or not layers or not all(activations) or not all(stock):
        return Choice(None, "MLX's built-in products")
    if plan is not None and not all(map(has_kernels, plan.layers)):
        return Choice(None, "MLX's built-in products: the kernels lack this file's rotations or copies")
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
    return solve_residency(prepared.plan, budget, prepared.storage, widens(prepared))


def widens(prepared: Prepared) -> bool:
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
    experts = solve_residency(prepared.plan, None, prepared.storage, widen=False).nbytes
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
        replaced = [(site.path, ExpertLayer.from_switch(module_at(model, site.path))) for site in expert_sites(model)]
        model.update_modules(tree_unflatten(replaced))
    dtype = activation_dtype(checkpoint.config)
    model.update(tree_map(lambda array: cast_floats(array, dtype), model.parameters()))
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
                activation = module_at(self, site.path).activation
                parts = {
                    s.name: PlaneLinear(s, site.num_experts, site.has_bias, partial=p >= layer.num_matrices)
                    for p, s in enumerate(layer.projections)
                }
                count = len(layer.copy_rotations)
                copies = Copies((NO_TURNS,) * count, mx.ones((count, site.num_experts)) if count > 1 else None)
                replaced.append((site.path, ExpertLayer(parts, activation, site.num_experts, copies)))
            self.update_modules(tree_unflatten(replaced))

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return weights

    return Converted


def module_at(model: nn.Module, path: str) -> Any:
    """The submodule at a dotted path."""
    for part in path.split("."):
        model = model[int(part)] if isinstance(model, list) else model[part]
    return model


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Module path -> layer, in the order of the layers."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, ExpertLayer)}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))


def trunk_arrays(model: nn.Module) -> list[mx.array]:
    """Every weight but those of the routed experts; their biases are trunk."""
    prefixes = tuple(f"{path}." for path in expert_layers(model))
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


def cast_floats(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """16-bit floats take the activation's type; float32 stays (routers and their biases are kept in it on purpose)."""
    return array.astype(dtype) if array.dtype in (mx.float16, mx.bfloat16) else array
