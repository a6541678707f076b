"""Parts of long work that are kept: they come back as they were, and only the same work goes on with them."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mlxmoe.errors import UserError
from mlxmoe.parts import NOT_KEPT, from_plain, kept_parts, to_plain


class Inner(NamedTuple):
    name: str
    values: np.ndarray


class Outer(NamedTuple):
    number: float
    count: int
    inner: Inner
    perhaps: Inner | None
    rows: tuple[Inner, ...]
    cells: list[tuple[str | float, ...]]
    matrix: np.ndarray


def outer() -> Outer:
    random = np.random.default_rng(0)
    inner = Inner("ä", random.standard_normal(5))
    matrix = np.arange(6).reshape(2, 3)
    return Outer(
        np.float64(1 / 3), 7, inner, None, (inner, Inner("b", np.array([math.nan, 1.0]))), [("x", 0.1)], matrix
    )


def test_what_is_kept_comes_back_to_the_bit() -> None:
    value = outer()
    found = from_plain(Outer, json.loads(json.dumps(to_plain(value))))
    assert type(found) is Outer
    assert type(found.inner) is Inner
    assert (found.number, found.count, found.perhaps, found.cells) == (1 / 3, 7, None, [("x", 0.1)])
    for got, wanted in zip((found.inner, *found.rows), (value.inner, *value.rows), strict=True):
        assert got.name == wanted.name
        np.testing.assert_array_equal(got.values, wanted.values)
        assert got.values.dtype == np.float64
    np.testing.assert_array_equal(found.matrix, value.matrix)
    assert found.matrix.dtype == np.int64


def test_nothing_is_kept_without_a_folder() -> None:
    NOT_KEPT.keep("a", outer())
    assert NOT_KEPT.get("a", Outer) is None


def stop(output: Path, job: dict[str, object], error: BaseException, kept: bool = True) -> None:
    """A run that ends in the middle, behind one part or before any."""
    with kept_parts(output, "work", job, False) as (_, parts):
        if kept:
            parts.keep("one", outer())
        raise error


def test_goes_on_with_the_same_work_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, job = tmp_path / "out", {"text": {"a": 1, "b": 2}, "window": 3}
    output.write_text("older")
    with pytest.raises(KeyboardInterrupt):
        stop(output, job, KeyboardInterrupt())
    assert f"{output}.partial keeps what is done: the same command with --resume goes on" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds an unfinished work"), kept_parts(output, "work", job, False):
        pass
    other = {"text": {"a": 1, "b": 5}, "window": 4}
    with (
        pytest.raises(UserError, match=r"started with other text\.b and window"),
        kept_parts(output, "work", other, True),
    ):
        pass
    with kept_parts(output, "work", job, True) as (folder, parts):
        assert parts.get("one", Outer) is not None
        assert parts.get("two", Outer) is None
        assert folder.is_dir()
    assert output.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no unfinished work"), kept_parts(tmp_path / "out", "work", {}, True):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("error", [UserError("no", "yes"), PermissionError(13, "no"), KeyboardInterrupt()])
def test_what_ends_before_there_is_a_part_leaves_nothing(error: BaseException, kept: bool, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        stop(tmp_path / "out", {}, error, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"] * kept


def test_full_disk_keeps_the_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        stop(tmp_path / "out", {}, OSError(errno.ENOSPC, "No space left on device"))
    with kept_parts(tmp_path / "out", "work", {}, True) as (_, parts):
        assert parts.get("one", Outer) is not None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with kept_parts(tmp_path / "out", "work", {}, False) as (_, parts):
        parts.keep("one", outer())
        with pytest.raises(UserError, match="another process"), kept_parts(tmp_path / "out", "work", {}, True):
            pass
        assert parts.get("one", Outer) is not None
