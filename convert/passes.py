"""The passes of a calibrated conversion over the model, layer by layer, with hidden states and gradients on the disk.

    forward    hidden states of the original model behind every layer                     hidden-<i>.npy
    backward   from the last layer to the first: gradients, statistics, rotations, and    gradient-<i>.npy, weighed-<i>.npz,
               what every matrix would lose at every width                                rotation-<layer>.npz
    writing    after the allocation, from the first layer to the last: statistics on the  quantized-<i>.npy, trunk-<i>.npz,
               hidden states that the quantized layers before give, codes, files          experts-*.safetensors
    polishing  with --polish model, after all codes and before the files                  experts-<i>.npz, polished.npz

<i> counts layers, one more than there are for what lies behind the last. A pass that was stopped goes on behind the last
file that is whole; what no later step reads is removed. In memory: one layer's weights, its statistics, one batch of
tokens. On the disk: hidden states, or gradients, of one layer take tokens * D * 4 bytes (2 on a GPU), and at most about as
many of them are there as there are layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.convert.awq import Balance, Projection, degree, find_balance
from mlxmoe.convert.calibrate import TOKENS_PER_EXPERT, Calibration, choose_tokens, read_documents
from mlxmoe.convert.calibrated import affine_values, code_trunk, measure_experts, pack_experts
from mlxmoe.convert.coded import CodedLayer
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.ensemble import code_copy, learn_weights, mean_values
from mlxmoe.convert.gptq import DAMPING
from mlxmoe.convert.hubtext import HUB, hub_documents
from mlxmoe.convert.measure import ExpertErrors, ExpertScores, TrunkErrors, candidate_formats
from mlxmoe.convert.polish import EPOCHS, Share, Stored, polish_factors, polish_layer, polish_model, share_windows
from mlxmoe.convert.quantize import Affine
from mlxmoe.convert.rotate import AUTO, Rotated, Sample, chosen_rotations, sampled_rotation, unsampled_rotation
from mlxmoe.convert.route import (
    TEMPERATURE,
    Router,
    degradation,
    find_router,
    fit_router,
    keep_inputs,
    lowered_bias,
)
from mlxmoe.convert.scores import Scoring, observe
from mlxmoe.convert.selftext import SELF, own_text
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.convert.stats import Accumulator, Moments, unseen_directions
from mlxmoe.convert.stream import Backward, LayerStream
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.write import Packed, copy_turns, load_rotations, save_arrays, save_rotations
from mlxmoe.errors import UserError
from mlxmoe.loading import open_model
from mlxmoe.models import ExpertSite, num_experts_per_token
from mlxmoe.plan import LayerPlan, Plan
from mlxmoe.rotation import FITTED, PLAIN, Rotation

ROTATED_EXPERTS = 8  # of a layer, by whose errors its rotations are chosen
POLISHED = "polished.npz"
INPUTS_PER_BATCH = 256  # that are kept of every matrix for rotations that are fitted to them

# Called with a layer of the plan and its experts, coded; writes the file
LayerWriter = Callable[[LayerPlan, Iterator[list[Packed | None]]], None]


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
        tokens = self._tokens(tokenizer)
        self._stream = LayerStream(source)
        if self._calibration.method == "awq":
            for site in source.sites:
                degree(self._stream.module(site.path))  # refused before there is any work
        self._check_routers()
        self._walk = Walk(self._stream, tokens, state)
        self._last = len(self._stream.layers)
        self._sites = {self._index(site): site for site in source.sites}
        self._layer_of = {t.name: i for i in range(-1, self._last + 1) for t in self._trunk_of(i)}
        self.notes: list[str] = []  # of `write`, for people

    def _tokens(self, tokenizer: Any) -> np.ndarray:
        """int32 [windows, window] of calibration text. What the model writes or the Hub gives is kept: neither need come
        out the same again."""
        text = self._calibration
        if text.file not in (SELF, HUB):
            return choose_tokens(read_documents(text.file, tokenizer), tokenizer, text, self._config.seed)
        path = self._state / "tokens.npz"
        if not path.is_file():
            tokens = self._own_text() if text.file == SELF else self._hub_text(tokenizer)
            save_arrays(path, {"tokens": tokens})
        with np.load(path) as saved:
            return np.array(saved["tokens"])

    def _hub_text(self, tokenizer: Any) -> np.ndarray:
        text, seed = self._calibration, self._config.seed
        return choose_tokens(hub_documents(tokenizer, text.windows * text.window, seed), tokenizer, text, seed)

    def _own_text(self) -> np.ndarray:
        """What the model writes. The whole model must fit in memory for it."""
        text, loaded = self._calibration, open_model(self._source.checkpoint.folder)
        drawn = text.windows * text.candidates
        with tqdm(total=drawn, unit=" texts", desc="write text", disable=self._quiet) as bar:
            return own_text(
                *(loaded.model, loaded.tokenizer, text.windows, text.window),
                seed=self._config.seed,
                progress=bar.update,
                candidates=text.candidates,
            )

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
        arrays = self._weigh_trunk(tensors, moments) | self._unseen(moments)
        save_arrays(self._walk.path("weighed", self._last, "npz"), arrays)

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
            arrays = self._weigh_trunk(tensors, moments) | self._unseen(moments)
            if site is not None:
                arrays |= self._weigh_experts(i, site, moments)
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
                sampled = INPUTS_PER_BATCH if self._config.rotation in FITTED else 0
                sums[path] = Accumulator(path, site.num_experts, sample=sampled)
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

    def _unseen(self, moments: dict[str, Moments]) -> dict[str, np.ndarray]:
        """unseen.<path> -> directions of a module's inputs that the text does not know, and its columns."""
        found = {path: unseen_directions(its, self._walk.num_tokens) for path, its in moments.items()}
        return {f"unseen.{path}": np.array([n, moments[path].hessian.shape[-1]]) for path, n in found.items() if n}

    def _weigh_experts(self, i: int, site: ExpertSite, moments: dict[str, Moments]) -> dict[str, np.ndarray]:
        norms, errors = [], []
        shapes, levels = self._source.shapes[site.path], self._config.expert_levels
        paths = [f"{site.path}.{shape.name}" for shape in shapes]
        scoring = None
        if self._config.allocation.needs_scores:
            observed = observe(self._walk, i, "hidden", site, paths[0], paths[-1])
            scoring = Scoring(self._stream.module(site.path), observed, len(shapes), len(levels))
        rotated = self._rotate(site, moments)
        for p, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
            stack = self._stream.weight(f"{path}.weight")
            seen = () if scoring is None else (scoring.seen(p, shape.name, stack),)
            turn = rotated.of(p, len(shapes))
            feedback = self._calibration.method == "gptq"
            weighed = measure_experts(stack, moments[path], levels, shape.group_size, turn, feedback, *seen)
            norms.append(weighed.norms)
            errors.append(weighed.errors)
        scores = {} if scoring is None else {f"experts.{k}": v for k, v in scoring.scores()._asdict().items()}
        found = {"norms": np.stack(norms), "errors": np.stack(errors), "tokens": moments[paths[0]].tokens}
        return {f"experts.{name}": values for name, values in found.items()} | scores

    def _rotate(self, site: ExpertSite, moments: dict[str, Moments]) -> Rotated:
        """Decides by what a layer's experts are rotated, by those that most tokens come to, and keeps it."""
        shapes, seed = self._source.shapes[site.path], self._config.seed
        paths = [f"{site.path}.{shape.name}" for shape in shapes]
        most = np.argsort(-moments[paths[0]].tokens, kind="stable")[:ROTATED_EXPERTS]

        def sample(paths: list[str]) -> Sample:
            weights = [self._stream.weight(f"{path}.weight")[most] for path in paths]
            hessians = [moments[path].hessian[most] for path in paths]
            return Sample(np.concatenate(weights), np.concatenate(hessians), moments[paths[0]].inputs)

        if self._config.rotation in PLAIN:
            rotated = unsampled_rotation(self._config.rotation, shapes, seed)
        else:
            bits = min(self._config.expert_levels)  # where there is most to gain
            samples = sample(paths[:-1]), sample(paths[-1:])
            rotated = sampled_rotation(self._config.rotation, shapes, samples, bits, seed)
        save_rotations(self._state, site.layer, rotated)
        return rotated

    def _rotated(self, site: ExpertSite) -> Rotated:
        """What `_rotate` has decided."""
        return load_rotations(self._state, site.layer, self._source.shapes[site.path], self._config.seed)

    def _measured(self) -> Measured:
        """All artefacts of `measure` together."""
        scored = self._config.allocation.needs_scores
        experts: dict[int, ExpertErrors] = {}
        trunk: dict[str, np.ndarray] = {}
        notes: list[str] = []
        for i in range(-1, self._last + 1):
            with np.load(self._walk.path("weighed", i, "npz")) as saved:
                trunk |= {name: saved[name] for name in saved.files if not name.startswith(("experts.", "unseen."))}
                notes += _unseen_notes({name: saved[name] for name in saved.files if name.startswith("unseen.")})
                site = self._sites.get(i)
                if site is not None:
                    norms = saved["experts.norms"]
                    scores = {field: saved[f"experts.{field}"] for field in ExpertScores._fields} if scored else None
                    found = None if scores is None else ExpertScores(**scores)
                    rules = self._rotated(site).rules(self._config.seed)
                    experts[site.layer] = ExpertErrors(norms, saved["experts.errors"], norms, found, rules)
                    notes += _routing_notes(site, saved["experts.tokens"])
        if self._config.rotation == AUTO:
            notes.append(chosen_rotations([layer.rotations for layer in experts.values()]))
        names = self.trunk_names()
        width = max((len(trunk[name]) for name in names), default=1) - 1
        errors = np.zeros((len(names), width))
        for t, name in enumerate(names):
            errors[t, : len(trunk[name]) - 1] = trunk[name][1:]
        norms = np.array([trunk[name][0] for name in names])
        used, wanted = self._walk.num_tokens, self._calibration.windows * self._calibration.window
        if used < wanted:
            notes.insert(0, f"the calibration text has {used} tokens, fewer than the {wanted} that were asked for")
        return Measured(experts, TrunkErrors(norms, errors, norms), notes)

    # -- measuring a plan ----------------------------------------------------------------------------------------------

    @property
    def walk(self) -> Walk:
        return self._walk

    def parts(self) -> Iterator[tuple[int, list[TrunkTensor], ExpertSite | None]]:
        """The quantizable trunk tensors and the experts of every layer; -1: the embedding; last: what lies behind."""
        for i in range(-1, self._last + 1):
            yield i, self._trunk_of(i), self._sites.get(i)

    def trunk_names(self) -> list[str]:
        """The quantizable trunk tensors, in the order of `Measured.trunk`."""
        return [tensor.name for tensor in self._source.trunk if tensor.tensor_class]

    def coded_values(self, i: int, plan: Plan) -> dict[str, np.ndarray]:
        """float32 values by name of layer i of `parts`, as a plan codes it at the original's hidden states. Called behind
        `measure` with the layer loaded, from the first layer to the last: leaves the hidden states behind the layer."""
        if i < 0:
            empty = Moments(np.zeros((0, 0, 0), np.float32), np.zeros((0, 0)), np.zeros(1, np.int64), 0.0)
            return self._code_trunk(i, plan, {tensor.module: empty for tensor in self._trunk_of(i)})[0]
        self._walk.embed("hidden")
        if i == self._last:
            values, _ = self._code_trunk(i, plan, self._draw("hidden", self._trunk_of(i), keep=None))
        else:
            moments = self._differentiate(i, "hidden", keep=None)
            values, _ = self._code_trunk(i, plan, moments)
            if i in self._sites:
                layer = next(layer for layer in plan.layers if layer.path == self._sites[i].path)
                values |= self._code_experts(layer, moments)[0]
            if not self._walk.path("hidden", i + 1).is_file():
                self._walk.advance(i, "hidden")
        if self._calibration.predecessors and i > 0:
            self._walk.path("hidden", i).unlink()
        return values

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, plan: Plan, write_layer: LayerWriter, written: Callable[[str], bool]) -> None:
        """Codes every layer by the plan and hands its experts to `write_layer`, unless their file is `written` already;
        leaves the coded trunk for `coded` and the fitted routers for `routers`."""
        kind = "quantized" if self._calibration.predecessors else "hidden"
        layers = {layer.path: layer for layer in plan.layers}
        planned = [layers[self._sites[i].path] if i in self._sites else None for i in range(self._last)]
        with self._bar("quantize", self._last + 1) as step:
            if not self._walk.path("trunk", 0, "npz").is_file():
                self._walk.embed(kind)
            for i in range(self._last):
                if not self._walk.path("trunk", i, "npz").is_file():
                    self._write_layer(i, plan, planned[i], write_layer, kind)
                if kind == "quantized":
                    self._walk.path(kind, i).unlink(missing_ok=True)
                    self._walk.path("gradient", i + 1).unlink(missing_ok=True)
                    self._walk.path("hidden", i).unlink(missing_ok=True)
                step(1)
            if not self._walk.path("trunk", self._last, "npz").is_file():
                tensors = self._trunk_of(self._last)
                _, trunk = self._code_trunk(self._last, plan, self._draw(kind, tensors, keep=None))
                save_arrays(self._walk.path("trunk", self._last, "npz"), CodedLayer(trunk).trunk_arrays())
            step(1)
        if self._config.polish == "model":
            self._polish_model(plan, planned)
            for i, layer in enumerate(planned):
                if layer is not None and not written(layer.file):
                    write_layer(layer, self._coded_layer(i, layer).by_expert())

    def _write_layer(self, i: int, plan: Plan, layer: LayerPlan | None, write_layer: LayerWriter, kind: str) -> None:
        """Codes one layer. Its trunk-<i>.npz comes last of all: where it is, the layer is done."""
        polish, router = self._config.polish, self._config.router
        with self._stream.loaded(i):
            if (polish != "none" or router == "topk-mse") and not self._walk.path("hidden", i + 1).is_file():
                self._walk.advance(i, "hidden")  # what the original gives is what to aim at
            if layer is not None and router == "topk-mse":
                keep_inputs(self._walk, i, "hidden", self._router(layer.path), "router")
            moments = self._differentiate(i, kind, keep=None)
            values, trunk = self._code_trunk(i, plan, moments)
            coded = CodedLayer(trunk)
            if layer is not None:
                experts, coded.experts = self._code_experts(layer, moments)
                if layer.replicas is not None:
                    layer = self._code_copies(i, kind, layer, moments, experts, coded)
                values |= experts
            self._stream.replace(values.items())
            if layer is not None and router != "none":
                coded.routers = self._adapted_router(i, layer, coded, kind)
                self._stream.replace(coded.routers.items())
            if polish in ("factors", "layer"):
                self._polish_layer(i, layer, kind, coded)
            if layer is not None and polish == "model":
                save_arrays(self._walk.path("experts", i, "npz"), coded.expert_arrays())
            elif layer is not None:
                write_layer(layer, coded.by_expert())
            if kind == "quantized":
                self._walk.advance(i, kind)
        save_arrays(self._walk.path("trunk", i, "npz"), coded.trunk_arrays())

    # -- after the codes -----------------------------------------------------------------------------------------------

    def _check_routers(self) -> None:
        """Refuses what cannot be done to a router before there is any work."""
        for site in self._source.sites if self._config.router != "none" else ():
            router = self._router(site.path)
            if self._config.router == "bias" and router.bias is None:
                raise UserError(
                    f"the router {router.path} has no bias to change", "choose --router temperature, topk-mse or none"
                )

    def _router(self, path: str) -> Router:
        """Of the experts' module at a path."""
        site, block = next(s for s in self._source.sites if s.path == path), path.rpartition(".")[0]
        return find_router(block, self._stream.module(block), site)

    def _adapted_router(self, i: int, layer: LayerPlan, coded: CodedLayer, kind: str) -> dict[str, np.ndarray]:
        """float32 by name, as they are stored: what --router changes in the loaded and coded layer."""
        router, method = self._router(layer.path), self._config.router
        if method == "bias":
            assert router.bias is not None
            lost = [[packed.errors[-1] for packed in matrices] for matrices in zip(*coded.experts, strict=True)]
            found = {router.bias: lowered_bias(self._stream.weight(router.bias), degradation(lost))}
        elif method == "temperature":
            found = {name: self._stream.weight(name) / TEMPERATURE for name in router.scaled}
        else:
            block = self._stream.module(layer.path.rpartition(".")[0])
            active = num_experts_per_token(self._source.checkpoint.config)
            found = {router.weight: fit_router(self._walk, i, kind, router, block, active, "router")}
            self._walk.path("router", i).unlink()
        dtypes = self._dtypes()
        return {name: np.array(mx.array(v).astype(dtypes[name]).astype(mx.float32)) for name, v in found.items()}

    def routers(self) -> dict[str, mx.array]:
        """The tensors of the routers that `write` has adapted, by name, as they are to be written."""
        dtypes = self._dtypes()
        layers = [self._coded_layer(i).routers for i in range(self._last)]
        return {name: mx.array(values).astype(dtypes[name]) for layer in layers for name, values in layer.items()}

    def _dtypes(self) -> dict[str, mx.Dtype]:
        return {tensor.name: tensor.dtype for tensor in self._source.trunk}

    def _polish_layer(self, i: int, layer: LayerPlan | None, kind: str, coded: CodedLayer) -> None:
        """Refines the scales of the loaded, coded layer."""
        stored, seed = self._stored(i, layer, coded), (self._config.seed << 32) + i
        if self._config.polish == "layer":
            share = self._share()
            if share is not None:
                polish_layer(self._walk, i, kind, "hidden", stored, share, seed)
        elif layer is not None:
            path = f"{layer.path}.{layer.projections[-1].name}"
            polish_factors(self._walk, i, kind, "hidden", layer.path, stored[path])
            self._stream.replace([(f"{path}.weight", stored[path].values())])
        coded.take(stored, layer)

    def _share(self) -> Share | None:
        """None, with a note, for text of one window: none of it can be held back."""
        share, note = (
            share_windows(*self._walk.tokens.shape),
            "one window of calibration text is too little to polish by",
        )
        if share is None and note not in self.notes:
            self.notes.append(note)
        return share

    def _polish_model(self, plan: Plan, planned: Sequence[LayerPlan | None]) -> None:
        """Refines the scales of all layers, which are in memory for it, and keeps them."""
        share = self._share()
        if share is None or (self._state / POLISHED).is_file():
            return
        stored: dict[str, Stored] = {}
        with ExitStack() as layers:
            for i, layer in enumerate([*planned, None]):
                if i < self._last:
                    layers.enter_context(self._stream.loaded(i))
                coded = self._coded_layer(i, layer)
                stored |= (refined := self._stored(i, layer, coded))
                fixed = {t.name: affine_values(coded.trunk[t.name], t.shape) for t in self._trunk_of(i)}
                fixed = {name: v for name, v in fixed.items() if name.removesuffix(".weight") not in refined}
                if i < self._last:
                    self._stream.replace((fixed | coded.routers).items())
            embedding = self.coded_values(-1, plan)
            self._stream.replace(embedding.items())
            with self._bar("polish", EPOCHS * len(share.steps), unit="steps") as step:
                outcome = polish_model(self._walk, stored, fixed, share, self._config.seed, step)
        tokens = sum(map(len, share.held_back)) * self._walk.tokens.shape[1]
        self.notes.append(
            f"polish: KL divergence on the calibration text held back {outcome.before / tokens:.4g} -> "
            f"{outcome.after / tokens:.4g}"
        )
        kept = {f"{path}/scales": matrix.scales for path, matrix in stored.items()}
        kept |= {f"{path}/biases": matrix.biases for path, matrix in stored.items() if matrix.biases is not None}
        save_arrays(self._state / POLISHED, {name: values.astype(np.float16) for name, values in kept.items()})

    def _stored(self, i: int, layer: LayerPlan | None, coded: CodedLayer) -> dict[str, Stored]:
        rotations: list[Rotation] = []
        if layer is not None:
            rotated, count = self._rotated(self._sites[i]), len(layer.projections)
            rotations = [rotated.of(p, count) for p in range(count)]
        return coded.stored(self._trunk_of(i), layer, rotations)

    def _coded_layer(self, i: int, layer: LayerPlan | None = None) -> CodedLayer:
        """Layer i as it was coded, polished if it is; with the experts of `layer`, which are kept for --polish model."""
        with np.load(self._walk.path("trunk", i, "npz")) as saved:
            coded = CodedLayer.from_arrays(saved)
        if layer is not None:
            with np.load(self._walk.path("experts", i, "npz")) as saved:
                coded.take_experts(saved, layer)
        if (self._state / POLISHED).is_file():
            stored = self._stored(i, layer, coded)
            with np.load(self._state / POLISHED) as polished:
                for path, matrix in stored.items():
                    matrix.assign(
                        polished[f"{path}/{field}"] for field in ("scales", "biases")[: len(matrix.parameters())]
                    )
            coded.take(stored, layer)
        return coded

    def _balance(self, layer: LayerPlan, moments: dict[str, Moments]) -> Balance:
        """The scales of AWQ for a loaded layer's last projection."""
        path, levels = f"{layer.path}.{layer.projections[-1].name}", [e.levels[-1] for e in layer.experts]
        last = Projection(self._stream.weight(f"{path}.weight"), moments[path])
        exponent = degree(self._stream.module(layer.path))
        return find_balance(last, levels, layer.projections[-1].group_size, exponent)

    def _code_experts(
        self, layer: LayerPlan, moments: dict[str, Moments]
    ) -> tuple[dict[str, np.ndarray], list[list[Packed]]]:
        """Codes the experts of a loaded layer as the plan says: values by name, and what is written, by projection."""
        site = next(site for site in self._source.sites if site.path == layer.path)
        values, packed, rotated = {}, [], self._rotated(site)
        balance = self._balance(layer, moments) if self._calibration.method == "awq" else None
        count = layer.num_matrices
        for p, shape in enumerate(layer.projections[:count]):
            path = f"{layer.path}.{shape.name}"
            levels = [expert.levels[p] for expert in layer.experts]
            matrix = Projection(self._stream.weight(f"{path}.weight"), moments[path])
            matrix = matrix if balance is None else balance.applied(p, count, matrix)
            turn = rotated.of(p, count)
            coded = pack_experts(*matrix, levels, shape, self._calibration.mu, turn, feedback=balance is None)
            values[f"{path}.weight"] = np.stack([value for *_, value in coded])
            packed.append([Packed(matrix, errors) for matrix, errors, _ in coded])
        return values, packed

    def _code_copies(
        self,
        i: int,
        kind: str,
        layer: LayerPlan,
        moments: dict[str, Moments],
        values: dict[str, np.ndarray],
        coded: CodedLayer,
    ) -> LayerPlan:
        """Codes further copies of a loaded layer's experts: adds them to `coded`, and puts the mean of all copies into
        `values`. Returns the layer, with the weights of the copies' outputs where they are learned."""
        site = next(site for site in self._source.sites if site.path == layer.path)
        paths = [f"{layer.path}.{shape.name}" for shape in layer.projections[: layer.num_matrices]]
        matrices = [Projection(self._stream.weight(f"{path}.weight"), moments[path]) for path in paths]
        copies = [[values[f"{path}.weight"] for path in paths]]
        turns = copy_turns(layer, self._rotated(site))
        for copy in range(1, len(layer.copy_rotations)):
            further = code_copy(layer, copy, matrices, turns, self._calibration.mu)
            coded.copies += further.packed
            copies.append(further.values)
        values |= {f"{path}.weight": mean for path, mean in zip(paths, mean_values(layer, copies), strict=True)}
        if self._config.replicas is None or self._config.replicas.combine != "learned":
            return layer
        observed = observe(self._walk, i, kind, site, paths[0], paths[-1])
        return learn_weights(self._stream.module(site.path), observed, layer, copies)

    def _code_trunk(
        self, i: int, plan: Plan, moments: dict[str, Moments]
    ) -> tuple[dict[str, np.ndarray], dict[str, Affine]]:
        """Codes the trunk tensors of a layer as the plan says: by name, values and what is stored."""
        values, stored = {}, {}
        for tensor in self._trunk_of(i):
            entry = plan.trunk[tensor.name]
            matrix = self._stream.weight(tensor.name)
            flat = matrix.reshape(-1, matrix.shape[-1])
            stored[tensor.name], _, _ = code_trunk(flat, moments[tensor.module], entry.bits, entry.group_size)
            values[tensor.name] = affine_values(stored[tensor.name], matrix.shape)
        return values, stored

    def coded(self, tensor: TrunkTensor) -> Affine | None:
        """A trunk tensor as `write` coded it; None for one that it leaves to least squares on the weights."""
        i = self._layer_of[tensor.name]
        return self._coded_layer(i).trunk[tensor.name] if i >= 0 else None

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
    def _bar(self, name: str, total: int, unit: str = "layers") -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, unit=f" {unit}", desc=name, disable=self._quiet) as bar:
            yield bar.update


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
