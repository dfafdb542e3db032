"""Tensors `[N, K]` of which each process keeps its rows, as ZeRO-3 keeps parameters.

There are a few such tensors for every quantized weight. Storage is divided, computation is not: a tensor is gathered
when something reads it, and forgotten afterwards. FSDP2 does this for parameters of an `nn.Module`; here operators of
an fx graph read values that are in no module, hence DTensor, on which FSDP2 is built.

All processes must gather and reduce the same tensors in the same order. A single process keeps ordinary whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from loopq_compile.calibration import distributed
from loopq_compile.processes import leads

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor


@dataclass(frozen=True)
class Rows:
    """Divides tensors by rows.

    Args:
        mesh: the processes; None leaves tensors whole.
    """

    mesh: DeviceMesh | None = None

    @staticmethod
    def among(device: torch.device) -> Rows:
        """Rows for every process that `torchrun` started; everything for a single one.

        Args:
            device: where the tensors lie.
        """
        size = distributed.world(device)[1]
        return Rows(init_device_mesh(device.type, (size,)) if size > 1 else None)

    def own(self, x: Tensor) -> Tensor:
        """`x` of which only the rows of this process are kept. All processes have the same `x`."""
        if self.mesh is None:
            return x
        divided = distribute_tensor(x.detach(), self.mesh, [Shard(0)], src_data_rank=None)
        return with_rows(divided, rows(divided).clone(memory_format=torch.contiguous_format))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes, of which only the rows of this process are kept."""
        if self.mesh is None:
            return x
        partial = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        total = partial.redistribute(placements=[Shard(0)])
        return with_rows(total, rows(total) / self.mesh.size())


def is_divided(x: Tensor) -> bool:
    """Whether this process keeps only rows of `x`."""
    return dist.is_available() and isinstance(x, DTensor)


def whole(x: Tensor) -> Tensor:
    """All rows of `x`."""
    if not (dist.is_available() and isinstance(x, DTensor)):
        return x
    if x.dtype != torch.int16:
        return x.full_tensor()
    part = rows(x).view(torch.uint8)  # neither gloo nor NCCL sends 16-bit integers
    shape = torch.Size((x.shape[0], 2 * x.shape[1]))
    bytes_ = DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=shape, stride=(shape[1], 1))
    return bytes_.full_tensor().view(torch.int16)


def rows(x: Tensor) -> Tensor:
    """The rows of `x` that this process keeps; it may write to them."""
    return x.to_local() if dist.is_available() and isinstance(x, DTensor) else x


def with_rows(x: Tensor, kept: Tensor) -> Tensor:
    """`kept` in the place of the rows of `x`."""
    if not (dist.is_available() and isinstance(x, DTensor)):
        return kept
    return DTensor.from_local(kept, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=(x.shape[1], 1))


def divided_as(x: Tensor, like: Tensor) -> Tensor:
    """`x`, which is whole and the same in all processes, on the device of `like` and divided as it is."""
    mesh = like.device_mesh if dist.is_available() and isinstance(like, DTensor) else None
    return Rows(mesh).own(x.to(like.device))


def whole_in_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the first process, on the CPU where they were divided; the others get an empty dict."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor).cpu() if is_divided(tensor) else tensor
        if leads():
            found[name] = gathered
    return found


def average_gradients(gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Replaces gradients and the loss by their means over all processes, and returns the norm of all gradients.

    Divided gradients are means already.
    """
    plain = [gradient for gradient in gradients if not is_divided(gradient)]
    distributed.average([*plain, loss])
    norm = torch.nn.utils.get_total_norm(plain)
    kept = [rows(gradient) for gradient in gradients if is_divided(gradient)]
    if not kept:
        return norm
    squares = _squares(kept)
    distributed.total([squares])
    return (norm.to(squares) ** 2 + squares).sqrt()


def _squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) ** 2 for x in tensors]).sum()
