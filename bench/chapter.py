"""The tables of the project's chapter on low-bit MoE models, measured again: `python -m mlxmoe.bench.chapter MODEL`.

The chapter reports rotations, replicas and quantizer parameters for a 2-bit model that was never published. Here each of
its tables is made on a checkpoint that is there, every row with its bytes, and beside every ensemble one copy of as many
bytes: c copies of 2 bits against one code of 2c bits, which is what the planes of formats.py hold. A claim "held" if the
measured numbers order as it says, "did not hold" if they do not, and is "not testable here" where what it is about is not
there. docs/chapter.md has the outcome and the reasons.

Only expert weights are coded (routed and shared); the rest of the model stays as it is. Perplexity is what the chapter
has; claims are judged by the KL divergence from the original, which is less noisy.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mlxmoe import __version__
from mlxmoe.arguments import note, print_json
from mlxmoe.bench.arguments import add_study_arguments
from mlxmoe.bench.simulate import Recipe, Score, Simulation, Site, Variant, agreement, progressing
from mlxmoe.bench.stats import identity
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.cli import main
from mlxmoe.convert.calibrate import file_sha256
from mlxmoe.convert.config import COMBINED_BY
from mlxmoe.convert.gptq import output_errors
from mlxmoe.convert.replicas import (
    BUDGET,
    COPIES,
    STRATEGIES,
    adaptive_budgets,
    benefit,
    choose_replicated,
    group,
    sensitivity,
    vote,
)
from mlxmoe.convert.rotate import choose_rotation, massive_tokens
from mlxmoe.errors import UserError
from mlxmoe.evaluate import read_text
from mlxmoe.formats import choose_group_size
from mlxmoe.parts import NOT_KEPT, Parts, kept_parts
from mlxmoe.rotation import fits
from mlxmoe.work import write_whole

Value = str | int | float
Copies = Mapping[str, np.ndarray]  # path of a site -> copies of each expert
_SAME_BYTES = {1: 2, 2: 4, 3: 6}  # copies of 2 bits -> bits of one code that is no larger
_TOP, _BOTTOM = 0.8, 0.2  # of the experts by frequency: above is frequent, below is rare


@dataclass(frozen=True)
class ChapterConfig:
    """Tokens scored and tokens of calibration."""

    max_tokens: int = 4096
    calibration_tokens: int = 8192
    window: int = 256

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UserError(f"a window of {self.window} tokens predicts nothing", "256 is the default")
        for name in ("max_tokens", "calibration_tokens"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {getattr(self, name)}, expected 1 or more", f"leave {flag} out")


QUICK = ChapterConfig(max_tokens=64, calibration_tokens=128, window=32)


class Claim(NamedTuple):
    """What the chapter says, whether it held, and the numbers that say so."""

    text: str
    verdict: str
    evidence: str


class Table(NamedTuple):
    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Value, ...]]
    claims: list[Claim]


def claim(text: str, holds: bool | None, evidence: str) -> Claim:
    """holds None: not testable here."""
    verdict = "not testable here" if holds is None else "held" if holds else "did not hold"
    return Claim(text, verdict, evidence)


def falls(text: str, *scores: Score) -> Claim:
    """Held if the KLD of each score is below that of the one before."""
    return claim(text, all(after.kld < before.kld for before, after in pairwise(scores)), kld(*scores))


def kld(*scores: Score) -> str:
    """The numbers of rows, for people."""
    return "KLD " + ", ".join(f"{score.name} {score.kld:.4f}" for score in scores)


def ppl(*scores: Score) -> str:
    return "PPL " + ", ".join(f"{score.name} {score.ppl:.3f}" for score in scores)


class Bench:
    """Scores of variants by name, each measured once: several tables have the same rows. Shows progress on stderr."""

    def __init__(self, simulation: Simulation, bar: tqdm | None = None):
        self.simulation, self._bar = simulation, bar
        self._scores: dict[str, Score] = {}

    def fits(self, rotation: str) -> bool:
        """Whether a rotation can be had for every matrix of the experts."""
        return all(fits(rotation, shape.columns) for site in self.simulation.sites for shape in site.shapes)

    def first(self, *rotations: str) -> str:
        """The first that fits; a random orthogonal one where none does."""
        return next((rotation for rotation in rotations if self.fits(rotation)), "random")

    def score(self, variant: Variant) -> Score:
        if variant.name not in self._scores:
            if self._bar is not None:
                self._bar.set_postfix_str(variant.name)
            self._scores[variant.name] = self.simulation.score(variant)
        return self._scores[variant.name]

    def rows(self, variants: Sequence[Variant]) -> dict[str, Score]:
        return {variant.name: self.score(variant) for variant in variants}


SCORE_COLUMNS = ("variant", "expert bytes", "bits a weight", "PPL", "KLD", "± KLD", "top-1")


def score_rows(scores: Sequence[Score]) -> list[tuple[Value, ...]]:
    return [(s.name, s.nbytes, s.bpw, s.ppl, s.kld, s.kld_stderr, s.top1) for s in scores]


# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------

ORIGINAL = Variant("original", experts=False)
BASE = Variant("2 bit")


def rotated(name: str, bits: int = 2) -> Variant:
    return Variant(f"{bits} bit, {name}", Recipe(bits=bits, rotation=name))


def relative_errors(simulation: Simulation, site: Site) -> tuple[np.ndarray, np.ndarray]:
    """[E] of the 2-bit baseline: error of the outputs relative to them, and the loss by the gradients (convert/stats.py)."""
    lost, whole, loss = (np.zeros(site.num_experts) for _ in range(3))
    for shape in site.shapes:
        moments = simulation.statistics[site.path].moments[shape.name]
        weight = simulation.weight(site, shape.name)
        difference = weight - simulation.values(site, shape, BASE.recipe, np.full(site.num_experts, 2))
        even = np.ones(weight.shape[:2])
        lost += output_errors(difference, moments.hessian, even)
        whole += output_errors(weight, moments.hessian, even)
        loss += output_errors(difference, moments.hessian, moments.row_weights)
    return lost / np.maximum(whole, 1e-30), loss


def expert_scores(simulation: Simulation, site: Site) -> dict[str, np.ndarray]:
    """What the replication strategies rank the experts of a site by, [E] each."""
    statistics = simulation.statistics[site.path]
    output, gradient = relative_errors(simulation, site)
    sensitive = sensitivity(output, gradient, statistics.frequency)
    return {
        "random": np.random.default_rng(site.layer).random(site.num_experts),
        "frequency": statistics.frequency,
        "sensitivity": sensitive,
        "mixed": benefit(sensitive, statistics.frequency, statistics.massive),
    }


def replication(simulation: Simulation, strategy: str, budget: float = BUDGET) -> dict[str, np.ndarray]:
    """Copies of every expert: three of a shared one, two of the routed experts that the strategy chooses within the budget.

    adaptive: 15 to 45 % of a layer's experts, by the sum of their benefits; groups: COPIES by the chapter's groups.
    """
    routed = [site for site in simulation.sites if not site.shared]
    result = {site.path: np.full(1, COPIES["shared"]) for site in simulation.sites if site.shared}
    scores = {site.path: expert_scores(simulation, site) for site in routed}
    budgets = dict.fromkeys(scores, budget)
    if strategy == "adaptive":
        sums = np.array([scores[site.path]["mixed"].sum() for site in routed])
        shares = adaptive_budgets(sums, 0.28)  # the chapter's cost of computing: 1.28
        budgets = {site.path: float(share) for site, share in zip(routed, shares, strict=True)}
    for site in routed:
        if strategy == "groups":
            statistics = simulation.statistics[site.path]
            pairs = zip(statistics.frequency, statistics.concentration, strict=True)
            result[site.path] = np.array([COPIES[group(*pair)] for pair in pairs])
        else:
            ranked = scores[site.path]["mixed" if strategy == "adaptive" else strategy]
            result[site.path] = 1 + choose_replicated(ranked, budgets[site.path]).astype(np.int64)
    return result


def replicated(name: str, copies: Copies, rotations: Sequence[str] = ()) -> Variant:
    """Copies of 2 bits: behind `rotations`, one after the other, or without any on grids shifted by half a step."""
    if rotations:
        first, *rest = [Recipe(rotation=rotation, seed=i) for i, rotation in enumerate(rotations)]
        return Variant(name, first, copies=copies, extra=tuple(rest))
    return Variant(name, Recipe(), copies=copies, extra=(Recipe(shift=0.5), Recipe(shift=-0.5)))


def same_bytes(name: str, copies: Copies, rotation: str = "none") -> Variant:
    """One code an expert, no larger than its copies of 2 bits: the planes of an expert that would have been replicated."""
    bits = {path: np.array([_SAME_BYTES[int(c)] for c in counts]) for path, counts in copies.items()}
    return Variant(name, Recipe(rotation=rotation), bits=bits)


def all_copies(simulation: Simulation, count: int) -> dict[str, np.ndarray]:
    return {site.path: np.full(site.num_experts, count) for site in simulation.sites}


# The chapter's rotations, or what comes nearest where a width is no power of two


def best_rotation(bench: Bench) -> str:
    return bench.first("dfrot-200", "block-hadamard-64")


def second_rotation(bench: Bench) -> str:
    return bench.first("dfrot-100", "block-hadamard-64")


def hadamard(bench: Bench) -> str:
    return bench.first("hadamard", "block-hadamard-64")


def turned(bench: Bench) -> str:
    """A random rotation that any number of copies can have, each another one."""
    return bench.first("randomised-hadamard", "block-hadamard-64")


def ensemble_rotations(bench: Bench) -> tuple[str, str, str]:
    """Of the chapter's three copies: gamma 200, 100 and 50."""
    return best_rotation(bench), second_rotation(bench), bench.first("dfrot-50", "block-hadamard-64")


def replica_rows(bench: Bench) -> dict[str, Variant]:
    """The 2-bit rows that several tables share: + rotation, + replicas, + both, and the replicas' bytes spent on bits."""
    copies = replication(bench.simulation, "sensitivity")
    return {
        "hadamard": rotated(hadamard(bench)),
        "dfrot": rotated(best_rotation(bench)),
        "copies": replicated("2 bit, 30 % replicated", copies),
        "both": replicated("2 bit, rotated, 30 % replicated", copies, ensemble_rotations(bench)),
        "bits": same_bytes("2 bit, the same 30 % at 4", copies),
        "bits rotated": same_bytes("2 bit, rotated, the same 30 % at 4", copies, best_rotation(bench)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------


def table_overall(bench: Bench) -> Table:
    """7.3.3: the seven perplexities."""
    row = replica_rows(bench)
    int8 = Variant("8 bit", Recipe(bits=8))
    found = bench.rows([ORIGINAL, int8, BASE, *row.values(), Variant("2 bit, clip search", Recipe(clip=True))])
    base, had, dfrot, copies, both, bits, bits_rotated = (found[v.name] for v in (BASE, *row.values()))
    cut = float(1 - np.log(both.ppl / found["original"].ppl) / np.log(base.ppl / found["original"].ppl))
    eight, original = found["8 bit"], found["original"]
    claims = [
        claim("8 bit costs 13.7 % of perplexity", eight.ppl / original.ppl > 1.1, ppl(original, eight)),
        claim("2 bit costs 156 % of perplexity", base.ppl / original.ppl > 2, ppl(original, base)),
        falls("a Hadamard rotation helps 2 bit", base, had),
        falls("DFRot helps more than Hadamard", had, dfrot),
        falls("30 % replicas help 2 bit", base, copies),
        falls("replicas help on top of DFRot", dfrot, both),
        claim(
            "rotation and replicas together take away 77 % of the loss in log perplexity", cut > 0.7, f"{cut:.1%} of it"
        ),
        falls("replicas are worth their bytes (not in the chapter)", bits, copies),
        falls("replicas on top of a rotation are worth their bytes (not in the chapter)", bits_rotated, both),
    ]
    return Table("overall", "Perplexity (7.3.3)", SCORE_COLUMNS, score_rows(list(found.values())), claims)


def table_massive(bench: Bench) -> Table:
    """7.3.2: the error of the experts' outputs by what is done about massive activations."""
    simulation, row = bench.simulation, replica_rows(bench)
    second = rotated(second_rotation(bench))
    variants = [BASE, row["hadamard"], second, row["dfrot"], row["both"], row["bits rotated"]]
    original = bench.score(ORIGINAL)
    found: dict[str, tuple[float, float]] = {}
    rows: list[tuple[Value, ...]] = []
    for variant in variants:
        found[variant.name] = simulation.output_error(variant), simulation.output_error(variant, massive_tokens)
        score = bench.score(variant)
        rows.append((variant.name, score.nbytes, *found[variant.name], score.ppl - original.ppl))
    inputs = [simulation.statistics[site.path].inputs[site.shapes[0].name] for site in simulation.sites]
    share = float(np.mean([massive_tokens(x).mean() for x in inputs]))
    index = 1 if share > 0 else 0
    errors = {name: pair[index] for name, pair in found.items()}
    falling = [errors[v.name] for v in (BASE, row["hadamard"], row["dfrot"], row["both"])]
    where = f"{share:.2%} of the experts' inputs are massive tokens"
    listed = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    claims = [
        claim(
            "the error on massive activations falls from none to Hadamard to DFRot to DFRot with replicas",
            None if share == 0 else falling == sorted(falling, reverse=True),
            f"{where}; errors {listed}",
        ),
        claim(
            "replicas are worth their bytes there (not in the chapter)",
            errors[row["both"].name] < errors[row["bits rotated"].name],
            f"errors {listed}",
        ),
    ]
    columns = ("variant", "expert bytes", "error of outputs", "on massive tokens", "PPL more")
    return Table("massive", "Error by treatment of massive activations (7.3.2)", columns, rows, claims)


def table_layers(bench: Bench) -> Table:
    """7.3.3: what rotation and replicas give to the layers of one part of the model, when those alone are coded."""
    layers = sorted({site.layer for site in bench.simulation.sites})
    kinds = ["none", "rotation", "copies", "both", "bits"]
    row = replica_rows(bench)
    variants = dict(zip(kinds, (BASE, row["dfrot"], row["copies"], row["both"], row["bits"]), strict=True))
    rows: list[tuple[Value, ...]] = []
    gains, losses = [], []
    for part in np.array_split(layers, min(4, len(layers))):
        name = f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}"
        scores = {
            kind: bench.score(replace(v, name=f"{v.name}, layers {name}", layers=frozenset(map(int, part))))
            for kind, v in variants.items()
        }
        gain = {kind: 1 - s.kld / scores["none"].kld for kind, s in scores.items()}
        nbytes = {kind: scores[kind].nbytes - scores["none"].nbytes for kind in kinds}
        rows.append(
            (name, scores["none"].kld / len(part), *(gain[k] for k in kinds[1:]), nbytes["both"], nbytes["bits"])
        )
        gains.append(gain)
        losses.append(scores["none"].kld / len(part))
    both = [gain["both"] for gain in gains]
    listed, each = ", ".join(f"{value:.1%}" for value in both), ", ".join(f"{loss:.4f}" for loss in losses)
    claims = [
        claim("later layers are more sensitive", losses == sorted(losses), f"KLD a layer {each}"),
        claim("later layers gain more", both == sorted(both), f"both together {listed}"),
        claim(
            "together they give more than the sum of both",
            all(g["both"] > g["rotation"] + g["copies"] for g in gains),
            "; ".join(f"{g['both']:.1%} against {g['rotation'] + g['copies']:.1%}" for g in gains),
        ),
        claim(
            "replicas give more than their bytes as bits (not in the chapter)",
            all(g["copies"] > g["bits"] for g in gains),
            "; ".join(f"{g['copies']:.1%} against {g['bits']:.1%}" for g in gains),
        ),
    ]
    columns = ("layers", "KLD a layer, 2 bit", *_LESS, "bytes of both", "bytes of bits")
    return Table("layers", "Parts of the model alone (7.3.2, 7.3.3)", columns, rows, claims)


_LESS = ("less by rotation", "less by replicas", "less by both", "less by the replicas' bytes as bits")


def table_routing(bench: Bench) -> Table:
    """7.3.4: how much of the routing is kept."""
    simulation, row = bench.simulation, replica_rows(bench)
    original = simulation.routing(ORIGINAL)
    variants = [BASE, row["hadamard"], row["dfrot"], row["copies"], row["both"], row["bits"], row["bits rotated"]]
    found = {v.name: agreement(original, simulation.routing(v)) for v in variants}
    rows: list[tuple[Value, ...]] = [(v.name, simulation.nbytes(v), *found[v.name]) for v in variants]
    base, had, dfrot, copies, both, bits, bits_rotated = (found[v.name] for v in variants)
    order = [base.topk, had.topk, dfrot.topk, both.topk]
    listed = ", ".join(f"{name} {a.topk:.2%}" for name, a in found.items())
    known = np.isfinite(base.top1)
    claims = [
        claim(
            "2-bit experts keep only 43 % of the best experts", base.top1 < 0.6 if known else None, f"{base.top1:.1%}"
        ),
        claim("agreement rises from none to Hadamard to DFRot to DFRot with replicas", order == sorted(order), listed),
        claim(
            "quantization lowers the router's confidence by 31 %, replicas win most of it back",
            base.confidence < -0.1 and both.confidence > base.confidence / 2 if known else None,
            f"{base.confidence:.1%} and {both.confidence:.1%}",
        ),
        claim(
            "replicas keep more than the same bytes as bits (not in the chapter)",
            copies.topk > bits.topk and both.topk > bits_rotated.topk,
            listed,
        ),
    ]
    columns = ("variant", "expert bytes", "best expert kept", "chosen experts kept", "tokens changed", "confidence")
    return Table("routing", "Routing against the original (7.3.4)", columns, rows, claims)


def table_rotations(bench: Bench) -> Table:
    """7.3.6: the rotation ablation, at 2 bits from the largest value."""
    names = ["random", "hadamard", "randomised-hadamard", "block-hadamard-64", "block-hadamard-128"]
    names += ["dfrot-50", "dfrot-100", "dfrot-150", "dfrot-200", "dfrot-adaptive"]
    usable = [name for name in names if bench.fits(name)]
    found = bench.rows([BASE, *map(rotated, usable)])
    by_name = {name: found[rotated(name).name] for name in usable} | {"none": found[BASE.name]}
    rotations = [score for name, score in by_name.items() if name != "none"]
    fitted = [score for name, score in by_name.items() if name.startswith("dfrot")]
    hadamards = [score for name, score in by_name.items() if "hadamard" in name]
    claims = [
        claim(
            "every rotation helps",
            all(s.kld < by_name["none"].kld for s in rotations),
            kld(by_name["none"], *rotations),
        ),
        claim(
            "Hadamard helps more than a random rotation",
            min(s.kld for s in hadamards) < by_name["random"].kld,
            kld(by_name["random"], *hadamards),
        ),
        claim(
            "every DFRot helps more than every Hadamard",
            max(s.kld for s in fitted) < min(s.kld for s in hadamards) if fitted else None,
            kld(*fitted),
        ),
        claim(
            "a larger gamma helps more, the adaptive one most",
            [s.kld for s in fitted] == sorted((s.kld for s in fitted), reverse=True) if fitted else None,
            kld(*fitted),
        ),
    ]
    return Table("rotations", "Rotations (7.3.6)", SCORE_COLUMNS, score_rows(list(found.values())), claims)


def table_choice(bench: Bench) -> Table:
    """Not in the chapter: what the measured choice of rotate.py says of every matrix class."""
    simulation = bench.simulation
    rows: list[tuple[Value, ...]] = []
    for site in (next(s for s in simulation.sites if s.shared == kind) for kind in _kinds(simulation)):
        for shape in (site.shapes[0], site.shapes[-1]):
            statistics = simulation.statistics[site.path]
            names = [name for name in _CHOICES if fits(name, shape.columns)]
            weight = simulation.weight(site, shape.name)[:8]
            hessian = statistics.moments[shape.name].hessian[:8]
            size = choose_group_size(shape.columns, 128)
            chosen = choose_rotation(weight, hessian, names, statistics.inputs[shape.name], 2, size)
            label = f"layer {site.layer} {'shared' if site.shared else 'routed'} {shape.name}"
            rows.append((label, chosen.name, *(chosen.gains.get(name, float("nan")) for name in _CHOICES)))
    picked = [str(row[1]) for row in rows]
    claims = [
        claim(
            "a rotation gains more than 0.3 dB somewhere once rounding is fed back (not in the chapter)",
            any(name != "none" for name in picked),
            ", ".join(picked),
        )
    ]
    columns = ("matrices", "chosen", *(f"{name}, dB" for name in _CHOICES))
    return Table("choice", "Gain of a rotation in weighted output error with GPTQ, 2 bit", columns, rows, claims)


_CHOICES = ("random", "randomised-hadamard", "block-hadamard-64", "dfrot-100")


def _kinds(simulation: Simulation) -> list[bool]:
    return sorted({site.shared for site in simulation.sites})


def table_replication(bench: Bench) -> Table:
    """7.3.6: which experts are replicated, each beside the same bytes spent on bits."""
    found: dict[str, tuple[Score, Score]] = {}
    strategies = ("random", "frequency", "sensitivity", "mixed", "adaptive", "groups")
    for strategy in strategies:
        copies = replication(bench.simulation, strategy)
        doubled = replicated(f"2 bit, replicas by {strategy}", copies, (turned(bench),))
        found[strategy] = (
            bench.score(doubled),
            bench.score(same_bytes(f"2 bit, bits by {strategy}", copies, turned(bench))),
        )
    base = bench.score(rotated(turned(bench)))
    by_copies = {strategy: pair[0] for strategy, pair in found.items()}
    rows = score_rows([base, *(score for pair in found.values() for score in pair)])
    order = [by_copies[s] for s in ("random", "frequency", "sensitivity", "mixed", "adaptive")]
    claims = [
        falls("random replicas help", base, by_copies["random"]),
        falls("random, frequency, sensitivity, mixed, adaptive: each is better than the one before", *order),
        claim(
            "replicas are worth their bytes (not in the chapter)",
            all(a.kld < b.kld for a, b in found.values()),
            "; ".join(kld(*pair) for pair in found.values()),
        ),
    ]
    return Table("replication", "Which experts are replicated (7.3.6)", SCORE_COLUMNS, rows, claims)


def table_ensembles(bench: Bench) -> Table:
    """7.2.6 and at equal bytes: all experts replicated, the ways of combining, and one copy of as many bytes."""
    simulation = bench.simulation
    rotation = turned(bench)
    two, three = all_copies(simulation, 2), all_copies(simulation, 3)
    clipped, fed = Recipe(rotation=rotation, clip=True), Recipe(rotation=rotation, feedback=True)
    ways = [Variant(f"2 copies of 2 bit, {way}", clipped, copies=two, combine=way) for way in COMBINED_BY]
    variants = [
        Variant("1 copy of 2 bit", clipped),
        *ways,
        Variant("3 copies of 2 bit, mean", clipped, copies=three),
        *(Variant(f"1 copy of {bits} bit", replace(clipped, bits=bits)) for bits in (3, 4, 6)),
        Variant("1 copy of 2 bit, GPTQ", fed),
        Variant("2 copies of 2 bit, GPTQ", fed, copies=two),
        Variant("1 copy of 4 bit, GPTQ", replace(fed, bits=4)),
    ]
    variants += [_with_settings(simulation, strategy, rotation) for strategy in STRATEGIES]
    found = bench.rows(variants)
    single, mean, four = found["1 copy of 2 bit"], found[ways[0].name], found["1 copy of 4 bit"]
    best = min((found[way.name] for way in ways), key=lambda score: score.kld)
    fed_pair, fed_four = found["2 copies of 2 bit, GPTQ"], found["1 copy of 4 bit, GPTQ"]
    way = dict(zip(COMBINED_BY, (found[v.name] for v in ways), strict=True))
    claims = [
        falls("two copies are better than one", single, mean),
        falls("weights by variance are better than the mean", mean, way["variance"]),
        falls("learned weights are better than the mean", mean, way["learned"]),
        falls("choosing a copy by the input is better than the mean", mean, way["selective"]),
        falls("two copies are better than one of the same bytes (not in the chapter)", four, best),
        falls("the same with GPTQ (not in the chapter)", fed_four, fed_pair),
    ]
    rows = score_rows(list(found.values()))
    return Table("ensembles", "Copies of all experts, and one copy of the same bytes", SCORE_COLUMNS, rows, claims)


def table_gain(bench: Bench) -> Table:
    """Not in the chapter: one learned factor for every expert, which learned combining weights contain.

    A code of least squared error is shorter than what it codes, (1 - D) times, and an expert multiplies three of them.
    """
    rotation = turned(bench)
    recipes = {
        "2 bit": Recipe(),
        "2 bit, clip search": Recipe(clip=True),
        "2 bit, clip search, rotated": Recipe(clip=True, rotation=rotation),
        "2 bit, GPTQ": Recipe(feedback=True),
        "4 bit, clip search": Recipe(bits=4, clip=True),
    }
    pairs = {
        name: (bench.score(Variant(name, recipe)), bench.score(Variant(f"{name}, gain", recipe, combine="learned")))
        for name, recipe in recipes.items()
    }
    two = all_copies(bench.simulation, 2)
    copies = bench.score(
        Variant("2 copies of 2 bit, learned", recipes["2 bit, clip search, rotated"], two, combine="learned")
    )
    single, four = pairs["2 bit, clip search, rotated"][1], pairs["4 bit, clip search"][1]
    claims = [
        *(falls(f"a gain helps {name}", *pair) for name, pair in pairs.items()),
        falls("two copies with learned weights are better than one with a learned gain", single, copies),
        falls("and better than one of the same bytes with a learned gain", four, copies),
    ]
    rows = score_rows([*(score for pair in pairs.values() for score in pair), copies])
    return Table("gain", "One learned factor for every expert", SCORE_COLUMNS, rows, claims)


def _with_settings(simulation: Simulation, strategy: str, rotation: str) -> Variant:
    """Two copies whose settings differ as a strategy of the chapter has it."""
    recipes = progressing(Recipe(rotation=rotation), 2, strategy)
    name = f"2 copies of 2 bit, strategy {strategy}"
    return Variant(name, recipes[0], copies=all_copies(simulation, 2), extra=(recipes[1],))


def table_voting(bench: Bench) -> Table:
    """7.2.4: three whole models of 2 bits vote for the next token; their mean, and one model of the same bytes."""
    simulation = bench.simulation
    rotation = turned(bench)
    original = simulation.logits(ORIGINAL).argmax(axis=1)
    singles = [Variant(f"2 bit, copy {seed}", Recipe(rotation=rotation, clip=True, seed=seed)) for seed in range(3)]
    logits = np.stack([simulation.logits(variant) for variant in singles])
    six = Variant("6 bit", Recipe(bits=6, rotation=rotation, clip=True))
    one = simulation.nbytes(singles[0])
    agreed = {
        "one of 2 bit": (one, float((logits[0].argmax(axis=1) == original).mean())),
        "three, votes": (3 * one, float((vote(logits) == original).mean())),
        "three, mean of the logits": (3 * one, float((logits.mean(axis=0).argmax(axis=1) == original).mean())),
        "one of 6 bit": (simulation.nbytes(six), float((simulation.logits(six).argmax(axis=1) == original).mean())),
    }
    rows: list[tuple[Value, ...]] = [(name, *pair) for name, pair in agreed.items()]
    votes, mean, best = (agreed[k][1] for k in ("three, votes", "three, mean of the logits", "one of 6 bit"))
    listed = ", ".join(f"{name} {value:.2%}" for name, (_, value) in agreed.items())
    claims = [
        claim("a vote helps where the output is a choice", votes > agreed["one of 2 bit"][1], listed),
        claim("a vote is better than the mean there", votes > mean, listed),
        claim(
            "three copies are better than one of the same bytes (not in the chapter)", max(votes, mean) > best, listed
        ),
    ]
    return Table(
        "voting", "Votes for the next token", ("variant", "expert bytes", "top-1 as the original"), rows, claims
    )


def table_parameters(bench: Bench) -> Table:
    """7.3.6: quantizer parameters, cumulative in the chapter's order, and each alone."""
    steps: list[tuple[str, dict[str, object]]] = [
        ("affine", {"affine": True}),
        ("groups of 64", {"group_size": 64}),
        ("stochastic rounding", {"stochastic": True}),
        ("clip search", {"clip": True}),
        ("grid offset", {"offset": True}),
    ]
    variants, recipe = [BASE], Recipe()
    for name, change in steps:
        recipe = replace(recipe, **change)  # type: ignore[arg-type]
        variants.append(Variant(f"... + {name}", recipe))
    variants.append(Variant("all but stochastic rounding", replace(recipe, stochastic=False)))
    alone = [Variant(f"only {name}", replace(Recipe(), **change)) for name, change in steps]  # type: ignore[arg-type]
    alone.insert(1, Variant("only groups of 32", Recipe(group_size=32)))
    alone.append(Variant("only GPTQ", Recipe(feedback=True)))
    three = Variant("3 bit", Recipe(bits=3))
    found = bench.rows([*variants, *alone, three, Variant("3 bit, clip search", Recipe(bits=3, clip=True))])
    base, best, wider = found[BASE.name], found["all but stochastic rounding"], found["3 bit, clip search"]
    claims = [
        falls("each step in the chapter's order helps", *(found[v.name] for v in variants[:6])),
        *(falls(f"{name} alone: it helps", base, found[f"only {name}"]) for name, _ in steps),
        falls(
            "all but stochastic rounding are better than a bit more with clip search (not in the chapter)", wider, best
        ),
    ]
    return Table("parameters", "Quantizer parameters (7.3.6)", SCORE_COLUMNS, score_rows(list(found.values())), claims)


def table_activations(bench: Bench) -> Table:
    """R5: activations of the experts at 8 and at 4 bits, with and without rotation; the chapter's baseline has 8."""
    names = [name for name in ("none", hadamard(bench), second_rotation(bench)) if bench.fits(name)]
    variants = [
        Variant(f"2 bit, {name}, activations {bits}", Recipe(rotation=name, activation_bits=bits, clip=True))
        for bits in (16, 8, 4)
        for name in dict.fromkeys(names)
    ]
    variants += [
        Variant(
            f"2 bit, none, activations 4, clipped to {clip}", Recipe(activation_bits=4, activation_clip=clip, clip=True)
        )
        for clip in (0.9, 0.8)
    ]
    found = bench.rows(variants)
    wide, eight, four = (found[f"2 bit, none, activations {bits}"] for bits in (16, 8, 4))
    straight, coarse = (found[f"2 bit, {hadamard(bench)}, activations {bits}"] for bits in (16, 4))
    claims = [
        claim(
            "8-bit activations cost less than 5 % of what 2-bit weights do",
            eight.kld < wide.kld * 1.05,
            kld(wide, eight),
        ),
        claim(
            "a rotation lowers the cost of 4-bit activations (DFRot's own setting)",
            coarse.kld - straight.kld < four.kld - wide.kld,
            kld(wide, four, straight, coarse),
        ),
    ]
    return Table(
        "activations", "Activation quantization (7.2.6)", SCORE_COLUMNS, score_rows(list(found.values())), claims
    )


def table_classes(bench: Bench) -> Table:
    """7.2.1 and 7.3.2: shared, frequent, other and rare experts: massive activations, and the loss at 2 bits of the class
    alone, the others at 8."""
    simulation = bench.simulation
    members = {name: {site.path: _in_class(simulation, site, name) for site in simulation.sites} for name in _CLASSES}
    rows: list[tuple[Value, ...]] = []
    loss, massive = {}, {}
    rest = bench.score(Variant("8 bit", Recipe(bits=8)))
    for name, chosen in members.items():
        count = sum(int(m.sum()) for m in chosen.values())
        if not count:
            continue
        bits = {path: np.where(m, 2, 8) for path, m in chosen.items()}
        score = bench.score(Variant(f"{name} experts at 2 bit", Recipe(bits=8), bits=bits))
        ratios = np.concatenate([simulation.statistics[path].massive[m] for path, m in chosen.items()])
        loss[name], massive[name] = (score.kld - rest.kld) / count, float(ratios.mean())
        rows.append((name, count, score.nbytes, massive[name], score.kld - rest.kld, loss[name]))
    order = [loss[n] for n in _CLASSES if n in loss]
    by_mass = [massive[n] for n in _CLASSES if n in massive]
    claims = [
        claim(
            "shared experts are most sensitive, then frequent, others, rare",
            order == sorted(order, reverse=True),
            "KLD an expert " + ", ".join(f"{n} {v:.5f}" for n, v in loss.items()),
        ),
        claim(
            "massive activations are most frequent in shared experts, then frequent, others, rare",
            None if max(by_mass) == 0 else by_mass == sorted(by_mass, reverse=True),
            ", ".join(f"{n} {v:.3%}" for n, v in massive.items()),
        ),
    ]
    columns = ("class", "experts", "expert bytes", "massive values", "KLD more", "KLD an expert")
    return Table("classes", "Kinds of experts (7.2.1, 7.3.2)", columns, rows, claims)


_CLASSES = ("shared", "frequent", "other", "rare")


def _in_class(simulation: Simulation, site: Site, name: str) -> np.ndarray:
    """bool [E]. By frequency within the layer: the first fifth is frequent, the last rare."""
    if site.shared:
        return np.full(1, name == "shared")
    frequency = simulation.statistics[site.path].frequency
    rank = np.argsort(np.argsort(frequency, kind="stable"), kind="stable") / max(1, site.num_experts - 1)
    kind = np.where(rank >= _TOP, "frequent", np.where(rank <= _BOTTOM, "rare", "other"))
    return kind == name


def table_router(bench: Bench) -> Table:
    """7.2.5: the router's matrix at 8, 4 and 2 bits, everything else as it is."""
    simulation = bench.simulation
    original = simulation.routing(ORIGINAL)
    rows: list[tuple[Value, ...]] = []
    found = {}
    for bits in (8, 4, 2):
        variant = Variant(f"router at {bits} bit", experts=False, router_bits=bits)
        found[bits] = agreement(original, simulation.routing(variant)), bench.score(variant)
        kept, score = found[bits]
        rows.append(
            (
                variant.name,
                simulation.router_nbytes(bits),
                1 - kept.top1,
                kept.changed,
                score.ppl,
                score.kld,
                score.kld_stderr,
            )
        )
    base = bench.score(BASE)
    listed = ", ".join(f"{bits} bit {kept.changed:.1%}" for bits, (kept, _) in found.items())
    claims = [
        claim(
            "8 bit changes 2.3 % of the choices, 4 bit 18.7 %, 2 bit 67.2 %: more at fewer bits",
            found[8][0].changed < found[4][0].changed < found[2][0].changed,
            f"tokens with another set: {listed}",
        ),
        claim(
            "a router at 8 bit costs more than a hundredth of what 2-bit experts do",
            found[8][1].kld > 0.01 * base.kld,
            kld(found[8][1], base),
        ),
        falls("a router at 2 bit is worse than experts at 2 bit", found[2][1], base),
    ]
    columns = ("variant", "router bytes", "best expert changed", "tokens with another set", "PPL", "KLD", "± KLD")
    return Table("router", "Router at fewer bits (7.2.5)", columns, rows, claims)


TABLES: dict[str, Callable[[Bench], Table]] = {
    "overall": table_overall,
    "massive": table_massive,
    "layers": table_layers,
    "routing": table_routing,
    "rotations": table_rotations,
    "choice": table_choice,
    "replication": table_replication,
    "ensembles": table_ensembles,
    "gain": table_gain,
    "voting": table_voting,
    "parameters": table_parameters,
    "activations": table_activations,
    "classes": table_classes,
    "router": table_router,
}
NOT_TESTABLE = [
    claim(
        "MMLU, HumanEval, GSM8K and HellaSwag keep 75.6 % on average (7.3.4)",
        None,
        "this command runs no tasks",
    ),
    claim("latency and memory on an M1 Pro (7.3.5)", None, "nothing here runs on a Mac"),
    claim(
        "replicas need no bandwidth of their own (7.3.5)",
        None,
        "it is a matter of hardware; each is bytes of its own to read",
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def cell(value: Value) -> str:
    if isinstance(value, float):
        return "-" if not np.isfinite(value) else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else value


def markdown(tables: Sequence[Table]) -> str:
    """The tables, each with its claims."""
    lines: list[str] = []
    for table in tables:
        lines += [f"### {table.title}", "", f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns)]
        lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in table.rows]
        lines += ["", *claim_lines(table.claims), ""]
    return "\n".join([*lines, "### Not here", "", *claim_lines(NOT_TESTABLE), ""])


def claim_lines(claims: Sequence[Claim]) -> list[str]:
    return [f"- **{c.verdict}**: {c.text}. {c.evidence}." for c in claims]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_study_arguments(parser)
    parser.add_argument(
        "--tables", default=",".join(TABLES), metavar="A,B", help="tables to make (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"scored tokens a row (default: {ChapterConfig.max_tokens})"
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"tokens of calibration (default: {ChapterConfig.calibration_tokens})",
    )
    parser.add_argument("--quick", action="store_true", help="a few tokens, to see that it runs (default: off)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the Markdown there (default: stdout)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run with --output that was stopped (default: no)"
    )


def chapter(simulation: Callable[[], Simulation], names: Sequence[str], parts: Parts = NOT_KEPT) -> Iterator[Table]:
    """Makes the named tables one after the other, but for those that `parts` have, with a bar on stderr."""
    with tqdm(names, unit=" tables", desc="chapter", dynamic_ncols=True) as bar:
        bench: Bench | None = None
        for name in bar:
            table = parts.get(name, Table)
            if table is None:
                bench = bench or Bench(simulation(), bar)
                table = TABLES[name](bench)
                parts.keep(name, table)
            yield table


def run(args: argparse.Namespace) -> int:
    names = list(dict.fromkeys(name for name in args.tables.split(",") if name))
    unknown = sorted(set(names) - set(TABLES))
    if unknown or not names:
        raise UserError(f"there is no table {', '.join(unknown) or 'asked for'}", f"choose among {', '.join(TABLES)}")
    given = {name: getattr(args, name) for name in ("max_tokens", "calibration_tokens")}
    config = replace(QUICK if args.quick else ChapterConfig(), **{k: v for k, v in given.items() if v is not None})
    if args.output is None and args.resume:
        raise UserError("--resume needs a file beside which tables are kept", "give --output FILE")
    if args.output is not None and not args.output.parent.is_dir():
        raise UserError(f"there is no folder {args.output.parent}", "make it first, or write somewhere else")
    texts = [read_text(path) for path in args.text]
    settings = {**vars(config), "model": str(args.model), "texts": args.text}
    settings["calibration_sha256"] = file_sha256(args.calibration)
    with _keeping(args.output, settings, args.resume) as parts:
        start = time.perf_counter()
        make = partial(Simulation, args.model, texts, args.calibration, *vars(config).values())
        tables = list(chapter(make, names, parts))
        note(f"{len(tables)} tables in {time.perf_counter() - start:.0f} s")
        if args.output:
            write_whole(args.output, markdown(tables).encode())
        else:
            print(markdown(tables))
    if args.json:
        absent = [c._asdict() for c in NOT_TESTABLE]
        print_json({"settings": settings, "tables": [_plain(table) for table in tables], "not_testable": absent})
    return 0


@contextmanager
def _keeping(output: Path | None, settings: dict[str, Any], resume: bool) -> Iterator[Parts]:
    """Where finished tables are kept until all are there: it may take hours."""
    if output is None:
        yield NOT_KEPT
        return
    texts = {Path(path).name: file_sha256(path) for path in settings["texts"]}
    job = {**settings, "mlxmoe": __version__, "texts": texts, "model": identity(open_checkpoint(settings["model"]))}
    with kept_parts(output, "chapter", job, resume) as (_, parts):
        yield parts


def _plain(table: Table) -> dict[str, object]:
    """For JSON, which has no NaN."""
    rows = [[None if isinstance(v, float) and not np.isfinite(v) else v for v in row] for row in table.rows]
    return {**table._asdict(), "rows": rows, "claims": [c._asdict() for c in table.claims]}


if __name__ == "__main__":
    raise SystemExit(main(["bench-chapter", *sys.argv[1:]]))
