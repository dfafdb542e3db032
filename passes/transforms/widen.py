"""Gives a transform-weight group separate transforms and weights in every loop: a helper of `select-transforms`."""

from __future__ import annotations

import torch
from torch import fx

from loopq_compile.graph.insert import add_constant
from loopq_compile.graph.keys import TRANSFORM
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_state, get_tensor, set_tensor
from loopq_compile.graph.weights import site_calls, weight_chain

_aten = torch.ops.aten


def loop_groups(graph_module: fx.GraphModule) -> dict[str, int]:
    """Groups in loops that have one transform and one set of weights for all iterations, with the number of
    iterations."""
    state = get_state(graph_module)
    counts: dict[str, int] = {}
    shared: dict[str, bool] = {}
    for site, linears in site_calls(graph_module):
        count = max(state.loops.iterations(get_tag(linear)) for linear in linears)
        same = len({linear.args[1] for linear in linears}) == 1
        counts[site.group] = max(counts.get(site.group, 1), count)
        shared[site.group] = shared.get(site.group, True) and same and len(linears) == count
    return {group: count for group, count in counts.items() if count > 1 and shared[group]}


def widen(graph_module: fx.GraphModule, *groups: str) -> None:
    """Gives `groups` transforms and weights per iteration, copied from the shared ones; the program's results stay.

    Tables of the group's transform get a row for each iteration; the chain between weight and linears is repeated with
    separate clip ratios (or scales) and rounding offsets.
    """
    state = get_state(graph_module)
    counts = loop_groups(graph_module)
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    for table in [node for node in order if node.meta.get(TRANSFORM) in groups]:
        values = get_tensor(graph_module, str(table.target))
        rows = counts[table.meta[TRANSFORM]]
        set_tensor(graph_module, str(table.target), values[:1].repeat(rows, *[1] * (values.ndim - 1)))
        for select in [user for user in table.users if get_tag(user) is not None]:
            select.args = (table, 0, state.loops.row(get_tag(select)))
    for site, linears in site_calls(graph_module):
        if site.group in groups:
            chain = weight_chain(linears[0])
            if len(chain) > 1:
                for linear in linears:
                    row = state.loops.row(get_tag(linear))
                    linear.replace_input_with(chain[-1], _repeat(graph_module, chain, row, order))
    graph_module.graph.eliminate_dead_code()


def _repeat(graph_module: fx.GraphModule, chain: list[fx.Node], row: int, order: dict[fx.Node, int]) -> fx.Node:
    """A copy of the constant nodes of `chain` that reads `row` of transform tables and has its own buffers.

    `order` has the positions of the nodes as they were before anything was copied.
    """
    graph, weight = graph_module.graph, chain[0]
    needed: set[fx.Node] = set()
    stack = [chain[-1]]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    copied: dict[fx.Node, fx.Node] = {}
    behind = chain[-1].next
    for node in sorted(needed, key=order.__getitem__):
        if node.op == "get_attr":
            copied[node] = node if node is weight or TRANSFORM in node.meta else _own(graph_module, node, row)
            continue
        with graph.inserting_before(behind):
            made = graph.node_copy(node, copied.__getitem__)
        table = node.args[0]
        if node.target is _aten.select.int and isinstance(table, fx.Node) and TRANSFORM in table.meta:
            made.args = (copied[table], 0, row)
        copied[node] = made
    return copied[chain[-1]]


def _own(graph_module: fx.GraphModule, node: fx.Node, row: int) -> fx.Node:
    weight, _, part = str(node.target).rpartition("_")
    name = f"{weight}_loop{row}_{part}"
    table = get_tensor(graph_module, str(node.target))
    own = table.clone() if table.is_contiguous() else table[:1, :1].clone().expand(table.shape)  # offsets of zero
    made = add_constant(graph_module, name, own)
    made.meta = dict(node.meta)
    return made
