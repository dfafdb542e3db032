"""Masks of attention in a graph with a key-value cache: new tokens in rows, past and new ones in columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from loopq_compile.loops import get_tag, set_tag
from loopq_compile.passes.attention import Attention
from loopq_compile.passes.cache_regions import Regions
from loopq_compile.passes.insert import inserting
from loopq_compile.passes.last_rows import LastRows

_aten = torch.ops.aten


class Masks:
    """Gives every attention an additive mask `[..., new, total]`, made once where several share it.

    It is additive, with the lowest finite number in place of minus infinity, because a padded query may see nothing at
    all: its weights are then equal, and not NaN, which a cache would carry into all later tokens.

    Args:
        regions, rows: of the graph.
        padding: the attention mask `[batch, total]`.
    """

    def __init__(self, regions: Regions, rows: LastRows, padding: fx.Node) -> None:
        self.regions, self.rows, self.padding = regions, rows, padding
        self.graph = regions.graph_module.graph
        self.own: dict[fx.Node, fx.Node] = {}
        self.plain: dict[int, fx.Node] = {}
        self.added: dict[tuple[torch.dtype, int], fx.Node] = {}

    def apply(self, attention: Attention) -> None:
        """Replaces the mask of `attention`."""
        node = attention.node
        dtype = node.meta["val"].dtype
        if not attention.is_fused:
            if self.regions.mask is None:
                self._add_to_scores(attention, dtype)
            return
        rank = len(node.meta["val"].shape)
        mask = attention.masks[0] if attention.masks else None
        if mask is None:
            additive = self._causal_and_padding(dtype, rank)
        else:
            if mask not in self.own:
                self.own[mask] = self._additive(mask, dtype, rank)
            additive = self.own[mask]
        kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
        node.args, node.kwargs = (*node.args[:3], additive), kwargs

    def _add_to_scores(self, attention: Attention, dtype: torch.dtype) -> None:
        scores = attention.softmax.args[0]
        assert isinstance(scores, fx.Node)
        mask = self._causal_and_padding(dtype, len(scores.meta["val"].shape))
        with self.graph.inserting_before(attention.softmax):
            added = self.graph.call_function(_aten.add.Tensor, (scores, mask))
        set_tag(added, get_tag(attention.softmax))
        attention.softmax.replace_input_with(scores, added)

    def _additive(self, mask: fx.Node, dtype: torch.dtype, rank: int) -> fx.Node:
        """A model's own mask: the new tokens' rows; with padding, where the model does not know of any."""
        rows = self.rows.take(mask, -2)
        is_float = mask.meta["val"].dtype.is_floating_point
        allowed = self._plain(rank) if self.regions.mask is None else None
        after = _later(self.graph, rows, allowed) if allowed is not None else rows
        with inserting(self.graph, before=after.next, tag=get_tag(mask)):
            if is_float:
                made = rows
                if allowed is not None:
                    made = self.graph.call_function(_aten.add.Tensor, (rows, self._causal_and_padding(dtype, rank)))
            else:
                boolean = rows
                if allowed is not None:
                    boolean = self.graph.call_function(_aten.logical_and.default, (rows, allowed))
                made = self._to_additive(boolean, dtype)
        return made

    def _to_additive(self, allowed: fx.Node, dtype: torch.dtype) -> fx.Node:
        call: Any = self.graph.call_function
        number = call(_aten.to.dtype, (allowed, dtype))
        return call(_aten.mul.Tensor, (call(_aten.sub.Tensor, (number, 1.0)), torch.finfo(dtype).max))

    def _plain(self, rank: int) -> fx.Node:
        """`[batch, 1, new, total]`, or without the 1: earlier tokens that are no padding, and the token itself."""
        if rank not in self.plain:
            with self.graph.inserting_before(self.rows.total.next):
                call: Any = self.graph.call_function
                device: dict[str, Any] = {"device": torch.device("cpu")}
                keys = self.graph.create_node("call_function", _aten.arange.default, (self.rows.total,), device)
                queries = call(_aten.arange.start, (self.rows.past, self.rows.total), device)
                column = call(_aten.unsqueeze.default, (queries, 1))
                earlier = call(_aten.lt.Tensor, (keys, column))
                itself = call(_aten.eq.Tensor, (keys, column))
                real = call(_aten.ne.Scalar, (self.padding, 0))
                for axis in range(1, rank - 1):
                    real = call(_aten.unsqueeze.default, (real, axis))
                seen = call(_aten.logical_and.default, (earlier, real))
                self.plain[rank] = call(_aten.logical_or.default, (seen, itself))
        return self.plain[rank]

    def _causal_and_padding(self, dtype: torch.dtype, rank: int) -> fx.Node:
        if (dtype, rank) not in self.added:
            allowed = self._plain(rank)
            with self.graph.inserting_before(allowed.next):
                self.added[dtype, rank] = self._to_additive(allowed, dtype)
        return self.added[dtype, rank]


def _later(graph: fx.Graph, first: fx.Node, second: fx.Node) -> fx.Node:
    """Which of two nodes stands further down."""
    return next(node for node in reversed(graph.nodes) if node in (first, second))
