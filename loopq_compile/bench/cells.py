"""Results that survive a killed run: one JSON file per cell of a table, named by a hash of everything that determines
it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loopq_compile.storage.atomic import write_text

Values = dict[str, Any]


class Cells:
    """Measured values, found again by what they were measured on.

    Args:
        folder: where the files are; None stores nothing.
        fresh: whether to measure existing cells again and replace them. A cell depends on the package's version, not on
            its code: after changing a method, use this or another folder.
    """

    def __init__(self, folder: str | Path | None = None, fresh: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self._fresh = fresh
        self._known: dict[str, Values] = {}

    def get(self, name: str, about: Mapping[str, Any], measure: Callable[[], Values]) -> Values:
        """The values of a cell, from its file if there is one.

        Args:
            name: prefix of the file's name, for people.
            about: everything that determines the values, as JSON.
            measure: computes the values; if it raises an error, there is no file.

        Raises:
            LoopQError: the file cannot be written.
        """
        key = _key(about)
        if key not in self._known:
            file = self._path(name, key, ".json")
            values = None if self._fresh else _read(file)
            if values is None:
                values = plain(measure())
                _write(file, {"about": dict(about), "values": values})
            self._known[key] = values
        return self._known[key]

    @contextlib.contextmanager
    def unfinished(self, name: str, about: Mapping[str, Any]) -> Iterator[Path | None]:
        """A folder for data that the cell needs to continue after a kill; it is deleted when the cell is measured."""
        folder = self._path(name, _key(about), ".unfinished")
        if folder is not None and self._fresh:
            shutil.rmtree(folder, ignore_errors=True)
        yield folder
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _path(self, name: str, key: str, ending: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{re.sub('[^A-Za-z0-9.+-]+', '_', name)}-{key}{ending}"


def _key(about: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become None, tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(file: Path | None) -> Values | None:
    if file is None or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["values"]
    except (OSError, ValueError, KeyError):  # damaged: measured again
        return None


def _write(file: Path | None, content: Values) -> None:
    if file is not None:
        write_text(file, json.dumps(content, indent=1) + "\n")
