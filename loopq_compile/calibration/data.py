"""Calibration batches for training: regrouped, split into learning and validation, ordered by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Batch = list[Tensor]
"""Inputs of a graph in the order of its placeholders."""


def regroup(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Batches of `rows` rows each if all inputs can be joined along their first dimension; otherwise unchanged."""
    first = batches[0]
    joinable = all(
        len({tensor.shape[0] for tensor in batch}) == 1
        and all(tensor.ndim and tensor.shape[1:] == other.shape[1:] for tensor, other in zip(batch, first, strict=True))
        for batch in batches
    )
    if not joinable:
        return list(batches)
    joined = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    return [list(parts) for parts in zip(*(tensor.split(rows) for tensor in joined), strict=True)]


def split(batches: Sequence[Batch], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to learn from and of those held out; nothing is held out of fewer than four batches."""
    count = round(len(batches) * share) if len(batches) >= 4 else 0
    if share and len(batches) >= 4:
        count = max(count, 1)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[count:]), sorted(order[:count])


def pick(numbers: Sequence[int], step: int, seed: int) -> int:
    """The batch of `step`; every epoch visits all batches, in a new order."""
    epoch, position = divmod(step, len(numbers))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return numbers[int(torch.randperm(len(numbers), generator=generator)[position])]
