"""`round-scales`: scales of weights become float16 numbers."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.operators import ops
from loopq_compile.operators.quantize import bounded
from loopq_compile.passes.base import Pass, PassResult


class RoundScales(Pass):
    """Rounds the scales of packed weights to float16, for engines that store them in that type, such as llama.cpp.

    Before: `dequantize(codes, scale)` on stored integers. After: the same graph; each scale is the nearest float16
        number, in the type it had, and the integers stay. What was calibrated is moved by at most 2^-11 of a weight
        (more where scales lie below 6.1e-5, float16's smallest normal number).

    Does nothing to scales that are float16 numbers already, and to weights that are not packed.

    Raises:
        LoopQError: a scale is above float16's largest number, 65504.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        change = 0.0
        modified = False
        for codes, name in _packed(graph_module.graph).items():
            scale = get_tensor(graph_module, name)
            found = rounded(scale, shown_name(name))
            if not torch.equal(found, scale):
                change = max(change, largest_change(get_tensor(graph_module, codes), scale, found))
                set_tensor(graph_module, name, found)
                modified = True
        if modified:
            self.state(graph_module).note(f"scales are float16 numbers; the largest change is {change:.1e} of a scale")
        return PassResult(graph_module, modified)


def _packed(graph: fx.Graph) -> dict[str, str]:
    """Targets of stored integers and of their scales."""
    return {
        str(node.args[0].target): str(node.args[1].target)  # type: ignore[union-attr]
        for node in graph.nodes
        if node.target is ops.dequantize.default and all(part.op == "get_attr" for part in node.args[:2])  # type: ignore[union-attr]
    }


def rounded(scale: Tensor, name: str) -> Tensor:
    """`scale` with float16 numbers in its own type.

    Raises:
        LoopQError: one does not fit into float16.
    """
    found = bounded(scale.to(torch.float16))
    if not found.isfinite().all():
        raise LoopQError(
            f"{name} holds a scale above 65504, which float16 does not. Divide the weight by a power of two."
        )
    return found.to(scale.dtype)


def largest_change(codes: Tensor, before: Tensor, after: Tensor) -> float:
    """The largest change of a scale, relative to it; groups of zeros do not count."""
    used = (codes.unflatten(-1, (before.shape[-1], -1)) != 0).any(-1)
    change = (after.double() - before.double()).abs() / before.double().abs()
    return float(torch.where(used, change, 0.0).max())
