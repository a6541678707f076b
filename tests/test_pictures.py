"""Pages and folders of pictures: whole, self-contained, and the same for the same numbers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from mlxmoe.errors import UserError
from mlxmoe.pictures import Part, check_target, heat_map, new_figure, text_table, write_report


def parts() -> list[Part]:
    figure, axes = new_figure()
    axes.plot([0, 1], [1, 2])
    values = np.arange(12.0).reshape(3, 4)
    values[1, 1] = np.nan
    grid = heat_map(
        values, ["a", "b", "c"], title="t", x="x", y="y", unit="u", columns=["first", "second", "third", "fourth"]
    )
    return [
        Part("Lines & more", "1 < 2", "line", figure),
        Part(name="map", figure=grid, table=[["name", "n"], ["<b>", "1"]]),
        Part(lines=["  kept   as it is", "a < b"]),
    ]


def test_a_page_alone(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    assert write_report(target, "a & b", parts()) == [target]
    page = target.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [target]
    assert page.lower().count("<!doctype") == 1
    assert "<h1>a &amp; b</h1><h2>Lines &amp; more</h2><p>1 &lt; 2</p><svg" in page
    assert "<tr><th>name</th><th>n</th></tr><tr><td>&lt;b&gt;</td><td>1</td></tr>" in page
    assert "<pre>  kept   as it is\na &lt; b</pre>" in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page), "a page needs no other file"


def test_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    written = write_report(target, "title", parts(), {"numbers.json": b"{}"})
    assert [path.name for path in written] == ["report.html", "line.png", "map.png", "numbers.json"]
    assert sorted(target.iterdir()) == sorted(written)
    assert (target / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (target / "numbers.json").read_bytes() == b"{}"


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_report(tmp_path / name, "title", parts()) for name in ("one", "two"))
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_a_map_names_rows_and_columns() -> None:
    figure = heat_map(np.ones((2, 3)), [4, 7], title="t", x="across", y="down", unit="u", columns=["p", "q", "r"])
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "7"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["p", "q", "r"]
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("across", "down", "u")


def test_many_rows_are_not_all_written() -> None:
    figure = heat_map(np.ones((100, 2)), range(100), title="", x="", y="", unit="")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [str(row) for row in range(0, 100, 5)]


def test_table() -> None:
    assert text_table([["a", "bbb"], ["cc", "d"]]) == [" a  bbb", "cc    d"]


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        check_target(tmp_path / "absent" / "x.html")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        check_target(tmp_path / "file")
    check_target(tmp_path / "new")
    check_target(tmp_path)


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib") as error:
        check_target(tmp_path / "x.html")
    assert error.value.hint == "pip install 'mlxmoe[report]'"
