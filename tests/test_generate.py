"""`mlxmoe generate`: what goes to stdout and stderr, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_model import scripted

from mlxmoe import cli, session
from mlxmoe.loading import Loaded

ANSWERS = {"q": "an answer", "esc": "a\x1b[31mb", "long": "0123456789" * 5, "two\nlines": "yes", "empty": ""}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loaded], None]:
    """Puts a loaded model in place of the one that the command would open."""
    return lambda loaded: monkeypatch.setattr(session, "open_model", lambda source, config: loaded)


@pytest.fixture
def scripted_model(use: Callable[[Loaded], None]) -> None:
    use(scripted(ANSWERS))


def generate(*argv: str) -> int:
    return cli.main(["generate", *argv])


@pytest.mark.usefixtures("scripted_model")
def test_answer_on_stdout_and_stats_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "q") == 0
    out, err = capsys.readouterr()
    assert out == "an answer\n"
    loaded, stats = err.splitlines()
    assert loaded.startswith("scripted")
    assert all(
        word in stats for word in ("prompt 20 tokens", "answer 10 tokens", "tok/s", "first token", "peak memory")
    )


@pytest.mark.usefixtures("scripted_model")
def test_json_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "esc", "--json") == 0
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert text == [result["text"]] == ["a[31mb"]
    assert list(result) == [
        "text",
        "prompt_tokens",
        "generation_tokens",
        "prompt_tps",
        "decode_tps",
        "ttft_s",
        "peak_memory",
        "finish_reason",
        "load",
        "experts",
    ]
    assert (result["prompt_tokens"], result["generation_tokens"], result["finish_reason"]) == (22, 8, "stop")
    assert min(result[key] for key in ("prompt_tps", "decode_tps", "ttft_s", "peak_memory")) > 0


@pytest.mark.usefixtures("scripted_model")
def test_an_answer_of_nothing_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "empty") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("scripted_model")
@pytest.mark.parametrize("ending", ["", "\n"])
def test_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines" + ending))
    assert generate("--prompt", "-") == 0
    assert capsys.readouterr().out == "yes\n"


@pytest.mark.usefixtures("scripted_model")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "-"], "the prompt is empty"),
        (["--prompt", "q", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--prompt", "q", "--max-tokens", "2030"], "the prompt takes 20 tokens and --max-tokens 2030 more"),
        (["--prompt", "q" * 3000], "the prompt takes 3019 tokens and the context holds 2048"),
        (["--prompt", "q" * 3000, "--max-tokens", "5"], "the prompt takes 3019 tokens and the context holds 2048"),
        (["--prompt", "q", "--top-p", "0"], "--top-p is 0.0"),
        (["--prompt", "q", "--raw", "--system", "s"], "--raw leaves out the chat template"),
        (["--prompt", "q", "--system", "refuse"], "the model's chat template refused the conversation"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert generate(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"mlxmoe: error: {message}" in err
    assert err.splitlines()[-1].startswith("hint: ")
    assert "Traceback" not in err


@pytest.mark.usefixtures("scripted_model")
def test_max_tokens_that_just_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "q", "--max-tokens", "2028") == 0
    assert capsys.readouterr().out == "an answer\n"


@pytest.mark.usefixtures("scripted_model")
def test_max_tokens_ends_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "long", "--max-tokens", "7", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["text"], result["finish_reason"]) == ("0123456", "length")


def test_default_length_is_cut_to_the_context(
    use: Callable[[Loaded], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use(scripted(ANSWERS, context=30))
    assert generate("--prompt", "long", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["finish_reason"] == "context"
    assert "the context of 30 tokens is full" in err


def test_no_chat_template_is_said(use: Callable[[Loaded], None], capsys: pytest.CaptureFixture[str]) -> None:
    use(scripted(ANSWERS, template=None))
    assert generate("--prompt", "once", "--json") == 0
    out, err = capsys.readouterr()
    assert "no chat template" in err
    assert json.loads(out.splitlines()[-1])["prompt_tokens"] == len("once")


@pytest.mark.usefixtures("scripted_model")
def test_raw_leaves_the_template_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "once", "--raw", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt_tokens"] == len("once")


@pytest.mark.usefixtures("scripted_model")
def test_sampling_without_effect_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "q", "--top-k", "5") == 0
    assert "--top-k has no effect" in capsys.readouterr().err
    assert generate("--prompt", "q", "--top-k", "5", "--temp", "0.5") == 0
    assert "no effect" not in capsys.readouterr().err


def test_seed_and_model_defaults(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint asks for temperature 0.8: seeds differ, and the same seed does not; --temp 0 needs none."""

    def text(*argv: str) -> str:
        assert (
            generate(str(tiny_model), "--prompt", "Once upon a time", "--max-tokens", "16", "--ignore-eos", *argv) == 0
        )
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--temp", "0", "--seed", "1") == text("--temp", "0", "--seed", "2")
