"""Finds where the iterations of a loop begin and end.

A captured graph lists nodes in the order in which the model ran them, so an iteration is a stretch of that list. The
matrix products of iteration `t` say where it is, but not where it ends. Between the last product of one iteration and
the first product of the next is a *gap*. It holds the end of the one (residual, norm, gate), the beginning of the next
(injection, norm), and perhaps separate layers between two calls of a shared block. The steps at the start of a gap
that also follow the last iteration are an end; those at its end that also precede the first are a beginning:

    embed  [add e, norm | products 0 | residual, norm]  [add e, norm | products 1 | residual, norm]  head
           prologue                    `------------- gap -------------'            epilogue
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from loopq_compile.graph.recurrence import matrix_weight, module_calls

Nodes = Sequence[fx.Node]
Call = tuple[str, int]
"""A module path and the number of its call."""


@dataclass(frozen=True)
class Region:
    """Where to look: `nodes` in program order, and for nodes computed only from weights the names of those weights."""

    nodes: Nodes
    roots: Mapping[fx.Node, frozenset[str]]


def find_dependence(nodes: Nodes, use_of: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """For each node, the last iteration whose products it depends on; -1 if none."""
    last: dict[fx.Node, int] = {}
    for node in nodes:
        inputs = (last.get(argument, -1) for argument in node.all_input_nodes)
        last[node] = max(use_of.get(node, -1), max(inputs, default=-1))
    return last


def assign_iterations(region: Region, use_of: Mapping[fx.Node, int], count: int) -> dict[fx.Node, int]:
    """The iteration of every node that belongs to a loop.

    Args:
        region: the graph, or one iteration of the enclosing loop.
        use_of: the iteration of every matrix product of the loop.
        count: number of iterations.

    Returns:
        Iterations by node, in program order. Values that do not depend on the loop and serve several iterations
        (tables computed in the first one and kept) have none.
    """
    stretches, gaps = _cut(region.nodes, use_of, count)
    assigned = {node: t for t, stretch in enumerate(stretches) for node in stretch}
    layers = _layers(region, gaps, use_of)
    assigned.update(layers.voted)
    dependence = find_dependence(region.nodes, use_of)
    rest = [[node for node in gap if node not in layers.voted and not _is_size(node)] for gap in gaps]
    segments = [[*gap, *stretch] for gap, stretch in zip(gaps, [*stretches, []], strict=True)]
    steps = _steps(region, segments, dependence, layers.foreign)
    prologue, *between, epilogue = rest
    begin = end = 0
    for t, gap in enumerate(between):
        tail = _common(map(steps.get, gap), map(steps.get, epilogue))
        head = _common(map(steps.get, reversed(gap)), map(steps.get, reversed(prologue)))
        head = min(head, len(gap) - tail)
        middle = gap[tail : len(gap) - head]
        if not layers.foreign.intersection(middle):
            # Nodes that are neither (`if t > 0: ...`) prepare the next iteration.
            assigned.update(dict.fromkeys(middle, t + 1))
        assigned.update(dict.fromkeys(gap[:tail], t))
        assigned.update(dict.fromkeys(gap[len(gap) - head :], t + 1))
        begin, end = max(begin, head), max(end, tail)
    assigned.update(dict.fromkeys(prologue[len(prologue) - begin :], 0))
    assigned.update(dict.fromkeys(epilogue[:end], count - 1))
    _drop_shared_values(region.nodes, dependence, assigned)
    return {node: assigned[node] for node in region.nodes if node in assigned}


def _cut(nodes: Nodes, use_of: Mapping[fx.Node, int], count: int) -> tuple[list[Nodes], list[Nodes]]:
    """From first to last product of every iteration, and the `count + 1` gaps before, between and after them."""
    first, last = [len(nodes)] * count, [-1] * count
    for position, node in enumerate(nodes):
        if node in use_of:
            t = use_of[node]
            first[t], last[t] = min(first[t], position), max(last[t], position)
    stretches = [nodes[a : b + 1] for a, b in zip(first, last, strict=True)]
    gaps = [nodes[a + 1 : b] for a, b in zip([-1, *last], [*first, len(nodes)], strict=True)]
    return stretches, gaps


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


@dataclass(frozen=True)
class _Layers:
    """What module calls tell about the nodes of gaps.

    Args:
        voted: nodes in a call that holds products of one iteration only; they belong to that iteration.
        foreign: separate layers: products with a weight that is used nowhere else, and the calls around them.
    """

    voted: dict[fx.Node, int]
    foreign: set[fx.Node]


def _layers(region: Region, gaps: Sequence[Nodes], use_of: Mapping[fx.Node, int]) -> _Layers:
    inside: dict[Call, set[int]] = defaultdict(set)
    iterations_of: dict[str, set[int]] = defaultdict(set)
    for node, t in use_of.items():
        for call in module_calls(node):
            inside[call].add(t)
            iterations_of[call[0]].add(t)
    weights = {node: matrix_weight(node, region.roots) for node in region.nodes}
    uses = Counter(weights.values())
    own = {node for gap in gaps for node in gap if weights[node] and uses[weights[node]] == 1}
    own_calls = {call for node in own for call in module_calls(node)}

    def vote(node: fx.Node) -> int | None:
        call = next((call for call in reversed(module_calls(node)) if call in inside), None)
        # A module with separate layers decides only if it is called in several iterations.
        if call and len(inside[call]) == 1 and (call not in own_calls or len(iterations_of[call[0]]) > 1):
            return next(iter(inside[call]))
        return None

    votes = {node: vote(node) for gap in gaps for node in gap}
    voted = {node: t for node, t in votes.items() if t is not None}
    outer = own_calls - set(inside)
    foreign = {node for node in votes if node not in voted and (node in own or outer.intersection(module_calls(node)))}
    return _Layers(voted, foreign)


@dataclass(frozen=True)
class _Step:
    """What makes nodes of two gaps the same: operator, source line, and the values that several iterations read."""

    target: object
    line: str | None
    shared: frozenset[fx.Node | str]


def _steps(
    region: Region, segments: Sequence[Nodes], dependence: Mapping[fx.Node, int], foreign: set[fx.Node]
) -> dict[fx.Node, _Step | None]:
    """The step that each node is; None for foreign layers, which are like nothing else.

    `segments` are the iterations, each with the gap before it.
    """
    readers: dict[Hashable, set[int]] = defaultdict(set)
    for i, segment in enumerate(segments):
        for node in segment:
            if node not in region.roots:
                for value in _values(node, region):
                    readers[value].add(i)

    def is_shared(value: fx.Node | str) -> bool:
        if isinstance(value, str):
            return len(readers[value]) > 1
        # What enters the loop is read by iteration 0 and the gap after it (a residual); what is shared, later too.
        return dependence.get(value, -1) < 0 and max(readers[value]) > 1

    def step(node: fx.Node) -> _Step | None:
        if node in foreign:
            return None
        shared = frozenset(filter(is_shared, _values(node, region)))
        return _Step(node.target, node.meta.get("stack_trace"), shared)

    return {node: step(node) for segment in segments for node in segment}


def _values(node: fx.Node, region: Region) -> set[fx.Node | str]:
    """What `node` reads: nodes, and the names of weights."""
    return {value for argument in node.all_input_nodes for value in region.roots.get(argument, (argument,))}


def _common(left: Iterable[_Step | None], right: Iterable[_Step | None]) -> int:
    """How many steps `left` and `right` have in common at their start.

    `right` may read more from outside: a loop often starts from the very value that it also injects.
    """
    count = 0
    for a, b in zip(left, right, strict=False):
        if a is None or b is None or (a.target, a.line) != (b.target, b.line) or not a.shared <= b.shared:
            break
        count += 1
    return count


def _drop_shared_values(nodes: Nodes, dependence: Mapping[fx.Node, int], assigned: dict[fx.Node, int]) -> None:
    """Removes from `assigned` what does not depend on the loop and is read outside of its iteration."""
    for node in reversed(nodes):
        if dependence[node] < 0 and any(assigned.get(user) != assigned.get(node) for user in node.users):
            assigned.pop(node, None)
