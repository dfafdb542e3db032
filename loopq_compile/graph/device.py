"""Where a graph lies: the one device of its tensors, of what it creates, and of its inputs.

A graph that was captured on a device names it in every operator that makes a tensor. `place` moves both, stored tensors
and these names.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from loopq_compile.errors import LoopQError, first_line
from loopq_compile.graph.rolled import RolledLoop
from loopq_compile.memory import release as free

CPU = torch.device("cpu")


def find_device(device: str | torch.device) -> torch.device:
    """The device that `device` names, with its number.

    Args:
        device: "auto" (a GPU that PyTorch can use, else the CPU), "cpu", "cuda", "cuda:1", or any other that PyTorch
            knows. Under `torchrun` "auto" and "cuda" give each process of a machine its own GPU.

    Raises:
        LoopQError: there is no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoopQError(f"device={device!r} is not a device. Use 'auto', 'cpu', 'cuda' or 'cuda:1'.") from error
    if found.type == "meta":
        raise LoopQError("device='meta' holds no numbers. Use 'auto', 'cpu' or 'cuda'.")
    if found.type == "cuda" and found.index is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        made = torch.empty(0, device=found).device
    except Exception as error:  # each kind of device has errors of its own
        raise LoopQError(
            f"device={str(device)!r} cannot be used here: {first_line(error)}. Leave the option out, or use 'cpu'."
        ) from error
    return CPU if made.type == "cpu" else made


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters and buffers are; the CPU for one without."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return CPU


def place(graph_module: fx.GraphModule, device: torch.device, release: bool = False) -> bool:
    """Moves a graph to `device`, in place; returns whether there was anything to move.

    Modules that share tensors with this one keep theirs: moved tensors are copies.

    Args:
        graph_module: a graph with or without rolled loops.
        device: as `find_device` gives it.
        release: free each tensor that was copied, whoever else holds it.
    """
    moved = _place_tensors(graph_module, device, release)
    graphs = [graph_module, *(m.body for m in graph_module.modules() if isinstance(m, RolledLoop))]
    for module in graphs:
        changed = [_place_node(node, device) for node in module.graph.nodes]  # all of them
        if any(changed):
            module.recompile()
            moved = True
    return moved


def _place_tensors(module: nn.Module, device: torch.device, release: bool) -> bool:
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for owner in module.modules():
        stores: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for store in stores:
            for name, tensor in store.items():
                if isinstance(tensor, Tensor) and tensor.device != device:
                    places.setdefault(id(tensor), []).append((store, name))
    for held in places.values():  # one at a time, so that at most one is there twice
        store, name = held[0]
        old = store[name]
        with torch.no_grad():
            new = old.detach().to(device)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for store, name in held:
            store[name] = new
        if release:
            free([old])
    return bool(places)


def _place_node(node: fx.Node, device: torch.device) -> bool:
    """Sets the device that a node names, or should name, and that of its example value."""

    def at_device(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    names = [*pytree.tree_leaves((list(node.args), dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node))]
    changed = any(isinstance(name, torch.device) and name != device for name in names)
    if changed:
        node.args = map_aggregate(node.args, at_device)  # type: ignore[assignment]
        node.kwargs = map_aggregate(node.kwargs, at_device)  # type: ignore[assignment]
    if device.type != "cpu" and _makes_tensors(node) and node.kwargs.get("device") is None:
        node.kwargs = {**node.kwargs, "device": device}
        changed = True
    if "val" in node.meta:
        node.meta["val"] = pytree.tree_map_only(FakeTensor, lambda value: _fake_at(value, device), node.meta["val"])
    return changed


def _makes_tensors(node: fx.Node) -> bool:
    """Whether an operator makes a tensor from numbers only, on a device that it is told."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(argument.name == "device" for argument in schema.arguments):
        return False
    return not any("Tensor" in str(argument.type) for argument in schema.arguments)


def _fake_at(value: FakeTensor, device: torch.device) -> FakeTensor:
    if value.device == device:
        return value
    with value.fake_mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return made  # type: ignore[return-value]
