"""Stage 2, allocate (pure): from measured errors and a size to the plan of every tensor.

Experts choose a level per (expert, projection), trunk tensors a width inside the rule of their class; one solver
(mlxmoe/budget.py) spends the bytes of all of them. The bytes are exact: headers, padding, side files and the plan's own
text are counted, and the budget is corrected until the folder fits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxmoe.budget import Option, allocate, smallest_nbytes
from mlxmoe.convert.config import DEFAULT_RULES, LOWEST_CALIBRATED_BITS, LOWEST_TRUNK_BITS, ConvertConfig, Rule
from mlxmoe.convert.measure import AS_IS, ExpertErrors, TrunkErrors, TrunkFormat, candidate_formats
from mlxmoe.convert.replicas import copies_per_expert, copy_seeds
from mlxmoe.convert.sensitivity import CLASS_WEIGHTS, expert_benefits, expert_weights, score_losses, trunk_weight
from mlxmoe.convert.source import Source, TrunkTensor
from mlxmoe.convert.strategies import by_benefit, by_score, tie, untie
from mlxmoe.errors import UserError
from mlxmoe.formats import ABSENT, MatrixShape, num_planes, words_per_row
from mlxmoe.plan import SELECTIVE, ExpertEntry, FileEntry, LayerPlan, Plan, Replicas, Selection, TrunkEntry, copy_share
from mlxmoe.rotation import LayerRotations
from mlxmoe.store import encode_header, layer_file_nbytes, layer_records, rotation_matrices
from mlxmoe.units import format_size

_FIT_STEPS = 24  # allocations tried until the folder's size is within a thousandth below what was asked
_LONGEST = 1.234e-05  # a value of four digits takes at most these nine characters in plan.json
SHARD_NBYTES = 1 << 30  # trunk tensors are gathered into files of about this size
SAFETENSORS_DTYPES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint32: "U32", mx.uint8: "U8",
                      mx.int32: "I32", mx.int64: "I64"}  # fmt: skip


class OutputTensor(NamedTuple):
    """A tensor of a trunk file: name, safetensors dtype, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Decision(NamedTuple):
    """The plan, what it costs exactly, and what the person should know about it."""

    plan: Plan
    nbytes: int
    nbytes_by_class: dict[str, int]
    notes: list[str]


def trunk_outputs(tensor: TrunkTensor, stored: TrunkFormat | None) -> list[OutputTensor]:
    """What is written for a trunk tensor: packed words, scales, biases; or the tensor as it is (None)."""
    if stored is None:
        nbytes = int(np.prod(tensor.shape)) * tensor.dtype.size
        return [OutputTensor(tensor.name, SAFETENSORS_DTYPES[tensor.dtype], tensor.shape, nbytes)]
    *lead, columns = tensor.shape
    words = (*lead, words_per_row(columns, stored.bits))
    groups = (*lead, columns // stored.group_size)
    return [
        OutputTensor(tensor.name, "U32", words, int(np.prod(words)) * 4),
        OutputTensor(f"{tensor.module}.scales", "F16", groups, int(np.prod(groups)) * 2),
        OutputTensor(f"{tensor.module}.biases", "F16", groups, int(np.prod(groups)) * 2),
    ]


def trunk_formats(plan: Plan) -> dict[str, TrunkFormat]:
    """Of the trunk tensors that are quantized."""
    formats = {name: TrunkFormat(entry.bits, entry.group_size) for name, entry in plan.trunk.items()}
    return {name: stored for name, stored in formats.items() if stored != AS_IS}


def _storable(tensor: TrunkTensor) -> list[TrunkFormat]:
    """What a tensor may be written as: what is measured, in that order, and as it is."""
    return [*candidate_formats(tensor), AS_IS]


def trunk_shards(source: Source, formats: dict[str, TrunkFormat]) -> list[list[TrunkTensor]]:
    """Trunk tensors gathered into files, in name order."""
    shards: list[list[TrunkTensor]] = [[]]
    size = 0
    for tensor in source.trunk:
        nbytes = sum(output.nbytes for output in trunk_outputs(tensor, formats.get(tensor.name)))
        if size and size + nbytes > SHARD_NBYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def shard_header(shard: Sequence[TrunkTensor], formats: dict[str, TrunkFormat]) -> bytes:
    outputs = [output for tensor in shard for output in trunk_outputs(tensor, formats.get(tensor.name))]
    return encode_header({o.name: (o.dtype, o.shape, o.nbytes) for o in outputs})


def output_config(source: Source, formats: dict[str, TrunkFormat]) -> str:
    """config.json of the converted folder: the source's, plus MLX's own description of each quantized trunk tensor."""
    config = {k: v for k, v in source.checkpoint.config.items() if k not in ("quantization", "quantization_config")}
    quantization: dict[str, Any] = {"group_size": 64, "bits": 8}
    for name, stored in formats.items():
        quantization[name.removesuffix(".weight")] = {"group_size": stored.group_size, "bits": stored.bits}
    config["quantization"] = quantization
    return json.dumps(config, separators=(",", ":")) + "\n"


class Allocator:
    """Turns measurements into a Decision. Holds no arrays of weights."""

    def __init__(
        self,
        source: Source,
        config: ConvertConfig,
        experts: dict[int, ExpertErrors],
        trunk: TrunkErrors,
        side_files: dict[str, int],
        describe: dict[str, Any],
    ):
        self._source, self._config, self._describe = source, config, describe
        self._side_files = side_files
        self._quantizable = [tensor for tensor in source.trunk if tensor.tensor_class]
        self._trunk_errors = trunk
        self._experts = experts
        self._expert_weights = self._weigh_experts()
        self._trunk_weights = self._weigh_trunk()
        self._copies = self._count_copies()
        # (site index, projection, expert) of each expert item, in the order of the options
        self._keys = [
            (i, p, e)
            for i, site in enumerate(source.sites)
            for p in range(len(source.shapes[site.path]))
            for e in range(site.num_experts)
        ]

    def _weigh_experts(self) -> list[list[list[float]]]:
        sites, result = self._source.sites, []
        for site in sites:
            measured = self._experts[site.layer]
            if measured.weights is not None:
                result.append([list(map(float, row)) for row in measured.weights])
                continue
            count = len(self._source.shapes[site.path])
            result.append([expert_weights(list(norms), len(sites), count) for norms in measured.norms])
        return result

    def _weigh_trunk(self) -> list[float]:
        if self._trunk_errors.weights is not None:
            return list(map(float, self._trunk_errors.weights))
        counts = Counter(tensor.tensor_class for tensor in self._quantizable)
        num_layers = 1 + max(site.layer for site in self._source.sites)
        weights = [trunk_weight(str(t.tensor_class), counts[t.tensor_class], num_layers) for t in self._quantizable]
        if not counts["head"]:  # tied: the embedding is the head as well
            extra = CLASS_WEIGHTS["head"] / max(counts["embedding"], 1)
            weights = [
                w + extra * (t.tensor_class == "embedding") for w, t in zip(weights, self._quantizable, strict=True)
            ]
        return weights

    @property
    def _nesting(self) -> float:
        """What smaller memories count that the file is to serve as well."""
        return 0.0 if self._config.calibration is None else self._config.calibration.mu

    def _expert_losses(self) -> list[np.ndarray]:
        """[P, E, levels] of every site, of one copy of every expert."""
        losses = []
        for i, site in enumerate(self._source.sites):
            measured = self._experts[site.layer]
            norms = np.where(measured.norms, measured.norms, 1.0)
            losses.append((np.array(self._expert_weights[i]) / norms)[..., None] * measured.errors)
        return losses

    def _count_copies(self) -> list[np.ndarray]:
        """int [E] of every site."""
        if self._config.replicas is None:
            return [np.ones(site.num_experts, int) for site in self._source.sites]
        costs = [losses[..., 0].sum(axis=0) for losses in self._expert_losses()]
        return copies_per_expert(self._config.replicas, costs, self._config.seed)

    def _expert_options(self) -> list[list[Option]]:
        """Copies have one level: their losses are added up."""
        losses = zip(self._expert_losses(), self._copies, strict=True)
        return self._options_of([loss * (copies * self._shares(copies))[:, None] for loss, copies in losses])

    def _shares(self, copies: np.ndarray) -> np.ndarray:
        """float64 [E]: what an error of each copy counts, of copies [E]."""
        selective = self._config.replicas is not None and self._config.replicas.combine == SELECTIVE
        return np.array([copy_share(int(k), selective) for k in copies])

    def _options_of(self, losses: Sequence[np.ndarray]) -> list[list[Option]]:
        """Options of every expert matrix, in the order of the keys, from losses [P, E, levels] of every site."""
        items = []
        for i, p, e in self._keys:
            shape = self._source.shapes[self._source.sites[i].path][p]
            values = zip(self._config.expert_levels, losses[i][p, e], strict=True)
            copies = int(self._copies[i][e])
            items.append([Option(level, copies * _matrix_nbytes(shape, level), float(loss)) for level, loss in values])
        return items

    def _trunk_options(self, rules: dict[str, Rule]) -> list[list[Option]]:
        items = []
        for t, tensor in enumerate(self._quantizable):
            low, high = rules[str(tensor.tensor_class)]
            norm = self._trunk_errors.norms[t] or 1.0
            options = []
            for j, stored in enumerate(_storable(tensor)):
                if low <= stored.bits <= high:
                    as_it_is = stored == AS_IS
                    nbytes = sum(o.nbytes for o in trunk_outputs(tensor, None if as_it_is else stored))
                    error = 0.0 if as_it_is else self._trunk_errors.errors[t, j]
                    options.append(Option(j, nbytes, self._trunk_weights[t] * error / norm))
            items.append(options)
        return items

    def _choose(self, items: list[list[Option]], budget: int) -> list[Option]:
        """One option for every item, by the configured method. What is not `measured` by the loss itself is about experts:
        it shares out the bytes that the loss gives to all of them, and leaves the trunk as it is. The trunk of a file
        for smaller memories too, which each of them has to hold, is that of a smaller one: of the bytes above the smallest
        file 1 / (1 + mu).

        Raises ValueError when even the smallest options exceed the budget.
        """
        how, count = self._config.allocation, len(self._keys)
        experts, trunk = items[:count], items[count:]
        if self._nesting:
            least = smallest_nbytes(items)
            trunk = [
                [option] for option in allocate(items, least + int((budget - least) / (1 + self._nesting)))[count:]
            ]
            items = experts + trunk
        if how.method == "uniform":
            tied = tie(experts, [(i, p) for i, p, _ in self._keys])
            chosen = allocate(tied.items + trunk, budget)
            return untie(chosen[: len(tied.items)], tied, experts) + chosen[len(tied.items) :]
        chosen = allocate(items, budget)
        layers = [self._experts[site.layer] for site in self._source.sites]
        left = sum(option.nbytes for option in chosen[:count])
        if how.method == "benefit":
            benefits = [float(b) for layer in expert_benefits(how, layers) for b in layer]
            starts = np.cumsum([0, *(site.num_experts for site in self._source.sites)])
            return by_benefit(experts, [int(starts[i]) + e for i, _, e in self._keys], benefits, left) + chosen[count:]
        if how.sensitivity != "fisher":
            return by_score(experts, self._options_of(score_losses(how, layers)), left) + chosen[count:]
        return chosen

    def check_size(self) -> None:
        """Raises UserError when the smallest possible folder is larger than asked. Needs no measurements."""
        target = self._config.nbytes(self._source.num_parameters)
        # Without measurements the weights of a layer's experts are all equal, which is written as one number.
        # The plan also names the size, which may have more digits than the one asked.
        unknown = len(f"{_LONGEST},") * (len(self._keys) + len(self._quantizable)) + 32
        least = self._smallest(self._lowered()).nbytes + unknown
        if least > target:
            raise UserError(
                f"{format_size(target)} is below the smallest possible size of this model, {least} bytes",
                f"ask for at least --size {-(-least // 1000)}kB, or lower the widths that --bits and --expert-bits pin",
            )

    def decide(self) -> Decision:
        """The plan for the configured size, which `check_size` accepts."""
        target = self._config.nbytes(self._source.num_parameters)
        notes: list[str] = []
        # Errors that were measured on one scale need no rule per class.
        rules = self._lowered() if self._config.calibration else {**DEFAULT_RULES, **self._config.rules}
        if self._config.allocation.method == "benefit":  # shared experts come first, always
            rules = {**rules, "shared": self._config.rules.get("shared", (DEFAULT_RULES["shared"][1],) * 2)}
        decision = self._fit(target, rules)
        if decision is None:
            notes.append(
                f"{format_size(target)} is below what 6 to 8 bit outside the experts needs: "
                "those tensors take part in the allocation, from 3 bits"
            )
            decision = self._fit(target, self._lowered())
        if decision is None:
            self.check_size()
            raise AssertionError("the smallest folder fits, and yet no allocation was found")
        if decision.nbytes < 0.99 * target:
            widest = set(decision.plan.level_histogram()) == {max(self._config.expert_levels)}
            widest_is = "every expert" if self._nesting else "every tensor"
            why = f"{widest_is} is at its widest" if widest else "no allocation comes closer"
            notes.append(f"{why}: the folder takes {format_size(decision.nbytes)}, less than asked")
        return decision._replace(notes=notes)

    def _lowered(self) -> dict[str, Rule]:
        """The rules where the defaults do not fit: classes that the user did not pin go down to the lowest width."""
        lowest = LOWEST_CALIBRATED_BITS if self._config.calibration else LOWEST_TRUNK_BITS
        default = {name: (lowest, high) for name, (_, high) in DEFAULT_RULES.items()}
        return {**default, **self._config.rules}

    def _smallest(self, rules: dict[str, Rule]) -> Decision:
        items = self._expert_options() + self._trunk_options(rules)
        return self._assemble([min(options, key=lambda o: o.nbytes) for options in items])

    def _fit(self, target: int, rules: dict[str, Rule]) -> Decision | None:
        """The best decision of at most `target` bytes under these rules, None if there is none."""
        items = self._expert_options() + self._trunk_options(rules)
        smallest, widest = smallest_nbytes(items), sum(max(option.nbytes for option in options) for options in items)
        best = self._smallest(rules)
        if best.nbytes > target:
            return None
        # What is not in the options (headers, padding, plan) depends a little on the choice: correct by what it was,
        # then halve the interval between a budget that fits and one that does not.
        budget, low, high = min(target - (best.nbytes - smallest), widest), smallest, widest + 1
        for step in range(_FIT_STEPS):
            decision = self._assemble(self._choose(items, budget))
            miss = target - decision.nbytes
            if miss < 0:
                high = budget
            else:
                low = budget
                if decision.plan.expected_loss < best.plan.expected_loss:
                    best = decision
            if 0 <= miss <= target // 1000 or high - low <= 1:
                break
            corrected = budget + (miss if miss < 0 else miss * 3 // 4)
            budget = corrected if step < _FIT_STEPS // 4 and low < corrected < high else (low + high) // 2
        return best

    def _assemble(self, chosen: list[Option]) -> Decision:
        source = self._source
        by_key = dict(zip(self._keys, chosen[: len(self._keys)], strict=True))
        layers = tuple(self._layer(i, by_key) for i in range(len(source.sites)))
        trunk = {}
        for t, (tensor, option) in enumerate(zip(self._quantizable, chosen[len(self._keys) :], strict=True)):
            weight = self._trunk_weights[t]
            error = option.loss / weight if weight else 0.0
            stored = _storable(tensor)[option.label]
            trunk[tensor.name] = TrunkEntry(str(tensor.tensor_class), *stored, error, weight)
        plan = Plan(
            model_type=source.checkpoint.config["model_type"],
            source=self._describe,
            settings=self._config.as_settings(),
            num_parameters=source.num_parameters,
            layers=layers,
            trunk=trunk,
            expected_loss=sum(option.loss for option in chosen),
            seed=self._config.seed,
        )
        return self.account(plan)

    def _layer(self, i: int, by_key: dict[tuple[int, int, int], Option]) -> LayerPlan:
        site = self._source.sites[i]
        shapes = self._source.shapes[site.path]
        most = 1 if self._config.replicas is None else self._config.replicas.copies
        experts = []
        for e, copies in enumerate(self._copies[i].tolist()):
            levels = tuple(by_key[i, p, e].label for p in range(len(shapes))) * copies
            levels += (ABSENT,) * (len(shapes) * most - len(levels))
            # What is only known from the codes (write.py) is counted at its longest; the file is filled up with spaces.
            measures = [num_planes(level) for level in levels]
            errors = tuple((_LONGEST,) * n for n in measures)
            gains = tuple((_LONGEST,) * max(n - 1, 0) for n in measures)
            experts.append(ExpertEntry(levels, errors, gains, (2**32 - 1,) * num_planes(max(levels))))
        file = f"experts-{i + 1:05d}-of-{len(self._source.sites):05d}.safetensors"
        rotations = self._experts[site.layer].rotations
        weights = tuple(tuple(w) for w in self._expert_weights[i])
        layer = LayerPlan(site.layer, site.path, site.kind, file, shapes, weights, tuple(experts), rotations)
        return layer if most == 1 else self._replicated(layer, self._copies[i], most)

    def _replicated(self, layer: LayerPlan, copies: np.ndarray, most: int) -> LayerPlan:
        """With the projections of further copies."""
        shares = [np.where(copy < copies, self._shares(copies), 0.0) for copy in range(most)]
        seeds = copy_seeds(layer.rotations.hidden.name, layer.rotated_columns[1], most, self._config.seed)
        rules = tuple(LayerRotations(*(rule._replace(seed=seed) for rule in layer.rotations)) for seed in seeds[1:])
        shapes = [
            shape._replace(name=shape.name + (f"_{copy + 1}" if copy else ""))
            for copy in range(most)
            for shape in layer.projections
        ]
        weights = [tuple((share * np.array(row)).tolist()) for share in shares for row in layer.weights]
        replicas = Replicas(rules, *self._combination(len(layer.experts), most))
        return layer._replace(projections=tuple(shapes), weights=tuple(weights), replicas=replicas)

    def _combination(self, num_experts: int, most: int) -> tuple[tuple[tuple[float, ...], ...], Selection | None]:
        """How the outputs of copies are combined is known when they are coded: counted at its longest."""
        how = self._config.replicas
        assert how is not None
        weights = ((_LONGEST,) * num_experts,) * most
        if how.combine != SELECTIVE:
            return weights, None
        lines = ((-_LONGEST,) * num_experts,) * most
        return weights, Selection(lines, lines, weights[0] if how.conservative else None)

    def account(self, plan: Plan) -> Decision:
        """Exact bytes of every file that the plan leads to, without notes."""
        formats = trunk_formats(plan)
        shards = trunk_shards(self._source, formats)
        by_class: Counter[str] = Counter()
        files: dict[str, FileEntry] = {}
        for i, shard in enumerate(shards):
            size = len(shard_header(shard, formats))
            for tensor in shard:
                nbytes = sum(output.nbytes for output in trunk_outputs(tensor, formats.get(tensor.name)))
                by_class[tensor.tensor_class or "router, norms, biases"] += nbytes
                size += nbytes
            files[shard_name(i, len(shards))] = FileEntry(size, "0" * 64)
        for layer in plan.layers:
            files[layer.file] = FileEntry(layer_file_nbytes(layer), "0" * 64)
            by_class["experts"] += sum(nbytes for *_, nbytes in layer_records(layer))
            for matrix in rotation_matrices(layer):
                by_class["rotations"] += matrix.nbytes
        files |= {name: FileEntry(size, "0" * 64) for name, size in self._side_files.items()}
        files["config.json"] = FileEntry(len(output_config(self._source, formats).encode()), "0" * 64)
        text = len(plan.with_files(files).dumps().encode())
        total = sum(entry.nbytes for entry in files.values()) + text
        by_class["tokenizer, headers, plan"] = total - sum(by_class.values())
        return Decision(plan, total, dict(by_class), [])


def _matrix_nbytes(shape: MatrixShape, level: int) -> int:
    """Bytes of one expert matrix at a level, before its records are filled up to whole pages."""
    return sum(shape.plane_nbytes(plane) for plane in range(num_planes(level))) + shape.scales_nbytes
