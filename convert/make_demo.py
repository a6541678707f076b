"""Rebuilds the demo model inside the package: `python -m mlxmoe.convert.make_demo CHECKPOINT`.

CHECKPOINT is a small trained MoE in Hugging Face format (about 20M parameters); the package carries the result of the
project's own converter on it, at most 12 MB.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mlxmoe.arguments import note
from mlxmoe.checkpoint import DEMO, folder_nbytes
from mlxmoe.convert.config import ConvertConfig
from mlxmoe.convert.job import Job
from mlxmoe.units import format_size

DEMO_NBYTES = 11_000_000


def make_demo(checkpoint: Path, output: Path = DEMO) -> int:
    """Converts `checkpoint` and puts the result in the place of `output`, which it replaces. Returns the bytes."""
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    Job(checkpoint, fresh, ConvertConfig(target_nbytes=DEMO_NBYTES)).run()
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return folder_nbytes(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the demo model inside the package.")
    parser.add_argument("checkpoint", type=Path, help="a small trained MoE in Hugging Face format")
    note(f"{DEMO}: {format_size(make_demo(parser.parse_args().checkpoint))}")


if __name__ == "__main__":
    main()
