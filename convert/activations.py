"""Statistics of a model's experts and hidden states on text, in one pass, layer by layer, without keeping activations.

Per expert: how often it is chosen and by which domains, its gate weights, second moments of what it sees, its REAP score,
kurtosis, massive activations, the largest value that it gives. Per layer: which experts are chosen together, how sure the
router is, and the hidden states behind it. docs/report.md defines every number; the matrices that quantization needs are
stats.py's.

In memory: one layer's weights, one batch of tokens, for every expert 16,384 counters and, up to MOMENT_NBYTES a layer, its
second moments; a few numbers per token of one layer. On the disk: the hidden states of two layers.

Shapes: T tokens, A active experts per token, P pairs, E experts, G domains, D model dim, F expert dim, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.convert.domains import Windows
from mlxmoe.convert.replicas import group
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.watch import Call, Seen, Watch, watched
from mlxmoe.errors import UserError
from mlxmoe.models import ExpertSite
from mlxmoe.parts import NOT_KEPT, Parts

KINDS = ("general", "domain", "specialised", "never")
SCALES = ("rms", "median", "absolute")
MOMENT_NBYTES = 2 << 30  # of second moments in one layer; what takes more has no largest eigenvalue here
NUM_TRIGGERS = 10  # of every layer that are kept
_STEPS = 64  # of an octave, to which magnitudes are told apart
_BINS = 256 * _STEPS  # all exponents of float32
_KIND = "hidden"


@dataclass(frozen=True)
class Threshold:
    """What counts as massive: |value| >= factor * the scale of the layer's values (their root mean square, their median
    magnitude, or 1), to a 64th of an octave."""

    factor: float = 10.0
    scale: str = "rms"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UserError(f"there is no scale {self.scale!r}", f"one of {', '.join(SCALES)}")
        if not 0 < self.factor < float("inf"):
            raise UserError(f"--threshold {self.factor:g} is not a positive number", "10 is the default")

    def of(self, values: Magnitudes) -> float:
        scales = {"rms": values.rms, "median": values.median, "absolute": 1.0}
        return self.factor * scales[self.scale]


class Trigger(NamedTuple):
    """A large value: its magnitude, the expert (-1: a hidden state), and the window and position of its token."""

    magnitude: float
    expert: int
    window: int
    position: int


class Massive(NamedTuple):
    """Large magnitudes among the values of one kind in a layer. share [groups]: of the values that reach the threshold;
    first: of the rows with such a value, the share at the first position of a window (NaN: no such row)."""

    rms: float
    median: float
    largest: float
    threshold: float
    share: np.ndarray
    first: float
    triggers: tuple[Trigger, ...]


class ExpertNumbers(NamedTuple):
    """Of E experts of a layer, [E] each unless noted; NaN where an expert has seen no token.

    tokens; domains [E, G]: tokens by domain. gate: mean gate weight. Gate-weighted second moments
    sum g x x' / sum g of inputs and of hidden values: trace and share of the largest eigenvalue in it (NaN above
    MOMENT_NBYTES). kurtosis of inputs and hidden values (3: Gaussian). reap: mean of g * ||output||. largest: |output|.
    massive: share of the hidden values that reach the threshold.
    """

    tokens: np.ndarray
    domains: np.ndarray
    gate: np.ndarray
    input_trace: np.ndarray
    input_top: np.ndarray
    hidden_trace: np.ndarray
    hidden_top: np.ndarray
    input_kurtosis: np.ndarray
    hidden_kurtosis: np.ndarray
    reap: np.ndarray
    largest: np.ndarray
    massive: np.ndarray


class Routed(NamedTuple):
    """Of a layer with routed experts. together int64 [E, E]: tokens for which both were chosen, an expert's own number on
    the diagonal. confidence: mean share of the largest gate weight of a token in the sum of its gate weights. hidden: of the
    values before the last projection. shared: the numbers of the shared expert (gate weight 1), or None."""

    experts: ExpertNumbers
    together: np.ndarray
    active: int
    confidence: float
    hidden: Massive
    shared: ExpertNumbers | None


class LayerNumbers(NamedTuple):
    """`stream`: of the hidden states behind the layer. routed: None for a layer without routed experts."""

    layer: int
    path: str
    stream: Massive
    routed: Routed | None


# ---------------------------------------------------------------------------------------------------------------------
# Sums
# ---------------------------------------------------------------------------------------------------------------------


class Magnitudes:
    """|values| in groups of rows: a histogram of 64 bins an octave and, of every row, the largest.

    A bin is a float32's exponent and the first 6 bits of its mantissa, so its lower edge is exact.
    """

    def __init__(self, groups: int):
        self.counts = np.zeros((groups, _BINS), np.int64)
        self._squares, self._rows = 0.0, [np.zeros(0, np.float32)]

    def add(self, values: np.ndarray, bounds: np.ndarray) -> None:
        """values float32 [P, F]; rows bounds[g] to bounds[g + 1] are of group g."""
        magnitudes = np.abs(values)
        bins = (magnitudes.view(np.uint32) >> 17).astype(np.uint16)
        for g in range(len(self.counts)):
            if bounds[g] < bounds[g + 1]:
                self.counts[g] += np.bincount(bins[bounds[g] : bounds[g + 1]].reshape(-1), minlength=_BINS)
        self._squares += float(np.square(values, dtype=np.float64).sum())
        self._rows.append(magnitudes.max(axis=1))

    @property
    def rows(self) -> np.ndarray:
        """float32 [P]: the largest of every row so far, in the order of `add`."""
        return np.concatenate(self._rows)

    @property
    def rms(self) -> float:
        return float(np.sqrt(self._squares / max(1, self.counts.sum())))

    @property
    def median(self) -> float:
        """The lower edge of the bin that holds it."""
        total = np.cumsum(self.counts.sum(axis=0))
        return _edge(int(np.searchsorted(total, (total[-1] + 1) // 2)))

    def share(self, threshold: float) -> np.ndarray:
        """float64 [groups]: of the values not below the lower edge of the threshold's bin. NaN for a group without any."""
        first = int(np.array(threshold, np.float32).view(np.uint32)) >> 17
        totals = self.counts.sum(axis=1)
        return _ratio(self.counts[:, first:].sum(axis=1), totals)


def _edge(index: int) -> float:
    return float(np.array(index << 17, np.uint32).view(np.float32))


class ExpertSums:
    """What ExpertNumbers are made of, added up over batches. `num_experts` 1 for a shared expert."""

    def __init__(self, num_experts: int, num_domains: int):
        self.num_experts = num_experts
        self.magnitudes = Magnitudes(num_experts)
        # Of every row of the magnitudes: its expert, and its token in the text
        self.row_experts, self.row_tokens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        self._domains = np.zeros((num_experts, num_domains), np.int64)
        self._weights, self._reap, self._largest = (np.zeros(num_experts) for _ in range(3))
        self._inputs, self._hidden = _Moments(num_experts), _Moments(num_experts)

    def add(self, call: Call, weights: np.ndarray, domains: np.ndarray, first_token: int) -> None:
        """A batch: weights [P] of its rows, domains [T] of its tokens, the first of which is `first_token` of the text."""
        experts, bounds = call.experts, np.searchsorted(call.experts, np.arange(self.num_experts + 1))
        hidden = np.array(call.hidden.astype(mx.float32))
        inputs = np.array(call.inputs.astype(mx.float32))
        outputs = call.outputs.astype(mx.float32)
        norms, largest = (np.array(a) for a in (mx.sqrt(mx.square(outputs).sum(-1)), mx.abs(outputs).max(-1)))
        np.add.at(self._domains, (experts, domains[call.tokens]), 1)
        self._weights += np.bincount(experts, weights, minlength=self.num_experts)
        self._reap += np.bincount(experts, weights * norms, minlength=self.num_experts)
        np.maximum.at(self._largest, experts, largest)
        self._inputs.add(inputs, weights, bounds)
        self._hidden.add(hidden, weights, bounds)
        self.magnitudes.add(hidden, bounds)
        self.row_experts.append(experts)
        self.row_tokens.append(call.tokens + first_token)

    def numbers(self, threshold: float) -> ExpertNumbers:
        tokens = self._domains.sum(axis=1)
        return ExpertNumbers(
            tokens=tokens,
            domains=self._domains,
            gate=_ratio(self._weights, tokens),
            input_trace=_ratio(self._inputs.trace, self._weights),
            input_top=_ratio(self._inputs.largest_eigenvalues(), self._inputs.trace),
            hidden_trace=_ratio(self._hidden.trace, self._weights),
            hidden_top=_ratio(self._hidden.largest_eigenvalues(), self._hidden.trace),
            input_kurtosis=self._inputs.kurtosis(),
            hidden_kurtosis=self._hidden.kurtosis(),
            reap=_ratio(self._reap, tokens),
            largest=np.where(tokens > 0, self._largest, np.nan),
            massive=self.magnitudes.share(threshold),
        )


class _Moments:
    """Of the rows of every expert: sums of the first four powers of their values, and weighted second moments."""

    def __init__(self, num_experts: int):
        self._powers = np.zeros((num_experts, 4))
        self._values = np.zeros(num_experts, np.int64)
        self._matrices: np.ndarray | None = None  # [E, K, K]
        self.trace = np.zeros(num_experts)

    def add(self, rows: np.ndarray, weights: np.ndarray, bounds: np.ndarray) -> None:
        """rows float32 [P, K] with weights [P]; rows bounds[e] to bounds[e + 1] are of expert e."""
        columns = rows.shape[1]
        if self._matrices is None and 4 * len(self.trace) * columns**2 <= MOMENT_NBYTES:
            self._matrices = np.zeros((len(self.trace), columns, columns), np.float32)
        squares = np.square(rows)
        per_row = [rows.sum(axis=1), squares.sum(axis=1), (rows * squares).sum(axis=1), np.square(squares).sum(axis=1)]
        experts, count = np.repeat(np.arange(len(self.trace)), np.diff(bounds)), len(self.trace)
        self._powers += np.stack([np.bincount(experts, row, minlength=count) for row in per_row], axis=1)
        self._values += np.diff(bounds) * columns
        self.trace += np.bincount(experts, per_row[1] * weights, minlength=count)
        if self._matrices is None:
            return
        for e in np.flatnonzero(np.diff(bounds)):
            own, share = rows[bounds[e] : bounds[e + 1]], weights[bounds[e] : bounds[e + 1], None]
            self._matrices[e] += (own * share.astype(np.float32)).T @ own

    def largest_eigenvalues(self) -> np.ndarray:
        """float64 [E]: of the weighted sums of x x'; NaN where they were too large to keep."""
        if self._matrices is None:
            return np.full(len(self.trace), np.nan)
        return np.array([np.linalg.eigvalsh(matrix)[-1] for matrix in self._matrices], np.float64)

    def kurtosis(self) -> np.ndarray:
        """float64 [E]: fourth central moment over the squared variance, of all values of an expert together."""
        mean, second, third, fourth = (_ratio(column, self._values) for column in self._powers.T)
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return _ratio(central, variance**2)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """float64, NaN where `below` is 0."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)


# ---------------------------------------------------------------------------------------------------------------------
# The pass
# ---------------------------------------------------------------------------------------------------------------------


def gather(
    walk: Walk,
    windows: Windows,
    sites: Sequence[ExpertSite],
    threshold: Threshold,
    step: Callable[[int], object],
    parts: Parts = NOT_KEPT,
) -> list[LayerNumbers]:
    """All layers in turn, but for those that `parts` have; `step` is called with the number of layers done. Leaves no hidden
    states behind. Raises UserError for values that are not finite."""
    found = []
    for i in range(len(walk.stream.layers)):
        numbers = parts.get(f"layer-{i}", LayerNumbers)
        if numbers is None:
            path = walk.stream.path(i)
            site = next((s for s in sites if s.path.startswith(path + ".")), None)
            if i == 0:
                walk.embed(_KIND)
            with walk.stream.loaded(i):
                numbers = _layer(walk, i, windows, site, threshold)
            parts.keep(f"layer-{i}", numbers)
        found.append(numbers)
        walk.path(_KIND, i).unlink(missing_ok=True)
        step(1)
    walk.path(_KIND, len(walk.stream.layers)).unlink(missing_ok=True)
    return found


def _layer(walk: Walk, i: int, windows: Windows, site: ExpertSite | None, threshold: Threshold) -> LayerNumbers:
    stream, path = Magnitudes(1), walk.stream.path(i)

    def observe(rows: slice, hidden: mx.array) -> None:
        flat = np.array(hidden.astype(mx.float32)).reshape(-1, hidden.shape[-1])
        stream.add(flat, np.array([0, len(flat)]))

    if site is None:
        walk.advance(i, _KIND, observe)
        routed = None
    else:
        sums = _LayerSums(site, windows)
        with watched(walk.stream.layers[i], path, site) as watch:

            def both(rows: slice, hidden: mx.array) -> None:
                observe(rows, hidden)
                sums.add(rows, watch)

            walk.advance(i, _KIND, both)
        routed = sums.result(threshold)
    number = site.layer if site is not None else int(path.rpartition(".")[2])
    return LayerNumbers(number, path, _massive(stream, threshold, windows), routed)


class _LayerSums:
    def __init__(self, site: ExpertSite, windows: Windows):
        self._windows, self._domains = windows, len(windows.domains)
        self.experts = ExpertSums(site.num_experts, self._domains)
        self.shared: ExpertSums | None = None
        self.together = np.zeros((site.num_experts, site.num_experts), np.int64)
        self._confidence, self._active = 0.0, 0

    def add(self, rows: slice, watch: Watch) -> None:
        """What the layer did with windows [rows]."""
        length = self._windows.tokens.shape[1]
        domains, start = np.repeat(self._windows.domain[rows], length), rows.start * length
        seen: Seen = watch.take()
        self._active = seen.chosen.shape[1]
        weights = np.zeros((len(seen.chosen), self.experts.num_experts), np.float32)
        np.put_along_axis(weights, seen.chosen, seen.weights, axis=1)
        self.experts.add(seen.routed, weights[seen.routed.tokens, seen.routed.experts], domains, start)
        if seen.shared is not None:
            self.shared = self.shared or ExpertSums(1, self._domains)
            self.shared.add(seen.shared, np.ones(len(seen.shared.tokens), np.float32), domains, start)
        one_hot = np.zeros((len(seen.chosen), self.experts.num_experts), np.float32)
        np.put_along_axis(one_hot, seen.chosen, 1.0, axis=1)
        self.together += (one_hot.T @ one_hot).astype(np.int64)
        self._confidence += float(confidence(seen.weights).sum())

    def result(self, threshold: Threshold) -> Routed:
        hidden = self.experts.magnitudes
        massive = _massive(hidden, threshold, self._windows, self.experts)
        return Routed(
            experts=self.experts.numbers(massive.threshold),
            together=self.together,
            active=self._active,
            confidence=self._confidence / max(1, self._windows.tokens.size),
            hidden=massive,
            shared=None if self.shared is None else self.shared.numbers(massive.threshold),
        )


def confidence(weights: np.ndarray) -> np.ndarray:
    """[T]: share of the largest gate weight of a token in the sum of its gate weights [T, A]. In it the rules of all
    architectures can be compared, whether weights are normalised or not."""
    magnitudes = np.abs(weights)
    return np.nan_to_num(_ratio(magnitudes.max(axis=1), magnitudes.sum(axis=1)))


def _massive(values: Magnitudes, threshold: Threshold, windows: Windows, sums: ExpertSums | None = None) -> Massive:
    rows, limit = values.rows, threshold.of(values)
    tokens = np.arange(len(rows)) if sums is None else np.concatenate(sums.row_tokens)
    experts = np.full(len(rows), -1) if sums is None else np.concatenate(sums.row_experts)
    window, position = np.divmod(tokens, windows.tokens.shape[1])
    large = np.flatnonzero(rows >= limit)
    top = np.argsort(-rows, kind="stable")[:NUM_TRIGGERS]
    triggers = tuple(
        Trigger(*row) for row in zip(*(a[top].tolist() for a in (rows, experts, window, position)), strict=True)
    )
    return Massive(
        rms=values.rms,
        median=values.median,
        largest=float(rows.max(initial=0.0)),
        threshold=limit,
        share=values.share(limit),
        first=float((position[large] == 0).mean()) if len(large) else float("nan"),
        triggers=triggers,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the numbers say
# ---------------------------------------------------------------------------------------------------------------------


def domain_shares(domains: np.ndarray, domain_tokens: np.ndarray) -> np.ndarray:
    """float64 [E, G]: of an expert's tokens [E, G], by domain, as if every domain had the same number of tokens [G]; rows
    sum to 1, or are NaN for an expert that was never chosen."""
    rates = domains / domain_tokens
    return _ratio(rates, rates.sum(axis=1, keepdims=True))


def kinds(domains: np.ndarray, domain_tokens: np.ndarray) -> list[str]:
    """The chapter's class of every expert by frequency and concentration (replicas.group): of its tokens by domain [E, G],
    and all tokens by domain [G]. "general" is what the chapter calls frequent there; "never": never chosen."""
    tokens = domains.sum(axis=1)
    frequency, concentration = tokens / domain_tokens.sum(), domain_shares(domains, domain_tokens).max(axis=1)
    names = [group(f, c) for f, c in zip(frequency.tolist(), concentration.tolist(), strict=True)]
    renamed = ["general" if name == "frequent" else name for name in names]
    return [name if count else "never" for name, count in zip(renamed, tokens, strict=True)]


def lift(together: np.ndarray, active: int, tokens: int) -> np.ndarray:
    """float64 [E, E] of pair counts [E, E]: how much more often two experts are chosen together than by chance.

    P(both) / (P(one) P(other)), divided by what that is where each token takes `active` of E experts at random,
    (A - 1) E / (A (E - 1)): 1 is chance. NaN on the diagonal, for experts never chosen and for one active expert.
    """
    count = len(together)
    own = np.diag(together) / tokens
    chance = np.outer(own, own) * (active - 1) * count / (active * max(1, count - 1))
    result = _ratio(together / tokens, chance)
    np.fill_diagonal(result, np.nan)
    return result


def load_variation(tokens: np.ndarray) -> float:
    """Standard deviation over mean of the experts' token counts [E]: 0 for an even load."""
    return float(tokens.std() / max(tokens.mean(), 1e-30))


def specialisation(domains: np.ndarray, domain_tokens: np.ndarray) -> float:
    """Mutual information in bits of the domain of a token and an expert chosen for it, every domain of the same weight:
    what an expert's name says of the text; 0 where experts do not care, at most log2 of the number of domains."""
    joint = domains / domain_tokens
    joint = joint / joint.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    present = joint > 0
    return float((joint[present] * np.log2(joint[present] / independent[present])).sum())


class SuperExpert(NamedTuple):
    layer: int
    expert: int
    largest: float


def super_experts(layers: Sequence[LayerNumbers]) -> list[SuperExpert]:
    """Experts whose outputs make the massive activations of the hidden states (arXiv 2507.23279, section 3).

    Of the largest outputs of all experts of all layers: above their 99.5th percentile, and above a tenth of the largest.
    Only of layers that build massive activations up: here those up to the first behind which the largest hidden state is at
    least half of what it is anywhere. The largest first.
    """
    routed = [(layer, layer.routed) for layer in layers if layer.routed is not None]
    maxima = np.concatenate([r.experts.largest for _, r in routed])
    if np.isnan(maxima).all():
        return []
    limit = max(float(np.nanpercentile(maxima, 99.5)), float(np.nanmax(maxima)) / 10)
    heights = np.array([layer.stream.largest for layer in layers])
    builders = {layer.path for layer in layers[: int(np.argmax(heights >= heights.max() / 2)) + 1]}
    found = [
        SuperExpert(layer.layer, int(e), float(r.experts.largest[e]))
        for layer, r in routed
        if layer.path in builders
        for e in np.flatnonzero(np.nan_to_num(r.experts.largest) > limit)
    ]
    return sorted(found, key=lambda expert: -expert.largest)
