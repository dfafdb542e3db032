"""Programs in half precision, restated in single precision for what only reads that."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from loopq_compile.graph.copies import private_copy
from loopq_compile.graph.rolled import RolledLoop
from loopq_compile.graph.state import get_state

HALF = (torch.float16, torch.bfloat16)
"""Floating-point types of 16 bits."""


def uses_half_precision(graph_module: fx.GraphModule) -> bool:
    """Whether a graph stores or computes anything in 16-bit floating point."""
    tensors = (*graph_module.parameters(), *graph_module.buffers())
    if any(tensor.dtype in HALF for tensor in tensors):
        return True
    return any(getattr(node.meta.get("val"), "dtype", None) in HALF for node in graph_module.graph.nodes)


def in_single_precision(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that stores and computes in float32 what the graph has in float16 and bfloat16.

    Stored numbers are the same: float32 holds every value of both types. Results differ by the rounding that is gone.
    Inputs in half precision become float32. Integers are shared with the program, which stays as it is.
    """
    copied = private_copy(graph_module)
    state = get_state(copied)
    state.results = copy.deepcopy(get_state(graph_module).results)
    inputs = tuple(replace(spec, dtype=_wide(spec.dtype)) for spec in state.signature.inputs)
    state.signature = replace(state.signature, inputs=inputs)
    _widen_tensors(copied)
    for module in (copied, *(m.body for m in copied.modules() if isinstance(m, RolledLoop))):
        for node in module.graph.nodes:
            node.args = map_aggregate(node.args, _wide)  # type: ignore[assignment]
            node.kwargs = map_aggregate(node.kwargs, _wide)  # type: ignore[assignment]
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map_only(FakeTensor, _wide_fake, node.meta["val"])
        module.recompile()
    return copied


def _widen_tensors(module: nn.Module) -> None:
    made: dict[int, Tensor] = {}  # a tensor that is shared stays shared
    for owner in module.modules():
        stores: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for store in stores:
            for name, tensor in store.items():
                if isinstance(tensor, Tensor) and tensor.dtype in HALF:
                    if id(tensor) not in made:
                        wide = tensor.detach().float()
                        made[id(tensor)] = (
                            nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide
                        )
                    store[name] = made[id(tensor)]


def _wide(value: Any) -> Any:
    return torch.float32 if value in HALF else value


def _wide_fake(value: FakeTensor) -> FakeTensor:
    if value.dtype not in HALF:
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=torch.float32, device=value.device)  # type: ignore[return-value]
