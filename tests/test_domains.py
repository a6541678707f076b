"""Text in domains: which file and line belongs where, and that every domain has its share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlxmoe.convert.domains import choose_windows, read_domains
from mlxmoe.errors import UserError


class Letters:
    """A token per character."""

    chat_template = None

    def encode(self, text: str, verbose: bool = True) -> list[int]:
        return [ord(character) for character in text]


def write(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_key_names_the_domain(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        [
            {"text": "b1", "domain": "b", "kind": "x"},
            {"text": "a1", "domain": "a", "kind": "x"},
            {"text": "b2", "domain": "b"},
        ],
    )
    assert read_domains([path], Letters()) == {"a": ["a1"], "b": ["b1", "b2"]}


@pytest.mark.parametrize("key", ["domain", "kind", "source"])
def test_keys(key: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "file.jsonl",
        [{"text": "one", key: "here"}, {"text": "", key: "blank"}, {"text": "two", key: "there"}],
    )
    assert read_domains([path], Letters()) == {"here": ["one"], "there": ["two"]}


def test_the_first_key_that_every_line_has(tmp_path: Path) -> None:
    rows = [{"text": "one", "domain": "d", "kind": "k1"}, {"text": "two", "kind": "k2"}]
    assert list(read_domains([write(tmp_path / "f.jsonl", rows)], Letters())) == ["k1", "k2"]


def test_otherwise_the_file_is_one(tmp_path: Path) -> None:
    """No key, a key that is no word, or one that names documents and not domains."""
    none = write(tmp_path / "none.jsonl", [{"text": "one"}, {"messages": [{"role": "user", "content": "two"}]}])
    number = write(tmp_path / "number.jsonl", [{"text": "three", "domain": 3}])
    many = write(tmp_path / "many.jsonl", [{"text": f"text {i}", "source": f"book {i}"} for i in range(33)])
    (tmp_path / "plain.txt").write_text("four", encoding="utf-8")
    found = read_domains([none, number, many, tmp_path / "plain.txt"], Letters())
    assert list(found) == ["many", "none", "number", "plain"]
    assert found["none"] == ["one", "two"]
    assert len(found["many"]) == 33


def test_files_of_one_domain_are_put_together(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", [{"text": "one", "domain": "d"}])
    second = write(tmp_path / "2.jsonl", [{"text": "two", "domain": "d"}])
    assert read_domains([first, second], Letters()) == {"d": ["one", "two"]}


def test_even_shares_in_windows_of_one_domain() -> None:
    domains = {"a": ["a" * 1000], "b": ["b" * 70, "b" * 90], "c": ["c" * 33]}
    windows = choose_windows(domains, Letters(), max_tokens=320, window=16)
    assert windows.domains == ("a", "b", "c")
    assert windows.tokens.shape[1] == 16
    for window, domain in zip(windows.tokens, windows.domain, strict=True):
        assert set(window.tolist()) == {ord("abc"[domain])}
    assert windows.domain_tokens.tolist() == [96, 96, 32]  # 320 / 3 = 106: six windows each; two of the short domain
    np.testing.assert_array_equal(choose_windows(domains, Letters(), 320, 16).tokens, windows.tokens)


def test_a_window_of_every_domain_at_least() -> None:
    windows = choose_windows({"a": ["a" * 50], "b": ["b" * 50]}, Letters(), max_tokens=10, window=32)
    assert windows.domain.tolist() == [0, 1]


def test_a_domain_that_is_too_short() -> None:
    with pytest.raises(UserError, match="the text of b is too short: 1 tokens, and one window takes 32") as error:
        choose_windows({"a": ["a" * 50], "b": ["b"]}, Letters(), max_tokens=64, window=32)
    assert error.value.hint == "give more of it, or a smaller --window"


@pytest.mark.parametrize(("tokens", "window"), [(0, 16), (64, 1)])
def test_settings_that_make_no_sense(tokens: int, window: int) -> None:
    with pytest.raises(UserError, match=r"is not a number of tokens|predicts nothing"):
        choose_windows({"a": ["a" * 50]}, Letters(), tokens, window)
