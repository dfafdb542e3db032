"""The device on which lowered programs run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """While it is open, `device` is the current one, on which Triton launches; `torch.compile` does this by itself."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return torch.cuda.device(device)


def put_on(graph_module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Makes a graph create its constants (`arange`, masks) on `device`, in place, bodies of rolled loops included.

    Programs are captured on the CPU, so these nodes name the CPU. Tensors of the graph are moved by `.to(device)`.
    """

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
            module.recompile()
    return graph_module
