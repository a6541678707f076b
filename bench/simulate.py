"""Fake quantization: an unconverted model whose expert and router weights are replaced by what a code would give back.

For ablations beyond what converted files hold: the chapter's rotations and replicas side by side, quantizer parameters,
activation and router quantization (bench/chapter.py makes its tables). A Variant says what is stored and counts its bytes;
`Simulation` computes the values, puts them into the model for as long as a context lasts, and scores it by evaluate.py.
Attention, embeddings, head and dense layers stay as they are in the checkpoint and are left out of the bytes.

A rotation needs no place in the simulated model: W x = (W R')(R x), so a matrix coded behind R is put in rotated back, and
quantized activations likewise.

Shapes: E experts (1 for a shared one), C copies, N rows, K columns, G group size, T tokens, A active experts, D model dim.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.awq import Projection, degree, scaled_columns, search_scales
from mlxmoe.convert.config import COMBINED_BY
from mlxmoe.convert.domains import Windows, read_domains
from mlxmoe.convert.domains import choose_windows as choose_by_domain
from mlxmoe.convert.gptq import curvature, decoded, output_errors, quantize, symmetric_code
from mlxmoe.convert.quantize import WIDTHS, affine_search, clip_search, output_clip_search
from mlxmoe.convert.replicas import (
    copy_settings,
    error_lines,
    learned_weights,
    mean_weights,
    runtime_weights,
    usual_norm,
    variance_weights,
)
from mlxmoe.convert.rotate import adaptive, make_rotation
from mlxmoe.convert.scores import HUGE
from mlxmoe.convert.source import PROJECTIONS, Source, TrunkTensor
from mlxmoe.convert.stats import Accumulator, Moments
from mlxmoe.convert.stream import LayerStream, Record
from mlxmoe.copies import Copies, Selector, combined
from mlxmoe.errors import UserError
from mlxmoe.evaluate import EvalConfig, Text, choose_windows, evaluate, remembered
from mlxmoe.formats import GROUP_SIZES, NARROW_LEVELS, MatrixShape, choose_group_size
from mlxmoe.gates import gate_scores
from mlxmoe.loading import open_model
from mlxmoe.plan import SELECTIVE
from mlxmoe.rotation import GAMMAS, NAMES, Rotation, fits, rotate, rotate_moments, unrotate

_SAMPLE = 1024  # inputs kept of every matrix, for fitted rotations and combining weights
_PER_EXPERT = 64  # of them used for the combining weights of one expert
_OFFSETS = (0.0, 0.25, 0.5, -0.25)  # of the grid, in steps: two bits a group
_ADAPTIVE_EXPERTS = 4  # by whose error the adaptive rotation is chosen
_KEPT_COPIES = 8  # of the whole model's experts, coded: several variants have the same
_BATCH_TOKENS = 2048


class Site(NamedTuple):
    """An expert module: the routed experts of a layer, or a shared expert."""

    path: str
    layer: int
    num_experts: int
    shared: bool
    shapes: tuple[MatrixShape, ...]


class Statistics(NamedTuple):
    """Of one site on calibration text. By projection: moments, and a sample of inputs [T, K] with their experts [T].

    Per expert: frequency (share of all tokens), massive (share of the values before the last projection that exceed HUGE
    times their root mean square), concentration (largest share of its tokens that is of one domain).
    """

    moments: dict[str, Moments]
    inputs: dict[str, np.ndarray]
    experts: dict[str, np.ndarray]
    frequency: np.ndarray
    massive: np.ndarray
    concentration: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """How one copy of a matrix is coded. The defaults are the chapter's 2-bit baseline without activation quantization:
    one float16 scale a group, from the largest value, codes rounded to nearest.

    affine: a scale and a bias from both ends. clip: the ends shrunk to the least squared error (convert/quantize.py).
    offset: the grid of each group shifted by the best of four quarters of a step. shift: of every grid, in steps.
    feedback: GPTQ and coordinate descent on the statistics (convert/gptq.py), on the clipped symmetric grid.
    output_clip: the symmetric grid's clip by the error of the outputs (convert/quantize.py). awq: the last projection's
    columns coded behind activation-aware scales (convert/awq.py), which cost no bytes.
    activation_bits: of the inputs, per token; 16 for none. Raises UserError for what does not go together.
    """

    bits: int = 2
    group_size: int = 128
    affine: bool = False
    clip: bool = False
    stochastic: bool = False
    offset: bool = False
    shift: float = 0.0
    feedback: bool = False
    output_clip: bool = False
    awq: bool = False
    rotation: str = "none"
    activation_bits: int = 16
    activation_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        widths = NARROW_LEVELS if self.feedback else WIDTHS
        _one_of("bits", self.bits, widths)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("rotation", self.rotation, NAMES)
        _one_of("activation_bits", self.activation_bits, range(2, 17))
        _within("shift", self.shift, -1.0, 1.0)
        _within("activation_clip", self.activation_clip, 0.05, 1.0)
        others = ("affine", "stochastic", "offset", "shift")
        clashes = [(first, second) for first in ("feedback", "output_clip") for second in others]
        for first, second in [
            *clashes,
            ("feedback", "output_clip"),
            ("clip", "output_clip"),
            ("offset", "shift"),
            ("awq", "rotation"),
        ]:
            if getattr(self, first) and getattr(self, second) not in (False, 0.0, "none"):
                raise UserError(f"{first} and {second} do not go together", "leave one of them out")


def _one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise UserError(f"{key} = {value!r} is not one of {listed}", f"choose one of them for {key}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # not a number is not within either
        raise UserError(
            f"{key} = {value!r} is not between {low:g} and {high:g}", f"give a number between them for {key}"
        )


@dataclass(frozen=True)
class Variant:
    """What is stored of a model's experts.

    copies and bits: by path of the site, int [E]; absent: one copy, the recipe's bits. A further copy takes the next of
    `extra` in place of the recipe, seeds apart. combine: one of COMBINED_BY; "learned" with one copy is a gain for every
    expert. conservative: equal weights where the chapter's rule asks for it (replicas.py), by the inputs of the calibration
    text. layers: None for all; others stay as they are. experts False: no expert is touched. router_bits: of the router's
    matrix, affine, groups of 64.
    """

    name: str
    recipe: Recipe = Recipe()
    copies: Mapping[str, np.ndarray] = field(default_factory=dict)
    bits: Mapping[str, np.ndarray] = field(default_factory=dict)
    extra: tuple[Recipe, ...] = ()
    combine: str = "mean"
    conservative: bool = False
    layers: frozenset[int] | None = None
    experts: bool = True
    router_bits: int | None = None

    def __post_init__(self) -> None:
        _one_of("combine", self.combine, COMBINED_BY)
        if self.router_bits is not None:
            _one_of("router_bits", self.router_bits, WIDTHS)

    def recipes(self, count: int) -> list[Recipe]:
        """One for each of `count` copies."""
        given = (self.recipe, *self.extra)
        return [
            given[i] if i < len(given) else replace(given[-1], seed=given[-1].seed + i - len(given) + 1)
            for i in range(count)
        ]


def progressing(recipe: Recipe, count: int, strategy: str) -> list[Recipe]:
    """Recipes of `count` copies whose settings differ as a strategy of the chapter has it (replicas.py)."""
    return [
        replace(
            recipe,
            seed=recipe.seed + settings.rotation,
            shift=settings.shift,
            stochastic=settings.stochastic,
            activation_bits=settings.activation_bits,
            activation_clip=settings.clip,
            group_size=settings.group_size,
        )
        for settings in copy_settings(count, strategy)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Coding a matrix
# ---------------------------------------------------------------------------------------------------------------------


def grid(groups: np.ndarray, bits: int, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """groups [n, G] -> scales and biases float32 [n, 1], exact in float16: value = scale * code + bias."""
    top = np.float32((1 << bits) - 1)
    if recipe.affine and recipe.clip:
        found = affine_search(groups, bits)
        return found.scales.astype(np.float32)[:, None], found.biases.astype(np.float32)[:, None]
    if recipe.affine:
        low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
        return _half((high - low) / top), _half(low)
    if recipe.clip:
        scales = clip_search(groups, bits)[0].astype(np.float32)[:, None]
    else:
        scales = _half(np.abs(groups).max(axis=1, keepdims=True) * (2 / top))
    return scales, scales * (-top / 2)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def round_to_grid(
    groups: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, random: np.random.Generator | None = None
) -> np.ndarray:
    """Values [n, G] of the nearest codes; with `random`, up or down with probabilities that keep the mean (inside the
    grid)."""
    q = np.divide(groups - biases, scales, out=np.zeros_like(groups), where=scales > 0)
    q = np.rint(q) if random is None else np.floor(q + random.random(q.shape, np.float32))
    return np.clip(q, 0, (1 << bits) - 1) * scales + biases


def coded_groups(groups: np.ndarray, bits: int, recipe: Recipe) -> np.ndarray:
    """groups float32 [n, G] -> the values that their codes stand for."""
    scales, biases = grid(groups, bits, recipe)
    random = np.random.default_rng(recipe.seed) if recipe.stochastic else None
    shifts = _OFFSETS if recipe.offset else (recipe.shift,)
    best, least = np.empty_like(groups), np.full((len(groups), 1), np.inf, np.float32)
    for shift in shifts:
        value = round_to_grid(groups, scales, biases + np.float32(shift) * scales, bits, random)
        error = np.square(value - groups).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, value, best), np.minimum(error, least)
    return best


def coded_stack(stack: np.ndarray, bits: np.ndarray, recipe: Recipe, moments: np.ndarray) -> np.ndarray:
    """stack [E, N, K] at bits [E], moments [E, K, K] of the inputs (for feedback) -> values [E, N, K]."""
    result = np.empty_like(stack)
    group_size = choose_group_size(stack.shape[2], recipe.group_size)
    for width in np.unique(bits):
        chosen = np.flatnonzero(bits == width)
        if recipe.feedback:
            result[chosen] = _with_feedback(stack[chosen], moments[chosen], int(width), group_size)
        elif recipe.output_clip:
            result[chosen] = _clipped(stack[chosen], moments[chosen], int(width), group_size)
        else:
            groups = stack[chosen].reshape(-1, group_size)
            result[chosen] = coded_groups(groups, int(width), recipe).reshape(stack[chosen].shape)
    return result


def _clipped(stack: np.ndarray, moments: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    scales = output_clip_search(stack, moments, bits, group_size).reshape(-1, 1)
    groups = stack.reshape(-1, group_size)
    return round_to_grid(groups, scales, scales * (-((1 << bits) - 1) / 2), bits).reshape(stack.shape)


def _with_feedback(stack: np.ndarray, moments: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    scales, _ = clip_search(stack.reshape(-1, group_size), bits)
    start = scales.astype(np.float32).reshape(*stack.shape[:2], -1)
    code = symmetric_code(bits)
    return decoded(quantize(stack, curvature(moments), start, np.zeros_like(start), code, sweeps=1), code)


def matrix_nbytes(shape: MatrixShape, bits: int, recipe: Recipe) -> int:
    """Of one coded matrix: codes, a float16 scale a group, and its bias or two bits of its offset where there is one."""
    groups = shape.num_weights // choose_group_size(shape.columns, recipe.group_size)
    in_groups = 16 + (16 if recipe.affine else 2 if recipe.offset else 0)
    return -(-(shape.num_weights * bits + groups * in_groups) // 8)


# ---------------------------------------------------------------------------------------------------------------------
# Modules of the simulated model
# ---------------------------------------------------------------------------------------------------------------------


class QuantizedInput(nn.Module):
    """Around a linear layer: its input rotated, rounded per token to `bits` (largest value times `clip`), rotated back."""

    def __init__(self, inner: nn.Module, rotation: Rotation, bits: int, clip: float):
        super().__init__()
        self.inner = inner
        self._signs, self._block = mx.array(rotation.signs), mx.array(rotation.block)
        self._top, self._clip = (1 << (bits - 1)) - 1, clip

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        size = self._block.shape[0]
        turned = (((x * self._signs).reshape(*x.shape[:-1], -1, size)) @ self._block.T).reshape(x.shape)
        scale = mx.maximum(mx.abs(turned).max(axis=-1, keepdims=True), 1e-30) * (self._clip / self._top)
        rounded = mx.clip(mx.round(turned / scale), -self._top, self._top) * scale
        back = (rounded.reshape(*x.shape[:-1], -1, size) @ self._block).reshape(x.shape) * self._signs
        return self.inner(back, *args, **kwargs)


class Ensemble(nn.Module):
    """In the place of an expert module: its copies, whose outputs are combined as the runtime does it (copies.py), by
    weights [C, E] or a selector."""

    def __init__(self, copies: Sequence[nn.Module], weights: np.ndarray, selector: Selector | None):
        super().__init__()
        self.copies = list(copies)
        self._how = Copies(weights=mx.array(weights.astype(np.float32)), selector=selector)

    def __call__(self, x: mx.array, *indices: mx.array) -> mx.array:
        outputs = [part(x, *indices) for part in self.copies]
        log_norms = self._how.log_norms(x)
        if not indices:  # a shared expert
            return combined(outputs, self._how, mx.zeros(x.shape[:-1], mx.uint32), log_norms)
        return combined(outputs, self._how, indices[0], None if log_norms is None else log_norms[..., None])


class _Watcher(nn.Module):
    """In the place of routed experts: keeps what the router chose and ranked by."""

    def __init__(self, inner: nn.Module, scores: Callable[[mx.array], mx.array] | None):
        super().__init__()
        self.inner = inner
        self._scores = scores
        self._seen: list[tuple[mx.array, mx.array | None]] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self._seen.append((indices, None if self._scores is None else self._scores(x)))
        return self.inner(x, indices)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def gather_statistics(source: Source, sites: Sequence[Site], windows: Windows) -> dict[str, Statistics]:
    """Forward and backward over the original model, layer by layer, hidden states in memory; by path of the site.

    Moments are weighted by the gradient of the log-probability of tokens drawn by the model (convert/stats.py).
    """
    stream = LayerStream(source)
    rows = max(1, _BATCH_TOKENS // windows.tokens.shape[1])
    starts = range(0, len(windows.tokens), rows)
    batches = [mx.array(windows.tokens[i : i + rows]) for i in starts]
    domains = [np.repeat(windows.domain[i : i + rows], windows.tokens.shape[1]) for i in starts]
    hidden = [[stream.embed(batch) for batch in batches]]
    for i in range(len(stream.layers)):
        with stream.loaded(i):
            hidden.append([stream.run(i, batch, x) for batch, x in zip(batches, hidden[-1], strict=True)])
            mx.eval(hidden[-1])
    gradients = [
        stream.sample(b, x, [], seed=i).gradient for i, (b, x) in enumerate(zip(batches, hidden[-1], strict=True))
    ]
    found: dict[str, Statistics] = {}
    for i in reversed(range(len(stream.layers))):
        inside = [site for site in sites if site.path.startswith(stream.path(i) + ".")]
        paths = [f"{site.path}.{shape.name}" for site in inside for shape in site.shapes]
        with stream.loaded(i):
            steps = [stream.differentiate(i, *each, paths) for each in zip(batches, hidden[i], gradients, strict=True)]
        gradients = [step.gradient for step in steps]
        for site in inside:
            records = [{s.name: step.records[f"{site.path}.{s.name}"] for s in site.shapes} for step in steps]
            found[site.path] = _statistics(site, records, domains)
    return found


def _statistics(site: Site, batches: Sequence[dict[str, Record]], domains: Sequence[np.ndarray]) -> Statistics:
    tokens = sum(len(part) for part in domains)
    moments, inputs, experts = {}, {}, {}
    for shape in site.shapes:
        sums = Accumulator(f"{site.path}.{shape.name}", 0 if site.shared else site.num_experts)
        for batch, part in zip(batches, domains, strict=True):
            sums.add(batch[shape.name], len(part))
        moments[shape.name] = sums.moments()
        x = np.concatenate([batch[shape.name].inputs for batch in batches])
        chosen = np.concatenate([_experts_of(batch[shape.name]) for batch in batches])
        kept = np.random.default_rng(0).permutation(len(x))[: max(_SAMPLE, _PER_EXPERT * site.num_experts)]
        inputs[shape.name], experts[shape.name] = x[kept], chosen[kept]
    last = [batch[site.shapes[-1].name] for batch in batches]
    of_rows = np.concatenate(
        [np.repeat(part, len(record.inputs) // len(part)) for record, part in zip(last, domains, strict=True)]
    )
    chosen = np.concatenate([_experts_of(record) for record in last])
    counts = np.zeros((site.num_experts, int(of_rows.max()) + 1))
    np.add.at(counts, (chosen, of_rows), 1)
    values = np.concatenate([record.inputs for record in last])
    huge = (np.abs(values) > HUGE * np.sqrt(np.square(values).mean())).mean(axis=1)
    total = np.maximum(counts.sum(axis=1), 1)
    massive = np.bincount(chosen, weights=huge, minlength=site.num_experts) / total
    return Statistics(moments, inputs, experts, counts.sum(axis=1) / tokens, massive, counts.max(axis=1) / total)


def _experts_of(record: Record) -> np.ndarray:
    return np.zeros(len(record.inputs), np.int64) if record.experts is None else record.experts.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# The simulated model
# ---------------------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """One row: bytes of all experts as stored, bits per expert weight, and fidelity on the texts (evaluate.py)."""

    name: str
    nbytes: int
    bpw: float
    kld: float
    kld_stderr: float
    ppl: float
    top1: float


class Routing(NamedTuple):
    """Of every layer with routed experts: chosen int [T, A], ranked float32 [T, E] or None for a gate that is not known."""

    chosen: list[np.ndarray]
    ranked: list[np.ndarray | None]


class Agreement(NamedTuple):
    """Two models' routing on the same text, mean over layers: same best expert, share of the chosen experts that are the
    same, tokens with another set, and the change of the best expert's score relative to the first model's."""

    top1: float
    topk: float
    changed: float
    confidence: float


class _RotationKey(NamedTuple):
    """Site and projection whose input is rotated, the kind of rotation, its seed."""

    path: str
    projection: str
    name: str
    seed: int


class Simulation:
    """See the file's heading. `texts` are scored, `calibration` gives the statistics; `max_tokens` of the one and
    `calibration_tokens` of the other. Raises UserError for a checkpoint without routed experts of a known kind."""

    def __init__(
        self,
        checkpoint: str | Path,
        texts: Sequence[Text],
        calibration: str | Path,
        max_tokens: int,
        calibration_tokens: int,
        window: int = 256,
    ):
        if max_tokens < len(texts):
            raise UserError(f"{max_tokens} tokens cannot be shared by {len(texts)} texts", "raise --max-tokens")
        self.loaded = open_model(checkpoint)
        self._reference = remembered(open_model(checkpoint).model)
        self._texts, self._config = list(texts), EvalConfig(max_tokens, window)
        self.source = Source(open_checkpoint(checkpoint), 128)
        self.sites = expert_sites_of(self.source)
        tokenizer = self.loaded.tokenizer
        windows = choose_by_domain(read_domains([calibration], tokenizer), tokenizer, calibration_tokens, window)
        self.statistics = gather_statistics(self.source, self.sites, windows)
        self._modules: dict[str, Any] = dict(self.loaded.model.named_modules())
        self._rotations: dict[_RotationKey, Rotation] = {}
        self._copies: dict[tuple[str, Recipe, bytes], Any] = {}

    # -- values ----------------------------------------------------------------------------------------------------------

    def weight(self, site: Site, projection: str) -> np.ndarray:
        """float32 [E, N, K]: the checkpoint's."""
        array = np.array(self._modules[f"{site.path}.{projection}"]["weight"].astype(mx.float32))
        return array.reshape(site.num_experts, *array.shape[-2:])

    def rotation(self, site: Site, shape: MatrixShape, recipe: Recipe) -> Rotation:
        """The rotation of a matrix's input, made once. Matrices with the same input share it: all but the last projection
        of all experts of a layer, shared and routed."""
        owner, first = self._owner(site, shape)
        key = _RotationKey(owner.path, first.name, recipe.rotation, recipe.seed)
        if key not in self._rotations:
            statistics = self.statistics[owner.path]
            moments, inputs = statistics.moments[first.name].hessian, statistics.inputs[first.name][:_SAMPLE]
            if recipe.rotation == "dfrot-adaptive":
                fitted = [self.rotation(site, shape, replace(recipe, rotation=f"dfrot-{gamma}")) for gamma in GAMMAS]
                size = choose_group_size(first.columns, recipe.group_size)
                some = slice(_ADAPTIVE_EXPERTS)
                made = adaptive(fitted, self.weight(owner, first.name)[some], moments[some], recipe.bits, size)
            else:
                made = make_rotation(recipe.rotation, first.columns, recipe.seed, inputs)
            self._rotations[key] = made
        return self._rotations[key]

    def _owner(self, site: Site, shape: MatrixShape) -> tuple[Site, MatrixShape]:
        """The site and projection whose inputs stand for those of a matrix."""
        if shape is site.shapes[-1]:
            return site, shape
        owner = next(s for s in self.sites if s.layer == site.layer)
        return owner, owner.shapes[0]

    def values(self, site: Site, shape: MatrixShape, recipe: Recipe, bits: np.ndarray) -> np.ndarray:
        """float32 [E, N, K]: what one copy of a projection stands for, rotated back."""
        if recipe.awq and shape is site.shapes[-1]:
            return self._balanced(site, shape, recipe, bits)
        rotation = self.rotation(site, shape, recipe)
        hessian = self.statistics[site.path].moments[shape.name].hessian
        moments = rotate_moments(hessian, rotation) if recipe.feedback or recipe.output_clip else hessian
        stack = rotate(self.weight(site, shape.name), rotation)
        return unrotate(coded_stack(stack, bits, recipe, moments), rotation)

    def _balanced(self, site: Site, shape: MatrixShape, recipe: Recipe, bits: np.ndarray) -> np.ndarray:
        """What a last projection stands for that is coded behind activation-aware scales, with the scales taken back."""
        matrix = Projection(self.weight(site, shape.name), self.statistics[site.path].moments[shape.name])
        rounding = replace(recipe, feedback=False, clip=recipe.clip or recipe.feedback)
        scales = search_scales(matrix, lambda m: coded_stack(m.stack, bits, rounding, m.moments.hessian)).scales
        scaled = scaled_columns(matrix, scales)
        return coded_stack(scaled.stack, bits, recipe, scaled.moments.hessian) / scales[:, None]

    def _copy(self, site: Site, recipe: Recipe, bits: np.ndarray) -> nn.Module:
        """A module of one copy of all experts. The last ones made are kept."""
        key = (site.path, recipe, bits.tobytes())
        made = self._copies.pop(key, None) or self._coded(site, recipe, bits)
        self._copies[key] = made
        while len(self._copies) > _KEPT_COPIES * len(self.sites):
            del self._copies[next(iter(self._copies))]
        return made

    def _coded(self, site: Site, recipe: Recipe, bits: np.ndarray) -> nn.Module:
        twin = copy.copy(self._modules[site.path])
        for shape in site.shapes:
            values = self.values(site, shape, recipe, bits)
            original = self._modules[f"{site.path}.{shape.name}"]
            linear = copy.copy(original)
            linear["weight"] = mx.array(values).reshape(original["weight"].shape).astype(original["weight"].dtype)
            if recipe.activation_bits < 16:
                rotation = self.rotation(site, shape, recipe)
                linear = QuantizedInput(linear, rotation, recipe.activation_bits, recipe.activation_clip)
            twin[shape.name] = linear
        return twin

    def _error(self, site: Site, module: Any) -> np.ndarray:
        """float64 [E]: what the errors of a copy's matrices cost (convert/stats.py)."""
        total = np.zeros(site.num_experts)
        for shape in site.shapes:
            linear, moments = module[shape.name], self.statistics[site.path].moments[shape.name]
            values = np.array((linear.inner if isinstance(linear, QuantizedInput) else linear)["weight"])
            difference = self.weight(site, shape.name) - values.reshape(site.num_experts, shape.rows, shape.columns)
            total += output_errors(difference, moments.hessian, moments.row_weights)
        return total

    def module(self, site: Site, variant: Variant) -> nn.Module:
        """What stands in the place of a site under a variant."""
        counts, bits = self._counts(site, variant), self._bits(site, variant)
        copies = [self._copy(site, recipe, bits) for recipe in variant.recipes(int(counts.max()))]
        if len(copies) == 1 and variant.combine != "learned":
            return copies[0]
        by_variance = variant.combine == "variance"
        errors = np.stack([self._error(site, m) if by_variance else np.zeros(site.num_experts) for m in copies])
        weights = np.zeros((len(copies), site.num_experts))
        for e, count in enumerate(counts):
            found = self._weights(site, variant.combine, copies[:count], errors[:count, e], e)
            if variant.conservative:
                found = runtime_weights(found, np.linalg.norm(self._inputs_of(site, e), axis=1), known_domain=True)
            weights[:count, e] = found
        selector = self._selector(site, copies, variant.conservative) if variant.combine == SELECTIVE else None
        return Ensemble(copies, weights, selector)

    def _weights(
        self, site: Site, combine: str, copies: Sequence[nn.Module], errors: np.ndarray, expert: int
    ) -> np.ndarray:
        if combine == "variance":
            return variance_weights(errors)
        if combine == "learned" and len(self._inputs_of(site, expert)):
            return learned_weights(*self._outputs(site, copies, expert), ridge=1e-2)
        return mean_weights(len(copies))

    def _outputs(self, site: Site, copies: Sequence[nn.Module], expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Outputs [C, T, N] of the copies of one expert on its calibration inputs, and of the original [T, N]."""
        x = mx.array(self._inputs_of(site, expert))
        indices = () if site.shared else (mx.full((x.shape[0], 1), expert, dtype=mx.uint32),)
        results = [
            np.array(m(x, *indices).astype(mx.float32)).reshape(len(x), -1) for m in (*copies, self._modules[site.path])
        ]
        return np.stack(results[:-1]), results[-1]

    def _inputs_of(self, site: Site, expert: int) -> np.ndarray:
        statistics, first = self.statistics[site.path], site.shapes[0].name
        return statistics.inputs[first][statistics.experts[first] == expert][:_PER_EXPERT]

    def _selector(self, site: Site, copies: Sequence[nn.Module], careful: bool) -> Selector:
        """One for all experts of the site; careful: with the conservative mode."""
        norms, errors = [], []
        for expert in range(site.num_experts):
            norms.append(np.linalg.norm(self._inputs_of(site, expert), axis=1))
            if len(norms[-1]):
                outputs, target = self._outputs(site, copies, expert)
                errors.append(np.square(outputs - target).sum(axis=2))
        lines = error_lines(np.concatenate(norms), np.concatenate(errors, axis=1))[..., None]
        slopes, intercepts = mx.array(np.repeat(lines, site.num_experts, axis=2).astype(np.float32))
        return Selector(slopes, intercepts, mx.log(mx.array(list(map(usual_norm, norms)))) if careful else None)

    # -- sizes -----------------------------------------------------------------------------------------------------------

    def _counts(self, site: Site, variant: Variant) -> np.ndarray:
        return np.asarray(variant.copies.get(site.path, np.ones(site.num_experts, np.int64)))

    def _bits(self, site: Site, variant: Variant) -> np.ndarray:
        return np.asarray(variant.bits.get(site.path, np.full(site.num_experts, variant.recipe.bits)))

    def touched(self, variant: Variant) -> list[Site]:
        """The sites that a variant codes."""
        wanted = self.sites if variant.experts else []
        return [site for site in wanted if variant.layers is None or site.layer in variant.layers]

    @property
    def num_weights(self) -> int:
        return sum(site.num_experts * shape.num_weights for site in self.sites for shape in site.shapes)

    def nbytes(self, variant: Variant) -> int:
        """Of all experts: codes, scales, rotations and combining weights where coded, two bytes a weight where not."""
        touched = {site.path for site in self.touched(variant)}
        total, rotations = 0, {}
        for site in self.sites:
            if site.path not in touched:
                total += 2 * site.num_experts * sum(shape.num_weights for shape in site.shapes)
                continue
            counts, bits = self._counts(site, variant), self._bits(site, variant)
            for i, recipe in enumerate(variant.recipes(int(counts.max()))):
                stored = bits[counts > i]
                total += sum(matrix_nbytes(shape, int(width), recipe) for width in stored for shape in site.shapes)
                total += 2 * len(stored) if variant.combine in ("variance", "learned") else 0
                for shape in site.shapes:
                    owner, first = self._owner(site, shape)
                    rotations[owner.path, first.name, i] = self.rotation(site, shape, recipe).nbytes
        return total + sum(rotations.values())

    # -- scores ----------------------------------------------------------------------------------------------------------

    def check(self, variant: Variant) -> None:
        """Raises UserError for a variant that cannot be had of this model."""
        touched = self.touched(variant)
        for recipe in (variant.recipe, *variant.extra):
            for site in touched:
                for shape in site.shapes:
                    if not fits(recipe.rotation, shape.columns):
                        raise UserError(
                            f"rotation = {recipe.rotation!r} does not fit the {shape.columns} columns of {shape.name}",
                            "random and, where 64 divides the columns, block-hadamard-64 do",
                        )
                if recipe.awq and not site.shared:
                    degree(self._modules[site.path])

    @contextmanager
    def applied(self, variant: Variant) -> Iterator[nn.Module]:
        """The model with the variant in it, while the context lasts."""
        self.check(variant)
        sites = self.touched(variant)
        replaced = [(site.path, self.module(site, variant)) for site in sites]
        routers = self._quantized_routers(variant) if variant.router_bits else []
        originals = [(name, self._modules[name.rpartition(".")[0]]["weight"]) for name, _ in routers]
        model = self.loaded.model
        model.update_modules(tree_unflatten(replaced))
        model.load_weights(routers, strict=False)
        try:
            yield model
        finally:
            model.update_modules(tree_unflatten([(site.path, self._modules[site.path]) for site in sites]))
            model.load_weights(originals, strict=False)

    def _routers(self, layers: frozenset[int] | None = None) -> list[TrunkTensor]:
        """The routers' matrices, of all layers or of some. Raises UserError where there are none of a known kind."""
        counts = {site.num_experts for site in self.sites if not site.shared}
        named = [t for t in self.source.trunk if re.search(r"(gate|router)\.weight$", t.name)]
        found = [tensor for tensor in named if tensor.shape[0] in counts]
        if not found:
            raise UserError(
                f"{self.source.checkpoint.name} has no router that is a plain matrix",
                "leave its table out with --tables",
            )
        numbers = [re.search(r"layers\.(\d+)\.", tensor.name) for tensor in found]
        return [
            t for t, n in zip(found, numbers, strict=True) if layers is None or (n is not None and int(n[1]) in layers)
        ]

    def router_nbytes(self, bits: int, layers: frozenset[int] | None = None) -> int:
        """Of all routers' matrices at a width; of some layers only: the others' at two bytes a weight."""
        coded = {tensor.name for tensor in self._routers(layers)}
        shapes = [MatrixShape(t.name, t.shape[0], t.shape[1], 64) for t in self._routers()]
        recipe = Recipe(group_size=64, affine=True)
        return sum(matrix_nbytes(s, bits, recipe) if s.name in coded else 2 * s.num_weights for s in shapes)

    def _quantized_routers(self, variant: Variant) -> list[tuple[str, mx.array]]:
        assert variant.router_bits is not None
        result = []
        for tensor in self._routers(variant.layers):
            weight = self._modules[tensor.module]["weight"]
            groups = np.array(weight.astype(mx.float32)).reshape(-1, choose_group_size(weight.shape[-1], 64))
            values = coded_groups(groups, variant.router_bits, Recipe(affine=True, clip=True))
            result.append((tensor.name, mx.array(values.reshape(weight.shape)).astype(weight.dtype)))
        return result

    def score(self, variant: Variant) -> Score:
        """Fidelity of a variant against the checkpoint."""
        with self.applied(variant) as model:
            result = evaluate(model, self.loaded.tokenizer, self._texts, self._reference, self._config)
        nbytes = self.nbytes(variant)
        return Score(
            *(variant.name, nbytes, 8 * nbytes / self.num_weights, result["kld_mean"], result["kld_stderr"] or 0.0),
            *(result["ppl"], result["top1_agreement"]),
        )

    def windows(self) -> list[list[int]]:
        """The windows that are scored."""
        share = self._config.max_tokens // len(self._texts)
        return [
            window
            for text in self._texts
            for window in choose_windows(text.documents, self.loaded.tokenizer, self._config.window, share)
        ]

    def logits(self, variant: Variant) -> np.ndarray:
        """float32 [T, V] over all scored windows."""
        with self.applied(variant) as model:
            parts = [np.array(model(mx.array([w]))[0].astype(mx.float32)) for w in self.windows()]
        return np.concatenate(parts)

    def routing(self, variant: Variant) -> Routing:
        """What the routers choose on the scored windows."""
        routed = [site for site in self.sites if not site.shared]
        with self.applied(variant) as model:
            modules: dict[str, Any] = dict(model.named_modules())
            parents = [modules[site.path.rpartition(".")[0]] for site in routed]
            watchers = [
                _Watcher(modules[site.path], gate_scores(block, site.num_experts))
                for site, block in zip(routed, parents, strict=True)
            ]
            model.update_modules(tree_unflatten([(s.path, w) for s, w in zip(routed, watchers, strict=True)]))
            try:
                for window in self.windows():
                    mx.eval(model(mx.array([window])))
            finally:
                model.update_modules(tree_unflatten([(s.path, modules[s.path]) for s in routed]))
        seen = [watcher._seen for watcher in watchers]
        return Routing([_stack([c for c, _ in layer]) for layer in seen], [_ranked(layer) for layer in seen])

    def output_error(self, variant: Variant, rows: Callable[[np.ndarray], np.ndarray] | None = None) -> float:
        """Relative squared error of the outputs of all sites on sampled calibration inputs, mean over sites; `rows`: of
        inputs [T, D], which count (bool [T]). NaN where none does."""
        errors = []
        for site in self.touched(variant):
            module = self.module(site, variant)
            x = self.statistics[site.path].inputs[site.shapes[0].name][:_SAMPLE]
            experts = self.statistics[site.path].experts[site.shapes[0].name][:_SAMPLE]
            chosen = np.ones(len(x), bool) if rows is None else rows(x)
            if chosen.any():
                inputs = mx.array(x[chosen])
                indices = () if site.shared else (mx.array(experts[chosen].astype(np.uint32))[:, None],)
                wanted, got = (
                    np.array(m(inputs, *indices).astype(mx.float32)) for m in (self._modules[site.path], module)
                )
                errors.append(float(np.square(got - wanted).sum() / max(np.square(wanted).sum(), 1e-30)))
        return float(np.mean(errors)) if errors else float("nan")


def expert_sites_of(source: Source) -> list[Site]:
    """Routed and shared experts of a checkpoint, in the order of the layers. Raises UserError where there are none."""
    sites = [Site(s.path, s.layer, s.num_experts, False, source.shapes[s.path]) for s in source.sites]
    shared: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in source.trunk:
        if tensor.tensor_class == "shared":
            path, _, name = tensor.module.rpartition(".")
            shared.setdefault(path, {})[name] = tensor.shape
    for path, found in shared.items():
        layer = re.search(r"layers\.(\d+)\.", path)
        if layer is not None and set(found) == set(PROJECTIONS["glu"]):
            sizes = [(name, found[name][0], found[name][1]) for name in PROJECTIONS["glu"]]
            shapes = tuple(MatrixShape(name, n, k, choose_group_size(k)) for name, n, k in sizes)
            sites.append(Site(path, int(layer[1]), 1, True, shapes))
    return sorted(sites, key=lambda site: (site.layer, site.shared))  # routed ones first


def _stack(parts: Sequence[mx.array]) -> np.ndarray:
    return np.concatenate([np.array(part).reshape(-1, part.shape[-1]) for part in parts])


def _ranked(layer: Sequence[tuple[mx.array, mx.array | None]]) -> np.ndarray | None:
    known = [scores for _, scores in layer if scores is not None]
    return _stack(known) if len(known) == len(layer) else None


def agreement(first: Routing, second: Routing) -> Agreement:
    """How much of the routing of one model another one keeps."""
    rows: list[tuple[float, float, float, float]] = []
    for chosen, other, ranked, other_ranked in zip(
        first.chosen, second.chosen, first.ranked, second.ranked, strict=True
    ):
        common = (chosen[:, :, None] == other[:, None, :]).any(axis=2).sum(axis=1)
        same, confidence = float("nan"), float("nan")
        if ranked is not None and other_ranked is not None:
            same = float((ranked.argmax(axis=1) == other_ranked.argmax(axis=1)).mean())
            confidence = float(other_ranked.max(axis=1).mean() / ranked.max(axis=1).mean() - 1)
        rows.append(
            (same, float(common.mean() / chosen.shape[1]), float((common < chosen.shape[1]).mean()), confidence)
        )
    return Agreement(*(float(value) for value in np.mean(rows, axis=0)))
