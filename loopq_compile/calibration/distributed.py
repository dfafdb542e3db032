"""Data-parallel calibration under `torchrun`: every process works on its share of the text; results are merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.processes import apart, barrier, world

__all__ = [
    "apart",
    "average",
    "barrier",
    "first",
    "largest",
    "mean_of",
    "send",
    "shard",
    "share",
    "sum_at",
    "total",
    "world",
]
Item = TypeVar("Item")


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


def share(batches: Sequence[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """The batches that this process measures: every N-th; if there are fewer than processes, its rows of each.

    Raises:
        LoopQError: there are fewer batches than processes, and their rows cannot be divided evenly.
    """
    rank, size = world(device)
    if len(batches) >= size:
        return list(batches[rank::size])
    return [shard(batch, rank, size) for batch in batches]


def average(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their mean over all processes; does nothing with a single process."""
    several = list(tensors)
    total(several)
    if several and (size := world(several[0].device)[1]) > 1:
        for tensor in several:
            tensor /= size


def total(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their sum over all processes, which is the same number in each."""
    _reduce(tensors, dist.ReduceOp.SUM)


def largest(tensors: Iterable[Tensor]) -> None:
    """Replaces entries of tensors by the largest of all processes."""
    _reduce(tensors, dist.ReduceOp.MAX)


def _reduce(tensors: Iterable[Tensor], how: dist.ReduceOp.RedOpType) -> None:
    several = list(tensors)
    if several and world(several[0].device)[1] > 1:
        for tensor in several:
            dist.all_reduce(tensor, how)


def sum_at(owner: int, tensors: Iterable[Tensor]) -> None:
    """Replaces tensors in process `owner` by their sum over all processes; those of the others become useless."""
    several = list(tensors)
    if several and world(several[0].device)[1] > 1:
        for tensor in several:
            dist.reduce(tensor, owner)


def send(owner: int, tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors by those of process `owner`."""
    several = list(tensors)
    if several and world(several[0].device)[1] > 1:
        for tensor in several:
            dist.broadcast(tensor, owner)


def first(item: Item) -> Item:
    """The item of the first process, in every process."""
    if world()[1] == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items)
    return items[0]


def mean_of(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes, as a new tensor without gradient."""
    tensor = tensor.detach().clone()
    average([tensor])
    return tensor
