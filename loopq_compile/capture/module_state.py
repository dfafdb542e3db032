"""What a model keeps between its calls, restored after capture.

Research code caches tables in plain attributes, buffers, and dictionaries of a module, a class or a file; hooks store
what passes through them. While the exporter runs, its fake tensors end up in these places. `ModelState` remembers
every such place before, and restores the old values.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_ABSENT = object()
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "sympy"} - {"__main__", "collections"}
"""Packages whose objects and functions are not searched."""
_COPIED_AT_MOST = 1 << 28
"""Largest tensors, in bytes, that are copied before a model runs with real values."""
_LOOKED_INTO_AT_MOST = 100_000
"""Most entries of a container that is searched; longer ones are data, and only remembered."""


@contextlib.contextmanager
def hashable_sizes() -> Iterator[None]:
    """Lets sizes that vary be keys of a dictionary or of `lru_cache`; they never equal a number there.

    Only for models that need it: libraries such as einops rely on the error.
    """
    original = torch.SymInt.__hash__
    torch.SymInt.__hash__ = lambda self: hash(("size", str(self)))  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.SymInt.__hash__ = original  # type: ignore[method-assign]


class Place:
    """One container and its contents: an attribute dictionary, a list, a cell of a closure."""

    def __init__(self, read: Callable[[], dict[Any, Any]], write: Callable[[dict[Any, Any]], None]) -> None:
        self.read, self.write = read, write
        self.before = read()

    def changed(self) -> dict[Any, tuple[Any, Any]]:
        """Old and new value of every entry that is another object now."""
        found = {}
        with hashable_sizes():
            now = self.read()
            for key in [*self.before, *(key for key in now if key not in self.before)]:
                old, new = self.before.get(key, _ABSENT), now.get(key, _ABSENT)
                if old is not new:
                    found[key] = (old, new)
        return found

    def restore(self) -> None:
        """Restores the old values, in their old order."""
        if self.changed():
            self.write(self.before)


class ModelState:
    """Everything that running `model` may change, as it is now.

    Args:
        model: what counts is its modules, their plain attributes, classes and hooks, and the functions and variables of
            a file that their code names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places: list[Place] = []
        self.tensors: dict[int, Tensor] = {}
        self.found: list[tuple[Place, Any, Any]] = []
        self.made_tensors = False
        self._cached_functions: dict[int, tuple[Any, Any]] = {}
        self._copies: list[tuple[Tensor, Tensor, int]] = []
        seen: dict[int, Any] = {}
        waiting: list[Any] = [model]
        waiting += [value for name, value in vars(torch_module).items() if name.startswith("_global_") and value]
        while waiting:
            value = waiting.pop()
            if id(value) not in seen:
                seen[id(value)] = value
                waiting.extend(self._visit(value))

    def restore(self) -> None:
        """Restores everything."""
        for place in self.places:
            place.restore()
        for function, info in self._cached_functions.values():
            if function.cache_info() != info:
                function.cache_clear()
        for tensor, copy, version in self._copies:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(copy)
        self._copies = [(tensor, copy, tensor._version) for tensor, copy, _ in self._copies]

    def protect_values(self) -> None:
        """Copies the small tensors that a run with real values may change in place; parameters are not among them."""
        size = 0
        for tensor in self.tensors.values():
            size += tensor.nbytes
            if size <= _COPIED_AT_MOST and not tensor.is_inference():
                self._copies.append((tensor, tensor.detach().clone(), tensor._version))

    def find_caches(self) -> None:
        """Sets `found`: place, key and stale value of every entry that the exporter's run wrote and that follows its
        sizes.

        `made_tensors` says whether it holds tensors or modules now where it held nothing.

        A stale table has no rows and a stale number is 0, as if the model had last run on no tokens.
        """
        found = []
        for place in self.places:
            for key, (old, new) in place.changed().items():
                self.made_tensors |= (old is None or old is _ABSENT) and isinstance(new, Tensor | nn.Module)
                stale = _stale(old, new)
                if stale is not old:
                    found.append((place, key, stale))
        self.found = found

    def numbers(self) -> set[int]:
        """The whole numbers and sizes of tables that the model keeps, parameters excluded."""
        sizes = {size for tensor in self.tensors.values() for size in tensor.shape}
        for place in self.places:
            for value in place.before.values():
                entries = value if isinstance(value, tuple) else (value,)
                sizes |= {entry for entry in entries if type(entry) is int}
        return sizes

    def _visit(self, value: Any) -> Iterable[Any]:
        """Remembers the contents of `value`, and returns them."""
        if value is None or isinstance(value, nn.Parameter | types.ModuleType | str | bytes | bool | int | float):
            return []
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
            return []
        if isinstance(value, dict):
            return self._add(lambda: _entries(value), lambda before: _refill(value, before))
        if isinstance(value, list | collections.deque):
            return self._add(lambda: dict(enumerate(value)), lambda before: _refill_sequence(value, before))
        if isinstance(value, set):
            return self._add(lambda: {id(item): item for item in value}, lambda before: _refill_set(value, before))
        if isinstance(value, tuple):
            return value
        if isinstance(value, functools.partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, types.MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, classmethod | staticmethod):
            return [value.__func__]
        if isinstance(value, property):
            return [value.fget]
        if isinstance(value, functools._lru_cache_wrapper):
            self._cached_functions[id(value)] = (value, value.cache_info())
            return [getattr(value, "__wrapped__", None)]
        if isinstance(value, types.FunctionType):
            return self._visit_function(value)
        if isinstance(value, types.CellType):
            return self._add(lambda: _cell(value), lambda before: _refill_cell(value, before))
        if isinstance(value, type):
            return [] if _is_foreign(value) else self._visit_class(value)
        if isinstance(value, nn.Module) or not _is_foreign(type(value)):
            return [type(value), *type(value).__mro__, *self._visit_attributes(value)]
        return []

    def _add(self, read: Callable[[], dict[Any, Any]], write: Callable[[dict[Any, Any]], None]) -> Iterable[Any]:
        self.places.append(Place(read, write))
        held = self.places[-1].before.values()
        return held if len(held) <= _LOOKED_INTO_AT_MOST else ()

    def _visit_attributes(self, value: Any) -> Iterator[Any]:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from self._add(lambda: dict(attributes), lambda before: _refill(attributes, before))
        slots = [name for cls in type(value).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
        slots = [name for name in slots if name not in ("__dict__", "__weakref__") and not name.startswith("__")]
        if slots:
            yield from self._add(
                lambda: {name: getattr(value, name) for name in slots if hasattr(value, name)},
                lambda before: _set_all(value, before),
            )

    def _visit_class(self, cls: type) -> Iterable[Any]:
        def read() -> dict[str, Any]:
            plain = (types.GetSetDescriptorType, types.MemberDescriptorType)
            return {k: v for k, v in vars(cls).items() if not k.startswith("__") and not isinstance(v, plain)}

        methods = [value for key, value in vars(cls).items() if key in ("__call__", "__init__", "__getattr__")]
        return [*self._add(read, lambda before: _refill_class(cls, read(), before)), *methods]

    def _visit_function(self, function: types.FunctionType) -> Iterable[Any]:
        names = _global_names(function.__code__)
        variables = function.__globals__

        def read() -> dict[str, Any]:
            return {name: variables[name] for name in names if name in variables}

        found = [*(function.__closure__ or ()), *(function.__defaults__ or ()), function.__kwdefaults__]
        found += [function.__dict__, getattr(function, "__wrapped__", None)]
        if str(variables.get("__name__")).split(".")[0] in _FOREIGN:
            return found  # a wrapper of PyTorch's, such as `no_grad`, around the model's own
        return [*found, *self._add(read, lambda before: _refill_globals(variables, names, before))]


def _is_foreign(cls: type) -> bool:
    return (cls.__module__ or "").split(".")[0] in _FOREIGN


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function and those defined inside may look up in their file."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _global_names(part)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _entries(value: dict[Any, Any]) -> dict[Any, Any]:
    """Contents of a dictionary, in order; without look-ups, for which a subclass may create entries."""
    ordered = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    return {key: dict.__getitem__(value, key) for key in ordered.__iter__(value)}


def _refill(target: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    kind: Any = collections.OrderedDict if isinstance(target, collections.OrderedDict) else dict
    kind.clear(target)
    for key, value in before.items():
        kind.__setitem__(target, key, value)


def _refill_sequence(target: Any, before: Mapping[int, Any]) -> None:
    target.clear()
    target.extend(before.values())


def _refill_set(target: set[Any], before: Mapping[int, Any]) -> None:
    target.clear()
    target.update(before.values())


def _cell(cell: types.CellType) -> dict[str, Any]:
    try:
        return {"value": cell.cell_contents}
    except ValueError:  # empty
        return {}


def _refill_cell(cell: types.CellType, before: Mapping[str, Any]) -> None:
    if before:
        cell.cell_contents = before["value"]
    else:
        del cell.cell_contents


def _refill_class(cls: type, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for name in now:
        if name not in before:
            delattr(cls, name)
    for name, value in before.items():
        if now.get(name, _ABSENT) is not value:
            setattr(cls, name, value)


def _refill_globals(variables: dict[str, Any], names: tuple[str, ...], before: Mapping[str, Any]) -> None:
    for name in names:
        if name not in before:
            variables.pop(name, None)
    variables.update(before)


def _set_all(value: Any, before: Mapping[str, Any]) -> None:
    for name, item in before.items():
        object.__setattr__(value, name, item)


def _stale(old: Any, new: Any) -> Any:
    """`old` as a run on no tokens would have left it, if `new` follows the sizes of the run."""
    if isinstance(new, torch.SymInt) and type(old) is int:
        return 0
    if isinstance(new, Tensor) and isinstance(old, Tensor) and new.ndim == old.ndim:
        for axis, size in enumerate(new.shape):
            if not isinstance(size, int):
                old = old.narrow(axis, 0, 0)
        return old
    if isinstance(new, tuple | list) and type(new) is type(old) and len(new) == len(old):
        stale = [_stale(*pair) for pair in zip(old, new, strict=True)]
        if any(item is not before for item, before in zip(stale, old, strict=True)):
            return type(old)(stale) if type(old) in (tuple, list) else old
    return old
