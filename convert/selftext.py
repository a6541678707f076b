"""Calibration text that the model writes itself, where there is no other: it goes on from short openings.

What a model says by itself is spread like what it will be asked to say, in every language and field that it knows
(self-sampling, as in MoEQuant, arXiv 2505.03804, without its choice of branches by the balance of the experts). The
openings below were written for this project.

Shapes: B texts side by side, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

SELF = "self"  # stands where a file of text would be named
_SIDE_BY_SIDE = 16
OPENINGS = (
    "The history of the town begins with",
    "In this chapter we show that every",
    "def merge(left, right):\n    ",
    "Q: How many apples are left if",
    "User: Could you help me with my letter?\nAssistant:",
    "Once upon a time, in a small house by the sea,",
    "#include <vector>\n\nint main() {",
    "Theorem. Let f be a continuous function on",
    "The committee decided on Tuesday that",
    "Ingredients: two eggs, 200 g of flour,",
    "SELECT name, count(*) FROM",
    "Dear Professor, thank you for",
    "Die Geschichte der Stadt beginnt mit",
    "La première fois que nous avons vu",
    "Había una vez un hombre que",
    "人类最早的城市出现在",
    "日本の夏はとても",
    "Abstract. We study the effect of",
    '{"name": "example", "items": [',
    "Step 1: open the settings and",
    "The patient was treated with",
    "Under the terms of this agreement, the",
    "fn main() {\n    let mut total = 0;",
    "Solve for x: 3x + 7 =",
)


def own_text(
    model: Any, tokenizer: Any, windows: int, window: int, seed: int, progress: Callable[[int], object]
) -> np.ndarray:
    """int32 [windows, window] drawn from the model at temperature 1, one opening after another; the end of a text is no
    end: the model goes on with what it takes for the next one. The same seed gives the same tokens on the same machine."""
    openings = [list(tokenizer.encode(text, add_special_tokens=False))[: window - 1] for text in OPENINGS]
    parts = []
    for start in range(0, windows, _SIDE_BY_SIDE):
        chosen = [openings[i % len(openings)] for i in range(start, min(start + _SIDE_BY_SIDE, windows))]
        shortest = min(map(len, chosen))  # equal lengths: no padding, which not every architecture masks
        tokens = mx.array([opening[:shortest] for opening in chosen])
        parts.append(_continue(model, tokens, window, mx.random.key((seed << 32) + start)))
        progress(len(chosen))
    return np.concatenate(parts)


def _continue(model: Any, tokens: mx.array, window: int, key: mx.array) -> np.ndarray:
    """tokens [B, n] -> int32 [B, window]."""
    cache = make_prompt_cache(model)
    written, fresh = [tokens], tokens
    for part in mx.random.split(key, window - tokens.shape[1]):
        logits = model(fresh, cache=cache)[:, -1].astype(mx.float32)
        fresh = mx.random.categorical(logits, key=part)[:, None]
        written.append(fresh)
        mx.eval(fresh)
    return np.array(mx.concatenate(written, axis=1), dtype=np.int32)
