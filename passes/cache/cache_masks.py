"""Masks of attention in a graph with a key-value cache: rows are new tokens, columns past and new ones."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from loopq_compile.graph.insert import inserting
from loopq_compile.graph.loops import get_tag, set_tag
from loopq_compile.passes.cache.attention import Attention
from loopq_compile.passes.cache.cache_regions import Regions, shape_of
from loopq_compile.passes.cache.last_rows import LastRows

_aten = torch.ops.aten


class Masks:
    """Gives every attention an additive mask `[..., new, total]`; equal masks are made once.

    It is additive, with the lowest finite number instead of minus infinity, because a padded query may see nothing at
    all. Its weights are then equal; NaN would spread through the cache into all later tokens.

    Args:
        regions, rows: regions and last rows of the graph.
        padding: the attention mask `[batch, total]`.
    """

    def __init__(self, regions: Regions, rows: LastRows, padding: fx.Node) -> None:
        self.regions, self.rows, self.padding = regions, rows, padding
        self.graph = regions.graph_module.graph
        self.own: dict[tuple[fx.Node, torch.dtype, int, tuple[int, int]], fx.Node] = {}
        self.plain: dict[tuple[int, tuple[int, int]], fx.Node] = {}
        self.added: dict[tuple[torch.dtype, int, tuple[int, int]], fx.Node] = {}

    def apply(self, attention: Attention) -> None:
        """Replaces the mask of `attention`."""
        node = attention.node
        if not attention.is_fused:
            if self.regions.mask is None:
                self._add_to_scores(attention)
            return
        dtype = node.meta["val"].dtype
        mask, leading = attention.masks[0] if attention.masks else None, self._leading(node)
        if mask is None:
            additive = self._causal_and_padding(dtype, attention.passes, leading)
        else:
            key = (mask, dtype, attention.passes, leading)
            if key not in self.own:
                self.own[key] = self._additive(attention, mask, dtype)
            additive = self.own[key]
        kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
        node.args, node.kwargs = (*node.args[:3], additive), kwargs

    def _add_to_scores(self, attention: Attention) -> None:
        """Adds the mask after all that the model does to scores, before it joins others to them (attention sinks)."""
        scores: Any = attention.softmax.args[0]
        first = attention.inside[0]
        while scores is not first and shape_of(scores)[-2:] != shape_of(first)[-2:]:
            scores = next(a for a in scores.all_input_nodes if a in attention.inside)
        mask = self._causal_and_padding(scores.meta["val"].dtype, attention.passes, self._leading(scores))
        with self.graph.inserting_after(scores):
            after = self.graph.call_function(_aten.add.Tensor, (scores, mask))
        set_tag(after, get_tag(attention.softmax))
        scores.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)

    def _leading(self, node: fx.Node) -> tuple[int, int]:
        """The rank of attention's result, and how many heads share its first axis with the batch."""
        shape = shape_of(node)
        batch = shape_of(self.regions.ids)[0]
        heads = sympy.cancel(_expression(shape[0]) / _expression(batch)) if len(shape) == 3 else sympy.Integer(1)
        return len(shape), int(heads) if heads.is_Integer else 1

    def _additive(self, attention: Attention, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A model's own mask, the rows of new tokens; padding is added if the model has no attention mask."""
        rows = self.rows.take(mask, -2)
        is_float = mask.meta["val"].dtype.is_floating_point
        leading, added, allowed = self._leading(attention.node), None, None
        if self.regions.mask is None and is_float:
            added = self._causal_and_padding(dtype, attention.passes, leading)
        elif self.regions.mask is None:
            allowed = self._plain(attention.passes, leading)
        other = added or allowed
        after = _later(self.graph, rows, other) if other is not None else rows
        with inserting(self.graph, before=after.next, tag=get_tag(mask)):
            call: Any = self.graph.call_function
            if is_float:
                made = call(_aten.add.Tensor, (rows, added)) if added is not None else rows
                made = call(_aten.clamp_min.default, (made, torch.finfo(dtype).min))
            else:
                boolean = rows if allowed is None else call(_aten.logical_and.default, (rows, allowed))
                made = self._to_additive(boolean, dtype)
        return made

    def _to_additive(self, allowed: fx.Node, dtype: torch.dtype) -> fx.Node:
        call: Any = self.graph.call_function
        number = call(_aten.to.dtype, (allowed, dtype))
        return call(_aten.mul.Tensor, (call(_aten.sub.Tensor, (number, 1.0)), torch.finfo(dtype).max))

    def _plain(self, passes: int, leading: tuple[int, int]) -> fx.Node:
        """`[batch, 1, new, total]`, or without the 1: earlier tokens that are not padding, and the token itself."""
        rank, heads = leading
        if (passes, leading) not in self.plain:
            with self.graph.inserting_before(self.rows.total.next):
                call: Any = self.graph.call_function
                device: dict[str, Any] = {"device": self.regions.ids.meta["val"].device}
                keys = self.graph.create_node("call_function", _aten.arange.default, (self.rows.total,), device)
                queries = call(_aten.arange.start, (self.rows.past, self.rows.total), device)
                column = call(_aten.unsqueeze.default, (queries, 1))
                earlier = call(_aten.lt.Tensor, (keys, column))
                itself = call(_aten.eq.Tensor, (keys, column))
                real = call(_aten.ne.Scalar, (self.padding, 0))
                for axis in range(1, rank - 1):
                    real = call(_aten.unsqueeze.default, (real, axis))
                seen = call(_aten.logical_and.default, (earlier, real))
                made = call(_aten.logical_or.default, (seen, itself))
                if heads > 1:
                    made = call(_aten.repeat_interleave.self_int, (made, heads, 0))
                if passes > 1:
                    made = call(_aten.cat.default, ([made] * passes, -1))
                self.plain[passes, leading] = made
        return self.plain[passes, leading]

    def _causal_and_padding(self, dtype: torch.dtype, passes: int, leading: tuple[int, int]) -> fx.Node:
        key = (dtype, passes, leading)
        if key not in self.added:
            allowed = self._plain(passes, leading)
            with self.graph.inserting_before(allowed.next):
                self.added[key] = self._to_additive(allowed, dtype)
        return self.added[key]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _later(graph: fx.Graph, first: fx.Node, second: fx.Node) -> fx.Node:
    """The one of two nodes that comes later in the graph."""
    return next(node for node in reversed(graph.nodes) if node in (first, second))
