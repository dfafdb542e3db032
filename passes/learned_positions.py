"""Learned positions in a graph with a key-value cache: the number of a token counts real tokens, not padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from loopq_compile.loops import get_tag, set_tag
from loopq_compile.passes.cache_regions import Regions, is_pointwise, shape_of
from loopq_compile.passes.last_rows import LastRows

_aten = torch.ops.aten
_LENGTH = 6


def find_tables(regions: Regions) -> dict[fx.Node, int]:
    """Tables of learned positions, as the nodes that read them, and the row that the first token reads.

    A table is a stored matrix of which the first `sequence` rows are added to the tokens' states: `embedding(table,
    arange)`, or `table[:sequence]`. Rotary tables are left alone: only distances matter there.
    """
    nodes = [node for node in regions.graph_module.graph.nodes if node in regions.positions]
    first = {node: _first_row(regions, node) for node in nodes}
    return {n: row for n, row in first.items() if row is not None and _is_added_to_tokens(regions, n)}


def read_by_token(tables: dict[fx.Node, int], rows: LastRows, padding: fx.Node) -> None:
    """Lets `tables` be read at `position [batch, new]`, counted from the attention mask `padding`."""
    graph = padding.graph
    positions = _positions(graph, rows, padding) if tables else padding
    for node, first in tables.items():
        with graph.inserting_before(node):
            index = positions if first == 0 else graph.call_function(_aten.add.Tensor, (positions, first))
            read = graph.call_function(_aten.embedding.default, (node.args[0], index))
        set_tag(read, get_tag(node))
        rows.made[node, len(shape_of(node)) - 2] = read


def _first_row(regions: Regions, node: fx.Node) -> int | None:
    """The row of the table that the first token reads; None if `node` reads no table row by row."""
    table: Any = node.args[0] if node.args else None
    rank = len(shape_of(node))
    if not isinstance(table, fx.Node) or table.op != "get_attr" or regions.axes(node) != [rank - 2]:
        return None
    if node.target is _aten.embedding.default:
        index = node.args[1]
        assert isinstance(index, fx.Node)
        values = regions.compute([index], _LENGTH)[index]
        first = int(values.flatten()[0])
        return first if torch.equal(values, torch.arange(_LENGTH).expand(values.shape) + first) else None
    if node.target is _aten.slice.Tensor and rank == 2 and node.args[1] == 0 and node.args[2] in (0, None):
        return 0 if len(node.args) < 5 or node.args[4] == 1 else None
    return None


def _is_added_to_tokens(regions: Regions, node: fx.Node) -> bool:
    """Whether all that reads `node` adds it, maybe cast or scaled, to states `[batch, sequence, width]`."""
    for user in node.users:
        if not is_pointwise(user) or len(shape_of(user)) > 3:
            return False
        if user in regions.positions and not _is_added_to_tokens(regions, user):
            return False
    return bool(node.users) and len(shape_of(node)) in (2, 3)


def _positions(graph: fx.Graph, rows: LastRows, padding: fx.Node) -> fx.Node:
    """`[batch, new]`: how many real tokens stand before each new one."""
    with graph.inserting_before(rows.total.next):
        call: Any = graph.call_function
        counted = call(_aten.sub.Tensor, (call(_aten.cumsum.default, (padding, 1)), 1))
        return call(_aten.slice.Tensor, (call(_aten.clamp_min.default, (counted, 0)), 1, rows.past, rows.total))
