"""A function in a process of its own: its peak memory is then its own, and nothing that it leaves behind is ours."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from mlxmoe.errors import UserError
from mlxmoe.machine import peak_rss

_PROGRAM = "import sys; from mlxmoe.bench.child import serve; serve(*sys.argv[1:])"


class Ran(NamedTuple):
    """What the function returned (as JSON), its seconds without imports, and the most resident bytes of its process."""

    value: Any
    seconds: float
    peak_rss: int


def run_child(function: Callable[..., Any], *arguments: Any, imports: Sequence[str] = ()) -> Ran:
    """Calls a function of a module with arguments that JSON can say; `imports` are modules that it imports inside.

    Its stderr passes through, and what it prints goes there. Raises its UserError again, RuntimeError where it fails.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-c", _PROGRAM, name, json.dumps(arguments), ",".join(imports)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode} in a process of its own")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise UserError(*answer["refused"])
    return Ran(**answer)


def nothing() -> None:
    """For what a process of `imports` alone takes."""


def serve(name: str, arguments: str, imports: str) -> None:
    """The child's side."""
    module, _, attribute = name.partition(":")
    for each in filter(None, imports.split(",")):
        import_module(each)
    function = getattr(import_module(module), attribute)
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            value = function(*json.loads(arguments))
        answer = Ran(value, time.perf_counter() - start, peak_rss())._asdict()
    except UserError as error:
        answer = {"refused": [error.message, error.hint]}
    print("\n" + json.dumps(answer))
