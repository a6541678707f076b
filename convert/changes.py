"""What changed weights do to the predictions: the KL divergence on the same tokens, of every change alone, or of every
change to a model that is changed in all layers.

Single experts cost 1e-5 nats and less, so nothing here is sampled: original and changed model see the same tokens in the
same batches, and the divergence is summed from terms that are not negative. A change is walked through the layers behind it
only; layers are loaded once, whatever the number of changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.errors import UserError

_ORIGINAL, _BASE = "original", "base"

Weights = Callable[[LayerStream], Mapping[str, np.ndarray]]


class Change(NamedTuple):
    """Values in the place of weights of one layer (-1: the embedding; as many as there are layers: what lies behind them).
    weights: called with the layer loaded, gives float32 arrays under the model's names."""

    layer: int
    weights: Weights


def divergence(log_p: mx.array, log_q: mx.array) -> mx.array:
    """KL(P || Q) in nats of log-probabilities [..., V] -> float32 [...].

    sum p (e^d - 1 - d), d = log q - log p: the same as sum p (log p - log q) where both sum to 1, but every term is
    positive, so that small divergences are not lost to rounding.
    """
    difference = mx.where(mx.isfinite(log_p), log_q - log_p, 0.0)
    return (mx.exp(log_p) * (mx.expm1(difference) - difference)).sum(axis=-1)


def divergences(
    walk: Walk,
    changes: Sequence[Change],
    progress: Callable[[int], object],
    base: Callable[[int], Weights] | None = None,
) -> np.ndarray:
    """KL(original || changed) in nats of every token, float32 [changes, windows, T].

    base: what stands in every layer (numbered as in Change) but the one of a change, in place of the original's weights.
    `progress` is called with numbers of steps done, `num_steps` in all. Works with files in the walk's folder and removes
    them: hidden states of one layer for every change. Raises UserError for predictions that are not finite.
    """
    stream, last = walk.stream, len(walk.stream.layers)
    kinds = [f"change{n}" for n in range(len(changes))]
    bases = [Change(i, base(i)) for i in range(-1, last + 1)] if base is not None else []
    before = _BASE if bases else _ORIGINAL  # a change's layer
    walk.embed(_ORIGINAL)
    with _applied(stream, bases[0]) if bases else nullcontext():
        walk.embed(before)
    for kind, change in zip(kinds, changes, strict=True):
        if change.layer < 0:
            with _applied(stream, change):
                walk.embed(kind)
    for i in range(last):
        with stream.loaded(i):
            for kind, change in zip(kinds, changes, strict=True):
                if change.layer == i:
                    with _applied(stream, change):
                        _depart(walk, i, before, kind)
            walk.advance(i, _ORIGINAL)
            with _applied(stream, bases[1 + i]) if bases else nullcontext():
                if bases:
                    walk.advance(i, _BASE)
                for kind, change in zip(kinds, changes, strict=True):
                    if change.layer < i:
                        walk.advance(i, kind)
                        walk.path(kind, i).unlink()
                    progress(change.layer <= i)
        for kind in {_ORIGINAL, before}:
            walk.path(kind, i).unlink()
    found = _compare(walk, changes, kinds, before, bases[-1:], progress)
    for kind in (_ORIGINAL, _BASE, *kinds):
        walk.path(kind, last).unlink(missing_ok=True)
    if not np.isfinite(found).all():
        raise UserError(
            "the predictions with changed weights are not finite", "the checkpoint is damaged: download it again"
        )
    return found


def num_steps(walk: Walk, changes: Sequence[Change]) -> int:
    """One for every layer that a change is walked through, and one for every window at the end."""
    return sum(len(walk.stream.layers) - max(change.layer, 0) for change in changes) + len(walk.tokens)


@contextmanager
def _applied(stream: LayerStream, change: Change) -> Iterator[None]:
    """The change's weights in the place of the loaded ones, while the context lasts."""
    weights = change.weights(stream)
    before = {name: stream.weight(name) for name in weights}
    stream.replace(weights.items())
    try:
        yield
    finally:
        stream.replace(before.items())


def _depart(walk: Walk, i: int, before: str, kind: str) -> None:
    """The hidden states behind layer i, as it is loaded, from those of the kind `before`."""
    with walk.spill(kind, i + 1) as write:
        for rows in walk.batches():
            write(rows, walk.stream.run(i, walk.batch(rows), walk.read(before, i, rows)))


def _compare(
    walk: Walk,
    changes: Sequence[Change],
    kinds: Sequence[str],
    before: str,
    base: Sequence[Change],
    progress: Callable[[int], object],
) -> np.ndarray:
    """[changes, windows, T]. A window at a time: logits are large."""
    stream, last = walk.stream, len(walk.stream.layers)
    found = np.empty((len(changes), *walk.tokens.shape), np.float32)
    for w in range(len(walk.tokens)):
        window = slice(w, w + 1)
        original = _log_probabilities(walk, window, walk.read(_ORIGINAL, last, window))
        for n, (kind, change) in enumerate(zip(kinds, changes, strict=True)):
            own, kind = ([change], before) if change.layer == last else (base, kind)
            with ExitStack() as applied:
                for each in own:
                    applied.enter_context(_applied(stream, each))
                changed = _log_probabilities(walk, window, walk.read(kind, last, window))
            found[n, w] = np.array(divergence(original, changed))[0]
        progress(1)
    return found


def _log_probabilities(walk: Walk, window: slice, hidden: mx.array) -> mx.array:
    """float32 [1, T, V], evaluated."""
    logits = walk.stream.logits(walk.batch(window), hidden).astype(mx.float32)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logs)
    return logs
