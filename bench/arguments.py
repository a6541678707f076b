"""Arguments of the studies that look at an unconverted checkpoint with one text and measure on another."""

from __future__ import annotations

import argparse


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --text, --calibration and --json."""
    parser.add_argument("model", metavar="MODEL", help="an unconverted checkpoint")
    parser.add_argument("--text", nargs="+", required=True, metavar="F", help="text to score, as for mlxmoe eval")
    parser.add_argument("--calibration", required=True, metavar="F", help="text for statistics, as for mlxmoe convert")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def add_size_arguments(parser: argparse.ArgumentParser, max_tokens: int, calibration_tokens: int, window: int) -> None:
    """--max-tokens, --calibration-tokens and --window with these defaults."""
    for flag, value, text in (
        ("--max-tokens", max_tokens, "tokens scored, shared evenly by the texts"),
        ("--calibration-tokens", calibration_tokens, "tokens of calibration"),
        ("--window", window, "tokens that share a context"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="N", help=f"{text} (default: %(default)s)")
