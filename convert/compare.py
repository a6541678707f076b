"""Two versions of a model, layer by layer, on the same text: how routing differs, and how large the errors of each part are.

Both are read one layer at a time. `stream_error` and the routing are those of the version's own hidden states, with the
errors of all layers before; `own_error` and the errors of experts are those of one layer alone, on the reference's hidden
states. docs/report.md defines the numbers.

In memory: one layer of both, one batch of tokens. On the disk: the hidden states of two layers of both.

Shapes: T tokens, A active experts per token, E experts, G domains, D model dim, P pairs of token and expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.convert.activations import confidence
from mlxmoe.convert.domains import Windows
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.watch import Seen, Watch, watched
from mlxmoe.errors import UserError
from mlxmoe.models import ExpertSite
from mlxmoe.parts import NOT_KEPT, Parts

_REFERENCE, _VERSION = "reference", "version"


class RoutingChange(NamedTuple):
    """top1: tokens whose expert of the largest gate weight is the same. topk: mean share of the chosen experts that are the
    same. changed: tokens with another set. confidence: mean share of the best gate weight, of the reference and of the
    version."""

    top1: float
    topk: float
    changed: float
    confidence_reference: float
    confidence: float


class ExpertErrors(NamedTuple):
    """domains int64 [E, G]: tokens that the reference sends to each expert, by domain. Sums over those tokens [E]: squared
    errors of the outputs, squares of the reference's outputs."""

    domains: np.ndarray
    errors: np.ndarray
    squares: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """float64 [E]: NaN for experts without a token."""
        return np.divide(self.errors, self.squares, out=np.full(len(self.errors), np.nan), where=self.squares > 0)


class LayerChange(NamedTuple):
    """Relative squared errors: `stream_error` of the hidden states behind the layer, `own_error` of what the layer adds to
    the reference's. routing, experts: None for a layer without routed experts; shared: of its shared expert's output."""

    layer: int
    stream_error: float
    own_error: float
    routing: RoutingChange | None
    experts: ExpertErrors | None
    shared: float | None


class _Ratio:
    """sum of squared differences / sum of squares, over batches."""

    def __init__(self) -> None:
        self._error, self._square = 0.0, 0.0

    def add(self, got: mx.array, wanted: mx.array) -> None:
        wanted = wanted.astype(mx.float32)
        difference = got.astype(mx.float32) - wanted
        self._error += float(np.array(mx.square(difference).sum()))
        self._square += float(np.array(mx.square(wanted).sum()))

    @property
    def value(self) -> float:
        return self._error / max(self._square, 1e-30)

    @property
    def known(self) -> bool:
        return self._square > 0


def compare(
    reference: Walk,
    version: Walk,
    windows: Windows,
    sites: list[ExpertSite],
    step: Callable[[int], object],
    parts: Parts = NOT_KEPT,
) -> list[LayerChange]:
    """All layers in turn over the same tokens, but for those that `parts` have; `step` is called with the number of layers
    done. Both walks may share their folder. Leaves no hidden states behind. Raises UserError for models that are not two
    versions of one."""
    if len(reference.stream.layers) != len(version.stream.layers):
        raise UserError(
            f"the reference has {len(reference.stream.layers)} layers, the model {len(version.stream.layers)}",
            "compare a model with the checkpoint it was made from",
        )
    walks = ((reference, _REFERENCE), (version, _VERSION))
    found = []
    for i in range(len(reference.stream.layers)):
        change = parts.get(f"layer-{i}", LayerChange)
        if change is None:
            path = reference.stream.path(i)
            site = next((s for s in sites if s.path.startswith(path + ".")), None)
            for walk, kind in walks if i == 0 else ():
                walk.embed(kind)
            with reference.stream.loaded(i), version.stream.loaded(i):
                change = _layer(reference, version, i, windows, site)
            parts.keep(f"layer-{i}", change)
        found.append(change)
        for walk, kind in walks:
            walk.path(kind, i).unlink(missing_ok=True)
        step(1)
    for walk, kind in walks:
        walk.path(kind, len(walk.stream.layers)).unlink(missing_ok=True)
    return found


def _layer(reference: Walk, version: Walk, i: int, windows: Windows, site: ExpertSite | None) -> LayerChange:
    behind, own = _Ratio(), _Ratio()
    experts = _Experts(site, windows) if site is not None else None
    path = reference.stream.path(i)

    def batches(watches: tuple[Watch, Watch] | None) -> None:
        with reference.spill(_REFERENCE, i + 1) as write_reference, version.spill(_VERSION, i + 1) as write_version:
            for rows in reference.batches():
                before = reference.read(_REFERENCE, i, rows)
                wanted = _run(reference.stream, i, reference.batch(rows), before)
                alone = _run(version.stream, i, version.batch(rows), before)
                got = _run(version.stream, i, version.batch(rows), version.read(_VERSION, i, rows))
                if watches is not None and experts is not None:
                    experts.add(rows, *watches)
                behind.add(got, wanted)
                own.add(alone - before, wanted - before)
                write_reference(rows, wanted)
                write_version(rows, got)

    if site is None or experts is None:
        batches(None)
        return LayerChange(int(path.rpartition(".")[2]), behind.value, own.value, None, None, None)
    with (
        watched(reference.stream.layers[i], path, site) as first,
        watched(version.stream.layers[i], path, site) as second,
    ):
        batches((first, second))
    shared = experts.shared.value if experts.shared.known else None
    return LayerChange(site.layer, behind.value, own.value, experts.routing(), experts.errors(), shared)


def _run(stream: LayerStream, i: int, tokens: mx.array, hidden: mx.array) -> mx.array:
    """The layer's output, evaluated, so that what is watched belongs to this call. Raises UserError where not finite."""
    output = stream.run(i, tokens, hidden)
    if not mx.isfinite(output).all().item():
        raise UserError(
            f"the hidden states behind {stream.path(i)} are not finite",
            "the checkpoint or its configuration is damaged",
        )
    return output


class _Experts:
    """Sums over the batches of one layer with routed experts."""

    def __init__(self, site: ExpertSite, windows: Windows):
        self._windows = windows
        self._domains = np.zeros((site.num_experts, len(windows.domains)), np.int64)
        self._errors, self._squares = np.zeros(site.num_experts), np.zeros(site.num_experts)
        self._routing = np.zeros(5)
        self.shared = _Ratio()

    def add(self, rows: slice, reference: Watch, version: Watch) -> None:
        """What both layers did last with windows [rows]: each with its own hidden states."""
        wanted, got = reference.take(), version.take()
        self._routing += _routing(wanted, got)
        call = wanted.routed
        domains = np.repeat(self._windows.domain[rows], self._windows.tokens.shape[1])[call.tokens]
        np.add.at(self._domains, (call.experts, domains), 1)
        difference = version.outputs(call.inputs, call.experts) - call.outputs
        for sums, values in ((self._errors, difference), (self._squares, call.outputs)):
            squares = np.array(mx.square(values.astype(mx.float32)).sum(axis=-1))
            sums += np.bincount(call.experts, squares, minlength=len(sums))
        if wanted.shared is not None:
            outputs = version.shared_outputs(wanted.shared.inputs)
            assert outputs is not None
            self.shared.add(outputs, wanted.shared.outputs)

    def routing(self) -> RoutingChange:
        return RoutingChange(*(self._routing / max(1, self._windows.tokens.size)).tolist())

    def errors(self) -> ExpertErrors:
        return ExpertErrors(self._domains, self._errors, self._squares)


def _routing(reference: Seen, version: Seen) -> np.ndarray:
    """float64 [5]: sums over tokens of what RoutingChange has the means of."""
    best = [np.take_along_axis(s.chosen, s.weights.argmax(axis=1)[:, None], axis=1) for s in (reference, version)]
    common = (reference.chosen[:, :, None] == version.chosen[:, None, :]).any(axis=2).sum(axis=1)
    active = reference.chosen.shape[1]
    columns = (
        best[0] == best[1],
        common / active,
        common < active,
        confidence(reference.weights),
        confidence(version.weights),
    )
    return np.array([column.sum() for column in columns], np.float64)
