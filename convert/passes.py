"""The passes of a calibrated conversion over the model, layer by layer, with hidden states and gradients on the disk.

    forward    hidden states of the original model behind every layer                     hidden-<i>.npy
    backward   from the last layer to the first: gradients, statistics, rotations, and    gradient-<i>.npy, weighed-<i>.npz,
               what every matrix would lose at every width (weigh.py)                     rotation-<layer>.npz
    writing    after the allocation, from the first layer to the last: statistics on the  quantized-<i>.npy, trunk-<i>.npz,
               hidden states that the quantized layers before give, codes (coding.py),    experts-*.safetensors
               files
    polishing  with --polish model, after all codes and before the files (polished.py)    experts-<i>.npz, polished.npz

<i> counts layers, one more than there are for what lies behind the last. A pass that was stopped goes on behind the last
file that is whole; what no later step reads is removed. In memory: one layer's weights, its statistics, one batch of
tokens. On the disk: hidden states, or gradients, of one layer take tokens * D * 4 bytes (2 on a GPU), and at most about as
many of them are there as there are layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from mlxmoe.convert.awq import degree
from mlxmoe.convert.coded import CodedLayer
from mlxmoe.convert.coding import code_copies, code_layer
from mlxmoe.convert.gather import differentiate, draw
from mlxmoe.convert.layers import Layers
from mlxmoe.convert.polish import Share, share_windows
from mlxmoe.convert.polished import polished_path, read_layer, refine_layer, refine_model
from mlxmoe.convert.quantize import Affine
from mlxmoe.convert.route import adapted_router, check_routers, keep_inputs, router_of
from mlxmoe.convert.source import TrunkTensor
from mlxmoe.convert.stats import without_inputs
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.weigh import Measured, read_measured, weigh
from mlxmoe.convert.write import Packed
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.work import save_arrays

# Called with a layer of the plan and its experts, coded; writes the file
LayerWriter = Callable[[LayerPlan, Iterator[list[Packed | None]]], None]


def check_options(layers: Layers) -> None:
    """Raises UserError for what cannot be done to this model, before there is any work."""
    if layers.calibration.method == "awq":
        for site in layers.source.sites:
            degree(layers.stream.module(site.path))
    check_routers(layers)


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward
# ---------------------------------------------------------------------------------------------------------------------


def measure(layers: Layers) -> Measured:
    """Runs forward and backward over the original model, as far as that is not done yet. Raises UserError for hidden states
    and statistics that are not finite."""
    walk, last = layers.walk, layers.last
    complete = walk.path("weighed", -1, "npz").is_file()  # comes last; writing then removes gradients
    undone = [] if complete else [i for i in range(last + 1) if not _is_weighed(walk, i)]
    top = max(undone, default=-1)
    with layers.bar("calibrate", 2 * last + 1) as step:
        step(2 * last + 1 - len(undone) - max(top, 0))
        if undone:
            _forward(layers, top, step)
        for i in reversed(undone):
            _backward(layers, i)
            step(1)
        if not complete:
            loss = _embedding_loss(walk)
            weigh(layers, -1, {tensor.module: without_inputs(loss) for tensor in layers.trunk[-1]})
    return read_measured(layers)


def _is_weighed(walk: Walk, i: int) -> bool:
    return walk.path("weighed", i, "npz").is_file() and walk.path("gradient", i).is_file()


def _forward(layers: Layers, top: int, step: Callable[[int], object]) -> None:
    """Hidden states of the original model up to what goes into layer `top`."""
    layers.walk.embed("hidden")
    for i in range(top):
        if not layers.walk.path("hidden", i + 1).is_file():
            with layers.stream.loaded(i):
                layers.walk.advance(i, "hidden")
        step(1)


def _backward(layers: Layers, i: int) -> None:
    if i == layers.last:
        weigh(layers, i, draw(layers, "hidden", keep="gradient"))
    else:
        with layers.stream.loaded(i):
            weigh(layers, i, differentiate(layers, i, "hidden", keep="gradient"))
    if layers.calibration.predecessors and i > 0:
        layers.walk.path("hidden", i).unlink()


def _embedding_loss(walk: Walk) -> float:
    """What a relative error of 1 in the input embedding costs, by the gradient at the first layer's input."""
    total = 0.0
    for rows in walk.batches():
        hidden, gradient = (np.array(walk.read(kind, 0, rows).astype(mx.float32)) for kind in ("hidden", "gradient"))
        total += float((np.square(gradient).mean(-1) * np.square(hidden).sum(-1)).sum(dtype=np.float64))
    return total / walk.num_tokens / 2


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write(layers: Layers, plan: Plan, write_layer: LayerWriter, written: Callable[[str], bool]) -> list[str]:
    """Codes every layer by the plan and hands its experts to `write_layer`, unless their file is `written` already; leaves
    the coded trunk for `coded_tensor` and the changed routers for `changed_routers`. Returns notes for people."""
    walk, last, notes = layers.walk, layers.last, []
    kind = "quantized" if layers.calibration.predecessors else "hidden"
    by_share = layers.config.polish in ("layer", "model")
    share = share_windows(*walk.tokens.shape) if by_share else None
    if by_share and share is None:
        notes.append("one window of calibration text is too little to polish by")
    with layers.bar("quantize", last + 1) as step:
        if not walk.path("trunk", 0, "npz").is_file():
            walk.embed(kind)
        for i in range(last + 1):
            if not walk.path("trunk", i, "npz").is_file():
                coded = _code_pass(layers, i, plan, write_layer, kind, share)
                save_arrays(walk.path("trunk", i, "npz"), coded.trunk_arrays())
            if kind == "quantized" and i < last:
                for name, at in ((kind, i), ("gradient", i + 1), ("hidden", i)):
                    walk.path(name, at).unlink(missing_ok=True)
            step(1)
    if layers.config.polish == "model":
        if share is not None and not polished_path(layers).is_file():
            notes.append(refine_model(layers, plan, share))
        for i in layers.sites:
            planned = layers.planned(i, plan)
            assert planned is not None
            if not written(planned.file):
                write_layer(planned, read_layer(layers, i, planned).by_expert())
    return notes


def _code_pass(
    layers: Layers, i: int, plan: Plan, write_layer: LayerWriter, kind: str, share: Share | None
) -> CodedLayer:
    """Codes one layer, or the head, at the hidden states of `kind`: all of it but for its trunk-<i>.npz is on the disk."""
    if i == layers.last:
        return code_layer(layers, i, plan, draw(layers, kind)).layer
    walk, polish, router = layers.walk, layers.config.polish, layers.config.router
    planned = layers.planned(i, plan)
    with layers.stream.loaded(i):
        if (polish != "none" or router == "topk-mse") and not walk.path("hidden", i + 1).is_file():
            walk.advance(i, "hidden")  # what the original gives is what to aim at
        if planned is not None and router == "topk-mse":
            keep_inputs(walk, i, "hidden", router_of(layers, layers.sites[i]), "router")
        moments = differentiate(layers, i, kind)
        coding = code_layer(layers, i, plan, moments)
        coded = coding.layer
        if planned is not None and planned.replicas is not None:
            planned = code_copies(layers, i, kind, planned, moments, coding)
        layers.stream.replace(coding.values.items())
        if planned is not None and router != "none":
            coded.routers = adapted_router(layers, i, coded, kind)
            layers.stream.replace(coded.routers.items())
        if polish in ("factors", "layer"):
            refine_layer(layers, i, planned, kind, coded, share)
        if planned is not None and polish == "model":
            save_arrays(walk.path("experts", i, "npz"), coded.expert_arrays())
        elif planned is not None:
            write_layer(planned, coded.by_expert())
        if kind == "quantized":
            walk.advance(i, kind)
    return coded


def coded_tensor(layers: Layers, tensor: TrunkTensor) -> Affine | None:
    """A trunk tensor as `write` coded it; None for one that it leaves to least squares on the weights."""
    i = next(i for i, tensors in layers.trunk.items() if tensor in tensors)
    return read_layer(layers, i).trunk[tensor.name] if i >= 0 else None


def changed_routers(layers: Layers) -> dict[str, mx.array]:
    """The tensors of the routers that `write` has changed, by name, as they are to be written."""
    dtypes = layers.dtypes
    coded = [read_layer(layers, i).routers for i in range(layers.last)]
    return {name: mx.array(values).astype(dtypes[name]) for routers in coded for name, values in routers.items()}
