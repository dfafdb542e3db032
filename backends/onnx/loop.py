"""Form `rolled`: what was translated between `LoopBegin` and `LoopEnd` becomes the body of an ONNX `Loop`.

Only nodes that depend on the loop's state or number move. Dequantized weights, and everything else that is equal in all
iterations, are computed once before the loop. So the body has no `DequantizeLinear` before a `MatMul`: ONNX Runtime
1.31 would fuse them there and then fail to find the weight.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, replace_value, sizes
from loopq_compile.backends.onnx.flatten import DOMAIN, EXTENT

LOOPS = "loops"
"""Name of the input with the loop count."""


def lower_rows(graph: ir.Graph) -> int:
    """Replaces `Row(table, row)` by `Gather`; rows of an integer weight are taken after its `DequantizeLinear`."""
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == "Row"]
    for node in nodes:
        table, row = node.inputs
        assert table is not None and row is not None
        emitter = Emitter(graph, node)
        emitter.finish(emitter.node("Gather", [table, row], table.dtype, node.outputs[0].shape, {"axis": 0}))
    return len(nodes)


def roll(graph: ir.Graph) -> None:
    """Replaces every pair of marks by a `Loop`. The first loop's count is a new graph input, `LOOPS`."""
    extent = next((value for value in graph.inputs if value.name == EXTENT), None)
    if extent is None:
        return
    loops = ir.Value(name=LOOPS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    graph.inputs[list(graph.inputs).index(extent)] = loops
    for end in [node for node in graph if node.op_type == "LoopEnd" and node.domain == DOMAIN]:
        number = end.attributes["number"].as_int()
        begin = next(
            node
            for node in graph
            if node.op_type == "LoopBegin" and node.domain == DOMAIN and node.attributes["number"].as_int() == number
        )
        _roll(graph, begin, end, loops)
    if extent.uses():
        _spell_out(graph, extent, loops)


def _roll(graph: ir.Graph, begin: ir.Node, end: ir.Node, loops: ir.Value) -> None:
    inside = _between(graph, begin, end)
    iteration = ir.Value(name="iteration", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    always = ir.Value(name="proceed", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    early = bool(end.attributes["early"].as_int())
    last = constant(graph, f"last_row_{begin.attributes['rows'].as_int() - 1}", begin.attributes["rows"].as_int() - 1)
    row = ir.Value(type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    nodes = [ir.node("Min", [iteration, last], outputs=[row])]
    ir.convenience.replace_all_uses_with(begin.outputs[0], row)
    ir.convenience.replace_all_uses_with(begin.outputs[1], iteration)
    state = [ir.Value(name=f"state_{i}", type=x.type, shape=x.shape) for i, x in enumerate(begin.outputs[2:])]
    for old, new in zip(begin.outputs[2:], state, strict=True):
        ir.convenience.replace_all_uses_with(old, new)
    results = [end.inputs[-1], *end.inputs[:-1]] if early else [always, *end.inputs]
    emitter = Emitter(graph, end)
    count = loops
    if begin.attributes["number"].as_int():
        count = constant(graph, f"count_{begin.name}", begin.attributes["count"].as_int())
    elif skipped := begin.attributes["skipped"].as_int():
        count = emitter.node("Sub", [loops, constant(graph, "skipped", skipped)], ir.DataType.INT64, [])
    outputs = []
    tail = []
    for value in results:
        assert value is not None
        copy = ir.Value(type=value.type, shape=value.shape)
        tail.append(ir.node("Identity", [value], outputs=[copy]))
        outputs.append(copy)
    initial = list(begin.inputs)
    finals = [ir.Value(type=x.type, shape=x.shape) for x in end.outputs]
    graph.remove(inside)
    body = ir.Graph([iteration, always, *state], outputs, nodes=[*nodes, *inside, *tail], name="body")
    loop = ir.node("Loop", [count, None, *initial], {"body": body}, outputs=finals)
    graph.insert_before(end, [loop])
    fill = _fill_up(emitter, count, finals[len(state) :]) if early else finals[len(state) :]
    for old, new in zip(end.outputs, [*finals[: len(state)], *fill], strict=True):
        replace_value(old, new)
    graph.remove(end, safe=True)
    graph.remove(begin, safe=True)


def _fill_up(emitter: Emitter, count: ir.Value, collected: list[ir.Value]) -> list[ir.Value]:
    """What a loop that stopped early collected; the last entry is repeated for every iteration that did not run."""
    graph, kind, size = emitter.graph, ir.DataType.INT64, ir.SymbolicDim(LOOPS)
    zero, one = constant(graph, "first_iteration", 0), constant(graph, "one_iteration", 1)
    numbers = emitter.node("Range", [zero, count, one], kind, [size])
    filled = []
    for values in collected:
        shape = emitter.node("Shape", [values], kind, [1], {"start": 0, "end": 1})
        last = emitter.node("Sub", [shape, one], kind, [1])
        rows = emitter.node("Min", [numbers, last], kind, [size])
        filled.append(emitter.node("Gather", [values, rows], values.dtype, [size, *sizes(values)[1:]], {"axis": 0}))
    return filled


def _between(graph: ir.Graph, begin: ir.Node, end: ir.Node) -> list[ir.Node]:
    """The nodes that depend on the results of `begin`, in order."""
    values = set(begin.outputs)
    found = []
    for node in graph:
        if node is not end and node is not begin and any(value in values for value in node.inputs):
            found.append(node)
            values.update(node.outputs)
        if node is end:
            break
    return found


def _spell_out(graph: ir.Graph, extent: ir.Value, loops: ir.Value) -> None:
    """Gives shape arithmetic that asks for the number of loops a vector with that many entries."""
    first = next(iter(graph))
    shape = ir.Value(type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    vector = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([LOOPS]))
    one = constant(graph, "shape_of_one", np.array([1], dtype=np.int64))
    nodes = [ir.node("Reshape", [loops, one], outputs=[shape]), ir.node("ConstantOfShape", [shape], outputs=[vector])]
    graph.insert_before(first, nodes)
    ir.convenience.replace_all_uses_with(extent, vector)
