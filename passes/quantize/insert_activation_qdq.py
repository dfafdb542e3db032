"""`insert-activation-qdq`: a quantize-dequantize pair before every group of quantized linears."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from loopq_compile.errors import InternalError
from loopq_compile.graph.insert import add_constant, attribute_name, call, inserting
from loopq_compile.graph.keys import BITS, GROUP, SITE
from loopq_compile.graph.loops import LoopTag, get_tag
from loopq_compile.graph.scheme import Scheme, quantized_range
from loopq_compile.graph.state import CompilerState, get_tensor
from loopq_compile.graph.weights import weight_chain
from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult

_aten = torch.ops.aten


class InsertActivationQdq(Pass):
    """Quantizes activations, with ranges shared by all loops.

    Before: linears with quantized weights read floating point. After: the linears that read one tensor read
    `dequantize(quantize(x, scale), scale)`, one pair per loop. Static: `scale` is a row of a constant table. Dynamic:
    `scale = dynamic_scale(x, clip)`, and `clip` is the row. Tables have one row, which all loops read, until
    `insert-las` gives each loop its own row. They hold ones until `set-ranges` fills them.

    Does nothing for weight-only schemes and for linears left in floating point.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not self.state(graph_module).sites:
            raise InternalError("insert-activation-qdq needs annotate-linears before it.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        assert state.scheme is not None
        if not state.scheme.quantizes_activations:
            return PassResult(graph_module, False)
        tables: dict[str, fx.Node] = {}
        readers = _readers(graph_module.graph, state)
        for (x, group, tag), linears in readers.items():
            member = next(site for site in state.sites.values() if site.group == group)
            width = member.shape[1]
            if group not in tables:
                tables[group] = self._table(graph_module, state.scheme, group, width, _dtype(graph_module, linears[0]))
            with inserting(graph_module.graph, before=linears[0], tag=tag, site=group):
                pair = _insert_pair(graph_module.graph, x, tables[group], state.scheme, width)
            for linear in linears:
                linear.replace_input_with(x, pair)
        return PassResult(graph_module, bool(readers))

    def _table(
        self, graph_module: fx.GraphModule, scheme: Scheme, group: str, width: int, dtype: torch.dtype
    ) -> fx.Node:
        size = scheme.group_size if scheme.group_size != -1 else width
        columns = width // size if scheme.activation_granularity == "group" else 1
        table = add_constant(graph_module, table_name(group, scheme), torch.ones(1, columns, dtype=dtype))
        table.meta[GROUP] = group
        return table


def _dtype(graph_module: fx.GraphModule, linear: fx.Node) -> torch.dtype:
    """The type a linear computes in: its weight's, or that of the weight's scales once integers are stored."""
    weight, *chain = weight_chain(linear)
    dtype = get_tensor(graph_module, str(weight.target)).dtype
    if not dtype.is_floating_point:
        scale: Any = chain[0].args[1]
        dtype = get_tensor(graph_module, str(scale.target)).dtype
    return dtype


def table_name(group: str, scheme: Scheme) -> str:
    """Buffer name of a group's table of scales (static) or clip ratios (dynamic)."""
    return f"activation_{'scale' if scheme.activation == 'static' else 'clip'}.{attribute_name(group)}"


def _readers(graph: fx.Graph, state: CompilerState) -> dict[tuple[fx.Node, str, LoopTag | None], list[fx.Node]]:
    """Quantized linears by the tensor they read, their group and their loop, in graph order."""
    by_name = {site.name: site for site in state.sites.values()}
    readers: dict[tuple[fx.Node, str, LoopTag | None], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        site = by_name.get(node.meta.get(SITE, "")) if node.target is _aten.linear.default else None
        if site is not None and site.reason is None:
            readers[node.args[0], site.group, get_tag(node)].append(node)
    return dict(readers)


def _insert_pair(graph: fx.Graph, x: fx.Node, table: fx.Node, scheme: Scheme, width: int) -> fx.Node:
    size = scheme.group_size if scheme.group_size != -1 else width
    q_min, q_max = quantized_range(scheme.activation_bits)
    scale = call(graph, _aten.select.int, table, 0, 0)
    if scheme.activation == "dynamic":
        scale = call(graph, ops.dynamic_scale.default, x, scale, size, scheme.limit(scheme.activation_bits))
    codes = call(graph, ops.quantize.default, x, scale, size, q_min, q_max)
    codes.meta[BITS] = scheme.activation_bits
    return call(graph, ops.dequantize.default, codes, scale, size)
