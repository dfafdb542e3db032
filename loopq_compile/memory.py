"""Memory of the process: how much is available, and how to return it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def available_memory(device: torch.device | None = None) -> int:
    """Bytes that can be allocated without swapping; without psutil only those that nothing uses, not even a cache.

    Args:
        device: a GPU to ask about, instead of the machine.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().available


class Peak:
    """The largest memory since the last `restart`, without what lay there when this object was made.

    Memory is the resident size of the process, on a GPU what PyTorch has allocated there.

    Args:
        device: where tensors lie.

    Raises:
        OSError: the system does not tell; only Linux does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()
        self.base = 0
        self.base = self.now()

    def restart(self) -> None:
        """Forgets what was before."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak."""
        return self._largest() - self.base

    def now(self) -> int:
        """What lies there now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self.base
        return _status("VmRSS") - self.base

    def _largest(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a field of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


LARGE = 16 << 20
"""Parameters of a model from which on a calibration keeps its heap small (`bound_heap`)."""
SLACK = 256 << 20
"""Bytes of freed memory that a bounded heap may hold."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Numbers of the parameters in glibc's `malloc.h`."""


class _Usage(ctypes.Structure):
    """glibc's `struct mallinfo2`, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _find(name: str, result: Any) -> Callable[..., Any] | None:
    """A function of the C library; None if it has none of that name."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        function = getattr(ctypes.CDLL(None), name)
        function.restype = result
        return function
    return None


_malloc_trim = _find("malloc_trim", ctypes.c_int)
_mallinfo = _find("mallinfo2", _Usage)
_mallopt = _find("mallopt", ctypes.c_int)
_EVERY = 64 << 20
_made = 0
"""Bytes that callers of `trim_bounded` have made since it last looked."""
_outside: int | None = None
"""Resident bytes that are not the heap's, such as code and mapped files, as of the last `trim`; None if the heap is not
bounded."""


def bound_heap() -> None:
    """From now on freed memory stays with the process, and `trim_excess` returns it when it is more than `SLACK`.

    By itself glibc gives a tensor of some megabytes pages of its own, and the system clears them, which takes longer
    than to compute what goes there: 0.92 ms instead of 0.05 to square 590,000 numbers, half of a whole calibration.
    Without any limit the heap gets holes: 1,191 MiB instead of 311 for 26 million weights. For large models.
    """
    global _outside
    if _mallopt is not None and _mallinfo is not None and _malloc_trim is not None:
        with contextlib.suppress(OSError):  # a system without /proc
            _outside = _resident()
            _mallopt(_MMAP_THRESHOLD, 32 << 20)
            _mallopt(_TRIM_THRESHOLD, 1 << 30)
            trim()


def trim() -> None:
    """Returns freed memory to the system, if the C library can.

    Temporary tensors of a few megabytes, with small permanent ones in between, leave holes in the heap of glibc. These
    add up to a quarter of a model.
    """
    global _outside
    if _malloc_trim is not None:
        _malloc_trim(0)
        if _outside is not None:
            _outside = _resident() - _allocated()


def trim_excess() -> None:
    """`trim`, unless the heap is bounded and holds no more than `SLACK` of freed memory."""
    if _outside is None or _resident() - _allocated() - _outside > SLACK:
        trim()


def trim_bounded(made: int = _EVERY) -> None:
    """`trim_excess` for busy places: only if the heap is bounded, and only after every 64 MiB of new tensors.

    To ask the C library takes about a millisecond, as long as a product: 12 % of a step when every product asked.

    Args:
        made: bytes of the tensors that the caller is about to make; by default it looks now.
    """
    global _made
    _made += made
    if _outside is not None and _made >= _EVERY:
        _made = 0
        trim_excess()


def _resident() -> int:
    """Resident bytes of the process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _allocated() -> int:
    """Bytes that the program has got from the C library and not freed."""
    assert _mallinfo is not None
    usage = _mallinfo()
    return int(usage.uordblks) + int(usage.hblkhd)


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
