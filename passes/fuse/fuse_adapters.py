"""`fuse-adapters`: transition adapters that read their tables themselves."""

from __future__ import annotations

import torch
from torch import fx

from loopq_compile.graph.insert import call, inserting
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.fuse.fusion import entry, record

_aten = torch.ops.aten


class FuseAdapters(Pass):
    """Gives an adapter one kernel for all loops.

    Before: `transition_adapter(u, row(gate, t), row(gain, t), row(shift, t), row(mix, t), down, up)`. After:
    `transition_adapter_row(u, gate, gain, shift, mix, down, up, t)`. Does nothing to adapters whose arguments are not
    the same row of four tables, or whose rank is too high; the report says so.

    Args:
        highest_rank: highest rank that a kernel has registers for.
    """

    def __init__(self, highest_rank: int = 32) -> None:
        super().__init__()
        self.highest_rank = highest_rank

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        entries = []
        for node in [node for node in graph.nodes if node.target is ops.transition_adapter.default]:
            u, *rows, down, up = node.args
            tables = [row.args[0] for row in rows if row.target is _aten.select.int and row.args[1] == 0]
            indices = {(row.args[2], _rows(graph_module, row.args[0])) for row in rows if row.args[0] in tables}
            if len(tables) != len(rows) or len(indices) != 1:
                entries.append(entry(node, reason="its parts are not one row of tables"))
                continue
            rank = get_tensor(graph_module, str(down.target)).shape[1] if down.op == "get_attr" else 0
            if rank > self.highest_rank:
                entries.append(entry(node, reason=f"it has rank {rank}; a kernel holds {self.highest_rank}"))
                continue
            ((index, _),) = indices
            with inserting(graph, before=node, tag=get_tag(node), site=node.meta.get(SITE, "")):
                fused = call(graph, ops.transition_adapter_row.default, u, *tables, down, up, index)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            entries.append(entry(fused, ("transition_adapter",)))
        fused_any = any(line.parts for line in entries)
        if fused_any:
            graph.eliminate_dead_code()
        record(graph_module, entries)
        return PassResult(graph_module, fused_any)


def _rows(graph_module: fx.GraphModule, table: fx.Node) -> int:
    return get_tensor(graph_module, str(table.target)).shape[0] if table.op == "get_attr" else -1
