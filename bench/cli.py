"""`mlxmoe bench`: decode and prefill speed, time to first token, memory and bytes per token, on this machine.

Owns the arguments, the order of events and the report. docs/measuring.md defines each number.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mlxmoe.arguments import add_model_arguments, note, print_json
from mlxmoe.errors import UserError
from mlxmoe.units import format_size, parse_size

if TYPE_CHECKING:
    from mlxmoe.bench.decode import DecodeRun


@dataclass(frozen=True)
class BenchConfig:
    """What is measured: `repeats` runs of `prompt_tokens` tokens in and `tokens` tokens out."""

    prompt_tokens: int = 256
    tokens: int = 64
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("tokens", 2), ("repeats", 1)):
            value = getattr(self, name)
            if value < least:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {value}, expected {least} or more", f"leave {flag} out for the default")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = BenchConfig()
    add_model_arguments(parser)
    for flag, value, text in (
        ("--prompt-tokens", default.prompt_tokens, "tokens of prompt"),
        ("--tokens", default.tokens, "tokens to decode; the first counts as prefill"),
        ("--repeats", default.repeats, "measurements, after one to warm up"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--compare",
        choices=["mlx-lm", "mlxmoe"],
        help="also measure, run for run in turn: mlx-lm, stock mlx-lm's 4-bit version of the same model; mlxmoe, another "
        "model of the same vocabulary as mlxmoe loads it, with --baseline (default: neither)",
    )
    parser.add_argument(
        "--baseline",
        metavar="PATH",
        help="with --compare mlx-lm: the stock model, as an MLX checkpoint or a folder to quantize (default: made from "
        "MODEL); with --compare mlxmoe: the other model",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    result = bench(args)
    print("\n".join(speed_lines(result)))
    if args.json:
        print_json(result)
    return 0


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the model of `args`, and with --compare the baseline in turn with it. Notes go to stderr."""
    import mlx.core as mx
    from tqdm import tqdm

    from mlxmoe.bench.baseline import Baseline, stock_model
    from mlxmoe.bench.decode import fixed_prompt, measure
    from mlxmoe.bench.timing import Ratio, interleave
    from mlxmoe.checkpoint import open_checkpoint
    from mlxmoe.loading import RuntimeConfig, open_model
    from mlxmoe.machine import machine_facts, peak_rss
    from mlxmoe.models import num_experts_per_token

    config = BenchConfig(args.prompt_tokens, args.tokens, args.repeats)
    if args.baseline and not args.compare:
        raise UserError("--baseline is given without --compare", "add --compare mlx-lm or mlxmoe")
    if args.compare == "mlxmoe" and not args.baseline:
        raise UserError("--compare mlxmoe needs another model", "name it with --baseline")
    runtime = RuntimeConfig(parse_size(args.memory) if args.memory else None, args.context)
    loaded = open_model(args.model, runtime)
    for line in loaded.report.lines():
        note(line)
    context = loaded.report.context
    if config.prompt_tokens + config.tokens > context:
        raise UserError(
            f"{config.prompt_tokens} prompt tokens and {config.tokens} decoded exceed the context of {context}",
            f"use --prompt-tokens and --tokens of at most {context} together, or raise --context",
        )
    models = [loaded.model]
    top_k = [num_experts_per_token(open_checkpoint(name).config) for name in (args.model, args.baseline or args.model)]
    vocabulary = _vocabulary(loaded.model)
    prompt = fixed_prompt(config.prompt_tokens, vocabulary)

    # Each model warms up before the next is loaded, so that the peak seen is its own
    load_peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    measure(loaded.model, prompt, config.tokens)
    memory = [{"load_peak": load_peak, "run_peak": mx.get_peak_memory(), "process_peak_rss": peak_rss()}]
    notes: list[str] = []
    if args.compare:
        others = mx.get_active_memory()
        if args.compare == "mlxmoe":
            other = open_model(args.baseline, runtime)
            baseline = Baseline(other.model, [*other.report.lines()])
        else:
            baseline = stock_model(open_checkpoint(args.baseline or args.model), given=bool(args.baseline))
        models.append(baseline.model)
        notes = [f"baseline: {text}" for text in baseline.notes]
        for line in notes:
            note(line)
        if (size := _vocabulary(baseline.model)) != vocabulary:
            raise UserError(
                f"the baseline's vocabulary has {size} entries, the model's {vocabulary}",
                "give a baseline of the same model with --baseline",
            )
        mx.reset_peak_memory()
        measure(baseline.model, prompt, config.tokens)
        memory.append({"run_peak": mx.get_peak_memory() - others})

    measured = [partial(measure, model, prompt, config.tokens) for model in models]
    with tqdm(total=config.repeats * len(models), unit="run", desc="bench", dynamic_ncols=True) as bar:
        runs = interleave(measured, config.repeats, bar.update)
    result: dict[str, Any] = {"model": loaded.report.source, "mode": loaded.report.mode, "settings": asdict(config)}
    result |= _summary(loaded.model, top_k[0], runs[0], memory[0])
    if args.compare:
        ours, theirs = runs
        result["compare"] = {
            "with": args.compare,
            "baseline": {"source": args.baseline, **_summary(models[1], top_k[1], theirs, memory[1])},
            "decode_ratio": Ratio.of([r.decode_rate for r in ours], [r.decode_rate for r in theirs]).as_json(),
            "prefill_ratio": Ratio.of([r.prefill_rate for r in ours], [r.prefill_rate for r in theirs]).as_json(),
            "notes": notes,
        }
    result["machine"] = machine_facts()
    return result


def _vocabulary(model: Any) -> int:
    """Entries of the model's logits."""
    import mlx.core as mx

    logits = model(mx.array([[0]]))
    mx.eval(logits)
    return logits.shape[-1]


def _summary(model: Any, top_k: int, runs: Sequence[DecodeRun], memory: dict[str, int]) -> dict[str, Any]:
    """One model's part of the report."""
    from mlxmoe.bench.decode import weight_bytes_per_token
    from mlxmoe.bench.timing import Spread

    decode = Spread.of([r.decode_rate for r in runs])
    weights = weight_bytes_per_token(model, top_k)
    kv = runs[0].kv_bytes
    return {
        "decode_tokens_per_second": decode.as_json(),
        "prefill_tokens_per_second": Spread.of([r.prefill_rate for r in runs]).as_json(),
        "ttft_seconds": Spread.of([r.ttft_seconds for r in runs]).as_json(),
        "memory": memory,
        "bytes_per_token": {
            "trunk": weights.trunk,
            "experts": weights.experts,
            "kv": kv,
            "total": weights.total + kv,
        },
        "effective_gb_per_second": round((weights.total + kv) * decode.median / 1e9, 6),
    }


def speed_lines(result: dict[str, Any]) -> list[str]:
    """The report for a person: one line per number, the baseline's beside ours."""
    compare = result.get("compare")
    sides = [result] + ([compare["baseline"]] if compare else [])

    def spread(key: str, spec: str, unit: str) -> str:
        parts = [
            f"{side[key]['median']:{spec}} {unit} ({side[key]['low']:{spec}}..{side[key]['high']:{spec}})"
            for side in sides
        ]
        return "   ".join(part.ljust(34) for part in parts).rstrip()

    def size(outer: str, key: str) -> str:
        return "   ".join(format_size(side[outer][key]).ljust(34) for side in sides).rstrip()

    lines = []
    if compare:
        other = "stock mlx-lm, 4 bits" if compare["with"] == "mlx-lm" else f"mlxmoe, {compare['baseline']['source']}"
        lines.append(f"{'':16}{'mlxmoe':37}{other}")
    lines += [
        f"{'decode':16}{spread('decode_tokens_per_second', '.1f', 'tok/s')}",
        f"{'prefill':16}{spread('prefill_tokens_per_second', '.1f', 'tok/s')}",
        f"{'first token':16}{spread('ttft_seconds', '.3f', 's')}",
        f"{'memory':16}{size('memory', 'run_peak')}",
        f"{'read per token':16}{size('bytes_per_token', 'total')}",
    ]
    read = {name: format_size(nbytes) for name, nbytes in result["bytes_per_token"].items()}
    lines.append(
        f"{'':16}trunk {read['trunk']}, experts {read['experts']}, KV {read['kv']}; "
        f"{result['effective_gb_per_second']:.3g} GB/s"
    )
    lines.append(
        f"{'process':16}{format_size(result['memory']['process_peak_rss'])} at most resident, loading included"
    )
    if compare:
        for name in ("decode", "prefill"):
            ratio = compare[f"{name}_ratio"]
            lines.append(
                f"{name + ' ratio':16}{ratio['of_medians']:.3f} (ratio of medians; pairs: median "
                f"{ratio['median_of_pairs']:.3f}, {ratio['low']:.3f}..{ratio['high']:.3f})"
            )
        lines += compare["notes"]
    machine = result["machine"]
    settings = result["settings"]
    lines.append(
        f"{settings['prompt_tokens']} prompt tokens, {settings['tokens']} decoded, {settings['repeats']} repeats; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['platform']}, MLX {machine['mlx']} on "
        f"{machine['device']}, mlx-lm {machine['mlx_lm']}, commit {machine['commit'] or 'unknown'}"
    )
    return lines
