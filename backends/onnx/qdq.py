"""Target `qdq`: only standard operators, so that any ONNX runtime can read the file."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from loopq_compile.backends.onnx.activations import lower_dynamic_scale, lower_pair, spell_out_pair
from loopq_compile.backends.onnx.emit import constant_array, sizes
from loopq_compile.backends.onnx.flatten import DOMAIN
from loopq_compile.backends.onnx.weights import lower_stacked_weight, lower_weight, multiply
from loopq_compile.errors import LoopQError

OPSET = 21
"""The first operator set with INT4 and block-wise scales; later ones add nothing that this target needs."""


def check_types(graph: ir.Graph) -> None:
    """Refuses a model that computes in a type that ONNX cannot quantize.

    Raises:
        LoopQError: the type is float64.
    """
    for node in _opaque(graph, "Quantize", "Dequantize", "DynamicScale", "Row"):
        if node.inputs[1] is not None and node.inputs[1].dtype is ir.DataType.DOUBLE:
            raise LoopQError("ONNX cannot quantize float64; convert the model first: model.float().")


def lower_stacked_weights(graph: ir.Graph) -> int:
    """Replaces weights that differ between loops: a stack is dequantized, and a loop takes its row."""
    found = 0
    for node in _opaque(graph, "Dequantize"):
        codes, scale = node.inputs
        if _is_row(codes) or (_is_row(scale) and constant_array(codes) is not None):
            lower_stacked_weight(graph, node)
            found += 1
    return found


def lower_dynamic_scales(graph: ir.Graph) -> int:
    """Replaces dynamic scales by the arithmetic that finds them."""
    return _each(graph, lower_dynamic_scale, _opaque(graph, "DynamicScale"))


def lower_weights(graph: ir.Graph) -> int:
    """Replaces the `Dequantize` of stored weights by `DequantizeLinear`."""
    weights = [node for node in _opaque(graph, "Dequantize") if constant_array(node.inputs[0]) is not None]
    return _each(graph, lower_weight, weights)


def spell_out_pairs(graph: ir.Graph, static: bool = False) -> int:
    """Rounds activations in floating point: those with per-token scales, and with `static` scales, too."""
    nodes = _opaque(graph, "Quantize")
    if not static:
        nodes = [node for node in nodes if len(sizes(node.inputs[1])) == len(sizes(node.inputs[0]))]  # type: ignore[arg-type]
    return _each(graph, spell_out_pair, nodes)


def lower_pairs(graph: ir.Graph) -> int:
    """Replaces quantized activations by `QuantizeLinear` and `DequantizeLinear`."""
    return _each(graph, lower_pair, _opaque(graph, "Quantize"))


def lower_linears(graph: ir.Graph) -> int:
    """Replaces linear layers by `MatMul` and `Add`."""
    nodes = _opaque(graph, "Linear")
    multiply(graph, nodes)
    return len(nodes)


def _each(graph: ir.Graph, change: Callable[[ir.Graph, ir.Node], None], nodes: list[ir.Node]) -> int:
    for node in nodes:
        change(graph, node)
    return len(nodes)


def _opaque(graph: ir.Graph, *op_types: str) -> list[ir.Node]:
    return [node for node in graph if node.domain == DOMAIN and node.op_type in op_types]


def _is_row(value: ir.Value | None) -> bool:
    """Whether `value` is a row of stored weights."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Row" and constant_array(node.inputs[0]) is not None
