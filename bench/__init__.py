"""Measuring: every performance number of the project is printed by a command in this package."""
