"""Which score of an expert says what quantizing it costs: `mlxmoe bench sensitivity MODEL --text F... --calibration F`.

Single experts, and single matrices of them, are quantized alone by the converter's own quantizer; the KL divergence of the
whole model is measured with only that changed, exactly and on the same tokens (convert/changes.py). Every score is computed
on calibration text and ranked against it. docs/quantization.md has the outcome: the converter's default is chosen by it.

    fisher       the loss that the converter minimises and adds up (convert/stats.py)
    fisher*layer the same, scaled to what the other sampled items of the layer cost
    fisher-token the same with the gradient of every token at all outputs: sum_t (g_t . dW x_t)^2 / 2T, no diagonal
    diagonal     sum over weights of their squared gradients * dW^2 / 2
    taylor       |sum_t g_t . dW x_t| / T: the first order
    output       squared error of the expert's gate-weighted output
    weight       squared error of the weights
    frequency    share of the tokens; frequency*error: times the relative squared error of the weights
    mix          50 % relative output error, 30 % loss, 20 % frequency (the chapter's 7.2.2); mix*error likewise
    reap         mean over its tokens of gate * ||output||; contribution: mean over all tokens
    removal      measured loss without the expert; contribution*removal: the chapter's dynamic importance
    ablation     contribution * loss without the expert to second order, times the relative error: the converter's

g is the gradient of the log-probability of a token drawn by the model, whose mean is zero: the first order is noise then.
For a whole expert the scores of its matrices are added up.

Shapes: E experts, P projections, N rows and K columns of a matrix, T tokens, n items.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mlxmoe.arguments import print_json
from mlxmoe.bench.arguments import add_size_arguments, add_study_arguments
from mlxmoe.bench.ranking import Correlation, correlation, kendall, spearman
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.calibrate import Calibration, choose_tokens, file_sha256, read_documents
from mlxmoe.convert.calibrated import measure_experts
from mlxmoe.convert.changes import Change, divergences, num_steps
from mlxmoe.convert.config import MIX_SHARES, SEEDS
from mlxmoe.convert.measure import ExpertErrors, ExpertScores
from mlxmoe.convert.scores import Observed, Scoring, observe
from mlxmoe.convert.sensitivity import importance, mixed
from mlxmoe.convert.source import Source
from mlxmoe.convert.stats import Accumulator, Moments
from mlxmoe.convert.stream import LayerStream, Record
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError
from mlxmoe.formats import WRITTEN_LEVELS
from mlxmoe.models import ExpertSite

_KEPT_ROWS = 2048  # of every sampled matrix, for the scores that need single tokens


@dataclass(frozen=True)
class SensitivityConfig:
    """experts: sampled ones. levels: they are quantized at. Tokens of calibration and of the text, in windows."""

    experts: int = 64
    levels: tuple[int, ...] = (2,)
    max_tokens: int = 4096
    calibration_tokens: int = 16384
    window: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 4:
            raise UserError(f"--experts {self.experts} are too few to rank", "64 is the default")
        if not self.levels or set(self.levels) - set(WRITTEN_LEVELS):
            listed, known = (", ".join(map(str, levels)) for levels in (self.levels, WRITTEN_LEVELS))
            raise UserError(f"the levels {listed} are not all among {known}", "try --level 2,3")
        if self.window < 2:
            raise UserError(f"a window of {self.window} tokens predicts nothing", "256 is the default")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"--seed {self.seed} is not between 0 and {SEEDS - 1}", "0 is the default")
        if min(self.max_tokens, self.calibration_tokens) < self.window:
            raise UserError(f"a window takes {self.window} tokens", "raise --max-tokens and --calibration-tokens")


class Item(NamedTuple):
    """What is quantized alone: an expert of the layer at this place, all its projections or one of them, at a level."""

    layer: int
    expert: int
    projections: tuple[int, ...]
    level: int


class Measurement(NamedTuple):
    """Of one item: its scores by name, and the divergence in nats per token with its standard error over windows."""

    item: Item
    scores: dict[str, float]
    kld: float
    stderr: float


# ---------------------------------------------------------------------------------------------------------------------
# Scores, on calibration text
# ---------------------------------------------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """The experts of layer i that are measured: their quantized values [sample, N, K] by (projection, place of the
    level), what was measured of all experts of the layer at every level, and scores from single tokens by name: of matrices
    [P, sample, levels] and of whole experts [1, sample, levels]."""

    i: int
    site: ExpertSite
    experts: np.ndarray
    values: dict[tuple[int, int], np.ndarray]
    layer: ExpertErrors
    single: dict[str, np.ndarray]
    whole: dict[str, np.ndarray]


class _Rows:
    """Inputs and gradients of single tokens for the sampled experts of one projection."""

    def __init__(self, experts: np.ndarray):
        self._experts = experts
        self._parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in experts]

    def add(self, record: Record) -> None:
        assert record.experts is not None
        for k, e in enumerate(self._experts):
            left = _KEPT_ROWS - sum(len(x) for x, _ in self._parts[k])
            rows = np.flatnonzero(record.experts == e)[:left]
            self._parts[k].append((record.inputs[rows], record.gradients[rows]))

    def first_orders(self, difference: np.ndarray) -> list[np.ndarray]:
        """g_t . dW x_t of every kept token, for each sampled expert of difference [sample, N, K]."""
        parts = [self._of(k) for k in range(len(difference))]
        return [((x @ d.T) * g).sum(axis=1, dtype=np.float64) for (x, g), d in zip(parts, difference, strict=True)]

    def diagonals(self, difference: np.ndarray) -> np.ndarray:
        """[sample]: sum over tokens and weights of squared gradient * dW^2."""
        parts = [self._of(k) for k in range(len(difference))]
        found = [np.vdot(np.square(g).T @ np.square(x), d**2) for (x, g), d in zip(parts, difference, strict=True)]
        return np.array(found, np.float64)

    def counts(self) -> np.ndarray:
        return np.array([len(self._of(k)[0]) for k in range(len(self._parts))])

    def _of(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, gradients = (np.concatenate(column) for column in zip(*self._parts[k], strict=True))
        return inputs, gradients


def stratified(tokens: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of `count` experts, from the rarest to the most frequent in even steps."""
    places = np.linspace(0, len(tokens) - 1, min(count, len(tokens)))
    return np.sort(np.argsort(tokens, kind="stable")[np.rint(places).astype(np.int64)])


def sample_layers(
    source: Source, walk: Walk, config: SensitivityConfig, step: Callable[[int], object]
) -> list[Sampled]:
    """Forward and backward over the original model: scores and quantized values of sampled experts, first layer first."""
    stream, last = walk.stream, len(walk.stream.layers)
    sites = {i: s for s in source.sites for i in range(last) if s.path.startswith(stream.path(i) + ".")}
    shares = np.diff(np.linspace(0, config.experts, len(sites) + 1).round().astype(int))
    quota = dict(zip(sorted(sites), shares, strict=True))
    walk.embed("hidden")
    for i in range(last):
        with stream.loaded(i):
            walk.advance(i, "hidden")
        step(1)
    with walk.spill("gradient", last) as write:
        for rows in walk.batches():
            seed = (config.seed << 32) + rows.start
            write(rows, stream.sample(walk.batch(rows), walk.read("hidden", last, rows), [], seed).gradient)
    found = []
    for i in reversed(range(last)):
        with stream.loaded(i):
            found += _sample_layer(source, walk, i, sites.get(i), int(quota.get(i, 0)), config)
        step(1)
    return found[::-1]


def _sample_layer(
    source: Source, walk: Walk, i: int, site: ExpertSite | None, count: int, config: SensitivityConfig
) -> list[Sampled]:
    """Backward through a loaded layer; nothing for a layer without experts or without a share of the sample."""
    sampling = site is not None and count > 0
    paths = [f"{site.path}.{shape.name}" for shape in source.shapes[site.path]] if site and sampling else []
    sums = {path: Accumulator(path, site.num_experts) for path in paths if site}
    observed = observe(walk, i, "hidden", site) if site and sampling else None
    experts = stratified(observed.tokens, count) if observed else np.zeros(0, np.int64)
    kept = {path: _Rows(experts) for path in paths}
    with walk.spill("gradient", i) as write:
        for rows in walk.batches():
            hidden, gradient = walk.read("hidden", i, rows), walk.read("gradient", i + 1, rows)
            done = walk.stream.differentiate(i, walk.batch(rows), hidden, gradient, paths)
            for path in paths:
                sums[path].add(done.records[path], walk.batch(rows).size)
                kept[path].add(done.records[path])
            write(rows, done.gradient)
    if site is None or observed is None:
        return []
    moments = [sums[path].moments() for path in paths]
    return [_score(source, walk.stream, i, site, experts, moments, observed, list(kept.values()), config.levels)]


def _score(
    source: Source,
    stream: LayerStream,
    i: int,
    site: ExpertSite,
    experts: np.ndarray,
    moments: Sequence[Moments],
    observed: Observed,
    kept: Sequence[_Rows],
    levels: tuple[int, ...],
) -> Sampled:
    """Quantizes the experts of a loaded layer, all of them, and keeps the sampled ones."""
    shapes = source.shapes[site.path]
    scoring = Scoring(stream.module(site.path), observed, len(shapes), len(levels))
    values = {(p, j): np.empty((len(experts), s.rows, s.columns), np.float32)
              for p, s in enumerate(shapes) for j in range(len(levels))}  # fmt: skip
    weighed, stacks = [], []
    for p, shape in enumerate(shapes):
        stack = stream.weight(f"{site.path}.{shape.name}.weight")
        take = scoring.seen(p, shape.name, stack)

        def seen(part: slice, j: int, found: np.ndarray, p: int = p, take: Any = take) -> None:
            inside = np.flatnonzero((experts >= part.start) & (experts < part.stop))
            values[p, j][inside] = found[experts[inside] - part.start]
            take(part, j, found)

        weighed.append(measure_experts(stack, moments[p], levels, shape.group_size, seen=seen))
        stacks.append(stack[experts])
    norms, errors = (np.stack([getattr(w, field) for w in weighed]) for field in ("norms", "errors"))
    layer = ExpertErrors(norms, errors, norms, scoring.scores())
    differences = {(p, j): value - stacks[p] for (p, j), value in values.items()}
    single, whole = _by_tokens(differences, kept, observed, experts, len(levels))
    return Sampled(i, site, experts, values, layer, single, whole)


def _by_tokens(
    differences: Mapping[tuple[int, int], np.ndarray],
    kept: Sequence[_Rows],
    observed: Observed,
    experts: np.ndarray,
    num_levels: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores that need the gradients of single tokens: of matrices [P, sample, levels], and of whole experts [1, ...]."""
    names, projections = ("taylor", "fisher-token", "diagonal"), len(kept)
    single = {name: np.zeros((projections, len(experts), num_levels)) for name in names}
    whole = {name: np.zeros((1, len(experts), num_levels)) for name in names}
    share = observed.tokens[experts] / np.maximum(kept[0].counts(), 1) / observed.total_tokens  # of a kept token
    for j in range(num_levels):
        orders = [kept[p].first_orders(differences[p, j]) for p in range(projections)]
        for p in range(projections):
            single["taylor"][p, :, j] = [abs(s.sum()) for s in orders[p]] * share
            single["fisher-token"][p, :, j] = [s @ s / 2 for s in orders[p]] * share
            single["diagonal"][p, :, j] = kept[p].diagonals(differences[p, j]) / 2 * share
        together = [np.sum(parts, axis=0) for parts in zip(*orders, strict=True)]
        whole["taylor"][0, :, j] = [abs(s.sum()) for s in together] * share
        whole["fisher-token"][0, :, j] = [s @ s / 2 for s in together] * share
        whole["diagonal"][0, :, j] = single["diagonal"][:, :, j].sum(axis=0)
    return single, whole


def score_table(samples: Sequence[Sampled], num_levels: int, whole: bool) -> list[dict[str, np.ndarray]]:
    """All scores by name for the sampled experts of every layer: [P, sample, levels] of matrices, or [1, ...] of experts."""
    layers = [each.layer for each in samples]
    at_level = [
        [layer._replace(errors=layer.errors[..., j:], scores=_from_level(layer, j)) for layer in layers]
        for j in range(num_levels)
    ]
    mixes = [mixed(MIX_SHARES, level, whole) for level in at_level]  # [levels][layers] of [P or 1, E]
    tables = []
    for n, (sample, layer) in enumerate(zip(samples, layers, strict=True)):
        scores = layer.scores
        assert scores is not None
        found = {"fisher": layer.errors, "output": scores.output, "weight": scores.weight}
        error = scores.relative
        for name, factor in (("frequency", scores.frequency), ("ablation", importance(layer))):
            found["frequency*error" if name == "frequency" else name] = factor[:, None] * error
        if whole:
            found = {name: values.sum(axis=0, keepdims=True) for name, values in found.items()}
            error = error.mean(axis=0, keepdims=True)
        mix = np.stack([level[n] for level in mixes], axis=-1)
        found |= {"mix": mix, "mix*error": mix * error}
        of_experts = {
            "frequency": scores.frequency,
            "contribution": scores.contribution,
            "reap": scores.contribution / np.maximum(scores.frequency, 1e-30),
        }
        found |= {name: np.broadcast_to(values[:, None], error.shape) for name, values in of_experts.items()}
        chosen = {name: values[:, sample.experts] for name, values in found.items()}
        tables.append(chosen | (sample.whole if whole else sample.single))
    return tables


def _from_level(layer: ExpertErrors, j: int) -> ExpertScores:
    assert layer.scores is not None
    return layer.scores._replace(output=layer.scores.output[..., j:])


# ---------------------------------------------------------------------------------------------------------------------
# Divergences, on the text
# ---------------------------------------------------------------------------------------------------------------------


def planned(samples: Sequence[Sampled], levels: Sequence[int]) -> list[Item]:
    """For every sampled expert and level: all its projections, and one of them, each projection equally often. For every
    expert its removal: level 0."""
    items, turn = [], 0
    for sample in samples:
        count = len(sample.layer.norms)
        for e in map(int, sample.experts):
            items.append(Item(sample.i, e, (count - 1,), 0))
            for level in levels:
                items += [Item(sample.i, e, tuple(range(count)), level), Item(sample.i, e, (turn % count,), level)]
            turn += 1
    return items


def _weights(
    sample: Sampled, names: Sequence[str], item: Item, levels: Sequence[int], stream: LayerStream
) -> dict[str, np.ndarray]:
    """The weights of an item's layer with the item quantized, or (level 0) its matrix removed."""
    place = int(np.flatnonzero(sample.experts == item.expert)[0])
    result = {}
    for p in item.projections:
        name = f"{sample.site.path}.{names[p]}.weight"
        stack = stream.weight(name)
        stack[item.expert] = sample.values[p, levels.index(item.level)][place] if item.level else 0.0
        result[name] = stack
    return result


def measure(
    source: Source, samples: Sequence[Sampled], walk: Walk, levels: tuple[int, ...], quiet: bool
) -> list[Measurement]:
    """Divergences of all items beside their scores. The removals come in as scores of the others."""
    by_layer = {sample.i: sample for sample in samples}
    items = planned(samples, levels)
    changes = []
    for item in items:
        sample = by_layer[item.layer]
        names = [shape.name for shape in source.shapes[sample.site.path]]
        changes.append(Change(item.layer, partial(_weights, sample, names, item, levels)))
    with tqdm(total=num_steps(walk, changes), unit=" steps", desc="divergences", disable=quiet) as bar:
        found = divergences(walk, changes, bar.update).astype(np.float64).mean(axis=2)  # [items, windows]
    klds, stderrs = found.mean(axis=1), found.std(axis=1, ddof=1) / np.sqrt(found.shape[1])
    removals = {(item.layer, item.expert): kld for item, kld in zip(items, klds, strict=True) if not item.level}
    single, whole = (score_table(samples, len(levels), flag) for flag in (False, True))
    result = []
    for item, kld, stderr in zip(items, klds, stderrs, strict=True):
        if item.level:
            n = list(by_layer).index(item.layer)
            sample = samples[n]
            place, j = int(np.flatnonzero(sample.experts == item.expert)[0]), levels.index(item.level)
            p, table = (item.projections[0], single[n]) if len(item.projections) == 1 else (0, whole[n])
            scores = {name: float(values[p, place, j]) for name, values in table.items()}
            removal = float(removals[item.layer, item.expert])
            scores |= {"removal": removal, "contribution*removal": scores["contribution"] * removal}
            result.append(Measurement(item, scores, float(kld), float(stderr)))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """How one score ranks items of one kind at one level: over all layers, and the mean of its ranking within each layer."""

    score: str
    spearman: Correlation
    kendall: Correlation
    within: Correlation


class Group(NamedTuple):
    """Items of one kind at one level: how many there are, how many of their divergences exceed twice their standard error,
    the median divergence, the median of loss over divergence by layer, and the rankings, best first."""

    kind: str
    level: int
    items: int
    clear: int
    median: float
    ratios: dict[int, float]
    rankings: list[Ranking]


def summarise(measurements: Sequence[Measurement]) -> list[Group]:
    """One group for every level and kind, with the loss scaled by layers as one more score."""
    groups = []
    for level in sorted({m.item.level for m in measurements}):
        for kind in ("experts", "matrices"):
            chosen = [
                m
                for m in measurements
                if m.item.level == level and (len(m.item.projections) == 1) == (kind == "matrices")
            ]
            kld, noise = (np.array([getattr(m, field) for m in chosen]) for field in ("kld", "stderr"))
            layers = np.array([m.item.layer for m in chosen])
            scores = {name: np.array([m.scores[name] for m in chosen]) for name in chosen[0].scores}
            scores["fisher*layer"] = scaled_by_layer(scores["fisher"], kld, layers)
            rankings = [_ranking(name, score, kld, layers) for name, score in scores.items()]
            rankings.sort(key=lambda r: -r.spearman.value)
            quotients = scores["fisher"] / np.maximum(kld, 1e-30)
            ratios = {int(n): float(np.median(quotients[layers == n])) for n in np.unique(layers)}
            clear = int((kld > 2 * noise).sum())
            groups.append(Group(kind, level, len(chosen), clear, float(np.median(kld)), ratios, rankings))
    return groups


def scaled_by_layer(loss: np.ndarray, kld: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Losses [n] times what the other items of their layer cost for their losses: divergences over losses, this item left
    out."""
    same = layers[:, None] == layers[None]
    others = same & ~np.eye(len(loss), dtype=bool)
    return loss * (others @ kld) / np.maximum(others @ loss, 1e-300)


def _ranking(name: str, score: np.ndarray, kld: np.ndarray, layers: np.ndarray) -> Ranking:
    parts = [np.flatnonzero(layers == n) for n in np.unique(layers)]

    def within(x: np.ndarray, y: np.ndarray) -> float:
        """Of values in the order of the parts."""
        ends = np.cumsum([len(part) for part in parts])[:-1]
        pairs = zip(np.split(x, ends), np.split(y, ends), strict=True)
        return float(np.mean([spearman(a, b) for a, b in pairs]))

    ordered = np.concatenate(parts)
    inside = correlation(within, score[ordered], kld[ordered], [len(part) for part in parts])
    return Ranking(name, correlation(spearman, score, kld), correlation(kendall, score, kld), inside)


def report_lines(groups: Sequence[Group]) -> list[str]:
    """A table of Markdown for each group."""
    lines = []
    for g in groups:
        ratios = ", ".join(f"{ratio:.2f} ({layer})" for layer, ratio in g.ratios.items())
        lines += [
            f"{g.items} {g.kind} alone at {g.level} bits: median KLD {g.median:.3g}, {g.clear} of them above twice their "
            f"standard error; loss / KLD, median by layer: {ratios}",
            "",
            "| score | Spearman (95 %) | Kendall (95 %) | Spearman within layers (95 %) |",
            "|---|---|---|---|",
            *(f"| {r.score} | {_interval(r.spearman)} | {_interval(r.kendall)} | {_interval(r.within)} |"
              for r in g.rankings),
            "",
        ]  # fmt: skip
    return lines


def _interval(c: Correlation) -> str:
    return f"{c.value:.2f} ({c.low:.2f} to {c.high:.2f})"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def read_tokens(paths: Sequence[str], tokenizer: Any, max_tokens: int, window: int, seed: int) -> np.ndarray:
    """int32 [windows, window]: an even share of every text. Raises UserError for text that is unreadable or too short."""
    share, parts = max(window, max_tokens // len(paths)), []
    for path in paths:
        each = Calibration(path, tokens=share, window=window)
        parts.append(choose_tokens(read_documents(path, tokenizer), tokenizer, each, seed))
    return np.concatenate(parts)


def bench(
    model: str | Path, texts: Sequence[str], calibration: str, config: SensitivityConfig, quiet: bool = False
) -> list[Measurement]:
    """Scores and divergences of the sampled experts of an unconverted checkpoint. Hidden states go to a temporary folder."""
    checkpoint = open_checkpoint(model)
    source = Source(checkpoint, 128)
    tokenizer = read_tokenizer(checkpoint)
    sizes = config.window, config.seed
    scored = read_tokens(texts, tokenizer, config.max_tokens, *sizes)
    if len(scored) < 2:
        raise UserError(
            f"the text gives one window of {config.window} tokens, and standard errors want two",
            "give a longer text, raise --max-tokens, or lower --window",
        )
    seen = read_tokens([calibration], tokenizer, config.calibration_tokens, *sizes)
    stream = LayerStream(source)
    with tempfile.TemporaryDirectory(prefix="mlxmoe-sensitivity-") as folder:
        with tqdm(total=2 * len(stream.layers), unit=" layers", desc="scores", disable=quiet) as bar:
            samples = sample_layers(source, Walk(stream, seen, Path(folder)), config, bar.update)
        return measure(source, samples, Walk(stream, scored, Path(folder)), config.levels, quiet)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config = SensitivityConfig()
    add_study_arguments(parser)
    add_size_arguments(parser, config.max_tokens, config.calibration_tokens, config.window)
    parser.add_argument(
        "--experts", type=int, default=config.experts, metavar="N",
        help="experts that are quantized, spread over layers, rare to frequent (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--level", default=",".join(map(str, config.levels)), metavar="LIST",
        help="bits that they are quantized to, such as 2,3 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=config.seed, help="of the choice of text (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    try:
        levels = tuple(sorted({int(text) for text in args.level.split(",")}))
    except ValueError:
        raise UserError(f"--level {args.level!r} is no list of numbers", "example: --level 2,3") from None
    config = SensitivityConfig(args.experts, levels, args.max_tokens, args.calibration_tokens, args.window, args.seed)
    digest = file_sha256(args.calibration)
    measurements = bench(args.model, args.text, args.calibration, config)
    groups = summarise(measurements)
    print("\n".join(report_lines(groups)))
    if args.json:
        print_json({
            "settings": {**asdict(config), "model": str(args.model), "texts": args.text, "calibration_sha256": digest},
            "groups": [_plain(group) for group in groups],
            "measurements": [{**m.item._asdict(), "kld": m.kld, "stderr": m.stderr, **m.scores} for m in measurements],
        })  # fmt: skip
    return 0


def _plain(group: Group) -> dict[str, Any]:
    return {**group._asdict(), "rankings": [ranking._asdict() for ranking in group.rankings]}
