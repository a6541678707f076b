"""The `mlxmoe` command: exit statuses, what an error looks like, help."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import mlxmoe
from mlxmoe.cli import COMMANDS, build_parser, main
from mlxmoe.errors import UserError
from mlxmoe.runtime import RuntimeConfig

Fake = Callable[[Callable[[argparse.Namespace], object]], None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a function in the place of `mlxmoe chat`; the command gets an option --number."""

    def install(run: Callable[[argparse.Namespace], object]) -> None:
        module = types.ModuleType("fake_command")
        module.__dict__["add_arguments"] = lambda parser: parser.add_argument("--number", type=int)
        module.__dict__["run"] = run
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(COMMANDS, "chat", ("fake_command", "do as told"))

    return install


def failing(error: BaseException) -> Callable[[argparse.Namespace], object]:
    def run(args: argparse.Namespace) -> object:
        raise error

    return run


# -- exit statuses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (2, 2)])
def test_status_is_what_the_command_says(fake: Fake, result: int | None, status: int) -> None:
    fake(lambda args: result)
    assert main(["chat"]) == status


def test_arguments_reach_the_command(fake: Fake) -> None:
    seen: list[int] = []
    fake(lambda args: seen.append(args.number))
    assert main(["chat", "--number", "7"]) == 0
    assert seen == [7]


def test_arguments_of_the_process(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(lambda args: args.number)
    monkeypatch.setattr(sys, "argv", ["mlxmoe", "chat", "--number", "2"])
    assert main() == 2


def test_bad_input(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(failing(UserError("there is no folder 'x'", "name a model folder")))
    assert main(["chat"]) == 2
    assert capsys.readouterr() == ("", "mlxmoe: error: there is no folder 'x'\nhint: name a model folder\n")


def test_unexpected_error(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(failing(RuntimeError("three is not two")))
    assert main(["chat"]) == 1
    out, err = capsys.readouterr()
    error, hint = err.splitlines()
    assert (out, error) == ("", "mlxmoe: error: RuntimeError: three is not two")
    assert hint.startswith("hint: ")
    assert "--debug" in hint


@pytest.mark.parametrize(
    ("code", "path", "words"),
    [
        (errno.ENOSPC, None, "mlxmoe: error: the disk is full\nhint: make room"),
        (errno.EDQUOT, "/a/b", "mlxmoe: error: /a/b: the disk is full\nhint: make room"),
        (errno.EACCES, "/a/b", "mlxmoe: error: /a/b: permission denied\nhint: change"),
        (errno.EROFS, "/a/b", "mlxmoe: error: /a/b: the file system cannot be written to\nhint: change"),
    ],
)
def test_what_a_disk_refuses_is_no_fault_of_the_program(
    fake: Fake, capsys: pytest.CaptureFixture[str], code: int, path: str | None, words: str
) -> None:
    fake(failing(OSError(code, os.strerror(code), path)))
    assert main(["chat"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert "report" not in err


def test_other_errors_of_the_system_are(fake: Fake) -> None:
    fake(failing(OSError(errno.EIO, os.strerror(errno.EIO))))
    assert main(["chat"]) == 1


@pytest.mark.parametrize(("error", "status"), [(UserError("no", "yes"), 2), (RuntimeError("no"), 1)])
def test_debug_shows_the_traceback(
    fake: Fake, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    fake(failing(error))
    assert main(["chat", "--debug"]) == status
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert "mlxmoe: error: " in err


def test_interrupted(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(failing(KeyboardInterrupt()))
    assert main(["chat"]) == 130
    assert capsys.readouterr() == ("", "stopped\n")


@pytest.mark.parametrize(("error", "status"), [(ImportError("no MLX here"), 1), (KeyboardInterrupt(), 130)])
def test_error_while_a_command_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    """MLX takes seconds to import on a cold disk: Ctrl-C lands there as well."""

    def no_import(name: str) -> types.ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", no_import)
    assert main(["chat"]) == status
    assert "Traceback" not in capsys.readouterr().err
    assert main(["chat", "--debug"]) == status


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "invalid choice: 'nosuch' (choose from "),
        (["chat", "--nosuch"], "unrecognized arguments: --nosuch"),
        (["chat", "--number", "seven"], "argument --number: invalid int value: 'seven'"),
        (["chat", "--number"], "argument --number: expected one argument"),
        (["--debug"], "unrecognized arguments: --debug"),
    ],
)
def test_arguments_that_are_refused(
    fake: Fake, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    fake(failing(AssertionError("it must not run")))
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: mlxmoe")
    assert err.splitlines()[-1].startswith("hint: mlxmoe")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves(lines: int, unbuffered: str) -> None:
    """`mlxmoe ... | head` ends without a word, wherever the loss is noticed: at a print or at the last flush."""
    script = (
        "import sys, types\n"
        "from mlxmoe.cli import COMMANDS, main\n"
        "module = types.ModuleType('fake_command')\n"
        "module.add_arguments = lambda parser: None\n"
        "module.run = lambda args: [print('line') for _ in range(int(sys.argv[1]))] and None\n"
        "sys.modules['fake_command'] = module\n"
        "COMMANDS['chat'] = ('fake_command', 'do as told')\n"
        "sys.exit(main(['chat']))\n"
    )
    read, write = os.pipe()
    os.close(read)
    try:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-c", script, str(lines)]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_stdout_is_closed() -> None:
    script = '"$0" -m mlxmoe --version >&-'
    done = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, f"mlxmoe {mlxmoe.__version__}\n")  # argparse's second choice


# -- help --------------------------------------------------------------------------------------------------------------


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: mlxmoe ")
    assert err == ""
    for command, (_, text) in COMMANDS.items():
        assert f"    {command} " in out.replace("\n", " \n")
        assert text in " ".join(out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"mlxmoe {mlxmoe.__version__}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["nosuch"]])
def test_quick_without_mlx(arguments: list[str]) -> None:
    """Nothing heavy is imported before a command is chosen."""
    script = (
        "import sys\n"
        "from mlxmoe.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('heavy:', sorted({'mlx', 'mlx_lm', 'numpy', 'transformers', 'huggingface_hub'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


TAKES_NO_MODEL = {"bench-kernels", "bench-launches", "doctor"}


def subparser(command: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in build_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
    found = commands.choices[command]
    assert isinstance(found, argparse.ArgumentParser)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: mlxmoe {command} ")
    assert err == ""
    assert "--debug" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_every_default(command: str) -> None:
    """Every argument has a help text, and every default that does something is in it."""
    silent = (None, False, argparse.SUPPRESS)
    for action in subparser(command)._actions:
        name = "/".join(action.option_strings) or action.dest
        assert action.help, f"mlxmoe {command}: {name} has no help"
        if action.default in silent or action.default == []:
            continue
        text = action.help % {"default": action.default}
        shown = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
        assert f"default: {shown}" in text or f"default: {action.default}" in text, f"mlxmoe {command}: {name}: {text}"


def test_help_of_context_says_what_the_loader_does() -> None:
    (context,) = (a for a in subparser("generate")._actions if a.dest == "context")
    loader = sys.modules[RuntimeConfig.__module__]
    assert f"at most {loader.DEFAULT_CONTEXT})" in (context.help or "")


# -- the real commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in TAKES_NO_MODEL])
def test_no_such_folder(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says what is wrong in two lines and leaves nothing behind."""
    assert main(no_such_folder(command, tmp_path)) == 2
    check_no_such_folder(*capsys.readouterr(), tmp_path)


def test_no_such_folder_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlxmoe", *no_such_folder("generate", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    check_no_such_folder(done.stdout, done.stderr, tmp_path)


def no_such_folder(command: str, folder: Path) -> list[str]:
    needed = {
        "chat": ["--prompt", "hello"],
        "generate": ["--prompt", "hello"],
        "eval": ["--text", str(folder / "nothing.jsonl")],
        "convert": [str(folder / "out"), "--bpw", "3"],
        "repack": [str(folder / "out")],
        "bench-chapter": ["--text", str(folder / "nothing.jsonl"), "--calibration", str(folder / "nothing.jsonl")],
        "bench-quantizers": ["--text", str(folder / "nothing.jsonl"), "--calibration", "c"],
        "bench-variants": ["--config", str(folder / "nothing.toml"), "--text", "t", "--calibration", "c"],
        "bench-sensitivity": ["--text", str(folder / "nothing.jsonl"), "--calibration", str(folder / "nothing.jsonl")],
        "stats": ["--text", str(folder / "nothing.jsonl")],
        "report": ["--output", str(folder / "out")],
        "forecast": ["--reference", "nothing", "--text", str(folder / "nothing.jsonl")],
    }
    return [command, str(folder / "nothing here"), *needed.get(command, [])]


def check_no_such_folder(out: str, err: str, folder: Path) -> None:
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("mlxmoe: error: ")
    assert "nothing" in error
    assert hint.startswith("hint: ")
    assert list(folder.iterdir()) == []


def test_bench_kernels_is_two_words_or_one(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in (["bench", "kernels"], ["bench-kernels"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert stopped.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "--models" in texts[0]
