"""Looking on while a layer's experts work: what they see, what they give and how much it counts, in any architecture.

The experts are replaced, as long as a context lasts, by a stand-in that computes the same and keeps the values between. How
the block around them weighs their outputs is not read from its code but asked of it: with unit vectors in the place of
the outputs it returns the weights.

Shapes: T tokens, A active experts per token, P = T * A pairs in the order of the experts, D model dim, F expert dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxmoe.convert.source import PROJECTIONS
from mlxmoe.models import ExpertSite

_UNIT = 1024.0  # so large that what else is in the block's output takes few of a weight's bits
_LATENT_OUTPUTS = (
    "fc2_latent_proj",
    "routed_expert_up_proj",
)  # of experts that work in fewer dimensions than the model


class Call(NamedTuple):
    """What a module computed: for P rows inputs [P, D], hidden values before the last projection [P, F], outputs [P, D].

    experts int64 [P], ascending, and tokens int64 [P], the token of each row.
    """

    experts: np.ndarray
    tokens: np.ndarray
    inputs: mx.array
    hidden: mx.array
    outputs: mx.array


class Seen(NamedTuple):
    """One batch in one layer. chosen int64 [T, A] and weights float32 [T, A]: experts of each token and how their outputs
    are weighed. inputs [T, D] of the experts. shared: the shared expert's, where there is one that is known."""

    chosen: np.ndarray
    weights: np.ndarray
    inputs: mx.array
    routed: Call
    shared: Call | None


class _Heard(nn.Module):
    """Around a module: keeps what goes in and what comes out."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self._inner = inner
        self._call: list[Any] = []  # arguments, keyword arguments, result

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name.startswith("_") else getattr(super().__getattr__("_inner"), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._inner(*args, **kwargs)
        self._call = [args, kwargs, result]
        return result


class _Experts(nn.Module):
    """In the place of a SwitchGLU or SwitchMLP. With an `answer` [A, D] it gives that for every token."""

    def __init__(self, inner: Any, kind: str):
        super().__init__()
        self._inner, self._names = inner, PROJECTIONS[kind]
        self._answer: mx.array | None = None
        self._seen: list[Any] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if self._answer is not None:
            return mx.broadcast_to(self._answer, (*indices.shape, self._answer.shape[-1]))
        flat = indices.reshape(-1)
        order = mx.argsort(flat)
        hidden, outputs = self.compute(x.reshape(-1, x.shape[-1])[order // indices.shape[-1]], flat[order])
        self._seen = [x, indices, order, hidden, outputs]
        return outputs[mx.argsort(order)].reshape(*indices.shape, -1)

    def compute(self, rows: mx.array, experts: mx.array) -> tuple[mx.array, mx.array]:
        """rows [P, D] with ascending experts [P] -> hidden values [P, F] and outputs [P, D]."""
        *first, last = (self._inner[name] for name in self._names)
        parts = [projection(mx.expand_dims(rows, -2), experts, sorted_indices=True) for projection in first]
        hidden = self._inner.activation(parts[1], parts[0]) if len(parts) == 2 else self._inner.activation(parts[0])
        return hidden.squeeze(-2), last(hidden, experts, sorted_indices=True).squeeze(-2)


class Watch:
    """The watched experts of one layer, while the context of `watched` lasts."""

    def __init__(self, block: _Heard, experts: _Experts, shared: _Heard | None, last: _Heard | None):
        self._block, self._experts, self._shared, self._last = block, experts, shared, last

    def take(self) -> Seen:
        """What the last call of the layer did, evaluated."""
        x, indices, order, hidden, outputs = self._experts._seen
        active = indices.shape[-1]
        weights = self._weights(active, outputs)
        mx.eval(x, indices, order, hidden, outputs, weights)
        rows = x.reshape(-1, x.shape[-1])
        chosen = np.array(indices).reshape(-1, active).astype(np.int64)
        pairs = np.array(order).astype(np.int64)
        routed = Call(chosen.reshape(-1)[pairs], pairs // active, rows[order // active], hidden, outputs)
        return Seen(chosen, np.array(weights), rows, routed, self._shared_call())

    def outputs(self, rows: mx.array, experts: np.ndarray) -> mx.array:
        """Outputs [P, D] of ascending experts [P] for other rows [P, D]."""
        return self._experts.compute(rows, mx.array(experts.astype(np.uint32)))[1]

    def shared_outputs(self, rows: mx.array) -> mx.array | None:
        """Of the shared expert for rows [T, D]."""
        return None if self._shared is None else self._shared._inner(rows)

    def _weights(self, active: int, outputs: mx.array) -> mx.array:
        """float32 [T, A]: the block's answer to unit vectors in the place of the outputs, less its answer to nothing."""
        block: Any = self._block._inner
        args, kwargs, _ = self._block._call
        units = _UNIT * mx.eye(active, outputs.shape[-1], dtype=outputs.dtype)
        try:
            self._experts._answer = mx.zeros_like(units)
            nothing = _rows(block(*args, **kwargs))
            self._experts._answer = units
            answer = _rows(block(*args, **kwargs)) - nothing
        finally:
            self._experts._answer = None
        latent = next((block[name] for name in _LATENT_OUTPUTS if isinstance(block.get(name), nn.Module)), None)
        if latent is None:
            return answer[:, :active] / _UNIT
        # The units went through a projection whose columns are not orthogonal: least squares
        columns = np.array((latent(units) - latent(mx.zeros_like(units))).astype(mx.float32)).T
        return answer @ mx.array(np.linalg.pinv(columns).T.astype(np.float32))

    def _shared_call(self) -> Call | None:
        if self._shared is None or self._last is None:
            return None
        (x, *_), _, _ = self._shared._call
        (hidden, *_), _, outputs = self._last._call
        mx.eval(x, hidden, outputs)
        tokens = np.arange(x.size // x.shape[-1])
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, hidden, outputs))
        return Call(np.zeros(len(tokens), np.int64), tokens, *flat)


def _rows(result: Any) -> mx.array:
    """What a block returns, as float32 [T, D]."""
    y: mx.array = result[0] if isinstance(result, tuple) else result
    return y.reshape(-1, y.shape[-1]).astype(mx.float32)


@contextmanager
def watched(layer: nn.Module, path: str, site: ExpertSite) -> Iterator[Watch]:
    """Watches the experts of one layer, whose path in the model is `path`; then the layer is as it was. A watched layer
    gives the same outputs, up to the order of sums."""
    modules: dict[str, Any] = dict(layer.named_modules())
    inside = site.path.removeprefix(path + ".")
    parent, _, name = inside.rpartition(".")
    block = modules[parent]
    experts, heard = _Experts(modules[inside], site.kind), _Heard(block)
    shared_path = next((p for p, m in modules.items() if "shared" in p.rpartition(".")[2] and "down_proj" in m), None)
    shared, last = None, None
    replaced: list[tuple[nn.Module, str, Any]] = [(block, name, modules[inside])]
    if shared_path is not None:
        owner, _, own_name = shared_path.rpartition(".")
        module = modules[shared_path]
        shared, last = _Heard(module), _Heard(module["down_proj"])
        replaced += [(module, "down_proj", module["down_proj"]), (modules[owner], own_name, module)]
        module.update_modules({"down_proj": last})
        modules[owner].update_modules({own_name: shared})
    block.update_modules({name: experts})
    layer.update_modules(tree_unflatten([(parent, heard)]))
    replaced.append((layer, parent, block))
    try:
        yield Watch(heard, experts, shared, last)
    finally:
        for module, name, original in reversed(replaced):
            module.update_modules(tree_unflatten([(name, original)]))
