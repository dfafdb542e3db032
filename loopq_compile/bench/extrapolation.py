"""More or fewer loops than were compiled: the last iteration runs again, with its own tables (LoopQ appendix C.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.state import attach_state, copy_graph, get_state


def with_loops(graph_module: fx.GraphModule, ends: Sequence[str], count: int) -> fx.GraphModule:
    """A copy of a graph whose main loop runs `count` times.

    Iterations beyond the last repeat the nodes between the last two states: ranges, transforms and the transition
    adapter keep their last values, and so do values that the model itself derives from the number of the loop.

    Args:
        graph_module: a captured graph, or the graph of a program made from it.
        ends: names of the nodes that hold the state after each iteration, from
            `loopq_compile.calibration.states.loop_ends`.
        count: number of iterations, at least 1.

    Raises:
        LoopQError: there is no loop, or the loop carries more than one state.
    """
    if len(ends) < 2:
        raise LoopQError("The number of loops can be changed where one state passes from each loop to the next.")
    if count < 1:
        raise LoopQError(f"A loop runs once or more often; got {count}.")
    copied = copy_graph(graph_module)
    attach_state(copied, replace(get_state(graph_module)))
    nodes = {node.name: node for node in copied.graph.nodes}
    missing = [name for name in ends if name not in nodes]
    if missing:
        raise LoopQError(f"The program has no node {missing[0]!r}, where the model has the state after a loop.")
    states = [nodes[name] for name in ends]
    if count < len(ends):
        states[-1].replace_all_uses_with(states[count - 1])
    elif count > len(ends):
        _repeat_last(copied.graph, states, count - len(ends))
    copied.graph.eliminate_dead_code()
    copied.graph.lint()
    copied.recompile()
    return copied


def _repeat_last(graph: fx.Graph, states: Sequence[fx.Node], times: int) -> None:
    before, last = states[-2:]
    below = _reach([before], lambda node: node.users)
    above = _reach([last], lambda node: node.all_input_nodes)
    span = [node for node in graph.nodes if node in below & above and node is not before]
    older = _reach([states[0]], lambda node: node.users) - below
    for node in span:
        for argument in node.all_input_nodes:
            if argument in older:
                raise LoopQError(
                    f"The last loop also reads {argument.name!r} of an earlier one (at {node.name!r}); only loops that "
                    "carry a single state can be made longer."
                )
    readers = [user for user in last.users if user not in span]
    newest = last
    for _ in range(times):
        copies, spot = {before: newest}, newest
        for node in span:
            with graph.inserting_after(spot):
                spot = graph.node_copy(node, partial(_renamed, copies))
            copies[node] = spot
        newest = copies[last]
    for reader in readers:
        reader.replace_input_with(last, newest)


def _renamed(copies: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return copies.get(node, node)


def _reach(start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """`start` and everything reachable from it by `step`."""
    found: set[fx.Node] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(step(node))
    return found
