"""Rebuilds the demo model inside the package: `python -m mlxmoe.convert.make_demo CHECKPOINT --calibration TEXT`.

CHECKPOINT is a small trained MoE in Hugging Face format (about 20M parameters); the package carries the result of the
project's own converter on it, at most 12 MB, nested so that it serves smaller memories as well. `mlxmoe forecast` then
measures what they cost.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mlxmoe.arguments import note
from mlxmoe.checkpoint import DEMO, folder_nbytes
from mlxmoe.convert.calibrate import Calibration, file_sha256
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.job import Job
from mlxmoe.units import format_size

DEMO_NBYTES = 11_000_000
DEMO_TOKENS = 65_536


def make_demo(checkpoint: Path, text: Path, output: Path = DEMO) -> int:
    """Converts `checkpoint` by calibration text and puts the result in the place of `output`, which it replaces. Returns
    the bytes."""
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    calibration = Calibration(str(text), file_sha256(text), tokens=DEMO_TOKENS, mu=0.3)
    config = ConvertConfig(DEMO_NBYTES, expert_levels=(2, 3, 4, 6, 8), calibration=calibration, polish="layer")
    Job(checkpoint, fresh, config).run()
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return folder_nbytes(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the demo model inside the package.")
    parser.add_argument("checkpoint", type=Path, help="a small trained MoE in Hugging Face format")
    parser.add_argument("--calibration", type=Path, required=True, metavar="F", help="calibration text")
    args = parser.parse_args()
    note(f"{DEMO}: {format_size(make_demo(args.checkpoint, args.calibration))}")


if __name__ == "__main__":
    main()
