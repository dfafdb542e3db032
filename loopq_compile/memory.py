"""Memory of the process: how much is available, and how to return it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable
from pathlib import Path

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


def _find_trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return ctypes.CDLL(None).malloc_trim
    return None


LARGE = 16 << 20
"""Parameters of a model from which on freed memory matters more than the time to get it again."""
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
