"""Runs a graph node by node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from loopq_compile.graph.state import get_tensor

Watch = Callable[[fx.Node, Any], Any]


def run(graph_module: fx.GraphModule, inputs: Sequence[Tensor], watch: Watch) -> Any:
    """Runs a graph without gradients; drops each value after its last reader has run.

    Args:
        graph_module: the graph.
        inputs: one tensor for each placeholder.
        watch: is called with every node, the output included, and its value. Later nodes read what it returns instead;
            None leaves the value unchanged.

    Returns:
        What the graph returns.
    """
    with torch.no_grad():
        return _Run(graph_module, watch).run(*inputs)


class _Run(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, watch: Watch) -> None:
        super().__init__(graph_module, garbage_collect_values=True)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        instead = self.watch(n, value)
        return value if instead is None else instead


def values_of(
    graph_module: fx.GraphModule,
    inputs: Sequence[Tensor],
    names: Collection[str],
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Values of some nodes, by name.

    Args:
        graph_module: the graph.
        inputs: one tensor for each placeholder.
        names: names of the nodes.
        given: for some of these nodes, values that later nodes read instead.
    """
    found: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        if node.name not in names:
            return None
        found[node.name] = value
        return (given or {}).get(node.name)

    run(graph_module, inputs, keep)
    return found


def sources_of(targets: Iterable[fx.Node]) -> set[fx.Node]:
    """The `targets` and all nodes from which they are computed."""
    needed, stack = set[fx.Node](), list(targets)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def call_node(graph_module: fx.GraphModule, node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
    """The value of one node without gradients: a stored tensor, or its operator applied to what `read` gives."""
    if node.op == "get_attr":
        return get_tensor(graph_module, str(node.target)).detach()
    target: Any = node.target
    with torch.no_grad():
        return target(*map_arg(node.args, read), **map_arg(node.kwargs, read))
