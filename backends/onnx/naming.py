"""Names and metadata of the nodes in an ONNX file: loop and site, but nothing about the machine that made it."""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import common

from loopq_compile.backends.onnx.flatten import DOMAIN
from loopq_compile.backends.onnx.translate import WEIGHT_PREFIX
from loopq_compile.backends.onnx.weights import TURNED
from loopq_compile.graph.names import shown_name

IR_VERSION = 10


def clean_up(graph: ir.Graph) -> None:
    """Removes leftovers of lowering; folds no constants."""
    model = ir.Model(graph, ir_version=IR_VERSION)
    common.RemoveUnusedNodesPass()(model)
    graph.opset_imports.pop(DOMAIN, None)
    common.RemoveUnusedOpsetsPass()(model)


def name_everything(graph: ir.Graph) -> None:
    """Gives nodes names such as `/loop2/layers.0.mlp.up_proj/MatMul`, and their outputs that name plus `_output_0`.

    Loop and site are in the metadata of a node since it was translated.
    """
    for name, value in list(graph.initializers.items()):
        value.metadata_props.clear()
        if name.startswith(WEIGHT_PREFIX):
            _rename_initializer(graph, value, shown_name(name.removeprefix(WEIGHT_PREFIX)))
    kept = {id(value) for value in [*graph.inputs, *graph.outputs]}
    seen: Counter[str] = Counter()
    for node in graph.all_nodes():
        node.metadata_props.pop(TURNED, None)
        node.doc_string = None
        node.name = _unique(_path(node), seen)
        for number, output in enumerate(node.outputs):
            output.metadata_props.clear()
            _order_terms(output)
            if id(output) not in kept:
                output.name = f"{node.name}_output_{number}"
    for value in [*graph.inputs, *graph.outputs]:
        value.metadata_props.clear()
        _order_terms(value)
    graph.metadata_props.clear()
    graph.name = "main_graph"


def _order_terms(value: ir.Value) -> None:
    """Writes sums of dimensions in one order, since readers of the file treat `a + b` and `b + a` as two dimensions."""
    for axis, size in enumerate(value.shape or ()):
        if isinstance(size, ir.SymbolicDim) and size.value and re.fullmatch(r"\w+( \+ \w+)+", size.value):
            value.shape[axis] = " + ".join(sorted(size.value.split(" + ")))  # type: ignore[index]


def _path(node: ir.Node) -> str:
    loop, site = (node.metadata_props.get(f"loopq.{part}") for part in ("loop", "site"))
    parts = [f"loop{loop}" if loop else "", site]
    return "/".join(["", *(part for part in parts if part), node.op_type])


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name] - 1}"


def _rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    while name in graph.initializers:
        name += "_"
    old = value.name
    assert old is not None
    graph.initializers.pop(old)
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.initializers[name] = value
