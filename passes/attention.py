"""Finding attention in a graph: `scaled_dot_product_attention`, or `softmax(q k + mask) v` spelled out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.passes.cache_regions import Regions, is_pointwise, shape_of, where

_aten = torch.ops.aten
SDPA = _aten.scaled_dot_product_attention.default
_SOFTMAX = {_aten.softmax.int, _aten._softmax.default}
_PRODUCTS = {_aten.matmul.default, _aten.bmm.default}
_COPIES = {_aten.clone.default, _aten.contiguous.default}
_REPEATS = {_aten.repeat_interleave.self_int}
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_BLOCKED = -1e4
"""An additive mask blocks what it lowers by more than this."""


@dataclass
class Attention:
    """One attention.

    Args:
        node: its result: the fused operator, or the product with the values.
        key, value: `(node, position)` of the arguments where keys and values enter.
        inside: nodes on `[new, total]` scores, in order, when it is spelled out; `node` among them.
        masks: nodes of the region of positions that run over the sequence twice.
        softmax: the node that normalizes the scores; `node` where it is fused.
    """

    node: fx.Node
    key: tuple[fx.Node, int]
    value: tuple[fx.Node, int]
    softmax: fx.Node
    inside: list[fx.Node] = field(default_factory=list)
    masks: list[fx.Node] = field(default_factory=list)

    @property
    def is_fused(self) -> bool:
        """Whether it is one operator."""
        return self.node.target is SDPA

    @property
    def is_causal(self) -> bool:
        """Whether the operator is told to be causal, and has no mask."""
        given = dict(zip(("mask", "dropout", "causal"), self.node.args[3:6], strict=False))
        return self.is_fused and bool(self.node.kwargs.get("is_causal", given.get("causal", False)))


def find_attention(regions: Regions) -> list[Attention]:
    """All attention of new tokens among themselves, in the order of the graph; causality is proven.

    Raises:
        LoopQError: there is none, or one lets a token see later ones.
    """
    found = []
    for node in regions.graph_module.graph.nodes:
        if node.target is SDPA and node in regions.tokens:
            mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
            found.append(Attention(node, (node, 1), (node, 2), node, masks=[mask] if mask is not None else []))
        elif node.target in _SOFTMAX and node in regions.tokens and len(regions.axes(node)) == 2:
            found.append(_spelled_out(regions, node))
    if not found:
        raise LoopQError("This model has no attention, so there are no keys and values to cache: use cache=False.")
    for attention in found:
        _check_causal(regions, attention)
    return found


def _spelled_out(regions: Regions, softmax: fx.Node) -> Attention:
    """Follows the scores up to the product of queries and keys, and down to that with the values."""
    scores, before = softmax, []
    while scores.target not in _PRODUCTS:
        above = [a for a in scores.all_input_nodes if a in regions.tokens and len(regions.axes(a)) == 2]
        if len(above) != 1:
            raise LoopQError(
                f"The scores of this attention come from no product of queries and keys: {where(softmax)}."
            )
        before.append(scores)
        scores = above[0]
    inside, product = [scores, *reversed(before)], softmax
    while product.target not in _PRODUCTS:
        below = list(product.users)
        if len(below) != 1:
            raise LoopQError(f"The weights of this attention have {len(below)} readers: {where(product)}.")
        product = below[0]
        inside.append(product)
    axes = regions.axes(softmax)
    if axes[-1] != len(shape_of(softmax)) - 1 or product.args[0] not in inside:
        raise LoopQError(f"This attention does not normalize over keys in the last axis: {where(softmax)}.")
    masks = [
        argument
        for node in inside
        for argument in node.all_input_nodes
        if argument in regions.positions and len(regions.axes(argument)) == 2
    ]
    return Attention(product, (scores, 1), (product, 1), softmax, inside, masks)


def _check_causal(regions: Regions, attention: Attention) -> None:
    if attention.is_causal:
        return
    masks = [mask for mask in attention.masks if mask in regions.positions]
    if len(masks) != len(attention.masks):
        raise LoopQError(f"The mask of this attention depends on tokens: {where(attention.node)}.")
    values = regions.compute(masks, 5)
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    for mask in masks:
        blocked = blocked | _blocked(values[mask], fills=not attention.is_fused)
    if not blocked.expand(*blocked.shape[:-2], 5, 5)[..., ~torch.ones(5, 5, dtype=torch.bool).tril()].all():
        raise LoopQError(
            f"This attention lets tokens see later ones, which a key-value cache cannot serve: {where(attention.node)}."
        )


def _blocked(mask: Tensor, *, fills: bool) -> Tensor:
    """What a mask takes away; one that fills (`masked_fill`) may mean True for blocked, so both readings are tried."""
    if mask.is_floating_point():
        return mask < _BLOCKED
    later = ~torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    allowed = mask != 0
    return allowed if fills and bool(allowed[..., later].all()) else ~allowed


def find_stem(regions: Regions, attention: Attention, entry: tuple[fx.Node, int]) -> tuple[fx.Node, list[fx.Node]]:
    """Where a cache goes: the node `[batch, heads, sequence, size]` above the copies that grouped queries ask for, and
    the nodes between it and the attention, in order.

    Raises:
        LoopQError: keys or values have another layout.
    """
    node: Any = entry[0].args[entry[1]]
    between: list[fx.Node] = []
    while True:
        rank = len(shape_of(node))
        turned = regions.axes(node) != [rank - 2]
        copies = node.target in (*_COPIES, *_REPEATS)
        turns = node.target in (_aten.transpose.int, _aten.permute.default) or _is_scaling(node)
        above = [node] if copies or (turned and turns) else _repeat(node)
        if not above:
            break
        between += above
        node = above[-1].args[0]
    if node not in regions.tokens or regions.axes(node) != [len(shape_of(node)) - 2]:
        raise LoopQError(
            f"Keys and values must be [batch, heads, sequence, size] to be cached: {where(attention.node)} reads "
            f"{node.name!r} {list(shape_of(node))}."
        )
    return node, between[::-1]


def _is_scaling(node: fx.Node) -> bool:
    return is_pointwise(node) and len(node.all_input_nodes) == 1


def _repeat(node: fx.Node) -> list[fx.Node]:
    """`reshape(expand(unsqueeze(x)))`, which repeats heads, from the last to the first; [] for anything else."""
    if node.target not in _VIEWS:
        return []
    chain = [node]
    while isinstance(chain[-1].args[0], fx.Node):
        above = chain[-1].args[0]
        chain.append(above)
        if above.target is _aten.unsqueeze.default:
            return chain if any(part.target is _aten.expand.default for part in chain) else []
        if above.target not in (*_COPIES, _aten.expand.default):
            return []
    return []


def ungrouped(node: Any) -> fx.Node:
    """What was copied so that every query head has its keys, head `i` reading `i // copies`; `node` if nothing was."""
    if node.target in _REPEATS and node.args[2] == 1:
        return node.args[0]
    above = node
    while above.target in (*_VIEWS, _aten.clone.default, _aten.expand.default):
        above = above.args[0]
    repeats = above.target is _aten.unsqueeze.default and above.args[1] == 2 and len(shape_of(above.args[0])) == 4
    return above.args[0] if repeats else node
