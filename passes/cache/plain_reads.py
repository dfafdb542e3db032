"""Rewrites operators that only read a tensor's shape or type, and `einsum`, as plainer operators.

A causal mask made by `x.new_full((t, t), ...)`, or cast by `mask.type_as(x)`, would look as if it depended on the
tokens in `x`. Attention written as `einsum("bqhd,bkhd->bhqk", q, k)` is a product of matrices.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.graph.insert import inserting
from loopq_compile.graph.loops import get_tag
from loopq_compile.passes.cache.cache_regions import Regions, find_regions

_aten = torch.ops.aten
_TYPED = {_aten.type_as.default, _aten.to.other}
_NEW = {_aten.new_full.default: None, _aten.new_zeros.default: 0, _aten.new_ones.default: 1}
_LIKE = {_aten.full_like.default: None, _aten.zeros_like.default: 0, _aten.ones_like.default: 1}


def write_plainly(graph_module: fx.GraphModule) -> Regions:
    """Rewrites such nodes in place; returns the regions of the graph.

    Raises:
        LoopQError: the graph does not take token ids `[batch, sequence]` and at most an attention mask.
    """
    regions = find_regions(graph_module)
    changed = False
    for node in [*graph_module.graph.nodes]:
        with inserting(graph_module.graph, before=node, tag=get_tag(node)) as made:
            plain = _plain(regions, node)
        if plain is not None:
            for new in made:
                new.meta.update({k: v for k, v in node.meta.items() if k != "val" and k not in new.meta})
            node.replace_all_uses_with(plain)
            graph_module.graph.erase_node(node)
            changed = True
    return find_regions(graph_module) if changed else regions


def _plain(regions: Regions, node: fx.Node) -> fx.Node | None:
    """The replacement of `node`; None to keep it."""
    graph, target = node.graph, node.target
    call: Any = graph.call_function
    if target in _TYPED:
        value: Tensor = node.meta["val"]
        return call(_aten.to.dtype, (node.args[0], value.dtype))
    if target in (*_NEW, *_LIKE):
        source: Any = node.args[0]
        crowded = len(regions.axes(node)) > 1
        if target in _LIKE and not crowded:
            return None
        sizes = node.args[1] if target in _NEW else _sizes(regions, source)
        number = (_NEW | _LIKE)[target]
        fill = (node.args[2] if target in _NEW else node.args[1]) if number is None else number
        value = node.meta["val"]
        return call(_aten.full.default, (sizes, fill), {"dtype": value.dtype, "device": value.device})
    if target is _aten.expand_as.default and len(regions.axes(node)) > 1:
        return call(_aten.expand.default, (node.args[0], _sizes(regions, node.args[1])))  # type: ignore[arg-type]
    if target is _aten.einsum.default and all(regions.axes(operand) for operand in node.args[1]):  # type: ignore
        return _product(regions, node)
    return None


def _sizes(regions: Regions, node: fx.Node) -> list[Any]:
    """The sizes of a node's tensor, as nodes where they vary; batch and sequence are read from the tokens' input."""
    inputs = {str(size): axis for axis, size in enumerate(regions.ids.meta["val"].shape)}
    found: list[Any] = []
    for axis, size in enumerate(node.meta["val"].shape):
        read = (regions.ids, inputs[str(size)]) if str(size) in inputs else (node, axis)
        found.append(size if isinstance(size, int) else node.graph.call_function(_aten.sym_size.int, read))
    return found


def _product(regions: Regions, node: fx.Node) -> fx.Node | None:
    """An `einsum` of two tensors as `permute(matmul(permute(x), permute(y)))`; None if it is something else."""
    operands: Any = list(node.args[1])  # type: ignore[call-overload, arg-type]
    letters = _letters(str(node.args[0]), [len(operand.meta["val"].shape) for operand in operands])
    if letters is None:
        return None
    left, right, out = letters
    running = [[labels[axis] for axis in regions.axes(x)] for labels, x in zip((left, right), operands, strict=True)]
    shared = [c for c in left if c in right and c not in out]
    mine, yours = [c for c in out if c not in right], [c for c in out if c not in left]
    if not shared or not mine or not yours or any(c not in out and c not in shared for c in (*left, *right)):
        return None
    rows = next((c for c in mine if c in running[0]), mine[-1])
    columns = next((c for c in yours if c in running[1]), yours[-1])
    if out.index(rows) > out.index(columns):
        left, right, rows, columns = right, left, columns, rows
        operands.reverse()
    batch = [c for c in out if c not in (rows, columns)]
    graph = node.graph
    first = _arranged(operands[0], left, [*batch, rows], shared, len(shared))
    if any(columns in labels for labels in running):
        # Keys of attention, which a cache holds as [..., sequence, size].
        second = _arranged(operands[1], right, [*batch, columns], shared, len(shared))
        second = graph.call_function(_aten.transpose.int, (second, -2, -1))
    else:
        second = _arranged(operands[1], right, batch, [*shared, columns], len(shared))
    made = graph.call_function(_aten.matmul.default, (first, second))
    return _permuted(made, [*batch, rows, columns], out)


def _arranged(x: fx.Node, labels: str, order: list[str], last: list[str], merged: int) -> fx.Node:
    """`x` with axes in `order`, of size 1 where it has none, then `last`, of which the first `merged` become one."""
    graph = x.graph
    made = _permuted(x, list(labels), [c for c in (*order, *last) if c in labels])
    for axis, label in enumerate(order):
        if label not in labels:
            made = graph.call_function(_aten.unsqueeze.default, (made, axis))
    if merged > 1:
        made = graph.call_function(_aten.flatten.using_ints, (made, len(order), len(order) + merged - 1))
    return made


def _permuted(x: fx.Node, labels: list[str], order: list[str] | str) -> fx.Node:
    if list(order) == labels:
        return x
    return x.graph.call_function(_aten.permute.default, (x, [labels.index(c) for c in order]))


def _letters(equation: str, ranks: list[int]) -> tuple[str, str, str] | None:
    """The labels of both operands and of the result, `...` spelled out; None for other equations."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not arrow:
        return None
    spare = [c for c in string.ascii_uppercase if c not in equation]
    counts = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    counts = [count if "..." in part else 0 for count, part in zip(counts, parts, strict=True)]
    rest = spare[: max(counts)]
    parts = [part.replace("...", "".join(rest[len(rest) - n :])) for part, n in zip(parts, counts, strict=True)]
    out = out.replace("...", "".join(rest))
    if any(len(set(labels)) != len(labels) for labels in (*parts, out)):
        return None
    return parts[0], parts[1], out
