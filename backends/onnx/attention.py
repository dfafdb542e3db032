"""Attention: products and softmax in target `qdq`; in target `onnxruntime` one node, `Attention` of operator set 23.

The latter also replaces `softmax(q * scale @ keys^T + mask) @ values` that a model spells out, for `q [batch, heads,
new, size]`, also if queries of a group share their keys (`[batch, groups, heads / groups, new, size]` and `[batch,
groups, 1, total, size]`). If keys and values are joined with a cache and the joined tensors are results of the file,
the operator joins them.

For a row whose mask is the lowest number throughout, as that of a padded token, ONNX Runtime 1.32 gives zeros, while
softmax gives the mean. Masks are therefore limited to half of that number, which changes nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loopq_compile.backends.onnx.emit import Emitter, constant, constant_array, replace_value, sizes
from loopq_compile.backends.onnx.flatten import DOMAIN
from loopq_compile.backends.onnx.matching import made_by, only_reader, remove_unused

OPSET = 23
"""The operator set that introduced `Attention`."""
_FLOOR = np.array(np.finfo(np.float32).min / 2, dtype=np.float32)


@dataclass
class _Match:
    """The parts of one attention, `[batch, heads, sequence, size]` each; `result` replaces `anchor`'s."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    anchor: ir.Node


def fuse_attention(graph: ir.Graph) -> int:
    """Replaces attention by `Attention`, which needs operator set `OPSET`; returns how many there were.

    Most arrives as an opaque node. Models that write out softmax and products themselves are recognised.
    """
    masks: dict[ir.Value, ir.Value] = {}
    found = 0
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == DOMAIN:
            match = _opaque(node)
        elif node.op_type == "Softmax" and node.domain == "":
            match = _match(node)
        else:
            continue
        if match is not None:
            _replace(graph, match, masks)
            found += 1
    if found:
        graph.opset_imports[""] = OPSET
    return found


def lower_attention(graph: ir.Graph) -> int:
    """Replaces attention by products and softmax, so that a step reads the cache as little as possible.

    It becomes `softmax(q * scale @ keys^T + mask) @ values`. Queries of a group, `[batch, groups, heads / groups, new,
    size]`, read their keys without copies.
    """
    nodes = [node for node in graph if node.op_type == "Attention" and node.domain == DOMAIN]
    masks: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        _spell_out(Emitter(graph, node), masks, *node.inputs)  # type: ignore[arg-type]
    return len(nodes)


def _spell_out(
    emitter: Emitter,
    masks: dict[ir.Value, ir.Value],
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
) -> None:
    graph, node, dtype = emitter.graph, emitter.anchor, query.dtype
    (batch, heads, new, size), (_, groups, total, _) = sizes(query), sizes(key)
    leading, result = [batch, heads], node.outputs[0]
    if groups != heads:
        leading = [batch, groups, heads // groups]
        query = emitter.rearrange(query, [*leading, new, size])
        key, value = _single_axis(emitter, key), _single_axis(emitter, value)
        if mask not in masks:
            masks[mask] = _single_axis(emitter, mask)
        mask = masks[mask]
    scale = node.attributes["scale"].as_float()
    factor = constant(graph, f"scale_{scale:.9g}_{dtype}", np.array(scale, dtype.numpy()))  # type: ignore[union-attr]
    scaled = emitter.node("Mul", [query, factor], dtype, query.shape)
    rank = len(leading) + 2
    order = [*range(rank - 2), rank - 1, rank - 2]
    turned = emitter.node("Transpose", [key], dtype, [*sizes(key)[:-2], size, total], {"perm": order})
    scores = emitter.node("MatMul", [scaled, turned], dtype, [*leading, new, total])
    weights = emitter.node("Add", [scores, mask], dtype, scores.shape)
    weights = emitter.node("Softmax", [weights], dtype, scores.shape, {"axis": -1})
    made = emitter.node("MatMul", [weights, value], dtype, [*leading, new, sizes(value)[-1]])
    emitter.finish(made if groups == heads else emitter.rearrange(made, sizes(result)))


def _single_axis(emitter: Emitter, x: ir.Value) -> ir.Value:
    """`x [batch, groups, ...]` as `[batch, groups, 1, ...]`."""
    axis = constant(emitter.graph, "axis_of_group", [2])
    return emitter.node("Unsqueeze", [x, axis], x.dtype, [*sizes(x)[:2], 1, *sizes(x)[2:]])


def _opaque(node: ir.Node) -> _Match | None:
    query, key, value, mask = node.inputs
    shapes = [_sizes(x) for x in (query, key)]
    if query is None or None in shapes:
        return None
    (batch, heads, new, _), (_, groups, total, _) = shapes  # type: ignore[misc]
    whole = heads == groups
    scores = [batch, heads, new, total] if whole else [batch, groups, heads // groups, new, total]
    return _fitting(query, key, value, mask, node.attributes["scale"].as_float(), scores, node)


def _replace(graph: ir.Graph, match: _Match, masks: dict[ir.Value, ir.Value]) -> None:
    emitter, anchor = Emitter(graph, match.anchor), match.anchor
    mask = match.mask
    if mask is not None:
        if mask not in masks:
            floor = constant(graph, "lowest_of_masks", _FLOOR)
            masks[mask] = emitter.node("Max", [mask, floor], mask.dtype, mask.shape)
        mask = masks[mask]
    old = anchor.outputs[0]
    joins = [_cache_join(graph, value) for value in (match.key, match.value)]
    inputs: list[ir.Value | None] = [match.query, match.key, match.value, mask]
    result = ir.Value(type=old.type, shape=old.shape)
    outputs = [result]
    joined = [join for join in joins if join is not None]
    if len(joined) == 2:
        inputs = [match.query, joined[0].inputs[1], joined[1].inputs[1], mask, *(join.inputs[0] for join in joined)]
        outputs += [ir.Value(type=join.outputs[0].type, shape=join.outputs[0].shape) for join in joined]
    node = ir.node(
        "Attention", inputs, {"scale": match.scale}, outputs=outputs, metadata_props=dict(anchor.metadata_props)
    )
    graph.insert_before(anchor, [node])
    replace_value(old, result)
    remove_unused(graph, anchor)
    if len(joined) == 2:
        for join, output in zip(joined, outputs[1:], strict=True):
            replace_value(join.outputs[0], output)
            remove_unused(graph, join)


def _cache_join(graph: ir.Graph, value: ir.Value) -> ir.Node | None:
    """The `Concat(past, new)` that gives `value`, if that is a result of the file and only attention reads it."""
    join = made_by(value, "Concat")
    fits = join is not None and len(join.inputs) == 2 and join.attributes.get_int("axis", 0) in (2, -2)
    return join if fits and value.is_graph_output() and len(list(value.uses())) == 1 else None


def _match(softmax: ir.Node) -> _Match | None:
    scores, weights = softmax.inputs[0], softmax.outputs[0]
    shape = _sizes(scores)
    if scores is None or scores.dtype is not ir.DataType.FLOAT or shape is None or len(shape) not in (4, 5):
        return None
    product = only_reader(weights, "MatMul")
    if (
        product is None
        or product.inputs[0] is not weights
        or softmax.attributes.get_int("axis", -1) % len(shape) != (len(shape) - 1)
    ):
        return None
    mask, (scores, outer) = None, _unscaled(scores)
    total = made_by(scores, "Add")
    if total is not None:
        sides = [(total.inputs[i], total.inputs[1 - i]) for i in (0, 1)]
        scores, mask = next(((a, b) for a, b in sides if made_by(_unscaled(a)[0], "MatMul")), (None, None))
        if outer != 1 or _sizes(scores) != shape:
            return None
        scores, outer = _unscaled(scores)
    multiply = made_by(scores, "MatMul")
    if multiply is None:
        return None
    query, first = _unscaled(multiply.inputs[0])
    turned, second = _unscaled(multiply.inputs[1])
    key, third = _unscaled(_turned_back(turned))
    return _fit(product, query, key, mask, outer * first * second * third, shape)


def _fit(
    product: ir.Node, query: ir.Value | None, key: ir.Value | None, mask: ir.Value | None, scale: float, shape: list
) -> _Match | None:
    """The match, if all shapes are certainly ones that the operator takes."""
    value, masked, anchor = product.inputs[1], mask is not None, product
    if len(shape) == 5:
        merged = only_reader(product.outputs[0], "Reshape")
        query, key, value, mask = _ungrouped(query), _single(key), _single(value), _single(mask)
        if merged is None or merged.inputs[0] is not product.outputs[0]:
            return None
        anchor = merged
    return None if masked and mask is None else _fitting(query, key, value, mask, scale, shape, anchor)


def _fitting(
    query: ir.Value | None,
    key: ir.Value | None,
    value: ir.Value | None,
    mask: ir.Value | None,
    scale: float,
    shape: list,
    anchor: ir.Node,
) -> _Match | None:
    q, k, v, y = (_sizes(item) for item in (query, key, value, anchor.outputs[0]))
    if query is None or key is None or value is None or q is None or k is None or v is None or y is None or scale <= 0:
        return None
    new, total = shape[-2:]
    heads = int(np.prod(shape[1:-2])) if all(isinstance(size, int) for size in shape[1:-2]) else None
    fits = len(q) == len(k) == len(v) == 4 and heads is not None and q[0] == k[0] == v[0] == shape[0]
    fits = fits and q[1] == heads and k[1] == v[1] == shape[1] and isinstance(q[3], int) and q[3] == k[3]
    fits = fits and q[2] == new and k[2] == v[2] == total and y == [shape[0], heads, new, v[3]]
    if mask is not None:
        m = _sizes(mask)
        fits = fits and m is not None and len(m) == 4 and m[2:] == [new, total] and m[0] in (1, shape[0])
        fits = fits and m is not None and m[1] in (1, heads) and (m[1] == 1 or len(shape) == 4)
    types = {item.dtype for item in (query, key, value, *([mask] if mask is not None else []))}
    if not fits or types != {ir.DataType.FLOAT}:
        return None
    return _Match(query, key, value, mask, float(scale), anchor)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """`(x, number)` such that `value` is their product."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    for position in (0, 1) if node.op_type == "Mul" else (1,):
        array, x = constant_array(node.inputs[position]), node.inputs[1 - position]
        if array is not None and array.size == 1 and array.ndim == 0:
            number = float(array)
            return x, number if node.op_type == "Mul" else 1 / number if number else 0.0
    return value, 1.0


def _turned_back(value: ir.Value | None) -> ir.Value | None:
    """`x`, if `value` is `x` with its last two axes exchanged."""
    node = made_by(value, "Transpose")
    order = list(node.attributes["perm"].as_ints()) if node is not None and "perm" in node.attributes else []
    rank = len(order)
    return node.inputs[0] if node is not None and order == [*range(rank - 2), rank - 1, rank - 2] else None


def _ungrouped(value: ir.Value | None) -> ir.Value | None:
    """The tensor `[batch, heads, new, size]` whose view `[batch, groups, heads / groups, new, size]` is `value`."""
    node = made_by(value, "Reshape")
    x = node.inputs[0] if node is not None else None
    before, after = _sizes(x), _sizes(value)
    if before is None or after is None or len(before) != 4 or not all(isinstance(n, int) for n in after[1:3]):
        return None
    return x if before == [after[0], after[1] * after[2], *after[3:]] else None


def _single(value: ir.Value | None) -> ir.Value | None:
    """`x [batch, groups, total, size]` of `value [batch, groups, 1, total, size]`."""
    node = made_by(value, "Unsqueeze")
    axes = constant_array(node.inputs[1]) if node is not None else None
    return node.inputs[0] if node is not None and axes is not None and axes.tolist() in ([2], [-3]) else None


def _sizes(value: ir.Value | None) -> list | None:
    """Numbers, and names for dimensions that vary (sums with their terms in order); None if a dimension is unknown."""
    if value is None or value.shape is None:
        return None
    known = [size if isinstance(size, int) else size.value for size in value.shape]
    if None in known:
        return None
    return [size if isinstance(size, int) else " + ".join(sorted(str(size).split(" + "))) for size in known]
