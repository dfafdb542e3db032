"""Memory of the process: how much there is, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable

import psutil
from torch import Tensor


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    return psutil.virtual_memory().available


def _find_trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return ctypes.CDLL(None).malloc_trim
    return None


_TRIM = _find_trim()


def trim() -> None:
    """Gives what was freed back to the system, where the C library can.

    Temporary tensors of a few megabytes, with small ones that stay in between, leave holes in the heap of glibc that
    add up to a quarter of a model.
    """
    if _TRIM is not None:
        _TRIM(0)


def release(tensors: Iterable[Tensor]) -> None:
    """Frees the memory of `tensors`, whoever else holds them; they keep their shape and have no data from then on.

    Tensors that share a storage with others are left alone, and so are storages that belong to a mapped file, which the
    system drops when it needs the memory.
    """
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.nbytes:
            with contextlib.suppress(RuntimeError):
                storage.resize_(0)
