"""`mlxmoe explain MODEL [--trace T]`: where a token's time goes on this machine, and which cache policy serves the model.

Counts the bytes that a token reads, by class; measures what bounds it (memory bandwidth, the disk, waiting for the host)
with probes of a second or two; replays every policy over a trace at several budgets (replay.py). Reads no weights when
there is a trace already. docs/caching.md defines the numbers. Nothing here overlaps: the times are bounds, and a sum.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlxmoe.arguments import add_model_arguments, note, print_json
from mlxmoe.errors import UserError
from mlxmoe.evaluate import read_text
from mlxmoe.experts import ExpertLayer
from mlxmoe.loading import expert_source, open_model
from mlxmoe.models import named_arrays
from mlxmoe.pictures import Part, check_target, heat_map, new_figure, text_table, write_report
from mlxmoe.policies import CacheChoice, LayerChoice, save_choice
from mlxmoe.prepared import Prepared, prepare
from mlxmoe.reader import probe
from mlxmoe.replay import Budget, Study, frequencies
from mlxmoe.runtime import RuntimeConfig
from mlxmoe.store import ExpertSource
from mlxmoe.trace import PROMPTS, Trace, TraceConfig, add_trace_arguments, load_trace, record_texts
from mlxmoe.units import format_size, parse_size

RESIDENCIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
DEFAULT_RESIDENCY = 0.5  # what --save chooses for when --memory leaves nothing to choose
_PROBE_NBYTES = 1 << 26  # copied at a time by each thread of the bandwidth probe
_PROBE_REPEATS = 7
_SYNCS = 200
_LEAST_TOKENS = 8  # halves of halves must hold something


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------

# The first pattern that is found in a parameter's name says what it belongs to
_CLASSES = (
    ("shared", r"shared_expert"),
    ("attention", r"\b(self_attn|attn|attention|linear_attn|mixer|conv)\b"),
    ("head", r"\b(lm_head|embed_out)\b"),
    ("embedding", r"\b(embed_tokens|wte|tok_embeddings|word_embeddings)\b"),
    ("router", r"\b(gate|router)\.(weight|bias|scales|biases|proj|e_score_correction_bias)"),
    ("dense", r"\b(mlp|feed_forward|block_sparse_moe|ffn)\b"),
)


class ExpertBytes(NamedTuple):
    """Means over all experts: bytes in memory and on disk; and how many a token is sent to, over all layers."""

    memory: float
    disk: float | None  # None for files that cannot be read expert by expert
    per_token: int


def trunk_bytes_per_token(prepared: Prepared) -> dict[str, int]:
    """Bytes of memory that decoding one token reads beside the routed experts: class -> bytes, in the order of docs.

    An input embedding counts one row; one that serves as the output head as well counts in full, as head.
    """
    model = prepared.model
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, ExpertLayer))
    arrays = {name: a for name, a in named_arrays(model.parameters()).items() if not name.startswith(inside)}
    has_head = any(tensor_class(name) == "head" for name in arrays)
    result = dict.fromkeys(("attention", "shared", "router", "dense", "head", "embedding", "other"), 0)
    for name, array in arrays.items():
        kind = tensor_class(name)
        if kind == "embedding" and has_head:
            result[kind] += array.nbytes // array.shape[0]
        else:
            result["head" if kind == "embedding" else kind] += array.nbytes
    return result


def tensor_class(name: str) -> str:
    """What a parameter outside the routed experts belongs to, by its name in the model."""
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, name)), "other")


def expert_bytes(prepared: Prepared, source: ExpertSource | None) -> ExpertBytes:
    """What an expert takes in memory as it would be streamed, and what is read for it."""
    sizes = [size for layer in prepared.streamed_shapes for size in layer.sizes]
    disk = None
    if source is not None:
        spans = [source.spans(layer.layer, e) for layer in source.layers for e in range(layer.num_experts)]
        disk = statistics.fmean(sum(span.nbytes for span in expert) for expert in spans)
    return ExpertBytes(statistics.fmean(sizes), disk, prepared.active * len(prepared.streamed_shapes))


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What this machine was seen to do. Bytes per second; `disk` past the page cache where that is possible."""

    bandwidth: float
    disk: float | None
    page_cache: float | None
    sync_seconds: float  # building one small operation, computing it and waiting for it


def measure_machine(source: ExpertSource | None) -> Machine:
    """Probes memory, the disk under the experts' files and the host's wait for MLX, for about two seconds in all."""
    disk = page_cache = None
    if source is not None:
        first = source.layers[0]
        rates = probe([span for e in range(first.num_experts) for span in source.spans(first.layer, e)]).rates
        page_cache = 1e6 * max(rate.mb_per_s for rate in rates if not rate.direct)
        disk = 1e6 * max((rate.mb_per_s for rate in rates if rate.direct), default=page_cache / 1e6)
    return Machine(measure_bandwidth(), disk, page_cache, measure_sync())


def measure_bandwidth() -> float:
    """Bytes per second that move between memory and processor, the best of a few tries: a sum over a large array on a GPU,
    copies by as many threads as there are cores on a CPU (a copied byte counts twice)."""
    if mx.default_device() != mx.cpu:
        array = mx.zeros((1 << 27,), mx.float32)
        mx.eval(array)
        return array.nbytes / _fastest(lambda: mx.eval(mx.sum(array)))
    threads = os.cpu_count() or 1
    pairs = [(np.ones(_PROBE_NBYTES, np.uint8), np.zeros(_PROBE_NBYTES, np.uint8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _fastest(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
    return 2 * threads * _PROBE_NBYTES / seconds


def measure_sync() -> float:
    """Median seconds of a round trip: one operation on a small array is built, computed and read on the host."""
    array = mx.zeros((8,), mx.int32)
    seconds = []
    for _ in range(_SYNCS):
        start = time.perf_counter()
        array = array + 1
        np.array(array)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(_PROBE_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class TokenTime(NamedTuple):
    """Least seconds of one decoded token, by what it waits for; nothing overlaps."""

    memory: float
    disk: float
    sync: float

    @property
    def total(self) -> float:
        return self.memory + self.disk + self.sync


def token_time(machine: Machine, experts: ExpertBytes, trunk: int, layers: int, hit_rate: float | None) -> TokenTime:
    """`hit_rate` None: every expert is resident, so nothing is read from disk and the host never waits for a router."""
    memory = (trunk + experts.per_token * experts.memory) / machine.bandwidth
    if hit_rate is None:
        return TokenTime(memory, 0.0, 0.0)
    missed = (1 - hit_rate) * experts.per_token * (experts.disk or 0.0)
    return TokenTime(memory, missed / machine.disk if machine.disk else 0.0, layers * machine.sync_seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--trace", metavar="T", help="a file of mlxmoe trace (default: the model is traced first, over --prompts)"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="F",
        help='text to trace: .jsonl with the key "text", or plain text (default: a few passages that come with mlxmoe)',
    )
    add_trace_arguments(parser)
    parser.add_argument(
        "--report",
        metavar="OUT",
        help="also write pictures: a page OUT.html, or a folder with page and PNGs (default: no)",
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help="also write the choice for --memory, or for half of the experts where all fit (default: no)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    config = RuntimeConfig(parse_size(args.memory) if args.memory else None, args.context)
    report, save = Path(args.report) if args.report else None, Path(args.save) if args.save else None
    if report is not None:
        check_target(report)
    if save is not None and not save.parent.is_dir():
        raise UserError(f"there is no folder {save.parent}", "make it first, or save the choice somewhere else")
    trace = load_trace(args.trace) if args.trace else _trace(args, config)
    prepared = prepare(args.model, RuntimeConfig(config.memory, config.context, kernels=None))
    check_fits(trace, prepared)
    machine, experts = _probe(prepared)
    asked = resident_share(prepared, config.memory) if config.memory is not None else 1.0
    least = prepared.active / trace.num_experts
    residencies = sorted({least, *(r for r in (*RESIDENCIES, asked) if least <= r < 1)})
    with tqdm(unit="replay", desc="explain", file=sys.stderr, dynamic_ncols=True) as bar:
        study = Study(trace, bar.update)
        budgets = [study.budget(residency) for residency in residencies]
    result = describe(prepared, trace, machine, experts, budgets)
    for line in report_lines(result):
        print(line)
    if save is not None:
        residency = asked if asked < 1 else DEFAULT_RESIDENCY
        save_choice(make_choice(study.budget(residency), study, trace), save)
        note(f"choice for {residency:.1%} of the experts written to {save}")
    if report is not None:
        for path in write_pictures(result, trace, report):
            note(f"wrote {path}")
    if args.json:
        print_json(result)
    return 0


def _trace(args: argparse.Namespace, config: RuntimeConfig) -> Trace:
    texts = [read_text(path) for path in args.prompts or [PROMPTS]]
    loaded = open_model(args.model, config)
    for line in loaded.report.lines():
        note(line)
    trace = record_texts(loaded, texts, TraceConfig(args.max_tokens, args.window), progress=True)
    if loaded.experts is not None:
        loaded.experts.close()
    return trace


def _probe(prepared: Prepared) -> tuple[Machine, ExpertBytes]:
    """Where experts cannot be read one by one, the disk is left out."""
    try:
        opened = expert_source(prepared)
    except UserError as error:
        note(f"the disk is left out: {error.message}")
        return measure_machine(None), expert_bytes(prepared, None)
    with closing(opened) as source:
        return measure_machine(source), expert_bytes(prepared, source)


def check_fits(trace: Trace, prepared: Prepared) -> None:
    """Raises UserError for a trace of another architecture, or one that nothing can be chosen from. A trace of a sibling
    (the same model in another precision) is fine."""
    shapes = prepared.streamed_shapes
    found = (len(trace.layers), trace.num_experts, trace.experts.shape[-1])
    expected = (len(shapes), len(shapes[0].sizes), prepared.active)
    if found != expected:
        raise UserError(
            f"the trace is of {found[0]} layers with {found[2]} of {found[1]} experts a token, {prepared.checkpoint.name} "
            f"has {expected[0]} layers with {expected[2]} of {expected[1]}",
            "trace this model: mlxmoe trace",
        )
    if trace.num_tokens < _LEAST_TOKENS:
        raise UserError(f"a trace of {trace.num_tokens} tokens is too short to choose from", "trace a longer text")
    if prepared.active == trace.num_experts:
        raise UserError("every token uses every expert: there is nothing to choose", "such a model has to be resident")


def resident_share(prepared: Prepared, memory: int) -> float:
    """The share of all expert bytes that a memory budget keeps when experts are streamed, at most 1. Raises UserError for
    less memory than the model runs with."""
    least = prepared.streaming(memory).least_memory
    if memory < least:
        raise UserError(
            f"{prepared.checkpoint.name} cannot be streamed with {format_size(memory)}",
            f"it needs at least {format_size(least)}; a shorter --context needs less",
        )
    total = sum(sum(layer.sizes) for layer in prepared.streamed_shapes)
    return min(1.0, prepared.streaming(memory).budget / total)


def make_choice(budget: Budget, study: Study, trace: Trace) -> CacheChoice:
    """What --save writes."""
    static = budget.candidate.policy == "static"
    own = [{"frequencies": row.tolist()} if static else {} for row in study.frequencies]
    return CacheChoice(
        policy=budget.candidate.policy,
        parameters=dict(budget.candidate.parameters),
        layers=tuple(LayerChoice(*row) for row in zip(trace.layers, budget.slots, own, strict=True)),
        num_experts=trace.num_experts,
        model=trace.model_sha256,
        note={"residency": budget.residency, "hit_rate_held_out": budget.hit_rate, "lru_held_out": budget.lru},
    )


def describe(
    prepared: Prepared, trace: Trace, machine: Machine, experts: ExpertBytes, budgets: Sequence[Budget]
) -> dict[str, Any]:
    """Everything that is printed, as plain data. Hit rates are of the held-out half."""
    trunk = trunk_bytes_per_token(prepared)
    layers = len(trace.layers)

    def times(hit_rate: float | None) -> dict[str, float]:
        spent = token_time(machine, experts, sum(trunk.values()), layers, hit_rate)
        parts = {f"{name}_share": part / spent.total for name, part in spent._asdict().items()}
        return {"seconds": spent.total, "tokens_per_second": 1 / spent.total, **parts}

    first, second = trace.halves()
    return {
        "model": prepared.checkpoint.name,
        "trace": {
            "model": trace.model,
            "texts": list(trace.texts),
            "documents": len(trace.starts),
            "tokens_fitted": first.num_tokens,
            "tokens_held_out": second.num_tokens,
        },
        "layers": layers,
        "experts": trace.num_experts,
        "experts_per_token": trace.experts.shape[-1],
        "bytes_per_token": {**trunk, "routed": round(experts.per_token * experts.memory)},
        "expert_bytes": {
            "memory": round(experts.memory),
            "disk": None if experts.disk is None else round(experts.disk),
        },
        "machine": machine._asdict(),
        "resident": times(None),
        "budgets": [_budget(budget, times(budget.hit_rate)) for budget in budgets],
    }


def _budget(budget: Budget, spent: dict[str, float]) -> dict[str, Any]:
    return {
        "residency": budget.residency,
        "slots_equal": budget.equal,
        "policies": {
            o.candidate.policy: {
                "parameters": dict(o.candidate.parameters),
                "hit_rate": o.held_out,
                "hit_rate_fitted": o.fitted,
                "of_belady": o.held_out / budget.belady,
            }
            for o in budget.outcomes
        },
        "belady_equal": budget.belady,
        "belady": budget.bound,
        "choice": {
            "policy": budget.candidate.policy,
            "parameters": dict(budget.candidate.parameters),
            "slots": budget.slots,
            "hit_rate": budget.hit_rate,
            "of_belady": budget.hit_rate / budget.bound,
        },
        "token": spent,
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    """For the person at the terminal."""
    machine, trace = result["machine"], result["trace"]
    total = sum(result["bytes_per_token"].values())
    parts = sorted(result["bytes_per_token"].items(), key=lambda item: -item[1])
    disk = f"{format_size(machine['disk'])}/s" if machine["disk"] else "not measured"
    resident = result["resident"]
    return [
        f"{result['model']}: {result['layers']} layers, {result['experts_per_token']} of {result['experts']} experts each; "
        f"a token reads {format_size(total)}: " + ", ".join(f"{k} {n / total:.1%}" for k, n in parts if n),
        f"this machine: memory {format_size(machine['bandwidth'])}/s, disk {disk}, "
        f"waiting for the host {1e6 * machine['sync_seconds']:.0f} µs a layer",
        f"with every expert resident, memory alone bounds it to {resident['tokens_per_second']:.0f} tok/s",
        f"trace of {trace['model'] or 'a model'}: fitted on {trace['tokens_fitted']} tokens, "
        f"hit rates of the other {trace['tokens_held_out']}, the same slots in every layer:",
        *text_table(_policy_rows(result)),
        "choice, with its split of the slots over the layers; Belady with the best split for it; the least time of a token:",
        *text_table(_choice_rows(result)),
    ]


def _policy_rows(result: dict[str, Any]) -> list[list[str]]:
    names = list(result["budgets"][0]["policies"])
    rows = [["resident", "slots", *names, "Belady"]]
    for row in result["budgets"]:
        rates = [row["policies"][name]["hit_rate"] for name in names]
        cells = [f"{rate:.1%} ({rate / row['belady_equal']:.0%})" for rate in rates]
        rows.append([f"{row['residency']:.1%}", str(row["slots_equal"]), *cells, f"{row['belady_equal']:.1%}"])
    return rows


def _choice_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["resident", "policy", "slots", "hit rate", "Belady", "of it", "ms", "memory", "disk", "host"]]
    for row in result["budgets"]:
        choice, spent = row["choice"], row["token"]
        slots = choice["slots"]
        rows.append(
            [
                f"{row['residency']:.1%}",
                " ".join([choice["policy"], *(f"{key}={value:g}" for key, value in choice["parameters"].items())]),
                f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)}-{max(slots)}",
                *(f"{choice['hit_rate']:.1%}", f"{row['belady']:.1%}", f"{choice['of_belady']:.1%}"),
                f"{1e3 * spent['seconds']:.2f}",
                *(f"{spent[f'{name}_share']:.0%}" for name in ("memory", "disk", "sync")),
            ]
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def write_pictures(result: dict[str, Any], trace: Trace, target: Path) -> list[Path]:
    """The page of pictures.write_report. Returns what was written."""
    parts = [
        Part(name="hit-rate", figure=_hit_rate_figure(result)),
        Part(name="popularity", figure=_popularity_figure(trace)),
        Part(lines=report_lines(result)),
    ]
    return write_report(target, f"mlxmoe explain: {result['model']}", parts)


def _hit_rate_figure(result: dict[str, Any]) -> Any:
    """Held-out hit rate against budget, a line per policy, Belady on top."""
    figure, axes = new_figure(height=4.8)
    budgets = result["budgets"]
    shares = [100 * row["residency"] for row in budgets]
    axes.plot(shares, [100 * row["belady"] for row in budgets], "k--", label="Belady (bound)")
    axes.plot(shares, [100 * row["choice"]["hit_rate"] for row in budgets], "o-", color="C3", lw=2.5, label="chosen")
    for i, name in enumerate(budgets[0]["policies"]):
        rates = [100 * row["policies"][name]["hit_rate"] for row in budgets]
        axes.plot(shares, rates, ".-", color=f"C{i + (i >= 3)}", lw=1, label=name)
    axes.set(xlabel="experts resident (%)", ylabel="hit rate on held-out text (%)", xlim=(0, 100), ylim=(0, 101))
    axes.set_title(f"{result['model']}: hit rate by cache policy", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return figure


def _popularity_figure(trace: Trace) -> Any:
    """How often each expert of each layer is chosen, as a multiple of the even share, the most popular on the left."""
    counts = frequencies(trace)
    times_even = np.sort(counts * trace.num_experts / counts.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    return heat_map(
        times_even,
        trace.layers,
        title=f"popularity over {trace.num_tokens} tokens",
        x="experts, the most popular first",
        y="layer",
        unit="1 = chosen as often as the average expert",
    )
