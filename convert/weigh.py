"""What errors cost in every matrix of a layer at every width, by its statistics: one artefact a layer, and all together.

weighed-<i>.npz           <tensor>: loss at a relative error of 1, then at each of its candidate formats;
                          unseen.<module>: how many directions of its inputs the text does not know, and columns;
                          experts.<field>: errors, scores where the allocation asks for them, tokens of each expert
rotation-<layer>.npz      by what the layer's experts are rotated, which is decided on the way
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxmoe.convert.calibrate import TOKENS_PER_EXPERT
from mlxmoe.convert.calibrated import code_trunk, measure_experts
from mlxmoe.convert.gptq import DAMPING
from mlxmoe.convert.layers import Layers
from mlxmoe.convert.measure import ExpertErrors, ExpertScores, TrunkErrors, candidate_formats
from mlxmoe.convert.rotate import AUTO, Rotated, Sample, chosen_rotations, sampled_rotation, unsampled_rotation
from mlxmoe.convert.scores import Scoring, observe
from mlxmoe.convert.stats import Moments, unseen_directions
from mlxmoe.convert.write import save_rotations
from mlxmoe.formats import FIELD_BITS
from mlxmoe.models import ExpertSite
from mlxmoe.rotation import PLAIN
from mlxmoe.work import save_arrays

ROTATED_EXPERTS = 8  # of a layer, by whose errors its rotations are chosen


class Measured(NamedTuple):
    """What the allocation needs, and notes for people."""

    experts: dict[int, ExpertErrors]
    trunk: TrunkErrors
    notes: list[str]


def weigh(layers: Layers, i: int, moments: dict[str, Moments]) -> None:
    """Writes weighed-<i>.npz of a loaded layer by its statistics, for `read_measured`."""
    arrays = _trunk_losses(layers, i, moments) | _unseen(layers, moments)
    if i in layers.sites:
        arrays |= _expert_losses(layers, i, moments)
    save_arrays(layers.walk.path("weighed", i, "npz"), arrays)


def _trunk_losses(layers: Layers, i: int, moments: dict[str, Moments]) -> dict[str, np.ndarray]:
    result = {}
    for tensor in layers.trunk[i]:
        matrix = layers.stream.weight(tensor.name).reshape(-1, tensor.shape[-1])
        row = []
        for bits, group_size in candidate_formats(tensor):
            _, loss, norm = code_trunk(matrix, moments[tensor.module], bits, group_size, sweeps=1)
            row.append(loss)
        result[tensor.name] = np.array([norm, *row])
    return result


def _unseen(layers: Layers, moments: dict[str, Moments]) -> dict[str, np.ndarray]:
    found = {path: unseen_directions(its, layers.walk.num_tokens) for path, its in moments.items()}
    return {f"unseen.{path}": np.array([n, moments[path].hessian.shape[-1]]) for path, n in found.items() if n}


def _expert_losses(layers: Layers, i: int, moments: dict[str, Moments]) -> dict[str, np.ndarray]:
    site, paths, levels = layers.sites[i], layers.projections(i), layers.config.expert_levels
    shapes, feedback = layers.source.shapes[site.path], layers.calibration.method == "gptq"
    scoring = None
    if layers.config.allocation.needs_scores:
        observed = observe(layers.walk, i, "hidden", site)
        scoring = Scoring(layers.stream.module(site.path), observed, len(shapes), len(levels))
    rotated = _choose_rotations(layers, i, moments)
    save_rotations(layers.walk.folder, site.layer, rotated)
    weighed = []
    for p, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        stack = layers.stream.weight(f"{path}.weight")
        seen = () if scoring is None else (scoring.seen(p, shape.name, stack),)
        turn = rotated.of(p, len(shapes))
        weighed.append(measure_experts(stack, moments[path], levels, shape.group_size, turn, feedback, *seen))
    norms, errors = map(np.stack, zip(*weighed, strict=True))
    found = {"norms": norms, "errors": errors, "tokens": moments[paths[0]].tokens}
    scores = {} if scoring is None else scoring.scores()._asdict()
    return {f"experts.{name}": values for name, values in (found | scores).items()}


def _choose_rotations(layers: Layers, i: int, moments: dict[str, Moments]) -> Rotated:
    """By what a loaded layer's experts are rotated, decided by those that most tokens come to."""
    name, seed = layers.config.rotation, layers.config.seed
    paths, shapes = layers.projections(i), layers.source.shapes[layers.sites[i].path]
    if name in PLAIN:
        return unsampled_rotation(name, shapes, seed)
    most = np.argsort(-moments[paths[0]].tokens, kind="stable")[:ROTATED_EXPERTS]

    def sample(paths: list[str]) -> Sample:
        weights = [layers.stream.weight(f"{path}.weight")[most] for path in paths]
        hessians = [moments[path].hessian[most] for path in paths]
        return Sample(np.concatenate(weights), np.concatenate(hessians), moments[paths[0]].inputs)

    bits = min(*layers.config.expert_levels, FIELD_BITS)  # where there is most to gain
    return sampled_rotation(name, shapes, (sample(paths[:-1]), sample(paths[-1:])), bits, seed)


def read_measured(layers: Layers) -> Measured:
    """The artefacts of all layers together."""
    scored = layers.config.allocation.needs_scores
    experts: dict[int, ExpertErrors] = {}
    trunk: dict[str, np.ndarray] = {}
    notes: list[str] = []
    used, wanted = layers.walk.num_tokens, layers.calibration.windows * layers.calibration.window
    if used < wanted:
        notes.append(f"the calibration text has {used} tokens, fewer than the {wanted} that were asked for")
    for i in layers.trunk:
        with np.load(layers.walk.path("weighed", i, "npz")) as saved:
            trunk |= {name: saved[name] for name in saved.files if not name.startswith(("experts.", "unseen."))}
            notes += _unseen_notes({name: saved[name] for name in saved.files if name.startswith("unseen.")})
            site = layers.sites.get(i)
            if site is not None:
                norms = saved["experts.norms"]
                scores = {field: saved[f"experts.{field}"] for field in ExpertScores._fields} if scored else None
                found = None if scores is None else ExpertScores(**scores)
                rules = layers.rotated(site.layer).rules(layers.config.seed)
                experts[site.layer] = ExpertErrors(norms, saved["experts.errors"], norms, found, rules)
                notes += _routing_notes(site, saved["experts.tokens"])
    if layers.config.rotation == AUTO:
        notes.append(chosen_rotations([layer.rotations for layer in experts.values()]))
    names = layers.trunk_names()
    errors = np.zeros((len(names), max((len(trunk[name]) for name in names), default=1) - 1))
    for t, name in enumerate(names):
        errors[t, : len(trunk[name]) - 1] = trunk[name][1:]
    norms = np.array([trunk[name][0] for name in names])
    return Measured(experts, TrunkErrors(norms, errors, norms), notes)


def _unseen_notes(unseen: dict[str, np.ndarray]) -> list[str]:
    """Which statistics are singular, in one sentence for a layer."""
    if not unseen:
        return []
    listed = ", ".join(f"{n} of the {k} inputs of {name.removeprefix('unseen.')}" for name, (n, k) in unseen.items())
    return [
        f"the statistics are singular, for the calibration text says nothing about {listed}; a damping of {DAMPING:.0%} of "
        "their mean stands in"
    ]


def _routing_notes(site: ExpertSite, tokens: np.ndarray) -> list[str]:
    """What the calibration text says too little about."""
    notes = []
    never = [str(e) for e in np.flatnonzero(tokens == 0)]
    if never:
        notes.append(
            f"layer {site.layer}: the calibration text never reaches expert{'s' * (len(never) > 1)} {', '.join(never)}; "
            "the layer's own statistics stand in"
        )
    if tokens.mean() < TOKENS_PER_EXPERT:
        notes.append(
            f"layer {site.layer}: the calibration text reaches an expert {tokens.mean():.0f} times on average, the rarest "
            f"{tokens.min()} and the most frequent {tokens.max()} times; {TOKENS_PER_EXPERT} on average should be there, so "
            "give more of it"
        )
    return notes
