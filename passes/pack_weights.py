"""`pack-weights`: stores integers instead of weights."""

from __future__ import annotations

import torch
from torch import fx

from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.insert import add_constant
from loopq_compile.state import get_tensor


class PackWeights(Pass):
    """Folds `quantize(weight, scale)` into an integer constant.

    Before: `dequantize(quantize(weight, scale), scale)`. After: `dequantize(codes, scale)` with int8 `codes`; the
    floating-point weight leaves the graph unless something else reads it.

    Does nothing to activations: their quantize nodes read values that are not constant.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        modified = False
        for node in list(graph.nodes):
            if node.target is not ops.quantize.default or node.args[0].op != "get_attr":
                continue
            weight, scale = (get_tensor(graph_module, str(argument.target)) for argument in node.args[:2])
            with torch.no_grad():
                codes = ops.quantize(weight, scale, *node.args[2:])
            constant = add_constant(graph_module, f"{node.args[0].target}_codes", codes)
            constant.meta["loopq_site"] = node.meta.get("loopq_site", "")
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
            modified = True
        if modified:
            graph.eliminate_dead_code()
            _drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _drop_unused(graph_module: fx.GraphModule) -> None:
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for owner_name, owner in graph_module.named_modules():
        for store in (owner._parameters, owner._buffers):
            for leaf in [leaf for leaf in store if (f"{owner_name}." if owner_name else "") + leaf not in used]:
                del store[leaf]
