"""Scales of coded layers refined (polish.py), layer by layer or all together, and what was coded read back.

trunk-<i>.npz      the coded trunk of a layer and the routers that differ from the source's
experts-<i>.npz    its experts, kept for --polish model
polished.npz       with --polish model: the scales and biases of all layers
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mlxmoe.convert.calibrated import affine_values
from mlxmoe.convert.coded import CodedLayer
from mlxmoe.convert.coding import coded_values
from mlxmoe.convert.layers import Layers
from mlxmoe.convert.polish import (
    EPOCHS,
    Share,
    Stored,
    View,
    parameters,
    polish_factors,
    polish_layer,
    polish_model,
)
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.rotation import Rotation
from mlxmoe.work import save_arrays


def refine_layer(
    layers: Layers, i: int, planned: LayerPlan | None, kind: str, coded: CodedLayer, share: Share | None
) -> None:
    """The scales of a loaded layer, coded on the hidden states of `kind`, by --polish layer or factors."""
    walk, stored = layers.walk, _stored(layers, i, planned, coded)
    if layers.config.polish == "layer":
        if share is not None:
            views = coded.views(stored, planned, layers.calibration.mu)
            polish_layer(walk, i, kind, "hidden", views, share, (layers.config.seed << 32) + i)
            for view in views[1:]:
                coded.take(view.matrices, planned)
    elif planned is not None:
        path = layers.projections(i)[-1]
        polish_factors(walk, i, kind, "hidden", planned.path, stored[path])
        layers.stream.replace([(f"{path}.weight", stored[path].values())])
    coded.take(stored, planned)


def refine_model(layers: Layers, plan: Plan, share: Share) -> str:
    """The scales of all layers, which are in memory for it: writes polished.npz. Returns a note for people."""
    walk, last = layers.walk, layers.last
    stored: dict[str, Stored] = {}
    with ExitStack() as stack:
        for i in range(last + 1):
            if i < last:
                stack.enter_context(layers.stream.loaded(i))
            planned = layers.planned(i, plan)
            coded = read_layer(layers, i, planned)
            stored |= (refined := _stored(layers, i, planned, coded))
            quantized = [tensor for tensor in layers.trunk[i] if tensor.name in coded.trunk]
            fixed = {t.name: affine_values(coded.trunk[t.name], t.shape) for t in quantized}
            fixed = {name: v for name, v in fixed.items() if name.removesuffix(".weight") not in refined}
            if i < last:
                layers.stream.replace((fixed | coded.routers).items())
        layers.stream.replace(coded_values(layers, -1, plan).items())
        with layers.bar("polish", EPOCHS * len(share.steps), unit="steps") as step:
            outcome = polish_model(walk, stored, fixed, share, layers.config.seed, step)
    kept = parameters([View(1.0, stored)])
    save_arrays(polished_path(layers), {name: parameter.values.astype(np.float16) for name, parameter in kept.items()})
    tokens = sum(map(len, share.held_back)) * walk.tokens.shape[1]
    return (
        f"polish: KL divergence on the calibration text held back {outcome.before / tokens:.4g} -> "
        f"{outcome.after / tokens:.4g}"
    )


def polished_path(layers: Layers) -> Path:
    return layers.walk.folder / "polished.npz"


def read_layer(layers: Layers, i: int, planned: LayerPlan | None = None) -> CodedLayer:
    """Layer i as it was coded, its scales those of polished.npz where that is; with the experts of `planned`, which are
    kept for --polish model."""
    with np.load(layers.walk.path("trunk", i, "npz")) as saved:
        coded = CodedLayer.from_arrays(saved)
    if planned is not None:
        with np.load(layers.walk.path("experts", i, "npz")) as saved:
            coded.take_experts(saved, planned)
    if polished_path(layers).is_file():
        stored = _stored(layers, i, planned, coded)
        with np.load(polished_path(layers)) as polished:
            for name, parameter in parameters([View(1.0, stored)]).items():
                parameter.values[:] = polished[name]
        coded.take(stored, planned)
    return coded


def _stored(layers: Layers, i: int, planned: LayerPlan | None, coded: CodedLayer) -> dict[str, Stored]:
    rotations: list[Rotation] = []
    if planned is not None:
        rotated, count = layers.rotated(planned.layer), len(planned.projections)
        rotations = [rotated.of(p, count) for p in range(count)]
    return coded.stored(layers.trunk[i], planned, rotations)
