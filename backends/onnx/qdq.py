"""Target `qdq`: only standard operators, so that any ONNX runtime can read the file."""

from __future__ import annotations

import onnx_ir as ir

from loopq_compile.backends.onnx.activations import lower_dynamic_scale, lower_pair, spell_out_pair
from loopq_compile.backends.onnx.emit import constant_array, sizes
from loopq_compile.backends.onnx.loop import lower_rows
from loopq_compile.backends.onnx.translate import DOMAIN
from loopq_compile.backends.onnx.weights import lower_linears, lower_stacked_weight, lower_weight
from loopq_compile.errors import InternalError, LoopQError

OPSET = 21
"""The first operator set with INT4 and block-wise scales; later ones add nothing that this target needs."""

_MARKS = ("LoopBegin", "LoopEnd")
"""Nodes that `backends.onnx.loop` removes."""


def lower_to_qdq(model: ir.Model, *, spell_out: bool = False) -> None:
    """Replaces the nodes of domain `loopq` in place; afterwards all nodes are standard.

    Args:
        spell_out: whether to round activations with per-token scales in floating point.

    Raises:
        LoopQError: the model computes in a type that ONNX cannot quantize (float64).
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type not in _MARKS]
    for node in nodes:
        if node.op_type != "Linear" and node.inputs[1] is not None and node.inputs[1].dtype is ir.DataType.DOUBLE:
            raise LoopQError("ONNX cannot quantize float64; convert the model first: model.float().")
    for node in nodes:
        if node.op_type != "Dequantize":
            continue
        codes, scale = node.inputs
        if _is_row(codes) or (_is_row(scale) and constant_array(codes) is not None):
            lower_stacked_weight(graph, node)
    lower_rows(graph)
    for node in nodes:
        if node.op_type == "DynamicScale":
            lower_dynamic_scale(graph, node)
        elif node.op_type == "Dequantize" and constant_array(node.inputs[0]) is not None:
            lower_weight(graph, node, bits=node.attributes["bits"].as_int() or None)
    for node in [node for node in nodes if node.op_type == "Quantize"]:
        x, scale = node.inputs
        varies = x is not None and scale is not None and len(sizes(scale)) == len(sizes(x))
        (spell_out_pair if spell_out and varies else lower_pair)(graph, node)
    lower_linears(graph, [node for node in nodes if node.op_type == "Linear"])
    left = [node.name for node in graph if node.domain == DOMAIN and node.op_type not in _MARKS]
    if left:
        raise InternalError(f"Nodes without a translation to standard ONNX are left: {left[:5]}.")


def _is_row(value: ir.Value | None) -> bool:
    """Whether `value` is a row of stored weights."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Row" and constant_array(node.inputs[0]) is not None
