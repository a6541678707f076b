"""`mlxmoe COMMAND`: finds the command's module, parses its arguments, turns errors into one sentence and a hint.

Each command is a module with `add_arguments(parser)` and `run(args)`, imported only when it is chosen, so that
`mlxmoe --version` does not wait for MLX.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mlxmoe import __version__
from mlxmoe.errors import UserError

# command: (module, one line of help)
COMMANDS = {
    "chat": ("mlxmoe.chat", "talk with a model in the terminal"),
    "generate": ("mlxmoe.generate", "continue one prompt and exit"),
    "convert": ("mlxmoe.convert.cli", "turn a Hugging Face checkpoint into per-expert mixed precision"),
    "repack": ("mlxmoe.repack", "lay out a checkpoint as it stands so that an expert is one read"),
    "inspect": ("mlxmoe.inspect", "show what a model is made of and what it would take to run it"),
    "eval": ("mlxmoe.evaluate", "measure fidelity: KLD, top-1 agreement and perplexity against a reference"),
    "forecast": ("mlxmoe.forecast", "measure what smaller memory budgets cost, and keep it in the folder"),
    "stats": ("mlxmoe.bench.stats", "show what a model's experts do on text, by layer, expert and domain"),
    "report": ("mlxmoe.bench.report", "draw what a conversion wrote and what it costs, by class, layer and expert"),
    "trace": ("mlxmoe.trace", "record which experts a model chooses"),
    "explain": ("mlxmoe.explain", "show where a token's time goes and which cache policy serves the model"),
    "doctor": ("mlxmoe.doctor", "check the Metal kernels on this GPU and write a report for an issue"),
    "bench": ("mlxmoe.bench.cli", "measure tok/s, time to first token, memory and bytes per token"),
    "bench-kernels": (
        "mlxmoe.bench.kernels",
        "check the Metal kernels on the shapes of real models (also: bench kernels)",
    ),
    "bench-memory": (
        "mlxmoe.bench.memory",
        "check that streamed experts are exact, under the ceiling and worth it (also: bench memory)",
    ),
    "bench-reads": ("mlxmoe.bench.reads", "measure how fast experts arrive from a disk (also: bench reads)"),
    "bench-convert": (
        "mlxmoe.bench.convert",
        "measure the converter's speed and memory against mlx-lm's (also: bench convert)",
    ),
    "bench-quantizers": (
        "mlxmoe.bench.quantizers",
        "compare fidelity with mlx-lm's own quantizers (also: bench quantizers)",
    ),
    "bench-chapter": (
        "mlxmoe.bench.chapter",
        "measure rotations, replicas and quantizer parameters at equal bytes (also: bench chapter)",
    ),
    "bench-variants": (
        "mlxmoe.bench.variants",
        "measure any choice of quantizer options, replicas and router bits that a small file names (also: bench variants)",
    ),
    "bench-sensitivity": (
        "mlxmoe.bench.sensitivity",
        "rank scores of experts by the measured cost of quantizing them alone (also: bench sensitivity)",
    ),
    "bench-launches": (
        "mlxmoe.bench.launches",
        "count kernel launches per token against mlx-lm (also: bench launches)",
    ),
}


_FULL = ("the disk is full", "make room and run it again; TMPDIR says where temporary files go")
_DENIED = ("permission denied", "change the permissions, or name another file or folder")
# What a disk may refuse that is no fault of the program
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: ("the file system cannot be written to", _DENIED[1]),
}


class _Parser(argparse.ArgumentParser):
    """argparse with the errors of the rest of the program: one sentence and a hint, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f"{self.format_usage()}mlxmoe: error: {message}\nhint: {self.prog} --help explains the arguments\n"
        )


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of `command` only: the other modules are not imported."""
    parser = _Parser(
        prog="mlxmoe",
        description="Mixture-of-Experts language models on Apple Silicon.",
        epilog="mlxmoe COMMAND --help shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mlxmoe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            implementation = importlib.import_module(module)
            implementation.add_arguments(sub)
            sub.set_defaults(run=implementation.run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for bad input, 1 for a run that failed, 130 after Ctrl-C.

    Raises SystemExit from argparse: 0 after --help and --version, 2 for arguments that it refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # known before the parser is: importing a command can fail as well
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:  # it is where the program was started with stdout closed
                sys.stdout.flush()  # here, where a reader that left is noticed quietly
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except UserError as error:
        _show(debug, error.message, error.hint)
        return 2
    except BrokenPipeError:
        # The reader of our output left (`| head`), and there is nobody to tell: what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the last word of the program, whatever failed
        if isinstance(error, OSError) and error.errno in _DISK:
            sentence, hint = _DISK[error.errno]
            _show(debug, f"{error.filename}: {sentence}" if error.filename else sentence, hint)
            return 2
        hint = "run it again with --debug for the traceback; if this looks like a fault of mlxmoe, please report it"
        _show(debug, f"{type(error).__name__}: {error}", hint)
        return 1


def _run(arguments: list[str]) -> int:
    if len(arguments) > 1 and f"{arguments[0]}-{arguments[1]}" in COMMANDS:
        arguments = [f"{arguments[0]}-{arguments[1]}", *arguments[2:]]  # `bench kernels`: a command of its own
    command = next((a for a in arguments if not a.startswith("-")), None)
    parser = build_parser(command)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    return int(args.run(args) or 0)


def _show(debug: bool, message: str, hint: str) -> None:
    if debug:
        traceback.print_exc()
    print(f"mlxmoe: error: {message}\nhint: {hint}", file=sys.stderr)
