"""What was tried to come closer to Belady than a decayed count of uses does, and what it gave (docs/caching.md).

    python -m mlxmoe.bench.cache_attempts TRACE        a trace with scores: mlxmoe trace ... --scores

Every attempt gives each expert a value after each token; the resident of the least value leaves. Predictions are linear,
fitted on the first half of the trace, and every number is of the other half, in per cent of Belady's hit rate there, with
the same slots in every layer. The last rows cheat: they know the choice of the next tokens, and nothing else.

Shapes: T tokens, L layers, E experts of a layer, K features.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mlxmoe.errors import UserError
from mlxmoe.replay import belady, replay_layer
from mlxmoe.trace import Trace, load_trace

RESIDENCIES = (0.25, 0.5, 0.75)
DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # of the running means that predictions are made from
DECAY = 0.98  # of the count of uses that the others are compared with
HORIZON = 0.8  # what is predicted: uses ahead, the one in n tokens weighted by HORIZON^n
RIDGE = 300.0


class Layer(NamedTuple):
    """One layer of a trace as numbers: uses [T, E], of 0 and 1, and scores [T, E]. Fitted on tokens [0, middle)."""

    position: int  # in the trace
    uses: np.ndarray
    scores: np.ndarray
    middle: int


class Table:
    """A policy that goes by values [T, E] which are worked out in advance."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self._step = values, -1

    def routed(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        self._step += 1

    def admitted(self, expert: int) -> None:
        pass

    def evicted(self, expert: int) -> None:
        pass

    def victim(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda e: (self._values[self._step, e], e))


# ---------------------------------------------------------------------------------------------------------------------
# The attempts: values [T, E] of each expert after each token
# ---------------------------------------------------------------------------------------------------------------------


def attempts(layers: Sequence[Layer], layer: Layer, starts: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    uses, scores = layer.uses, layer.scores
    yield "count of uses, decay 0.98 (lfu)", running_mean(uses, DECAY)
    yield "the same, forgotten at every document", running_mean(uses, DECAY, starts)
    popularity = uses[: layer.middle].mean(axis=0)
    yield "the same, plus popularity in the first half", running_mean(uses, DECAY) + 0.05 * popularity
    for decay in (0.8, 0.95):
        yield f"running mean of router scores, decay {decay}", running_mean(scores, decay)
    history = [running_mean(uses, decay) for decay in DECAYS]
    ranked = [running_mean(scores, decay) for decay in DECAYS]
    yield "linear in the expert's own uses", predict_each(history, layer)
    own = predict_each(history + ranked, layer)
    yield "linear in its own uses and scores", own
    mates = np.concatenate([history[0], history[1], history[3], ranked[0], ranked[3]], axis=1)
    yield "the same, and those of all experts of the layer", own + predict_rest(mates, own, layer)
    seen = [other.uses if other.position <= layer.position else delayed(other.uses) for other in layers]
    across = np.concatenate([*seen, *(delayed(other.uses) for other in layers[: layer.position + 1]), mates], axis=1)
    yield "the same, and the choices of all other layers", own + predict_rest(across, own, layer)
    ahead = [advanced(uses, n) for n in (1, 2)]
    yield "lfu that knows the next token's choice", running_mean(uses, DECAY) + 1000 * ahead[0]
    yield "lfu that knows the next two", running_mean(uses, DECAY) + 1000 * ahead[0] + 100 * ahead[1]


def running_mean(values: np.ndarray, decay: float, starts: Sequence[int] = ()) -> np.ndarray:
    """[T, K] -> [T, K]: mean of what was seen, a value n tokens ago weighted by decay^n; from nothing at each start."""
    result, fresh = np.empty_like(values), frozenset(starts)
    mean = np.zeros(values.shape[1])
    for token, value in enumerate(values):
        mean = (0.0 if token in fresh else mean * decay) + (1 - decay) * value
        result[token] = mean
    return result


def uses_ahead(uses: np.ndarray) -> np.ndarray:
    """[T, E]: how much each expert is used after each token, the use in n tokens weighted by HORIZON^n."""
    return advanced(running_mean(uses[::-1], HORIZON)[::-1], 1)


def delayed(values: np.ndarray) -> np.ndarray:
    """Values [T, K] of the token before."""
    return np.concatenate([np.zeros((1, values.shape[1])), values[:-1]])


def advanced(values: np.ndarray, tokens: int) -> np.ndarray:
    """Values [T, K] of so many tokens later."""
    return np.concatenate([values[tokens:], np.zeros((tokens, values.shape[1]))])


def predict_each(features: Sequence[np.ndarray], layer: Layer) -> np.ndarray:
    """K features [T, E], each of an expert by itself -> prediction [T, E]: the same weights for all, and a constant each."""
    stacked = np.stack(features, axis=-1)
    tokens, experts, count = stacked.shape
    inputs = np.concatenate([stacked, np.broadcast_to(np.eye(experts), (tokens, experts, experts))], axis=-1)
    known = inputs[: layer.middle].reshape(-1, count + experts)
    return inputs @ fitted(known, uses_ahead(layer.uses)[: layer.middle].reshape(-1, 1), 1e-3)[:, 0]


def predict_rest(features: np.ndarray, prediction: np.ndarray, layer: Layer) -> np.ndarray:
    """Features [T, K] -> what they say beyond `prediction`: weights [K, E], each expert may depend on each feature."""
    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    rest = (uses_ahead(layer.uses) - prediction)[: layer.middle]
    return inputs @ fitted(inputs[: layer.middle], rest, RIDGE)


def fitted(inputs: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """Weights of the least squares: inputs [N, K], targets [N, E] -> [K, E]."""
    return np.linalg.solve(inputs.T @ inputs + ridge * np.eye(inputs.shape[1]), inputs.T @ targets)


# ---------------------------------------------------------------------------------------------------------------------


def layers_of(trace: Trace) -> list[Layer]:
    """Raises UserError for a trace without scores."""
    if trace.scores is None:
        raise UserError("the trace holds no router scores", "record it with mlxmoe trace --scores")
    middle = trace.halves()[0].num_tokens
    layers = []
    for index in range(len(trace.layers)):
        uses = np.zeros((trace.num_tokens, trace.num_experts))
        np.put_along_axis(uses, trace.experts[:, index].astype(np.int64), 1.0, axis=1)
        layers.append(Layer(index, uses, trace.scores[:, index].astype(np.float64), middle))
    return layers


def results(trace: Trace) -> dict[str, list[float]]:
    """Attempt -> hit rate at each of RESIDENCIES as a share of Belady's, over all layers of the held-out half."""
    layers, held_out = layers_of(trace), trace.halves()[1]
    slots = [round(share * trace.num_experts) for share in RESIDENCIES]
    bounds = [belady(held_out, [n] * len(layers)).hits.sum() for n in slots]
    hits: dict[str, np.ndarray] = {}
    for layer in tqdm(layers, desc="attempts", unit="layer", file=sys.stderr, dynamic_ncols=True):
        experts = held_out.experts[:, layer.position]
        for name, values in attempts(layers, layer, trace.starts.tolist()):
            later = values[layer.middle :]
            found = [replay_layer(experts, Table(later), n).sum(dtype=np.int64) for n in slots]
            hits[name] = hits.get(name, 0) + np.array(found)
    return {name: (total / bounds).tolist() for name, total in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", metavar="TRACE", help="a file of mlxmoe trace --scores")
    found = results(load_trace(parser.parse_args().trace))
    print("| of Belady's hits, at residency | " + " | ".join(f"{share:.0%}" for share in RESIDENCIES) + " |")
    print("|---|" + "---|" * len(RESIDENCIES))
    for name, shares in found.items():
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
