"""`mlxmoe bench --convert-memory`: the memory that converting a checkpoint takes, against the checkpoint's size.

The converter must stream: its peak may depend on one layer, never on the model. So the synthetic source has many
equal layers, the converter runs in a process of its own, and what its imports alone hold is subtracted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlxmoe.arguments import note
from mlxmoe.bench.checkpoint import shape_of_size, write_checkpoint
from mlxmoe.errors import UserError
from mlxmoe.units import format_size

# Both children end with their own peak on stdout's last line: only the process itself can tell it (machine.peak_rss)
_IMPORTS = "import mlx.core, mlxmoe.convert.cli, mlxmoe.machine as machine; print(); print(machine.peak_rss())"
_COMMAND = """
import sys
from mlxmoe.cli import main
status = main(sys.argv[1:])
from mlxmoe.machine import peak_rss
print()
print(peak_rss())
sys.exit(status)
"""


def measure_child(code: str, arguments: list[str]) -> int:
    """Peak resident bytes of a Python child that runs `code`, which prints them last. Its stderr passes through.

    Raises RuntimeError when the child fails.
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measured process ended with status {done.returncode}: {' '.join(arguments)}")
    return int(done.stdout.split()[-1])


def convert_memory(nbytes: int, layers: int, bpw: float, folder: Path | None = None) -> dict[str, Any]:
    """Converts a synthetic checkpoint of about `nbytes` in `layers` layers; returns sizes, peaks and their ratio.

    Works in a temporary folder (inside `folder`, if given), which takes about 1.5 times `nbytes` and is removed.
    Raises UserError when the disk has no room for it, RuntimeError when the conversion fails.
    """
    shape = shape_of_size(nbytes, layers)
    work = Path(tempfile.mkdtemp(prefix="mlxmoe-bench-", dir=folder))
    try:
        free = shutil.disk_usage(work).free
        if free < 1.6 * shape.nbytes():
            raise UserError(
                f"{work.parent} has {format_size(free)} free, expected {format_size(1.6 * shape.nbytes())}",
                "set TMPDIR to a folder on a larger disk, or give a smaller size",
            )
        note(f"writing a synthetic checkpoint of {format_size(shape.nbytes())}, {layers} layers")
        file_bytes = write_checkpoint(work / "source", shape)
        imports = measure_child(_IMPORTS, [])
        note(f"converting it to {bpw:g} bits per weight")
        start = time.perf_counter()
        peak = measure_child(_COMMAND, ["convert", str(work / "source"), str(work / "out"), "--bpw", f"{bpw:g}"])
        seconds = time.perf_counter() - start
        out_bytes = sum(p.stat().st_size for p in (work / "out").rglob("*") if p.is_file())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    above = max(1, peak - imports)
    return {
        "file_bytes": file_bytes,
        "layers": layers,
        "layer_bytes": (file_bytes - 2 * 2 * shape.vocab_size * shape.hidden_size) // layers,
        "bpw": bpw,
        "converted_bytes": out_bytes,
        "peak_rss": peak,
        "imports_rss": imports,
        "peak_above_imports": above,
        "ratio": round(file_bytes / above, 3),
        "seconds": round(seconds, 3),
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    return [
        f"checkpoint             {format_size(result['file_bytes'])}, {result['layers']} layers of "
        f"{format_size(result['layer_bytes'])}",
        f"converted              {format_size(result['converted_bytes'])} in {result['seconds']:.1f} s",
        f"peak memory            {format_size(result['peak_rss'])}, of which imports "
        f"{format_size(result['imports_rss'])}",
        f"peak above imports     {format_size(result['peak_above_imports'])}, "
        f"{result['peak_above_imports'] / result['layer_bytes']:.1f} layers",
        f"file / peak            {result['ratio']:.2f}",
    ]
