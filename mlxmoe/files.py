"""Small files that appear whole or not at all, and JSON that says its format and version."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mlxmoe.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """A new file in place of `path`, in UTF-8 and readable by its owner only; on any error `path` is as it was.

    What UTF-8 cannot say becomes a question mark. Raises OSError, also where there is no such folder.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def parse_versioned(text: str, name: str, what: str, kind: str, newest: int, again: str) -> dict[str, Any]:
    """The object of a JSON text with the keys `format` and `version`.

    name: of the file; what, kind: it should be, in words and as its format; again: the hint where it is not. Raises
    UserError for text that is no JSON, another format, and a version above `newest`.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not valid JSON ({error})", again) from None
    if not isinstance(data, dict) or data.get("format") != kind:
        raise UserError(f"{name} is not {what}", again)
    version = data.get("version")
    if isinstance(version, int) and version > newest:
        raise UserError(
            f"{name} has format version {version}, this mlxmoe reads up to {newest}",
            "update mlxmoe: pip install --upgrade mlxmoe",
        )
    return data
