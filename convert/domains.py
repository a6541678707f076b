"""Text in domains: every domain has the same number of tokens, and every window belongs to one.

A domain is what a line of a .jsonl file says under the key `domain`, `kind` or `source`, the first of these that every line
has with few values in all; else it is the file's name without its ending.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxmoe.convert.calibrate import Calibration, choose_tokens, read_documents
from mlxmoe.errors import UserError

KEYS = ("domain", "kind", "source")
_MAX_DOMAINS = 32  # more values under a key name documents, not domains


class Windows(NamedTuple):
    """tokens int32 [windows, window], names of the domains, and of each window the domain it belongs to [windows]."""

    tokens: np.ndarray
    domains: tuple[str, ...]
    domain: np.ndarray

    @property
    def domain_tokens(self) -> np.ndarray:
        """int64 [domains]."""
        return np.bincount(self.domain, minlength=len(self.domains)) * self.tokens.shape[1]


def read_domains(paths: Sequence[str | Path], tokenizer: Any) -> dict[str, list[str]]:
    """The documents of all files by domain, domains in the order of their names. Raises UserError as read_documents does."""
    found: dict[str, list[str]] = {}
    for path in map(Path, paths):
        documents = read_documents(path, tokenizer)
        for document, domain in zip(documents, _labels(path, len(documents)), strict=True):
            found.setdefault(domain, []).append(document)
    return dict(sorted(found.items()))


def choose_windows(domains: dict[str, list[str]], tokenizer: Any, max_tokens: int, window: int) -> Windows:
    """Up to `max_tokens` tokens in full windows, evenly of every domain; at least a window of each.

    Documents are cut and follow each other in a fixed pseudo-random order (calibrate.choose_tokens). Raises UserError for
    settings that make no sense and for a domain of less than a window.
    """
    if max_tokens < 1:
        raise UserError(f"--max-tokens {max_tokens} is not a number of tokens", "16384 is the default")
    if window < 2:
        raise UserError(f"a window of {window} tokens predicts nothing", "--window 512 is the default")
    share = max(window, max_tokens // len(domains))
    try:
        parts = [
            choose_tokens(documents, tokenizer, Calibration(f"the text of {name}", tokens=share, window=window), seed=0)
            for name, documents in domains.items()
        ]
    except UserError as error:
        raise UserError(error.message, "give more of it, or a smaller --window") from None
    number = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Windows(np.concatenate(parts), tuple(domains), number)


def _labels(path: Path, count: int) -> list[str]:
    """The domain of each document of a file that read_documents has read."""
    own = [path.stem] * count
    if path.suffix != ".jsonl":
        return own
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = [row for row in rows if str(row.get("text", row.get("messages"))).strip()]
    for key in KEYS:
        values = [row.get(key) for row in rows]
        if len(values) == count and all(isinstance(v, str) and v for v in values) and len(set(values)) <= _MAX_DOMAINS:
            return [str(value) for value in values]
    return own
