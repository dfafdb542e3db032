"""`quantize-weights`: a quantize-dequantize pair after every quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from loopq_compile.calibration.ranges import weight_scale
from loopq_compile.errors import InternalError
from loopq_compile.graph.constants import chain_name, evaluate
from loopq_compile.graph.insert import add_constant, call, inserting
from loopq_compile.graph.keys import BITS, LEARN
from loopq_compile.graph.scheme import Scheme, quantized_range
from loopq_compile.graph.state import Site, get_tensor
from loopq_compile.graph.weights import quantized_weights, site_calls, weight_chain
from loopq_compile.operators import ops
from loopq_compile.operators.fusion import fusing
from loopq_compile.operators.precision import OFFSETS, wide
from loopq_compile.passes.base import Pass, PassResult

_QUANTIZED = {ops.quantize.default, ops.fake_quantize.default}


class QuantizeWeights(Pass):
    """Rounds weights to nearest.

    Before: `linear(x, weight)` in every loop, with or without a chain of constant nodes (an inverse transform) between
    weight and linear. After: `linear(x, dequantize(quantize(weight, scale), scale))` with one pair and one table of
    scales `[outputs, inputs / group_size]` per chain, read by all loops that read the chain. `pack-weights` later
    replaces the weight by its integers.

    Does nothing to linears that `annotate-linears` left in floating point, and to weights that are already quantized.

    Args:
        learnable: `scale = dynamic_scale(weight, clip)` follows the weight while a transform is learned; `clip` is a
            table `[outputs, inputs / group_size]` for calibration to learn. The initial scales are the same.
        rounding: puts `offset(weight, rounding, scale)` before the pair: a table of zeros of the weight's shape, for
            what a weight solver adds. The zeros take no memory. Equals `learnable` by default.
    """

    def __init__(self, learnable: bool = False, rounding: bool | None = None) -> None:
        super().__init__()
        self.learnable = learnable
        self.rounding = learnable if rounding is None else rounding

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not self.state(graph_module).sites:
            raise InternalError("quantize-weights needs annotate-linears before it.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        scheme = self.state(graph_module).scheme
        assert scheme is not None
        chains: dict[fx.Node, tuple[Site, list[fx.Node]]] = {}
        for site, linears in site_calls(graph_module):
            for linear in linears:
                chain = weight_chain(linear)
                if not any(node.target in _QUANTIZED for node in chain):
                    chains.setdefault(chain[-1], (site, []))[1].append(linear)
        with fusing(self.state(graph_module).options.fuses(weights=quantized_weights(graph_module))):
            ranges = {end: self._range(scheme, weight) for end, weight in evaluate(graph_module, chains)}
        for end, (site, linears) in chains.items():
            result = self._insert(graph_module, end, site, ranges[end])
            for linear in linears:
                linear.replace_input_with(end, result)
        return PassResult(graph_module, bool(chains))

    def _range(self, scheme: Scheme, weight: Tensor) -> Tensor:
        """Scales; if they are to follow the weight, the clip ratios that give the same scales."""
        size, limit = _group_size(scheme, weight.shape[1]), scheme.limit(scheme.weight_bits)
        if not self.learnable:
            return weight_scale(weight, size, scheme.weight_bits, scheme.weight_range, limit)
        weight = wide(weight)
        full = weight_scale(weight, size, scheme.weight_bits, "minmax", limit)
        return weight_scale(weight, size, scheme.weight_bits, scheme.weight_range, limit) / full

    def _insert(self, graph_module: fx.GraphModule, end: fx.Node, site: Site, values: Tensor) -> fx.Node:
        """Puts the pair after `end` and returns its result."""
        scheme, graph = self.state(graph_module).scheme, graph_module.graph
        assert scheme is not None
        size, limits = _group_size(scheme, site.shape[1]), quantized_range(scheme.weight_bits)
        name = chain_name(graph_module, end)
        scale = add_constant(graph_module, f"{name}_{'clip' if self.learnable else 'scale'}", values)
        steps = self._add_rounding(graph_module, name, site) if self.rounding else None
        with inserting(graph, before=end.next, tag=None, site=site.name):
            if self.learnable:
                scale.meta[LEARN] = "weight_clip"
                scale = call(graph, ops.dynamic_scale.default, end, scale, size, scheme.limit(scheme.weight_bits))
            shifted = call(graph, ops.offset.default, end, steps, scale, size) if steps else end
            codes = call(graph, ops.quantize.default, shifted, scale, size, *limits)
            dequantized = call(graph, ops.dequantize.default, codes, scale, size)
        dequantized.meta[BITS] = scheme.weight_bits
        return dequantized

    def _add_rounding(self, graph_module: fx.GraphModule, name: str, site: Site) -> fx.Node:
        zero = torch.zeros(1, 1, dtype=OFFSETS, device=get_tensor(graph_module, site.weight).device)
        return add_constant(graph_module, f"{name}_rounding", zero.expand(site.shape))


def _group_size(scheme: Scheme, inputs: int) -> int:
    return scheme.group_size if scheme.group_size != -1 else inputs
