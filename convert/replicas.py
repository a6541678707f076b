"""Rotation ensembles: several low-bit copies of an expert, each rounded in its own way, whose outputs are combined.

The method of the project's chapter on MoE models, kept as a baseline that can be tested at equal bytes (docs/chapter.md has
the outcome). What is the chapter's: the numbers of copies per group, the budgets, the benefit, the combining rules and the
conditions of the conservative mode. What such copies can give: with an MSE-optimal quantizer of relative error D, k
independent copies leave D / (D + k (1 - D)) (`ensemble_error`): less than 3 dB a doubling, where one bit more gives 5 to 6.

Pure functions on numpy arrays. Shapes: C copies, T tokens, N outputs, E experts, F features, R rotations, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from mlxmoe.convert.config import MIX_SHARES, Replication
from mlxmoe.copies import SMALLEST, SPREAD
from mlxmoe.plan import LayerPlan, Selection
from mlxmoe.rotation import Rotation, dense, plain_rotation

COPIES = {"shared": 3, "frequent": 2, "domain": 2, "specialised": 1}
FREQUENT = 0.1  # share of tokens
CONCENTRATED = 0.7  # share of an expert's tokens that one domain has
BUDGET = 0.30
ADAPTIVE = (0.15, 0.45)
STRATEGIES = ("rotation", "activation", "mixed")
POOL = 8  # rotations of which the most different are taken
_SETTLED = 10  # samples below which history says too little
_GROUP_SIZES = (128, 64, 32)


class CopySettings(NamedTuple):
    """How one copy is rounded. shift: of the grid, in steps. clip: of the activations' range."""

    rotation: int = 0  # index of the copy's rotation
    shift: float = 0.0
    stochastic: bool = False
    activation_bits: int = 16
    clip: float = 1.0
    group_size: int = 128


# ---------------------------------------------------------------------------------------------------------------------
# Which rotations
# ---------------------------------------------------------------------------------------------------------------------


def similarity(first: Rotation, second: Rotation) -> float:
    """How near the axes of two rotations are: the mean over axes of one of the largest |cosine| with an axis of the other.

    1 for rotations that differ by the order and the signs of their outputs, which a symmetric quantizer rounds alike; the
    trace of R1 R2' would call those different.
    """
    return float(np.abs(dense(first) @ dense(second).T).max(axis=1).mean())


def similarity_matrix(rotations: Sequence[Rotation]) -> np.ndarray:
    """float64 [R, R], symmetric: the mean of `similarity` both ways."""
    one_way = np.array([[similarity(a, b) for b in rotations] for a in rotations])
    return (one_way + one_way.T) / 2


def most_different(similarities: np.ndarray, count: int, first: int | None = None) -> list[int]:
    """Indices of `count` rotations of a similarity matrix [R, R]: the least similar pair (or one that is given), then
    greedily the one with the largest sum of angles arccos(similarity) to those chosen. One rotation is the first. Ties go
    to the lower index."""
    assert 1 <= count <= len(similarities)
    if count == 1:
        return [first or 0]
    angles = np.arccos(np.clip(similarities, -1, 1))
    upper = np.triu(angles, 1)
    pair = [int(i) for i in np.unravel_index(int(np.argmax(upper)), upper.shape)]
    chosen = pair if first is None else [first]
    while len(chosen) < count:
        sums = angles[:, chosen].sum(axis=1)
        sums[chosen] = -np.inf
        chosen.append(int(np.argmax(sums)))
    return chosen


def copy_settings(count: int, strategy: str) -> list[CopySettings]:
    """Settings that progress from copy to copy. rotation: other rotations, grids shifted by 1/count of a step. activation:
    one rotation, other clips and group sizes. mixed: all, and stochastic rounding behind the first copy.

    The first copy has 8-bit activations and rounds to nearest, as the chapter has it.
    """
    assert strategy in STRATEGIES
    settings = []
    for i in range(count):
        turned = strategy != "activation"
        settings.append(
            CopySettings(
                rotation=i if turned else 0,
                shift=i / count if turned else 0.0,
                stochastic=strategy == "mixed" and i > 0,
                activation_bits=8 if i == 0 else 16,
                clip=1.0 if strategy == "rotation" else 1.0 - 0.05 * i,
                group_size=128 if strategy == "rotation" else _GROUP_SIZES[min(i, 2)],
            )
        )
    return settings


@cache
def copy_seeds(name: str, columns: int, count: int, seed: int) -> tuple[int, ...]:
    """Seeds of the rotations of `count` copies, by a name of SEEDED: `seed`, and of the POOL seeds from it on those that are
    most different from it and from each other."""
    pool = [plain_rotation(name, columns, seed + i) for i in range(POOL)]
    return tuple(seed + i for i in most_different(similarity_matrix(pool), count, first=0))


# ---------------------------------------------------------------------------------------------------------------------
# Which experts
# ---------------------------------------------------------------------------------------------------------------------


def group(frequency: float, concentration: float, shared: bool = False) -> str:
    """The chapter's group of an expert: shared; frequent (chosen by more than FREQUENT of all tokens); domain (more than
    CONCENTRATED of its tokens from one domain); else specialised."""
    if shared:
        return "shared"
    if frequency > FREQUENT:
        return "frequent"
    return "domain" if concentration > CONCENTRATED else "specialised"


def sensitivity(
    output: np.ndarray, gradient: np.ndarray, frequency: np.ndarray, shares: Sequence[float] = MIX_SHARES
) -> np.ndarray:
    """[E]: by default 50 % output error, 30 % gradient, 20 % frequency, each scaled to a largest value of 1."""
    parts = (output, gradient, frequency)
    return sum((share * _to_one(part) for share, part in zip(shares, parts, strict=True)), np.zeros(len(output)))


def _to_one(values: np.ndarray) -> np.ndarray:
    largest = float(np.max(values, initial=0.0))
    return values / largest if largest > 0 else np.zeros(len(values))


def benefit(sensitivities: np.ndarray, frequency: np.ndarray, massive: np.ndarray) -> np.ndarray:
    """[E]: sensitivity * frequency * (1 + massive-activation ratio)."""
    return sensitivities * frequency * (1 + massive)


def choose_replicated(scores: np.ndarray, budget: float) -> np.ndarray:
    """bool [E]: the floor(budget * E) experts of the highest scores; ties go to the lower index."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[: int(budget * len(scores) + 1e-9)]] = True
    return chosen


def adaptive_budgets(
    layer_scores: np.ndarray, mean: float = BUDGET, limits: tuple[float, float] = ADAPTIVE
) -> np.ndarray:
    """float64 [layers]: a share for every layer, in proportion to its score within the limits, of the given mean.

    clip(lambda * score, low, high) with lambda by bisection; the mean is met unless the scores of 0 do not allow it.
    """
    low, high = limits
    assert low <= mean <= high
    bottom, top = 0.0, 1e12 / max(float(layer_scores.max(initial=0.0)), 1e-300)
    for _ in range(200):
        middle = (bottom + top) / 2
        if np.clip(middle * layer_scores, low, high).mean() < mean:
            bottom = middle
        else:
            top = middle
    return np.clip(top * layer_scores, low, high)


def copies_per_expert(how: Replication, scores: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """int [E] of each layer: how many copies its experts get. scores: [E] of each layer, what quantizing an expert costs;
    all 0 where nothing is measured yet: then as many experts as there can be."""
    layers = np.array([float(layer.sum()) for layer in scores])
    shares = np.full(len(scores), how.share)
    if how.by == "adaptive":
        low, high = min(ADAPTIVE[0], how.share), max(ADAPTIVE[1], how.share)
        shares = adaptive_budgets(layers, how.share, (low, high)) if layers.any() else np.full(len(scores), high)
    if how.by == "random":
        random = np.random.default_rng(seed)
        scores = [random.permutation(len(layer)).astype(np.float64) for layer in scores]
    return [
        1 + (how.copies - 1) * choose_replicated(layer, float(share)).astype(int)
        for layer, share in zip(scores, shares, strict=True)
    ]


def ensemble_error(error: float, copies: int) -> float:
    """Relative squared error of the best multiple of the mean of k independent copies of relative error D each, by an
    MSE-optimal quantizer, w^ = (1-D) w + n with var n = D (1-D): D / (D + k (1-D))."""
    return error / (error + copies * (1 - error))


# ---------------------------------------------------------------------------------------------------------------------
# How outputs are combined
# ---------------------------------------------------------------------------------------------------------------------


def mean_weights(copies: int) -> np.ndarray:
    """float64 [C]: 1/C each."""
    return np.full(copies, 1 / copies)


def variance_weights(variances: np.ndarray) -> np.ndarray:
    """float64 [C]: 1/variance, summing to 1: the least variance of a sum of independent errors. Copies without any share
    all of the weight."""
    exact = variances <= 0
    if exact.any():
        return exact / exact.sum()
    inverse = 1 / variances
    return inverse / inverse.sum()


def output_weights(how: Replication, layer: LayerPlan) -> list[list[float]]:
    """[C][E]: what the outputs of a written layer's copies count, to four digits. `learned` ones are in the plan already."""
    assert layer.replicas is not None
    count = layer.num_matrices
    weights = np.zeros((len(layer.copy_rotations), len(layer.experts)))
    for e, entry in enumerate(layer.experts):
        starts = range(0, layer.num_copies(e) * count, count)
        errors = np.array([sum(levels[-1] for levels in entry.errors[i : i + count]) for i in starts])
        if how.combine == "learned":
            found = np.array([row[e] for row in layer.replicas.weights[: len(errors)]])
        else:
            found = variance_weights(errors) if how.combine == "variance" else mean_weights(len(errors))
        weights[: len(errors), e] = found
    return [[float(f"{weight:.4g}") for weight in row] for row in weights]


def learned_weights(outputs: np.ndarray, target: np.ndarray, ridge: float = 1e-6) -> np.ndarray:
    """float64 [C]: least squares for target [T, N] by outputs [C, T, N] on calibration data. Need not sum to 1.

    ridge: share of the mean square of the outputs, towards the mean of the copies.
    """
    flat = outputs.reshape(len(outputs), -1).astype(np.float64)
    gram, right = flat @ flat.T, flat @ target.reshape(-1).astype(np.float64)
    damping = ridge * np.trace(gram) / len(outputs) + 1e-30
    return np.linalg.solve(gram + damping * np.eye(len(outputs)), right + damping * mean_weights(len(outputs)))


def combine(outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum over copies of weights [C] or [C, T] * outputs [C, T, N] -> [T, N]."""
    return np.einsum("ctn,ct->tn", outputs, np.broadcast_to(weights.reshape(len(outputs), -1), outputs.shape[:2]))


def error_lines(norms: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """float64 [2, C]: slope and intercept of the line that the logarithm of every copy's squared error [C, T] follows over
    log |x|, norms [T], by least squares on calibration inputs. By them `copies.Selector` chooses."""
    columns = np.stack([np.log(norms + SMALLEST), np.ones(len(norms))], axis=1)
    floor = 1e-12 * float(errors.mean()) + 1e-300
    return np.linalg.lstsq(columns, np.log(errors.T + floor), rcond=None)[0]


def fit_selection(
    norms: np.ndarray, experts: np.ndarray, errors: np.ndarray, copies: np.ndarray, careful: bool
) -> Selection:
    """The choice among the copies of a layer's experts, by calibration inputs of norms [n], the expert [n] of each, and the
    squared error [C, n] that each copy has there. copies int [E]: how many each expert has, 1 or C. An expert with fewer
    than _SETTLED inputs goes by those of all. careful: with the conservative mode."""
    several = np.flatnonzero(copies == len(errors))
    lines = np.zeros((2, len(errors), len(copies)))
    rows = np.isin(experts, several)
    if rows.any():
        lines[:, :, several] = error_lines(norms[rows], errors[:, rows])[..., None]
    usual = np.zeros(len(copies))
    for e in several:
        rows = experts == e
        if rows.sum() >= _SETTLED:
            lines[:, :, e] = error_lines(norms[rows], errors[:, rows])
        usual[e] = usual_norm(norms[rows])
    slopes, intercepts = (tuple(map(tuple, rows.tolist())) for rows in lines)
    return Selection(slopes, intercepts, tuple(usual.tolist()) if careful else None)


def vote(scores: np.ndarray) -> np.ndarray:
    """int [T]: the class that most copies put first, of scores [C, T, N]. Among classes with equally many votes the one of
    the largest sum of scores. For outputs that are a choice; a mean serves those that are values."""
    _, tokens, classes = scores.shape
    votes = np.zeros((tokens, classes), np.int64)
    np.add.at(votes, (np.arange(tokens)[None], scores.argmax(axis=2)), 1)
    tied = votes == votes.max(axis=1, keepdims=True)
    return np.where(tied, scores.sum(axis=0), -np.inf).argmax(axis=1)


def conservative(norms: np.ndarray, known_domain: bool) -> bool:
    """Whether to run with all copies and equal weights: fewer than 10 inputs seen, an unknown domain, or norms [T] of the
    inputs seen whose standard deviation exceeds half their mean."""
    return len(norms) < _SETTLED or not known_domain or bool(np.std(norms) > SPREAD * np.mean(norms))


def usual_norm(norms: np.ndarray) -> float:
    """For `copies.Selector`: the mean of the norms [T] of an expert's inputs, 0 where they call for the conservative mode.
    A single input has no standard deviation: it is taken by its distance to this mean, half of which is again the limit."""
    return 0.0 if conservative(norms, known_domain=True) else float(norms.mean())


def runtime_weights(weights: np.ndarray, norms: np.ndarray, known_domain: bool) -> np.ndarray:
    """[C]: `weights`, or the mean in conservative mode."""
    return mean_weights(len(weights)) if conservative(norms, known_domain) else weights
