"""An allocation's losses scaled to what is measured: the trunk and the experts of every layer, in the assembled model.

The loss of stats.py is of second order with a diagonal, on the text that the codes are fitted to. Here the model is coded
as a plan has it, and every part of it gets its original weights back, one part at a time: by how much the KL divergence
falls is what the part costs, on text that the codes were not fitted to (changes.py). The quotient of the two scales all
losses of the part; the allocation is then made again.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxmoe.convert.calibrate import Calibration, choose_tokens, read_documents
from mlxmoe.convert.changes import Change, divergences, num_steps
from mlxmoe.convert.coding import coded_values
from mlxmoe.convert.hubtext import HUB
from mlxmoe.convert.layers import Layers
from mlxmoe.convert.measure import ExpertErrors, TrunkErrors
from mlxmoe.convert.selftext import SELF
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.plan import Plan
from mlxmoe.work import save_arrays

TOKENS = 8192  # that the parts are measured on
LIMIT = 4.0  # a quotient beyond this is noise, or an effect that scaling does not describe


class Part(NamedTuple):
    """The trunk tensors (experts False) or the experts of layer i, as in Layers."""

    i: int
    experts: bool


class Quotient(NamedTuple):
    """Of one part: the loss that the allocation counts, and what it is measured to cost, in nats per token."""

    expected: float
    measured: float

    @property
    def factor(self) -> float:
        """By which its losses are scaled."""
        if self.expected <= 0:
            return 1.0
        return float(np.clip(self.measured / self.expected, 1 / LIMIT, LIMIT))


class Measurement(NamedTuple):
    """Mean divergence of the assembled model, and by how much it falls with the original weights of one part."""

    total: float
    parts: dict[Part, float]


class Losses(NamedTuple):
    """What an allocation adds up (passes.measure)."""

    experts: dict[int, ExpertErrors]
    trunk: TrunkErrors


def refine(layers: Layers, losses: Losses, plan: Plan, tokens: np.ndarray, file: Path) -> tuple[Losses, str]:
    """One round: the losses that a plan was made from, scaled to what its parts cost on tokens int32 [windows, T]; and a
    note for people. Leaves what was measured in `file`, or takes it from there."""
    expected = expected_losses(layers, losses, plan)
    parts = list(expected)
    if not file.is_file():
        measured = measure_parts(layers, plan, parts, tokens)
        save_arrays(file, {"measured": np.array(list(measured.parts.values())), "total": np.array(measured.total)})
    with np.load(file) as saved:
        measured = Measurement(float(saved["total"]), dict(zip(parts, saved["measured"].tolist(), strict=True)))
    quotients = {part: Quotient(expected[part], measured.parts[part]) for part in parts}
    ratios = [q.factor for q in quotients.values()]
    note = (
        f"the assembled model diverges by {measured.total:.4g}, expected {sum(expected.values()):.4g}; {len(parts)} parts "
        f"cost {sum(measured.parts.values()):.4g} in it; "
        f"their losses are scaled by {min(ratios):.2f} to {max(ratios):.2f}"
    )
    return scaled(layers, losses, quotients), note


def scaled(layers: Layers, losses: Losses, quotients: dict[Part, Quotient]) -> Losses:
    """Losses with those of every part times its factor."""
    experts, trunk = dict(losses.experts), losses.trunk
    by_name: dict[str, float] = {}
    for i, tensors in layers.trunk.items():
        by_name |= {tensor.name: quotients[Part(i, False)].factor for tensor in tensors}
        if i in layers.sites:
            number = layers.sites[i].layer
            experts[number] = _times(experts[number], quotients[Part(i, True)].factor)
    factors = np.array([by_name[name] for name in layers.trunk_names()])
    weights = None if trunk.weights is None else trunk.weights * factors
    return Losses(experts, TrunkErrors(trunk.norms * factors, trunk.errors * factors[:, None], weights))


def _times(layer: ExpertErrors, factor: float) -> ExpertErrors:
    weights = None if layer.weights is None else layer.weights * factor
    return layer._replace(norms=layer.norms * factor, errors=layer.errors * factor, weights=weights)


def fresh_tokens(calibration: Calibration, tokenizer: Any, seed: int, used: np.ndarray) -> np.ndarray:
    """Windows int32 [windows, T] of the calibration text that lie behind the used ones; where it has none (or it came from
    the model or the Hub), the last that were used."""
    wanted = max(1, TOKENS // used.shape[1])
    if calibration.file not in (SELF, HUB):
        more = replace(calibration, tokens=used.size + wanted * used.shape[1], window=used.shape[1])
        tokens = choose_tokens(read_documents(calibration.file, tokenizer), tokenizer, more, seed)[len(used) :]
        if len(tokens):
            return tokens
    return used[-wanted:]


def expected_losses(layers: Layers, losses: Losses, plan: Plan) -> dict[Part, float]:
    """Of every part that a plan quantizes, by the losses that the plan was made from."""
    levels, result = layers.config.expert_levels, {}
    for i, tensors in layers.trunk.items():
        if tensors:
            entries = [plan.trunk[tensor.name] for tensor in tensors]
            result[Part(i, False)] = sum(entry.weight * entry.error for entry in entries)
        planned = layers.planned(i, plan)
        if planned is not None:
            columns = np.array([[levels.index(level) for level in expert.levels] for expert in planned.experts]).T
            errors = np.take_along_axis(losses.experts[planned.layer].errors, columns[..., None], 2)
            result[Part(i, True)] = float(errors.sum())
    return result


def measure_parts(layers: Layers, plan: Plan, parts: list[Part], tokens: np.ndarray) -> Measurement:
    """On tokens int32 [windows, T]. Works in a temporary folder and in that of the layers."""
    coded: dict[int, dict[str, np.ndarray]] = {}  # of the layer at hand

    def values(i: int, stream: LayerStream) -> dict[str, np.ndarray]:
        if i not in coded:
            coded.clear()
            coded[i] = coded_values(layers, i, plan)
        return coded[i]

    def without(part: Part, stream: LayerStream) -> dict[str, np.ndarray]:
        """Of a layer as it is coded, all but the part."""
        found = values(part.i, stream)
        return {name: value for name, value in found.items() if (name in trunk[part.i]) == part.experts}

    trunk = {i: {tensor.name for tensor in tensors} for i, tensors in layers.trunk.items()}
    head = max(trunk)
    changes = [*(Change(part.i, partial(without, part)) for part in parts), Change(head, partial(values, head))]
    with tempfile.TemporaryDirectory(prefix="mlxmoe-refine-") as folder:
        walk = Walk(layers.stream, tokens, Path(folder))
        with layers.bar("refine", num_steps(walk, changes), unit="steps") as step:
            found = divergences(walk, changes, step, base=lambda i: partial(values, i))
    *rest, total = found.mean(axis=(1, 2), dtype=np.float64).tolist()
    return Measurement(total, {part: total - left for part, left in zip(parts, rest, strict=True)})
