"""`fuse-attention`: attention that reads the integers of an integer cache directly."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.insert import call, inserting
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.operators import ops
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.cache.attention import SDPA, ungrouped
from loopq_compile.passes.fuse.fusion import Refusal, entry, record


class FuseAttention(Pass):
    """Makes attention read the codes and scales of a key-value cache.

    Before: `scaled_dot_product_attention(q, keys, values, mask)`, where keys and values are `dequantize_cache(cat(past,
    quantize_cache(new)), ...)`, maybe copied for grouped queries, which share a head of the cache. After:
    `cached_attention(q, codes and scales of both, mask)`, which dequantizes on the fly; `quantize_cache` has a
    separate kernel. Runs before `roll-loops`, so that rolled loops have it in their body.

    Does nothing to programs without a cache, and to caches in floating point. The report says which attention is
    unchanged and why: it is spelled out as products and softmax, there is a step between cache and attention, the mask
    is not added, or heads are too wide.

    Args:
        widest: bytes that a head may have in the type of its queries.
    """

    def __init__(self, widest: int = 512) -> None:
        super().__init__()
        self.widest = widest

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not has_cache(self.state(graph_module).signature):
            return PassResult(graph_module, False)
        infer_shapes(graph_module)
        graph, entries = graph_module.graph, []
        for node in [node for node in graph.nodes if node.target is SDPA]:
            try:
                arguments = _arguments(node, self.widest)
            except Refusal as reason:
                entries.append(entry(node, reason=str(reason)))
                continue
            with inserting(graph, before=node, tag=get_tag(node), site=node.meta.get(SITE, "")):
                fused = call(graph, ops.cached_attention.default, *arguments)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            entries.append(entry(fused, (f"dequantize {arguments[-2]}-bit keys and values", "attention")))
        fused_any = any(line.parts for line in entries)
        if fused_any:
            graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        entries += _left(graph)
        record(graph_module, entries)
        return PassResult(graph_module, fused_any)


def _arguments(node: fx.Node, widest: int) -> tuple[Any, ...]:
    """The arguments of `cached_attention` for a fused attention of PyTorch.

    Raises:
        Refusal: it does not match.
    """
    given: Any = node.args
    query, keys, values = given[:3]
    stored = [_stored(kind, read) for kind, read in (("keys", keys), ("values", values))]
    (key, key_scale, bits), (value, value_scale, value_bits) = stored
    if bits != value_bits:
        raise Refusal(f"keys have {bits} bits, values {value_bits}")
    types = {part.meta["val"].dtype for part in (query, key_scale, value_scale)}
    if len(types) > 1:
        raise Refusal("queries, keys and values differ in type")
    mask = given[3] if len(given) == 4 else None
    shown = mask.meta["val"] if isinstance(mask, fx.Node) else None
    if shown is None or shown.ndim != 4 or shown.dtype not in types:
        raise Refusal("its mask is not added to the scores")
    shape = query.meta["val"].shape
    heads, value_heads = (codes.meta["val"].shape[1] for codes in (key, value))
    if heads != value_heads or shape[1] % heads:
        raise Refusal(f"{shape[1]} queries share {heads} keys and {value_heads} values")
    size, value_size = shape[-1], value.meta["val"].shape[-1] * (1 if bits == 8 else 2)
    itemsize = query.meta["val"].element_size()
    if max(size, value_size) * itemsize > widest:
        raise Refusal(f"heads of {max(size, value_size)} numbers; a kernel holds {widest // itemsize}")
    scale: Any = node.kwargs.get("scale")
    scale = 1 / math.sqrt(size) if scale is None else scale
    return (query, key, key_scale, value, value_scale, mask, bits, scale)


def _stored(kind: str, read: Any) -> tuple[fx.Node, fx.Node, int]:
    """Codes, scales and bits of the keys or values that an attention reads.

    Raises:
        Refusal: they do not come from a cache of integers.
    """
    source = ungrouped(read)
    if source.target is not ops.dequantize_cache.default:
        below: Any = source
        while isinstance(below, fx.Node) and below.op == "call_function" and below.args:
            below = below.args[0][0] if isinstance(below.args[0], list | tuple) else below.args[0]
            if getattr(below, "target", None) is ops.dequantize_cache.default:
                raise Refusal(f"{source.target} stands between its {kind} and the cache")
        raise Refusal(f"its {kind} are cached in floating point")
    arguments: Any = source.args
    codes, scale, bits = arguments
    if not isinstance(codes.meta.get("val"), Tensor) or codes.meta["val"].ndim != 4:
        raise Refusal(f"its {kind} are not [batch, heads, total, size]")
    return codes, scale, bits


def _left(graph: fx.Graph) -> list[Any]:
    """A line for every integer cache that something other than fused attention still reads as numbers."""
    return [
        entry(node, reason="its attention is spelled out as products and softmax")
        for node in graph.nodes
        if node.target is ops.dequantize_cache.default and not any(_reaches(user) for user in node.users)
    ]


def _reaches(node: fx.Node) -> bool:
    """Whether a fused attention reads `node`, directly, copied or transposed."""
    return node.target is SDPA or (
        len(node.users) == 1 and len(node.all_input_nodes) == 1 and _reaches(next(iter(node.users)))
    )
