"""Where quantized linears get their weights from: helpers for passes after `annotate-linears`.

A chain of constant nodes may lie between a weight and the linears that read it: an inverse transform, a rounding
offset, quantization. The weight may be stored as latent numbers. A chain belongs to one weight; in a group with a
transform for each loop, to one weight and one row of the transform's table.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import fx

from loopq_compile.errors import InternalError
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.state import Site, get_state
from loopq_compile.operators import ops

_aten = torch.ops.aten
STEPS = (
    ops.kronecker.default,
    ops.quantize.default,
    ops.dequantize.default,
    ops.fake_quantize.default,
    _aten.mul.Tensor,
    ops.offset.default,
    ops.from_latent.default,
)
"""Operators of a chain; the weight is their first argument."""


def site_calls(graph_module: fx.GraphModule) -> list[tuple[Site, list[fx.Node]]]:
    """The quantized sites with their linear nodes, in order of first use."""
    sites = {site.name: site for site in get_state(graph_module).sites.values() if site.reason is None}
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        name = node.meta.get(SITE, "")
        if node.target is _aten.linear.default and name in sites:
            calls[name].append(node)
    return [(sites[name], nodes) for name, nodes in calls.items()]


def quantized_weights(graph_module: fx.GraphModule) -> int:
    """How many weights are quantized."""
    return sum(math.prod(site.shape) for site in get_state(graph_module).sites.values() if site.reason is None)


def weight_chain(linear: fx.Node) -> list[fx.Node]:
    """The nodes from the weight (`get_attr`, first) to what `linear` reads (last); one node if there is no chain.

    Raises:
        InternalError: the weight is computed in another way.
    """
    node, chain = linear.args[1], []
    while isinstance(node, fx.Node):
        chain.append(node)
        if node.op == "get_attr":
            return chain[::-1]
        if node.target not in STEPS:
            break
        node = node.args[0]
    raise InternalError(f"The weight of {linear.name!r} is computed by {node}, which is not a step of quantization.")
