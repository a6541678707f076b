"""A source's layers with calibration text on its way through them: what measuring, coding and polishing share.

A layer goes by its index i among the layers, which is not its number where numbering has gaps. -1 stands for an embedding
that is no head; one more than the last layer for what lies behind it, the head or the embedding that serves as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlxmoe.convert.calibrate import Calibration
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.rotate import Rotated
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.tokens import calibration_tokens
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.write import load_rotations
from mlxmoe.models import ExpertSite
from mlxmoe.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Layers:
    """trunk: the quantizable tensors outside the experts by layer, from -1 to one more than the last; sites: the experts of
    the layers that have some."""

    source: Source
    config: ConvertConfig
    walk: Walk
    trunk: dict[int, list[TrunkTensor]]
    sites: dict[int, ExpertSite]
    quiet: bool

    @property
    def stream(self) -> LayerStream:
        return self.walk.stream

    @property
    def calibration(self) -> Calibration:
        assert self.config.calibration is not None
        return self.config.calibration

    @property
    def last(self) -> int:
        """The index of what lies behind the last layer."""
        return len(self.stream.layers)

    @property
    def dtypes(self) -> dict[str, mx.Dtype]:
        """Of the source's tensors outside the experts, by name."""
        return {tensor.name: tensor.dtype for tensor in self.source.trunk}

    def projections(self, i: int) -> list[str]:
        """Paths of the modules of layer i's experts, none in a layer without any."""
        site = self.sites.get(i)
        return [f"{site.path}.{shape.name}" for shape in self.source.shapes[site.path]] if site is not None else []

    def rotated(self, layer: int) -> Rotated:
        """The rotations that the experts of the layer of that number were measured behind."""
        return load_rotations(self.walk.folder, self.source, layer, self.config.seed)

    def planned(self, i: int, plan: Plan) -> LayerPlan | None:
        """A plan's entry for layer i, None for one without experts."""
        return next((layer for layer in plan.layers if i in self.sites and layer.path == self.sites[i].path), None)

    def trunk_names(self) -> list[str]:
        """Of all quantizable trunk tensors, in the source's order."""
        return [tensor.name for tensor in self.source.trunk if tensor.tensor_class]

    @contextmanager
    def bar(self, name: str, total: int, unit: str = "layers") -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, unit=f" {unit}", desc=name, disable=self.quiet) as bar:
            yield bar.update


def open_layers(source: Source, config: ConvertConfig, tokenizer: Any, folder: Path, quiet: bool) -> Layers:
    """Works in `folder`. Raises UserError for text that is too short and an architecture whose layers cannot be run one by
    one."""
    assert config.calibration is not None
    tokens = calibration_tokens(source.checkpoint, config.calibration, tokenizer, config.seed, folder, quiet)
    walk = Walk(LayerStream(source), tokens, folder)
    paths = [walk.stream.path(i) + "." for i in range(len(walk.stream.layers))]
    sites = {next(i for i, path in enumerate(paths) if site.path.startswith(path)): site for site in source.sites}
    return Layers(source, config, walk, _trunk(source, paths), sites, quiet)


def _trunk(source: Source, paths: list[str]) -> dict[int, list[TrunkTensor]]:
    """The quantizable trunk tensors by layer, whose names begin with `paths`."""
    quantizable = [tensor for tensor in source.trunk if tensor.tensor_class]
    inside = {i: [t for t in quantizable if t.name.startswith(path)] for i, path in enumerate(paths)}
    layers = paths[0].removesuffix(".").rpartition(".")[0] + "."
    outside = [t for t in quantizable if not t.name.startswith(layers)]
    tied = not any(t.tensor_class == "head" for t in outside)
    embedding = [t for t in outside if t.tensor_class == "embedding" and not tied]
    return {-1: embedding, **inside, len(paths): [t for t in outside if t not in embedding]}
