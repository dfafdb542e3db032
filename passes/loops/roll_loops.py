"""`roll-loops`: the iterations of a loop become one node."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.fold_weights import returns_its_input
from loopq_compile.graph.insert import add_constant, call
from loopq_compile.graph.loops import get_tag, set_tag
from loopq_compile.graph.rolled import RolledLoop
from loopq_compile.graph.shapes import infer_shapes
from loopq_compile.graph.state import free_name
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.loops.iteration_match import Match, Mismatch, match_iterations

_aten = torch.ops.aten


class RollLoops(Pass):
    """Turns `T` copies of a block into one call of a `RolledLoop`; runs last.

    Before: every loop has its own nodes, tagged. After: `loop_0([state], [shared]) -> (state, collected)`; its body is
    a graph of its own that reads the tables of scales, transforms and adapters by row number. Weights per loop and
    constants computed from the number of the loop are tables, too. The adapter is at the entry of the body and has a
    row of zeros for the first loop. `cat` or `stack` over the results of all loops reads the whole collected tensor;
    the result of one loop is a row of it.

    Values that iterations compute only from their number, not all in the same way (LoopFormer's time, which starts as
    zero), stay before the loop, as a table with a row for each. If the first iteration still differs from the others
    (Parcae-like injection from the second loop on), it also stays before the loop. Iterations of nested loops stay
    unrolled inside the body. The results are bit-identical to the unrolled program's. Does nothing without loops, and
    to loops that are already rolled.

    Raises:
        LoopQError: iterations differ in more than data; the message names the node and the loop.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if state.tags is None or any(node.op == "call_module" for node in graph_module.graph.nodes):
            return PassResult(graph_module, False)
        _drop_what_changes_nothing(graph_module)
        for number, loop in enumerate(state.loops.loops):
            match, skipped = _match(graph_module, number, loop.count)
            _roll(graph_module, match, number, skipped)
            state.note(f"loop {number}: {loop.count - skipped} iterations of {len(match.copies)} nodes are one")
        if state.loops.loops:
            # These name nodes that are gone; blocks and counts remain valid.
            state.tags = {}
            state.loops = replace(
                state.loops, loops=tuple(replace(loop, call_sites=(), boundaries=()) for loop in state.loops.loops)
            )
            for node in graph_module.graph.nodes:
                set_tag(node, None)
        return PassResult(graph_module, bool(state.loops.loops))


def _drop_what_changes_nothing(graph_module: fx.GraphModule) -> None:
    """Removes casts and expansions without effect: often one iteration has them, and the others do not."""
    infer_shapes(graph_module)
    for node in [node for node in graph_module.graph.nodes if get_tag(node) is not None and returns_its_input(node)]:
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)


def _match(graph_module: fx.GraphModule, number: int, count: int) -> tuple[Match, int]:
    """The body of a loop, and how many iterations stay before it."""
    first: Mismatch | None = None
    for skipped, hoisted in ((0, False), (0, True), (1, False), (1, True)):
        if skipped and (count < 3 or not (first and first.first)):
            break
        try:
            return match_iterations(graph_module, number, skipped, hoisted), skipped
        except Mismatch as error:
            first = first or error
    assert first is not None
    raise first


def _roll(graph_module: fx.GraphModule, match: Match, number: int, skipped: int) -> None:
    graph, members = graph_module.graph, match.members
    gone = {node for nodes in members for node in nodes} | set(match.adapters)
    behind = _move_behind(graph, gone, match)
    carried = [place for place, _ in match.initial]
    outside = [
        [place for place in range(len(match.copies)) if any(user not in gone for user in nodes[place].users)]
        for nodes in members
    ]
    collected = sorted({p for t, used in enumerate(outside) for p in used if t < len(members) - 1 or p not in carried})
    match.body.output(tuple(match.copies[place] for place in [*carried, *collected]))
    for node in match.body.nodes:
        if node.op == "placeholder":
            node.target = node.name  # the argument's name in code, which must differ from every node's
    body = fx.GraphModule({}, match.body)
    name = free_name(graph_module, f"loop_{number}")
    scanned = [position for position, (value, _) in enumerate(match.shared) if value.scanned]
    graph_module.add_module(name, RolledLoop(body, len(members), len(members), skipped, number, scanned))
    shared = [_outer_value(graph_module, shared, behind) for shared, _ in match.shared]
    initial = [start for _, start in match.initial]
    with graph.inserting_before(behind):
        loop = graph.create_node("call_module", name, (initial, shared), name=name)
        final = [graph.call_function(operator.getitem, (loop, i)) for i in range(len(carried))]
        stacks = {
            place: graph.call_function(operator.getitem, (loop, len(carried) + i)) for i, place in enumerate(collected)
        }
    for place, stack in stacks.items():
        _read_collected(graph, [nodes[place] for nodes in members], stack, gone)
    for place, value in zip(carried, final, strict=True):
        members[-1][place].replace_all_uses_with(value, delete_user_cb=lambda user: user not in gone)
    for node in [node for node in reversed(graph.nodes) if node in gone]:
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _move_behind(graph: fx.Graph, gone: set[fx.Node], match: Match) -> fx.Node:
    """Moves what reads the loop after its last iteration, in order; returns the node before which the loop is inserted.

    Raises:
        LoopQError: an iteration reads such a value.
    """
    order = list(graph.nodes)
    last = max(position for position, node in enumerate(order) if node in gone)
    dependent: dict[fx.Node, None] = {}
    for node in order:
        if node not in gone and any(argument in gone or argument in dependent for argument in node.all_input_nodes):
            dependent[node] = None
    inputs = [*(start for _, start in match.initial), *(n for s, _ in match.shared for n in (s.node, *s.stack) if n)]
    for node in inputs:
        if node in dependent:
            raise LoopQError(
                f"roll-loops: {node.name!r} ({node.target}) stands between two loops and is not part of either; such a "
                "program cannot be rolled, use form='unrolled'."
            )
    spot = order[last]
    for node in order[:last]:
        if node in dependent:
            spot.append(node)
            spot = node
    # Before everything that depends on the loop, and after everything that it reads.
    return order[last].next


def _outer_value(graph_module: fx.GraphModule, shared: Any, before: fx.Node) -> fx.Node:
    if shared.values is not None:
        return add_constant(graph_module, shared.name, shared.values.contiguous())
    if shared.stack:
        with graph_module.graph.inserting_before(before):
            return call(graph_module.graph, _aten.stack.default, list(shared.stack))
    return shared.node


def _read_collected(graph: fx.Graph, nodes: Sequence[fx.Node], stack: fx.Node, gone: set[fx.Node]) -> None:
    """Lets everything outside read `stack [T, ...]` instead of the iterations' own results `nodes`."""
    for user in [user for user in nodes[0].users if user not in gone]:
        joined = _joined(graph, user, list(nodes), stack)
        if joined is not None:
            user.replace_all_uses_with(joined)
            graph.erase_node(user)
    for t, node in enumerate(nodes):
        readers = [user for user in node.users if user not in gone]
        if readers:
            with graph.inserting_before(stack.next):
                row = call(graph, _aten.select.int, stack, 0, t if t < len(nodes) - 1 else -1)
            for reader in readers:
                reader.replace_input_with(node, row)


def _joined(graph: fx.Graph, user: fx.Node, nodes: list[fx.Node], stack: fx.Node) -> fx.Node | None:
    """`cat(nodes, dim)` or `stack(nodes, dim)` as a view of `stack`; None if `user` is neither."""
    value = nodes[0].meta.get("val")
    if user.target not in (_aten.cat.default, _aten.stack.default) or list(user.args[0]) != nodes:  # type: ignore[arg-type]
        return None
    if not isinstance(value, Tensor):
        return None
    dim: Any = user.args[1] if len(user.args) > 1 else 0
    is_cat = user.target is _aten.cat.default
    dim %= value.ndim if is_cat else value.ndim + 1
    if dim == 0 and not is_cat:
        return stack
    order = list(range(1, value.ndim + 1))
    order.insert(dim, 0)
    with graph.inserting_before(user):
        moved = call(graph, _aten.permute.default, stack, order)
        whole = call(graph, _aten.flatten.using_ints, moved, dim, dim + 1) if is_cat else moved
        # Elementwise functions may differ in the last bit on other strides.
        return graph.call_function(_aten.clone.default, (whole,), {"memory_format": torch.contiguous_format})
