"""The passes of a calibrated conversion over the model, layer by layer, with hidden states and gradients on the disk.

    forward    hidden states of the original model behind every layer                     hidden-<i>.npy
    backward   from the last layer to the first: gradients, statistics, and what every    gradient-<i>.npy, weighed-<i>.npz
               matrix would lose at every width
    writing    after the allocation, from the first layer to the last: statistics on the  quantized-<i>.npy, trunk-<i>.npz,
               hidden states that the quantized layers before give, codes, files          experts-*.safetensors

<i> counts layers, one more than there are for what lies behind the last. A pass that was stopped goes on behind the last
file that is whole; what no later step reads is removed. In memory: one layer's weights, its statistics, one batch of
tokens. On the disk: hidden states, or gradients, of one layer take tokens * D * 4 bytes (2 on a GPU), and at most about as
many of them are there as there are layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.convert.calibrate import TOKENS_PER_EXPERT, Calibration, choose_tokens, read_documents
from mlxmoe.convert.calibrated import affine_values, code_trunk, measure_experts, pack_experts
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.measure import ExpertErrors, TrunkErrors, candidate_formats
from mlxmoe.convert.quantize import Affine
from mlxmoe.convert.selftext import SELF, own_text
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.convert.stats import Accumulator, Moments
from mlxmoe.convert.stream import Backward, LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.write import Packed, save_arrays
from mlxmoe.errors import UserError
from mlxmoe.loading import (open_model)
from mlxmoe.models import ExpertSite
from mlxmoe.plan import LayerPlan, Plan

# Called with a layer of the plan and its experts, coded; writes the file
LayerWriter = Callable[[LayerPlan, Iterator[list[Packed]]], None]


class Measured(NamedTuple):
    """What the allocation needs, and notes for people."""

    experts: dict[int, ExpertErrors]
    trunk: TrunkErrors
    notes: list[str]


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """Raises UserError for a folder without a usable one."""
    try:
        return load_tokenizer(checkpoint.folder)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        raise UserError(
            f"{checkpoint.name} has no usable tokenizer ({error})",
            "calibration needs it: copy tokenizer.json of the original model into the folder, or use --method rtn",
        ) from error


class Passes:
    """See the file's heading. Works in the folder `state`. Raises UserError for text that is too short, an architecture
    whose layers cannot be run one by one, and statistics that are not finite."""

    def __init__(self, source: Source, config: ConvertConfig, tokenizer: Any, state: Path, quiet: bool):
        assert config.calibration is not None
        self._source, self._config, self._state, self._quiet = source, config, state, quiet
        self._calibration: Calibration = config.calibration
        if self._calibration.file == SELF:
            tokens = self._own_tokens()
        else:
            documents = read_documents(self._calibration.file, tokenizer)
            tokens = choose_tokens(documents, tokenizer, self._calibration, config.seed)
        self._stream = LayerStream(source)
        self._walk = Walk(self._stream, tokens, state)
        self._last = len(self._stream.layers)
        self._sites = {self._index(site): site for site in source.sites}
        self._layer_of = {t.name: i for i in range(-1, self._last + 1) for t in self._trunk_of(i)}

    def _own_tokens(self) -> np.ndarray:
        """Text that the model writes, kept. The whole model must fit in memory for it."""
        path = self._state / "tokens.npz"
        if not path.is_file():
            loaded = open_model(self._source.checkpoint.folder)
            windows = max(1, self._calibration.tokens // self._calibration.window)
            with tqdm(total=windows, unit=" texts", desc="write text", disable=self._quiet) as bar:
                tokens = own_text(
                    *(loaded.model, loaded.tokenizer, windows, self._calibration.window),
                    seed=self._config.seed,
                    progress=bar.update,
                )
            save_arrays(path, {"tokens": tokens})
        with np.load(path) as saved:
            return np.array(saved["tokens"])

    def _index(self, site: ExpertSite) -> int:
        """Position of a site's layer among the layers, which is not its number where numbering has gaps."""
        return next(i for i in range(self._last) if site.path.startswith(self._stream.path(i) + "."))

    # -- forward and backward ------------------------------------------------------------------------------------------

    def measure(self) -> Measured:
        """Runs forward and backward over the original model, as far as that is not done yet."""
        complete = self._walk.path("weighed", -1, "npz").is_file()  # comes last; writing then removes gradients
        undone = [] if complete else [i for i in range(self._last + 1) if not self._is_weighed(i)]
        top = max(undone, default=-1)
        with self._bar("calibrate", 2 * self._last + 1) as step:
            step(2 * self._last + 1 - len(undone) - max(top, 0))
            if undone:
                self._forward(top, step)
            for i in reversed(undone):
                if i == self._last:
                    self._head()
                else:
                    self._backward(i)
                if self._calibration.predecessors and i > 0:
                    self._walk.path("hidden", i).unlink()
                step(1)
            if not complete:
                self._embedding()
        return self._measured()

    def _is_weighed(self, i: int) -> bool:
        return self._walk.path("weighed", i, "npz").is_file() and self._walk.path("gradient", i).is_file()

    def _forward(self, top: int, step: Callable[[int], object]) -> None:
        """Hidden states of the original model up to what goes into layer `top`."""
        self._walk.embed("hidden")
        for i in range(top):
            if not self._walk.path("hidden", i + 1).is_file():
                with self._stream.loaded(i):
                    self._walk.advance(i, "hidden")
            step(1)

    def _head(self) -> None:
        """What lies behind the last layer: draws next tokens, weighs the head."""
        tensors = self._trunk_of(self._last)
        moments = self._draw("hidden", tensors, keep="gradient")
        save_arrays(self._walk.path("weighed", self._last, "npz"), self._weigh_trunk(tensors, moments))

    def _draw(self, kind: str, tensors: list[TrunkTensor], keep: str | None) -> dict[str, Moments]:
        """Statistics of the head; `keep`: writes the gradient of the drawn tokens' log-probability as well."""

        def passes(rows: slice) -> Backward:
            paths = [tensor.module for tensor in tensors]
            seed = (self._config.seed << 32) + rows.start
            return self._stream.sample(self._walk.batch(rows), self._walk.read(kind, self._last, rows), paths, seed)

        return self._accumulate(self._last, tensors, None, passes, keep)

    def _backward(self, i: int) -> None:
        tensors, site = self._trunk_of(i), self._sites.get(i)
        with self._stream.loaded(i):
            moments = self._differentiate(i, "hidden", keep="gradient")
            arrays = self._weigh_trunk(tensors, moments)
            if site is not None:
                arrays |= self._weigh_experts(site, moments)
        save_arrays(self._walk.path("weighed", i, "npz"), arrays)

    def _differentiate(self, i: int, kind: str, keep: str | None) -> dict[str, Moments]:
        """Statistics of a loaded layer at its hidden states of a kind, by the gradients behind it."""
        tensors, site = self._trunk_of(i), self._sites.get(i)
        paths = [tensor.module for tensor in tensors]
        if site is not None:
            paths += [f"{site.path}.{shape.name}" for shape in self._source.shapes[site.path]]

        def passes(rows: slice) -> Backward:
            hidden, gradient = self._walk.read(kind, i, rows), self._walk.read("gradient", i + 1, rows)
            return self._stream.differentiate(i, self._walk.batch(rows), hidden, gradient, paths)

        return self._accumulate(i, tensors, site, passes, keep)

    def _accumulate(
        self,
        i: int,
        tensors: list[TrunkTensor],
        site: ExpertSite | None,
        passes: Callable[[slice], Backward],
        keep: str | None,
    ) -> dict[str, Moments]:
        """Sums the records of all batches, by module path; spills the gradients under the kind `keep`."""
        sums = {t.module: Accumulator(t.module, dense=len(t.shape) == 2) for t in tensors}
        if site is not None:
            for shape in self._source.shapes[site.path]:
                path = f"{site.path}.{shape.name}"
                sums[path] = Accumulator(path, site.num_experts)
        with self._walk.spill(keep or "", i) as write:
            for rows in self._walk.batches():
                done = passes(rows)
                for path, record in done.records.items():
                    sums[path].add(record, self._walk.batch(rows).size)
                if keep:
                    write(rows, done.gradient)
        return {path: each.moments() for path, each in sums.items()}

    def _embedding(self) -> None:
        """The input embedding: what an error in it costs, from the gradient at the first layer's input."""
        sums, total = 0.0, self._walk.num_tokens
        for rows in self._walk.batches():
            hidden, gradient = (
                np.array(self._walk.read(k, 0, rows).astype(mx.float32)) for k in ("hidden", "gradient")
            )
            sums += float((np.square(gradient).mean(-1) * np.square(hidden).sum(-1)).sum(dtype=np.float64))
        tensors = self._trunk_of(-1)
        empty = Moments(np.zeros((0, 0, 0), np.float32), np.zeros((0, 0)), np.zeros(1, np.int64), sums / total / 2)
        save_arrays(
            self._walk.path("weighed", -1, "npz"), self._weigh_trunk(tensors, {t.module: empty for t in tensors})
        )

    # -- what errors cost ----------------------------------------------------------------------------------------------

    def _weigh_trunk(self, tensors: list[TrunkTensor], moments: dict[str, Moments]) -> dict[str, np.ndarray]:
        """name -> [loss at a relative error of 1, loss at each of the candidate formats]."""
        result = {}
        for tensor in tensors:
            matrix = self._stream.weight(tensor.name).reshape(-1, tensor.shape[-1])
            row = []
            for bits, group_size in candidate_formats(tensor):
                _, loss, norm = code_trunk(matrix, moments[tensor.module], bits, group_size, sweeps=1)
                row.append(loss)
            result[tensor.name] = np.array([norm, *row])
        return result

    def _weigh_experts(self, site: ExpertSite, moments: dict[str, Moments]) -> dict[str, np.ndarray]:
        norms, errors = [], []
        for shape in self._source.shapes[site.path]:
            path = f"{site.path}.{shape.name}"
            stack = self._stream.weight(f"{path}.weight")
            weighed = measure_experts(stack, moments[path], self._config.expert_levels, shape.group_size)
            norms.append(weighed.norms)
            errors.append(weighed.errors)
        tokens = moments[path].tokens
        return {"experts.norms": np.stack(norms), "experts.errors": np.stack(errors), "experts.tokens": tokens}

    def _measured(self) -> Measured:
        """All artefacts of `measure` together."""
        experts: dict[int, ExpertErrors] = {}
        trunk: dict[str, np.ndarray] = {}
        notes: list[str] = []
        for i in range(-1, self._last + 1):
            with np.load(self._walk.path("weighed", i, "npz")) as saved:
                trunk |= {name: saved[name] for name in saved.files if not name.startswith("experts.")}
                site = self._sites.get(i)
                if site is not None:
                    norms = saved["experts.norms"]
                    experts[site.layer] = ExpertErrors(norms, saved["experts.errors"], norms)
                    notes += _routing_notes(site, saved["experts.tokens"])
        names = [tensor.name for tensor in self._source.trunk if tensor.tensor_class]
        width = max((len(trunk[name]) for name in names), default=1) - 1
        errors = np.zeros((len(names), width))
        for t, name in enumerate(names):
            errors[t, : len(trunk[name]) - 1] = trunk[name][1:]
        norms = np.array([trunk[name][0] for name in names])
        used = self._walk.num_tokens
        if used < self._calibration.tokens // self._calibration.window * self._calibration.window:
            notes.insert(0, f"the calibration text has {used} tokens, fewer than asked")
        return Measured(experts, TrunkErrors(norms, errors, norms), notes)

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, plan: Plan, write_layer: LayerWriter, written: Callable[[str], bool]) -> None:
        """Codes every layer by the plan and hands its experts to `write_layer`, unless their file is `written` already;
        leaves the coded trunk for `coded`."""
        kind = "quantized" if self._calibration.predecessors else "hidden"
        layers = {layer.path: layer for layer in plan.layers}
        with self._bar("quantize", self._last + 1) as step:
            if not self._walk.path("trunk", 0, "npz").is_file():
                self._walk.embed(kind)
            for i in range(self._last):
                if not self._walk.path("trunk", i, "npz").is_file():
                    site = self._sites.get(i)
                    self._write_layer(i, plan, layers[site.path] if site is not None else None, write_layer, kind)
                if kind == "quantized":
                    self._walk.path(kind, i).unlink(missing_ok=True)
                    self._walk.path("gradient", i + 1).unlink(missing_ok=True)
                step(1)
            if not self._walk.path("trunk", self._last, "npz").is_file():
                tensors = self._trunk_of(self._last)
                _, arrays = self._code_trunk(self._last, plan, self._draw(kind, tensors, keep=None))
                save_arrays(self._walk.path("trunk", self._last, "npz"), arrays)
            step(1)

    def _write_layer(self, i: int, plan: Plan, layer: LayerPlan | None, write_layer: LayerWriter, kind: str) -> None:
        """Codes one layer. Its trunk-<i>.npz comes last of all: where it is, the layer is done."""
        with self._stream.loaded(i):
            moments = self._differentiate(i, kind, keep=None)
            values, arrays = self._code_trunk(i, plan, moments)
            if layer is not None:
                packed = []
                for p, shape in enumerate(layer.projections):
                    path = f"{layer.path}.{shape.name}"
                    levels = [expert.levels[p] for expert in layer.experts]
                    stack = self._stream.weight(f"{path}.weight")
                    coded = pack_experts(stack, moments[path], levels, shape, self._calibration.mu)
                    values[f"{path}.weight"] = np.stack([value for *_, value in coded])
                    packed.append([Packed(matrix, errors) for matrix, errors, _ in coded])
                write_layer(layer, map(list, zip(*packed, strict=True)))
            if kind == "quantized":
                self._stream.replace(values.items())
                self._walk.advance(i, kind)
        save_arrays(self._walk.path("trunk", i, "npz"), arrays)

    def _code_trunk(
        self, i: int, plan: Plan, moments: dict[str, Moments]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Codes the trunk tensors of a layer as the plan says: values by name, and codes, scales and biases to be kept."""
        values, arrays = {}, {}
        for tensor in self._trunk_of(i):
            entry = plan.trunk[tensor.name]
            matrix = self._stream.weight(tensor.name)
            flat = matrix.reshape(-1, matrix.shape[-1])
            coded, _, _ = code_trunk(flat, moments[tensor.module], entry.bits, entry.group_size)
            values[tensor.name] = affine_values(coded, matrix.shape)
            for field in ("codes", "scales", "biases"):
                arrays[f"{tensor.name}/{field}"] = getattr(coded, field)
        return values, arrays

    def coded(self, tensor: TrunkTensor) -> Affine | None:
        """A trunk tensor as `write` coded it; None for one that it leaves to least squares on the weights."""
        i = self._layer_of[tensor.name]
        if i < 0:
            return None
        with np.load(self._walk.path("trunk", i, "npz")) as saved:
            codes, scales, biases = (saved[f"{tensor.name}/{field}"] for field in ("codes", "scales", "biases"))
        return Affine(codes, scales, biases, 0.0)

    # -- tensors of a layer --------------------------------------------------------------------------------------------

    def _trunk_of(self, i: int) -> list[TrunkTensor]:
        """The quantizable trunk tensors of a layer; behind the last: the head (or the embedding that serves as one);
        -1: an embedding that is no head."""
        quantizable = [tensor for tensor in self._source.trunk if tensor.tensor_class]
        if 0 <= i < self._last:
            return [t for t in quantizable if t.name.startswith(self._stream.path(i) + ".")]
        outside = [t for t in quantizable if not t.name.startswith(self._stream.path(0).rpartition(".")[0] + ".")]
        tied = not any(t.tensor_class == "head" for t in outside)
        return [t for t in outside if (t.tensor_class == "embedding" and not tied) == (i == -1)]

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, unit=" layers", desc=name, disable=self._quiet) as bar:
            yield bar.update


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
        notes.append(f"layer {site.layer}: {tokens.mean():.0f} tokens per expert are few; give more calibration text")
    return notes
