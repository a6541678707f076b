"""`mlxmoe forecast MODEL --reference REF --text F`: what a smaller memory budget costs, measured once and kept in the file.

A converted folder is compared with its source at several budgets, from base planes only to everything that is written;
the measured KLD goes into plan.json beside the expected loss of each budget. From then on loading says what to expect.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlxmoe.arguments import note, print_json
from mlxmoe.checkpoint import open_checkpoint
from mlxmoe.elastic import ElasticMemory
from mlxmoe.errors import UserError
from mlxmoe.evaluate import EvalConfig, Text, evaluate, read_text, remembered
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.plan import Forecast, Plan
from mlxmoe.units import format_size

POINTS = 6
MAX_TOKENS = 8192
REMEMBERED_NBYTES = 2 << 30  # the reference's logits are kept up to here, and computed again for each budget above


class Measured(NamedTuple):
    """One budget: bytes of experts, expected loss, mean KLD in nats."""

    nbytes_experts: int
    expected_loss: float
    kld: float


def measure_budgets(
    loaded: Loaded, reference: Loaded, texts: Sequence[Text], points: int, config: EvalConfig
) -> Iterator[Measured]:
    """The KLD at `points` budgets of a wholly resident model, largest first. Leaves it at the smallest."""
    elastic = _elastic(loaded)
    logits_nbytes = 4 * config.max_tokens * len(reference.tokenizer.get_vocab())
    wanted = remembered(reference.model) if logits_nbytes <= REMEMBERED_NBYTES else reference.model
    least, full = elastic.least, elastic.full
    for i in reversed(range(points)):
        elastic.resize(least + (full - least) * i // (points - 1))
        result = evaluate(loaded.model, loaded.tokenizer, texts, wanted, config, reference.tokenizer, progress=True)
        yield Measured(elastic.nbytes, elastic.residency.expected_loss, result["kld_mean"])


def _elastic(loaded: Loaded) -> ElasticMemory:
    if loaded.elastic is None or loaded.report.mode != "resident":
        raise UserError(
            f"{loaded.report.source} is {loaded.report.kind} and {loaded.report.mode}: there are no budgets to compare",
            "a forecast is made for a converted folder, with enough memory for all of it",
        )
    return loaded.elastic


def make_forecast(measured: Sequence[Measured], texts: Sequence[Text], max_tokens: int) -> Forecast:
    """Points in ascending order of the loss. Budgets that come to the same residency count once."""
    points = sorted({row.expected_loss: row.kld for row in measured}.items())
    return Forecast(tuple(points), {"texts": [Path(text.name).name for text in texts], "max_tokens": max_tokens})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a converted folder; its plan.json is rewritten")
    parser.add_argument("--reference", required=True, metavar="REF", help="the checkpoint that it was converted from")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="F", help='text to measure on: .jsonl with the key "text", or plain'
    )
    parser.add_argument(
        "--points", type=int, default=POINTS, metavar="N", help="budgets that are measured (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="predictions scored at each budget, shared evenly by the texts (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="last line of stdout is one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.points < 2:
        raise UserError(f"{args.points} points make no curve", "give --points 2 or more")
    texts = [read_text(path) for path in args.text]
    folder = open_checkpoint(args.model).folder
    loaded = open_model(args.model, RuntimeConfig(kernels=None))  # whose levels can change
    _elastic(loaded)
    reference = open_model(args.reference, RuntimeConfig())
    print(f"{'experts':>10}  {'expected loss':>13}  KLD mean")
    measured = []
    for row in measure_budgets(loaded, reference, texts, args.points, EvalConfig(max_tokens=args.max_tokens)):
        print(f"{format_size(row.nbytes_experts):>10}  {row.expected_loss:>13.4g}  {row.kld:.5f}", flush=True)
        measured.append(row)
    plan = replace(Plan.load(folder), forecast=make_forecast(measured, texts, args.max_tokens))
    plan.save(folder)
    note(f"{folder / 'plan.json'} now holds the forecast")
    if args.json:
        result: dict[str, Any] = {"model": str(folder), "points": [row._asdict() for row in measured]}
        print_json(result)
    return 0
