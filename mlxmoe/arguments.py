"""Command-line arguments that several subcommands share, so that they read the same everywhere."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --memory and --context: what opening a model needs."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a converted folder, a Hub id, a Hugging Face folder or an MLX checkpoint (default: the demo model)",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="hard ceiling on memory, such as 8GB (default: what this machine offers)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of context to reserve memory for (default: the model's longest, at most 8192)",
    )


def note(text: str) -> None:
    """A line for the person at the terminal: stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def print_json(result: dict[str, Any]) -> None:
    """The last line of stdout under --json: one JSON object."""
    print(json.dumps(result, ensure_ascii=False), flush=True)
