"""mlxmoe: Mixture-of-Experts language models on Apple Silicon at the best quality per byte.

import mlxmoe
model, tokenizer = mlxmoe.load("path or Hub id", memory="8GB")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["UserError", "load"]

if TYPE_CHECKING:
    from mlxmoe.errors import UserError
    from mlxmoe.loading import load


def __getattr__(name: str) -> Any:
    """Imports MLX only when something of it is asked for, so that `mlxmoe --version` is quick."""
    if name == "load":
        import importlib

        return importlib.import_module("mlxmoe.loading").load
    if name == "UserError":
        from mlxmoe.errors import UserError

        return UserError
    raise AttributeError(f"module 'mlxmoe' has no attribute {name!r}")
