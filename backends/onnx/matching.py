"""Reads an ONNX graph: what made a value, what reads it, and what nothing reads any more."""

from __future__ import annotations

import onnx_ir as ir


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that gives `value`, if it is one of that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only node that reads `value`, if it has this standard operator and `value` is not a result of the file."""
    readers = [reader for reader, _ in value.uses()]
    if value.is_graph_output() or len(readers) != 1:
        return None
    return readers[0] if readers[0].op_type == op_type and readers[0].domain == "" else None


def remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Removes `node` if nothing reads its results, and then the nodes that made inputs only for it."""
    if node.graph is not graph or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    makers = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for maker in makers:
        if maker is not None:
            remove_unused(graph, maker)
