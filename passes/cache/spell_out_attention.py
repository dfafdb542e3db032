"""`spell-out-attention`: writes fused attention on a key-value cache as products and softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.graph.insert import call
from loopq_compile.graph.loops import get_tag
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.cache.attention import SDPA, ungrouped

_aten = torch.ops.aten


class SpellOutAttention(Pass):
    """Writes attention out so that a step reads the cache as little as possible.

    Before: `scaled_dot_product_attention(q, keys, values, mask)` on an additive mask, with keys `[batch, heads,
    total, size]` copied for grouped queries out of a cache of fewer heads. After: `softmax(q * scale @ keysᵀ + mask) @
    values`, in which queries of a group, `[batch, groups, heads / groups, new, size]`, read the cache without copies.
    Exporters of the fused operator copy the cache and scale all keys again in every step.

    Does nothing to attention without a mask or with other ways of sharing heads.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        fused = [node for node in graph_module.graph.nodes if node.target is SDPA and _has_additive_mask(node)]
        for node in fused:
            _spell_out(graph_module.graph, node)
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, bool(fused))


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _has_additive_mask(node: fx.Node) -> bool:
    mask = node.args[3] if len(node.args) == 4 else None
    return isinstance(mask, fx.Node) and len(_shape(mask)) == len(_shape(node)) == 4


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    query, keys, values, mask = node.args
    scale = node.kwargs.get("scale") or 1 / math.sqrt(_shape(query)[-1])
    sources = ungrouped(keys), ungrouped(values)
    heads, groups = _shape(query)[1], {_shape(source)[1] for source in sources}
    grouped = len(groups) == 1 and groups != {heads}
    with graph.inserting_before(node):
        before = node.prev
        if grouped:
            keys, values = (call(graph, _aten.unsqueeze.default, source, 2) for source in sources)
            share = groups.pop()
            query = call(graph, _aten.unflatten.int, query, 1, [share, heads // share])
            mask = call(graph, _aten.unsqueeze.default, mask, 2)
        scaled = call(graph, _aten.mul.Tensor, query, scale)
        turned = call(graph, _aten.transpose.int, keys, -2, -1)
        scores = call(graph, _aten.add.Tensor, call(graph, _aten.matmul.default, scaled, turned), mask)
        result = call(graph, _aten.matmul.default, call(graph, _aten.softmax.int, scores, -1), values)
        if grouped:
            result = call(graph, _aten.flatten.using_ints, result, 1, 2)
    while before.next is not node:
        before = before.next
        before.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    assert get_tag(result) == get_tag(node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    _free_views(result)


def _free_views(node: fx.Node) -> None:
    """Turns views of the fused operator's result, which rely on its memory layout, into `reshape`."""
    for user in node.users:
        if user.target is _aten.view.default:
            user.target = _aten.reshape.default
        elif user.target in (_aten.permute.default, _aten.transpose.int):
            _free_views(user)
