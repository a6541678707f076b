"""A whole source model run at once, with what goes in and out of its layers: what is compared with going layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.convert.source import Source


class Whole(NamedTuple):
    """A whole model: its layers, and by layer what goes in and comes out of it and of its block, float64 [T, D]."""

    layers: list[Any]
    before: list[np.ndarray]
    behind: list[np.ndarray]
    block_inputs: list[np.ndarray]


class Kept:
    """In the place of a module: keeps its input and its output."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(x, *args, **kwargs)
        self.seen = [np.array(a).reshape(-1, a.shape[-1]).astype(np.float64) for a in (x, result)]
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def whole(folder: Path, tokens: np.ndarray) -> Whole:
    """Of an unconverted folder in float32, run on tokens [windows, T]. Its layers are as they were."""
    source = Source(open_checkpoint(folder), 32)
    model = source.build()
    model.load_weights([(n, a.astype(mx.float32)) for n, a in source.tensors().items()], strict=False)
    layers = list(model.model.layers)
    blocks = [Kept(layer.mlp) for layer in layers]
    for layer, block in zip(layers, blocks, strict=True):
        layer.mlp = block
    outside = [Kept(layer) for layer in layers]
    model.model.layers[:] = outside
    model(mx.array(tokens))
    result = Whole(layers, *([kept.seen[i] for kept in outside] for i in (0, 1)), [block.seen[0] for block in blocks])
    for layer, block in zip(layers, blocks, strict=True):
        layer.mlp = block.inner
    return result
