"""The tokens that a conversion is calibrated by: from a file, from the Hub, or written by the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.convert.calibrate import Calibration, choose_tokens, read_documents
from mlxmoe.convert.hubtext import HUB, hub_documents
from mlxmoe.convert.selftext import SELF, own_text
from mlxmoe.errors import UserError
from mlxmoe.loading import open_model
from mlxmoe.parts import Parts
from mlxmoe.work import save_arrays


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """Raises UserError for a folder without a usable one."""
    try:
        return load_tokenizer(checkpoint.folder)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        raise UserError(
            f"{checkpoint.name} has no usable tokenizer ({error})",
            "calibration needs it: copy tokenizer.json of the original model into the folder, or use --method rtn",
        ) from error


def calibration_tokens(
    checkpoint: Checkpoint, text: Calibration, tokenizer: Any, seed: int, folder: Path, quiet: bool
) -> np.ndarray:
    """int32 [windows, window]. What the model writes or the Hub gives is kept in `folder`: neither need come out the same
    again. Raises UserError for text that is too short."""
    if text.file not in (SELF, HUB):
        return choose_tokens(read_documents(text.file, tokenizer), tokenizer, text, seed)
    path = folder / "tokens.npz"
    if not path.is_file():
        if text.file == SELF:
            tokens = _own_text(checkpoint, text, seed, Parts(folder), quiet)
        else:
            documents = hub_documents(tokenizer, text.windows * text.window, seed)
            tokens = choose_tokens(documents, tokenizer, text, seed)
        save_arrays(path, {"tokens": tokens})
        for written in folder.glob("text-*.json"):
            written.unlink()
    with np.load(path) as saved:
        return np.array(saved["tokens"])


def _own_text(checkpoint: Checkpoint, text: Calibration, seed: int, parts: Parts, quiet: bool) -> np.ndarray:
    """What the model writes. The whole model must fit in memory for it."""
    loaded, drawn = open_model(checkpoint.folder), text.windows * text.candidates
    with tqdm(total=drawn, unit=" texts", desc="write text", disable=quiet) as bar:
        return own_text(
            *(loaded.model, loaded.tokenizer, text.windows, text.window),
            seed=seed,
            progress=bar.update,
            candidates=text.candidates,
            parts=parts,
        )
