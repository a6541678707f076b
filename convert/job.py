"""A conversion from start to end: stages with one artefact each, in a work folder that becomes the result.

    OUT.partial/state/   job.json, rotation-<layer>.npz, measure-<layer>.npz, measure-trunk.npz, plan.json, <file>.json:
                         removed at the end;
                         with calibration what passes.py lists in place of measure-*
    OUT.partial/         the files themselves, each whole under its final name
    OUT                  appears in one rename, complete

A run that is killed at any point leaves OUT.partial; the same command with --resume goes on from the last artefact.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlxmoe import __version__
from mlxmoe.checkpoint import Checkpoint, open_checkpoint, side_files
from mlxmoe.convert.allocate import Allocator, Decision, output_config, shard_name, trunk_formats, trunk_shards
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.layers import Layers, open_layers
from mlxmoe.convert.measure import (
    ExpertErrors,
    Progress,
    TrunkErrors,
    check_finite,
    measure_layer,
    measure_trunk,
    unmeasured,
)
from mlxmoe.convert.passes import changed_routers, check_options, coded_tensor, measure, write
from mlxmoe.convert.quantize import Affine
from mlxmoe.convert.refine import Losses, fresh_tokens, refine
from mlxmoe.convert.replicas import output_weights
from mlxmoe.convert.rotate import Rotated, check_rotation, unsampled_rotation
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.convert.write import (
    Packed,
    load_rotations,
    packed_experts,
    save_rotations,
    write_layer,
    write_shard,
)
from mlxmoe.errors import UserError
from mlxmoe.formats import num_planes
from mlxmoe.plan import PLAN_FILE, ExpertEntry, FileEntry, LayerPlan, Plan, load_replicas
from mlxmoe.work import WorkFolder, differing, save_arrays, write_whole


class Outcome(NamedTuple):
    """What a conversion did, or would do under --dry-run. `nbytes`: all files of the folder."""

    decision: Decision
    plan: Plan
    nbytes: int


class Job:
    """One conversion. Creates OUT.partial with the first artefact, so bad input leaves nothing behind."""

    def __init__(self, source: str | Path, output: Path, config: ConvertConfig, quiet: bool = False):
        self.work = WorkFolder(output, "conversion", PLAN_FILE, restarts=True)
        self.checkpoint = open_checkpoint(source)
        self.source = Source(self.checkpoint, config.group_size)
        self.config = config.for_model(self.source.num_parameters)
        for shapes in self.source.shapes.values():
            check_rotation(config.rotation, shapes)
        if config.replicas is not None and any(site.has_bias for site in self.source.sites):
            raise UserError(f"--replicas: the experts of {self.checkpoint.name} have biases", "leave it out")
        self._quiet = quiet

    # -- entry points ------------------------------------------------------------------------------------------------

    def dry_run(self) -> Outcome:
        """Measures and allocates in memory. Writes nothing."""
        self._allocator(unmeasured(self.source, self.config)).check_size()
        if self.config.calibration is not None:
            with tempfile.TemporaryDirectory(prefix="mlxmoe-calibrate-") as folder:
                decision = self._decide_calibrated(self._layers(Path(folder)))
        else:
            with self._progress(passes=1) as progress:
                decision = self._allocator(self._measure(progress, keep=False)).decide()
        return Outcome(decision, decision.plan, decision.nbytes)

    def run(self, resume: bool = False, restart: bool = False) -> Outcome:
        """Converts. Raises UserError when OUT exists, when work is left over and neither resume nor restart was asked,
        when the settings differ from those of the work to resume, or when the disk is full."""
        self.work.check(resume, restart)
        self._allocator(unmeasured(self.source, self.config)).check_size()
        mx.set_cache_limit(0)  # freed buffers go back at once: peak memory is what one layer needs
        with self.work.locked(restart):
            self._claim()
            if self.work.complete:  # killed in the middle of publishing
                plan = Plan.load(self.work.folder)
                decision = self._allocator(unmeasured(self.source, self.config)).account(plan)
            else:
                decision, plan = self._convert_calibrated() if self.config.calibration else self._convert()
                self._complete(plan, decision.nbytes)
            self.work.publish()
        return Outcome(decision, plan, sum(path.stat().st_size for path in self.work.output.iterdir()))

    # -- stages ------------------------------------------------------------------------------------------------------

    def _convert(self) -> tuple[Decision, Plan]:
        """By least squares on the weights."""
        with self._progress(passes=2) as progress:
            with self._cleared_if_damaged():
                measured = self._measure(progress, keep=True)
            decision = self._allocator(measured).decide()
            self.work.check_space(decision.nbytes)
            plan, tensors = self._keep_plan(decision.plan), self.source.tensors()
            for site, layer in zip(self.source.sites, plan.layers, strict=True):
                if self._done(layer.file) is None:
                    experts = packed_experts(self.source, tensors, site, layer, self._rotated(site.layer))
                    self._write_layer(layer, experts, progress)
                else:
                    progress(site.num_experts * sum(shape.num_weights for shape in layer.projections))
            return decision, self._finish(plan, tensors, progress, lambda tensor: None)

    def _convert_calibrated(self) -> tuple[Decision, Plan]:
        """By the errors of the outputs on calibration text."""
        with self._cleared_if_new():
            layers = self._layers(self.work.state)
        with self._cleared_if_damaged():
            decision = self._decide_calibrated(layers)
        self.work.check_space(decision.nbytes)
        plan = self._keep_plan(decision.plan)
        notes = write(
            layers,
            plan,
            lambda layer, experts: self._write_layer(layer, experts, lambda weights: None),
            lambda file: self._done(file) is not None,
        )
        decision = decision._replace(notes=[*decision.notes, *notes])
        with self._progress(passes=1) as progress:
            tensors = self.source.tensors() | changed_routers(layers)
            return decision, self._finish(plan, tensors, progress, partial(coded_tensor, layers))

    def _layers(self, folder: Path) -> Layers:
        layers = open_layers(self.source, self.config, read_tokenizer(self.checkpoint), folder, self._quiet)
        check_options(layers)
        return layers

    def _decide_calibrated(self, layers: Layers) -> Decision:
        measured = measure(layers)
        losses, notes = Losses(measured.experts, measured.trunk), list(measured.notes)
        decision = self._allocator(losses).decide()
        for n in range(self.config.allocation.refine):
            tokens = self._fresh_tokens(layers)
            losses, note = refine(layers, losses, decision.plan, tokens, layers.walk.folder / f"refined-{n}.npz")
            decision = self._allocator(losses).decide()
            notes.append(f"refinement {n + 1}: {note}")
        return decision._replace(notes=[*notes, *decision.notes])

    def _fresh_tokens(self, layers: Layers) -> np.ndarray:
        tokenizer = read_tokenizer(self.checkpoint)
        return fresh_tokens(layers.calibration, tokenizer, self.config.seed, layers.walk.tokens)

    @contextmanager
    def _cleared_if_new(self) -> Iterator[None]:
        """What is refused before there is any work leaves no folder; the work of a run before stays."""
        try:
            yield
        except UserError:
            if [path.name for path in self.work.state.iterdir()] == ["job.json"]:
                shutil.rmtree(self.work.folder)
            raise

    @contextmanager
    def _cleared_if_damaged(self) -> Iterator[None]:
        """Of a source that proves to be damaged nothing is kept: the repaired one may differ anywhere."""
        try:
            yield
        except UserError:
            shutil.rmtree(self.work.folder)
            raise

    def _measure(self, progress: Progress, keep: bool) -> tuple[dict[int, ExpertErrors], TrunkErrors]:
        tensors = self.source.tensors()
        layers = {}
        for site in self.source.sites:
            path = self.work.state / f"measure-{site.layer}.npz"
            if keep and path.is_file():
                rules = self._rotated(site.layer).rules(self.config.seed)
                with np.load(path) as saved:
                    layers[site.layer] = ExpertErrors(saved["norms"], saved["errors"], rotations=rules)
                progress(site.num_experts * sum(s.num_weights for s in self.source.shapes[site.path]))
                continue
            rotated = unsampled_rotation(self.config.rotation, self.source.shapes[site.path], self.config.seed)
            found = measure_layer(self.source, tensors, site, self.config.expert_levels, progress, rotated)
            layers[site.layer] = found._replace(rotations=rotated.rules(self.config.seed))
            if keep:
                save_rotations(self.work.state, site.layer, rotated)
                save_arrays(path, {"norms": found.norms, "errors": found.errors})
        path = self.work.state / "measure-trunk.npz"
        quantizable = [tensor for tensor in self.source.trunk if tensor.tensor_class]
        if keep and path.is_file():
            with np.load(path) as saved:
                trunk = TrunkErrors(saved["norms"], saved["errors"])
            progress(sum(int(np.prod(tensor.shape)) for tensor in quantizable))
        else:
            check_finite([tensor for tensor in self.source.trunk if not tensor.tensor_class], tensors)
            trunk = measure_trunk(quantizable, tensors, progress)
            if keep:
                save_arrays(path, {"norms": trunk.norms, "errors": trunk.errors})
        return layers, trunk

    def _allocator(self, measured: tuple[dict[int, ExpertErrors], TrunkErrors]) -> Allocator:
        side = {name: len(data) for name, data in side_files(self.checkpoint.folder).items()}
        return Allocator(self.source, self.config, *measured, side, describe(self.checkpoint))

    def _keep_plan(self, plan: Plan) -> Plan:
        """The allocation is an artefact too: a resumed run writes the rest of the files by the same plan."""
        if not (self.work.state / PLAN_FILE).is_file():
            write_whole(self.work.state / PLAN_FILE, plan.dumps().encode())
        return Plan.load(self.work.state)

    def _rotated(self, layer: int) -> Rotated:
        """The rotations that a layer was measured behind."""
        return load_rotations(self.work.state, self.source, layer, self.config.seed)

    def _write_layer(self, layer: LayerPlan, experts: Iterator[list[Packed | None]], progress: Progress) -> None:
        entry, entries = write_layer(layer, experts, self._rotated(layer.layer), self.work.folder, progress)
        if layer.replicas is not None and self.config.replicas is not None:
            weights = output_weights(self.config.replicas, layer._replace(experts=entries))
            found = layer.replicas._replace(weights=tuple(map(tuple, weights)))
            write_whole(self._replicas_path(layer), json.dumps(found).encode())
        self._mark_done(layer.file, entry, entries)

    def _replicas_path(self, layer: LayerPlan) -> Path:
        return self.work.state / f"replicas-{layer.layer}.json"

    def _combined(self, layer: LayerPlan) -> LayerPlan:
        """With how the outputs of copies are combined, which is known when they are written."""
        if layer.replicas is None:
            return layer
        return layer._replace(replicas=load_replicas(json.loads(self._replicas_path(layer).read_text())))

    def _finish(
        self,
        plan: Plan,
        tensors: dict[str, mx.array],
        progress: Progress,
        coded: Callable[[TrunkTensor], Affine | None],
    ) -> Plan:
        """Writes the trunk and the side files, as far as they are not there yet; the experts are. Returns the plan with
        hashes and measured entries."""
        formats = trunk_formats(plan)
        files: dict[str, FileEntry] = {}
        layers = []
        for layer in plan.layers:
            done = self._done(layer.file)
            assert done is not None
            files[layer.file], experts = done
            layers.append(self._combined(layer)._replace(experts=experts))
        shards = trunk_shards(self.source, formats)
        for i, shard in enumerate(shards):
            name = shard_name(i, len(shards))
            done = self._done(name)
            if done is None:
                entry = write_shard(shard, formats, tensors, self.work.folder / name, progress, coded)
                self._mark_done(name, entry, ())
            else:
                entry = done[0]
                progress(sum(int(np.prod(tensor.shape)) for tensor in shard))
            files[name] = entry
        files |= self._write_side_files(plan)
        expected = sum(
            weight * error
            for layer in layers
            for p in range(len(layer.projections))
            for weight, error in zip(layer.weights[p], layer.written_errors(p), strict=True)
        ) + sum(entry.weight * entry.error for entry in plan.trunk.values())
        return Plan(**{**vars(plan), "layers": tuple(layers), "expected_loss": expected}).with_files(files)

    def _write_side_files(self, plan: Plan) -> dict[str, FileEntry]:
        contents = side_files(self.checkpoint.folder)
        contents["config.json"] = output_config(self.source, trunk_formats(plan)).encode()
        return {name: write_whole(self.work.folder / name, data) for name, data in contents.items()}

    def _complete(self, plan: Plan, nbytes: int) -> None:
        """plan.json, last of all files, filled up so that the folder has the bytes that the allocation counted."""
        for layer in plan.layers:
            assert all(len(e.crc32) == num_planes(max(e.levels)) for e in layer.experts)
        text = plan.dumps().encode().rstrip()
        write_whole(self.work.folder / PLAN_FILE, text.ljust(nbytes - plan.nbytes - 1) + b"\n")

    # -- the work folder -----------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Records what this job is, or checks that the work found is the same job's."""
        wanted: dict[str, Any] = {
            "mlxmoe": __version__,
            "source": describe(self.checkpoint),
            "settings": self.config.as_settings(),
        }
        found = self.work.job()
        if found is None and self.work.complete:
            plan = Plan.load(self.work.folder)
            found = {**wanted, "source": plan.source, "settings": plan.settings}
        if found is None:
            self.work.claim(wanted)
            return
        changed = [key for key in ("mlxmoe", "source") if found.get(key) != wanted[key]]
        self.work.check_same([*changed, *differing(found["settings"], wanted["settings"])])

    def _done(self, name: str) -> tuple[FileEntry, tuple[ExpertEntry, ...]] | None:
        saved = self.work.done(name)
        if saved is None:
            return None
        experts = tuple(
            ExpertEntry(tuple(e[0]), tuple(map(tuple, e[1])), tuple(map(tuple, e[2])), tuple(e[3]))
            for e in saved["experts"]
        )
        return FileEntry(*saved["file"]), experts

    def _mark_done(self, name: str, entry: FileEntry, experts: tuple[ExpertEntry, ...]) -> None:
        self.work.mark_done(name, {"file": entry, "experts": experts})

    @contextmanager
    def _progress(self, passes: int) -> Iterator[Progress]:
        total = passes * self.source.num_parameters
        with tqdm(total=total, unit=" weights", unit_scale=True, desc="convert", disable=self._quiet) as bar:
            yield bar.update


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which source this was: its name, the hash of its config, the sizes of its weight files."""
    text = json.dumps(checkpoint.config, sort_keys=True).encode()
    return {
        "name": Path(checkpoint.name).name,
        "config_sha256": hashlib.sha256(text).hexdigest(),
        "files": {path.name: path.stat().st_size for path in checkpoint.shards},
    }
