"""Data-parallel calibration under `torchrun`: every process works on its rows of a batch; gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.graph.device import CPU


def world(device: torch.device = CPU) -> tuple[int, int]:
    """`(rank, size)`; joins the process group that `torchrun` describes in the environment, if there is one.

    Args:
        device: where the graph lies. On a GPU, NCCL averages what lies there, and that GPU becomes the current one.
    """
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return 0, 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def shard(inputs: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    """The rows of a batch that process `rank` of `size` works on.

    Raises:
        LoopQError: the rows cannot be divided evenly.
    """
    if size == 1:
        return list(inputs)
    rows = inputs[0].shape[0]
    if rows % size or any(tensor.shape[:1] != (rows,) for tensor in inputs):
        raise LoopQError(
            f"A calibration batch of {rows} rows cannot be shared by {size} processes; choose batch_rows and the "
            f"number of samples as multiples of {size}."
        )
    return [tensor.chunk(size)[rank] for tensor in inputs]


def average(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their mean over all processes; does nothing with a single process."""
    several = list(tensors)
    if not several or world(several[0].device)[1] == 1:
        return
    for tensor in several:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def mean_of(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes, as a new tensor without gradient."""
    tensor = tensor.detach().clone()
    average([tensor])
    return tensor


def barrier() -> None:
    """Waits for all processes."""
    if world()[1] > 1:
        dist.barrier()
