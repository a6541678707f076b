"""Long work that leaves a folder: OUT.partial while it lasts, OUT in one rename when it is complete.

    OUT.partial/state/   job.json (what the work is, to be resumed only as the same), <file>.json per finished file
    OUT.partial/         the files themselves, each whole under its final name, the one that lists them last

A run that is killed at any point leaves OUT.partial; a later one goes on from the files that are finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlxmoe.arguments import note
from mlxmoe.errors import UserError
from mlxmoe.plan import FileEntry
from mlxmoe.units import format_size


class HashingWriter:
    """A file that knows its length and SHA-256."""

    def __init__(self, file: io.BufferedWriter):
        self._file, self._hash, self.nbytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.nbytes += len(data)

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.nbytes, self._hash.hexdigest())


@contextmanager
def whole_file(path: Path) -> Iterator[HashingWriter]:
    """A file that gets its name only when it is complete and on the disk; on any error nothing of it is left."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            writer = HashingWriter(file)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> FileEntry:
    """A file of `data`, by the rules of `whole_file`."""
    with whole_file(path) as file:
        file.write(data)
    return file.entry


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool = False) -> FileEntry:
    """An .npz, by the rules of `whole_file`."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, allow_pickle=False, **arrays)
    return write_whole(path, buffer.getvalue())


def json_array(value: Any) -> np.ndarray:
    """uint8 [n]: JSON text as one array of an .npz, which `json.loads(array.tobytes())` reads."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def note_unfinished(folder: Path) -> None:
    """Says, when a run is stopped, that the next one need not start over."""
    if folder.exists():
        note(f"{folder} keeps what is done: the same command with --resume goes on")


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted names of what is not the same in two jobs, the first of them read from JSON."""
    old, new = flattened(before), flattened(json.loads(json.dumps(now)))
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of settings under dotted names, so that what differs can be named."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


class WorkFolder:
    """OUT.partial of one kind of work, whose noun stands in every message; `last` is the file that makes it complete, where
    there is one. restarts: the command can start over by itself.

    Creates nothing before `locked`.
    """

    def __init__(self, output: Path, noun: str, last: str | None = None, restarts: bool = False):
        output = output if output.name else output.resolve()  # "." has no name
        self.output, self.noun, self._last, self._restarts = output, noun, last, restarts
        self.folder = output.with_name(output.name + ".partial")
        self.state = self.folder / "state"

    def check(self, resume: bool, restart: bool = False) -> None:
        """Raises UserError when OUT exists, when it cannot be made, or when work is (not) left over against `resume`."""
        if self.output.exists():
            raise UserError(f"{self.output} exists already", "choose another folder, or delete it first")
        if not self.output.parent.is_dir():
            raise UserError(f"there is no folder {self.output.parent} for the {self.noun}", "create it first")
        self.check_left_over(resume, restart)

    def check_left_over(self, resume: bool, restart: bool = False) -> None:
        """Raises UserError when work is (not) left over against `resume`."""
        if resume and not self.state.is_dir() and not self.complete:
            raise UserError(f"there is no unfinished {self.noun} {self.folder} to resume", "leave out --resume")
        if self.folder.exists() and not resume and not restart:
            other = "start over with --restart" if self._restarts else "delete that folder first"
            raise UserError(f"{self.folder} holds an unfinished {self.noun}", f"go on with --resume, or {other}")

    @contextmanager
    def locked(self, restart: bool = False) -> Iterator[None]:
        """One process per work folder, which is created; the lock goes with the process, however it ends. `restart` empties
        the folder, once it is certain that nobody works in it.

        Raises UserError when another process has it, and for a disk that is full, in the body as well.
        """
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            with _lock(self.state, self.folder):
                if restart:
                    for path in (*self.state.iterdir(), *(p for p in self.folder.iterdir() if p != self.state)):
                        path.unlink()
                yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk is full: {self.folder} has {format_size(self.nbytes)} so far and more to come",
                "make room and run the same command with --resume, or delete that folder",
            ) from None
        except KeyboardInterrupt:
            note_unfinished(self.folder)
            raise

    @property
    def complete(self) -> bool:
        """Whether all files are there, and only `publish` is missing."""
        return self._last is not None and (self.folder / self._last).is_file()

    def job(self) -> dict[str, Any] | None:
        """What the work that was found here is; None where nothing was claimed yet."""
        path = self.state / "job.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def claim(self, job: dict[str, Any]) -> None:
        write_whole(self.state / "job.json", json.dumps(job).encode())

    def resume_or_claim(self, job: dict[str, Any]) -> None:
        """Records what the work is. Raises UserError when the work found here is another, with what differs."""
        found = self.job()
        if found is None:
            self.claim(job)
            return
        self.check_same(differing(found, job))

    def check_same(self, changed: Sequence[str]) -> None:
        """Raises UserError where the work found here was started with other things, which go by these names."""
        if changed:
            other = "start over with --restart" if self._restarts else "delete that folder and start over"
            raise UserError(
                f"the unfinished {self.noun} {self.folder} was started with other {' and '.join(changed)}",
                f"use what it was started with, or {other}",
            )

    def done(self, name: str) -> dict[str, Any] | None:
        """What was noted of a file that is finished."""
        path = self.state / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() and (self.folder / name).is_file() else None

    def mark_done(self, name: str, note: dict[str, Any]) -> None:
        write_whole(self.state / f"{name}.json", json.dumps(note).encode())

    @property
    def nbytes(self) -> int:
        """Bytes of what is there."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def check_space(self, nbytes: int) -> None:
        """Raises UserError when the disk has no room for what is missing of a folder of `nbytes`."""
        missing = nbytes - sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if free < missing:
            raise UserError(
                f"{self.output.parent} has {format_size(free)} free, the result needs {format_size(missing)} more",
                "make room and run the same command with --resume",
            )

    def publish(self) -> None:
        """A complete folder becomes OUT in one rename, without its state and without temporary files: a reader sees the
        whole folder or none."""
        shutil.rmtree(self.state)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        os.rename(self.folder, self.output)
        descriptor = os.open(self.output.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    """Raises UserError when another process has the lock of `path`, which stands for `folder`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works on {folder}", "wait for it to finish") from None
        yield
    finally:
        os.close(descriptor)
