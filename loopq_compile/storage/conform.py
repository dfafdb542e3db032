"""Checks that a dataclass read from a file holds what its annotations say."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from loopq_compile.errors import LoopQError


def conform(value: Any) -> None:
    """Compares every field of a dataclass with its annotation, nested dataclasses included.

    Understands plain classes, `tuple[X, ...]`, `tuple[X, Y]`, `list[X]`, `dict[X, Y]`, unions and `Any`.

    Raises:
        LoopQError: a field does not fit; the message names the class, the field and its value.
    """
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        if not _fits(found, hints[field.name]):
            shown = repr(found)[:60]
            raise LoopQError(f"{type(value).__name__}.{field.name} holds {shown}, which is not {field.type}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[1:] == (...,):
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        return False
    if dataclasses.is_dataclass(value):
        conform(value)
    return True
