"""What tests of converted folders do with them: open them with less memory, or streamed, and compare what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxmoe import loading
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.plan import Plan
from mlxmoe.prepared import full_memory, prepare, smallest_memory

PROMPT = mx.array([[5 + i * 7 % 250 for i in range(40)]])


def written_levels(folder: Path) -> list[list[tuple[int, ...]]]:
    """[layer][expert][projection]."""
    return [[entry.levels for entry in layer.experts] for layer in Plan.load(folder).layers]


def open_reduced(folder: Path, **config: Any) -> Loaded:
    """With half of what lies between the least memory that works and what everything takes."""
    prepared = prepare(folder, RuntimeConfig(context=64, **config))
    loaded = open_model(folder, RuntimeConfig((smallest_memory(prepared) + full_memory(prepared)) // 2, 64, **config))
    assert loaded.report.mode == "elastic"
    return loaded


def open_streamed(folder: Path, **config: Any) -> Loaded:
    """With the least memory that works."""
    asked = RuntimeConfig(None, 64, threads=2, direct=False, **config)
    prepared = prepare(folder, asked)
    memory = prepared.streaming(0).least_memory
    return loading._open_streamed(prepared, memory, replace(asked, memory=memory))


def logits(loaded: Loaded, tokens: mx.array = PROMPT) -> np.ndarray:
    return np.array(loaded.model(tokens).astype(mx.float32))


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """float32 products of the same values in another order."""
    np.testing.assert_allclose(found, expected, atol=2e-4 * float(np.abs(expected).max()))
