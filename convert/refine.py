"""An allocation's losses scaled to what is measured: the trunk and the experts of every layer, coded alone as a plan says.

The loss of stats.py is of second order with a diagonal, on the text that the codes are fitted to. Here every part of the
model is coded alone, as the plan has it, and the KL divergence that it causes is measured on text that it was not fitted to
(changes.py). The quotient of the two scales all losses of the part; the allocation is then made again. The assembled model
is not measured: parts are added up, as the allocation adds them.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mlxmoe.convert.calibrate import Calibration, choose_tokens, read_documents
from mlxmoe.convert.changes import Change, divergences, num_steps
from mlxmoe.convert.hubtext import HUB
from mlxmoe.convert.measure import ExpertErrors, TrunkErrors
from mlxmoe.convert.passes import Passes
from mlxmoe.convert.selftext import SELF
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.write import save_arrays
from mlxmoe.plan import Plan

TOKENS = 8192  # that the parts are measured on
LIMIT = 4.0  # a quotient beyond this is noise, or an effect that scaling does not describe


class Part(NamedTuple):
    """The trunk tensors (experts False) or the experts of layer i, as in Passes.parts."""

    i: int
    experts: bool


class Quotient(NamedTuple):
    """Of one part: the loss that the allocation counts, and the divergence that is measured, in nats per token."""

    expected: float
    measured: float

    @property
    def factor(self) -> float:
        """By which its losses are scaled."""
        if self.expected <= 0 or self.measured <= 0:
            return 1.0
        return float(np.clip(self.measured / self.expected, 1 / LIMIT, LIMIT))


class Losses(NamedTuple):
    """What an allocation adds up (Passes.measure)."""

    experts: dict[int, ExpertErrors]
    trunk: TrunkErrors


def refine(
    passes: Passes, losses: Losses, plan: Plan, levels: tuple[int, ...], tokens: np.ndarray, file: Path, quiet: bool
) -> tuple[Losses, str]:
    """One round: the losses that a plan was made from, scaled to what its parts cost on tokens int32 [windows, T]; and a
    note for people. Leaves what was measured in `file`, or takes it from there."""
    expected = expected_losses(passes, losses, plan, levels)
    parts = list(expected)
    if not file.is_file():
        measured = measure_parts(passes, plan, parts, tokens, quiet)
        save_arrays(file, {"measured": np.array([measured[part] for part in parts])})
    with np.load(file) as saved:
        measured = dict(zip(parts, saved["measured"].tolist(), strict=True))
    quotients = {part: Quotient(expected[part], measured[part]) for part in parts}
    ratios = [q.factor for q in quotients.values()]
    note = (
        f"{len(parts)} parts alone cost {sum(measured.values()):.4g}, expected {sum(expected.values()):.4g}; "
        f"their losses are scaled by {min(ratios):.2f} to {max(ratios):.2f}"
    )
    return scaled(passes, losses, quotients), note


def scaled(passes: Passes, losses: Losses, quotients: dict[Part, Quotient]) -> Losses:
    """Losses with those of every part times its factor."""
    experts, trunk = dict(losses.experts), losses.trunk
    by_name: dict[str, float] = {}
    for i, tensors, site in passes.parts():
        by_name |= {tensor.name: quotients[Part(i, False)].factor for tensor in tensors}
        if site is not None:
            experts[site.layer] = _times(experts[site.layer], quotients[Part(i, True)].factor)
    factors = np.array([by_name[name] for name in passes.trunk_names()])
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


def expected_losses(passes: Passes, losses: Losses, plan: Plan, levels: tuple[int, ...]) -> dict[Part, float]:
    """Of every part that a plan quantizes, by the losses that the plan was made from."""
    result = {}
    for i, tensors, site in passes.parts():
        if tensors:
            entries = [plan.trunk[tensor.name] for tensor in tensors]
            result[Part(i, False)] = sum(entry.weight * entry.error for entry in entries)
        if site is not None:
            layer = next(layer for layer in plan.layers if layer.path == site.path)
            columns = np.array([[levels.index(level) for level in expert.levels] for expert in layer.experts]).T
            errors = np.take_along_axis(losses.experts[site.layer].errors, columns[..., None], 2)
            result[Part(i, True)] = float(errors.sum())
    return result


def measure_parts(passes: Passes, plan: Plan, parts: list[Part], tokens: np.ndarray, quiet: bool) -> dict[Part, float]:
    """Mean divergence on tokens int32 [windows, T] of every part coded alone. Works in a temporary folder and in that of
    the passes."""
    coded: dict[int, dict[str, np.ndarray]] = {}  # of the layer at hand

    def values(part: Part, names: set[str], stream: LayerStream) -> dict[str, np.ndarray]:
        if part.i not in coded:
            coded.clear()
            coded[part.i] = passes.coded_values(part.i, plan)
        return {name: value for name, value in coded[part.i].items() if (name in names) != part.experts}

    trunk = {i: {tensor.name for tensor in tensors} for i, tensors, _ in passes.parts()}
    changes = [Change(part.i, partial(values, part, trunk[part.i])) for part in parts]
    with tempfile.TemporaryDirectory(prefix="mlxmoe-refine-") as folder:
        walk = Walk(passes.walk.stream, tokens, Path(folder))
        with tqdm(total=num_steps(walk, changes), unit=" steps", desc="refine", disable=quiet) as bar:
            found = divergences(walk, changes, bar.update)
    return dict(zip(parts, found.mean(axis=(1, 2), dtype=np.float64).tolist(), strict=True))
