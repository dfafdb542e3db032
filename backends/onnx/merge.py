"""Target `onnxruntime`: merges products that read one tensor, such as query, key and value, or gate and up.

ONNX Runtime rounds the activations separately for every `MatMulNBits`, and each has a start-up cost. In a decoding
step, where products have one row, that is a tenth of their time. Merged weights are stored once for all loops.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, constant_array, replace_value, sizes
from loopq_compile.backends.onnx.translate import WEIGHT_PREFIX

CONTRIB = "com.microsoft"
_ALIKE = ("K", "bits", "block_size", "accuracy_level")


def merge_products(graph: ir.Graph) -> int:
    """Merges packed products that read one tensor; returns how many merged ones there are.

    A weight is merged only if it is merged with the same weights wherever it is read; else it would be stored twice.
    """
    families: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMulNBits" and node.domain == CONTRIB and _is_stored(node):
            families[node.inputs[0], *(node.attributes.get_int(name) for name in _ALIKE)].append(node)
    partners: dict[ir.Value | None, set[tuple[ir.Value | None, ...]]] = defaultdict(set)
    for family in families.values():
        weights = tuple(node.inputs[1] for node in family)
        for weight in weights:
            partners[weight].add(weights)
    merged = [
        family
        for family in families.values()
        if len({node.inputs[1] for node in family}) == len(family) > 1
        and all(len(partners[node.inputs[1]]) == 1 for node in family)
    ]
    for family in merged:
        _merge(graph, family)
    return len(merged)


def _is_stored(node: ir.Node) -> bool:
    """Whether weight and scales are constants that only products read, and the node has no other parameters."""
    given = node.inputs[1:]
    stored = all(value is not None and value.is_initializer() for value in given)
    return len(given) == 2 and stored and all(reader.op_type == "MatMulNBits" for reader, _ in given[0].uses())  # type: ignore[union-attr]


def _merge(graph: ir.Graph, family: list[ir.Node]) -> None:
    first, results = family[0], [node.outputs[0] for node in family]
    widths = [node.attributes["N"].as_int() for node in family]
    stored = [value for node in family for value in node.inputs[1:] if value is not None]
    emitter = Emitter(graph, first)
    parts = [_joined(graph, [node.inputs[position] for node in family]) for position in (1, 2)]
    attributes = {name: first.attributes[name].as_int() for name in _ALIKE} | {"N": sum(widths)}
    shape = [*sizes(results[0])[:-1], sum(widths)]
    x = first.inputs[0]
    assert x is not None
    y = emitter.node("MatMulNBits", [x, *parts], results[0].dtype, shape, attributes, domain=CONTRIB)
    split = constant(graph, "split_" + "_".join(map(str, widths)), widths)
    pieces = [ir.Value(type=result.type, shape=result.shape) for result in results]
    metadata = dict(first.metadata_props)
    graph.insert_before(first, [ir.node("Split", [y, split], {"axis": -1}, outputs=pieces, metadata_props=metadata)])
    for node, result, piece in zip(family, results, pieces, strict=True):
        replace_value(result, piece)
        graph.remove(node, safe=True)
    for weight in stored:
        if not weight.uses():
            graph.initializers.pop(str(weight.name), None)


def _joined(graph: ir.Graph, values: list[ir.Value | None]) -> ir.Value:
    """Initializers `[N, ...]` concatenated; made once for all loops."""
    first, *rest = [str(value.name) for value in values if value is not None]
    name = "+".join([first, *(name.removeprefix(WEIGHT_PREFIX) for name in rest)])
    if name in graph.initializers:
        return graph.initializers[name]
    return constant(graph, name, np.concatenate([constant_array(value) for value in values]))  # type: ignore[misc]
