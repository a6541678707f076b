"""Errors that a person can act on. This file imports nothing from the package."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: one sentence with what was found and what was expected, and a hint for what to do.

    The command line prints both lines and exits with status 2; Python callers get an ordinary ValueError.
    """

    def __init__(self, message: str, hint: str):
        super().__init__(f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint
