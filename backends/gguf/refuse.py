"""What llama.cpp cannot run is refused here, with the method that would fit.

llama.cpp multiplies weights in groups of 32, with a scale each, by activations that it rounds itself: to 8 bits in
groups of 32, by their largest magnitude. Nothing else of a program has a place in a GGUF file.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx

from loopq_compile.backends.gguf.blocks import BLOCK
from loopq_compile.errors import LoopQError
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.keys import SITE, TRANSFORM
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import CompilerState, get_state, get_tensor
from loopq_compile.graph.weights import site_calls, weight_chain
from loopq_compile.operators import ops

METHOD = "loopq-plain"
_ONLINE = {ops.kronecker.default: "a transform", ops.transition_adapter.default: "an adapter between loops"}


def check_program(graph_module: fx.GraphModule) -> None:
    """Checks that llama.cpp can express how the program is quantized.

    Raises:
        LoopQError: what it cannot express, where that is, and what to do.
    """
    state = get_state(graph_module)
    if state.scheme is None or not any(site.reason is None for site in state.sites.values()):
        raise LoopQError(f"{state.model_name} is not quantized. Compile it with method={METHOD!r} first.")
    if has_cache(state.signature) or rolled_loops(graph_module):
        raise LoopQError(
            "A program with a cache, or a rolled one, cannot be written as GGUF. Export the plain program."
        )
    for node in graph_module.graph.nodes:
        if node.target in _ONLINE or TRANSFORM in node.meta:
            what = _ONLINE.get(node.target, "a transform")
            _refuse(f"{what} of activations", node, node.meta.get(TRANSFORM) or node.meta.get(SITE))
        if node.target is ops.quantize.default:
            _check_activation(graph_module, state, node)
    _check_weights(graph_module)


def _refuse(what: str, node: fx.Node, site: str | None, remedy: str = "") -> NoReturn:
    tag = get_tag(node)
    where = f"{site or node.name}{f', {tag}' if tag else ''}"
    raise LoopQError(
        f"llama.cpp has no place for {what} ({where}). {remedy or f'Compile the model with method={METHOD!r}.'}"
    )


def _check_activation(graph_module: fx.GraphModule, state: CompilerState, node: fx.Node) -> None:
    """Checks one rounding of activations: 8 bits, a scale for each token and 32 features, the whole range."""
    scheme, site = state.scheme, node.meta.get(SITE)
    assert scheme is not None
    fits = "It rounds activations to 8 bits for every token: use scheme 'w4a8' or 'w4a16' with dynamic scales."
    scale: Any = node.args[1]
    if scale.op == "get_attr" or scale.target is not ops.dynamic_scale.default:
        _refuse("static scales of activations", node, site, fits)
    size, limit = scale.args[2:4]
    if scheme.activation_bits != 8 or limit != 127:
        _refuse(f"{scheme.activation_bits}-bit activations", node, site, fits)
    if size != BLOCK:
        _refuse(f"activations in groups of {size}", node, site, f"Use group_size={BLOCK}, or scheme 'w4a16'.")
    table: Any = scale.args[1]
    while table.op != "get_attr":
        table = table.args[0]
    clip = get_tensor(graph_module, str(table.target))
    if not torch.all(clip == 1):
        kind = "ranges per loop" if clip.shape[0] > 1 else "clipped ranges"
        _refuse(f"{kind} of activations", node, site)


def _check_weights(graph_module: fx.GraphModule) -> None:
    for site, linears in site_calls(graph_module):
        chains = {chain[0]: chain for chain in map(weight_chain, linears)}
        if len(chains) > 1:
            _refuse(f"{len(chains)} weights of one layer, for different loops", linears[0], site.name)
        (chain,) = chains.values()
        if len(chain) != 2 or chain[1].target is not ops.dequantize.default:
            _refuse("a weight that is not packed", linears[0], site.name, "Run the pass pack-weights.")
        size: Any = chain[1].args[2]
        if size % BLOCK:
            remedy = f"Compile with group_size={BLOCK} or a multiple."
            _refuse(f"weights in groups of {size}", linears[0], site.name, remedy)
