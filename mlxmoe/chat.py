"""`mlxmoe chat [MODEL]`: the terminal chat. Answers go to stdout; everything said about them goes to stderr.

Owns what a terminal needs: reading lines (prompt_toolkit on a terminal, plain lines otherwise), the /commands, Ctrl-C
and colours. The conversation itself is session.py's.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import mlx.core as mx
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlxmoe.arguments import note
from mlxmoe.errors import UserError
from mlxmoe.runtime import add_runtime_arguments
from mlxmoe.session import (
    Conversation,
    PromptProgress,
    Stats,
    accept_any_text,
    add_generation_arguments,
    open_engine,
    print_answer,
    printable,
    read_prompt,
)
from mlxmoe.units import format_size

LEAVE = "/exit or Ctrl-D leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runtime_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit; - reads it from stdin")
    add_generation_arguments(parser, max_tokens="until the context is full")


def run(args: argparse.Namespace) -> int:
    """Answers --prompt, or talks until /exit. Returns 2 if input that was no terminal held a message that failed."""
    accept_any_text()
    prompt = read_prompt(args.prompt) if args.prompt is not None else None
    # A single answer is the whole program: Ctrl-C ends both
    chat = Chat(Conversation(open_engine(args), args.system), interactive=at_a_terminal() and prompt is None)
    if prompt is not None:
        chat.answer(prompt)
        return 0
    return chat.talk(terminal_reader() if chat.interactive else plain_reader())


def at_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class Command(NamedTuple):
    usage: str
    help: str
    run: Callable[[Chat, str], None]


class Chat:
    """A conversation with a person: takes their lines one by one, and prints what comes of them."""

    def __init__(self, conversation: Conversation, interactive: bool):
        self.conversation, self.interactive = conversation, interactive
        self.failed = False

    def talk(self, read: Callable[[], str]) -> int:
        """Reads and handles lines until EOFError. Returns the exit status."""
        if self.interactive:
            note(f"/help lists the commands; {LEAVE}")
        while True:
            try:
                self.handle(read())
            except EOFError:
                return 2 if self.failed and not self.interactive else 0
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                note(LEAVE)
            except UserError as error:
                self.failed = True
                note(f"{error.message}\nhint: {error.hint}")
            except RuntimeError as error:  # of MLX, such as no memory left: the conversation outlives it
                if not self.interactive:
                    raise
                note(f"the model failed: {error}\nhint: /save FILE keeps the conversation")

    def handle(self, line: str) -> None:
        """One line: a command if it begins with a slash, else a message. Raises EOFError for /exit."""
        if line.startswith("/"):
            self.command(line)
        elif line.strip():
            self.answer(line)

    def command(self, line: str) -> None:
        """Runs one of COMMANDS. Raises UserError for any other word."""
        name, _, argument = line.partition(" ")
        command = COMMANDS.get(name.strip())
        if command is None:
            known = " ".join(COMMANDS)
            raise UserError(
                f"{printable(name)} is no command: {known}", "a message may begin with a space, then a slash"
            )
        command.run(self, argument.strip())

    def answer(self, text: str) -> None:
        """Streams the answer, then a line of stats. On a terminal Ctrl-C ends the answer, and twice ends it at once."""
        engine = self.conversation.engine
        progress = PromptProgress(engine.report.prefill_step)
        with _calling_on_interrupt(engine.stop) if self.interactive else nullcontext():
            print_answer(self.conversation.reply(text, progress), progress)
        stats = engine.stats
        if stats is None:
            return
        if stats.finish_reason == "interrupted":
            kept = "the answer is kept as far as it went" if engine.text else "the message is left out"
            note(f"stopped; {kept}")
        elif stats.finish_reason == "length":
            note(f"stopped at --max-tokens {engine.max_tokens}")
        elif stats.finish_reason == "context":
            note(f"the context of {engine.report.context} tokens is full: the answer ends here; /reset starts anew")
        if stats.generation_tokens > 0:
            note(dim(self._brief(stats)) if self.interactive else stats.line())

    def _brief(self, stats: Stats) -> str:
        """What the last answer took, short enough for a terminal of 80 columns; /stats tells the rest."""
        engine = self.conversation.engine
        return (
            f"{stats.generation_tokens} tokens, {stats.decode_tps:.1f} tok/s | first token {stats.ttft_s:.2f} s | "
            f"context {engine.num_cached_tokens}/{engine.report.context} | peak {format_size(stats.peak_memory)}"
        )


def _help(chat: Chat, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        note(f"{command.usage:{width}}  {command.help}")
    note("Esc-Enter, or a backslash before Enter, begins a new line; Ctrl-C stops an answer; Ctrl-D leaves")


def _reset(chat: Chat, argument: str) -> None:
    chat.conversation.reset()
    note("a new conversation" + ("; the system message stays" if chat.conversation.system else ""))


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation.system = None if argument == "-" else argument
    system = chat.conversation.system
    note(f"system message: {printable(system)}" if system else "no system message")


def _stats(chat: Chat, argument: str) -> None:
    conversation, engine = chat.conversation, chat.conversation.engine
    sampling = engine.sampling
    note(f"model: {engine.report.source}")
    note(f"conversation: {len(conversation.messages)} messages")
    note(f"KV cache: {engine.num_cached_tokens} of {engine.report.context} tokens")
    note(f"memory: {format_size(mx.get_active_memory())} now, {format_size(mx.get_peak_memory())} at most")
    if engine.experts is not None:
        note(engine.experts.line())
    note(f"sampling: temperature {sampling.temp:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}")
    if engine.stats is not None:
        note(f"last answer: {engine.stats.line()}")


def _save(chat: Chat, argument: str, overwrite: bool = False) -> None:
    path = _path(argument, "/save FILE")
    chat.conversation.save(path, overwrite)
    note(f"saved {len(chat.conversation.messages)} messages to {path}")


def _save_over(chat: Chat, argument: str) -> None:
    _save(chat, argument, overwrite=True)


def _load(chat: Chat, argument: str) -> None:
    path = _path(argument, "/load FILE")
    chat.conversation.load(path)
    note(f"loaded {len(chat.conversation.messages)} messages from {path}")


def _exit(chat: Chat, argument: str) -> None:
    raise EOFError


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise UserError("the name of the file is missing", f"write {usage}")
    if not argument.isprintable():
        raise UserError(f"{argument!r} is no name of a file", f"write {usage}")
    return Path(os.path.expanduser(argument))


COMMANDS = {
    "/help": Command("/help", "list the commands", _help),
    "/reset": Command("/reset", "begin a new conversation", _reset),
    "/system": Command("/system [TEXT]", "show or set the system message; /system - takes it away", _system),
    "/stats": Command("/stats", "show model, context, memory and the last answer's speed", _stats),
    "/save": Command("/save FILE", "write the conversation to a new file", _save),
    "/save!": Command("/save! FILE", "write it over a file that exists", _save_over),
    "/load": Command("/load FILE", "go on with a conversation of /save", _load),
    "/exit": Command("/exit", "leave", _exit),
}


# --- interrupts ---


@contextmanager
def _calling_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`, which ends the answer between two steps of the model; a second one raises at once."""
    pressed = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# --- colours and lines ---


def dim(text: str) -> str:
    """`text` in dim letters, where stderr is a terminal that takes colours and NO_COLOR does not say otherwise."""
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[2m{text}\x1b[0m" if colours else text


def plain_reader() -> Callable[[], str]:
    """Messages from the lines of stdin; a backslash at the end of a line joins the next one. EOFError at the end."""

    def read() -> str:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        lines = []
        while line := sys.stdin.readline():
            lines.append(line.rstrip("\r\n"))
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]
        if lines:
            return "\n".join(lines)
        raise EOFError

    return read


def terminal_reader() -> Callable[[], str]:
    """Messages from a line editor with history and completion. EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
    session: PromptSession[str] = PromptSession(
        history=KeptHistory(history_path()),
        completer=CommandCompleter(),
        complete_while_typing=False,
        key_bindings=_key_bindings(),
        multiline=True,
        prompt_continuation="  ",
        enable_suspend=True,
    )
    marker = FormattedText([("bold", "> ")])
    return lambda: session.prompt(marker)


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


class CommandCompleter(Completer):
    """Names of commands after a slash at the start, and names of files after /save and /load."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        name, space, argument = before.partition(" ")
        if space and name in ("/save", "/save!", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif before.startswith("/"):
            for command in COMMANDS.values():
                usage_name = command.usage.split()[0]
                if usage_name.startswith(before):
                    yield Completion(usage_name, -len(before), display_meta=command.help)


def history_path() -> Path:
    """Where the lines typed so far are kept: $XDG_STATE_HOME or ~/.local/state, then mlxmoe/history."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "mlxmoe" / "history"


class KeptHistory(History):
    """A FileHistory that only its owner can read, and that does without the file where it cannot be written."""

    def __init__(self, path: Path):
        super().__init__()
        self._file = FileHistory(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            note(f"the history of this session is not kept: cannot write {path}: {error.strerror}")

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(self._file.load_history_strings())
        except OSError:  # said when the history was opened
            return []

    def store_string(self, string: str) -> None:
        try:
            self._file.store_string(string)
        except OSError:  # said when the history was opened, or the disk is full: not worth the conversation
            return
