"""Helpers for passes that create nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from torch import Tensor, fx

from loopq_compile.errors import InternalError
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import LoopTag, set_tag
from loopq_compile.graph.state import free_name, set_tensor


@contextlib.contextmanager
def inserting(graph: fx.Graph, *, before: fx.Node, tag: LoopTag | None, site: str = "") -> Iterator[list[fx.Node]]:
    """Creates nodes before `before`; they get the loop `tag` and the name of the `site` they serve.

    Constants may be added at the top of the graph meanwhile (`add_constant`). Only these two places are checked; else a
    pass that opens a block for every linear would read the whole graph for each of them.

    Raises:
        InternalError: nodes were created elsewhere, or erased.
    """
    first, previous, count = next(iter(graph.nodes)), before.prev, len(graph.nodes)
    made: list[fx.Node] = []
    with graph.inserting_before(before):
        yield made
    on_top = list(takewhile(lambda node: node is not first, graph.nodes))
    in_front: list[fx.Node] = []
    node = before.prev
    while before is not first and node is not previous and node.op != "root":
        in_front.append(node)
        node = node.prev
    made += on_top + in_front[::-1]
    if len(made) != len(graph.nodes) - count:
        raise InternalError(f"inserting before {before.name!r}: nodes were created elsewhere, or erased.")
    for node in made:
        set_tag(node, None if node.op == "get_attr" else tag)
        if site:
            node.meta[SITE] = site


def call(graph: fx.Graph, operator: Any, *args: Any) -> fx.Node:
    """A node `operator(*args)` named after the operator."""
    return graph.create_node("call_function", operator, args, name=operator.overloadpacket.__name__)


def add_constant(graph_module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Registers `tensor` as buffer `name`, or a similar free name, and returns a `get_attr` node at the top."""
    name = free_name(graph_module, name)
    set_tensor(graph_module, name, tensor)
    graph = graph_module.graph
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        return graph.get_attr(name)


def attribute_name(name: str) -> str:
    """`name` with everything but letters, digits and underscores replaced, usable as one part of a buffer name."""
    return "".join(c if c.isalnum() else "_" for c in name)
