"""Stores floating-point tensors of a file in 16 bits: scales, embeddings, a head, norm gains and transforms."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.branches import branches
from loopq_compile.errors import LoopQError

FLOAT_BITS = (16, 32)
_SMALLEST = 4096
"""Smallest number of entries for which a tensor is worth a `Cast`."""


def store_half(graph: ir.Graph) -> None:
    """Stores tensors of 4,096 entries or more as float16, and widens them where they are read.

    All arithmetic stays in single precision. An embedding stays in 16 bits in memory: only the rows that a call looks
    up are widened. Every other tensor has one `Cast` before its readers, which ONNX Runtime computes once when
    it opens the file. A tensor stays in float32 if a number would become 0 in float16.

    Raises:
        LoopQError: a tensor has numbers that are too large for float16.
    """
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.dtype is not ir.DataType.FLOAT or tensor.size < _SMALLEST or value.is_graph_output():
            continue
        narrow = half_of(tensor.numpy(), value.name or "")
        if narrow is None:
            continue
        stored = ir.tensor(narrow, name=f"{name}.half")
        half = ir.Value(
            name=stored.name, type=ir.TensorType(ir.DataType.FLOAT16), shape=value.shape, const_value=stored
        )
        graph.register_initializer(half)
        _widen(graph, value, half)
        del graph.initializers[name]


def half_of(array: np.ndarray, name: str) -> np.ndarray | None:
    """`array` in float16; None if a number would become 0, since a scale of 0 is not a scale.

    Raises:
        LoopQError: a number is too large for float16; the message has the tensor's `name`.
    """
    largest = np.abs(array).max(initial=0, where=np.isfinite(array))
    if largest > np.finfo(np.float16).max:
        raise LoopQError(
            f"{name} holds {largest:.3g}, too large for 16 bits: leave out float_bits=16 (--float-bits 16), or set "
            "float_bits=32."
        )
    narrow = array.astype(np.float16)
    return None if np.any((narrow == 0) & (array != 0)) else narrow


def _widen(graph: ir.Graph, value: ir.Value, half: ir.Value) -> None:
    looked_up = [node for node, position in value.uses() if node.op_type == "Gather" and position == 0]
    places = [graph, *branches(graph)]
    for node in [node for node in looked_up if node.attributes.get_int("axis", 0) == 0 and node.graph in places]:
        result, place = node.outputs[0], node.graph
        assert isinstance(place, ir.Graph)
        rows = ir.Value(type=ir.TensorType(ir.DataType.FLOAT16), shape=result.shape)
        gather = ir.node(
            "Gather", [half, node.inputs[1]], {"axis": 0}, outputs=[rows], metadata_props=dict(node.metadata_props)
        )
        cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT.value}, metadata_props=dict(node.metadata_props))
        cast.outputs[0].type, cast.outputs[0].shape = result.type, result.shape
        place.insert_before(node, [gather, cast])
        ir.convenience.replace_all_uses_with(result, cast.outputs[0])
        place.remove(node, safe=True)
    if value.uses():
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        graph.insert_before(next(iter(graph)), [cast])
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
