"""`mlxmoe stats MODEL --text F...`: what a model's experts do on text, by layer, expert and domain.

Runs the model layer by layer (convert/activations.py, whose numbers these are), prints a table by layer and what stands
out, and keeps everything in a file if asked; then the layers that are done are kept beside that file until it is there, and
a run that was stopped can go on. docs/report.md defines every number. Reads any checkpoint that converts, and converted
folders.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mlxmoe import __version__
from mlxmoe.arguments import note, print_json
from mlxmoe.bench.pages import stats_parts
from mlxmoe.checkpoint import Checkpoint, open_checkpoint
from mlxmoe.convert.activations import (
    KINDS,
    SCALES,
    ExpertNumbers,
    LayerNumbers,
    Massive,
    Routed,
    Threshold,
    domain_shares,
    gather,
    kinds,
    lift,
    load_variation,
    specialisation,
    super_experts,
)
from mlxmoe.convert.calibrate import file_sha256
from mlxmoe.convert.domains import Windows, choose_windows, read_domains
from mlxmoe.convert.replicas import CONCENTRATED
from mlxmoe.convert.stream import LayerStream
from mlxmoe.convert.tokens import read_tokenizer
from mlxmoe.convert.walk import Walk
from mlxmoe.convert.written import open_weights
from mlxmoe.errors import UserError
from mlxmoe.models import max_context
from mlxmoe.parts import NOT_KEPT, Parts, kept_parts
from mlxmoe.pictures import check_target, text_table, write_report
from mlxmoe.work import json_array, save_arrays, write_whole

FORMAT, VERSION = "mlxmoe-stats", 1
_PAIRS = 8  # of a layer that are listed
_LEAST_TOGETHER = 10  # tokens by chance below which a lift is noise
_CONTEXT = 8  # tokens shown before one that triggers


class Statistics(NamedTuple):
    """Everything that was counted, and the text that it was counted on."""

    model: str
    windows: Windows
    threshold: Threshold
    layers: list[LayerNumbers]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a checkpoint folder, converted or not, or a Hub id (default: the demo model)",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        default=Threshold.factor,
        metavar="X",
        help="a value is massive from X times the layer's scale on (default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default=Threshold.scale,
        help="what X multiplies: root mean square or median magnitude of the layer's values, or 1 (default: %(default)s)",
    )
    parser.add_argument("--save", metavar="S", help="also keep everything, in S.json or S.npz (default: no)")
    parser.add_argument(
        "--report", metavar="OUT", help="also draw it: a page OUT.html, or a folder with page and PNGs (default: no)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was stopped; with --save or --report (default: no)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def add_text_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--text, --max-tokens and --window: text in domains."""
    parser.add_argument(
        "--text",
        nargs="+",
        required=required,
        metavar="F",
        help=".jsonl with the key text or messages, its domains under domain, kind or source, or plain text; a file without "
        "such a key is one domain" + ("" if required else " (default: none)"),
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="tokens of text, shared evenly by the domains (default: %(default)s)",
    )
    parser.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens that share a context (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    threshold = Threshold(args.threshold, args.scale)
    save, report = Path(args.save) if args.save else None, Path(args.report) if args.report else None
    if save is not None:
        _check_save(save)
    if report is not None:
        check_target(report)
    checkpoint = open_checkpoint(args.model)
    tokenizer = read_tokenizer(checkpoint)
    windows = text_windows(checkpoint, read_domains(args.text, tokenizer), tokenizer, args)
    job = text_job(checkpoint, args) | {"threshold": {"factor": threshold.factor, "scale": threshold.scale}}
    with _working(save or report, job, args.resume) as (folder, parts):
        statistics = measure(checkpoint, windows, threshold, folder, parts)
        result = describe(statistics, tokenizer)
        for line in report_lines(result):
            print(line)
        if save is not None:
            if save.suffix == ".npz":
                save_arrays(save, _arrays(statistics, result), compressed=True)
            else:
                write_whole(save, json.dumps(result).encode())
            note(f"wrote {save}")
        if report is not None:
            for path in write_report(report, f"mlxmoe stats: {result['model']}", stats_parts(result)):
                note(f"wrote {path}")
    if args.json:
        print_json(result)
    return 0


@contextmanager
def _working(output: Path | None, job: dict[str, Any], resume: bool) -> Iterator[tuple[Path, Parts]]:
    """A folder to work in, and what a run before has left of the same work: beside `output`; nowhere without one."""
    if output is not None:
        with kept_parts(output, "statistics run", job, resume) as work:
            yield work
    elif resume:
        raise UserError("--resume needs a file beside which layers are kept", "give --save or --report")
    else:
        with tempfile.TemporaryDirectory(prefix="mlxmoe-stats-") as folder:
            yield Path(folder), NOT_KEPT


def text_job(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """What says whether a run is the same as one that was stopped: the model and the text with its settings."""
    texts = {Path(path).name: file_sha256(path) for path in args.text}
    settings = {"max_tokens": args.max_tokens, "window": args.window}
    return {"mlxmoe": __version__, "model": identity(checkpoint), "text": texts, **settings}


def identity(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of modification of every file of a folder."""
    found = {path.name: path.stat() for path in sorted(checkpoint.folder.iterdir()) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def text_windows(
    checkpoint: Checkpoint, domains: dict[str, list[str]], tokenizer: Any, args: argparse.Namespace
) -> Windows:
    """What --max-tokens and --window make of documents by domain. Raises UserError."""
    longest = max_context(checkpoint.config)
    if longest is not None and args.window > longest:
        raise UserError(f"a window of {args.window} tokens is longer than the model's {longest}", "set --window")
    return choose_windows(domains, tokenizer, args.max_tokens, args.window)


def measure(checkpoint: Checkpoint, windows: Windows, threshold: Threshold, folder: Path, parts: Parts) -> Statistics:
    """Runs the model over the windows, hidden states in `folder`. Raises UserError as gather does."""
    weights = open_weights(checkpoint)
    stream = LayerStream(weights)
    with tqdm(total=len(stream.layers), unit=" layers", desc="stats", dynamic_ncols=True) as bar:
        walk = Walk(stream, windows.tokens, folder)
        layers = gather(walk, windows, weights.sites, threshold, bar.update, parts)
    return Statistics(checkpoint.name, windows, threshold, layers)


def load_stats(path: str | Path) -> dict[str, Any]:
    """What --save has written as .json. Raises UserError for a file that is absent, foreign, newer or damaged."""
    hint = "make it again: mlxmoe stats MODEL --text F... --save S.json"
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint) from None
    except ValueError:  # of JSON and of UTF-8
        raise UserError(f"{path} is not JSON: it is damaged, or something else", hint) from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f"{path} is not a file of mlxmoe stats", hint)
    if result.get("version") != VERSION:
        raise UserError(f"{path} has version {result.get('version')}, this mlxmoe reads {VERSION}", hint)
    return result


def _check_save(path: Path) -> None:
    if path.suffix not in (".json", ".npz"):
        raise UserError(f"{path} ends neither in .json nor in .npz", "name the file S.json or S.npz")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}", "make it first, or save somewhere else")


# ---------------------------------------------------------------------------------------------------------------------
# The result as plain data
# ---------------------------------------------------------------------------------------------------------------------


def describe(statistics: Statistics, tokenizer: Any) -> dict[str, Any]:
    """Everything but the matrices of pairs, as plain data; None where a number does not exist."""
    windows = statistics.windows
    layers = [_layer(layer, statistics, tokenizer) for layer in statistics.layers]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": statistics.model,
        "tokens": int(windows.tokens.size),
        "window": windows.tokens.shape[1],
        "threshold": {"factor": statistics.threshold.factor, "scale": statistics.threshold.scale},
        "domains": [
            {"name": name, "tokens": int(count)}
            for name, count in zip(windows.domains, windows.domain_tokens, strict=True)
        ],
        "layers": layers,
        "super_experts": [expert._asdict() for expert in super_experts(statistics.layers)],
        "never": [
            {"layer": layer["layer"], "experts": layer["routed"]["never"]}
            for layer in layers
            if layer["routed"] is not None and layer["routed"]["never"]
        ],
        "lift": _lift(statistics),
    }


def _layer(layer: LayerNumbers, statistics: Statistics, tokenizer: Any) -> dict[str, Any]:
    routed = layer.routed
    return {
        "layer": layer.layer,
        "path": layer.path,
        "stream": _massive(layer.stream, statistics.windows, tokenizer),
        "routed": None if routed is None else _routed(routed, statistics, tokenizer),
    }


def _routed(routed: Routed, statistics: Statistics, tokenizer: Any) -> dict[str, Any]:
    experts, weights = routed.experts, statistics.windows.domain_tokens
    names = kinds(experts.domains, weights)
    counts = Counter(names)
    shares = domain_shares(experts.domains, weights)
    return {
        "active": routed.active,
        "confidence": plain(routed.confidence),
        "load_variation": plain(load_variation(experts.tokens)),
        "specialisation": plain(specialisation(experts.domains, weights)),
        "kinds": {name: counts[name] for name in KINDS},
        "concentrated": int((shares.max(axis=1) > CONCENTRATED).sum()),
        "never": np.flatnonzero(experts.tokens == 0).tolist(),
        "pairs": _pairs(routed, int(statistics.windows.tokens.size)),
        "hidden": _massive(routed.hidden, statistics.windows, tokenizer),
        "experts": {
            **_numbers(experts),
            "frequency": plain(experts.tokens / weights.sum()),
            "concentration": plain(shares.max(axis=1)),
            "domains": plain(shares),
            "kind": names,
        },
        "shared": None if routed.shared is None else _numbers(routed.shared),
    }


def _numbers(numbers: ExpertNumbers) -> dict[str, Any]:
    return {name: plain(values) for name, values in numbers._asdict().items() if name != "domains"}


def _massive(massive: Massive, windows: Windows, tokenizer: Any) -> dict[str, Any]:
    """share: over all groups of rows; of experts it weighs every expert alike."""
    numbers = {name: plain(getattr(massive, name)) for name in ("rms", "median", "largest", "threshold", "first")}
    triggers = [
        {
            "magnitude": plain(t.magnitude),
            "expert": t.expert if t.expert >= 0 else None,
            "domain": windows.domains[int(windows.domain[t.window])],
            "position": t.position,
            "token": tokenizer.decode([int(windows.tokens[t.window, t.position])]),
            "before": tokenizer.decode(windows.tokens[t.window, max(0, t.position - _CONTEXT) : t.position].tolist()),
        }
        for t in massive.triggers
    ]
    present = massive.share[np.isfinite(massive.share)]
    return {**numbers, "share": plain(present.mean()) if len(present) else None, "triggers": triggers}


def _pairs(routed: Routed, tokens: int) -> list[dict[str, Any]]:
    """The pairs with the highest lift, of those that chance alone would bring together often enough to tell."""
    lifts = np.triu(np.nan_to_num(lift(routed.together, routed.active, tokens)), 1)
    by_chance = np.divide(routed.together, lifts, out=np.zeros_like(lifts), where=lifts > 0)
    lifts[by_chance < _LEAST_TOGETHER] = 0
    best = np.argsort(-lifts, axis=None, kind="stable")[:_PAIRS]
    found = [(*(int(i) for i in np.unravel_index(index, lifts.shape)),) for index in best]
    return [
        {"experts": [a, b], "tokens": int(routed.together[a, b]), "lift": plain(lifts[a, b])}
        for a, b in found
        if lifts[a, b] > 0
    ]


def _lift(statistics: Statistics) -> dict[str, Any] | None:
    """The matrix of the layer whose experts are bound together most, by the mean of |log lift| weighted by tokens."""
    tokens = int(statistics.windows.tokens.size)
    found = [
        (layer.layer, layer.routed.together, lift(layer.routed.together, layer.routed.active, tokens))
        for layer in statistics.layers
        if layer.routed is not None and layer.routed.active > 1
    ]
    if not found:
        return None

    def bound(item: tuple[int, np.ndarray, np.ndarray]) -> float:
        _, together, lifts = item
        known = np.isfinite(lifts) & (lifts > 0)
        return float((together[known] * np.abs(np.log(lifts[known]))).sum())

    number, _, lifts = max(found, key=bound)
    return {"layer": number, "values": plain(lifts)}


def plain(value: Any) -> Any:
    """Numbers for JSON: six digits, None for NaN, lists for arrays."""
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()] if value.ndim == 1 else [plain(row) for row in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _arrays(statistics: Statistics, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Over the layers with experts [L, ...]: those of ExpertNumbers, `together` [L, E, E]; `layers` [L], `stream` [N, 4]
    (rms, median, largest, share of all layers), and `header`: the rest as JSON."""
    routed = [layer for layer in statistics.layers if layer.routed is not None]
    arrays: dict[str, np.ndarray] = {"layers": np.array([layer.layer for layer in routed])}
    parts = [layer.routed for layer in routed if layer.routed is not None]
    for name in ExpertNumbers._fields:
        arrays[name] = _stacked([getattr(part.experts, name) for part in parts])
    arrays["together"] = _stacked([part.together for part in parts])
    streams = [layer.stream for layer in statistics.layers]
    arrays["stream"] = np.array([[s.rms, s.median, s.largest, float(s.share[0])] for s in streams])
    header = {name: value for name, value in result.items() if name not in ("layers", "lift")}
    arrays["header"] = json_array(header)
    return arrays


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Of layers with different numbers of experts: filled up with NaN, or with -1 where they are counts."""
    shape = np.max([array.shape for array in arrays], axis=0)
    blank = np.nan if arrays[0].dtype.kind == "f" else -1
    result = np.full((len(arrays), *shape), blank, arrays[0].dtype)
    for row, array in zip(result, arrays, strict=True):
        row[tuple(slice(n) for n in array.shape)] = array
    return result


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """A table by layer, and what stands out."""
    threshold = result["threshold"]
    unit = {"rms": " times the layer's RMS", "median": " times the layer's median", "absolute": ""}[threshold["scale"]]
    lines = [
        f"{result['model']}: {result['tokens']} tokens in windows of {result['window']}, domains: "
        + ", ".join(f"{domain['name']} {domain['tokens']}" for domain in result["domains"]),
        f"bits: what an expert says of the domain; >70 %: experts with that much of one domain; massive: hidden values of "
        f"experts from {threshold['factor']:g}{unit} on; stream, rms, largest: of the hidden states behind the layer",
        *text_table(_layer_rows(result["layers"])),
    ]
    for entry in result["never"]:
        lines.append(f"layer {entry['layer']}: never chosen: {', '.join(map(str, entry['experts']))}")
    found = [f"layer {e['layer']} expert {e['expert']} ({e['largest']:.4g})" for e in result["super_experts"]]
    lines.append("super experts: " + (", ".join(found) or "none"))
    for layer in result["layers"]:
        if layer["routed"] is not None:
            lines += _standing_out(layer)
    return lines


_ROUTING = ("tokens/expert", "load cv", "bits", *KINDS, ">70 %", "confidence", "REAP", "kurtosis", "massive")
_COLUMNS = ("layer", *_ROUTING, "stream", "rms", "largest")


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [[*_COLUMNS]]
    for layer in layers:
        stream, routed = layer["stream"], layer["routed"]
        cells = ["-"] * len(_ROUTING)
        if routed is not None:
            experts = routed["experts"]
            cells = [
                f"{min(experts['tokens'])}-{max(experts['tokens'])}",
                *(f"{routed[key]:.3f}" for key in ("load_variation", "specialisation")),
                *(str(routed["kinds"][name]) for name in KINDS),
                str(routed["concentrated"]),
                f"{routed['confidence']:.3f}",
                *(f"{_median(experts[key]):.4g}" for key in ("reap", "hidden_kurtosis")),
                f"{routed['hidden']['share']:.3%}",
            ]
        behind = [f"{stream['share']:.3%}", f"{stream['rms']:.4g}", f"{stream['largest']:.4g}"]
        rows.append([str(layer["layer"]), *cells, *behind])
    return rows


def _median(values: Sequence[float | None]) -> float:
    return float(np.median([value for value in values if value is not None]))


def _standing_out(layer: Mapping[str, Any]) -> list[str]:
    routed, lines = layer["routed"], []
    more = [pair for pair in routed["pairs"][:4] if pair["lift"] > 1]
    if more:
        pairs = ", ".join(f"{a}+{b} {pair['lift']:.3g}x" for pair in more for a, b in [pair["experts"]])
        lines.append(f"layer {layer['layer']}: chosen together more than by chance: {pairs}")
    first = routed["hidden"]["triggers"][0]
    lines.append(
        f"layer {layer['layer']}: largest hidden value {first['magnitude']:.4g}, expert {first['expert']}, "
        f"{first['domain']}, position {first['position']}: {first['token']!r} behind {first['before']!r}"
    )
    return lines
