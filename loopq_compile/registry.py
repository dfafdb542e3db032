"""Registries that other packages can extend: passes and methods."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, MutableMapping
from typing import Any

from loopq_compile.errors import LoopQError, did_you_mean


class Registry:
    """Items by name: built-in ones, those registered at run time, and those of installed entry points.

    Args:
        kind: what the items are, for errors: "method".
        group: entry point group in which other packages declare theirs.
        known: the built-in items; registered ones are added.
        check: raises a `LoopQError` for an item of the wrong kind.
    """

    def __init__(
        self, kind: str, group: str, known: MutableMapping[str, Any], check: Callable[[str, Any], None]
    ) -> None:
        self.kind, self.group, self.known, self.check = kind, group, known, check

    def register(self, name: str, item: Any) -> None:
        """Adds `item` under `name` for this process.

        Raises:
            LoopQError: the name is taken, or the item is of the wrong kind.
        """
        if name in self.names():
            raise LoopQError(f"There is a {self.kind} {name!r} already; choose another name.")
        self.check(name, item)
        self.known[name] = item

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self.known, *self._points()})

    def get(self, name: str) -> Any:
        """The item called `name`; an entry point is imported now.

        Raises:
            LoopQError: the name is unknown, or the object of an entry point cannot be imported or is of the wrong kind.
        """
        if name in self.known:
            return self.known[name]
        points = self._points()
        if name not in points:
            raise LoopQError(f"Unknown {self.kind} {name!r}.{did_you_mean(str(name), self.names())}")
        point = points[name]
        try:
            item = point.load()
        except Exception as error:  # another package may raise anything on import
            package = point.dist.name if point.dist else point.value
            raise LoopQError(
                f"The {self.kind} {name!r} of {package} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        self.check(name, item)
        return item

    def _points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}
