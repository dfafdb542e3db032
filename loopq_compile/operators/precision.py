"""The types in which numbers are stored and computed. This is the only place that defines them.

- A program computes in its model's own types. A node that a pass puts between two nodes of the model returns the type
  that it reads, so bfloat16 stays bfloat16 from end to end. So do the stored scales of weights and activations.
- Arithmetic inside our operators is wide: single precision for half-precision tensors, double for float64 (`wide`).
- What calibration learns (transforms, diagonals, clip ratios, ranges, adapters), its coordinates and the optimizer's
  moments are kept wide, whatever the model's type. The graph reads a learned value in the type of its table, so
  calibration uses the numbers that the finished program will compute with.
- There is one rounding offset for every weight, so offsets are kept in `OFFSETS`, in units of the weight's scale.
- Weight solvers work in single precision.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

OFFSETS = torch.float16
"""Offsets near one half, where integers change, are exact to 1/4096 of a step in float16, and to 1/512 in bfloat16."""


def wide_type(*types: torch.dtype) -> torch.dtype:
    """The type that holds tensors of all `types` without loss, at least single precision."""
    found = torch.float32
    for dtype in types:
        found = torch.promote_types(found, dtype)
    return found


def wide(x: Tensor) -> Tensor:
    """`x` in single precision at least."""
    return x.to(wide_type(x.dtype))


def all_wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one type that holds all of them, single precision at least."""
    common = wide_type(*(x.dtype for x in tensors))
    return [x.to(common) for x in tensors]


def in_own_types(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """While it is open, products on the device of `x` run in the types of their tensors, inside `products_in` too."""
    return _autocast(x.device, enabled=False)


def products_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """While it is open, matrix products of single-precision tensors run in `precision`, the calibration option."""
    return _autocast(device, enabled=precision == "bfloat16")


def _autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[None]:
    if not enabled and not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
