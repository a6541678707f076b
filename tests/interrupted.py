"""Commands that make a folder, refused, killed at every step, and on a disk that fills up."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy_checkpoints import run_child, snapshot

from mlxmoe.work import HashingWriter


def refused(capsys: pytest.CaptureFixture[str], command: Callable[[], int]) -> str:
    """Checks that a command fails as bad input should, and returns the message."""
    capsys.readouterr()
    assert command() == 2
    captured = capsys.readouterr()
    *_, message, hint = captured.err.replace("\r", "\n").splitlines()
    assert message.startswith("mlxmoe: error: ")
    assert hint.startswith("hint: ")
    assert len(hint) > 12
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return message.removeprefix("mlxmoe: error: ")


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own. Skips the test where that cannot be had."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "mlxmoe-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> Iterator[None]:
    """A disk that takes `nbytes` more and then no byte."""
    write, left = HashingWriter.write, nbytes

    def limited(self: HashingWriter, data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(HashingWriter, "write", limited)
        yield


# Forks a command that kills itself at the N-th rename of a file (before it, or with a minus after it), in the middle of
# removing the work folder's state, or before the last rename; then one that resumes. Prints the exit status of both.
# A fork is ten times quicker than a start, and safe here because nothing of MLX has run yet.
_KILLER = """
import importlib, os, shutil, signal, sys
import mlx.core
from mlxmoe.cli import main
module, folder, count = sys.argv[1:4]
words, moments = sys.argv[4 : 4 + int(count)], sys.argv[4 + int(count) :]
importlib.import_module(module)
real_replace = os.replace

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def patch(moment):
    seen = 0
    def replace(old, new):
        nonlocal seen
        seen += 1
        if str(seen) == moment:
            die()
        real_replace(old, new)
        if str(-seen) == moment:
            die()
    def rmtree(path):
        names = sorted(os.listdir(path))
        for name in names[: len(names) // 2]:
            os.unlink(os.path.join(path, name))
        die()
    os.replace = replace
    if moment == "state":
        shutil.rmtree = rmtree
    if moment == "rename":
        os.rename = die

def forked(moment, *extra):
    pid = os.fork()
    if pid == 0:
        sys.stderr = sys.stdout = open(os.devnull, "w")
        patch(moment)
        command, source, *more = words
        os._exit(main([command, source, os.path.join(folder, "out" + first), *more, *extra]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for first in moments:
    print(first, forked(first), forked("never", "--resume"), flush=True)
"""


def check_killed_at_every_step(module: str, words: Sequence[str], last: int, whole: Path, folder: Path) -> None:
    """SIGKILL around each of the `last` renames of a command and around publishing: what --resume makes of it is `whole`,
    byte for byte. module: what the command imports; words: the command, its source and options; folder: an empty one."""
    moments = [*map(str, range(1, last + 1)), str(-last), "state", "rename"]
    child = run_child(_KILLER, module, str(folder), str(len(words)), *words, *moments)
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{moment} {-signal.SIGKILL} 0" for moment in moments]
    assert {path.name for path in folder.iterdir()} == {f"out{moment}" for moment in moments}
    for moment in moments:
        assert snapshot(folder / f"out{moment}") == snapshot(whole), moment
