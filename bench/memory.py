"""`mlxmoe bench memory`: does a model whose experts do not fit stay exact, under its ceiling, and worth its bytes?

Runs the sections of SECTIONS on MODEL and on synthetic models (streaming_model.py), each of which compares two things in
one run, and prints a bar for each promise: what was measured, what it should be, and whether it is. A bar that fails is a
result like any other. docs/streaming.md defines the numbers and keeps what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from tqdm import tqdm

from mlxmoe.arguments import note, print_json
from mlxmoe.bench.baseline import stock_model
from mlxmoe.bench.decode import measure
from mlxmoe.bench.reads import bench_reads
from mlxmoe.bench.streaming_model import Traffic, shape_of_experts, write_streaming_model
from mlxmoe.bench.timing import Ratio, Spread, interleave
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.errors import UserError
from mlxmoe.evaluate import EvalConfig, evaluate, read_text
from mlxmoe.loading import Loaded, LoadReport, open_model
from mlxmoe.machine import machine_facts, peak_rss
from mlxmoe.models import expert_sites
from mlxmoe.policies import OFFLINE, POLICIES
from mlxmoe.prepared import (
    PREFILL_UNIT,
    Prepared,
    choose_residency,
    full_memory,
    machine_memory,
    prepare,
    smallest_memory,
    smallest_streaming,
)
from mlxmoe.replay import Study
from mlxmoe.runtime import RuntimeConfig
from mlxmoe.trace import PROMPTS, TraceConfig, record_texts
from mlxmoe.units import format_size, parse_size

SHARES = (0.0, 0.25, 0.5, 0.75)  # of the way from the least memory that works to all experts
THREADS = (1, 4, 8)
CEILING_SHARES = (0.0, 0.05, 0.2, 0.6, 1.0)
LARGE_CONTEXT = 128  # of the runs under a ceiling of the large model
IDENTITY_TOKENS = 8  # decoded, after a prompt of several chunks
RESIDENCIES = (0.25, 0.5, 0.75)
PREFETCH_TOKENS = 128  # long enough for prefetch.Controller to watch, to try and to judge
_PREFETCH_FACTS = ("precision", "recall", "trials", "steps_on", "seconds_saved")  # of prefetch.PrefetchReport, in print
SLOWER = 2.0  # than computing: what reads are slowed down to, to see reading ahead where it may pay
WARM = 48  # tokens decoded before the time begins: the cache is in the state that decoding keeps it in


@dataclass(frozen=True)
class MemoryConfig:
    """What is measured, and on how large a model."""

    model: str | None = None  # None: the demo model
    size: int = 4_000_000_000  # bytes of experts of the large synthetic model
    small: int = 75_000_000  # of the small one, on which many settings are tried
    reference: str | None = None  # what the model was converted from; None: the model with all that its file holds
    folder: Path | None = None  # where the synthetic models are kept; None: a temporary folder
    tokens: int = 32  # decoded per measurement of speed
    repeats: int = 5
    context: int = 512
    text: tuple[str, ...] = ()  # of the sections `fidelity` and `policies`; (): the passages that come with mlxmoe
    max_tokens: int = 4096  # of it


class Bar(NamedTuple):
    """One promise. `passed` is value <= limit where `below`, else value >= limit."""

    name: str
    value: float
    limit: float
    below: bool

    @property
    def passed(self) -> bool:
        return self.value <= self.limit if self.below else self.value >= self.limit

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "value": round(self.value, 6), "passed": self.passed}

    def line(self) -> str:
        sign = "<=" if self.below else ">="
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.value:.4g} ({sign} {self.limit:g})"


class Section(NamedTuple):
    bars: list[Bar]
    rows: list[dict[str, Any]]  # what the bars were made from


class Bench:
    """The models of a run. Synthetic ones are written when they are first asked for, and kept in `folder`; what nobody
    can use again goes into `work`."""

    def __init__(self, config: MemoryConfig, folder: Path, work: Path):
        self.config, self.work = config, work
        self._folder = folder

    @property
    def model(self) -> str | None:
        return self.config.model

    def synthetic(self, nbytes: int, form: str = "converted") -> Path:
        facts = json.dumps([nbytes, asdict(Traffic())]).encode()
        path = self._folder / f"synthetic-{form}-{hashlib.sha256(facts).hexdigest()[:12]}"
        if not path.exists():
            note(f"writing {path.name}: {format_size(nbytes)} of experts")
            write_streaming_model(path, shape_of_experts(nbytes), form)
        return path


# ---------------------------------------------------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------------------------------------------------


def streaming_memory(prepared: Prepared, residency: float) -> int:
    """The least --memory with which streaming keeps this share of all expert bytes (0: the least that works)."""
    total = sum(sum(layer.sizes) for layer in prepared.streamed_shapes)
    low = prepared.streaming(0).least_memory
    high = low + 2 * total + (1 << 30)
    while high - low > 1000:
        middle = (low + high) // 2
        enough = prepared.streaming(middle).budget >= residency * total
        low, high = (low, middle) if enough else (middle, high)
    return low if prepared.streaming(low).budget >= residency * total else high


@contextmanager
def opened(source: str | Path | None, **settings: Any) -> Iterator[Loaded]:
    """A model that is closed again, with MLX's limits as they were."""
    limits = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    loaded = open_model(source, RuntimeConfig(**settings))
    try:
        yield loaded
    finally:
        if loaded.experts is not None:
            loaded.experts.close()
        del loaded
        mx.clear_cache()
        mx.set_memory_limit(limits[0])
        mx.set_cache_limit(limits[1])


# ---------------------------------------------------------------------------------------------------------------------
# Identity: streaming gives the resident model's bits
# ---------------------------------------------------------------------------------------------------------------------


def digests(loaded: Loaded, prompt: Sequence[int], tokens: int) -> list[str]:
    """SHA-256 of the logits of the prompt, chunk by chunk, and of every greedily decoded token."""
    cache = make_prompt_cache(loaded.model)
    step = PREFILL_UNIT  # the same for every budget
    inputs = [mx.array([list(prompt[i : i + step])]) for i in range(0, len(prompt), step)]
    result = []
    for _ in range(len(inputs) + tokens):
        logits = loaded.model(inputs.pop(0), cache=cache)
        result.append(hashlib.sha256(np.array(logits.astype(mx.float32)).tobytes()).hexdigest())
        if not inputs:
            inputs.append(mx.argmax(logits[:, -1], axis=-1, keepdims=True))
    return result


class Setting(NamedTuple):
    """How one streamed run differs from the others."""

    share: float
    policy: str
    threads: int
    direct: bool = False
    prefetch: str = "off"


def settings(grid: bool) -> list[Setting]:
    """The whole grid, or one setting for each value of each knob."""
    policies = [name for name in POLICIES if name not in OFFLINE]
    if grid:
        plain = [Setting(s, p, t) for s in SHARES for p in policies for t in THREADS]
    else:
        plain = [Setting(0.25, p, 4) for p in policies] + [Setting(s, "lfu", t) for s in SHARES for t in (1, 8)]
    special = [Setting(s, "lfu", 4, direct, "router") for s in SHARES[:2] for direct in (False, True)]
    return [*plain, *special]


def identity(bench: Bench, progress: Callable[[int], object]) -> Section:
    """Every setting against the resident model: logits of a prompt of several chunks and of decoded tokens, bit for bit;
    and --exact where all experts fit, or only just do not."""
    rows: list[dict[str, Any]] = []
    small = bench.config.small
    models: list[tuple[str, str | Path | None, bool]] = [
        ("model", bench.model, True),
        ("synthetic converted", bench.synthetic(small), False),
        ("synthetic mlx", bench.synthetic(small, "mlx"), False),
    ]
    for name, source, grid in models:
        prepared = prepare(source, RuntimeConfig(context=bench.config.context))
        prompt = [(7 * i + 5) % 256 for i in range(48)]
        with opened(source, context=bench.config.context) as loaded:
            assert loaded.report.mode == "resident"
            wanted = digests(loaded, prompt, IDENTITY_TOKENS)
        full = full_memory(prepared)
        known = [s for s in settings(grid) if prepared.plan is not None or s.policy != "static"]  # which needs a plan
        runs = [(streaming_memory(prepared, s.share), s) for s in known]
        runs += [(int(f * full), Setting(f, "lfu", 4)) for f in (0.99, 1.0, 1.05)]
        for memory, setting in runs:
            knobs = {name: value for name, value in setting._asdict().items() if name != "share"}
            with opened(source, memory=memory, context=bench.config.context, exact=True, **knobs) as loaded:
                found = digests(loaded, prompt, IDENTITY_TOKENS)
                mode, hit_rate = loaded.report.mode, None
                if loaded.experts is not None:
                    loaded.experts.check()
                    hit_rate = loaded.experts.totals().hit_rate
            row = {"model": name, **setting._asdict(), "memory": memory, "mode": mode, "hit_rate": hit_rate}
            rows.append(row | {"differing": sum(a != b for a, b in zip(found, wanted, strict=True))})
            progress(1)
    return Section([Bar("identity: runs whose outputs differ", sum(r["differing"] > 0 for r in rows), 0, True)], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Ceiling: measured peaks of whole runs, each in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def ceiling_child(source: str, memory: int, context: int, exact: bool) -> dict[str, Any]:
    """Loads, prefills a prompt that nearly fills the context, decodes, forgets and answers another one."""
    before = peak_rss()
    loaded = open_model(source or None, RuntimeConfig(memory, context, exact=exact))
    ids = [(7 * i + 5) % 256 for i in range(context)]
    for prompt in (ids[: context - 40], ids[:20]):
        cache = make_prompt_cache(loaded.model)
        steps = generate_step(
            mx.array(prompt),
            loaded.model,
            max_tokens=16,
            prompt_cache=cache,
            prefill_step_size=loaded.report.prefill_step,
        )
        for _ in steps:
            pass
        del cache
    return {
        "mode": loaded.report.mode,
        "memory": memory,
        "planned": loaded.report.nbytes,
        "mlx_peak": mx.get_peak_memory(),
        "rss_growth": peak_rss() - before,
    }


_CHILD = """
import json, sys
from mlxmoe.bench.memory import ceiling_child
print(json.dumps(ceiling_child(*json.loads(sys.argv[1]))))
"""


def ceiling_run(source: str | Path | None, memory: int, context: int, exact: bool) -> dict[str, Any]:
    """ceiling_child in a process of its own, so that the peaks are. Raises RuntimeError when it fails."""
    arguments = json.dumps([str(source or ""), memory, context, exact])
    done = subprocess.run([sys.executable, "-c", _CHILD, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()[-40:])
        raise RuntimeError(f"the run of {source or 'the demo model'} failed with --memory {memory}: {reason}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _ceiling_budgets(prepared: Prepared, shares: Sequence[float]) -> list[tuple[int, bool]]:
    """Budgets at these shares of the way from the least to all experts, and those at which the mode changes; with --exact
    as well where it makes a difference."""
    least, reduced, full = smallest_streaming(prepared), smallest_memory(prepared), full_memory(prepared)
    budgets = {int(least + share * (full - least)) for share in shares}
    if 1.0 in shares:
        budgets.add(reduced)
    return [(memory, exact) for memory in sorted(budgets) for exact in sorted({memory < reduced, memory < full})]


def ceiling(bench: Bench, progress: Callable[[int], object]) -> Section:
    """From the least memory that works up to enough for everything, in every mode; the large model streamed only."""
    rows: list[dict[str, Any]] = []
    for name, source, shares, context in (
        ("model", bench.model, CEILING_SHARES, bench.config.context),
        ("synthetic converted", bench.synthetic(bench.config.small), CEILING_SHARES, bench.config.context),
        ("synthetic mlx", bench.synthetic(bench.config.small, "mlx"), CEILING_SHARES, bench.config.context),
        # A prompt of a few chunks: at the least memory each of them reads half of the file
        ("large synthetic", bench.synthetic(bench.config.size), (0.0, 0.3), LARGE_CONTEXT),
    ):
        for memory, exact in _ceiling_budgets(prepare(source, RuntimeConfig(context=context)), shares):
            rows.append({"model": name, "exact": exact, **ceiling_run(source, memory, context, exact)})
            progress(1)
    over = max(row["mlx_peak"] / row["memory"] for row in rows)
    # Of a small model, Python and its modules weigh more than the model
    large = [row for row in rows if row["model"] == "large synthetic"]
    rss = max(row["rss_growth"] / row["memory"] for row in large)
    return Section(
        [
            Bar("ceiling: largest peak of MLX's memory / --memory", over, 1.0, True),
            Bar("ceiling: largest growth of the large model's process / --memory", rss, 1.0, True),
        ],
        rows,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reads
# ---------------------------------------------------------------------------------------------------------------------


def reads(bench: Bench, progress: Callable[[int], object]) -> Section:
    """Records through the reader against a plain loop of preadv; a missed expert against the obvious ways to get it."""
    result = bench_reads(bench.work, bench.config.repeats)
    bars = []
    for state in ("cold", "warm"):
        least = min(rate.ratio.median_of_pairs for rate in result.rates if rate.state == state)
        bars.append(Bar(f"reads: least share of plain preadv, {state}", least, 0.85, False))
        for way in ("mx.load", "memmap"):
            (miss,) = (m for m in result.misses if (m.way, m.state) == (way, state))
            bars.append(Bar(f"misses: {way} takes times as long, {state}", miss.ratio.of_medians, 5.0, False))
    progress(1)
    rows = [rate.as_json() for rate in result.rates] + [miss.as_json() for miss in result.misses]
    return Section(bars, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    """Decoding alone, after the prompt and WARM tokens. Shares are of all seconds; bytes are per token."""

    tokens_per_second: float
    hit_rate: float | None
    wait_share: float | None
    nbytes_read: float | None


def decode(loaded: Loaded, start: int, tokens: int) -> Decoded:
    """Greedy tokens of a synthetic model after a prompt of 32, along its walk from token `start`."""
    prompt = mx.array([(start + i) % loaded.model.args.vocab_size for i in range(32)])
    steps = generate_step(prompt, loaded.model, max_tokens=WARM + tokens, prefill_step_size=loaded.report.prefill_step)
    for _ in range(WARM):
        next(steps)
    experts = loaded.experts
    before = (experts.totals(), experts.counts.wait_seconds) if experts is not None else None
    begin = time.perf_counter()
    for _ in steps:
        pass
    seconds = time.perf_counter() - begin
    if experts is None or before is None:
        return Decoded(tokens / seconds, None, None, None)
    now, (then, waited) = experts.totals(), before
    hits, misses = now.hits - then.hits, now.misses - then.misses
    return Decoded(
        tokens / seconds,
        hits / max(1, hits + misses),
        (experts.counts.wait_seconds - waited) / seconds,
        (now.nbytes_filled - then.nbytes_filled) / tokens,
    )


def speed(bench: Bench, progress: Callable[[int], object]) -> Section:
    """The large model at several residencies, read from the page cache and past it, and all in memory: a table, no bar."""
    source, config = bench.synthetic(bench.config.size), bench.config
    prepared = prepare(source, RuntimeConfig(context=config.context))
    knobs: dict[str, Any] = {"context": config.context, "exact": True, "prefetch": "off"}
    rows = []
    for residency in RESIDENCIES:
        for direct in (False, True):
            knobs |= {"memory": streaming_memory(prepared, residency), "direct": direct}
            rows.append({"residency": residency, **_decoded(source, config.tokens, knobs)})
            progress(1)
    if 1.2 * full_memory(prepared) < machine_memory():
        rows.append({"residency": 1.0, **_decoded(source, config.tokens, {"context": config.context})})
    else:
        note(f"all experts need {format_size(full_memory(prepared))}, too much for this machine: left out")
    return Section([], rows)


def _decoded(source: Path, tokens: int, knobs: dict[str, Any]) -> dict[str, Any]:
    """One run, and what the model was opened with."""
    with opened(source, **knobs) as loaded:
        found = decode(loaded, 0, tokens)
        report = loaded.experts.as_json() if loaded.experts is not None else {}
        return {**knobs, "mode": loaded.report.mode, **found._asdict(), "report": report.get("prefetch")}


def elastic(bench: Bench, progress: Callable[[int], object]) -> Section:
    """A reduced model against one that was written at exactly those levels and is resident, in turns."""
    source, config = bench.synthetic(bench.config.small), bench.config
    prepared = prepare(source, RuntimeConfig(context=config.context))
    memory = (smallest_memory(prepared) + full_memory(prepared)) // 2
    twin = bench.work / "twin"
    write_streaming_model(twin, shape_of_experts(config.small), levels=choose_residency(prepared, memory).levels)
    with opened(source, memory=memory, context=config.context) as reduced:
        assert reduced.report.mode == "elastic"
        # The same levels take the same bytes; what else the two may take is not to decide
        with opened(twin, memory=memory, context=config.context) as resident:
            assert resident.report.mode == "resident", resident.report.mode
            assert resident.report.nbytes_experts == reduced.report.nbytes_experts
            runs = [partial(_timed, loaded.model, config.tokens) for loaded in (reduced, resident)]
            ours, theirs = interleave(runs, 6 * config.repeats + 1, lambda: progress(1))
    speed_ratio = Ratio.of([run.tokens_per_second for run in ours], [run.tokens_per_second for run in theirs])
    work_ratio = Ratio.of([run.processor_seconds for run in theirs], [run.processor_seconds for run in ours])
    row = {
        "memory": memory,
        "levels": reduced.report.levels,
        "speed": speed_ratio.as_json(),
        "work": work_ratio.as_json(),
    }
    rates = {"elastic": ours, "resident": theirs}
    row |= {name: Spread.of([run.tokens_per_second for run in found]).as_json() for name, found in rates.items()}
    return Section(
        [
            Bar("elastic: decode speed / resident at the same bytes", speed_ratio.median_of_pairs, 0.95, False),
            Bar("elastic: resident's processor time / elastic's", work_ratio.median_of_pairs, 0.95, False),
        ],
        [row],
    )


class _Timed(NamedTuple):
    """Wall-clock speed of decoding, and what prompt and decoding took of all processors: no other program is in that."""

    tokens_per_second: float
    processor_seconds: float


def _timed(model: nn.Module, tokens: int) -> _Timed:
    begin = time.process_time()
    run = measure(model, list(range(8)), tokens)
    return _Timed(run.decode_rate, time.process_time() - begin)


def prefetch(bench: Bench, progress: Callable[[int], object]) -> Section:
    """Reading ahead against not, over the same tokens: past the page cache, and with reads slowed down so that they take
    SLOWER times as long as computing: a table, no bar."""
    source, config = bench.synthetic(bench.config.size), bench.config
    prepared = prepare(source, RuntimeConfig(context=config.context))
    knobs: dict[str, Any] = {"context": config.context, "exact": True, "direct": True, "read_rate": None}
    knobs["memory"] = streaming_memory(prepared, RESIDENCIES[0])
    rows: list[dict[str, Any]] = []
    for slow in (False, True):
        if slow:
            knobs |= {"read_rate": slow_rate(rows[0]), "direct": False}
        for name in ("off", "router", "previous"):
            knobs["prefetch"] = name
            rows.append({"residency": RESIDENCIES[0], **_decoded(source, PREFETCH_TOKENS, knobs)})
            progress(1)
    return Section([], rows)


def slow_rate(row: dict[str, Any]) -> float:
    """Bytes per second at which reading would take SLOWER times what the run of `row` spent computing."""
    compute_seconds = (1 - row["wait_share"]) / row["tokens_per_second"]
    return float(row["nbytes_read"] / (SLOWER * compute_seconds))


# ---------------------------------------------------------------------------------------------------------------------
# Fidelity of the elastic mode
# ---------------------------------------------------------------------------------------------------------------------


def fidelity(bench: Bench, progress: Callable[[int], object]) -> Section:
    """KL divergence from the original, or from the whole file, to what a budget leaves, against what loading forecasts."""
    config = bench.config
    prepared = prepare(bench.model, RuntimeConfig(context=config.context))
    if prepared.plan is None:
        note("fidelity: the model is not converted, so nothing is reduced")
        return Section([], [])
    least, full = smallest_memory(prepared), full_memory(prepared)
    texts = [read_text(path) for path in config.text or (str(PROMPTS),)]
    options = EvalConfig(config.max_tokens, config.context)
    rows = []
    with opened(config.reference or bench.model, context=config.context) as reference:
        known = 0.0 if config.reference else forecast_kld(reference.report)
        for share in (0.0, 0.25, 0.5, 0.75):
            memory = int(least + share * (full - least))
            with opened(bench.model, memory=memory, context=config.context) as reduced:
                scores = evaluate(reduced.model, reduced.tokenizer, texts, reference.model, options)
                forecast = forecast_kld(reduced.report) - known
                found = {"memory": memory, "experts": reduced.report.nbytes_experts}
            rows.append(found | {"forecast": forecast, "kld": scores["kld_mean"], "kld_stderr": scores["kld_stderr"]})
            progress(1)
    off = max(abs(row["kld"] / row["forecast"] - 1) for row in rows if row["forecast"] > 0)
    return Section([Bar("fidelity: largest error of the forecast KLD", off, 0.1, True)], rows)


def forecast_kld(report: LoadReport) -> float:
    """Mean KL divergence to the original as loading forecasts it; for a folder without a forecast its expected loss."""
    found = report.expected_loss if report.expected_kld is None else report.expected_kld
    assert found is not None, "only a converted folder has a forecast"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The all-hit path
# ---------------------------------------------------------------------------------------------------------------------


def build_seconds(block: nn.Module, x: mx.array, calls: int = 100) -> float:
    """Seconds of this thread's processor time per call that building the block's graph takes; nothing is evaluated."""
    begin = time.thread_time()
    for _ in range(calls):
        block(x)
    return (time.thread_time() - begin) / calls


def traces(model: nn.Module) -> bool:
    """Whether one token's graph is built without the host reading anything: while MLX traces, it refuses to evaluate."""
    try:
        mx.compile(lambda tokens: model(tokens))(mx.array([[1]]))
    except (RuntimeError, ValueError) as error:
        if "eval" not in str(error).lower():
            raise
        return False
    return True


def all_hit(bench: Bench, progress: Callable[[int], object]) -> Section:
    """Time to build the graph of an MoE block, in turns with mlx-lm's own of the same shapes; and who reads on the host."""
    rows: list[dict[str, Any]] = []
    ratios, syncs = [], 0
    for name, source in (
        ("model", bench.model),
        ("synthetic converted", bench.synthetic(bench.config.small)),
        ("synthetic mlx", bench.synthetic(bench.config.small, "mlx")),
    ):
        with opened(source, context=bench.config.context) as loaded:
            checkpoint = open_checkpoint(source)
            stock = load_model(checkpoint.folder)[0] if checkpoint.kind == "mlx" else stock_model(checkpoint).model
            stock.set_dtype(mx.float32)
            paths = [site.path.rpartition(".")[0] for site in expert_sites(stock)]
            hidden = _hidden(stock)
            x = mx.random.normal((1, 1, hidden))
            mx.eval(x)

            def total(model: nn.Module, x: mx.array = x, paths: list[str] = paths) -> float:
                blocks = dict(model.named_modules())
                return sum(build_seconds(blocks[path], x) for path in paths) / len(paths)

            ours, theirs = interleave(
                [partial(total, model) for model in (loaded.model, stock)],
                4 * bench.config.repeats + 1,
                lambda: progress(1),
            )
            syncs += not traces(loaded.model)
        found = {"ours": ours, "mlx-lm": theirs}
        ratios.append(Ratio.of(ours, theirs))
        row = {"model": name, "ratio": ratios[-1].as_json()}
        rows.append(row | {k: Spread.of([1e6 * s for s in seconds]).as_json() for k, seconds in found.items()})
    worst = max(ratio.median_of_pairs for ratio in ratios)
    return Section(
        [
            Bar("all hits: models whose graph needs the host", syncs, 0, True),
            Bar("all hits: graph building of an MoE block / mlx-lm's", worst, 1.2, True),
        ],
        rows,
    )


def _hidden(model: nn.Module) -> int:
    """The width of the residual stream."""
    settings = model.args
    return int(getattr(settings, "hidden_size", None) or settings.text_config["hidden_size"])


# ---------------------------------------------------------------------------------------------------------------------
# Policies
# ---------------------------------------------------------------------------------------------------------------------


def policies(bench: Bench, progress: Callable[[int], object]) -> Section:
    """The policy that `mlxmoe explain` chooses from half of a trace, on the other half."""
    config = bench.config
    texts = [read_text(path) for path in config.text or (str(PROMPTS),)]
    with opened(bench.model, context=config.context) as loaded:
        trace = record_texts(loaded, texts, TraceConfig(2 * config.max_tokens, config.context))
    study = Study(trace)
    budgets = []
    for residency in RESIDENCIES:
        budgets.append(study.budget(residency))
        progress(1)
    rows = [
        {"residency": b.residency, "policy": b.candidate.policy}
        | {name: getattr(b, name) for name in ("hit_rate", "lru", "belady", "bound")}
        for b in budgets
    ]
    of_belady, of_lru = min(b.hit_rate / b.belady for b in budgets), min(b.hit_rate / b.lru for b in budgets)
    return Section(
        [
            Bar("policies: least hit rate / Belady's, held out", of_belady, 0.9, False),
            Bar("policies: least hit rate / LRU's, held out", of_lru, 1.0, False),
        ],
        rows,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench, Callable[[int], object]], Section]] = {
    "identity": identity,
    "ceiling": ceiling,
    "reads": reads,
    "speed": speed,
    "elastic": elastic,
    "fidelity": fidelity,
    "all-hit": all_hit,
    "prefetch": prefetch,
    "policies": policies,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = MemoryConfig()
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the model to measure beside synthetic ones (default: the demo model)"
    )
    parser.add_argument(
        "--size", default="4GB", help="bytes of experts of the large synthetic model (default: %(default)s)"
    )
    parser.add_argument("--small", default="75MB", help="of the small synthetic model (default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where synthetic models are kept for the next run (default: a temporary folder)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument(
        "--reference",
        metavar="REF",
        help="for fidelity: what MODEL was converted from (default: MODEL with everything that its file holds)",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="F",
        help="text for fidelity and policies (default: a few passages that come with mlxmoe)",
    )
    for flag, value, text in (
        ("--max-tokens", default.max_tokens, "tokens of that text"),
        ("--tokens", default.tokens, "tokens decoded per measurement of speed"),
        ("--repeats", default.repeats, "measurements of each kind"),
        ("--context", default.context, "tokens of context"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    for name, least in (("max_tokens", 64), ("tokens", 2), ("repeats", 1), ("context", 256)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is {getattr(args, name)}, expected {least} or more", f"leave {flag} out for the default"
            )
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"there is no folder {args.folder}", "name a folder to keep the synthetic models in")
    for source in (args.model, args.reference):
        open_checkpoint(source)
    config = MemoryConfig(
        model=args.model,
        size=parse_size(args.size),
        small=parse_size(args.small),
        reference=args.reference,
        folder=args.folder,
        tokens=args.tokens,
        repeats=args.repeats,
        context=args.context,
        text=tuple(args.text or ()),
        max_tokens=args.max_tokens,
    )
    result = bench_memory(config, args.only or list(SECTIONS))
    print("\n".join(report_lines(result)))
    if args.json:
        print_json(result)
    return 0


def bench_memory(config: MemoryConfig, names: Sequence[str]) -> dict[str, Any]:
    """Runs these sections in their order. Notes and progress go to stderr."""
    result: dict[str, Any] = {
        "model": config.model,
        "size": config.size,
        "small": config.small,
        "bars": [],
        "sections": {},
    }
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="mlxmoe-memory-") as work:
        bench = Bench(config, config.folder or Path(work), Path(work))
        for name in names:
            begin = time.perf_counter()
            with tqdm(desc=name, unit="run", dynamic_ncols=True) as bar:
                section = SECTIONS[name](bench, bar.update)
            result["bars"] += [bar.as_json() for bar in section.bars]
            result["sections"][name] = {"seconds": round(time.perf_counter() - begin, 1), "rows": section.rows}
            for found in section.bars:
                note(found.line())
    return result | {"machine": machine_facts()}


def report_lines(result: dict[str, Any]) -> list[str]:
    """Tables of the sections that have one, then the bars."""
    lines = []
    for name in ("speed", "prefetch", "fidelity", "policies"):
        for row in result["sections"].get(name, {}).get("rows", []):
            facts = {key: value for key, value in row.items() if key != "report"}
            facts |= {key: (row.get("report") or {}).get(key) for key in _PREFETCH_FACTS if row.get("report")}
            lines.append(f"{name}: " + ", ".join(f"{k} {_short(v)}" for k, v in facts.items()))
    lines += [Bar(**{k: v for k, v in bar.items() if k != "passed"}).line() for bar in result["bars"]]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
