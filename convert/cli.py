"""`mlxmoe convert SRC OUT --bpw 3 | --size 9GB`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlxmoe.arguments import note, print_json
from mlxmoe.convert.calibrate import (
    FEWEST_TOKENS,
    METHODS,
    MOST_TOKENS,
    PARAMETERS_PER_TOKEN,
    Calibration,
    file_sha256,
)
from mlxmoe.convert.config import (
    ALLOCATIONS,
    COMBINED_BY,
    DEFAULT_RULES,
    POLISHES,
    REPLICATED_BY,
    ROUTERS,
    SENSITIVITIES,
    Allocation,
    ConvertConfig,
    Replication,
    default_polish,
    default_rotation,
    parse_replicas,
    parse_rules,
    parse_sensitivity,
)
from mlxmoe.convert.hubtext import DATA_SET, HUB
from mlxmoe.convert.job import Job, Outcome
from mlxmoe.convert.rotate import CHOICES
from mlxmoe.convert.selftext import SELF
from mlxmoe.errors import UserError
from mlxmoe.formats import WRITTEN_LEVELS
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
        "--expert-bits", default=",".join(map(str, WRITTEN_LEVELS)), metavar="LIST",
        help="levels that experts may be written at (default: %(default)s)",
    )  # fmt: skip
    rules = "; ".join(f"{name}={low}-{high}" for name, (low, high) in DEFAULT_RULES.items())
    parser.add_argument(
        "--bits", action="append", default=[], metavar="CLASS=BITS",
        help="width outside the experts, such as attention=8 or embedding=4-6; 16 leaves tensors as they are; may "
        f"be repeated (default: {rules}, lower where the size demands it; with --calibration 2-8 for all; router and norms "
        "are never touched)",
    )  # fmt: skip
    text = Calibration("")
    parser.add_argument(
        "--calibration", metavar="F",
        help="text that the model is run on, .jsonl with the key text or messages, or plain text; 'self' for text that the "
        f"model itself writes, 'hub' for chats of {DATA_SET} (default: none, the error of the weights alone is minimised)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N",
        help=f"tokens of it that are used (default: one for {PARAMETERS_PER_TOKEN} parameters, {FEWEST_TOKENS} to "
        f"{MOST_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", type=int, default=text.candidates, metavar="N",
        help="with --calibration self: texts that are written for each that is kept (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("rtn", *METHODS),
        help="rtn: rounding, without text; gptq: error feedback by calibration text; awq: experts rounded behind scales and "
        "clips by calibration text, everything else as gptq (default: gptq with --calibration, else rtn)",
    )  # fmt: skip
    parser.add_argument(
        "--nested", type=float, default=text.mu, metavar="MU",
        help="what smaller memories count that the file shall serve as well, 1 for instance: the errors of experts' lower "
        "levels, when codes and scales are chosen, and the bytes that everything else takes from them (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--predecessors", choices=("quantized", "source"), default="quantized",
        help="the layers that calibration text goes through before the one that is written (default: %(default)s)",
    )  # fmt: skip
    share = Allocation()
    parser.add_argument(
        "--allocation", choices=ALLOCATIONS, default=share.method,
        help="how bytes are shared out: measured, by the losses of single matrices; benefit, experts in the order of "
        "sensitivity * frequency * (1 + massive activations), shared ones first; uniform, one level for all experts of a "
        "layer and projection (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sensitivity", default=share.sensitivity, metavar="NAME",
        help=f"what experts' levels are chosen by: {', '.join(SENSITIVITIES)}; mix=50,30,20 gives the shares of output "
        "error, gradient and frequency (default: %(default)s, the loss by the gradients on calibration text)",
    )  # fmt: skip
    parser.add_argument(
        "--rotation", choices=CHOICES, metavar="NAME",
        help=f"rotation of the experts' inputs and hidden values: {', '.join(CHOICES)}; auto chooses for every layer what "
        "lowers the error, dfrot is fitted; both need --calibration (default: auto with --calibration, none without it, "
        "with --method awq or with --replicas)",
    )  # fmt: skip
    parser.add_argument(
        "--refine", type=int, default=share.refine, metavar="N",
        help="rounds in which every part of the coded model gets its original weights back, and its losses are scaled to "
        "what the divergence falls by on further calibration text (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--polish", choices=POLISHES,
        help="what refines scales after the codes: factors, one for every expert; layer, all scales by the outputs of each "
        "layer; model, all scales by the predictions, with the whole model in memory (default: layer with --calibration, "
        "none without it or with --replicas)",
    )  # fmt: skip
    parser.add_argument(
        "--router", choices=ROUTERS, default=ConvertConfig.router,
        help="how routers are adapted to quantized experts: bias, lowered by half of an expert's degradation; temperature, "
        "logits divided by 1.2; topk-mse, fitted to the original's logits (default: %(default)s, bit for bit the source's)",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", metavar="BY[:SHARE[:COPIES]]",
        help=f"write that share of each layer's experts as several copies behind rotations of their own: "
        f"{', '.join(REPLICATED_BY)}, such as sensitivity:0.30:2 (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--combine", choices=COMBINED_BY, default=Replication.combine,
        help="what the output of each copy counts; selective: the one of least predicted error for each input counts alone "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--conservative", action="store_true",
        help="with --combine selective: the mean of the copies where an input's norm is unusual for the expert, or was "
        "hardly ever seen (default: off)",
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
    if args.method in METHODS and args.calibration is None:
        raise UserError(f"--method {args.method} needs text", "give --calibration FILE, self or hub")
    _check_effect(args)
    calibration = None
    if args.calibration is not None:
        calibration = Calibration(
            args.calibration,
            file_sha256(args.calibration) if args.calibration not in (SELF, HUB) else "",
            tokens=args.calibration_tokens,
            method=args.method or METHODS[0],
            candidates=args.candidates,
            mu=args.nested,
            predecessors=args.predecessors == "quantized",
        )
    replicas = parse_replicas(args.replicas, args.combine, args.conservative) if args.replicas is not None else None
    return ConvertConfig(
        target_nbytes=parse_size(args.size) if args.size else None,
        bpw=args.bpw,
        group_size=args.group_size,
        expert_levels=levels,
        rules=parse_rules(args.bits),
        seed=args.seed,
        rotation=default_rotation(calibration, replicas) if args.rotation is None else args.rotation,
        replicas=replicas,
        polish=default_polish(calibration, replicas) if args.polish is None else args.polish,
        router=args.router,
        calibration=calibration,
        allocation=Allocation(args.allocation, *parse_sensitivity(args.sensitivity), args.refine),
    )


def _check_effect(args: argparse.Namespace) -> None:
    """Refuses what would be ignored in silence."""
    if args.dry_run and (args.resume or args.restart):
        raise UserError("--dry-run keeps nothing, and so has nothing to go on with", "leave out --resume or --restart")
    if args.method == "rtn" and args.calibration is not None:
        raise UserError("--method rtn reads no text", "leave out --calibration, or --method for the better way")
    text = Calibration("")
    defaults = {"calibration_tokens": None, "candidates": text.candidates, "nested": 0.0, "predecessors": "quantized"}
    for name, default in defaults.items():
        if args.calibration is None and getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is about calibration text", "give --calibration FILE, self or hub as well")
    if args.candidates != text.candidates and args.calibration != SELF:
        raise UserError(
            "--candidates is about text that the model writes itself", "leave it out, or give --calibration self"
        )
    for flag, given in (("combine", args.combine != Replication.combine), ("conservative", args.conservative)):
        if given and args.replicas is None:
            raise UserError(
                f"--{flag} is about copies of experts", "give --replicas as well, such as sensitivity:0.30:2"
            )


def run(args: argparse.Namespace) -> int:
    config = parse_config(args)
    job = Job(args.source, args.output, config)
    site = job.source.sites[0]
    note(
        f"{job.checkpoint.name}: {job.checkpoint.config['model_type']}, {job.source.num_parameters / 1e6:.4g}M parameters, "
        f"{len(job.source.sites)} layers of {site.num_experts} experts"
    )
    if args.calibration is None and args.method is None:
        note("without text only the error of the weights is minimised; --calibration FILE, self or hub lowers the loss")
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
