"""Calibration text from the Hub, with a stand-in for the package that reads it: there is no network here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_checkpoints import convert, load_plan, write_qwen3

from mlxmoe.convert.hubtext import DATA_SET, hub_documents
from mlxmoe.errors import UserError

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 2}


class Library(ModuleType):
    """A package `datasets` that streams chats, or fails as it is told."""

    def __init__(self, error: Exception | None = None, broken_after: int | None = None):
        super().__init__("datasets")
        self.error, self.broken_after = error, broken_after
        self.calls: list[Any] = []
        self.read = 0

    def load_dataset(self, name: str, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        self.calls.append((name, split, streaming))
        if self.error is not None:
            raise self.error
        return self._rows()

    def _rows(self) -> Iterator[dict[str, Any]]:
        for i in range(20000):
            if i == self.broken_after:
                raise ConnectionResetError("gone")
            self.read += 1
            yield {
                "messages": [
                    {"role": "user", "content": f"Question {i}?"},
                    {"role": "assistant", "content": "Yes. " * 40},
                ]
            }


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setitem(sys.modules, "datasets", made)
    return made


PLAIN = SimpleNamespace(chat_template=None)


def test_chats_in_an_order_of_the_seed_and_not_all_of_the_set(library: Library) -> None:
    documents = hub_documents(PLAIN, 2000, seed=0)
    assert library.calls == [(DATA_SET, "train", True)]
    assert documents == hub_documents(PLAIN, 2000, seed=0)
    assert documents != hub_documents(PLAIN, 2000, seed=1)
    assert 8 * 2000 <= sum(map(len, documents)) < 9 * 2000
    numbers = [int(d.split()[1].rstrip("?")) for d in documents]
    assert numbers != sorted(numbers)
    assert library.read < 4 * 5000


def test_chats_that_the_template_refuses_are_left_out(library: Library) -> None:
    class Picky:
        chat_template = "..."

        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            if messages[0]["content"].startswith("Question 1"):
                raise ValueError("no ones")
            return f"[{messages[0]['content']}]"

    documents = hub_documents(Picky(), 2000, seed=0)
    assert documents
    assert not any("Question 1" in d for d in documents)
    Picky.apply_chat_template = lambda *_, **__: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):  # what is no refusal is not swallowed
        hub_documents(Picky(), 2000, seed=0)


def test_nothing_that_can_be_used(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_rows", lambda: iter([{"messages": []}, {"other": 1}]))
    with pytest.raises(UserError, match="can be used with this model"):
        hub_documents(PLAIN, 2000, seed=0)


@pytest.mark.parametrize("broken_after", [0, 5000])
def test_a_network_that_is_not_there(broken_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(ConnectionError("no route"), None) if not broken_after else Library(None, broken_after)
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(UserError, match=r"cannot be read from the Hub \(Connection") as caught:
        hub_documents(PLAIN, 200_000, seed=0)
    assert "--calibration FILE" in caught.value.hint


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets") as caught:
        hub_documents(PLAIN, 2000, seed=0)
    assert "mlxmoe[hub]" in caught.value.hint


def test_converted_by_it_and_read_once(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversion that is resumed has the tokens of before, also without a network."""
    source = write_qwen3(tmp_path / "source", **SMALL)
    given = [
        "--bpw",
        "8",
        "--calibration",
        "hub",
        "--calibration-tokens",
        "512",
        "--rotation",
        "none",
        "--polish",
        "none",
    ]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxmoe.convert.job.measure", stop)
        assert convert(source, tmp_path / "out", *given) == 130
    with np.load(tmp_path / "out.partial" / "state" / "tokens.npz") as saved:
        assert saved["tokens"].shape == (1, 512)
    library.error = ConnectionError("no route")
    assert convert(source, tmp_path / "out", *given, "--resume") == 0
    assert load_plan(tmp_path / "out").settings["calibration"]["file"] == "hub"
    assert convert(source, tmp_path / "other", *given) == 2
    assert "cannot be read from the Hub" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
