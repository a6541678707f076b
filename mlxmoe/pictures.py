"""Reports with pictures: one HTML page that needs no other file, or a folder with that page and every picture as PNG.

Pictures are matplotlib's, which is imported only where one is drawn (`pip install 'mlxmoe[report]'`). Colours keep apart for
colour-blind readers: those of Okabe and Ito for lines and bars, viridis for maps. Whoever reports decides what is drawn.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxmoe.errors import UserError
from mlxmoe.work import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
PAGE = "report.html"
_STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em;line-height:1.4}pre{overflow-x:auto}"
    "svg{max-width:100%;height:auto}table{border-collapse:collapse}td,th{padding:.15em .7em;text-align:right}"
    "th{border-bottom:1px solid #888}td:first-child,th:first-child{text-align:left}"
)
_TICKS = 24  # the most that are written along an axis


class Part(NamedTuple):
    """A piece of a page, each field where it is not empty, in this order. `figure`: of matplotlib, `name` its file's without
    ending. `table`: rows of cells, the first row its headings. `lines`: text of fixed width."""

    heading: str = ""
    text: str = ""
    name: str = ""
    figure: Any = None
    table: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()


def check_target(target: Path) -> None:
    """Raises UserError before any work is done: no matplotlib, or no place to write to."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed", "pip install 'mlxmoe[report]'") from None
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}", "make it first, or write the report somewhere else")
    if target.suffix != ".html" and target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, and a report that is no .html is a folder", "give another name")


def write_report(target: Path, title: str, parts: Sequence[Part], files: Mapping[str, bytes] = {}) -> list[Path]:
    """NAME.html: the page alone. Any other name: a folder with the page, a PNG per figure and `files`. Returns what was
    written; each file whole or not at all."""
    page = _page(title, parts).encode()
    if target.suffix == ".html":
        write_whole(target, page)
        return [target]
    target.mkdir(exist_ok=True)
    pictures = {f"{part.name}.png": _rendered(part.figure, "png") for part in parts if part.figure is not None}
    for name, data in {PAGE: page, **pictures, **files}.items():
        write_whole(target / name, data)
    return [target / name for name in (PAGE, *pictures, *files)]


def new_figure(width: float = 7.5, height: float = 4.5) -> tuple[Any, Any]:
    """A figure and its axes; inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def heat_map(
    values: np.ndarray,
    rows: Sequence[object],
    *,
    title: str,
    x: str,
    y: str,
    unit: str,
    columns: Sequence[object] | None = None,
    colours: str = "viridis",
    low: float | None = 0.0,
    high: float | None = None,
) -> Any:
    """A figure of values [rows, columns] with the names of the rows, and of the columns where they are given. NaN is left
    blank."""
    figure, axes = new_figure(height=1.8 + 0.22 * min(40, max(6, len(rows))))
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_facecolor("#DDDDDD")
    step = -(-len(rows) // _TICKS)
    axes.set_yticks(range(0, len(rows), step), [str(name) for name in rows[::step]])
    if columns is not None:
        step = -(-len(columns) // _TICKS)
        turn = 45 if max(len(str(name)) for name in columns) > 3 else 0
        names = [str(name) for name in columns[::step]]
        axes.set_xticks(range(0, len(columns), step), names, rotation=turn, ha="right" if turn else "center")
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns, for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _rendered(figure: Any, kind: str) -> bytes:
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "mlxmoe"}):  # the same page for the same numbers
        figure.savefig(data, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    figure.set_layout_engine("none")  # everything has its place: the next rendering need not look for it again
    return data.getvalue()


def _svg(figure: Any) -> str:
    """The figure as an element of a page: without the XML declaration and document type before it."""
    text = _rendered(figure, "svg").decode()
    return text[text.index("<svg") :]


def _page(title: str, parts: Sequence[Part]) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(map(_part, parts))}</body></html>\n"
    )


def _part(part: Part) -> str:
    pieces = []
    if part.heading:
        pieces.append(f"<h2>{html.escape(part.heading)}</h2>")
    if part.text:
        pieces.append(f"<p>{html.escape(part.text)}</p>")
    if part.figure is not None:
        pieces.append(_svg(part.figure))
    if part.table:
        head, *rows = part.table
        pieces.append("<table>" + _row(head, "th") + "".join(_row(row, "td") for row in rows) + "</table>")
    if part.lines:
        pieces.append("<pre>" + html.escape("\n".join(part.lines)) + "</pre>")
    return "".join(pieces)


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
