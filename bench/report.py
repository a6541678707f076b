"""`mlxmoe report OUT --output DIR`: what a conversion wrote, what that costs, and where; pictures, a page and report.json.

The plan alone gives bytes, levels and expected losses. With --reference and --text it measures as well: KLD at several
memory budgets and by domain (evaluate.py), errors and routing layer by layer (convert/compare.py). What is measured is kept
beside DIR until the report is there, so that a run that was stopped can go on. docs/report.md defines every number.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mlxmoe.arguments import note, print_json
from mlxmoe.bench.pages import bytes_rows, curve_rows, profile_rows, report_parts, stats_parts
from mlxmoe.bench.stats import add_text_arguments, identity, load_stats, plain, text_job, text_windows
from mlxmoe.checkpoint import Checkpoint, open_checkpoint
from mlxmoe.convert.activations import kinds
from mlxmoe.convert.compare import ExpertErrors, LayerChange, compare
from mlxmoe.convert.domains import Windows, read_domains
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.written import open_weights
from mlxmoe.errors import UserError
from mlxmoe.evaluate import EvalConfig, LogitsFn, Text, evaluate, remembered
from mlxmoe.explain import tensor_class
from mlxmoe.forecast import REMEMBERED_NBYTES
from mlxmoe.loading import Loaded, open_model
from mlxmoe.parts import NOT_KEPT, Parts, kept_parts
from mlxmoe.pictures import check_target, text_table, write_report
from mlxmoe.plan import LayerPlan, Plan, TrunkEntry
from mlxmoe.prepared import Prepared, full_memory, machine_memory, prepare, smallest_memory
from mlxmoe.runtime import RuntimeConfig
from mlxmoe.store import record_parts
from mlxmoe.units import format_size, parse_size

FORMAT, VERSION = "mlxmoe-report", 1
JSON_FILE = "report.json"
POINTS = 5


class Asked(NamedTuple):
    """What is measured, checked: the converted folder, its reference, budgets, and the text as documents and as windows."""

    prepared: Prepared
    reference: Checkpoint
    budgets: list[int]
    texts: list[Text]
    windows: Windows


class Measured(NamedTuple):
    """What the reference and the text are needed for."""

    curve: list[dict[str, Any]]
    profile: list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="OUT", help="a converted folder (default: the demo model)")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder for page, pictures and report.json")
    parser.add_argument(
        "--reference", metavar="SRC", help="the checkpoint it was converted from, to measure against (default: none)"
    )
    add_text_arguments(parser, required=False)
    parser.add_argument(
        "--budgets",
        nargs="+",
        metavar="SIZE",
        help=f"memory budgets to measure at, such as 8GB (default: {POINTS} from the least that works to all that is "
        "written)",
    )
    parser.add_argument(
        "--stats", metavar="S", help="a file of mlxmoe stats --save S.json to draw as well (default: none)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped (default: no)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if output.suffix == ".html":
        raise UserError(f"{output} names a page, and a report is a folder", "leave out .html")
    check_target(output)
    if bool(args.reference) != bool(args.text) or (args.budgets and not args.reference):
        raise UserError(
            "measuring needs both --reference and --text", "give both, or neither of them for what the plan says alone"
        )
    budgets = [parse_size(size) for size in args.budgets or ()]
    stats = load_stats(args.stats) if args.stats else None
    checkpoint = open_checkpoint(args.model)
    if checkpoint.kind != "converted":
        raise UserError(
            f"{checkpoint.name} is not converted: there is no plan to report on",
            "convert it first; mlxmoe stats shows what the experts of any checkpoint do",
        )
    plan = Plan.load(checkpoint.folder)
    result = describe(checkpoint, plan)
    asked = ask(checkpoint, args, budgets) if args.reference else None
    with kept_parts(output, "report", _job(checkpoint, asked, args), args.resume) as (folder, kept):
        if asked is not None:
            measured = measure(asked, args, folder, kept)
            result |= {"reference": args.reference, "text": [Path(f).name for f in args.text], **measured._asdict()}
        parts = report_parts(result) + (stats_parts(stats) if stats is not None else [])
        if stats is not None:
            result["stats"] = stats
        data = json.dumps(result, ensure_ascii=False).encode()
        written = write_report(output, f"mlxmoe report: {checkpoint.name}", parts, {JSON_FILE: data})
    for line in report_lines(result):
        print(line)
    for path in written:
        note(f"wrote {path}")
    if args.json:
        print_json(result)
    return 0


def _job(checkpoint: Checkpoint, asked: Asked | None, args: argparse.Namespace) -> dict[str, Any]:
    """What a run must share with one that was stopped. Budgets are not in it: each is a part of its own."""
    if asked is None:
        return {"model": identity(checkpoint)}
    return text_job(checkpoint, args) | {"reference": identity(asked.reference)}


# ---------------------------------------------------------------------------------------------------------------------
# What the plan says
# ---------------------------------------------------------------------------------------------------------------------


def describe(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Bytes, levels and expected losses, as plain data. Reads no weights."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": checkpoint.name,
        "converted_from": plan.source["name"],
        "parameters": plan.num_parameters,
        "bytes": checkpoint.nbytes,
        "bpw": plain(8 * checkpoint.nbytes / plan.num_parameters),
        "expected_loss": plan.expected_loss,
        "calibrated": "calibration" in plan.settings,
        "bytes_by_class": bytes_by_class(checkpoint, plan),
        "loss_by_class": {name: plain(loss) for name, loss in _by_class(plan).items()},
        "loss_by_place": [
            {"place": place, "losses": {name: plain(loss) for name, loss in losses.items()}}
            for place, losses in loss_by_place(plan).items()
        ],
        "sensitivity_by_place": [
            {"place": place, "losses": {name: plain(loss) for name, loss in losses.items()}}
            for place, losses in sensitivity_by_place(plan).items()
        ],
        "layers": [_layer(layer) for layer in plan.layers],
        "forecast": [] if plan.forecast is None else [list(point) for point in plan.forecast.points],
    }


def bytes_by_class(checkpoint: Checkpoint, plan: Plan) -> dict[str, int]:
    """Bytes of all files of the folder: of experts codes, scales, and what fills records and headers up to whole pages; of
    other tensors by class; and the files beside. Their sum is that of the folder."""
    result: dict[str, int] = defaultdict(int)
    for layer in plan.layers:
        for entry in layer.experts:
            for plane in range(entry.num_planes):
                for part in record_parts(layer, entry, plane):
                    result["experts: codes" if part.field == "words" else "experts: scales"] += part.nbytes
        result["experts: padding"] += plan.files[layer.file].nbytes
    result["experts: padding"] -= result["experts: codes"] + result["experts: scales"]
    for name, info in checkpoint.tensors.items():
        result[_class_of(name, plan)] += info.nbytes
    result["files beside"] = checkpoint.nbytes - sum(result.values())
    return {name: nbytes for name, nbytes in sorted(result.items(), key=lambda item: -item[1]) if nbytes}


def _class_of(name: str, plan: Plan) -> str:
    """A class of the plan for what was quantized; of the rest the routers apart."""
    entry = plan.trunk.get(f"{name.rpartition('.')[0]}.weight")
    if entry is not None:
        return entry.tensor_class
    return "routers" if tensor_class(name) == "router" else "norms, vectors"


def loss_by_place(plan: Plan) -> dict[str, dict[str, float]]:
    """Expected loss of what is written: place (embedding, the layers' numbers, head, ...) -> class or projection -> loss.

    Embedding first, then the layers in order, then the rest. Together they are the plan's expected loss.
    """
    return _by_place(plan, lambda entry: entry.weight * entry.error, _losses)


def sensitivity_by_place(plan: Plan) -> dict[str, dict[str, float]]:
    """The same of what relative squared errors of 1 would lose: how much each part matters, whatever width it got."""
    return _by_place(plan, lambda entry: entry.weight, lambda layer, p: layer.weights[p])


def _by_place(
    plan: Plan, of_trunk: Callable[[TrunkEntry], float], of_experts: Callable[[LayerPlan, int], Sequence[float]]
) -> dict[str, dict[str, float]]:
    """Sums of a number of every trunk tensor and of every expert's projection."""
    places: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, entry in plan.trunk.items():
        number = re.search(r"\blayers\.(\d+)\.", name)
        places[number[1] if number else entry.tensor_class][entry.tensor_class] += of_trunk(entry)
    for layer in plan.layers:
        for p, shape in enumerate(layer.projections):
            places[str(layer.layer)][f"experts {shape.name}"] += sum(of_experts(layer, p))

    def order(place: str) -> tuple[int, int]:
        return (1, int(place)) if place.isdigit() else (0 if place == "embedding" else 2, 0)

    return {place: dict(places[place]) for place in sorted(places, key=order)}


def _by_class(plan: Plan) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for losses in loss_by_place(plan).values():
        for name, loss in losses.items():
            sums[name] += loss
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _losses(layer: LayerPlan, projection: int) -> list[float]:
    """Expected loss of every expert's projection at the level written."""
    weights = layer.weights[projection]
    return [weight * error for weight, error in zip(weights, layer.written_errors(projection), strict=True)]


def _layer(layer: LayerPlan) -> dict[str, Any]:
    projections = range(len(layer.projections))
    return {
        "layer": layer.layer,
        "projections": [shape.name for shape in layer.projections],
        "rotations": [rule.name for rule in layer.rotations],
        "levels": [[entry.levels[p] for entry in layer.experts] for p in projections],
        "errors": [layer.written_errors(p) for p in projections],
        "losses": [[plain(loss) for loss in _losses(layer, p)] for p in projections],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def ask(checkpoint: Checkpoint, args: argparse.Namespace, budgets: Sequence[int]) -> Asked:
    """Everything that can be refused before a model runs is refused here, with a UserError."""
    prepared = prepare(args.model, RuntimeConfig(kernels=None))
    budgets = check_budgets(prepared, budgets)
    tokenizer = read_tokenizer(checkpoint)
    domains = read_domains(args.text, tokenizer)
    windows = text_windows(checkpoint, domains, tokenizer, args)
    texts = [Text(name, documents) for name, documents in domains.items()]
    return Asked(prepared, open_checkpoint(args.reference), budgets, texts, windows)


def measure(asked: Asked, args: argparse.Namespace, folder: Path, parts: Parts) -> Measured:
    """Errors and routing by layer, hidden states in `folder`, then KLD at every budget; but for the parts that are there.
    Raises UserError for models that do not belong together."""
    changes = measure_layers(asked.reference, asked.prepared.checkpoint, asked.windows, folder, parts)
    profile = [describe_change(change, asked.windows) for change in changes]
    loaded = open_model(args.model, RuntimeConfig(kernels=None))  # whose levels can change
    reference = open_model(args.reference, RuntimeConfig())
    config = EvalConfig(args.max_tokens, args.window)
    curve = measure_curve(loaded, asked.prepared, reference, asked.texts, config, asked.budgets, parts)
    return Measured(list(curve), profile)


def check_budgets(prepared: Prepared, budgets: Sequence[int]) -> list[int]:
    """The budgets in ascending order; without any, POINTS of them, from the base planes alone to all that is written. Raises
    UserError for one that is too small for all experts to be resident, and where the whole model does not fit."""
    least, full = smallest_memory(prepared), full_memory(prepared)
    if machine_memory() < full:
        raise UserError(
            f"this machine has {format_size(machine_memory())} for all of {prepared.checkpoint.name}, which needs "
            f"{format_size(full)}",
            "measure on one with more memory; without --reference only the plan is read",
        )
    if not budgets:
        return [least + (full - least) * i // (POINTS - 1) for i in range(POINTS)]
    if min(budgets) < least:
        raise UserError(
            f"with {format_size(min(budgets))} not even the base planes of all experts are resident",
            f"the curve starts at {format_size(least)}",
        )
    return sorted(set(budgets))


def measure_curve(
    loaded: Loaded,
    prepared: Prepared,
    reference: Loaded,
    texts: Sequence[Text],
    config: EvalConfig,
    budgets: Sequence[int],
    parts: Parts = NOT_KEPT,
) -> Iterator[dict[str, Any]]:
    """What `mlxmoe eval --memory` gives at every budget of a model that is loaded as a whole; but for the parts that are
    there."""
    elastic, plan = loaded.elastic, prepared.plan
    assert elastic is not None
    assert plan is not None
    logits_nbytes = 4 * config.max_tokens * len(reference.tokenizer.get_vocab())
    wanted: LogitsFn = remembered(reference.model) if logits_nbytes <= REMEMBERED_NBYTES else reference.model
    for memory in budgets:
        kept = parts.get(f"budget-{memory}", dict)
        if kept is not None:
            yield kept
            continue
        elastic.resize(memory - prepared.nbytes_fixed(memory))
        residency = elastic.residency
        result = evaluate(loaded.model, loaded.tokenizer, texts, wanted, config, reference.tokenizer, progress=True)
        nbytes_experts = sum(
            prepared.storage.nbytes(shape, level)
            for layer, levels in zip(plan.layers, residency.levels, strict=True)
            for expert in levels
            for shape, level in zip(layer.projections, expert, strict=True)
        )
        row = {
            "memory": memory,
            "bytes_weights": prepared.nbytes_trunk + nbytes_experts,
            "expected_loss": plain(residency.expected_loss),
            "forecast": plain(plan.forecast.kld(residency.expected_loss)) if plan.forecast else None,
            "levels": {str(level): count for level, count in residency.histogram().items()},
            **{name: plain(value) for name, value in result.items() if name not in ("texts", "seconds")},
            "domains": [{name: plain(value) for name, value in each.items()} for each in result["texts"]],
        }
        parts.keep(f"budget-{memory}", row)
        yield row


def measure_layers(
    reference: Checkpoint, version: Checkpoint, windows: Windows, folder: Path, parts: Parts
) -> list[LayerChange]:
    """Raises UserError as compare does."""
    sources = open_weights(reference), open_weights(version)
    streams = [LayerStream(source) for source in sources]
    if [site.path for site in sources[0].sites] != [site.path for site in sources[1].sites]:
        raise UserError(
            f"{reference.name} and {version.name} do not have the same experts",
            "compare a model with the checkpoint it was made from",
        )
    with tqdm(total=len(streams[0].layers), unit=" layers", desc="compare", dynamic_ncols=True) as bar:
        first, second = (Walk(stream, windows.tokens, folder) for stream in streams)
        return compare(first, second, windows, sources[0].sites, bar.update, parts)


def describe_change(change: LayerChange, windows: Windows) -> dict[str, Any]:
    return {
        "layer": change.layer,
        "stream_error": plain(change.stream_error),
        "own_error": plain(change.own_error),
        "routing": None if change.routing is None else {k: plain(v) for k, v in change.routing._asdict().items()},
        "shared_error": None if change.shared is None else plain(change.shared),
        "experts": None if change.experts is None else _experts(change.experts, windows),
    }


def _experts(experts: ExpertErrors, windows: Windows) -> dict[str, Any]:
    """Errors of experts, and of each class of them: squared errors of its experts' outputs over their squares."""
    names = np.array(kinds(experts.domains, windows.domain_tokens))
    by_kind = {}
    for name in sorted(set(names.tolist())):
        own = names == name
        squares = float(experts.squares[own].sum())
        by_kind[name] = {
            "experts": int(own.sum()),
            "tokens": int(experts.domains[own].sum()),
            "error": plain(float(experts.errors[own].sum()) / squares) if squares else None,
        }
    return {
        "tokens": experts.domains.sum(axis=1).tolist(),
        "error": plain(experts.relative),
        "error_of_all": plain(float(experts.errors.sum() / max(experts.squares.sum(), 1e-30))),
        "kind": names.tolist(),
        "by_kind": by_kind,
    }


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """What the page begins with."""
    lines = [
        f"{result['model']}: converted from {result['converted_from']}, {result['parameters'] / 1e6:.4g}M parameters, "
        f"{format_size(result['bytes'])}, {result['bpw']:.3f} bits per weight, expected loss {result['expected_loss']:.3g}",
        *text_table(bytes_rows(result)),
    ]
    if "curve" in result:
        lines += ["at memory budgets, against " + result["reference"] + ":", *text_table(curve_rows(result["curve"]))]
        lines += ["by layer:", *text_table(profile_rows(result["profile"]))]
    return lines
