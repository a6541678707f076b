"""`mlxmoe chat`: commands, plain input, the line editor, and the whole program on a real terminal."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from scripted_model import ScriptedModel, scripted

from mlxmoe import chat, cli, session
from mlxmoe.loading import Loaded
from mlxmoe.session import Conversation, Engine

ANSWERS = {"q": "an answer", "r": "another", "a\nb": "two lines", " /x": "a path"}
Lines = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Runs `chat` with lines on a stdin that is no terminal. Gives status, stdout and stderr."""

    def run(*said: str, loaded: Loaded | None = None, argv: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(session, "open_model", lambda source, config: loaded or scripted(ANSWERS))
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in said)))
        status = cli.main(["chat", *argv])
        return status, *capsys.readouterr()

    return run


# --- plain input ---


def test_plain_answers_on_stdout_only(lines: Lines) -> None:
    status, out, err = lines("q", "", "   ", "r")
    assert (status, out) == (0, "an answer\nanother\n")
    assert len(re.findall(r"answer \d+ tokens, [\d.]+ tok/s", err)) == 2
    assert "\x1b" not in out + err


def test_plain_backslash_joins_lines(lines: Lines) -> None:
    assert lines("a\\", "b")[1] == "two lines\n"
    assert lines("a\\", "b\\")[1] == "two lines\n"


def test_prompt_answers_once(lines: Lines) -> None:
    status, out, err = lines("r", argv=("--prompt", "q"))
    assert (status, out) == (0, "an answer\n")
    assert "tok/s" in err
    assert lines("r", argv=("--prompt", "-"))[1] == "another\n"


@pytest.mark.parametrize("argv", [("--prompt", ""), ("--prompt", " "), ("--temp", "-1"), ("--max-tokens", "0")])
def test_bad_arguments_exit_2(lines: Lines, argv: tuple[str, ...]) -> None:
    status, out, err = lines("q", argv=argv)
    assert (status, out) == (2, "")
    assert "hint:" in err


def test_a_failed_line_goes_on_and_exits_2(lines: Lines) -> None:
    status, out, err = lines("/nope", "q")
    assert (status, out) == (2, "an answer\n")
    assert "/nope is no command: /help /reset /system /stats /save /save! /load /exit" in err


def test_context_full_keeps_the_conversation(lines: Lines) -> None:
    status, out, err = lines("q", "w" * 80, "/stats", "/reset", "r", loaded=scripted(ANSWERS, context=60))
    assert (status, out) == (2, "an answer\nanother\n")
    assert "and the context holds 60\nhint: /reset" in err
    assert "conversation: 2 messages" in err


def test_answer_cut_by_the_context_or_length_says_so(lines: Lines) -> None:
    assert "the context of 25 tokens is full" in lines("q", loaded=scripted(ANSWERS, context=25))[2]
    assert "stopped at --max-tokens 3" in lines("q", argv=("--max-tokens", "3"))[2]


# --- commands ---


def test_commands(lines: Lines, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    status, out, err = lines(
        "/help",
        "q",
        f"/save {path}",
        f"/save! {path}",
        "/reset",
        "/stats",
        f"/load {path}",
        "/stats",
        " /x",
        "/exit",
        "r",
    )
    assert (status, out) == (0, "an answer\na path\n")
    assert err.count(f"saved 2 messages to {path}") == 2
    assert "/save! FILE" in err
    assert f"loaded 2 messages from {path}" in err
    assert err.count("conversation: 0 messages") == err.count("conversation: 2 messages") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save", "the name of the file is missing"),
        ("/load", "the name of the file is missing"),
        ("/load a\x00b", "is no name of a file"),
        ("/load /no/such/file", "cannot read /no/such/file: No such file or directory"),
        ("/save /no/such/folder/file", "cannot write /no/such/folder/file: No such file or directory"),
    ],
)
def test_commands_that_fail_keep_the_conversation(lines: Lines, line: str, message: str) -> None:
    status, out, err = lines("q", line, "/stats")
    assert (status, out) == (2, "an answer\n")
    assert message in err
    assert "conversation: 2 messages" in err


def test_system_message(lines: Lines) -> None:
    err = lines("/system", "/system be brief", "/system", "/reset", "/system -", argv=("--system", "be kind"))[2]
    said = [line for line in err.splitlines() if "system message" in line]
    assert said == [
        "system message: be kind",
        "system message: be brief",
        "system message: be brief",
        "a new conversation; the system message stays",
        "no system message",
    ]


# --- interrupts and colours ---


def talker(answers: dict[str, str]) -> chat.Chat:
    return chat.Chat(Conversation(Engine(scripted(answers))), interactive=True)


def test_ctrl_c_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talking = talker({"q": "a long answer", "r": "another"})
    lines, written = iter(["q", "r"]), []

    def write(text: str) -> int:
        written.append(text)
        if len(written) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return len(text)

    def read() -> str:
        for line in lines:
            return line
        raise EOFError

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", write)
        assert talking.talk(read) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert [m["content"] for m in talking.conversation.messages] == ["q", "a lo", "r", "another"]
    assert "stopped; the answer is kept" in capsys.readouterr().err


def test_ctrl_c_before_the_answer_leaves_the_message_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talking = talker({"q": "an answer"})
    engine = talking.conversation.engine
    monkeypatch.setattr(session.PromptProgress, "__call__", lambda self, done, total: engine.stop())
    talking.answer("q")
    assert talking.conversation.messages == []
    assert capsys.readouterr() == ("", "stopped; the message is left out\n")


def test_second_ctrl_c_does_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    talking = talker({"q": "a long answer", "r": "another"})
    model = talking.conversation.engine.model
    assert isinstance(model, ScriptedModel)
    model.fail_at, model.error = 25, KeyboardInterrupt
    lines = iter(["q", "r"])

    def read() -> str:
        if talking.conversation.messages:
            model.fail_at = None
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    assert talking.talk(read) == 0
    assert talking.conversation.messages[-1]["content"] == "another"
    assert chat.LEAVE in capsys.readouterr().err


def test_an_interrupt_while_printing_ends_the_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation and the cache are settled when the interrupt arrives, not when the garbage is collected."""
    talking = talker({"q": "an answer"})

    def interrupt(text: str) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            talking.answer("q")
    assert caught.tb is not None  # it keeps the frames alive
    assert [m["content"] for m in talking.conversation.messages] == ["q", "a"]


def test_two_interrupts_raise() -> None:
    stopped = []
    with chat._calling_on_interrupt(lambda: stopped.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_failing_model_leaves_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    talking = talker({"q": "a long answer"})
    model = talking.conversation.engine.model
    assert isinstance(model, ScriptedModel)
    model.fail_at = 25
    lines = iter(["q"])

    def read() -> str:
        for line in lines:
            return line
        raise EOFError

    assert talking.talk(read) == 0
    assert "the model failed: out of memory\nhint: /save" in capsys.readouterr().err
    assert len(talking.conversation.messages) == 2
    talking.interactive, lines = False, iter(["q"])
    with pytest.raises(RuntimeError, match="out of memory"):
        talking.talk(read)


@pytest.mark.parametrize(
    ("terminal", "environment", "dimmed"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours(monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], dimmed: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b" in chat.dim("text")) is dimmed


def test_progress_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress = session.PromptProgress(least=8)
    progress(0, 99)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for done in (0, 8, 99):
        progress(done, 99)
    first, second = "reading the prompt: 0/99 tokens", "reading the prompt: 8/99 tokens"
    assert re.fullmatch(f"\r{first} *\r{second} *\r {{{len(second)},}}\r", capsys.readouterr().err)
    progress.clear()
    progress(0, 8)
    assert capsys.readouterr().err == ""
    progress(0, 99)
    progress.clear()
    assert re.fullmatch(f"\r{first} *\r {{{len(first)},}}\r", capsys.readouterr().err)


# --- the line editor ---


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """What the line editor makes of keys."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = chat.terminal_reader()

        def run(text: str) -> str:
            keys.send_text(text)
            return read()

        yield run


def test_editor_keys(typed: Callable[[str], str], tmp_path: Path) -> None:
    assert typed("hello\r") == "hello"
    assert typed("\x1b[A, you\r") == "hello, you"
    assert typed("one\\\rtwo\x1b\rthree\r") == "one\ntwo\nthree"
    assert typed("\x1b[200~pasted\nlines\n\x1b[201~\r") == "pasted\nlines\n"
    assert typed("gone\x03kept\r") == "kept"
    assert typed("a\\b\r") == "a\\b"
    with pytest.raises(KeyboardInterrupt):
        typed("\x03")
    with pytest.raises(EOFError):
        typed("\x04")
    history = tmp_path / "mlxmoe" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+hello\n" in history.read_text()


def test_history_that_cannot_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    history = chat.KeptHistory(tmp_path / "file" / "history")
    assert "is not kept" in capsys.readouterr().err
    history.append_string("line")
    assert list(history.load_history_strings()) == []
    assert history.get_strings() == ["line"]


@pytest.mark.parametrize(
    ("before", "completions"),
    [
        ("/s", ["/system", "/stats", "/save", "/save!"]),
        ("/save", ["/save", "/save!"]),
        ("/q", []),
        ("hello /s", []),
        ("hello", []),
        ("/system /", []),
    ],
)
def test_completion_of_commands(before: str, completions: list[str]) -> None:
    found = chat.CommandCompleter().get_completions(Document(before), CompleteEvent())
    assert [c.text for c in found] == completions


def test_completion_of_files(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("")
    found = chat.CommandCompleter().get_completions(Document(f"/load {tmp_path}/ta"), CompleteEvent())
    assert [c.text for c in found] == ["lk.json"]


# --- the program on a terminal ---


EDITOR_READY = r"\x1b\[\?2004h.*>"  # it asks for bracketed paste, then shows its marker


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_on_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    environment = {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
    argv = ["-m", "mlxmoe", "chat", str(tiny_model), "--seed", "1", "--ignore-eos"]
    child = pexpect.spawn(
        sys.executable, argv, env={**os.environ, **environment}, dimensions=(40, 120), timeout=30, encoding="utf-8"
    )
    saved = tmp_path / "talk.json"

    def say(keys: str, *expected: str) -> None:
        child.expect(EDITOR_READY)
        child.send(keys)
        for pattern in expected:
            child.expect(pattern)

    try:
        child.expect("tiny-deepseek-v3.*/help lists the commands")
        say("Tell me a story\r", "a story", r"\n[^\x1b]*\w+ \w+ \w+")
        child.send("\x03")
        child.expect("stopped; the answer is kept")
        child.expect(r"\d+ tokens, [\d.]+ tok/s \| .* context \d+/\d+ \| peak")
        say("/stats\r", "conversation: 2 messages", r"last answer: prompt \d+ tokens")
        say("\x03", "/exit or Ctrl-D leaves")
        say(f"/save {saved}\r", "saved 2 messages")
        say("/reset\r", "a new conversation")
        say("/stats\r", "conversation: 0 messages")
        say("/loa\t", "/loa", "d")  # completed
        child.send(f" {saved}\r")
        child.expect("loaded 2 messages")
        say("/nonsense\r", "/nonsense is no command: /help")
        say("/exit\r", pexpect.EOF)
    finally:
        child.close()
    assert child.exitstatus == 0
    assert saved.is_file()
