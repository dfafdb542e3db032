"""`insert-adapters`: the cross-loop transition adapter (LoopQ section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from loopq_compile.graph.insert import add_constant, call, inserting
from loopq_compile.graph.keys import LEARN
from loopq_compile.graph.loops import Boundary, get_tag
from loopq_compile.operators import ops
from loopq_compile.operators.precision import wide_type
from loopq_compile.passes.base import Pass, PassResult

_aten = torch.ops.aten
PARTS = ("gate", "gain", "shift", "mix")
"""Tables of an adapter with a row for each transition; all transitions share `down` and `up`."""


class InsertAdapters(Pass):
    """Puts an adapter on the edge that carries the state from each loop into the next.

    Before: loop `t + 1` reads the state `u_t`. After: it reads `transition_adapter(u_t, row t of the tables)`, while
    heads, gates and collected states still read `u_t`. Gain, shift and mix start at zero and the rest does not, so
    the node changes nothing at first but can learn.

    Nested loops pass their state on unchanged. Does nothing without loops, to a graph that already has adapters, and
    where the state goes through separate layers between two loops.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if any(node.target is ops.transition_adapter.default for node in graph_module.graph.nodes):
            return PassResult(graph_module, False)
        loops = enumerate(state.loops.loops)
        inserted = sum(self._adapt(graph_module, number, loop.boundaries) for number, loop in loops)
        if inserted:
            state.note(f"{inserted} transitions have an adapter of rank {state.options.transition_rank}")
        return PassResult(graph_module, bool(inserted))

    def _adapt(self, graph_module: fx.GraphModule, number: int, boundaries: tuple[Boundary, ...]) -> int:
        nodes = {node.name: node for node in graph_module.graph.nodes}
        edges = []
        for edge in boundaries:
            consumers = {nodes[name] for name in edge.consumers if name in nodes}
            for position, name in enumerate(edge.state):
                readers = [user for user in nodes[name].users if user in consumers] if name in nodes else []
                if readers and _width(nodes[name]):
                    edges.append((edge.source, position, nodes[name], readers))
        tables: dict[int, dict[str, fx.Node]] = {}
        for source, position, node, readers in edges:
            if position not in tables:
                prefix = f"adapter.{number}" + (f"_{position}" if position else "")
                tables[position] = self._tables(graph_module, prefix, len(boundaries), node)
            _insert(graph_module.graph, node, readers, tables[position], source)
        return len(edges)

    def _tables(self, graph_module: fx.GraphModule, prefix: str, rows: int, node: fx.Node) -> dict[str, fx.Node]:
        options = self.state(graph_module).options
        width, rank = _width(node), options.transition_rank
        generator = torch.Generator().manual_seed(options.seed)
        dtype = wide_type(node.meta["val"].dtype)
        tensors: dict[str, Tensor] = {
            "gate": torch.ones(rows, 1),
            "gain": torch.zeros(rows, width),
            "shift": torch.zeros(rows, width),
            "mix": torch.zeros(rows, rank),
            "down": torch.randn(width, rank, generator=generator) * width**-0.5,
            "up": torch.randn(width, rank, generator=generator) * rank**-0.5,
        }
        made = {
            part: add_constant(graph_module, f"{prefix}.{part}", tensor.to(dtype)) for part, tensor in tensors.items()
        }
        for table in made.values():
            table.meta[LEARN] = "adapter"
        return made


def _width(node: fx.Node) -> int:
    """Size of the last dimension of a floating-point tensor; 0 if it is unknown."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return 0
    return value.shape[-1] if isinstance(value.shape[-1], int) else 0


def _insert(graph: fx.Graph, node: fx.Node, readers: list[fx.Node], tables: dict[str, fx.Node], row: int) -> None:
    order = {item: position for position, item in enumerate(graph.nodes)}
    first = min(readers, key=order.__getitem__)
    with inserting(graph, before=first, tag=get_tag(first), site="transition"):
        rows = [call(graph, _aten.select.int, tables[part], 0, row) for part in PARTS]
        adapted = call(graph, ops.transition_adapter.default, node, *rows, tables["down"], tables["up"])
    if "val" in node.meta:
        adapted.meta["val"] = node.meta["val"]
    for reader in readers:
        reader.replace_input_with(node, adapted)
