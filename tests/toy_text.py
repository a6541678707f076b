"""Text for tests that calibrate and score: words drawn at random, and letters in two domains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = ("the", "experts", "of", "a", "layer", "are", "chosen", "by", "its", "router", "for", "every", "token")


def write_words(path: Path, words: int = 2000, seed: int = 0) -> Path:
    path.write_text(" ".join(np.random.RandomState(seed).choice(WORDS, words)))
    return path


def write_domains(path: Path) -> Path:
    """.jsonl of four documents of 300 letters in each of two domains, `digits` and `vowels`."""
    rng = np.random.default_rng(0)
    rows = []
    for domain, letters in (("vowels", "aeiou "), ("digits", "0123456789 ")):
        rows += [{"text": "".join(rng.choice(list(letters), 300)), "domain": domain} for _ in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
