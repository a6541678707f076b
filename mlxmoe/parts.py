"""Long work whose result is small: what each of its parts found is kept beside the result until all of them are there.

    OUT.partial/state/   job.json (what the work is, to be resumed only as the same), <part>.json per finished part, and
                         files of whoever works there

A part is a NamedTuple or plain data. Numbers come back as they were: JSON holds every digit of a float64, and NaN.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from mlxmoe.work import WorkFolder, write_whole

T = TypeVar("T")


class Parts:
    """Finished parts in `folder`, by name; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder

    def get(self, name: str, kind: type[T]) -> T | None:
        """What `keep` was given; None for a part that is not finished."""
        if self._folder is None or not self._path(name).is_file():
            return None
        found: T = from_plain(kind, json.loads(self._path(name).read_text(encoding="utf-8")))
        return found

    def keep(self, name: str, value: object) -> None:
        """Appears whole or not at all."""
        if self._folder is not None:
            write_whole(self._path(name), json.dumps(to_plain(value)).encode())

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.json"


NOT_KEPT = Parts()


@contextmanager
def kept_parts(output: Path, noun: str, job: dict[str, Any], resume: bool) -> Iterator[tuple[Path, Parts]]:
    """A folder to work in and the parts that are there, while the context lasts; afterwards OUT.partial is gone, so results
    are written inside. When the body fails or is stopped it stays, unless no part is finished.

    Raises UserError where work is (not) left over against `resume`, or is other work than `job`, and as WorkFolder.locked.
    """
    work = WorkFolder(output, noun)
    work.check_left_over(resume)
    with work.locked():
        work.resume_or_claim(job)
        try:
            yield work.state, Parts(work.state)
        except BaseException:
            if not any(path.name != "job.json" for path in work.state.glob("*.json")):
                shutil.rmtree(work.folder)
            raise
        shutil.rmtree(work.folder)


def to_plain(value: object) -> Any:
    """For JSON: NamedTuples as objects, arrays and tuples as lists."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: to_plain(getattr(value, name)) for name in value._fields}
    if isinstance(value, tuple | list):
        return [to_plain(each) for each in value]
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """The value of a type that `to_plain` has made plain: a NamedTuple of such types, an array (float64 or int64, the shape
    of empty dimensions is lost), a list or tuple of one such type, X | None, or what JSON knows itself."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not type(None)]
        return value if value is None or len(kinds) > 1 else from_plain(kinds[0], value)
    if kind is np.ndarray:
        return np.array(value)
    if origin in (list, tuple):
        return origin(from_plain(get_args(kind)[0], each) for each in value)
    if hasattr(kind, "_fields"):
        kinds_by_name = get_type_hints(kind)
        return kind(**{name: from_plain(kinds_by_name[name], value[name]) for name in kind._fields})
    return value
