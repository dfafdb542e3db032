"""All passes by name: built-in ones, and those that other packages add.

A package declares its passes in `pyproject.toml`:

    [project.entry-points."loopq_compile.passes"]
    my-pass = "my_package:MyPass"
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import loopq_compile.passes as package
from loopq_compile.errors import LoopQError
from loopq_compile.passes.base import Pass
from loopq_compile.registry import Registry

ENTRY_POINTS = "loopq_compile.passes"
_ABSTRACT = ("base", "rewrite")
"""Modules of base classes."""


def pass_names() -> list[str]:
    """Names that `get_pass` knows."""
    return _registry().names()


def get_pass(name: str, **options: Any) -> Pass:
    """A new pass of the class called `name`, such as `get_pass("insert-transforms", kind="hadamard")`.

    Raises:
        LoopQError: the name is unknown, or the class does not take these options.
    """
    kind = _registry().get(name)
    try:
        return kind(**options)
    except TypeError as error:
        raise LoopQError(f"Pass {name!r} cannot be made with {options}: {error}") from error


def register_pass(kind: type[Pass]) -> type[Pass]:
    """Adds a class under its own name; also a decorator.

    Raises:
        LoopQError: it is not a subclass of `Pass`, or the name is taken.
    """
    _registry().register(getattr(kind, "name", ""), kind)
    return kind


def _check(name: str, item: Any) -> None:
    if not isinstance(item, type) or not issubclass(item, Pass) or not item.name:
        raise LoopQError(f"Pass {name!r} ({item!r}) is not a subclass of loopq_compile.passes.Pass.")


_known: dict[str, type[Pass]] = {}


def _registry() -> Registry:
    """Finds built-in passes once, in the folders next to this module."""
    if not _known:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            for item in vars(module).values():
                here = isinstance(item, type) and item.__module__ == module.__name__
                if here and issubclass(item, Pass) and found.name.rpartition(".")[2] not in _ABSTRACT:
                    _known[item.name] = item
    return Registry("pass", ENTRY_POINTS, _known, _check)
