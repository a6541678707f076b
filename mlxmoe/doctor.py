"""`mlxmoe doctor`: what this machine is, and whether the Metal kernels are right on its GPU. Forgets what was recorded of
them and measures again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate

from mlxmoe.arguments import note, print_json
from mlxmoe.errors import UserError
from mlxmoe.files import write_atomically
from mlxmoe.kernel_choice import (
    FAILED,
    OK,
    Case,
    DeviceFacts,
    Kernels,
    Record,
    all_cases,
    metal_facts,
    record_path,
    run_checks,
)
from mlxmoe.kernels import MetalKernels
from mlxmoe.loading import RuntimeConfig, open_model
from mlxmoe.machine import machine_facts
from mlxmoe.prepared import machine_memory
from mlxmoe.units import format_size

_PACKAGES = ("mlxmoe", "mlx", "mlx-metal", "mlx-lm", "numpy", "transformers", "safetensors", "huggingface-hub")
_PROMPT, _TOKENS = "Once upon a time", 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", help="write everything as one JSON file, to attach to an issue")
    parser.add_argument("--json", action="store_true", help="last line of stdout is one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints what was found. Status 1 when a kernel is wrong or the demo model does not run."""
    result = diagnose(metal_facts())
    for line in report_lines(result):
        print(line)
    if args.report:
        try:
            write_atomically(Path(args.report), json.dumps(result, indent=1) + "\n")
        except OSError as error:
            found = f"the report {args.report} cannot be written: {error.strerror}"
            raise UserError(found, "name a file in a folder that you may write to") from error
        note(f"report written to {args.report}")
    if args.json:
        print_json(result)
    return 0 if result["ok"] else 1


def diagnose(
    facts: DeviceFacts | None,
    make: Callable[[], Kernels] = MetalKernels,
    cases: Callable[[], Iterable[Case]] = all_cases,
    path: Path | None = None,
) -> dict[str, Any]:
    """Everything that is printed, as plain data. With `facts` (a GPU) the cases run on the kernels of `make`, and the
    record at `path` (None: record_path) is written anew."""
    path = path or record_path()
    checks = []
    if facts is not None:
        note("checking the Metal kernels on this GPU")
        checks = run_checks(Record(facts), make(), cases(), path)
    demo = _run_demo()
    return {
        "machine": machine_facts(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": dict(mx.device_info()),
        "memory_default": machine_memory(),
        "metal": facts._asdict() if facts is not None else None,
        "record": _without_name(path),
        "checks": [asdict(check) for check in checks],
        "demo": demo,
        "ok": demo["status"] == OK and all(check.status == OK for check in checks),
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    """The table for people."""
    machine, memory = result["machine"], result["memory_default"]
    versions = [f"{name} {found}" for name, found in result["packages"].items() if found is not None]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['memory_bytes'])}, {machine['platform']}",
        f"Python {machine['python']}, {', '.join(versions)}",
    ]
    working_set = result["device"].get("max_recommended_working_set_size")
    if working_set:
        lines.append(f"GPU memory: {format_size(working_set)} recommended working set")
    lines.append(f"a model may take {format_size(memory)} when --memory is left out")
    demo = result["demo"]
    lines.append(f"demo model: {demo['status']}" + (f": {demo['reason']}" if demo["reason"] else f", {demo['text']!r}"))
    if result["metal"] is None:
        return [*lines, "Metal: not available to this process, so the kernels cannot be checked here"]
    metal = result["metal"]
    lines.append(f"Metal: {metal['gpu']} ({metal['architecture']}), {metal['system']}; kernels {metal['kernels'][:12]}")
    lines.append(f"{'kernel':<16} {'type':<9} {'variant':<28} {'error':>8}  status")
    for check in result["checks"]:
        error = "-" if check["error"] is None else f"{check['error']:.1e}"
        variant = check["variant"].split(" D=")[0]
        status = check["status"] + (f": {check['reason']}" if check["reason"] else "")
        lines.append(f"{check['kernel']:<16} {check['dtype']:<9} {variant:<28} {error:>8}  {status}")
    lines.append(f"recorded in {result['record']}")
    wrong = sum(check["status"] != OK for check in result["checks"])
    if wrong:
        lines.append(f"{wrong} of {len(result['checks'])} checks found a fault: models that need these kernels run on ")
        lines[-1] += "MLX's built-in products; please attach the file of --report to an issue"
    else:
        lines.append(f"all {len(result['checks'])} checks passed")
    return lines


def _run_demo() -> dict[str, Any]:
    """Whether the model in the package loads and continues a text with finite probabilities."""
    try:
        model, tokenizer, *_ = open_model(None, RuntimeConfig(context=256))
        responses = list(stream_generate(model, tokenizer, _PROMPT, max_tokens=_TOKENS))
    except (UserError, RuntimeError, ValueError, OSError) as error:
        return {"status": FAILED, "reason": str(error).splitlines()[0], "text": "", "tokens": []}
    finite = all(mx.all(response.logprobs <= 0).item() for response in responses)  # false for NaN
    return {
        "status": OK if finite else FAILED,
        "reason": "" if finite else "probabilities that are not numbers",
        "text": "".join(response.text for response in responses),
        "tokens": [int(response.token) for response in responses],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _without_name(path: Path) -> str:
    """The path with ~ for the home folder: a report is read by strangers."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
