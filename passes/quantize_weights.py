"""`quantize-weights`: a quantize-dequantize pair behind every quantized weight."""

from __future__ import annotations

from torch import fx

from loopq_compile.errors import InternalError
from loopq_compile.operators import ops
from loopq_compile.passes.annotate_linears import linear_calls
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.insert import add_constant, call, inserting
from loopq_compile.scheme import quantized_range
from loopq_compile.state import get_tensor
from loopq_compile.statistics import weight_scale


class QuantizeWeights(Pass):
    """Rounds weights to nearest.

    Before: `linear(x, weight)` in every loop. After: `linear(x, dequantize(quantize(weight, scale), scale))` with one
    pair and one table of scales `[outputs, inputs / group_size]` per weight, read by all loops. `pack-weights` later
    replaces the weight by its integers.

    Does nothing to linears that `annotate-linears` left in floating point.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not self.state(graph_module).sites:
            raise InternalError("quantize-weights needs annotate-linears before it.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        scheme = state.scheme
        assert scheme is not None
        modified = False
        for name, nodes in linear_calls(graph_module.graph).items():
            site = state.sites[name]
            if site.reason is not None:
                continue
            weight = get_tensor(graph_module, name)
            size = scheme.group_size if scheme.group_size != -1 else weight.shape[1]
            scale = add_constant(
                graph_module, f"{name}_scale", weight_scale(weight, size, scheme.weight_bits, scheme.weight_range)
            )
            attribute = nodes[0].args[1]
            assert isinstance(attribute, fx.Node)
            with inserting(graph_module.graph, before=attribute.next, tag=None, site=site.name):
                limits = quantized_range(scheme.weight_bits)
                codes = call(graph_module.graph, ops.quantize.default, attribute, scale, size, *limits)
                dequantized = call(graph_module.graph, ops.dequantize.default, codes, scale, size)
            dequantized.meta["loopq_bits"] = scheme.weight_bits
            for node in nodes:
                node.replace_input_with(attribute, dequantized)
            modified = True
        return PassResult(graph_module, modified)
