"""GPU launches of one decode step: this project's experts beside stock mlx-lm at 4 bits, counted in the traced graph.

    python -m mlxmoe.bench.launches CONFIG... [--json]

CONFIG is a config.json or its folder; no weights are read and nothing is computed, so any model is counted on any machine.
All layers, heads and experts are as configured; feed-forward widths and the vocabulary are cut, which changes no launch.

A launch is a node of the unevaluated graph whose primitive starts a GPU kernel (see VIEWS). Where MLX would take a
fused kernel on a GPU but spells it out on a CPU, a stand-in of one node takes its place while the graph is made.
docs/kernels.md says what the count leaves out.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_map, tree_map_with_path, tree_unflatten
from mlx_lm.models import gated_delta, ssm
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchMLP

from mlxmoe.arguments import note, print_json
from mlxmoe.blocks import fused_block
from mlxmoe.checkpoint import read_config
from mlxmoe.errors import UserError
from mlxmoe.experts import KernelExperts
from mlxmoe.formats import MatrixShape, choose_group_size
from mlxmoe.kernels import ExpertBanks, MetalKernels, PlaneBank, activation_of
from mlxmoe.models import ExpertSite, expert_sites, model_classes, normalise_config

# Primitives whose output shares its input's memory: no kernel starts (a Reshape of strided data, which copies, is not seen).
# Every other primitive counts as one launch, an unknown one too, and so does Compiled..., several operations fused into one.
VIEWS = frozenset(
    [
        "AsStrided",
        "Bitcast",
        "Broadcast",
        "BroadcastAxes",
        "Copy",
        "CustomTransforms",
        "ExpandDims",
        "Flatten",
        "Load",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    ]
)

_WIDTH = 128  # of every feed-forward layer
_VOCABULARY = 1024
_LEVEL = 2  # bits of our experts: no launch depends on it
_VECTOR_HEADS = {(64, 64), (96, 96), (128, 128), (256, 256), (192, 128)}  # (query, value): fused attention of one token
_MAX_SHARED_HEADS = 32  # query heads per key head in that kernel

_Arrays = Sequence[mx.array]


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def primitives(outputs: _Arrays) -> Counter[str]:
    """How often each primitive occurs in what is yet to be computed for `outputs`. Evaluates nothing."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return Counter(re.findall(r'\[label ="(\w+)", shape=rectangle\]', text.getvalue()))


def launches(outputs: _Arrays) -> int:
    """Kernels that a GPU would start to compute `outputs`."""
    return sum(number for name, number in primitives(outputs).items() if name not in VIEWS)


class _Constants:
    """Zeros that are already there, so that they are no part of a graph; one array per shape and type."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], mx.Dtype], mx.array] = {}

    def like(self, value: Any) -> Any:
        """The constant in the place of an array; anything else as it is."""
        return self.zeros(value.shape, value.dtype) if isinstance(value, mx.array) else value

    def zeros(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        key = (tuple(shape), dtype)
        if key not in self._made:
            self._made[key] = mx.zeros(key[0], dtype)
            mx.eval(self._made[key])
        return self._made[key]

    def stand_in(
        self, shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype], inputs: Sequence[Any]
    ) -> list[mx.array]:
        """Outputs of these shapes and types from one node, a Depends, which needs `inputs`: a kernel not to be had here."""
        zeros = [self.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        return mx.depends(zeros, [array for array in inputs if isinstance(array, mx.array)])


@contextmanager
def _as_on_gpu(constants: _Constants) -> Iterator[None]:
    """Within: the fused operations that MLX and mlx-lm have on a GPU only are one node each.

    They are looked up in their modules at each call and chosen by device inside, so the modules are changed meanwhile.
    """
    attention, attention_ops = mx.fast.scaled_dot_product_attention, ssm.ssm_attn

    def same_shape(x: mx.array, *inputs: Any, **named: Any) -> mx.array:
        return constants.stand_in([x.shape], [x.dtype], [x, *inputs, *named.values()])[0]

    def fused_attention(q: mx.array, k: mx.array, v: mx.array, **named: Any) -> mx.array:
        fused = (q.shape[-1], v.shape[-1]) in _VECTOR_HEADS and q.shape[1] // k.shape[1] <= _MAX_SHARED_HEADS
        if not fused:
            return attention(q, k, v, **named)
        shape = (*q.shape[:-1], v.shape[-1])
        return constants.stand_in([shape], [q.dtype], [q, k, v, *named.values()])[0]

    def delta(
        q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, mask: Any = None
    ) -> Any:
        return constants.stand_in([v.shape, state.shape], [q.dtype, state.dtype], [q, k, v, g, beta, state, mask])

    def state_space(x: mx.array, *inputs: Any, **named: Any) -> Any:
        a_log, b, c, d, dt, bias, state, limit = inputs
        if state is None:
            return attention_ops(x, *inputs, **named)
        dt = ssm.compute_dt(dt, bias, limit)
        return constants.stand_in([x.shape, state.shape], [x.dtype, state.dtype], [x, a_log, b, c, d, dt, state])

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (mx.fast, "rms_norm", same_shape),
        (mx.fast, "layer_norm", same_shape),
        (mx.fast, "rope", same_shape),
        (mx.fast, "scaled_dot_product_attention", fused_attention),
        (gated_delta, "gated_delta_ops", delta),
        (ssm, "ssm_attn", state_space),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)


# ---------------------------------------------------------------------------------------------------------------------
# Models without weights
# ---------------------------------------------------------------------------------------------------------------------


def narrowed(config: dict[str, Any]) -> dict[str, Any]:
    """The config with feed-forward layers of _WIDTH and a vocabulary of _VOCABULARY; nothing else differs."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key == "text_config":
            value = narrowed(value)
        elif key.endswith("intermediate_size") and isinstance(value, int) and value:
            value = _WIDTH
        elif key.startswith("vocab_size") and isinstance(value, int):
            value = _VOCABULARY
        elif key == "quantization_config":
            continue
        result[key] = value
    return result


def _build(config: dict[str, Any], classes: Callable[..., Any], constants: _Constants) -> nn.Module:
    """The model in bfloat16, every layer that can be at 4 bits, its parameters constants."""
    model_class, arguments = classes(config)
    model = model_class(arguments.from_dict(config))
    model.eval()
    cast = getattr(model, "cast_predicate", lambda name: True)

    def to_bfloat16(name: str, array: mx.array) -> mx.array:
        return array.astype(mx.bfloat16) if mx.issubdtype(array.dtype, mx.floating) and cast(name) else array

    model.update(tree_map_with_path(to_bfloat16, model.parameters()))
    predicate = getattr(model, "quant_predicate", lambda path, module: True)

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:  # as mlx_lm.convert chooses
        whole = hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0
        return whole and predicate(path, module)

    nn.quantize(model, group_size=64, bits=4, class_predicate=chosen)
    model.update(tree_map(constants.like, model.parameters()))
    return model


def _use_kernels(model: nn.Module, family: str, constants: _Constants) -> None:
    """The routed experts of every layer on the kernels, in a fused block where its rule is known.

    Raises UserError for an activation that has no kernel.
    """

    def factory(**kernel: Any) -> Callable[..., list[mx.array]]:
        return lambda **call: constants.stand_in(call["output_shapes"], call["output_dtypes"], call["inputs"])

    kernels = MetalKernels(factory)
    banks: dict[tuple[int, int, int, bool], PlaneBank] = {}

    def bank(rows: int, columns: int, site: ExpertSite) -> PlaneBank:
        key = (rows, columns, site.num_experts, site.has_bias)
        if key not in banks:
            bias = constants.zeros((site.num_experts, rows), mx.bfloat16) if site.has_bias else None
            shape = MatrixShape("w", rows, columns, choose_group_size(columns))
            banks[key] = PlaneBank.empty(shape, [_LEVEL] * site.num_experts, bias)
        return banks[key]

    modules = dict(model.named_modules())
    replaced: list[tuple[str, nn.Module]] = []
    for site in expert_sites(model):
        switch = modules[site.path]
        activation = activation_of(switch.activation)
        if activation is None:
            name = type(switch.activation).__name__
            raise UserError(f"the kernels have no {name}", "this model runs on MLX's built-ins")
        first, last = bank(site.hidden_dims, site.input_dims, site), bank(site.input_dims, site.hidden_dims, site)
        up = None if isinstance(switch, SwitchMLP) else first
        experts, block_path = ExpertBanks(first, up, last, activation), site.path.rpartition(".")[0]
        block = fused_block(modules[block_path], experts, kernels, family)
        replaced.append((block_path, block) if block is not None else (site.path, KernelExperts(experts, kernels)))
    model.update_modules(tree_unflatten(replaced))


# ---------------------------------------------------------------------------------------------------------------------
# One decode step
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepLaunches:
    """Launches of one decode step: in the MoE blocks, a block being the module that holds the experts, and in the rest."""

    moe_blocks: tuple[int, ...]
    rest: int

    @property
    def moe(self) -> int:
        return sum(self.moe_blocks)

    @property
    def total(self) -> int:
        return self.moe + self.rest


class _Counted(nn.Module):
    """Stands for an MoE block: counts the block on its own at each call, and is one node to the graph around it."""

    def __init__(self, block: nn.Module, constants: _Constants):
        super().__init__()
        self._block, self._constants = block, constants
        self._found: list[int] = []

    def __call__(self, *inputs: Any, **named: Any) -> mx.array:
        like = self._constants.like
        output = self._block(*map(like, inputs), **{name: like(value) for name, value in named.items()})
        assert isinstance(output, mx.array)
        self._found.append(launches([output]))
        return self._constants.stand_in([output.shape], [output.dtype], [*inputs, *named.values()])[0]


def _freeze(cache: Any) -> list[mx.array]:
    """Replaces every array in a cache by zeros that are already there; returns the arrays."""
    found: list[mx.array] = []

    def frozen(value: Any) -> Any:
        if isinstance(value, mx.array):
            found.append(value)
            zeros = mx.zeros(value.shape, value.dtype)  # its own: caches are written in place
            mx.eval(zeros)
            return zeros
        if isinstance(value, (list, tuple)):
            return type(value)(map(frozen, value))
        if hasattr(value, "__dict__"):
            for name, part in list(vars(value).items()):
                setattr(value, name, frozen(part))
        return value

    for layer in cache:
        frozen(layer)
    return found


def step_launches(model: nn.Module, constants: _Constants) -> StepLaunches:
    """Counts the second token of a sequence: by then caches are allocated. Changes the model's MoE blocks."""
    modules = dict(model.named_modules())
    paths = list(dict.fromkeys(site.rpartition(".")[0] for site in _expert_paths(model)))
    blocks = [_Counted(modules[path], constants) for path in paths]
    model.update_modules(tree_unflatten(list(zip(paths, blocks, strict=True))))
    cache = make_prompt_cache(model)
    token = constants.zeros((1, 1), mx.int32)
    with _as_on_gpu(constants):
        model(token, cache=cache)
        _freeze(cache)
        logits = model(token, cache=cache)
        outside = launches([logits, *_freeze(cache)])
    return StepLaunches(tuple(block._found[-1] for block in blocks), outside - len(blocks))


def _expert_paths(model: nn.Module) -> list[str]:
    ours = [path for path, module in model.named_modules() if isinstance(module, KernelExperts)]
    return sorted(ours) or [site.path for site in expert_sites(model)]


@dataclass(frozen=True)
class Row:
    """Launches of one model per token; per layer means per MoE layer."""

    model: str
    layers: int
    stock: StepLaunches
    ours: StepLaunches

    @property
    def moe_ratio(self) -> float:
        return self.ours.moe / self.stock.moe

    @property
    def meets_bar(self) -> bool:
        """At most half of stock's launches in the MoE blocks, and no more than stock's in the rest."""
        return 2 * self.ours.moe <= self.stock.moe and self.ours.rest <= self.stock.rest

    def as_json(self) -> dict[str, Any]:
        sides = {
            name: {"per_token": s.total, "per_moe_layer": s.moe / self.layers, **asdict(s)}
            for name, s in (("stock", self.stock), ("ours", self.ours))
        }
        summary = {"moe_ratio": round(self.moe_ratio, 4), "meets_bar": self.meets_bar}
        return {"model": self.model, "moe_layers": self.layers, **sides, **summary}


def _require_whole(name: str, config: dict[str, Any]) -> None:
    """Raises UserError for a config without one of the settings that have no default in mlx-lm."""
    required = [
        f.name for f in fields(mlx_lm.utils._get_classes(config)[1]) if f.default is f.default_factory is MISSING
    ]
    absent = [setting for setting in required if setting not in config]
    if absent:
        raise UserError(
            f"config.json of {name} lacks {', '.join(absent)}, which mlx-lm requires",
            "take the whole config.json of the model's repository",
        )


def count(name: str, config: dict[str, Any]) -> Row:
    """Both versions of the model that `config` describes. Raises UserError when one cannot be built."""
    constants = _Constants()
    config = narrowed(normalise_config(config))
    try:
        _require_whole(name, config)
        model = _build(config, mlx_lm.utils._get_classes, constants)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"stock mlx-lm does not build {name}: {error}", "it has nothing to compare with") from error
    stock = step_launches(model, constants)
    model = _build(config, model_classes, constants)
    _use_kernels(model, model_classes(config)[1].name, constants)
    ours = step_launches(model, constants)
    return Row(name, len(stock.moe_blocks), stock, ours)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

_HEADING = f"{'':42}{'per token':>12}  {'MoE block':>12}  {'':5}  {'the rest':>12}\n" + (
    f"{'model':<36}{'layers':>6}{'stock':>6}{'ours':>6}  {'stock':>6}{'ours':>6}  {'ratio':>5}  {'stock':>6}{'ours':>6}"
)


def _line(row: Row) -> str:
    stock, ours = row.stock, row.ours
    return (
        f"{row.model[:36]:<36}{row.layers:>6}{stock.total:>6}{ours.total:>6}  {stock.moe / row.layers:>6.1f}"
        f"{ours.moe / row.layers:>6.1f}  {row.moe_ratio:>5.2f}  {stock.rest:>6}{ours.rest:>6}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="a config.json, or a folder with one")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the table; status 1 when a config could not be counted. Raises UserError for one that cannot be read."""
    folders = [path.parent if path.name == "config.json" else path for path in map(Path, args.configs)]
    configs = [(folder.resolve().name, read_config(folder)) for folder in folders]
    rows, failed = [], []
    print(_HEADING)
    for name, config in configs:
        try:
            rows.append(count(name, config))
        except UserError as error:
            failed.append({"model": name, "error": str(error)})
            note(f"{name}: {error}")
        else:
            print(_line(rows[-1]), flush=True)
    met = sum(row.meets_bar for row in rows)
    print(f"at most half of stock's launches in the MoE block, no more in the rest: {met} of {len(rows)}")
    if args.json:
        print_json({"rows": [row.as_json() for row in rows], "not_counted": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m mlxmoe.bench.launches", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
