"""Routers adapted to quantized experts. The router's matrix stays in the precision of the source; by default it stays as is.

    bias           an expert's selection bias falls by half of its degradation (the chapter's rule)
    temperature    logits divided by 1.2 (the chapter's)
    topk-mse       the matrix is fitted so that the logits of the experts in question are those that the original gives
                   (QESC of EAC-MoE, arXiv 2508.01625), in closed form

Shapes: E experts, D model dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxmoe.convert.coded import CodedLayer
from mlxmoe.convert.layers import Layers
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError
from mlxmoe.gates import gate_scores
from mlxmoe.models import ExpertSite, num_experts_per_token

BIAS_SHARE = -0.5  # of the degradation
TEMPERATURE = 1.2
RIDGE = 0.05  # towards the source's matrix, in shares of the mean squared input of an expert's tokens
BORROWED_TOKENS = 128  # the ridge is that of at least so many tokens
_BIASES = ("e_score_correction_bias", "bias")


class Router(NamedTuple):
    """The router of a layer by the names of its tensors. bias: what is added to scores or logits, None for none."""

    path: str
    weight: str
    bias: str | None
    scaled: tuple[str, ...]  # what a temperature divides


def find_router(block_path: str, block: nn.Module, site: ExpertSite) -> Router:
    """Raises UserError for one that is not a matrix [E, D] on the experts' input."""
    name = next((name for name in ("gate", "router") if isinstance(block.get(name), nn.Module)), None)
    gate: Any = block.get(name) if name else None
    weight = gate.get("weight") if gate is not None else None
    if weight is None or weight.shape != (site.num_experts, site.input_dims) or not gate_scores(block, len(weight)):
        raise UserError(
            f"the router of {block_path} is no single matrix on the experts' input", "convert with --router none"
        )
    path = f"{block_path}.{name}"
    bias = next((b for b in _BIASES if isinstance(gate.get(b), mx.array)), None)
    logits = ("weight", "bias") if bias == "bias" else ("weight",)
    return Router(path, f"{path}.weight", bias and f"{path}.{bias}", tuple(f"{path}.{leaf}" for leaf in logits))


def degradation(errors: Sequence[Sequence[float]]) -> np.ndarray:
    """float64 [E]: the relative error of each expert's outputs, the root of the sum of its projections' squared ones [P]."""
    return np.sqrt(np.array([sum(own) for own in errors]))


def lowered_bias(bias: np.ndarray, degraded: np.ndarray) -> np.ndarray:
    """bias and degraded [E] -> the chapter's 7.2.5: experts that lost more are chosen less."""
    return bias + BIAS_SHARE * degraded


def fit_row(row: np.ndarray, original: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """One expert's row of TopK-MSE: row [D], and the inputs [S, D] that the original and the quantized model give its router
    for the tokens where the expert is in question -> row + d. With X the quantized ones, the squared difference of the
    logits plus ridge |d|^2 is least for d = (X' X + ridge)^-1 X' (original row - X row)."""
    if not len(quantized):
        return row
    moments = quantized.T @ quantized
    ridge = RIDGE * np.trace(moments) / len(moments) * max(1.0, BORROWED_TOKENS / len(quantized))
    right = quantized.T @ (original @ row - quantized @ row)
    change: np.ndarray = np.linalg.solve(moments + (ridge + 1e-30) * np.eye(len(moments)), right)
    return row + change


def in_question(scores: np.ndarray, active: int) -> np.ndarray:
    """bool [T, E]: which experts' logits count. The paper takes more than are chosen, 8 of 16 and 20 of 60 to 64 experts:
    here those of the highest scores [T, E], a third of all and at least twice as many as are active."""
    count = min(scores.shape[1], max(2 * active, scores.shape[1] // 3))
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


def fit_router(
    walk: Walk, i: int, kind: str, router: Router, block: nn.Module, active: int, original: str
) -> np.ndarray:
    """float32 [E, D]: the router's matrix of layer i by TopK-MSE.

    Reads `<original>-<i>`, what goes into the router in the original, and runs the loaded layer, coded as far as the router
    sees it, on the hidden states of `kind`. Keeps both inputs of the router on the disk meanwhile.
    """
    quantized = f"{original}-coded"
    keep_inputs(walk, i, kind, router, quantized)
    first, second = (np.load(walk.path(name, i), mmap_mode="r") for name in (original, quantized))
    scores_of = gate_scores(block, len(walk.stream.weight(router.weight)))
    assert scores_of is not None
    windows = [scores_of(walk.read(original, i, rows)) for rows in walk.batches()]
    scores = np.concatenate([np.array(w.astype(mx.float32)).reshape(-1, w.shape[-1]) for w in windows])
    chosen = in_question(scores, active)
    weight = walk.stream.weight(router.weight)
    width = weight.shape[1]
    rows = []
    for e, row in enumerate(weight):
        own = np.flatnonzero(chosen[:, e])
        pair = (_floats(kept.reshape(-1, width)[own]) for kept in (first, second))
        rows.append(fit_row(row.astype(np.float64), *pair))
    del first, second
    walk.path(quantized, i).unlink()
    return np.stack(rows).astype(np.float32)


def keep_inputs(walk: Walk, i: int, kind: str, router: Router, name: str) -> None:
    """Spills what goes into the router of the loaded layer i on the hidden states of `kind`, as `<name>-<i>`."""
    with walk.spill(name, i) as write:
        for rows in walk.batches():
            given = walk.stream.inputs(i, walk.batch(rows), walk.read(kind, i, rows), router.path)
            write(rows, given.reshape(*walk.tokens[rows].shape, -1))


def check_routers(layers: Layers) -> None:
    """Refuses what cannot be done to a router before there is any work."""
    for site in layers.source.sites if layers.config.router != "none" else ():
        router = router_of(layers, site)
        if layers.config.router == "bias" and router.bias is None:
            raise UserError(
                f"the router {router.path} has no bias to change", "choose --router temperature, topk-mse or none"
            )


def router_of(layers: Layers, site: ExpertSite) -> Router:
    path = site.path.rpartition(".")[0]
    return find_router(path, layers.stream.module(path), site)


def adapted_router(layers: Layers, i: int, coded: CodedLayer, kind: str) -> dict[str, np.ndarray]:
    """float32 by name, as they are stored: what --router changes in the loaded and coded layer i. `topk-mse` removes the
    inputs of the original's router, router-<i>."""
    router, method, stream = router_of(layers, layers.sites[i]), layers.config.router, layers.stream
    if method == "bias":
        assert router.bias is not None
        lost = [[packed.errors[-1] for packed in matrices] for matrices in zip(*coded.experts, strict=True)]
        found = {router.bias: lowered_bias(stream.weight(router.bias), degradation(lost))}
    elif method == "temperature":
        found = {name: stream.weight(name) / TEMPERATURE for name in router.scaled}
    else:
        block = stream.module(layers.sites[i].path.rpartition(".")[0])
        active = num_experts_per_token(layers.source.checkpoint.config)
        found = {router.weight: fit_router(layers.walk, i, kind, router, block, active, "router")}
        layers.walk.path("router", i).unlink()
    dtypes = layers.dtypes
    return {name: np.array(mx.array(v).astype(dtypes[name]).astype(mx.float32)) for name, v in found.items()}


def _floats(stored: np.ndarray) -> np.ndarray:
    """float64 of spilled rows, whose 16-bit floats are bfloat16."""
    values = (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored
    return values.astype(np.float64)
