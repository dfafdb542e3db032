"""Copies of graphs that may be changed as a whole, bodies of rolled loops included."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import fx

from loopq_compile.graph.device import place
from loopq_compile.graph.rolled import RolledLoop
from loopq_compile.graph.state import RunContext, attach_state, copy_nodes, get_state


def private_copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy to rewrite, bodies of rolled loops included; the program keeps its graphs, and tensors are shared until
    the copy replaces them."""
    copied = fx.GraphModule(graph_module, copy_nodes(graph_module.graph))
    for name, module in list(copied.named_children()):
        if isinstance(module, RolledLoop):
            loop = copy.copy(module)
            loop._modules = {"body": fx.GraphModule(module.body, copy_nodes(module.body.graph))}
            setattr(copied, name, loop)
    state = get_state(graph_module)
    attach_state(copied, dataclasses.replace(state, log=list(state.log), results={}, run=RunContext()))
    return copied


def copy_on(graph_module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A private copy that lies on `device`, for what can only read tensors there; the program stays where it is."""
    copied = private_copy(graph_module)
    get_state(copied).results = copy.deepcopy(get_state(graph_module).results)
    place(copied, device)
    return copied
