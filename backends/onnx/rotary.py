"""Target `onnxruntime`: rotary positions as one node, `com.microsoft::RotaryEmbedding`, instead of six or seven.

This replaces `x * cos + concat(-second half of x, first half of x) * sin` for `x [batch, heads, sequence, size]`. The
operator takes tables `[sequence, size / 2]`, so both halves of a table must be equal. This is seen from the nodes that
compute it, `cos(concat(angles, angles))`. If it cannot be seen, or if tables differ between rows of a batch, the nodes
stay. The gain: a decoding step has many small nodes, each of which costs more to start than to compute.

Positions are given in full, `[batch, sequence]`, once for all nodes. The operator also accepts only the first position,
but OpenVINO takes that for the position of every token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, constant_array, sizes
from loopq_compile.backends.onnx.matching import made_by

CONTRIB = "com.microsoft"
_PASSED = {"Unsqueeze", "Cast", "Cos", "Sin", "Identity"}
"""Operators that keep two equal halves of the last axis equal."""


def fuse_rotary(graph: ir.Graph) -> int:
    """Replaces rotary positions by `RotaryEmbedding`; returns how many there were."""
    tables: dict[ir.Value, ir.Value] = {}
    positions: dict[tuple[Any, ...], ir.Value] = {}
    found = 0
    for node in [node for node in graph if node.op_type == "Add" and node.domain == ""]:
        parts = _match(node)
        if parts is None:
            continue
        x, cos, sin = parts
        emitter = Emitter(graph, node)
        halves = [_half_table(emitter, tables, table) for table in (cos, sin)]
        result = node.outputs[0]
        inputs = [x, _positions(emitter, positions, x, cos), *halves]
        emitter.finish(
            emitter.node("RotaryEmbedding", inputs, result.dtype, result.shape, {"interleaved": 0}, domain=CONTRIB)
        )
        found += 1
    return found


def _match(add: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """`(x, cos, sin)` of `x * cos + turned(x) * sin`; None for any other sum."""
    products = [made_by(value, "Mul") for value in add.inputs]
    if None in products:
        return None
    for straight, turned in (products, products[::-1]):
        for position in (0, 1):
            x = _turned(turned.inputs[position])  # type: ignore[union-attr]
            if x is None or x not in straight.inputs:  # type: ignore[union-attr]
                continue
            sin = turned.inputs[1 - position]  # type: ignore[union-attr]
            cos = straight.inputs[1 - straight.inputs.index(x)]  # type: ignore[union-attr]
            if cos is not None and sin is not None and _fits(x, cos, sin):
                return x, cos, sin
    return None


def _fits(x: ir.Value, *tables: ir.Value) -> bool:
    size, rank = sizes(x)[-1], len(sizes(x))
    if rank != 4 or not isinstance(size, int) or x.dtype is not ir.DataType.FLOAT:
        return False
    shapes = [sizes(table) for table in tables]
    alike = all(len(s) >= 2 and s[-1] == size and all(leading == 1 for leading in s[:-2]) for s in shapes)
    return alike and all(_has_equal_halves(table) for table in tables)


def _turned(value: ir.Value | None) -> ir.Value | None:
    """`x`, if `value` is `concat(-second half of x, first half of x)` along the last axis."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or not _is_last(joined, joined.outputs[0]):
        return None
    negative = made_by(joined.inputs[0], "Neg")
    first, second = _half(joined.inputs[1]), _half(negative.inputs[0]) if negative is not None else None
    if first is None or second is None or first[0] is not second[0] or (first[1], second[1]) != (0, 1):
        return None
    return first[0]


def _half(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The tensor of which `value` is a half along the last axis, and which half; None for anything else."""
    maker = value.producer() if value is not None else None
    x = maker.inputs[0] if maker is not None and maker.inputs else None
    if maker is None or x is None or value is None or x.shape is None or value.shape is None:
        return None
    size = sizes(x)[-1]
    if not isinstance(size, int) or sizes(value)[-1] * 2 != size:
        return None
    if maker.op_type == "Split" and _is_last(maker, x) and len(maker.outputs) == 2:
        return x, maker.outputs.index(value)
    if maker.op_type != "Slice" or len(maker.inputs) != 5:
        return None
    start, _, axis, step = (constant_array(given) for given in maker.inputs[1:])
    if start is None or axis is None or step is None or axis.size != 1 or int(step.item()) != 1:
        return None
    if int(axis.item()) % len(sizes(x)) != len(sizes(x)) - 1 or int(start.item()) not in (0, size // 2):
        return None
    return x, int(int(start.item()) > 0)


def _has_equal_halves(table: ir.Value) -> bool:
    value: ir.Value | None = table
    while value is not None:
        maker = value.producer()
        if maker is None or maker.domain != "":
            return False
        if maker.op_type == "Concat":
            return len(maker.inputs) == 2 and maker.inputs[0] is maker.inputs[1] and _is_last(maker, value)
        scaled = maker.op_type == "Mul" and len(maker.inputs) == 2 and _is_number(maker.inputs[1])
        if maker.op_type not in _PASSED and not scaled:
            return False
        source = maker.inputs[0]
        if maker.op_type == "Unsqueeze" and (source is None or sizes(source)[-1] != sizes(value)[-1]):
            return False
        value = source
    return False


def _half_table(emitter: Emitter, tables: dict[ir.Value, ir.Value], table: ir.Value) -> ir.Value:
    """The first half `[sequence, size / 2]` of a table, made right after it, and only once."""
    if table not in tables:
        graph, size = emitter.graph, sizes(table)[-1]
        maker = table.producer()
        assert maker is not None
        spot = Emitter(graph, next(node for node in _behind(graph, maker)))
        rows = spot.node("Reshape", [table, constant(graph, f"to_rest_{size}", [-1, size])], table.dtype, [None, size])
        ends = [
            constant(graph, f"{name}_of_half_{size}", [number]) for name, number in (("end", size // 2), ("axis", 1))
        ]
        first = constant(graph, "start_of_half", [0])
        tables[table] = spot.node("Slice", [rows, first, *ends], table.dtype, [None, size // 2])
    return tables[table]


def _positions(emitter: Emitter, made: dict[tuple[Any, ...], ir.Value], x: ir.Value, table: ir.Value) -> ir.Value:
    """0, 1, ... for every row of the batch, `[batch, sequence]`.

    Both sizes are read from inputs of the graph if possible, so that none of these nodes ends up in a loop.
    """
    graph, kind, size = emitter.graph, ir.DataType.INT64, [sizes(x)[0], sizes(table)[-2]]
    sources = [_input_with(graph, wanted) for wanted in size]
    everywhere = None not in sources
    key = (*map(str, size),) if everywhere else (x, table)
    if key not in made:
        spot = Emitter(graph, next(iter(graph))) if everywhere else emitter
        parts = [
            spot.node("Shape", [value], kind, [1], {"start": axis, "end": axis + 1})
            for value, axis in (sources[0] or (x, 0), sources[1] or (table, len(sizes(table)) - 2))
        ]
        shape = spot.node("Concat", parts, kind, [2], {"axis": 0})
        ones = spot.node("ConstantOfShape", [shape], kind, size, {"value": ir.tensor(np.array([1], dtype=np.int64))})
        axis = constant(graph, "axis_of_sequence", np.int64(1))
        made[key] = spot.node("CumSum", [ones, axis], kind, size, {"exclusive": 1})
    return made[key]


def _input_with(graph: ir.Graph, size: Any) -> tuple[ir.Value, int] | None:
    """An input of the graph, and its axis, with the symbolic size `size`."""
    if isinstance(size, int) or size.value is None:
        return None
    found = ((value, axis) for value in graph.inputs for axis, other in enumerate(value.shape or ()) if other == size)
    return next(found, None)


def _behind(graph: ir.Graph, maker: ir.Node) -> list[ir.Node]:
    nodes = list(graph)
    return nodes[nodes.index(maker) + 1 :]


def _is_last(node: ir.Node, value: ir.Value) -> bool:
    rank = len(sizes(value))
    return node.attributes.get_int("axis", 0) % rank == rank - 1


def _is_number(value: ir.Value | None) -> bool:
    array = constant_array(value)
    return array is not None and array.size == 1
