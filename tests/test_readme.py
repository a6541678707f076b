"""README's tree names every module of the package once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tree() -> dict[str, str]:
    """Top folder -> what the tree says of it."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree\n\n```\n")[2].partition("```")[0]
    parts = re.split(r"^(\w+)/", block, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def files(folder: str, suffix: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).glob(f"*{suffix}"))


def test_every_module_of_the_package_once() -> None:
    assert sorted(re.findall(r"(\w+)\.py\b", tree()["mlxmoe"])) == files("mlxmoe", ".py")


@pytest.mark.parametrize("folder", ["convert", "bench"])
def test_every_module_of_a_folder_at_the_top_once(folder: str) -> None:
    lines = [line.strip().partition("  ")[0] for line in tree()[folder].splitlines() if line.strip()]
    named = [name for line in lines for name in line.split(", ")]
    assert sorted([*named, "__init__"]) == files(folder, ".py")


def test_every_page_of_docs_once() -> None:
    assert sorted(re.findall(r"\w+", tree()["docs"])) == files("docs", ".md")
