"""`mlxmoe convert SRC OUT --bpw 3 | --size 9GB`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlxmoe.arguments import note, print_json
from mlxmoe.convert.calibrate import Calibration, file_sha256
from mlxmoe.convert.config import DEFAULT_RULES, ConvertConfig, parse_rule
from mlxmoe.convert.job import Job, Outcome
from mlxmoe.convert.selftext import SELF
from mlxmoe.errors import UserError
from mlxmoe.formats import LEVELS
from mlxmoe.units import format_size, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a Hugging Face folder or Hub id")
    parser.add_argument("output", metavar="OUT", type=Path, help="the folder to create")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--bpw", type=float, metavar="X", help="bits per weight, all files counted")
    size.add_argument("--size", metavar="SIZE", help="bytes of the whole folder, such as 9GB")
    parser.add_argument(
        "--group-size", type=int, default=ConvertConfig.group_size, metavar="G",
        help="weights per scale in the experts: 128, 64 or 32 (default: %(default)s, or the next that divides)",
    )  # fmt: skip
    parser.add_argument(
        "--expert-bits", default=",".join(map(str, LEVELS)), metavar="LIST",
        help="levels that experts may be written at (default: %(default)s)",
    )  # fmt: skip
    rules = "; ".join(f"{name}={low}-{high}" for name, (low, high) in DEFAULT_RULES.items())
    parser.add_argument(
        "--bits", action="append", default=[], metavar="CLASS=BITS",
        help=f"width outside the experts, such as attention=8 or embedding=4-6; may be repeated (default: {rules}, "
        "lower where the size demands it; with --calibration 2-8 for all; router and norms are never touched)",
    )  # fmt: skip
    text = Calibration("")
    parser.add_argument(
        "--calibration", metavar="F",
        help="text that the model is run on, .jsonl with the key text or messages, or plain text; 'self' for text that the "
        "model itself writes (default: none, the error of the weights alone is minimised)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens", type=int, default=text.tokens, metavar="N",
        help="tokens of it that are used (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("rtn", "gptq"),
        help="rtn: rounding, without text; gptq: error feedback by calibration text (default: gptq with --calibration)",
    )  # fmt: skip
    parser.add_argument(
        "--nested", type=float, default=text.mu, metavar="MU",
        help="what the errors of an expert's lower levels count when it is written: more for a file that shall serve "
        "smaller memories as well (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--predecessors", choices=("quantized", "source"), default="quantized",
        help="the layers that calibration text goes through before the one that is written (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="recorded in the plan (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="measure and print the plan; write nothing")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an unfinished conversion")
    again.add_argument("--restart", action="store_true", help="discard an unfinished conversion and start over")
    parser.add_argument("--json", action="store_true", help="last line of stdout is one JSON object")


def parse_config(args: argparse.Namespace) -> ConvertConfig:
    try:
        levels = tuple(sorted({int(text) for text in args.expert_bits.split(",")}))
    except ValueError:
        raise UserError(
            f"--expert-bits {args.expert_bits!r} is no list of numbers", "example: --expert-bits 2,3,4"
        ) from None
    if (args.method == "gptq") > (args.calibration is not None):
        raise UserError("--method gptq needs text", "give --calibration FILE, or --calibration self")
    calibration = None
    if args.calibration is not None and args.method != "rtn":
        calibration = Calibration(
            args.calibration,
            file_sha256(args.calibration) if args.calibration != SELF else "",
            tokens=args.calibration_tokens,
            mu=args.nested,
            predecessors=args.predecessors == "quantized",
        )
    return ConvertConfig(
        target_nbytes=parse_size(args.size) if args.size else None,
        bpw=args.bpw,
        group_size=args.group_size,
        expert_levels=levels,
        rules=dict(parse_rule(text) for text in args.bits),
        seed=args.seed,
        calibration=calibration,
    )


def run(args: argparse.Namespace) -> int:
    config = parse_config(args)
    job = Job(args.source, args.output, config)
    site = job.source.sites[0]
    note(
        f"{job.checkpoint.name}: {job.checkpoint.config['model_type']}, {job.source.num_parameters / 1e6:.4g}M parameters, "
        f"{len(job.source.sites)} layers of {site.num_experts} experts"
    )
    outcome = job.dry_run() if args.dry_run else job.run(resume=args.resume, restart=args.restart)
    for line in (*outcome.decision.notes, *report_lines(outcome)):
        note(line)
    if args.json:
        print_json(as_json(outcome, args.dry_run))
    else:
        print(f"would write {format_size(outcome.nbytes)}" if args.dry_run else args.output)
    return 0


def report_lines(outcome: Outcome) -> list[str]:
    """What was written, for people: bytes by class, expert levels, expected loss."""
    by_class = sorted(outcome.decision.nbytes_by_class.items(), key=lambda item: -item[1])
    levels = outcome.plan.level_histogram()
    total = sum(levels.values())
    return [
        "bytes: " + ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in by_class),
        "expert matrices: " + ", ".join(f"{100 * n / total:.0f} % at {level} bit" for level, n in levels.items()),
        f"{format_size(outcome.nbytes)}, {8 * outcome.nbytes / outcome.plan.num_parameters:.3f} bits per weight, "
        f"expected loss {outcome.plan.expected_loss:.4g}",
    ]


def as_json(outcome: Outcome, dry_run: bool) -> dict[str, Any]:
    return {
        "bytes": outcome.nbytes,
        "bpw": 8 * outcome.nbytes / outcome.plan.num_parameters,
        "parameters": outcome.plan.num_parameters,
        "expected_loss": outcome.plan.expected_loss,
        "expert_levels": {str(level): n for level, n in outcome.plan.level_histogram().items()},
        "bytes_by_class": outcome.decision.nbytes_by_class,
        "notes": outcome.decision.notes,
        "dry_run": dry_run,
    }
