"""Calibration text that the model writes itself, where there is no other: it goes on from short openings.

What a model says by itself is spread like what it will be asked to say, in every language and field that it knows
(self-sampling, as in MoEQuant, arXiv 2505.03804). Of several texts those are kept that use the experts evenly. The openings
below were written for this project.

Shapes: B texts side by side, C texts to choose from, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxmoe.experts import ExpertLayer, KernelExperts
from mlxmoe.parts import NOT_KEPT, Parts

SELF = "self"  # stands where a file of text would be named
_SIDE_BY_SIDE = 16
TAU = 0.05  # a spread of the experts' load of TAU times its mean weighs like one nat a token (docs/options.md)
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
    model: Any,
    tokenizer: Any,
    windows: int,
    window: int,
    seed: int,
    progress: Callable[[int], object],
    candidates: int = 1,
    parts: Parts = NOT_KEPT,
) -> np.ndarray:
    """int32 [windows, window] drawn from the model at temperature 1, one opening after another; the end of a text is no
    end: the model goes on with what it takes for the next one. `candidates` times as many are drawn, and those kept that
    use the experts evenly (`balanced_choice`). The same seed gives the same tokens on the same machine. What is drawn is
    kept in `parts`, and taken from there."""
    openings = [list(tokenizer.encode(text, add_special_tokens=False))[: window - 1] for text in OPENINGS]
    texts, drawn = [], windows * candidates
    for start in range(0, drawn, _SIDE_BY_SIDE):
        chosen = [openings[i % len(openings)] for i in range(start, min(start + _SIDE_BY_SIDE, drawn))]
        shortest = min(map(len, chosen))  # equal lengths: no padding, which not every architecture masks
        written = parts.get(f"text-{start}", np.ndarray)
        if written is None:
            tokens = mx.array([opening[:shortest] for opening in chosen])
            written = _continue(model, tokens, window, mx.random.key((seed << 32) + start))
            parts.keep(f"text-{start}", written)
        texts.append(written.astype(np.int32))
        progress(len(chosen))
    if candidates == 1:
        return np.concatenate(texts)
    readings = [_read_again(model, part) for part in texts]
    loads, surprise = (np.concatenate(values) for values in zip(*readings, strict=True))
    return np.concatenate(texts)[balanced_choice(loads, surprise, windows)]


def balanced_choice(loads: np.ndarray, surprise: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of `count` of C texts, one after the other the one that makes least, for those chosen so far,

        log PPL + sigma / TAU,    sigma = mean over layers of std(load of an expert) / mean(load of an expert)

    low perplexity and an even load, which MoEQuant's expert-balanced self-sampling (arXiv 2505.03804) goes by as well. It
    prunes branches of a text while they grow; here whole texts are chosen.

    loads [C, L, E]: how often each text goes to the experts of each layer. surprise [C]: its mean -log p a token.
    """
    loads = loads.astype(np.float32)
    squares, sizes = np.square(loads).sum(axis=2), loads.sum(axis=2)  # [C, L]
    total, size = np.zeros(loads.shape[1:], np.float32), np.zeros(loads.shape[1], np.float32)
    left, chosen, lost = np.ones(len(loads), bool), [], 0.0
    for taken in range(1, count + 1):
        # sum over experts of (total + load)^2, and what std and mean follow from
        square = np.square(total).sum(axis=1) + 2 * np.einsum("cle,le->cl", loads, total) + squares
        mean = np.maximum(size + sizes, 1) / loads.shape[2]
        spread = np.sqrt(np.maximum(square / loads.shape[2] - mean**2, 0)) / mean
        cost = (lost + surprise) / taken + spread.mean(axis=1) / TAU
        best = int(np.where(left, cost, np.inf).argmin())
        left[best], lost = False, lost + float(surprise[best])
        total, size = total + loads[best], size + sizes[best]
        chosen.append(best)
    return np.sort(chosen)


def _read_again(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loads [B, L, E] and surprise [B] of texts int32 [B, window]."""
    layers = [m for m in model.modules() if isinstance(m, ExpertLayer | KernelExperts)]
    for layer in layers:
        layer.choices.watched = True
    try:
        logits = model(mx.array(tokens[:, :-1])).astype(mx.float32)
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        drawn = mx.take_along_axis(logs, mx.array(tokens[:, 1:, None]), -1)
        surprise = np.array(-drawn.mean(axis=(1, 2)))
        chosen = [layer.choices.take().reshape(len(tokens), -1) for layer in layers]
    finally:
        for layer in layers:
            layer.choices.watched = False
    experts = max((layer.num_experts for layer in layers), default=0)
    loads = [[np.bincount(row, minlength=experts) for row in rows] for rows in chosen]
    return np.array(loads).swapaxes(0, 1), surprise


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
