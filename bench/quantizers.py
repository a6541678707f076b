"""`mlxmoe bench quantizers`: mlx-lm's own quantizers and our converter on one checkpoint: bytes and fidelity of each.

Rows are recipes of bench/stock.py, and `mlxmoe:SIZE` for `mlxmoe convert --size SIZE` by the same calibration text. Each is
made in a process of its own and compared with the source on text that no quantizer saw (`mlxmoe eval`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mlxmoe.arguments import note, print_json
from mlxmoe.bench import stock
from mlxmoe.bench.child import run_child
from mlxmoe.checkpoint import Checkpoint, folder_nbytes, open_checkpoint
from mlxmoe.cli import main as command_line
from mlxmoe.convert.calibrate import file_sha256
from mlxmoe.errors import UserError
from mlxmoe.evaluate import EvalConfig, LogitsFn, Text, evaluate, read_text, remembered
from mlxmoe.loading import open_model
from mlxmoe.machine import machine_facts
from mlxmoe.units import parse_size

OURS = "mlxmoe"
ROWS = (
    "rtn:2:64", "rtn:2:32", "rtn:3:32", "rtn:mixed_2_6:32", "gptq:2:64", "dynamic:3.0:2:4", "awq:4:64",
    "dwq:3e-4:rtn:2:64", "dwq:3e-4:rtn:2:32", "dwq:3e-4:rtn:3:32", "dwq:3e-4:gptq:2:64",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a Hugging Face folder or Hub id")
    parser.add_argument("--calibration", required=True, metavar="F", help="text that the quantizers learn from")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="F", help='text to score: .jsonl with the key "text", or plain text'
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=32768, metavar="N", help="tokens of F (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=EvalConfig.max_tokens, metavar="N",
        help="predictions scored, shared evenly by the texts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", default=",".join(ROWS), metavar="LIST",
        help="what is compared: recipes such as rtn:BITS:GROUP, gptq:BITS:GROUP, dynamic:BPW:LOW:HIGH, awq:BITS:GROUP, "
        "dwq:RATE:RECIPE, and mlxmoe:SIZE (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=Path, metavar="DIR",
        help="keep the models here, and take those that are here already from an earlier call (default: none is kept)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    rows = [row for row in args.rows.split(",") if row]
    for row in rows:
        if row.startswith(OURS + ":"):
            parse_size(row.removeprefix(OURS + ":"))
        else:
            stock.parse(row)
    if not rows:
        raise UserError("--rows names nothing to compare", f"leave it out for {len(ROWS)} of mlx-lm's recipes")
    for name, least in (("calibration_tokens", 1), ("max_tokens", len(args.text))):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(args, name)}, expected {least} or more", f"leave {flag} out")
    if args.keep is not None and not args.keep.is_dir() and (args.keep.exists() or not args.keep.parent.is_dir()):
        raise UserError(f"{args.keep} is no folder and cannot be made one", "name a folder for --keep, or leave it out")
    texts = [read_text(path) for path in args.text]
    file_sha256(args.calibration)  # before anything takes minutes: it is there
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxmoe-bench-")))
        result = compare(args, rows, texts, folder)
    print("\n".join(report_lines(result)))
    if args.json:
        print_json(result)
    return 0


def compare(args: argparse.Namespace, rows: Sequence[str], texts: list[Text], folder: Path) -> dict[str, Any]:
    """One entry per row: its bytes and scores, or why there is none. The models stay in `folder`."""
    checkpoint = open_checkpoint(args.source)
    windows = stock.read_tokens(checkpoint, args.calibration, args.calibration_tokens)
    original = remembered(open_model(args.source).model)
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mlxmoe-bench-") as work:
        np.save(Path(work) / "tokens.npy", windows)
        entries = [
            {"row": row, **_entry(args, checkpoint, row, Path(work) / "tokens.npy", folder, original, texts)}
            for row in rows
        ]
    return {"source": args.source, "calibration_tokens": int(windows.size), "rows": entries, "machine": machine_facts()}


def _entry(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    row: str,
    tokens: Path,
    folder: Path,
    original: LogitsFn,
    texts: list[Text],
) -> dict[str, Any]:
    output = folder / row.replace(":", "-")
    if not output.exists():
        note(f"making {row}")
        try:
            _make(args, checkpoint, row, tokens, output)
        except UserError as error:
            return {"refused": error.message}
    made = open_model(output)
    config = EvalConfig(max_tokens=args.max_tokens)
    scores = evaluate(made.model, made.tokenizer, texts, original, config, progress=True)
    wanted = ("tokens", "kld_mean", "kld_stderr", "top1_agreement", "ppl", "ppl_reference")
    return {"bytes": folder_nbytes(output), **{name: scores[name] for name in wanted}}


def _make(args: argparse.Namespace, checkpoint: Checkpoint, row: str, tokens: Path, output: Path) -> None:
    """The folder appears whole."""
    if row.startswith(OURS + ":"):
        text = ["--calibration", args.calibration, "--calibration-tokens", str(args.calibration_tokens)]
        arguments = ["convert", str(checkpoint.folder), str(output), "--size", row.removeprefix(OURS + ":"), *text]
        if run_child(command_line, arguments).value:
            raise RuntimeError(f"{row} failed")
        return
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    run_child(stock.quantize, row, str(checkpoint.folder), str(partial), str(tokens))
    os.rename(partial, output)


def report_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':28}{'bytes':>14}{'KLD':>10}{'±':>10}{'top-1':>8}{'perplexity':>12}"]
    for each in result["rows"]:
        if "refused" in each:
            lines.append(f"{each['row']:28}{each['refused']}")
            continue
        error = each["kld_stderr"]
        lines.append(
            f"{each['row']:28}{each['bytes']:14,}{each['kld_mean']:10.4f}"
            + (f"{error:10.4f}" if error is not None else " " * 10)
            + f"{100 * each['top1_agreement']:7.1f}%{each['ppl']:12.3f}"
        )
    lines.append(
        f"{result['calibration_tokens']} tokens of calibration text for all: mlx-lm's quantizers get these windows, not the "
        "text that they fetch from the network"
    )
    return lines
