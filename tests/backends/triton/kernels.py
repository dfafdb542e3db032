"""`kernels.NAME(...)` runs `loopq_triton::NAME` where tests of kernels run; arguments and results lie on the CPU.

That is in Triton's interpreter, or on the device named by the environment variable LOOPQ_KERNELS.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import loopq_compile.backends.triton.operators  # noqa: F401  (registers loopq_triton)

DEVICE = os.environ.get("LOOPQ_KERNELS", "cpu")


def there(x: Tensor) -> Tensor:
    """`x` on the device with the same strides, also if it is a part of a larger tensor."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def here(found: Any) -> Any:
    """The tensors of a result on the CPU."""
    return tree_map_only(Tensor, Tensor.cpu, found)


class _Kernels:
    def __getattr__(self, name: str) -> Any:
        kernel = getattr(torch.ops.loopq_triton, name)
        return lambda *arguments: here(kernel(*tree_map_only(Tensor, there, arguments)))


kernels: Any = torch.ops.loopq_triton if DEVICE == "cpu" else _Kernels()
