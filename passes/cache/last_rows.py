"""The new tokens' share of what is computed from positions.

Positions are computed for past and new tokens. Queries, and rotary tables of new keys, need only the last rows. A slice
at the end would make every step pay for the whole context squared (the size of a causal mask). So the slice is moved
up through the nodes that compute each row by itself, in the best case into `arange`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from loopq_compile.graph.keys import TAG
from loopq_compile.graph.loops import get_tag, set_tag
from loopq_compile.passes.cache.cache_regions import Regions, is_pointwise, shape_of

_aten = torch.ops.aten
_CASTS = {_aten.clone.default, _aten.contiguous.default, _aten.to.other, _aten._to_copy.default}


class LastRows:
    """Takes rows `past ... past + new` along one axis of a node of the region of positions.

    Args:
        regions: regions of the graph before it was changed: their shapes tell which axes run over the sequence.
        past, new, total: nodes that hold the number of past, new and all tokens. The nodes of the region must
            already be computed for `total` tokens.
    """

    def __init__(self, regions: Regions, past: fx.Node, new: fx.Node, total: fx.Node) -> None:
        self.regions, self.past, self.new, self.total = regions, past, new, total
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}

    def take(self, node: fx.Node, axis: int) -> fx.Node:
        """`node` with axis `axis` cut to the new tokens; `node` itself if that axis does not run over the sequence."""
        axis %= max(len(shape_of(node)), 1)
        if axis not in self.regions.axes(node):
            return node
        if (node, axis) not in self.made:
            self.made[node, axis] = self._move_up(node, axis) or self._slice(node, axis)
        return self.made[node, axis]

    def create(
        self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Creates a node after `node`, in its loop."""
        graph = node.graph
        place = self.total if node.op in ("placeholder", "get_attr") else node
        with graph.inserting_after(place):
            made = graph.create_node(
                "call_function", target, args, kwargs or {}, name=f"{node.name.removesuffix('_new')}_new"
            )
        made.meta.update({k: v for k, v in node.meta.items() if k not in ("val", TAG, "custom")})
        set_tag(made, get_tag(node))
        return made

    def _slice(self, node: fx.Node, axis: int) -> fx.Node:
        return self.create(node, _aten.slice.Tensor, (node, axis, self.past, self.total))

    def _count(self, node: fx.Node) -> fx.Node:
        """The rows of `arange(total)`."""
        return self.create(node, _aten.arange.start, (self.past, self.total), dict(node.kwargs))

    def _move_up(self, node: fx.Node, axis: int) -> fx.Node | None:
        target, args = node.target, list(node.args)
        rank = len(shape_of(node))
        if target is _aten.arange.default and args[0] is self.total:
            return self._count(node)
        if is_pointwise(node) or target in _CASTS:
            return self._aligned(node, axis - rank)
        if target is _aten.embedding.default and axis < len(shape_of(args[1])):
            return self.create(node, target, (args[0], self.take(args[1], axis), *args[2:]), dict(node.kwargs))  # type: ignore
        if target is _aten.linear.default and axis < rank - 1:
            return self.create(node, target, (self.take(args[0], axis), *args[1:]))  # type: ignore[arg-type]
        if target is _aten.unsqueeze.default:
            inner = axis - (axis > args[1] % rank)  # type: ignore[operator]
            return self.create(node, target, (self.take(args[0], inner), args[1]))  # type: ignore[arg-type]
        if target is _aten.expand.default:
            return self._expand(node, axis)
        if target is _aten.transpose.int:
            first, second = (int(value) % rank for value in args[1:3])  # type: ignore[arg-type]
            inner = {first: second, second: first}.get(axis, axis)
            return self.create(node, target, (self.take(args[0], inner), *args[1:]))  # type: ignore[arg-type]
        if target is _aten.cat.default and (args[1] if len(args) > 1 else 0) % rank != axis:  # type: ignore[operator]
            return self.create(node, target, ([self.take(part, axis) for part in args[0]], *args[1:]))  # type: ignore
        if target is _aten.index.Tensor and all(isinstance(index, fx.Node) for index in args[1]):  # type: ignore
            return self._index(node, axis - rank)
        return None

    def _aligned(self, node: fx.Node, axis: int) -> fx.Node:
        """Handles a node whose tensors are broadcast with each other; `axis` counts from the end."""

        def rows(argument: fx.Node) -> fx.Node:
            rank = len(shape_of(argument))
            return self.take(argument, axis) if rank >= -axis else argument

        return self.create(node, node.target, map_arg(node.args, rows), map_arg(node.kwargs, rows))

    def _expand(self, node: fx.Node, axis: int) -> fx.Node:
        source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        assert isinstance(source, fx.Node)
        if isinstance(sizes[axis], fx.Node):
            sizes[axis] = self.new
        inner = axis - (len(sizes) - len(shape_of(source)))
        return self.create(node, node.target, (self.take(source, inner) if inner >= 0 else source, sizes))

    def _index(self, node: fx.Node, axis: int) -> fx.Node | None:
        source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        if len(indices) != len(shape_of(source)):
            return None
        rows = [self.take(index, axis) if len(shape_of(index)) >= -axis else index for index in indices]
        return self.create(node, node.target, (source, rows))
