"""What engines without transforms can run: weights on a plain grid, and activations that the engine itself rounds.

llama.cpp, vLLM and compressed-tensors multiply weights in groups, each with one scale, by activations in floating point
or rounded at run time by their largest magnitude. Everything else of a program is refused here, with the method that
would fit. What only one engine cannot do, its own backend refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.keys import BITS, SITE, TRANSFORM
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import Site, get_state, get_tensor
from loopq_compile.graph.weights import site_calls, weight_chain
from loopq_compile.operators import ops

METHOD = "loopq-plain"
_DYNAMIC = "It rounds activations at run time: use a scheme with dynamic scales, such as 'w4a8', or 'w4a16'."
_ONLINE = {
    ops.kronecker.default: "a transform",
    ops.transition_adapter.default: "an adapter between loops",
    ops.compensate.default: "a low-rank compensation of rounding",
}


@dataclass(frozen=True)
class PlainLinear:
    """How one linear is quantized.

    Args:
        site: the linear.
        codes: integers `[N, K]`, int8.
        scale: `[N, K / group]`.
        bits: of the integers.
        group: neighbouring input features that share a scale.
        activation_bits: of its inputs; None if they are not rounded.
        activation_group: features that share a scale, which is taken from each token; None likewise.
        node: a call, to say where it is.
    """

    site: Site
    codes: Tensor
    scale: Tensor
    bits: int
    group: int
    activation_bits: int | None
    activation_group: int | None
    node: fx.Node


def plain_linears(graph_module: fx.GraphModule, engine: str, form: str) -> list[PlainLinear]:
    """The quantized linears of a program that is plain, in order of first use.

    Args:
        graph_module: the program's graph.
        engine: its name, for errors.
        form: what is written, for errors, such as "GGUF".

    Raises:
        LoopQError: the program is not plain; the message says what `engine` cannot run, where that is, what to do.
    """
    state = get_state(graph_module)
    if state.scheme is None or not any(site.reason is None for site in state.sites.values()):
        raise LoopQError(f"{state.model_name} is not quantized. Compile it with method={METHOD!r} first.")
    if has_cache(state.signature) or rolled_loops(graph_module):
        raise LoopQError(
            f"A program with a cache, or a rolled one, cannot be written as {form}. Export the plain program."
        )
    for node in graph_module.graph.nodes:
        if node.target in _ONLINE or TRANSFORM in node.meta:
            what = _ONLINE.get(node.target, "a transform")
            refuse(engine, f"{what} of activations", node, node.meta.get(TRANSFORM) or node.meta.get(SITE))
    found = [_linear(graph_module, engine, site, calls) for site, calls in site_calls(graph_module)]
    read = {call.args[0] for _, calls in site_calls(graph_module) for call in calls}
    for node in graph_module.graph.nodes:
        if node.target is ops.quantize.default and not read.issuperset(node.users):
            refuse(engine, "integers that are read elsewhere than in a linear layer", node, node.meta.get(SITE))
    return found


def refuse(engine: str, what: str, node: fx.Node, site: str | None, remedy: str = "") -> NoReturn:
    """Says what `engine` has no place for.

    Raises:
        LoopQError: always.
    """
    tag = get_tag(node)
    where = f"{site or node.name}{f', {tag}' if tag else ''}"
    raise LoopQError(
        f"{engine} has no place for {what} ({where}). {remedy or f'Compile the model with method={METHOD!r}.'}"
    )


def _linear(graph_module: fx.GraphModule, engine: str, site: Site, calls: list[fx.Node]) -> PlainLinear:
    inputs = {_activation(graph_module, engine, site, call) for call in calls}
    if len(inputs) > 1:
        refuse(engine, f"{len(inputs)} ways to round the inputs of one layer", calls[0], site.name)
    chains = {chain[0]: chain for chain in map(weight_chain, calls)}
    if len(chains) > 1:
        refuse(engine, f"{len(chains)} weights of one layer, for different loops", calls[0], site.name)
    (chain,) = chains.values()
    if len(chain) != 2 or chain[1].target is not ops.dequantize.default:
        refuse(engine, "a weight that is not packed", calls[0], site.name, "Run the pass pack-weights.")
    codes, scale, group = cast(tuple[fx.Node, fx.Node, int], chain[1].args)
    bits, size = inputs.pop()
    return PlainLinear(
        site=site,
        codes=get_tensor(graph_module, str(codes.target)),
        scale=get_tensor(graph_module, str(scale.target)),
        bits=chain[1].meta.get(BITS, 8),
        group=group,
        activation_bits=bits,
        activation_group=size,
        node=calls[0],
    )


def _activation(
    graph_module: fx.GraphModule, engine: str, site: Site, call: fx.Node
) -> tuple[int, int] | tuple[None, None]:
    """Bits and group of what a linear reads; checks that its scales come from each token and have their whole range."""
    read: Any = call.args[0]
    if read.target is not ops.dequantize.default:
        return None, None
    codes, scale = read.args[:2]
    if scale.op == "get_attr" or scale.target is not ops.dynamic_scale.default:
        refuse(engine, "static scales of activations", codes, site.name, _DYNAMIC)
    table = scale.args[1]
    while table.op != "get_attr":
        table = table.args[0]
    clip = get_tensor(graph_module, str(table.target))
    if not torch.all(clip == 1):
        kind = "ranges per loop" if clip.shape[0] > 1 else "clipped ranges"
        refuse(engine, f"{kind} of activations", codes, site.name)
    return int(codes.args[4]).bit_length() + 1, int(read.args[2])
