"""Calibration text from the Hub: chats of the data set that mlx-lm's DWQ learns from unless it is told otherwise.

(mlx-lm's other learned quantizers, AWQ, GPTQ and dynamic, take a text file that lies outside the Hub.)
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from mlxmoe.convert.calibrate import document_text
from mlxmoe.errors import UserError

HUB = "hub"  # stands where a file of text would be named
DATA_SET = "allenai/tulu-3-sft-mixture"
_CHARACTERS_PER_TOKEN = 8  # read for every token that is wanted: more than any text takes
_BUFFER = 4096  # rows among which the order is drawn, so that not all of the set is read


def hub_documents(tokenizer: Any, tokens: int, seed: int) -> list[str]:
    """Chats of the data set as the model's template has them, more than `tokens` tokens. The same seed draws the same rows
    of the same revision. Chats that the template refuses are left out.

    Raises UserError without the package `datasets` or without a connection.
    """
    documents, length = [], 0
    for row in _rows(tokens * _CHARACTERS_PER_TOKEN, seed):
        try:
            text = document_text(row, tokenizer)
        except UserError:
            continue
        documents.append(text or "")
        length += len(documents[-1])
    if not length:
        raise UserError(f"no chat of {DATA_SET} can be used with this model", "give --calibration FILE, or self")
    return documents


def _rows(characters: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the data set in an order drawn from `seed`, until they have so many characters."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "calibration text from the Hub needs the package datasets",
            "pip install 'mlxmoe[hub]', or give --calibration FILE, or self",
        ) from None
    rows: list[dict[str, Any]] = []
    try:
        stream = iter(datasets.load_dataset(DATA_SET, split="train", streaming=True))
        while characters > 0 and (part := list(itertools.islice(stream, _BUFFER))):
            random.Random(seed + len(rows)).shuffle(part)
            for row in part:
                if characters <= 0:
                    break
                rows.append(row)
                characters -= sum(len(str(message.get("content", ""))) for message in row.get("messages", ()))
    except Exception as error:  # from the network, the Hub or the file format: the package has no common class for them
        raise UserError(
            f"the data set {DATA_SET} cannot be read from the Hub ({type(error).__name__})",
            "check the network connection, or give --calibration FILE, or self",
        ) from error
    return rows
