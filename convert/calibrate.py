"""Calibration text: from a file to windows of tokens, the same ones every time.

A `.jsonl` file has one document per line, `{"text": ...}` or a chat `{"messages": [{"role": ..., "content": ...}, ...]}`,
which the tokenizer's template turns into text; any other file is one document. Documents are visited in a fixed
pseudo-random order, at most `window` tokens of each at a time, so that a small budget covers many of them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mlxmoe.errors import UserError

TOKENS_PER_EXPERT = 64  # fewer per expert on average say too little about its inputs
METHODS = ("gptq", "awq")  # of choosing codes by the text
MOST_TOKENS, FEWEST_TOKENS = 524_288, 16_384  # that are used unless a number is given
PARAMETERS_PER_TOKEN = 128


@dataclass(frozen=True)
class Calibration:
    """How a conversion is calibrated. `file`: text; `sha256` of it, filled in by `read_documents`' caller.

    tokens: None leaves them to `default_tokens`. method: one of METHODS. mu: what the errors of the levels below the one
    written count beside its own (gptq.py). predecessors: statistics for writing come from layers whose predecessors are
    quantized already. candidates: texts that the model writes for each that is kept (selftext.py).
    """

    file: str
    sha256: str = ""
    tokens: int | None = None
    window: int = 512
    method: str = METHODS[0]
    mu: float = 0.0
    predecessors: bool = True
    candidates: int = 2

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"--calibration-tokens {self.tokens} is not a number of tokens", "try 131072")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method} is not one of {', '.join(METHODS)}", "gptq is the default")
        if self.method == "awq" and self.mu:
            raise UserError("--nested and --method awq do not go together", "leave one of them out")
        if not 1 <= self.candidates <= 64:
            raise UserError(f"--candidates {self.candidates} is not between 1 and 64", "2 is the default")
        if self.window < 2:
            raise UserError(f"a calibration window of {self.window} tokens predicts nothing", "512 is the default")
        if not 0 <= self.mu <= 10:
            raise UserError(
                f"--nested {self.mu} is not between 0 and 10",
                "1 is a good choice for one file that serves many sizes",
            )

    @property
    def windows(self) -> int:
        """How many full windows `tokens` make, at least one."""
        assert self.tokens is not None, "decided by for_model"
        return max(1, self.tokens // self.window)

    def for_model(self, num_parameters: int) -> Calibration:
        """The same with the number of tokens decided."""
        return self if self.tokens is not None else replace(self, tokens=default_tokens(num_parameters))


def default_tokens(num_parameters: int) -> int:
    """Tokens of calibration for a model: MOST_TOKENS, for small ones one for every PARAMETERS_PER_TOKEN parameters, but not
    less than FEWEST_TOKENS."""
    return min(MOST_TOKENS, max(FEWEST_TOKENS, num_parameters // PARAMETERS_PER_TOKEN))


def file_sha256(path: str | Path) -> str:
    """Raises UserError for a file that is not there."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        found = (
            "there is no calibration file" if isinstance(error, FileNotFoundError) else "not a file that can be read:"
        )
        raise UserError(
            f"{found} {path} ({error.strerror})", "give a text file or a .jsonl with the key text"
        ) from None


def read_documents(path: str | Path, tokenizer: Any) -> list[str]:
    """The documents of a file. Raises UserError naming the file and the line."""
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read as text ({reason})", "give a UTF-8 text file or .jsonl") from None
    documents = [content] if path.suffix != ".jsonl" else list(_json_lines(path, content, tokenizer))
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise UserError(f"{path} holds no text", "give a file with some text in it")
    return documents


def _json_lines(path: Path, content: str, tokenizer: Any) -> Iterator[str]:
    hint = 'every line must be a JSON object such as {"text": "..."} or {"messages": [...]}'
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg})", hint) from None
        try:
            text = document_text(row, tokenizer)
        except UserError as error:
            raise UserError(f"{path} line {number}: {error.message}", error.hint) from None
        if text is None:
            raise UserError(f"{path} line {number} has neither text nor messages", hint)
        yield text


def document_text(row: Any, tokenizer: Any) -> str | None:
    """The text of a row, {"text": ...} or {"messages": [...]}; None for one that has neither. Raises UserError for a chat
    that the model's template refuses."""
    text, messages = (row.get(key) if isinstance(row, dict) else None for key in ("text", "messages"))
    if isinstance(text, str):
        return text
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        return None
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n\n".join(str(message.get("content", "")) for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the model's chat template refuses it ({error})", "correct the roles of its messages"
        ) from None


def choose_tokens(documents: Sequence[str], tokenizer: Any, calibration: Calibration, seed: int) -> np.ndarray:
    """int32 [windows, window]: documents one after another in pseudo-random order, cut into full windows.

    Raises UserError when there is not even one window.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    window = calibration.window
    wanted = calibration.windows
    pieces: list[list[int]] = []
    for i in order:
        tokens = list(tokenizer.encode(documents[i], verbose=False))
        pieces += [tokens[start : start + window] for start in range(0, len(tokens), window)]
    random.Random(seed + 1).shuffle(pieces)
    stream: list[int] = []
    for piece in pieces:
        stream += piece
        if len(stream) >= wanted * window:
            break
    count = min(wanted, len(stream) // window)
    if count == 0:
        raise UserError(
            f"{calibration.file} is too short: {len(stream)} tokens, and one window takes {window}",
            "give a longer text",
        )
    return np.array(stream[: count * window], np.int32).reshape(count, window)
