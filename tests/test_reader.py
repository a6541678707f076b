"""Reads carried out by threads: every byte where it belongs, every fault named, nothing written once a wait is over."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxmoe.errors import UserError
from mlxmoe.reader import PROBE_THREADS, Paced, Probe, Rate, Read, Reader, choose, probe
from mlxmoe.store import PAGE, Check, Part, Span, StoreFile

NBYTES = 40 * PAGE + 123
CONTENT = np.random.RandomState(0).bytes(NBYTES)
LONG_AGO = 1_000_000_000  # s: a file that was written then has another time of modification after any change
PATIENCE = 30  # s until a test that waits for a thread gives up


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "experts.safetensors"
    path.write_bytes(CONTENT)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def file(path: Path) -> Iterator[StoreFile]:
    file = StoreFile(path)
    yield file
    file.close()


def span_of(file: StoreFile, offset: int = PAGE, sizes: Sequence[int] = (PAGE,), checked: bool = False) -> Span:
    parts = tuple(Part(i, "weight", nbytes) for i, nbytes in enumerate(sizes))
    total = sum(sizes)
    checks = (Check(0, total, zlib.crc32(CONTENT[offset : offset + total])),) if checked else ()
    return Span(file, offset, parts, checks, "layer 3, expert 17")


def memory_for(span: Span) -> list[bytearray]:
    return [bytearray(part.nbytes) for part in span.parts]


def content_of(span: Span) -> list[bytes]:
    """What the parts of a span must be, cut from the file's content."""
    pieces, at = [], span.offset
    for part in span.parts:
        pieces.append(CONTENT[at : at + part.nbytes])
        at += part.nbytes
    return pieces


def message(reader: Reader, *reads: Read) -> str:
    """What the one who waits is told."""
    with pytest.raises(UserError) as error:
        reader.submit(reads).wait()
    assert "\nhint: " in str(error.value)
    return error.value.message


class Gate:
    """A `preadv` that waits to be opened, and knows what was asked of it."""

    def __init__(self, is_open: bool = False):
        self.opened = threading.Event()
        self.started: list[int] = []
        self.buffers: list[int] = []
        if is_open:
            self.opened.set()

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self.started.append(offset)
        self.buffers.append(len(buffers))
        assert self.opened.wait(PATIENCE)
        return os.preadv(descriptor, buffers, offset)

    def wait_for_reads(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(self.started) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def failing(error: BaseException, times: int = 1) -> Callable[[int, Sequence[Any], int], int]:
    """A `preadv` that fails at first."""
    left = [error] * times

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if left:
            raise left.pop()
        return os.preadv(descriptor, buffers, offset)

    return preadv


# Bytes ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(
        st.tuples(
            st.integers(0, NBYTES - 1), st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=9), st.booleans()
        ),
        min_size=1,
        max_size=12,
    ),
    threads=st.sampled_from([1, 2, 8]),
    direct=st.booleans(),
)
def test_every_byte_arrives(
    layout: list[tuple[int, list[int], bool]],
    threads: int,
    direct: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Spans of any place and size, to memory of the caller's or of the reader's, which only `finish` sees."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "f").write_bytes(CONTENT)
    file = StoreFile(folder / "f")
    spans = []
    for offset, sizes, _ in layout:
        room = NBYTES - offset
        fitting = [nbytes for i, nbytes in enumerate(sizes) if sum(sizes[: i + 1]) <= room] or [room]
        spans.append(span_of(file, offset, fitting, checked=True))
    own = [[None if skip and i % 2 else bytearray(p.nbytes) for i, p in enumerate(span.parts)]
           for span, (_, _, skip) in zip(spans, layout, strict=True)]  # fmt: skip
    seen: dict[int, list[bytes]] = {}

    def keep(i: int) -> Callable[[Sequence[np.ndarray]], None]:
        return lambda parts: seen.update({i: [part.tobytes() for part in parts]})

    with Reader(threads, direct) as reader:
        reads = [Read(span, own[i] if i % 3 else None, keep(i)) for i, span in enumerate(spans)]
        assert reader.submit(reads).wait()
    for i, span in enumerate(spans):
        assert seen[i] == content_of(span)
        if i % 3:
            assert all(m is None or bytes(m) == wanted for m, wanted in zip(own[i], content_of(span), strict=True))
    file.close()


def test_one_call_brings_a_span(file: StoreFile) -> None:
    gate = Gate(is_open=True)
    spans = [span_of(file, i * PAGE, [1000, 24, 72, 3000]) for i in range(10)]
    with Reader(4, preadv=gate) as reader:
        reader.submit([Read(span, memory_for(span)) for span in spans]).wait()
    assert sorted(gate.started) == [span.offset for span in spans]
    assert gate.buffers == [4] * 10


def test_arrays_of_any_item_are_destinations(file: StoreFile) -> None:
    span = span_of(file, 17, [400, 600])
    arrays = np.zeros((10, 10), np.float32), np.zeros(300, np.uint16)
    with Reader(1) as reader:
        reader.submit([Read(span, arrays)]).wait()
    assert [array.tobytes() for array in arrays] == content_of(span)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("step", [1, 700, PAGE])
def test_short_reads_are_gone_on_with(step: int, direct: bool, file: StoreFile) -> None:
    """The system may bring less than was asked for; direct reads come in whole pages."""

    def short(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        nbytes = PAGE if direct else step
        return os.preadv(descriptor, [memoryview(buffers[0]).cast("B")[:nbytes]], offset)

    span = span_of(file, 5, [3, 2 * PAGE, 1, PAGE])
    memory = memory_for(span)
    with Reader(1, direct, preadv=short) as reader:
        reader.submit([Read(span, memory)]).wait()
    assert memory == content_of(span)


def test_more_parts_than_the_system_takes_at_once(file: StoreFile) -> None:
    span = span_of(file, 100, [3] * (os.sysconf("SC_IOV_MAX") + 500))
    memory = memory_for(span)
    with Reader(1) as reader:
        reader.submit([Read(span, memory)]).wait()
    assert memory == content_of(span)


def test_nothing_to_read(file: StoreFile) -> None:
    with Reader(1) as reader:
        ticket = reader.submit([])
        assert ticket.done()
        assert ticket.wait()


@pytest.mark.parametrize("direct", [False, True])
def test_destination_of_the_wrong_size(direct: bool, file: StoreFile) -> None:
    with Reader(1, direct) as reader:
        assert "buffers for 4096 bytes" in message(reader, Read(span_of(file), [bytearray(PAGE + 1)]))
        assert "buffers for 4096 bytes" in message(reader, Read(span_of(file), [bytearray(PAGE - 1)]))
        assert "argument 2 is longer" in message(reader, Read(span_of(file), [bytearray(PAGE)] * 2))


# Faults of the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("left", [0, PAGE, PAGE + 100, 2 * PAGE])
def test_file_that_is_truncated_while_open(left: int, direct: bool, path: Path, file: StoreFile) -> None:
    with Reader(2, direct) as reader:
        os.truncate(path, left)
        span = span_of(file, PAGE, [100, 2 * PAGE], checked=True)
        assert message(reader, Read(span, memory_for(span))) == f"{path}: layer 3, expert 17 ends early"


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("replace", [False, True], ids=["deleted", "replaced"])
def test_file_that_vanishes_stays_readable(replace: bool, direct: bool, path: Path, file: StoreFile) -> None:
    """What was opened is read, whatever its path names by now: a new download, or nothing."""
    if replace:
        other = path.with_name("other")
        other.write_bytes(b"\0" * NBYTES)
        os.replace(other, path)
    else:
        path.unlink()
    span = span_of(file, checked=True)
    memory = memory_for(span)
    with Reader(1, direct) as reader:
        assert not reader.uses_direct(file)
        reader.submit([Read(span, memory)]).wait()
    assert memory == content_of(span)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_fault_of_the_disk(code: int, direct: bool, path: Path, file: StoreFile) -> None:
    span = span_of(file)
    memory = memory_for(span)
    with Reader(1, direct, preadv=failing(OSError(code, os.strerror(code)))) as reader:
        told = message(reader, Read(span, memory))
        assert told == f"{path}: layer 3, expert 17 cannot be read: {os.strerror(code)}"
        assert reader.submit([Read(span, memory)]).wait()  # the next one may succeed
    assert memory == content_of(span)


def test_file_system_that_takes_no_direct_reads(file: StoreFile) -> None:
    def refusing(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if descriptor != file.descriptor:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(descriptor, buffers, offset)

    span = span_of(file)
    memory = memory_for(span)
    with Reader(1, direct=True, preadv=refusing) as reader:
        reader.submit([Read(span, memory)]).wait()
        assert not reader.uses_direct(file)
    assert memory == content_of(span)


def test_direct_read_of_the_last_bytes(file: StoreFile) -> None:
    """The file ends inside a page: no reason to go on there, which the system may refuse, nor to give direct reads up."""

    def strict(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if descriptor != file.descriptor and offset % PAGE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(descriptor, buffers, offset)

    span = span_of(file, NBYTES - 200, [150, 50])
    memory = memory_for(span)
    with Reader(1, direct=True, preadv=strict) as reader:
        before = reader.uses_direct(file)
        reader.submit([Read(span, memory)]).wait()
        assert reader.uses_direct(file) == before
    assert memory == content_of(span)


def test_signals_do_not_disturb(file: StoreFile) -> None:
    """EINTR, for real: a timer strikes all the while."""
    struck = []
    before = signal.signal(signal.SIGALRM, lambda *_: struck.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with Reader(4) as reader:
            deadline = time.monotonic() + PATIENCE
            while len(struck) < 20:
                assert time.monotonic() < deadline
                spans = [span_of(file, i * PAGE, [100, 2 * PAGE], checked=True) for i in range(30)]
                memory = [memory_for(span) for span in spans]
                reader.submit([Read(s, m) for s, m in zip(spans, memory, strict=True)]).wait()
                assert memory == [content_of(span) for span in spans]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_in_place(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("direct", [False, True])
def test_wrong_checksum_at_the_first_read(direct: bool, path: Path) -> None:
    write_in_place(path, PAGE + 7, bytes([CONTENT[PAGE + 7] ^ 1]))
    file = StoreFile(path)
    span = span_of(file, checked=True)
    with Reader(1, direct) as reader:
        for _ in range(2):  # and at every later one
            told = message(reader, Read(span, memory_for(span)))
            assert told == f"{path}: layer 3, expert 17 has a wrong checksum"
        assert reader.submit([Read(span, memory_for(span), first=False)]).wait()
    file.close()


def test_checksums_are_verified_once(path: Path, file: StoreFile, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    real = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, crc=0: (checked.append(len(data)), real(data, crc))[1])
    whole = span_of(file, PAGE, [PAGE, PAGE])
    halves = tuple(Check(i * PAGE, (i + 1) * PAGE, real(CONTENT[(i + 1) * PAGE : (i + 2) * PAGE])) for i in range(2))
    whole = Span(file, whole.offset, whole.parts, halves, whole.label)
    second = Span(file, 2 * PAGE, (Part(0, "weight", PAGE),), (Check(0, PAGE, halves[1].crc32),), "the second half")
    with Reader(1) as reader:
        reader.submit([Read(second)]).wait()
        assert checked == [PAGE]
        reader.submit([Read(whole), Read(whole), Read(second)]).wait()
        assert checked == [PAGE, PAGE]


def test_change_in_place_is_noticed(path: Path, file: StoreFile) -> None:
    span = span_of(file, checked=True)
    with Reader(1) as reader:
        reader.submit([Read(span)]).wait()
        write_in_place(path, PAGE, b"another model")
        assert "has a wrong checksum" in message(reader, Read(span))
        write_in_place(path, PAGE, CONTENT[PAGE : PAGE + 13])
        assert reader.submit([Read(span)]).wait()  # the right bytes again: nothing to complain about


def test_change_in_place_without_checksums(path: Path, file: StoreFile) -> None:
    span = span_of(file)
    with Reader(1) as reader:
        reader.submit([Read(span)]).wait()
        write_in_place(path, 30 * PAGE, b"x")
        assert message(reader, Read(span)) == f"{path}: layer 3, expert 17 was changed while it was in use"


def test_two_processes_read_one_file(path: Path, file: StoreFile) -> None:
    code = """
import sys
from pathlib import Path
from mlxmoe.reader import Read, Reader
from mlxmoe.store import Part, Span, StoreFile
file = StoreFile(Path(sys.argv[1]))
spans = [Span(file, i * 4096, (Part(0, "weight", 4096),), (), "a page") for i in range(40)]
memory = [bytearray(4096) for _ in spans]
print("ready", flush=True)
sys.stdin.readline()
with Reader(4) as reader:
    for _ in range(50):
        reader.submit([Read(s, [m]) for s, m in zip(spans, memory)]).wait()
sys.exit(b"".join(memory) != Path(sys.argv[1]).read_bytes()[: 40 * 4096])
"""
    command = [sys.executable, "-c", code, str(path)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
        Reader(4) as reader,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        spans = [span_of(file, i * PAGE) for i in range(40)]
        while child.poll() is None:
            memory = [memory_for(span) for span in spans]
            reader.submit([Read(s, m) for s, m in zip(spans, memory, strict=True)]).wait()
            assert memory == [content_of(span) for span in spans]
    assert child.returncode == 0


# Tickets and threads ----------------------------------------------------------------------------------------------------


def test_thread_that_dies_is_replaced(path: Path, file: StoreFile) -> None:
    span = span_of(file)
    with Reader(1, preadv=failing(SystemExit("killed"), times=3)) as reader:
        for _ in range(3):
            told = message(reader, Read(span))
            assert told == f"{path}: layer 3, expert 17 was not read: the reader's thread died (SystemExit('killed'))"
        memory = memory_for(span)
        assert reader.submit([Read(span, memory)]).wait(PATIENCE)
        assert sum(thread.is_alive() for thread in reader._threads) == 1
    assert memory == content_of(span)


def test_finish_that_fails(file: StoreFile) -> None:
    def finish(parts: Sequence[np.ndarray]) -> None:
        raise ZeroDivisionError("no scale")

    span = span_of(file)
    with Reader(2) as reader:
        with pytest.raises(UserError, match="expert 17 was not read: ZeroDivisionError: no scale") as error:
            reader.submit([Read(span, None, finish)]).wait()
        assert isinstance(error.value.__cause__, ZeroDivisionError)
        assert reader.submit([Read(span)]).wait()


def test_finish_sees_verified_bytes_only(path: Path, file: StoreFile) -> None:
    write_in_place(path, PAGE, b"damage")
    finished = []
    with Reader(1) as reader:
        message(reader, Read(span_of(file, checked=True), None, finished.append))
    assert not finished


def test_first_failure_drops_what_is_not_started(file: StoreFile) -> None:
    gate = Gate(is_open=True)
    with Reader(1, preadv=gate) as reader:
        ticket = reader.submit([Read(span_of(file, NBYTES)), *(Read(span_of(file)) for _ in range(10))])
        for _ in range(2):  # told again to whoever asks again
            with pytest.raises(UserError, match="ends early"):
                ticket.wait(PATIENCE)
        assert reader.submit([Read(span_of(file, 2 * PAGE))]).wait(PATIENCE)
    assert set(gate.started) == {NBYTES, 2 * PAGE}


def test_after_a_failure_nothing_is_written(file: StoreFile) -> None:
    """The wait goes on until the reads that other threads are at are over, too."""
    gate = Gate()

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return gate(descriptor, buffers, offset) if offset < NBYTES else os.preadv(descriptor, buffers, offset)

    memory = memory_for(span_of(file))
    with Reader(2, preadv=preadv) as reader:
        ticket = reader.submit([Read(span_of(file), memory), Read(span_of(file, NBYTES))])
        gate.wait_for_reads(1)
        assert not ticket.wait(0.05)
        gate.opened.set()
        with pytest.raises(UserError, match="ends early"):
            ticket.wait(PATIENCE)
    assert memory == content_of(span_of(file))


def test_cancelled_reads_are_not_carried_out(file: StoreFile) -> None:
    gate = Gate()
    spans = [span_of(file, i * PAGE) for i in range(10)]
    memory = [memory_for(span) for span in spans]
    with Reader(2, preadv=gate) as reader:
        ticket = reader.submit([Read(s, m) for s, m in zip(spans, memory, strict=True)])
        gate.wait_for_reads(2)
        ticket.cancel()
        assert not ticket.done()
        assert not ticket.wait(0.01)
        gate.opened.set()
        assert ticket.wait(PATIENCE)
        assert reader.submit([Read(spans[5])]).wait(PATIENCE)
    assert sorted(gate.started) == [0, PAGE, 5 * PAGE]
    assert [bytes(m[0]) for m in memory[:2]] == [content_of(span)[0] for span in spans[:2]]
    assert not any(map(any, (m[0] for m in memory[2:])))


def test_cancelled_reads_fail_in_silence(file: StoreFile) -> None:
    gate = Gate()
    with Reader(1, preadv=gate) as reader:
        ticket = reader.submit([Read(span_of(file, NBYTES))])
        gate.wait_for_reads(1)
        ticket.cancel()
        gate.opened.set()
        assert ticket.wait(PATIENCE)


def test_dropping_what_is_not_started_at_all(file: StoreFile) -> None:
    gate = Gate()
    with Reader(1, preadv=gate) as reader:
        started = reader.submit([Read(span_of(file, 0)), Read(span_of(file, PAGE))])
        waiting = reader.submit([Read(span_of(file, 2 * PAGE)), Read(span_of(file, 3 * PAGE))])
        gate.wait_for_reads(1)
        assert not started.drop()
        assert waiting.drop()
        assert waiting.done()
        assert not waiting.drop()
        gate.opened.set()
        assert started.wait(PATIENCE)
        assert waiting.wait(PATIENCE)
        assert not started.drop()
    assert gate.started == [0, PAGE]


def test_cancelling_what_is_done(file: StoreFile) -> None:
    with Reader(1) as reader:
        ticket = reader.submit([Read(span_of(file))])
        assert ticket.wait(PATIENCE)
        ticket.cancel()
        assert ticket.wait()


def test_urgent_reads_come_first(file: StoreFile) -> None:
    gate = Gate()
    with Reader(1, preadv=gate) as reader:
        tickets = [reader.submit([Read(span_of(file, 0))])]
        gate.wait_for_reads(1)
        for page, urgent in ((1, False), (2, False), (3, True), (4, False), (5, True)):
            tickets.append(reader.submit([Read(span_of(file, page * PAGE))], urgent))
        gate.opened.set()
        assert all(ticket.wait(PATIENCE) for ticket in tickets)
    assert [offset // PAGE for offset in gate.started] == [0, 3, 5, 1, 2, 4]


def test_wait_with_a_timeout(file: StoreFile) -> None:
    gate = Gate()
    with Reader(1, preadv=gate) as reader:
        ticket = reader.submit([Read(span_of(file))])
        assert not ticket.wait(0.01)
        assert not ticket.done()
        gate.opened.set()
        assert ticket.wait(PATIENCE)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python leaves SIGINT ignored where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_middle_of_a_wait(file: StoreFile) -> None:
    """The wait ends, the read does not; the next wait finds it done."""
    gate = Gate()
    span = span_of(file, checked=True)
    memory = memory_for(span)
    with Reader(1, preadv=gate) as reader:
        ticket = reader.submit([Read(span, memory)])
        for _ in range(3):
            gate.wait_for_reads(1)
            threading.Timer(0.02, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                ticket.wait(PATIENCE)
            assert not ticket.done()
        gate.opened.set()
        assert ticket.wait(PATIENCE)
    assert memory == content_of(span)


@pytest.mark.parametrize("moment", ["waking the threads", "giving the lock back"])
def test_ctrl_c_while_reads_are_handed_in(moment: str, file: StoreFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no ticket to wait for, so nothing is written afterwards."""
    gate = Gate()
    memory = [memory_for(span_of(file)) for _ in range(8)]
    with Reader(2, preadv=gate) as reader:
        notify, queue = reader._work.notify, reader._queue

        def interrupted(*arguments: Any) -> None:
            notify(8) if moment == "waking the threads" else queue(*arguments)
            raise KeyboardInterrupt

        threading.Timer(0.05, gate.opened.set).start()
        with monkeypatch.context() as patched:
            place, name = (reader._work, "notify") if moment == "waking the threads" else (reader, "_queue")
            patched.setattr(place, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                reader.submit([Read(span_of(file), m) for m in memory])
        written = [any(m[0]) for m in memory]
        assert reader.submit([Read(span_of(file))]).wait(PATIENCE)
        assert written == [any(m[0]) for m in memory]
        assert sum(written) <= 2


def test_ctrl_c_in_the_middle_of_handing_in(file: StoreFile) -> None:
    """The reads are queued and not yet counted: none of them is started."""

    class Interrupted(deque[Any]):
        def extend(self, jobs: Any) -> None:
            super().extend(jobs)
            raise KeyboardInterrupt

    memory = [memory_for(span_of(file)) for _ in range(8)]
    with Reader(2) as reader:
        reader._urgent = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            reader.submit([Read(span_of(file), m) for m in memory])
        assert reader.submit([Read(span_of(file))], urgent=False).wait(PATIENCE)
    assert not any(any(m[0]) for m in memory)


def test_closing_drops_what_is_not_started(file: StoreFile) -> None:
    gate = Gate()
    reader = Reader(1, preadv=gate)
    first = reader.submit([Read(span_of(file, 0))])
    gate.wait_for_reads(1)
    second = reader.submit([Read(span_of(file, PAGE))], urgent=False)
    threading.Timer(0.02, gate.opened.set).start()
    reader.close()
    assert first.done()
    assert second.wait(0)
    assert gate.started == [0]
    assert not any(thread.is_alive() for thread in reader._threads)
    reader.close()
    with pytest.raises(AssertionError, match="closed"):
        reader.submit([Read(span_of(file))])


def test_descriptors_are_given_back(file: StoreFile) -> None:
    def opened() -> int:
        return len(os.listdir("/dev/fd"))

    before = opened()
    with Reader(4, direct=True) as reader:
        reader.submit([Read(span_of(file, i * PAGE)) for i in range(20)]).wait()
    assert opened() == before


def test_anything_goes(file: StoreFile) -> None:
    """Random tickets, cancelled, failing and waited for in any order: right bytes or none, and nothing after the wait."""
    rng = random.Random(1)
    reader = Reader(4)
    waiting: list[tuple[Any, list[Span], list[list[bytearray]]]] = []
    settled: list[tuple[list[list[bytearray]], list[list[bytes]]]] = []
    for _ in range(400):
        spans = [
            span_of(file, NBYTES if rng.random() < 0.02 else rng.randrange(38) * PAGE, [700, PAGE], True)
            for _ in range(rng.randrange(1, 6))
        ]
        memory = [memory_for(span) for span in spans]
        ticket = reader.submit([Read(s, m) for s, m in zip(spans, memory, strict=True)], rng.random() < 0.5)
        waiting.append((ticket, spans, memory))
        if rng.random() < 0.3:
            rng.choice(waiting)[0].cancel()
        while len(waiting) > 6 or (waiting and rng.random() < 0.3):
            ticket, spans, memory = waiting.pop(rng.randrange(len(waiting)))
            bad = any(span.offset == NBYTES for span in spans)
            try:
                assert ticket.wait(PATIENCE)
            except UserError:
                assert bad
            for span, pieces in zip(spans, memory, strict=True):
                assert pieces == content_of(span) or not any(map(any, pieces)) or span.offset == NBYTES
            settled.append((memory, [list(map(bytes, pieces)) for pieces in memory]))
    reader.close()
    assert all(memory == before for memory, before in settled)
    assert all(ticket.done() for ticket, *_ in waiting)


# Probe ------------------------------------------------------------------------------------------------------------------


def test_probe_reads_both_ways(file: StoreFile) -> None:
    found = probe([span_of(file, i * PAGE, [100, PAGE - 100]) for i in range(40)])
    assert found.threads in PROBE_THREADS
    ways = {(rate.direct, rate.threads) for rate in found.rates}
    assert ways == {(direct, n) for direct in (False, True)[: 2 - found.refused] for n in PROBE_THREADS}
    assert all(rate.mb_per_s > 0 for rate in found.rates)
    assert set(found.as_json()) == {"direct", "threads", "rates", "refused"}


def test_probe_of_a_file_that_vanished(path: Path, file: StoreFile) -> None:
    path.unlink()
    found = probe([span_of(file)])
    assert found.refused
    assert not found.direct


def test_probe_stops_in_time(file: StoreFile) -> None:
    """Many spans: a slice of time for each way, not a pass over the file."""
    begin = time.monotonic()
    probe([span_of(file, i % 40 * PAGE) for i in range(20_000)])
    assert time.monotonic() - begin < 5


def test_probe_of_a_truncated_file(path: Path, file: StoreFile) -> None:
    os.truncate(path, 0)
    with pytest.raises(UserError, match="ends early"):
        probe([span_of(file)])


@pytest.mark.parametrize(
    ("rates", "direct", "threads"),
    [
        ([(False, 1, 500), (False, 4, 990), (False, 8, 1000), (True, 1, 100), (True, 8, 1090)], False, 4),
        ([(False, 1, 500), (False, 8, 1000), (True, 1, 900), (True, 4, 1500), (True, 8, 1510)], True, 4),
        ([(False, 1, 500), (False, 4, 460), (False, 8, 300)], False, 1),
    ],
    ids=["a tie", "direct is faster", "no direct reads"],
)
def test_choice_of_the_probe(rates: list[tuple[bool, int, float]], direct: bool, threads: int) -> None:
    assert choose([Rate(*rate) for rate in rates])[:2] == (direct, threads)
    assert isinstance(choose([Rate(*rate) for rate in rates]), Probe)


def test_a_paced_disk_gives_all_threads_together_its_rate(path: Path) -> None:
    """Four threads read 1,000 bytes each at 40,000 bytes a second: the last of them is done after a tenth of a second."""
    paced, begin = Paced(40_000), time.monotonic()
    ends: list[float] = []
    descriptor = os.open(path, os.O_RDONLY)

    def read() -> None:
        assert paced(descriptor, [bytearray(1000)], 0) == 1000
        ends.append(time.monotonic() - begin)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    assert all(end >= 0.025 * (i + 1) for i, end in enumerate(sorted(ends)))
