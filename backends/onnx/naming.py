"""Names and metadata of the nodes in an ONNX file: loop and site, but nothing about the machine that made it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from loopq_compile.backends.onnx.prepare import Origin
from loopq_compile.backends.onnx.translate import WEIGHT_PREFIX, origin_of
from loopq_compile.graph.names import shown_name


def name_everything(model: ir.Model, origins: Mapping[str, Origin]) -> None:
    """Gives nodes names such as `/loop2/layers.0.mlp.up_proj/MatMul`, and their outputs that name plus `_output_0`.

    Metadata of a node afterwards: `loopq.loop` (`"2"`), `loopq.site` and `loopq.node` (its name in the printed
    program), where known. What torch.onnx wrote, including stack traces with local paths, is removed.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        value.metadata_props.clear()
        if name.startswith(WEIGHT_PREFIX):
            _rename_initializer(graph, value, shown_name(name.removeprefix(WEIGHT_PREFIX)))
    kept = {id(value) for value in [*graph.inputs, *graph.outputs]}
    seen: Counter[str] = Counter()
    for node in graph.all_nodes():
        origin = origins.get(origin_of(node) or "")
        node.metadata_props.clear()
        node.doc_string = None
        if origin is not None:
            node.metadata_props.update(_metadata(origin))
        node.name = _unique(_path(node, origin), seen)
        for number, output in enumerate(node.outputs):
            output.metadata_props.clear()
            _order_terms(output)
            if id(output) not in kept:
                output.name = f"{node.name}_output_{number}"
    for value in [*graph.inputs, *graph.outputs]:
        value.metadata_props.clear()
        _order_terms(value)
    graph.metadata_props.clear()
    model.metadata_props.clear()
    graph.name = "main_graph"


def _order_terms(value: ir.Value) -> None:
    """Writes sums of dimensions in one order, since readers of the file treat `a + b` and `b + a` as two dimensions."""
    for axis, size in enumerate(value.shape or ()):
        if isinstance(size, ir.SymbolicDim) and size.value and re.fullmatch(r"\w+( \+ \w+)+", size.value):
            value.shape[axis] = " + ".join(sorted(size.value.split(" + ")))  # type: ignore[index]


def _path(node: ir.Node, origin: Origin | None) -> str:
    parts = [f"loop{origin.loop}" if origin.loop else "", origin.site] if origin else []
    return "/".join(["", *(part for part in parts if part), node.op_type])


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name] - 1}"


def _metadata(origin: Origin) -> dict[str, str]:
    values = {"loopq.loop": origin.loop, "loopq.site": origin.site, "loopq.node": origin.node}
    return {key: value for key, value in values.items() if value}


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
