"""Reads that the model waits for, and reads ahead of it: persistent threads that move bytes and nothing else.

A Read says where a span's parts go; reads are handed in together and awaited through a Ticket. One span is one `preadv`
straight into its destinations, usually rows of memory that MLX reads, so no thread here ever calls MLX. What is read and
when is the caller's business; so is keeping destinations alive, and unread by others, until the ticket is done.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxmoe.errors import UserError
from mlxmoe.store import (
    PAGE,
    Preadv,
    Span,
    StoreFile,
    WritableBytes,
    as_bytes,
    read_exactly,
    read_span,
    unreadable,
    verify,
)

DEFAULT_THREADS = 8


class Read(NamedTuple):
    """One span and where its parts go.

    `destinations`: per part a writable buffer of its size, or None for the reader's own memory; None altogether for all.
    `finish` runs in the reader's thread once the bytes are there and verified, to merge or convert them: it is given the
    parts as uint8 arrays, of which those in the reader's memory are lost when it returns. `first` False leaves out
    checksums even at the first read.
    """

    span: Span
    destinations: Sequence[WritableBytes | None] | None = None
    finish: Callable[[Sequence[np.ndarray]], None] | None = None
    first: bool = True


class Ticket:
    """Reads that were handed in together. Made by Reader.submit."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self._left = 0  # reads not carried out and not dropped; guarded by the reader's lock
        self._error: BaseException | None = None
        self._cancelled = False
        self._quiet = threading.Event()

    def done(self) -> bool:
        """Whether nothing of it is left to do: read, failed or cancelled."""
        return self._quiet.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until nothing writes into the destinations any more; False where that takes longer than `timeout` s.

        Raises UserError of the first read that failed (those not started by then are dropped), unless it was cancelled
        before. After a KeyboardInterrupt it may simply be called again.
        """
        if not self._quiet.wait(timeout):
            return False
        if self._error is not None:
            raise self._error
        return True

    def cancel(self) -> None:
        """Drops the reads that were not started. Those that were are still carried out: wait for them."""
        self._reader._cancel(self)

    def drop(self) -> bool:
        """As cancel, but only where none of its reads was started; says whether that was so."""
        return self._reader._drop_whole(self)


class Paced:
    """A `preadv` for measurements: a disk that gives all threads together `rate` bytes per second."""

    def __init__(self, rate: float, preadv: Preadv = os.preadv):
        assert rate > 0
        self._preadv = preadv
        self._rate, self._lock, self._free = rate, threading.Lock(), 0.0

    def __call__(self, descriptor: int, buffers: Sequence[WritableBytes], offset: int) -> int:
        begin = time.monotonic()
        nbytes = self._preadv(descriptor, buffers, offset)
        with self._lock:
            self._free = done = max(self._free, begin) + nbytes / self._rate
        time.sleep(max(0.0, done - time.monotonic()))
        return nbytes


class Reader:
    """A pool of `threads` daemon threads. `direct`: past the page cache, where the file system allows it."""

    def __init__(self, threads: int = DEFAULT_THREADS, direct: bool = False, preadv: Preadv = os.preadv):
        self._preadv = preadv
        self._direct = _DirectFiles() if direct else None
        self._urgent: deque[tuple[Ticket, Read]] = deque()
        self._ahead: deque[tuple[Ticket, Read]] = deque()
        self._closed = False
        self._work = threading.Condition(threading.Lock())
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            self._start_thread()

    def submit(self, reads: Sequence[Read], urgent: bool = True) -> Ticket:
        """Hands in reads and returns at once. Urgent ones are started before all that are not, in order otherwise."""
        assert not self._closed, "the reader is closed"
        ticket = Ticket(self)
        jobs = [(ticket, read) for read in reads]
        if not jobs:
            ticket._quiet.set()
        try:
            with self._work:
                self._queue(ticket, jobs, urgent)
        except BaseException:  # Ctrl-C: the caller gets no ticket to wait for, so nothing may be under way
            if ticket._left:
                ticket.cancel()
                ticket._quiet.wait()
            raise
        return ticket

    def _queue(self, ticket: Ticket, jobs: list[tuple[Ticket, Read]], urgent: bool) -> None:
        """All of them or none, as long as the lock keeps the threads from starting any."""
        try:
            (self._urgent if urgent else self._ahead).extend(jobs)
            ticket._left = len(jobs)
            self._work.notify(len(jobs))
        except BaseException:
            self._drop(ticket)
            ticket._left = 0
            raise

    def uses_direct(self, file: StoreFile) -> bool:
        """Whether reads of this file go past the page cache."""
        return self._direct is not None and self._direct.descriptor(file) is not None

    def close(self) -> None:
        """Drops what is not started, waits for what is, and ends the threads. Later calls do nothing."""
        with self._work:
            self._closed = True
            tickets = {ticket for ticket, _ in (*self._urgent, *self._ahead)}
            self._work.notify_all()
        for ticket in tickets:
            ticket.cancel()
        for thread in list(self._threads):
            thread.join()
        if self._direct is not None:
            self._direct.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the threads -----------------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="mlxmoe reader", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        lane = _Lane(self._preadv)
        job: tuple[Ticket, Read] | None = None
        try:
            while job := self._take():
                ticket, read = job
                try:
                    lane.carry_out(read, self._direct)
                except Exception as error:  # noqa: BLE001 - whatever went wrong, the one who waits is told
                    self._settle(ticket, _explained(read.span, error))
                else:
                    self._settle(ticket, None)
                job = None
        except BaseException as error:  # noqa: BLE001 - this thread is dying
            self._replace(job, error)

    def _take(self) -> tuple[Ticket, Read] | None:
        """The next read, or None when the reader is closed and nothing is left."""
        with self._work:
            while True:
                if self._urgent:
                    return self._urgent.popleft()
                if self._ahead:
                    return self._ahead.popleft()
                if self._closed:
                    return None
                self._work.wait()

    def _settle(self, ticket: Ticket, error: BaseException | None) -> None:
        """One read of the ticket is over."""
        with self._work:
            ticket._left -= 1
            if error is not None and not ticket._cancelled and ticket._error is None:
                ticket._error = error
                self._drop(ticket)
            if not ticket._left:
                ticket._quiet.set()

    def _cancel(self, ticket: Ticket) -> None:
        with self._work:
            ticket._cancelled = True
            self._drop(ticket)
            if not ticket._left:
                ticket._quiet.set()

    def _drop_whole(self, ticket: Ticket) -> bool:
        with self._work:
            queued = sum(job[0] is ticket for queue in (self._urgent, self._ahead) for job in queue)
            if not queued or queued < ticket._left:
                return False
            ticket._cancelled = True
            self._drop(ticket)
            ticket._quiet.set()
            return True

    def _drop(self, ticket: Ticket) -> None:
        queued = len(self._urgent) + len(self._ahead)
        self._urgent = deque(job for job in self._urgent if job[0] is not ticket)
        self._ahead = deque(job for job in self._ahead if job[0] is not ticket)
        ticket._left -= queued - len(self._urgent) - len(self._ahead)

    def _replace(self, job: tuple[Ticket, Read] | None, error: BaseException) -> None:
        """Another thread for one that dies; the read that it was at has failed."""
        if not self._closed:
            self._start_thread()
        if job is not None:
            ticket, read = job
            self._settle(ticket, read.span.fault(f"was not read: the reader's thread died ({error!r})", _REPORT))


_REPORT = "try again; if it happens again, please report it"


def _explained(span: Span, error: Exception) -> Exception:
    """What the one who waits is told."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return unreadable(span, error)
    fault = span.fault(f"was not read: {type(error).__name__}: {error}", _REPORT)
    fault.__cause__ = error
    return fault


class _Lane:
    """What one thread reads with, and its memory: for parts without a destination, and page-aligned for direct reads."""

    def __init__(self, preadv: Preadv):
        self._preadv = preadv
        self._scratch = memoryview(b"")
        self._staging = memoryview(b"")

    def carry_out(self, read: Read, direct: _DirectFiles | None) -> None:
        span = read.span
        buffers = self._buffers(read)
        if direct is None or not self._read_direct(span, buffers, direct):
            read_span(span, buffers, self._preadv)
        if read.first:
            verify(span, buffers)
        if read.finish is not None:
            read.finish([np.frombuffer(as_bytes(buffer), np.uint8) for buffer in buffers])

    def _buffers(self, read: Read) -> list[WritableBytes]:
        """The destinations, memory of this thread where there is none."""
        parts = read.span.parts
        buffers: list[WritableBytes] = []
        taken = 0
        for part, destination in zip(parts, read.destinations or (None,) * len(parts), strict=True):
            if destination is None:
                if self._scratch.nbytes < read.span.nbytes:
                    self._scratch = memoryview(bytearray(read.span.nbytes))
                destination = self._scratch[taken : taken + part.nbytes]
                taken += part.nbytes
            buffers.append(destination)
        return buffers

    def _read_direct(self, span: Span, buffers: list[WritableBytes], direct: _DirectFiles) -> bool:
        """Reads past the page cache; False where the file system will not have it."""
        descriptor = direct.descriptor(span.file)
        if descriptor is None:
            return False
        if not direct.whole_pages:
            read_span(span, buffers, self._preadv, descriptor)
            return True
        try:
            self._read_pages(span, descriptor, list(map(as_bytes, buffers)))
        except _Refused:
            direct.refuse(span.file)
            return False
        return True

    def _read_pages(self, span: Span, descriptor: int, views: list[memoryview]) -> None:
        """Reads the pages that the span touches into memory on a page boundary, then copies."""
        start = span.offset // PAGE * PAGE
        head = span.offset - start
        assert sum(view.nbytes for view in views) == span.nbytes, f"buffers for {span.nbytes} bytes of {span.label}"
        nbytes = -(-(head + span.nbytes) // PAGE) * PAGE
        if self._staging.nbytes < nbytes:
            self._staging = memoryview(mmap.mmap(-1, nbytes))
        if read_exactly(descriptor, [self._staging[:nbytes]], start, self._whole_pages) < head + span.nbytes:
            raise span.fault("ends early")
        for view in views:
            # numpy lets other threads run meanwhile; assigning to the memoryview would not
            np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(self._staging, np.uint8, view.nbytes, head))
            head += view.nbytes

    def _whole_pages(self, descriptor: int, buffers: Sequence[WritableBytes], offset: int) -> int:
        """A read at an offset inside a page means that the file ended there: the system refuses it, and so it ends."""
        if offset % PAGE:
            return 0
        try:
            return self._preadv(descriptor, buffers, offset)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise _Refused from None
            raise


class _Refused(Exception):
    """The file system takes no direct reads."""


class _DirectFiles:
    """Descriptors of their own for direct reads, opened at the first one; None for a file that does without.

    O_DIRECT on Linux, which reads whole pages to page boundaries only; F_NOCACHE on macOS, which reads as ever.
    """

    whole_pages = hasattr(os, "O_DIRECT")

    def __init__(self) -> None:
        self._descriptors: dict[StoreFile, int | None] = {}
        self._opened: list[int] = []
        self._lock = threading.Lock()

    def descriptor(self, file: StoreFile) -> int | None:
        if file not in self._descriptors:
            with self._lock:
                if file not in self._descriptors:
                    self._descriptors[file] = self._open(file)
        return self._descriptors[file]

    def refuse(self, file: StoreFile) -> None:
        """Reads of this file are ordinary ones from now on."""
        self._descriptors[file] = None

    def close(self) -> None:
        while self._opened:
            os.close(self._opened.pop())

    def _open(self, file: StoreFile) -> int | None:
        try:
            descriptor = open_direct(file.path)
        except OSError:  # refused, or the path is gone
            return None
        self._opened.append(descriptor)
        same = os.path.sameopenfile(descriptor, file.descriptor)  # or the path names another file by now
        return descriptor if same else None


def open_direct(path: Path) -> int:
    """A descriptor whose reads go past the page cache. Raises OSError where the file system has none."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor


# ---------------------------------------------------------------------------------------------------------------------
# Which way of reading suits the disk
# ---------------------------------------------------------------------------------------------------------------------

PROBE_THREADS = (1, 4, 8)
_SLICE_SECONDS = 0.06  # per way of reading: 6 of them stay well below a second
_MOST_SPANS = 512  # per way: more than a slice of time is enough for
_WORTH = 1.1  # direct reads leave nothing in the page cache for the next time: a tie is not enough


class Rate(NamedTuple):
    direct: bool
    threads: int
    mb_per_s: float


class Probe(NamedTuple):
    """What to give a Reader, and the rates that say so. `refused`: the file system takes no direct reads."""

    direct: bool
    threads: int
    rates: tuple[Rate, ...]
    refused: bool

    def as_json(self) -> dict[str, Any]:
        rates = [{**rate._asdict(), "mb_per_s": round(rate.mb_per_s, 1)} for rate in self.rates]
        return {**self._asdict(), "rates": rates}


def probe(spans: Sequence[Span], seed: int = 0) -> Probe:
    """Reads spans of a store for about 0.4 s, ordinarily and past the page cache, by different numbers of threads.

    Every way gets spans of its own, as far as there are enough. Ordinary reads find the page cache as it is: a file that
    is in it already is read from there. Raises UserError as reading does.
    """
    order = list(spans)
    random.Random(seed).shuffle(order)
    ways = [(direct, threads) for threads in PROBE_THREADS for direct in (False, True)]
    rates: list[Rate] = []
    refused = False
    for i, (direct, threads) in enumerate(ways):
        with Reader(threads, direct) as reader:
            if direct and not reader.uses_direct(order[0].file):
                refused = True
                continue
            rates.append(Rate(direct, threads, _rate(reader, order[i :: len(ways)][:_MOST_SPANS] or order)))
    return choose(rates, refused)


def choose(rates: Sequence[Rate], refused: bool = False) -> Probe:
    """Direct reads if they are clearly faster, by the fewest threads within 5 % of the best rate."""
    best = {direct: max((r.mb_per_s for r in rates if r.direct == direct), default=0.0) for direct in (False, True)}
    direct = best[True] > _WORTH * best[False]
    threads = min(r.threads for r in rates if r.direct == direct and r.mb_per_s >= 0.95 * best[direct])
    return Probe(direct, threads, tuple(rates), refused)


def _rate(reader: Reader, spans: Sequence[Span]) -> float:
    """MB/s of reading these spans once, or as many of them as a slice of time allows. They are read into nowhere."""
    finished: list[int] = []
    reads = [Read(span, None, lambda parts: finished.append(sum(map(len, parts))), first=False) for span in spans]
    begin = time.perf_counter()
    ticket = reader.submit(reads)
    if not ticket.wait(_SLICE_SECONDS):
        ticket.cancel()
        ticket.wait()
    return sum(finished) / (time.perf_counter() - begin) / 1e6
