"""Tidying a freshly translated graph: shape arithmetic on constants goes away, everything else stays as it is.

Not `onnxscript.optimizer.optimize`, which also runs its rewrite rules: they find nothing in these graphs and take a
third of the time of an export.
"""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

_LARGEST_FOLDED = 256
"""Elements of the largest tensor that takes part: a folded weight would be a second copy of it."""


def simplify(model: ir.Model) -> None:
    """Folds small constants, merges equal nodes and drops what nothing reads; opaque nodes are left alone."""
    onnxscript.optimizer.fold_constants(
        model, input_size_limit=_LARGEST_FOLDED, output_size_limit=_LARGEST_FOLDED, onnx_shape_inference=False
    )
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.RemoveUnusedNodesPass()(model)
