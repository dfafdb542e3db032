"""Writes new nodes into an ONNX graph in place of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from loopq_compile.errors import InternalError


class Emitter:
    """Puts ONNX nodes before `anchor`, which they will replace; they inherit its metadata.

    Args:
        graph: the graph that holds `anchor`.
        anchor: an existing node.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph = graph
        self.anchor = anchor

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType | None,
        shape: Iterable[Any] | None,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Adds a node, by default a standard one, and returns its only output."""
        output = ir.Value(
            type=ir.TensorType(dtype) if dtype is not None else None,
            shape=ir.Shape(list(shape)) if shape is not None else None,
        )
        metadata = dict(self.anchor.metadata_props)
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=[output], metadata_props=metadata)
        self.graph.insert_before(self.anchor, [node])
        return output

    def reshape(self, x: ir.Value, tail: Sequence[int], keep: int) -> ir.Value:
        """`x` with its first `keep` dimensions unchanged, followed by the sizes `tail`."""
        target = constant(self.graph, "shape_" + "_".join(map(str, [*["n"] * keep, *tail])), [0] * keep + list(tail))
        return self.node("Reshape", [x, target], x.dtype, [*sizes(x)[:keep], *tail])

    def rearrange(self, x: ir.Value, shape: Sequence[Any]) -> ir.Value:
        """`x` in another shape, of whose dimensions one may vary that did not stay where it was."""
        known = [0 if i < len(sizes(x)) and sizes(x)[i] == size else size for i, size in enumerate(shape)]
        target = [size if isinstance(size, int) else -1 for size in known]
        name = "to_" + "_".join(str(size).replace("-1", "rest") for size in target)
        return self.node("Reshape", [x, constant(self.graph, name, target)], x.dtype, shape)

    def finish(self, result: ir.Value) -> None:
        """Lets `result` take the place of the anchor's output and removes the anchor."""
        replace_value(self.anchor.outputs[0], result)
        self.graph.remove(self.anchor, safe=True)


def sizes(value: ir.Value) -> list[Any]:
    """Dimensions of `value`: numbers, and symbols for those that vary.

    Raises:
        InternalError: they are unknown.
    """
    if value.shape is None:
        raise InternalError(f"The shape of {value.name} is unknown.")
    return [size if isinstance(size, ir.SymbolicDim) else int(size) for size in value.shape]


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Lets every user of `old` read `new`; a graph output keeps its name."""
    graph = old.graph
    for position, output in enumerate(graph.outputs if graph is not None else ()):
        if output is old:
            assert graph is not None
            new.name, old.name = old.name, None
            graph.outputs[position] = new
    ir.convenience.replace_all_uses_with(old, new)


def constant(graph: ir.Graph, name: str, values: Any, dtype: ir.DataType | None = None) -> ir.Value:
    """Initializer `name`; created if there is none.

    Args:
        values: what numpy makes an array of; integers become int64.
        dtype: ONNX type, if it differs from the array's.
    """
    if name in graph.initializers:
        return graph.initializers[name]
    array = np.asarray(values)
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or `Constant` node; None for computed values."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
