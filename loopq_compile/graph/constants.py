"""Constant expressions: nodes that depend only on stored tensors, such as the chains between weights and linears; and
nodes that depend only on those and on sizes, such as the embedding of a loop's time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from loopq_compile.graph.evaluate import sources_of
from loopq_compile.graph.state import get_tensor
from loopq_compile.memory import trim_excess

_aten = torch.ops.aten
_MADE = {
    *(_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.scalar_tensor.default),
    *(_aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.eye.default, _aten.linspace.default),
}
"""Operators that make a tensor from numbers only, the same one every time."""
LATENT = "_latent"
"""End of the name of a weight that is stored as latent numbers (`loopq::from_latent`)."""
_LARGE = 1 << 20
"""After dropping a value of more entries than this, freed memory is returned to the system."""


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The stored tensors of `graph`, and every node that is computed only from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        computed = node.op == "call_function" and inputs and all(argument in found for argument in inputs)
        if node.op == "get_attr" or computed:
            found.add(node)
    return found


def independent_nodes(graph: fx.Graph, sizes: bool = False) -> set[fx.Node]:
    """The nodes that no input of the graph can change: constant ones, and what is computed only from numbers.

    Args:
        graph: a graph of functional operators.
        sizes: include nodes that depend on the sizes of inputs and nothing else of them. These cannot be evaluated.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        is_computed = node.op == "call_function" and not is_random and (inputs or node.target in _MADE)
        is_size = sizes and node.target is _aten.sym_size.int and inputs[0].op == "placeholder"
        if node.op == "get_attr" or is_size or (is_computed and all(argument in found for argument in inputs)):
            found.add(node)
    return found


def evaluate(graph_module: fx.GraphModule, targets: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, Tensor]]:
    """Computes constant nodes, in graph order; drops each value after its last use.

    The caller may rewrite the graph between two values, but must keep the tensors.
    """
    wanted = set(targets)
    needed = sources_of(wanted)
    # Collected first: the caller may replace nodes between values.
    plan = [(n, n.op, n.target, n.args, n.kwargs, n.all_input_nodes) for n in graph_module.graph.nodes if n in needed]
    readers = Counter(argument for *_, inputs in plan for argument in inputs)
    values: dict[fx.Node, Any] = {}
    for node, kind, target, args, kwargs, inputs in plan:
        if kind == "get_attr":
            values[node] = get_tensor(graph_module, str(target)).detach()
        else:
            with torch.no_grad():
                values[node] = target(*map_arg(args, values.__getitem__), **map_arg(kwargs, values.__getitem__))
        for argument in inputs:
            readers[argument] -= 1
            if not readers[argument]:
                del values[argument]
        if node in wanted:
            yield node, values[node]
        large = values[node].numel() >= _LARGE if isinstance(values[node], Tensor) else False
        if not readers[node]:
            del values[node]
        if large and node in wanted:
            trim_excess()


def root_weight(end: fx.Node) -> fx.Node:
    """The stored weight at the start of the chain that ends with `end`."""
    while end.op != "get_attr":
        end = end.args[0]  # type: ignore[assignment]
    return end


def chain_name(graph_module: fx.GraphModule, end: fx.Node) -> str:
    """Base name for the buffers of the chain that ends with `end`: the weight's name, followed by `_loop<row>` where
    the chain reads that row of a table with one row for each loop."""
    rows: set[Any] = set()
    stack, seen = [end], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        table = node.args[0] if node.target is torch.ops.aten.select.int else None
        if (
            isinstance(table, fx.Node)
            and table.op == "get_attr"
            and len(get_tensor(graph_module, str(table.target))) > 1
        ):
            rows.add(node.args[2])
    weight = str(root_weight(end).target).removesuffix(LATENT)
    return f"{weight}_loop{'_'.join(map(str, sorted(rows)))}" if rows else weight
