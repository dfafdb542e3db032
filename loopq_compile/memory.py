"""Memory of the process: how much is available, and how to return it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable

from torch import Tensor


def available_memory() -> int:
    """Bytes that can be allocated without swapping; without psutil only those that nothing uses, not even a cache."""
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().available


def _find_trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return ctypes.CDLL(None).malloc_trim
    return None


_TRIM = _find_trim()
_MMAP_THRESHOLD = -3
"""Number of the parameter in glibc's `malloc.h`."""


def trim() -> None:
    """Returns freed memory to the system, if the C library can.

    Temporary tensors of a few megabytes, with small permanent ones in between, leave holes in the heap of glibc. These
    add up to a quarter of a model.
    """
    if _TRIM is not None:
        _TRIM(0)


def return_large_tensors() -> None:
    """Makes the C library give each tensor of a megabyte pages of its own from now on, which go back when it is freed.

    glibc raises this limit to 32 megabytes by itself as such tensors come and go. The weights of one layer then leave
    holes that the next do not fit into: a calibration of 26 million weights took 877 MiB instead of 361. Fresh pages
    cost time, so this is for large models.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def release(tensors: Iterable[Tensor]) -> None:
    """Frees the memory of `tensors`, even if others hold them; they keep their shape but have no data.

    Skips tensors that share a storage with others, and storages of a mapped file, which the system drops when it needs
    the memory.
    """
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.nbytes:
            with contextlib.suppress(RuntimeError):
                storage.resize_(0)
