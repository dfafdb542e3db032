"""PyTorch's settings around a call: inference mode, autocast, default type and device.

A compilation gives the same result under any settings, and leaves them unchanged. The captured model runs under the
caller's default type, which may affect what it computes; passes run under float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_AUTOCAST = ("cpu", "cuda")


@contextlib.contextmanager
def undisturbed(device: torch.device, default: torch.dtype | None = None) -> Iterator[None]:
    """Turns inference mode and autocast off, and creates new tensors on `device`.

    Args:
        device: the model's device.
        default: the type of new tensors; None for the caller's.
    """
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != device.type:
            stack.enter_context(device)
        if default not in (None, before):
            torch.set_default_dtype(default)
            stack.callback(torch.set_default_dtype, before)
        yield


def plain(tensor: Tensor) -> Tensor:
    """`tensor`; if it was made in inference mode, an ordinary tensor on the same memory, which autograd accepts."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


@contextlib.contextmanager
def with_plain_tensors(model: nn.Module) -> Iterator[None]:
    """While it is open, `model` holds ordinary tensors, on the same memory, instead of those made in inference mode."""
    aliases: dict[int, Tensor] = {}  # tensors that are shared stay shared
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)  # type: ignore[assignment]
            for store in stores:
                for name, tensor in list(store.items()):
                    if isinstance(tensor, Tensor) and tensor.is_inference():
                        alias = aliases.setdefault(id(tensor), _alias(tensor))
                        replaced.append((store, name, tensor))
                        store[name] = alias
        yield
    finally:
        for store, name, tensor in replaced:
            store[name] = tensor


def _alias(tensor: Tensor) -> Tensor:
    made = plain(tensor)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
