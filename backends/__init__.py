"""Backends: one folder each. A backend takes a finished program and returns something that runs.

`get_backend("onnx").lower(program)` gives an `Executable`. Backends are imported on request, so that a missing
optional dependency of one does not affect the others. Other packages register their backend, a module (or any object)
with a function `lower`, under the entry point group `loopq_compile.backends`. `register_backend` adds one for a single
process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, Protocol

from loopq_compile.errors import LoopQError, did_you_mean

__all__ = ["Backend", "Executable", "backend_names", "get_backend", "register_backend"]

ENTRY_POINTS = "loopq_compile.backends"

_BUILT_IN = ("onnx", "reference", "triton")


_registered: dict[str, Any] = {}


class Executable(Protocol):
    """A lowered program. It is called like the model it was compiled from, and returns what the model returns."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Backend(Protocol):
    """What the package of a backend provides."""

    def lower(self, program: Any, **options: Any) -> Executable:
        """Lowers a `Program` or its graph module; `options` are the backend's own."""
        ...


def backend_names() -> list[str]:
    """Names that `get_backend` knows: the built-in backends and those of installed entry points."""
    return sorted({*_BUILT_IN, *_registered, *_entry_points()})


def register_backend(name: str, backend: Backend) -> None:
    """Adds a backend for this process: `program.lower(name)` then finds it.

    Raises:
        LoopQError: the name is taken, or the backend has no function `lower`.
    """
    if name in backend_names():
        raise LoopQError(f"There is a backend {name!r} already; choose another name.")
    if not callable(getattr(backend, "lower", None)):
        raise LoopQError(f"Backend {name!r} ({backend!r}) has no function lower(program, **options).")
    _registered[name] = backend


def get_backend(name: str) -> Backend:
    """The backend called `name`; imports it.

    Raises:
        LoopQError: the name is unknown, or the backend's dependencies are missing.
    """
    if name not in backend_names():
        raise LoopQError(f"Unknown backend {name!r}.{did_you_mean(str(name), backend_names())}")
    if name in _registered:
        return _registered[name]
    try:
        if name in _BUILT_IN:
            backend: Any = importlib.import_module(f"{__name__}.{name}")
        else:
            backend = _entry_points()[name].load()
    except ImportError as error:
        raise LoopQError(
            f"Backend {name!r} cannot be imported: {error}. Install what it needs and try again."
        ) from error
    if not callable(getattr(backend, "lower", None)):
        raise LoopQError(f"Backend {name!r} ({backend!r}) has no function lower(program, **options).")
    return backend


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
