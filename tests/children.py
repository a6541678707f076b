"""What tests run in a process of its own (mlxmoe.bench.child), which finds this file by PYTHONPATH."""

from __future__ import annotations

from pathlib import Path

from mlxmoe.bench.checkpoint import shape_of_size, write_checkpoint
from mlxmoe.errors import UserError

FOLDER = str(Path(__file__).parent)


def write(folder: str, nbytes: int) -> None:
    write_checkpoint(Path(folder), shape_of_size(nbytes, 8))


def hold(nbytes: int) -> int:
    print("a line of its own")
    return len(bytearray(b"1") * nbytes)


def refuse(what: str) -> None:
    raise UserError(f"no {what} here", "look elsewhere")


def fail() -> None:
    raise SystemExit(3)
