"""Finding attention in a graph: `scaled_dot_product_attention`, or `softmax(q k + mask) v` spelled out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.passes.cache.cache_regions import Regions, is_pointwise, shape_of, where

_aten = torch.ops.aten
SDPA = _aten.scaled_dot_product_attention.default
_SOFTMAX = {_aten.softmax.int, _aten._softmax.default}
_PRODUCTS = {_aten.matmul.default, _aten.bmm.default}
_COPIES = {_aten.clone.default, _aten.contiguous.default}
_REPEATS = {_aten.repeat_interleave.self_int}
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_MOVES = {*_COPIES, *_REPEATS, *_VIEWS, _aten.repeat.default, _aten.to.dtype}
"""Operators that, like views, may lie between a cache and attention; they are recomputed from the cache."""


@dataclass
class Attention:
    """One attention.

    Args:
        node: the node of its result: the fused operator, or the product with the values.
        key, value: `(node, position)` of the arguments where keys and values enter.
        inside: nodes on `[new, total]` scores, in order, when it is spelled out; includes `node`.
        masks: nodes of the region of positions that run over the sequence twice.
        softmax: the node that normalizes the scores; `node` where it is fused.
        passes: how many sequences of keys are concatenated: 2 where a second pass also reads those of the first.
    """

    node: fx.Node
    key: tuple[fx.Node, int]
    value: tuple[fx.Node, int]
    softmax: fx.Node
    inside: list[fx.Node] = field(default_factory=list)
    masks: list[fx.Node] = field(default_factory=list)
    passes: int = 1

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
    """All self-attention, in the order of the graph.

    Raises:
        LoopQError: there is none, or one has an unknown form.
    """
    found = []
    for node in regions.graph_module.graph.nodes:
        if node.target is SDPA and node in regions.tokens and regions.axes(node.args[1]):
            mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
            found.append(Attention(node, (node, 1), (node, 2), node, masks=[mask] if mask is not None else []))
        elif node.target in _SOFTMAX and node in regions.tokens and len(regions.axes(node)) == 2:
            found.append(_spelled_out(regions, node))
    if not found:
        raise LoopQError("This model has no attention, so there are no keys and values to cache: use cache=False.")
    for attention in found:
        attention.passes = _passes(regions, attention)
    return found


def _passes(regions: Regions, attention: Attention) -> int:
    values: Any = attention.value[0].args[attention.value[1]]
    axes = regions.axes(values)
    size = shape_of(values)[axes[0]].node.expr if axes == [len(shape_of(values)) - 2] else None
    count = sympy.cancel(size / regions.symbol) if size is not None else None
    if count is None or not count.is_Integer or (count > 1 and attention.is_causal):
        raise LoopQError(
            f"This model cannot have a key-value cache: {where(attention.node)} reads values "
            f"{list(shape_of(values))}; they must be [batch, heads, sequence, size], or several such sequences "
            "concatenated under a mask. Use cache=False."
        )
    return int(count)


def _spelled_out(regions: Regions, softmax: fx.Node) -> Attention:
    """Follows the scores up to the product of queries and keys, and down to that with the values."""
    scores, before = softmax, []
    while scores.target not in _PRODUCTS:
        above = [a for a in scores.all_input_nodes if a in regions.tokens and len(regions.axes(a)) == 2]
        if len(above) != 1:
            raise LoopQError(f"The scores of this attention are not a product of queries and keys: {where(softmax)}.")
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


@dataclass
class Source:
    """Where keys or values come from.

    Args:
        stems: what a cache holds, `[batch, heads, sequence, size]`: one node, or one for each pass.
        between: the nodes between `stems` and the attention.
        end: the node that the attention reads.
    """

    stems: list[fx.Node]
    between: set[fx.Node]
    end: fx.Node


def find_source(regions: Regions, attention: Attention, entry: tuple[fx.Node, int]) -> Source:
    """Finds the smallest tensor before views, casts, and copies for grouped queries.

    Raises:
        LoopQError: keys or values have another layout.
    """
    end: Any = entry[0].args[entry[1]]
    source = Source([], set(), end)
    _climb(regions, attention, end, source)
    return source


def _climb(regions: Regions, attention: Attention, node: fx.Node, source: Source) -> None:
    chain = [node]
    while _is_view(chain[-1]) or chain[-1].target in _MOVES or _is_scaling(chain[-1]):
        above = chain[-1].args[0]
        if not isinstance(above, fx.Node) or above not in regions.tokens:
            break
        chain.append(above)
    fitting = [place for place, found in enumerate(chain) if _is_stem(regions, found)]
    if fitting:
        best = min(fitting, key=lambda place: (_width(chain[place]), len(shape_of(chain[place])) != 4, place))
        source.stems.append(chain[best])
        source.between.update(chain[:best])
        return
    top = chain[-1]
    parts: Any = top.args[0] if top.target is _aten.cat.default else []
    dim = int(top.args[1]) % len(shape_of(top)) if parts and len(top.args) > 1 else 0  # type: ignore[call-overload, arg-type]
    if not parts or regions.axes(top) != [dim] or any(part not in regions.tokens for part in parts):
        raise LoopQError(
            f"Keys and values must be [batch, heads, sequence, size] to be cached: {where(attention.node)} reads "
            f"{node.name!r} {list(shape_of(node))}. Use cache=False."
        )
    source.between.update(chain)
    for part in parts:
        _climb(regions, attention, part, source)


def _is_stem(regions: Regions, node: fx.Node) -> bool:
    shape = shape_of(node)
    rank = len(shape)
    if rank < 3 or node not in regions.tokens or regions.axes(node) != [rank - 2] or not isinstance(shape[-1], int):
        return False
    if node.meta["val"].is_complex():  # rotary embeddings pass through complex numbers; caches are real
        return False
    sequence = shape[-2].node.expr == regions.symbol
    return (
        sequence
        and not isinstance(shape[0], int)
        and shape[0].node.expr.is_Symbol
        and all(isinstance(size, int) for size in shape[1:-2])
    )


def _width(node: fx.Node) -> int:
    total = 1
    for size in shape_of(node):
        total *= size if isinstance(size, int) else 1
    return total


def _is_view(node: fx.Node) -> bool:
    """Whether an operator returns its argument's numbers in another shape, according to its schema."""
    schema = getattr(node.target, "_schema", None)
    aliases = [result.alias_info for result in schema.returns] if schema is not None else []
    return len(aliases) == 1 and aliases[0] is not None and not aliases[0].is_write


def _is_scaling(node: fx.Node) -> bool:
    return is_pointwise(node) and len(node.all_input_nodes) == 1


def ungrouped(node: Any) -> fx.Node:
    """The tensor before it was copied for query heads (head `i` reads `i // copies`); `node` if there is no copy."""
    if node.target in _REPEATS and node.args[2] == 1:
        return node.args[0]
    above = node
    while above.target in (*_VIEWS, _aten.clone.default, _aten.expand.default):
        above = above.args[0]
    repeats = above.target is _aten.unsqueeze.default and above.args[1] == 2 and len(shape_of(above.args[0])) == 4
    return above.args[0] if repeats else node
