"""`latent-weights`: stores weights in the form in which their rounding is learned."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, fx

from loopq_compile.graph.constants import LATENT, chain_name, evaluate
from loopq_compile.graph.insert import add_constant, call, inserting
from loopq_compile.graph.keys import LEARN, SOLVED
from loopq_compile.graph.weights import quantized_weights
from loopq_compile.operators import ops
from loopq_compile.operators.fusion import fusing
from loopq_compile.operators.latent import fraction_of, to_latent
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.quantize.pack_weights import drop_unused
from loopq_compile.solvers.chains import Chain, find_chains


class LatentWeights(Pass):
    """Stores weights as 16-bit fixed-point numbers in units of their scale, which `calibrate` moves.

    Before: `quantize(x, scale)`, where x is a stored weight, its transforms, and what a solver added. After:
    `quantize(from_latent(latent, scale), scale)` with constants `<weight>_latent` `[N, K]` in int16 and
    `<weight>_scale`. The integers are the same. Nothing that was before `quantize` is left to learn or to compute, so a
    step of learned rounding needs two bytes for every weight, and makes a weight in one pass.

    Does nothing to packed weights, and to those that have this form.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        chains = [chain for chain in find_chains(graph_module) if chain.latent is None]
        names = [chain_name(graph_module, chain.end) for chain in chains]
        with fusing(self.state(graph_module).options.fuses(weights=quantized_weights(graph_module))):
            found = _latents(graph_module, [chain.quantize for chain in chains])
        for name, chain in zip(names, chains, strict=True):
            _replace(graph_module, chain, name, *found.pop(chain.quantize))
        if chains:
            graph_module.graph.eliminate_dead_code()
            drop_unused(graph_module)
        return PassResult(graph_module, bool(chains))


def _latents(graph_module: fx.GraphModule, quantized: list[Any]) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Latent numbers and scales by quantize node."""
    found: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    known: dict[fx.Node, Tensor] = {}
    readers: dict[Any, list[Any]] = defaultdict(list)
    for node in quantized:
        for argument in node.args[:2]:
            readers[argument].append(node)
    for computed, value in evaluate(graph_module, readers):
        known[computed] = value
        for node in readers[computed]:
            x, scale, size, *limits = node.args
            if x in known and scale in known:
                latent = to_latent(known[x], known[scale], size, fraction_of(_bits(*limits)))
                found[node] = latent, known[scale]
        for argument in [argument for argument in known if all(node in found for node in readers[argument])]:
            del known[argument]
    return found


def _bits(q_min: int, q_max: int) -> int:
    """The bits of integers in this range."""
    return (q_max - q_min).bit_length()


def _replace(graph_module: fx.GraphModule, chain: Chain, name: str, latent: Tensor, scale: Tensor) -> None:
    graph, node = graph_module.graph, chain.quantize
    _, old, size, *limits = node.args
    table = add_constant(graph_module, f"{name}{LATENT}", latent)
    stored = old.op == "get_attr"
    steps = old if stored else add_constant(graph_module, f"{name}_scale", scale.contiguous())
    table.meta[LEARN] = "rounding"
    with inserting(graph, before=node, tag=None, site=chain.site.name):
        weight = call(graph, ops.from_latent.default, table, steps, size, fraction_of(_bits(*limits)))
    if chain.solved:
        weight.meta[SOLVED] = True
    node.args = (weight, steps, size, *limits)
    chain.end.args = (node, steps, *chain.end.args[2:])
