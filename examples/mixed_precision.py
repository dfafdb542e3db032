"""Mixed precision by loop: activations of the first loop in 8 bits, those of later loops in 4.

    python examples/mixed_precision.py

Weights are shared by all loops and keep their width. Loop tags make this short: every quantize node knows its loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tiny_model import tiny_model, tokens
from torch import fx

import loopq_compile as lq
from loopq_compile.graph.constants import constant_nodes
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.scheme import quantized_range
from loopq_compile.operators import ops
from loopq_compile.passes import Pass, PassResult


class SetLoopBits(Pass):
    """Gives the activations of some loops another width.

    Before: dynamic quantize-dequantize pairs of the scheme's width (after `insert-activation-qdq`). After: pairs of the
    loops in `bits` have the width given there. Does nothing to weights and to other loops.

    Args:
        bits: width by iteration of the main loop, counted from 0.
    """

    def __init__(self, bits: Mapping[int, int]) -> None:
        super().__init__()
        self.bits = dict(bits)

    def requires(self, graph_module: fx.GraphModule) -> None:
        scheme = self.state(graph_module).scheme
        if scheme is None or scheme.activation != "dynamic":
            raise lq.LoopQError("set-loop-bits takes dynamic activation scales; static ones fit one width.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        scheme = self.state(graph_module).scheme
        assert scheme is not None
        constant = constant_nodes(graph_module.graph)
        changed = 0
        for node in graph_module.graph.find_nodes(op="call_function", target=ops.quantize.default):
            tag = get_tag(node)
            bits = self.bits.get(tag.index[0]) if tag is not None else None
            if bits is None or node in constant or node.meta["loopq_bits"] == bits:
                continue
            x, scale, size, *_ = node.args
            node.args = (x, scale, size, *quantized_range(bits))
            node.meta["loopq_bits"] = bits
            scale.args = (*scale.args[:3], scheme.limit(bits))
            changed += 1
        self.state(graph_module).note(f"{changed} activations have another width")
        return PassResult(graph_module, changed > 0)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    model, ids = tiny_model(), tokens(1)
    expected = model(ids).logits.detach()
    errors = {}
    everywhere = dict.fromkeys(range(3), 8)
    for name, bits in (("4 bits", {}), ("8 bits in loop 0", {0: 8}), ("8 bits everywhere", everywhere)):
        pipeline = lq.pipelines.symmetric().insert_after("set-ranges", SetLoopBits(bits))
        program = lq.compile(model, tokens(), scheme="w8a4", method=pipeline)
        errors[name] = float((program(ids).logits - expected).norm() / expected.norm())
        print(f"{name}: relative error {errors[name]:.4f}")
    return errors


if __name__ == "__main__":
    main()
