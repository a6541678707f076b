"""The plan: the whole decision of a conversion as data. The only contract between the converter and the runtime.

`plan.json` lies beside the weights, is readable and diff-able (one line per expert), and says for every (layer, expert,
projection) which level is written, what each lower level would cost, and how every other tensor is stored, with the
SHA-256 of each file. This file owns the data and its JSON; it decides nothing (convert/allocate.py and residency.py do)
and reads no weights (store.py does).
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlxmoe.errors import UserError
from mlxmoe.files import parse_versioned
from mlxmoe.formats import ABSENT, GROUP_SIZES, LEVELS, NARROW_LEVELS, PLANE_WIDTHS, MatrixShape, num_planes
from mlxmoe.rotation import NAMES, UNROTATED, LayerRotations, RotationRule, fits

PLAN_FILE = "plan.json"
PLAN_FORMAT = "mlxmoe-plan"
PLAN_VERSION = 4
ROTATED_VERSION = 2  # the first that has rotations: a reader that does not know them would compute nonsense
WIDE_VERSION = 3  # the first that has levels above 8 bits
SELECTED_VERSION = 4  # the first that chooses among copies by the input
SELECTIVE = "selective"  # settings.replicas.combine of a plan that does


class ExpertEntry(NamedTuple):
    """One expert, a value per projection of its layer.

    levels[p]: bits written. errors[p][i]: squared error ||W - W_hat||^2 / ||W||^2 when only LEVELS[i] bits are used.
    gains[p][i]: factor on the scale at LEVELS[i] below the level written (where it is 1). crc32[j]: checksum of the
    record of plane j.
    """

    levels: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]
    gains: tuple[tuple[float, ...], ...]
    crc32: tuple[int, ...] = ()

    @property
    def num_planes(self) -> int:
        return max(num_planes(level) for level in self.levels)


class Selection(NamedTuple):
    """What a copy of an expert is chosen by. slopes[c][e] * log |x| + intercepts[c][e] is expected of the logarithm of copy
    c's squared error at an input x of expert e. usual[e]: the norm that the expert's inputs have; where |x| is half of it
    away, and everywhere where it is 0, the copies count by their weights. None: one is always chosen."""

    slopes: tuple[tuple[float, ...], ...]
    intercepts: tuple[tuple[float, ...], ...]
    usual: tuple[float, ...] | None = None


class Replicas(NamedTuple):
    """Further copies of a layer's experts. rotations: of each further copy. weights[c][e]: what the output of copy c (0: the
    expert itself) counts in that of expert e; 0 where e has no such copy. With a selection one copy that e has is chosen for
    each input in place of that."""

    rotations: tuple[LayerRotations, ...]
    weights: tuple[tuple[float, ...], ...]
    selection: Selection | None = None

    @property
    def num_values(self) -> int:
        """Numbers that say how the copies are combined."""
        rows = [*self.weights]
        if self.selection is not None:
            rows += [*self.selection.slopes, *self.selection.intercepts, self.selection.usual or ()]
        return sum(map(len, rows))


def copy_share(copies: int, selective: bool) -> float:
    """What an error of one of an expert's copies counts in the loss, of one that it has alone: 1/k^2 where the outputs are
    averaged, as if their errors were independent; 1/k where one of them is chosen, each about as often."""
    return 1 / copies if selective else (1 / copies) ** 2


class LayerPlan(NamedTuple):
    """The routed experts of one layer. `weights[p][e]`: what a relative error of 1 in that matrix adds to the expected
    loss. `path` is the module in the model; `file` holds the records. `rotations`: what the columns of the
    matrices expect of the input and of the hidden values. With `replicas` the projections of every further copy follow those
    of the expert itself; a copy that an expert does not have is ABSENT in its levels."""

    layer: int
    path: str
    kind: str  # glu (gate_proj, up_proj, down_proj) or mlp (fc1, fc2)
    file: str
    projections: tuple[MatrixShape, ...]
    weights: tuple[tuple[float, ...], ...]
    experts: tuple[ExpertEntry, ...]
    rotations: LayerRotations = UNROTATED
    replicas: Replicas | None = None

    @property
    def copy_rotations(self) -> tuple[LayerRotations, ...]:
        """Of the expert itself and of every further copy."""
        return (self.rotations, *(self.replicas.rotations if self.replicas is not None else ()))

    @property
    def num_matrices(self) -> int:
        """Projections of one copy."""
        return len(self.projections) // len(self.copy_rotations)

    def num_copies(self, expert: int) -> int:
        """How many copies an expert has: they are the first ones."""
        return sum(level != ABSENT for level in self.experts[expert].levels[:: self.num_matrices])

    def written_errors(self, projection: int) -> list[float]:
        """Of every expert's matrix at the level that is written; 0 of one that is not there."""
        return [entry.errors[projection][-1] if entry.levels[projection] else 0.0 for entry in self.experts]

    @property
    def rotated_columns(self) -> tuple[int, int]:
        """K of the input and of the hidden values."""
        return self.projections[0].columns, self.projections[-1].columns


class TrunkEntry(NamedTuple):
    """A tensor outside the routed experts that can be quantized: in MLX's affine layout, or at 16 bits, group size 0, as the
    source has it, whatever its type."""

    tensor_class: str  # embedding, head, attention, shared, dense
    bits: int
    group_size: int
    error: float  # relative squared error
    weight: float  # what a relative error of 1 adds to the expected loss


class FileEntry(NamedTuple):
    nbytes: int
    sha256: str


class Forecast(NamedTuple):
    """Measured fidelity of the file at several budgets: (expected loss, mean KLD to the source in nats), ascending, and
    what it was measured on."""

    points: tuple[tuple[float, float], ...]
    measured_on: dict[str, Any]  # names of the texts, tokens

    def kld(self, expected_loss: float) -> float:
        """The KLD at an expected loss: between two points along a power law, in proportion beyond the last ones."""
        losses, klds = zip(*self.points, strict=True)
        place = bisect_left(losses, expected_loss)
        if place in (0, len(losses)):
            end = min(place, len(losses) - 1)
            return klds[end] * expected_loss / losses[end]
        low, high = place - 1, place
        share = math.log(expected_loss / losses[low]) / math.log(losses[high] / losses[low])
        return math.exp((1 - share) * math.log(klds[low]) + share * math.log(klds[high]))


@dataclass(frozen=True)
class Plan:
    """See the file's heading. `expected_loss` sums weight * error over all matrices, in the scale of the weights."""

    model_type: str
    source: dict[str, Any]  # name, config_sha256, files: name -> bytes
    settings: dict[str, Any]  # what the converter was asked for
    num_parameters: int
    layers: tuple[LayerPlan, ...]
    trunk: dict[str, TrunkEntry]
    expected_loss: float
    seed: int = 0
    files: dict[str, FileEntry] = field(default_factory=dict)
    forecast: Forecast | None = None

    def with_files(self, files: dict[str, FileEntry]) -> Plan:
        return replace(self, files=dict(sorted(files.items())))

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the folder but plan.json itself."""
        return sum(entry.nbytes for entry in self.files.values())

    @property
    def version(self) -> int:
        """The lowest format version that can say all of this: what has no need of a newer one, older readers take too."""
        if any(layer.replicas is not None and layer.replicas.selection is not None for layer in self.layers):
            return SELECTED_VERSION
        if self._levels[-1] > NARROW_LEVELS[-1]:
            return WIDE_VERSION
        plain = all(layer.copy_rotations == (UNROTATED,) for layer in self.layers)
        return 1 if plain else ROTATED_VERSION

    @property
    def _levels(self) -> tuple[int, ...]:
        """Of the codec, as far as this file needs it: a file without levels above 8 bits says nothing of them."""
        highest = max(
            (level for layer in self.layers for expert in layer.experts for level in expert.levels), default=0
        )
        return NARROW_LEVELS if highest <= NARROW_LEVELS[-1] else LEVELS

    def level_histogram(self) -> dict[int, int]:
        """Level -> how many expert matrices are written at it."""
        histogram = dict.fromkeys((ABSENT, *LEVELS), 0)
        for layer in self.layers:
            for expert in layer.experts:
                for level in expert.levels:
                    histogram[level] += 1
        return {level: count for level, count in histogram.items() if count and level != ABSENT}

    def dumps(self) -> str:
        """The JSON text: one line per expert and per trunk tensor, four significant digits for measured values."""
        head = {
            "format": PLAN_FORMAT,
            "version": self.version,
            "codec": {"name": "planes", "levels": self._levels, "plane_widths": PLANE_WIDTHS[: len(self._levels)]},
            "model_type": self.model_type,
            "seed": self.seed,
            "num_parameters": self.num_parameters,
            "expected_loss": _short(self.expected_loss),
            "source": self.source,
            "settings": self.settings,
        }
        if self.forecast is not None:
            head["forecast"] = _shorten(self.forecast)
        lines = [f"{json.dumps(key)}:{_compact(value)}" for key, value in head.items()]
        lines.append(_block("files", [f"{json.dumps(k)}:{_compact(v)}" for k, v in self.files.items()], "{}"))
        trunk = [f"{json.dumps(k)}:{_compact(_shorten(v))}" for k, v in self.trunk.items()]
        lines.append(_block("trunk", trunk, "{}"))
        lines.append(_block("layers", [_dump_layer(layer) for layer in self.layers], "[]"))
        return "{" + ",\n".join(lines) + "}\n"

    def save(self, folder: Path) -> None:
        """Writes plan.json whole or not at all."""
        temporary = folder / (PLAN_FILE + ".tmp")
        temporary.write_text(self.dumps())
        os.replace(temporary, folder / PLAN_FILE)

    @classmethod
    def loads(cls, text: str, name: str = PLAN_FILE) -> Plan:
        """Raises UserError for text that is no plan or is one of a newer version."""
        data = parse_versioned(text, name, "a plan of mlxmoe", PLAN_FORMAT, PLAN_VERSION, "convert the model again")
        try:
            version = data.get("version")
            if not isinstance(version, int) or version < 1:
                raise ValueError(f"format version {version!r}")
            plan = cls(
                model_type=data["model_type"],
                source=data["source"],
                settings=data["settings"],
                num_parameters=data["num_parameters"],
                layers=tuple(_load_layer(layer) for layer in data["layers"]),
                trunk={path: TrunkEntry(*entry) for path, entry in data["trunk"].items()},
                expected_loss=data["expected_loss"],
                seed=data["seed"],
                files={path: FileEntry(*entry) for path, entry in data["files"].items()},
                forecast=_load_forecast(data.get("forecast")),
            )
            _check_selections(plan)
            return plan
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{name} is damaged: {type(error).__name__} {error}", "convert the model again") from None

    @classmethod
    def load(cls, folder: Path) -> Plan:
        path = folder / PLAN_FILE
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            raise UserError(f"{path} is not text", "convert the model again") from None
        return cls.loads(text, str(path))


def is_converted(folder: Path) -> bool:
    return (folder / PLAN_FILE).is_file()


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _shorten(value: Any) -> Any:
    if isinstance(value, float):
        return _short(value)
    if isinstance(value, list | tuple):
        return [_shorten(v) for v in value]
    return value


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _block(key: str, lines: list[str], brackets: str) -> str:
    return f"{json.dumps(key)}:{brackets[0]}\n" + ",\n".join(lines) + brackets[1]


def _dump_layer(layer: LayerPlan) -> str:
    left_out = {"experts", "weights"} | ({"rotations"} if layer.rotations == UNROTATED else set())
    left_out |= {"replicas"} if layer.replicas is None else set()
    fields = {k: _shorten(v) for k, v in layer._asdict().items() if k not in left_out}
    if layer.replicas is not None and layer.replicas.selection is None:
        fields["replicas"] = fields["replicas"][:-1]  # as it was before there were selections
    head = _compact(fields)
    # The weights of one projection are often all equal: one number stands for all of them.
    weights = [w[0] if len(set(w)) == 1 else list(w) for w in (_shorten(w) for w in layer.weights)]
    experts = ",\n".join(_compact(_shorten(expert)) for expert in layer.experts)
    return f'{head[:-1]},"weights":{_compact(weights)},"experts":[\n{experts}]}}'


def _load_layer(data: dict[str, Any]) -> LayerPlan:
    def tuples(rows: list[list[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(row) for row in rows)

    experts = tuple(ExpertEntry(tuple(e[0]), tuples(e[1]), tuples(e[2]), tuple(e[3])) for e in data["experts"])
    weights = tuple(tuple(w) if isinstance(w, list) else (w,) * len(experts) for w in data["weights"])
    projections = tuple(MatrixShape(*p) for p in data["projections"])
    rotations = _load_rotations(data.get("rotations", UNROTATED))
    replicas = load_replicas(data["replicas"]) if "replicas" in data else None
    where = data["layer"], data["path"], data["kind"], data["file"]
    layer = LayerPlan(*where, projections, weights, experts, rotations, replicas)
    _check_layer(layer)
    return layer


def _load_rotations(rules: Sequence[Sequence[Any]]) -> LayerRotations:
    return LayerRotations(*(RotationRule(*rule) for rule in rules))


def load_replicas(data: list[Any]) -> Replicas:
    """From JSON."""
    rotations, weights, *selection = data
    return Replicas(tuple(map(_load_rotations, rotations)), _floats(weights), *map(_load_selection, selection))


def _load_selection(data: list[Any] | None) -> Selection | None:
    if data is None:
        return None
    slopes, intercepts, usual = data
    return Selection(_floats(slopes), _floats(intercepts), None if usual is None else tuple(map(float, usual)))


def _floats(rows: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in rows)


def _load_forecast(data: list[Any] | None) -> Forecast | None:
    if data is None:
        return None
    forecast = Forecast(tuple((float(loss), float(kld)) for loss, kld in data[0]), dict(data[1]))
    losses = [loss for loss, _ in forecast.points]
    if not losses or losses != sorted(set(losses)) or min(map(min, forecast.points)) <= 0:
        raise ValueError("the forecast is not in ascending order")
    return forecast


def _check_layer(layer: LayerPlan) -> None:
    """Raises ValueError for values that no plan has, so that what reads a plan need not expect them."""
    count = len(layer.projections)
    for shape in layer.projections:
        if (
            shape.group_size not in GROUP_SIZES
            or shape.rows < 1
            or shape.columns < 1
            or shape.columns % shape.group_size
        ):
            raise ValueError(f"layer {layer.layer}: {shape.name} is {list(shape)}")
    if len(layer.weights) != count or any(len(weights) != len(layer.experts) for weights in layer.weights):
        raise ValueError(f"layer {layer.layer}: weights do not fit its experts")
    _check_copies(layer)
    for e, entry in enumerate(layer.experts):
        known = len(entry.levels) == len(entry.errors) == len(entry.gains) == count
        known = known and set(entry.levels) <= {ABSENT, *LEVELS} and _has_whole_copies(layer, entry)
        if not known or any(
            (len(errors), len(gains)) != (num_planes(level), max(num_planes(level) - 1, 0))
            for level, errors, gains in zip(entry.levels, entry.errors, entry.gains, strict=True)
        ):
            raise ValueError(f"layer {layer.layer}, expert {e}: levels, errors and gains do not fit together")
        if len(entry.crc32) != entry.num_planes:
            raise ValueError(f"layer {layer.layer}, expert {e}: {len(entry.crc32)} checksums")


def _check_copies(layer: LayerPlan) -> None:
    copies, matrices = len(layer.copy_rotations), layer.num_matrices
    alike = all(shape[1:] == layer.projections[p % matrices][1:] for p, shape in enumerate(layer.projections))
    if len(layer.projections) != copies * matrices or not alike:
        raise ValueError(f"layer {layer.layer}: projections do not fit {copies} copies")
    if layer.replicas is not None and not _fits_copies(layer.replicas.weights, copies, len(layer.experts)):
        raise ValueError(f"layer {layer.layer}: weights of copies do not fit its experts")
    selection = layer.replicas.selection if layer.replicas is not None else None
    if selection is not None and not (
        _fits_copies(selection.slopes, copies, len(layer.experts))
        and _fits_copies(selection.intercepts, copies, len(layer.experts))
        and (selection.usual is None or _fits_copies([selection.usual], 1, len(layer.experts)))
        and min(selection.usual or (0.0,)) >= 0
    ):
        raise ValueError(f"layer {layer.layer}: what copies are chosen by does not fit its experts")
    for rules in layer.copy_rotations:
        for rule, k in zip(rules, layer.rotated_columns, strict=True):
            if rule.name not in NAMES or not fits(rule.name, k) or not isinstance(rule.seed, int) or rule.seed < 0:
                raise ValueError(f"layer {layer.layer}: no rotation {rule.name!r} of {k} columns by {rule.seed!r}")


def _fits_copies(rows: Sequence[Sequence[float]], copies: int, experts: int) -> bool:
    """Whether there is a finite number for every copy and expert."""
    return len(rows) == copies and all(len(row) == experts and all(map(math.isfinite, row)) for row in rows)


def _check_selections(plan: Plan) -> None:
    """Raises ValueError unless exactly the files that were converted so have what copies are chosen by: without it the same
    file would run, and give something else."""
    wanted = (plan.settings.get("replicas") or {}).get("combine") == SELECTIVE
    for layer in plan.layers:
        if layer.replicas is not None and (layer.replicas.selection is not None) != wanted:
            what = "the settings say nothing of" if layer.replicas.selection is not None else "there is nothing for"
            raise ValueError(f"layer {layer.layer}: {what} choosing copies by the input")


def _has_whole_copies(layer: LayerPlan, entry: ExpertEntry) -> bool:
    """Whether an expert has the first of its copies, and those that it has whole."""
    copies = [entry.levels[i : i + layer.num_matrices] for i in range(0, len(entry.levels), layer.num_matrices)]
    present = [all(levels) for levels in copies]
    return present[0] and present == sorted(present, reverse=True) and present == [any(levels) for levels in copies]
