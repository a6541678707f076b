"""A model run one layer at a time: the weights of one layer in memory, the model's own code around it.

Every layer of the freshly built (and never evaluated) model is replaced by a stand-in that notes what the model hands to
it (masks and the like) and passes its input on. Calling the model then builds the little that lies before, between and
behind the layers; the layers themselves are called here, on hidden states that the caller keeps. So any architecture of
mlx-lm whose layers are called in turn runs without code of its own.

`run` takes a layer forward. `differentiate` also goes backward: with the gradient of a loss at the layer's output it gives
that at its input, and for every recorded matrix its inputs and the gradient at its outputs.

Shapes: B windows of T tokens, D model dim, N rows and K columns of a matrix, A active experts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.errors import UserError
from mlxmoe.models import ExpertSite, named_arrays
from mlxmoe.prepared import activation_dtype


class Weights(Protocol):
    """Where a LayerStream takes its weights from: source.Source, written.Written."""

    checkpoint: Checkpoint
    sites: list[ExpertSite]
    build: Callable[[], Any]

    def tensors(self) -> dict[str, mx.array]: ...


class Record(NamedTuple):
    """What one matrix saw and what its outputs are worth: inputs [rows, K], gradients [rows, N] float32 of the loss at its
    outputs, the expert of each row (None outside the experts), outputs [rows, N]."""

    inputs: np.ndarray
    gradients: np.ndarray
    experts: np.ndarray | None
    outputs: np.ndarray


class Backward(NamedTuple):
    """The gradient [B, T, D] at the input, the records by the path of the module, and the loss that they belong to."""

    gradient: mx.array
    records: dict[str, Record]
    loss: float


class _StandIn:
    """In the place of a layer. `given` replaces what it passes on."""

    def __init__(self, layer: nn.Module, first: _StandIn | None):
        self._layer, self._first = layer, first
        self._extras: int | None = None  # what layers return behind the hidden states
        self.given: mx.array | None = None
        self.hidden: mx.array | None = None
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)  # the kind of attention and the like, which the model's loop asks for

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, (args, kwargs)
        first = self._first or self
        if first._extras is None:  # builds a graph that is never evaluated
            result = self._layer(hidden, *args, **kwargs)
            first._extras = len(result) - 1 if isinstance(result, tuple) else 0
        passed = hidden if self.given is None else self.given
        return (passed, *[None] * first._extras) if first._extras else passed


class _Recorder(nn.Module):
    """Around a module: keeps what goes in and comes out, and adds `offset` to it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self._offset: mx.array | None = None
        self._seen: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("_"):
            return super().__getattr__(name)
        return getattr(super().__getattr__("inner"), name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        y = self.inner(x, *args, **kwargs)
        return y if isinstance(self.inner, nn.Embedding) else self._note(x, y, args)  # tied: recorded as the head

    def as_linear(self, x: mx.array) -> mx.array:
        return self._note(x, self.inner.as_linear(x), ())

    def _note(self, x: mx.array, y: mx.array, args: tuple[Any, ...]) -> mx.array:
        routed = isinstance(self.inner, SwitchLinear | SwitchGLU | SwitchMLP)
        # All experts of a layer in one module take [..., D] and give [..., A, D]; their matrices have a row for each pair.
        each = x if not routed or isinstance(self.inner, SwitchLinear) else mx.expand_dims(x, (-2, -3))
        self._seen = [each, args[0] if routed else None, y]
        return y if self._offset is None else y + self._offset


class LayerStream:
    """See the file's heading. Reads weights from `source`, one layer at a time; `load` before `run`."""

    def __init__(self, source: Weights):
        self._source = source
        self._dtype = activation_dtype(source.checkpoint.config)
        self.model: Any = source.build()
        self.model.train()  # recurrent layers then take the path that has a gradient
        site = source.sites[0]
        head, _, _ = site.path.partition(f".{site.layer}.")
        self._prefix = head
        container = self.model
        for name in head.split("."):
            container = container[name] if isinstance(container, dict) else getattr(container, name)
        self.layers: list[Any] = list(container)
        self._load(self.model, "", {n: a for n, a in source.tensors().items() if not n.startswith(head + ".")})
        stand_ins: list[_StandIn] = []
        for layer in self.layers:
            stand_ins.append(_StandIn(layer, stand_ins[0] if stand_ins else None))
        container[:] = stand_ins
        self._stand_ins = stand_ins

    def path(self, index: int) -> str:
        return f"{self._prefix}.{index}"

    # -- weights -------------------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """The weights of one layer, read from the source and dropped behind."""
        path, layer = self.path(index), self.layers[index]
        weights = {n: a for n, a in self._source.tensors().items() if n.startswith(path + ".")}
        self._load(layer, path + ".", weights)
        del weights
        mx.eval(layer.parameters())
        try:
            yield
        finally:
            empty = {name: mx.zeros(a.shape, a.dtype) for name, a in named_arrays(layer.parameters()).items()}
            layer.load_weights(list(empty.items()))
            gc.collect()
            mx.clear_cache()

    def replace(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """Puts other values, as float32 arrays under the model's names, in the place of loaded ones."""
        for name, array in weights:
            path, _, leaf = name.rpartition(".")
            module = self.module(path)
            module[leaf] = mx.array(array).reshape(module[leaf].shape).astype(module[leaf].dtype)
            mx.eval(module[leaf])

    def module(self, path: str) -> nn.Module:
        """The one at a path of the model, in a layer or outside."""
        if path.startswith(self._prefix + "."):
            index, _, rest = path.removeprefix(self._prefix + ".").partition(".")
            return dict(self.layers[int(index)].named_modules())[rest]
        return dict(self.model.named_modules())[path]

    def weight(self, name: str) -> np.ndarray:
        """float32: a loaded weight under the model's name. Raises UserError for values not finite."""
        path, _, leaf = name.rpartition(".")
        array = np.array(self.module(path)[leaf].astype(mx.float32))
        if not np.isfinite(array).all():
            raise UserError(f"{name} has values that are not finite", "the checkpoint is damaged: download it again")
        return array

    def _load(self, module: Any, prefix: str, weights: dict[str, mx.array]) -> None:
        cast = [
            (n.removeprefix(prefix), a.astype(self._dtype) if a.dtype in (mx.float16, mx.bfloat16) else a)
            for n, a in weights.items()
        ]
        module.load_weights(cast, strict=False)
        for name, array in cast:
            self._check_finite(prefix + name, array)

    def _check_finite(self, name: str, array: mx.array) -> None:
        """Here, where what is damaged is known by name, and not behind the layers that it spoils."""
        if not mx.issubdtype(array.dtype, mx.floating) or mx.isfinite(array).all().item():
            return
        where = ""
        if any(name.startswith(site.path + ".") for site in self._source.sites):
            bad = [e for e, part in enumerate(array) if not mx.isfinite(part).all().item()]
            where = f" in expert {bad[0]}"
        raise UserError(f"{name} has values that are not finite{where}", "the checkpoint is damaged: download it again")

    # -- running -------------------------------------------------------------------------------------------------------

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens [B, T] -> what goes into the first layer, [B, T, D]."""
        self.model(tokens)
        hidden = self._stand_ins[0].hidden
        assert hidden is not None
        return hidden

    def run(self, index: int, tokens: mx.array, hidden: mx.array) -> mx.array:
        """The output [B, T, D] of one loaded layer. Raises UserError for one that cannot run alone."""
        self.model(tokens)
        try:
            return self._call(index, hidden)
        except ValueError as error:
            raise self._unfit(error) from None

    def _call(self, index: int, hidden: mx.array) -> mx.array:
        args, kwargs = self._stand_ins[index].call
        result = self.layers[index](hidden, *args, **kwargs)
        output: mx.array = result[0] if isinstance(result, tuple) else result
        return output

    def logits(self, tokens: mx.array, hidden: mx.array) -> mx.array:
        """[B, T, V]: what follows the last layer, from the hidden states [B, T, D] behind it."""
        self._stand_ins[-1].given = hidden
        try:
            logits: mx.array = self.model(tokens)
            return logits
        finally:
            self._stand_ins[-1].given = None

    def differentiate(
        self, index: int, tokens: mx.array, hidden: mx.array, gradient: mx.array, paths: Iterable[str]
    ) -> Backward:
        """Backward through one loaded layer from the gradient [B, T, D] at its output; records the modules `paths`."""
        return self.descend(index, tokens, hidden, lambda y: (y * gradient.astype(mx.float32)).sum(), paths)

    def descend(
        self,
        index: int,
        tokens: mx.array,
        hidden: mx.array,
        loss: Callable[[mx.array], mx.array],
        paths: Iterable[str],
    ) -> Backward:
        """Backward through one loaded layer from a loss of its output (float32 [B, T, D]); records the modules `paths`."""
        self.model(tokens)
        prefix = self.path(index) + "."
        return self._backward(
            self.layers[index], prefix, paths, lambda x: loss(self._call(index, x).astype(mx.float32)), hidden
        )

    def inputs(self, index: int, tokens: mx.array, hidden: mx.array, path: str) -> mx.array:
        """What the module `path` of a loaded layer gets, [..., K]. Raises UserError for one that is never called."""
        module, name = self.layers[index], path.removeprefix(self.path(index) + ".")
        inner = dict(module.named_modules())[name]
        recorder = _Recorder(inner)
        module.update_modules(tree_unflatten([(name, recorder)]))
        try:
            self.run(index, tokens, hidden)
        finally:
            module.update_modules(tree_unflatten([(name, inner)]))
        if not recorder._seen:
            raise UserError(
                f"{self._source.checkpoint.name}: {path} is not called as a module", "leave its calibration out"
            )
        seen: mx.array = recorder._seen[0]
        return seen

    def sample(self, tokens: mx.array, hidden: mx.array, paths: Iterable[str], seed: int) -> Backward:
        """Backward through what follows the last layer, from the log-probability of a next token drawn by the model itself
        at every position: the mean outer product of such gradients is the Fisher information, the curvature of the
        KL divergence."""
        key = mx.random.key(seed)

        def loss(logits: mx.array) -> mx.array:
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            drawn = mx.stop_gradient(mx.random.categorical(logs, key=key))
            return mx.take_along_axis(logs, drawn[..., None], -1).sum()

        return self.conclude(tokens, hidden, loss, paths)

    def conclude(
        self, tokens: mx.array, hidden: mx.array, loss: Callable[[mx.array], mx.array], paths: Iterable[str]
    ) -> Backward:
        """Backward through what follows the last layer, from a loss of the logits (float32 [B, T, V])."""

        def behind(x: mx.array) -> mx.array:
            self._stand_ins[-1].given = x
            return loss(self.model(tokens).astype(mx.float32))

        try:
            return self._backward(self.model, "", paths, behind, hidden)
        finally:
            self._stand_ins[-1].given = None

    def _unfit(self, error: ValueError) -> UserError:
        return UserError(
            f"{self._source.checkpoint.name}: this architecture cannot be calibrated ({error})",
            "convert it with --method rtn",
        )

    def _backward(
        self,
        module: nn.Module,
        prefix: str,
        paths: Iterable[str],
        loss: Callable[[mx.array], mx.array],
        hidden: mx.array,
    ) -> Backward:
        paths = list(paths)
        found = dict(module.named_modules())
        inner = [found[path.removeprefix(prefix)] for path in paths]
        recorders = [_Recorder(m) for m in inner]
        names = [path.removeprefix(prefix) for path in paths]
        module.update_modules(tree_unflatten(list(zip(names, recorders, strict=True))))
        try:
            loss(hidden)  # for the shapes: nothing of it is evaluated
            offsets = [mx.zeros_like(r._seen[2]) for r in recorders]

            def traced(x: mx.array, offsets: list[mx.array]) -> tuple[mx.array, list[Any]]:
                for recorder, offset in zip(recorders, offsets, strict=True):
                    recorder._offset = offset
                value = loss(x)
                return value, [r._seen for r in recorders]

            (value, seen), (at_input, at_outputs) = mx.value_and_grad(traced, argnums=(0, 1))(hidden, offsets)
            mx.eval(value, at_input, at_outputs, seen)
        except ValueError as error:
            raise self._unfit(error) from None
        finally:
            module.update_modules(tree_unflatten(list(zip(names, inner, strict=True))))
        records = {
            path: _record(seen_by, at_output) for path, seen_by, at_output in zip(paths, seen, at_outputs, strict=True)
        }
        return Backward(at_input, records, float(np.array(value)))


def _record(seen: list[Any], gradient: mx.array) -> Record:
    """Rows of one module's call; inputs that serve several experts are repeated for each."""
    x, experts, y = seen
    indices = None
    if experts is not None:
        x = mx.broadcast_to(x, (*experts.shape, 1, x.shape[-1]))
        indices = np.array(experts).reshape(-1)
    inputs, gradients, outputs = (np.array(a.astype(mx.float32)).reshape(-1, a.shape[-1]) for a in (x, gradient, y))
    return Record(inputs, gradients, indices, outputs)
