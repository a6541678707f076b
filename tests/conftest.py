"""Shared fixtures. The evaluation data and the trained test model live beside the project, never in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlxmoe.convert.calibrate import Calibration

SHORT = 64
SHARED = Path(__file__).resolve().parents[2] / "shared"


def _absent(what: str) -> None:
    """Skips visibly; in CI the data must be there, so its absence is a failure."""
    message = f"{what} is not beside the project"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of evaluation data and models beside the project."""
    if not SHARED.is_dir():
        _absent("the folder ../shared")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(shared_dir: Path) -> Path:
    """A trained 20M-parameter DeepSeek-V3-style MoE in Hugging Face format (bfloat16)."""
    path = shared_dir / "models" / "tiny-deepseek-v3"
    if not (path / "config.json").is_file():
        _absent(f"the test model {path.name}")
    return path


@pytest.fixture(scope="module")
def short_windows() -> Iterator[None]:
    """`mlxmoe convert` with windows of SHORT tokens of calibration text in place of 512: toy models need no more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mlxmoe.convert.cli.Calibration", partial(Calibration, window=SHORT))
        yield


@pytest.fixture
def limits() -> Iterator[None]:
    """Loading and converting set MLX's limits for the whole process: none at first, and those of before afterwards."""
    memory, cache = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)
