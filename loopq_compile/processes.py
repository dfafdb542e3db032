"""The processes that `torchrun` starts: which of them this is, and what only the first does."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
import torch.distributed as dist

P = ParamSpec("P")
_CPU = torch.device("cpu")
_apart = False


def world(device: torch.device = _CPU) -> tuple[int, int]:
    """`(rank, size)`; joins the process group that `torchrun` describes in the environment, if there is one.

    Args:
        device: where the graph lies. On a GPU, NCCL averages what lies there, and that GPU becomes the current one.
    """
    if _apart or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return 0, 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """In this block the process works for itself: `world` is `(0, 1)`, so nothing is averaged or waited for."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def barrier() -> None:
    """Waits for all processes."""
    if world()[1] > 1:
        dist.barrier()


def leads() -> bool:
    """Whether this is the first process: only that one writes files and speaks. True if there is one process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


def first_only(work: Callable[P, None]) -> Callable[P, None]:
    """`work` that does nothing in all processes but the first. Nobody waits; see `barrier`."""

    @functools.wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if leads():
            work(*args, **kwargs)

    return wrapped
