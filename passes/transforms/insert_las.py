"""`insert-las`: loop-aware activation scaling (LoopQ section 4.1)."""

from __future__ import annotations

import torch
from torch import fx

from loopq_compile.graph.keys import GROUP
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.passes.base import Pass, PassResult


class InsertLas(Pass):
    """Gives every loop its own activation ranges: `alpha_{l,t}` instead of `alpha_l`.

    Before: the quantize-dequantize pairs of a group read row 0 of a table `[1, groups]`. After: the table is
    `[T, groups]` and the pair of loop `t` reads row `t` (`T * K` rows in nested loops).

    Does nothing to groups outside loops and to weight-only schemes.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        widened = 0
        for table in [node for node in graph_module.graph.nodes if GROUP in node.meta]:
            rows = [user for user in table.users if user.target is torch.ops.aten.select.int]
            count = max((state.loops.iterations(get_tag(row)) for row in rows), default=1)
            values = get_tensor(graph_module, str(table.target))
            if count == 1 or values.shape[0] == count:
                continue
            set_tensor(graph_module, str(table.target), values[:1].repeat(count, 1))
            for row in rows:
                row.args = (table, 0, state.loops.row(get_tag(row)))
            widened += 1
        if widened:
            state.note(f"{widened} groups have a range per loop")
        return PassResult(graph_module, bool(widened))
