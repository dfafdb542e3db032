"""What llama.cpp cannot run is refused here, with the method that would fit.

llama.cpp multiplies weights in groups of 32, with a scale each, by activations that it rounds itself: to 8 bits in
groups of 32, by their largest magnitude. Nothing else of a program has a place in a GGUF file.
"""

from __future__ import annotations

from torch import fx

from loopq_compile.backends.gguf.blocks import BLOCK
from loopq_compile.backends.plain import METHOD, plain_linears, refuse

_ENGINE = "llama.cpp"
_FITS = "It rounds activations to 8 bits for every token: use scheme 'w4a8' or 'w4a16' with dynamic scales."

__all__ = ["METHOD", "check_program"]


def check_program(graph_module: fx.GraphModule) -> None:
    """Checks that llama.cpp can express how the program is quantized.

    Raises:
        LoopQError: what it cannot express, where that is, and what to do.
    """
    for linear in plain_linears(graph_module, _ENGINE, "GGUF"):
        node, name = linear.node, linear.site.name
        if linear.activation_bits not in (None, 8):
            refuse(_ENGINE, f"{linear.activation_bits}-bit activations", node, name, _FITS)
        if linear.activation_group not in (None, BLOCK):
            remedy = f"Use group_size={BLOCK}, or scheme 'w4a16'."
            refuse(_ENGINE, f"activations in groups of {linear.activation_group}", node, name, remedy)
        if linear.group % BLOCK:
            remedy = f"Compile with group_size={BLOCK} or a multiple."
            refuse(_ENGINE, f"weights in groups of {linear.group}", node, name, remedy)
