"""`fix-cache`: a key-value cache with room for more tokens; a step writes at a given position."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.caches import PAST_PREFIX
from loopq_compile.graph.rolled import RolledLoop
from loopq_compile.passes.base import Pass, PassResult

_aten = torch.ops.aten
POSITION = "position"
"""Name of the new input: int64 `[1]`, the column of the new token."""


class FixCache(Pass):
    """Gives one decoding step a graph with fixed shapes.

    Before: a program with a cache that grows: `cat(past, new)`, and rows `past ... past + new` of what is computed from
    positions. After: there is a last input `position`. The new token is written into the cache in place at that column,
    and takes that row. Cache and attention mask have one length, that of the longest text. Columns after the position
    may hold anything: causal masks hide them, and attention on a cache of integers does not read them. A position is a
    tensor, so a CUDA graph reads it again in every step.

    The signature stays that of the program. Does nothing to a graph that already has the input.

    Raises:
        LoopQError: the number of past tokens is used in another way, or a rolled loop reads a copy of its cache.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if has_position(graph_module):
            return PassResult(graph_module, False)
        nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        specs = self.state(graph_module).signature.inputs
        caches = {
            node: spec.shape for spec, node in zip(specs, nodes, strict=True) if spec.name.startswith(PAST_PREFIX)
        }
        with graph_module.graph.inserting_after(nodes[-1]):
            position = graph_module.graph.placeholder(POSITION)
        for node in list(graph_module.graph.nodes):
            if node.op == "call_module":
                _write_in_body(graph_module, node, set(caches), position)
        for node in list(graph_module.graph.nodes):
            if node.target is _aten.cat.default:
                past = node.args[0][0]  # type: ignore[index]
                stacked = past in caches and caches[past][0] != "batch"
                if stacked:
                    node.replace_all_uses_with(past)
                elif past in caches or (past.target is _aten.select.int and past.args[0] in caches):
                    _write(node, position)
        _take_row(graph_module.graph, caches, position)
        _read_no_further(graph_module.graph, position)
        graph_module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))
        return PassResult(graph_module, True)


def has_position(graph_module: fx.GraphModule) -> bool:
    """Whether the pass has run on this graph."""
    inputs = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    return inputs[-1:] == [POSITION]


def _writes(node: fx.Node) -> bool:
    return node.op == "call_module" or node.target is _aten.index_copy_.default


def _write(joined: fx.Node, position: fx.Node) -> None:
    """Replaces `cat(past, new)` by `past`, into which `new` is written."""
    arguments: Any = joined.args
    (past, new), axis = arguments
    with joined.graph.inserting_before(joined):
        written = joined.graph.call_function(_aten.index_copy_.default, (past, axis, position, new))
    written.meta.update({key: value for key, value in joined.meta.items() if key != "val"})
    joined.replace_all_uses_with(written)


def _write_in_body(graph_module: fx.GraphModule, node: fx.Node, caches: set[fx.Node], position: fx.Node) -> None:
    """Lets the body of a rolled loop write into the rows of the caches that it is given."""
    loop: Any = graph_module.get_submodule(str(node.target))
    assert isinstance(loop, RolledLoop)
    state, shared = node.args[:2]
    inputs = [inner for inner in loop.body.graph.nodes if inner.op == "placeholder"]
    rows = {inputs[1 + len(state) + i]: shared[i] for i in loop.scanned}  # type: ignore[arg-type, index]
    joined = [inner for inner in loop.body.graph.nodes if inner.target is _aten.cat.default]
    joined = [inner for inner in joined if inner.args[0][0] in rows]
    for inner in joined:
        if rows[inner.args[0][0]] not in caches:
            raise LoopQError(f"{node.name!r} reads a copy of its cache; lower the program without rolled=True.")
    with loop.body.graph.inserting_after(inputs[-1]):
        inside = loop.body.graph.placeholder(POSITION)
    for inner in joined:
        _write(inner, inside)
    _read_no_further(loop.body.graph, inside)
    loop.body.graph.eliminate_dead_code(lambda inner: inner.op in ("placeholder", "output") or _writes(inner))
    loop.body.recompile()
    node.args = (state, [*shared, position], *node.args[2:])  # type: ignore[misc]


def _read_no_further(graph: fx.Graph, position: fx.Node) -> None:
    """Lets attention on a cache of integers stop at the new token's column."""
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target).split(".")[-2:-1] == ["cached_attention"]:
            node.args = (*node.args[:8], position)


def _take_row(graph: fx.Graph, caches: dict[fx.Node, Any], position: fx.Node) -> None:
    """Nodes that take rows `past ... past + new` take the row of the position.

    Raises:
        LoopQError: something else is done with the number of past tokens.
    """
    sizes = [node for node in graph.nodes if node.target is _aten.sym_size.int and node.args[0] in caches]
    for past in sizes:
        for node in list(past.users):
            with graph.inserting_before(node):
                if node.target is _aten.arange.start and node.args[0] is past:
                    row = position
                    if node.kwargs.get("dtype") not in (None, torch.int64):
                        row = graph.call_function(_aten.to.dtype, (position, node.kwargs["dtype"]))
                elif node.target is _aten.slice.Tensor and node.args[2] is past:
                    row = graph.call_function(_aten.index_select.default, (*node.args[:2], position))
                else:
                    raise LoopQError(
                        f"Decoding with fixed shapes does not know {node.name!r} ({node.target}), which reads the "
                        "number of past tokens; generate with the lowered program itself."
                    )
            node.replace_all_uses_with(row)
            graph.erase_node(node)
