"""Simplifies a freshly translated graph: shape arithmetic on constants is folded, everything else stays.

`onnxscript.optimizer.optimize` is not used: it also runs its rewrite rules, which find nothing in these graphs and take
a third of the time of an export.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from loopq_compile.backends.onnx.emit import constant, constant_array

_LARGEST_FOLDED = 256
"""Elements of the largest tensor to fold: a folded weight would be a second copy."""


def simplify(model: ir.Model) -> None:
    """Folds small constants, merges equal nodes and removes what nothing reads; opaque nodes are not changed."""
    onnxscript.optimizer.fold_constants(
        model, input_size_limit=_LARGEST_FOLDED, output_size_limit=_LARGEST_FOLDED, onnx_shape_inference=False
    )
    common.IdentityEliminationPass()(model)
    _state_reshapes(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _state_reshapes(graph: ir.Graph) -> None:
    """Removes each `Reshape` that changes nothing, and gives others a constant target if possible: 0 for a dimension
    that stays, -1 for one other.

    The exporter computes targets from shapes, four nodes for each; in a decoding step these are most of the nodes.
    """
    for node in [node for node in graph if node.op_type == "Reshape" and node.domain == ""]:
        x, target = node.inputs
        result = node.outputs[0].shape
        if x is not None and _same(x.shape, result) and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], x)
            graph.remove(node, safe=True)
            continue
        if x is None or x.shape is None or result is None or constant_array(target) is not None:
            continue
        sizes = _target(list(x.shape), list(result))
        if sizes is not None:
            name = "to_" + "_".join(str(size).replace("-1", "rest") for size in sizes)
            node.attributes.pop("allowzero", None)  # with which 0 would mean no entries
            node.replace_input_with(1, constant(graph, name, np.array(sizes, dtype=np.int64)))


def _same(before: ir.Shape | None, after: ir.Shape | None) -> bool:
    """Whether two shapes are known, and equal."""
    if before is None or after is None or len(before) != len(after):
        return False
    pairs = zip(before, after, strict=True)
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in pairs)


def _target(before: list[Any], after: list[Any]) -> list[int] | None:
    sizes: list[int] = []
    for axis, size in enumerate(after):
        same = axis < len(before) and not isinstance(size, int) and str(size) == str(before[axis])
        known = same and getattr(size, "value", None) is not None
        sizes.append(size if isinstance(size, int) else 0 if known else -1)
    empty = any(isinstance(size, int) and size == 0 for size in after)
    return sizes if sizes.count(-1) <= 1 and not empty else None
