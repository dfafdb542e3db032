"""Keeps one layer in 8 bits, weights and activations, while the others have 4.

    python examples/keep_layer_8bit.py --layer "*.mlp.down_proj" --out my-program

To leave layers in floating point, no pass is needed: `Scheme(skip=("*.mlp.down_proj",))`.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence

from tiny_model import tiny_model, tokens
from torch import fx

import loopq_compile as lq
from loopq_compile.calibration.ranges import weight_scale
from loopq_compile.graph.scheme import quantized_range
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.graph.weights import site_calls, weight_chain
from loopq_compile.operators import ops
from loopq_compile.passes import Pass, PassResult


class KeepBits(Pass):
    """Gives linears, chosen by name, another width.

    Before: weights are quantized with stored scales, activations with dynamic ones (after `insert-activation-qdq`).
    After: weights and inputs of linears that match `pattern` have scales and a range for `bits`. Does nothing to other
    linears.

    Args:
        pattern: name or `fnmatch` pattern.
        bits: width.
    """

    def __init__(self, pattern: str, bits: int = 8) -> None:
        super().__init__()
        self.pattern, self.bits = pattern, bits

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        sites = [(site, calls) for site, calls in site_calls(graph_module) if fnmatch.fnmatch(site.name, self.pattern)]
        if not sites:
            known = ", ".join(site.name for site, _ in site_calls(graph_module))
            raise lq.LoopQError(f"No quantized linear matches {self.pattern!r}; there are {known}.")
        for site, calls in sites:
            self._widen_weight(graph_module, calls[0])
            for linear in calls:
                self._widen_activation(graph_module, linear.args[0])
            self.state(graph_module).note(f"{site.name} has {self.bits} bits")
        return PassResult(graph_module, True)

    def _widen_weight(self, graph_module: fx.GraphModule, linear: fx.Node) -> None:
        scheme = self.state(graph_module).scheme
        assert scheme is not None
        weight, *_, quantize, dequantize = weight_chain(linear)
        _, scale, size, *_ = quantize.args
        values = get_tensor(graph_module, str(weight.target))
        scales = weight_scale(values, size, self.bits, scheme.weight_range, scheme.limit(self.bits))
        set_tensor(graph_module, str(scale.target), scales)
        quantize.args = (*quantize.args[:3], *quantized_range(self.bits))
        dequantize.meta["loopq_bits"] = self.bits

    def _widen_activation(self, graph_module: fx.GraphModule, dequantize: fx.Node) -> None:
        scheme = self.state(graph_module).scheme
        if dequantize.target is not ops.dequantize.default or scheme is None:
            return  # a weight-only scheme
        codes, scale, _ = dequantize.args
        codes.args = (*codes.args[:3], *quantized_range(self.bits))
        codes.meta["loopq_bits"] = self.bits
        scale.args = (*scale.args[:3], scheme.limit(self.bits))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="*.mlp.down_proj")
    parser.add_argument("--out", default="my-program")
    options = parser.parse_args(arguments)
    model, ids = tiny_model(), tokens(1)
    expected = model(ids).logits.detach()
    base = lq.pipelines.symmetric()
    kept = base.insert_after("set-ranges", KeepBits(options.layer))
    errors = {}
    for name, pipeline in (("w4a4", base), ("one layer w8a8", kept)):
        program = lq.compile(model, tokens(), scheme="w4a4", method=pipeline)
        errors[name] = float((program(ids).logits - expected).norm() / expected.norm())
        print(f"{name}: relative error {errors[name]:.4f}")
    program.save(options.out)
    print(f"wrote {options.out}; all notes: {[entry.notes for entry in program.log if entry.pass_name == 'keep-bits']}")
    return errors


if __name__ == "__main__":
    main()
