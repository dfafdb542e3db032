"""Target `onnxruntime`: attention on queries, keys and values in the layout of their products.

`Attention` and `RotaryEmbedding` also take `[batch, sequence, heads * size]`, and give results of that shape. So the
`Reshape` and `Transpose` before each of them, and the two after, are not needed: eight nodes per attention, 3.5 % of a
decoding step of looped SmolLM2. Caches keep their shape. In rolled files, keys reach attention already joined with
their cache, `[batch, heads, total, size]`, and nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, replace_value, sizes
from loopq_compile.backends.onnx.matching import made_by, only_reader, remove_unused

CONTRIB = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True)
class _Read:
    """The source of one input of attention: `rows [batch, sequence, heads * size]`, rotated by `rotary` if given."""

    rows: ir.Value
    heads: int
    rotary: ir.Node | None


def keep_rows(graph: ir.Graph) -> int:
    """Lets attention read and write heads side by side; returns how many. Those with other inputs or outputs stay."""
    nodes = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    return sum(_rewrite(graph, node) for node in nodes)


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    reads = [_read(value) for value in node.inputs[:3]]
    end = _rows_behind(node.outputs[0])
    if end is None or any(read is None for read in reads):
        return False
    query, key, value = (_rows(read) for read in reads if read is not None)
    heads = [read.heads for read in reads if read is not None]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    old = [end.outputs[0], *node.outputs[1:]]
    made = ir.node(
        "Attention",
        [query, key, value, *node.inputs[3:]],
        attributes,
        outputs=[ir.Value(type=output.type, shape=output.shape) for output in old],
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, [made])
    for before, after in zip(old, made.outputs, strict=True):
        replace_value(before, after)
    remove_unused(graph, end)
    return True


def _read(value: ir.Value | None) -> _Read | None:
    rotary = made_by(value, "RotaryEmbedding", CONTRIB)
    turned = made_by(rotary.inputs[0] if rotary is not None else value, "Transpose")
    grouped = made_by(turned.inputs[0], "Reshape") if turned is not None and _is_heads_first(turned) else None
    rows = grouped.inputs[0] if grouped is not None else None
    if rows is None or grouped is None or rows.shape is None or len(rows.shape) != 3:
        return None
    *leading, heads, size = sizes(grouped.outputs[0])
    whole = isinstance(heads, int) and isinstance(size, int) and sizes(rows) == [*leading, heads * size]
    return _Read(rows, heads, rotary) if whole else None


def _rows(read: _Read) -> ir.Value:
    """The rows, after rotary positions."""
    if read.rotary is None:
        return read.rows
    attributes = {name: attribute.value for name, attribute in read.rotary.attributes.items()}
    attributes["num_heads"] = read.heads
    inputs = [read.rows, *(value for value in read.rotary.inputs[1:] if value is not None)]
    emitter = Emitter(read.rows.graph, read.rotary)  # type: ignore[arg-type]
    return emitter.node("RotaryEmbedding", inputs, read.rows.dtype, read.rows.shape, attributes, domain=CONTRIB)


def _rows_behind(value: ir.Value) -> ir.Node | None:
    """The `Reshape` that puts the heads of `value [batch, heads, sequence, size]` side by side again."""
    turned = only_reader(value, "Transpose")
    end = only_reader(turned.outputs[0], "Reshape") if turned is not None and _is_heads_first(turned) else None
    if turned is None or end is None or end.outputs[0].shape is None:
        return None
    *leading, heads, size = sizes(turned.outputs[0])
    whole = isinstance(heads, int) and isinstance(size, int)
    return end if whole and sizes(end.outputs[0]) == [*leading, heads * size] else None


def _is_heads_first(node: ir.Node) -> bool:
    return "perm" in node.attributes and list(node.attributes["perm"].as_ints()) == _HEADS_FIRST
