"""`tag-loops`: gives every node its loop index."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import networkx as nx
from torch import Tensor, fx

from loopq_compile.loops import Boundary, Call, CallSite, Loop, LoopStructure, LoopTag, get_tag, set_tag
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.recurrence import (
    Group,
    common_blocks,
    find_repeats,
    group_repeats,
    matrix_weight,
    module_calls,
    weight_roots,
)


class TagLoops(Pass):
    """Finds the loops of an unrolled graph and tags the nodes inside.

    Before: a captured graph. After: the same graph; `state.loops` holds its `LoopStructure`, and each node that
    computes something inside a loop has a `LoopTag`. Weights, inputs, prelude and coda have none.

    A node belongs to iteration `t` if it lies between matrix products of iteration `t`, or in a module call that holds
    only such. Between the last product of one iteration and the first of the next, a node belongs to the next if
    the same source line also runs before the first iteration, to the last one otherwise. Layers with weights of
    their own between two calls of a shared block (Zamba) stay outside.

    Does nothing to a graph without repeated weights, and to one that is tagged already.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if state.tags is not None:
            return PassResult(graph_module, False)
        graph = graph_module.graph
        groups = group_repeats(find_repeats(graph))
        loops = tuple(
            _tag_group(graph, list(graph.nodes), group, LoopTag((number,), ())) for number, group in enumerate(groups)
        )
        sites = _call_sites(graph)
        state.loops = LoopStructure(
            tuple(replace(loop, call_sites=tuple(sites.get(number, ()))) for number, loop in enumerate(loops))
        )
        state.tags = {node.name: tag for node in graph.nodes if (tag := get_tag(node))}
        state.note(state.loops.describe() if loops else "no loop found: this is ordinary post-training quantization")
        return PassResult(graph_module, bool(loops))


@dataclass
class _Reach:
    """For each node the last iteration it depends on (-1: none) and the first that depends on it (inf: none)."""

    low: dict[fx.Node, int]
    high: dict[fx.Node, float]


def _reach(region: list[fx.Node], use_of: dict[fx.Node, int]) -> _Reach:
    inside = set(region)
    low: dict[fx.Node, int] = {}
    high: dict[fx.Node, float] = {}
    for node in region:
        low[node] = max([low[a] for a in node.all_input_nodes if a in inside] + [use_of.get(node, -1)])
    for node in reversed(region):
        high[node] = min([high[u] for u in node.users if u in inside] + [use_of.get(node, math.inf)])
    return _Reach(low, high)


def _tag_group(graph: fx.Graph, region: list[fx.Node], group: Group, parent: LoopTag) -> Loop:
    """Tags the nodes of `region` that belong to `group` and describes it; `parent` ends with the group's own number."""
    nodes = list(graph.nodes)
    use_of = {
        nodes[position]: iteration
        for repeat in group.repeats
        if repeat.token[0] == "weight"
        for iteration, part in enumerate(group.parts(repeat))
        for position in part
    }
    computed = [node for node in region if node.op not in ("placeholder", "get_attr", "output")]
    reach = _reach(computed, use_of)
    iteration_of = _assign(computed, reach, use_of, group.count, weight_roots(graph))
    members: list[list[fx.Node]] = [[] for _ in range(group.count)]
    for node, iteration in iteration_of.items():
        set_tag(node, LoopTag(parent.loops, (*parent.index, iteration)))
        members[iteration].append(node)
    boundaries = tuple(_boundary(members, k, reach) for k in range(group.count - 1))
    children: list[Loop] = []
    for iteration in range(group.count):
        nested = group_repeats(group.nested(iteration))
        found = [
            _tag_group(graph, members[iteration], inner, LoopTag((*parent.loops, number), (*parent.index, iteration)))
            for number, inner in enumerate(nested)
        ]
        children = children or found
    inner_weights = {weight for child in children for loop in LoopStructure((child,)).walk() for weight in loop.weights}
    own = [weight for weight in group.weights if weight not in inner_weights]
    calls = [r.token[1] for r in group.repeats if r.token[0] == "call" and len(r.uses) == group.count]
    return Loop(
        count=group.count,
        blocks=_blocks(graph, set(own)) or tuple(calls[:1]),
        weights=tuple(own),
        boundaries=boundaries,
        children=tuple(children),
    )


def _assign(
    region: list[fx.Node],
    reach: _Reach,
    use_of: dict[fx.Node, int],
    count: int,
    roots: dict[fx.Node, frozenset[str]],
) -> dict[fx.Node, int]:
    """Iteration of every node that belongs to the loop."""
    votes: dict[tuple[str, int], set[int]] = defaultdict(set)
    foreign_calls: set[tuple[str, int]] = set()
    for node in region:
        if node in use_of:
            for call in module_calls(node):
                votes[call].add(use_of[node])
        elif matrix_weight(node, roots):
            foreign_calls.update(module_calls(node))
    assigned: dict[fx.Node, int] = {}
    unsure: list[fx.Node] = []
    for node in region:
        low, high = reach.low[node], reach.high[node]
        if low < 0 and high == math.inf:
            continue
        if low == high or (low < 0 and high > 0):
            assigned[node] = int(high)
        elif (vote := _vote(node, votes)) is not None and low <= vote <= high:
            assigned[node] = vote
        else:
            unsure.append(node)
    foreign = {
        node
        for node in unsure
        if matrix_weight(node, roots) or any(call in foreign_calls and call not in votes for call in module_calls(node))
    }
    _assign_by_source(unsure, foreign, reach, assigned, count)
    return {node: assigned[node] for node in region if node in assigned}


def _vote(node: fx.Node, votes: dict[tuple[str, int], set[int]]) -> int | None:
    """The iteration of the innermost module call around `node` that has matrix products of the loop."""
    for call in reversed(module_calls(node)):
        if call in votes:
            return next(iter(votes[call])) if len(votes[call]) == 1 else None
    return None


def _source(node: fx.Node) -> tuple[object, str, str]:
    calls = module_calls(node)
    return node.target, node.meta.get("stack_trace") or "", calls[-1][0] if calls else ""


def _assign_by_source(
    unsure: list[fx.Node], foreign: set[fx.Node], reach: _Reach, assigned: dict[fx.Node, int], count: int
) -> None:
    """Sorts nodes between two iterations, before the first and behind the last by where their source line also runs."""
    before: set[object] = set()
    between: set[object] = set()
    for node in unsure:
        (before if reach.low[node] < 0 else between if reach.low[node] < count - 1 else set()).add(_source(node))
    starts = before & between
    in_loop = {_source(node) for node in assigned}
    left: set[fx.Node] = set(foreign)
    for node in unsure:
        low, high, source = reach.low[node], reach.high[node], _source(node)
        floor = max((assigned[a] for a in node.all_input_nodes if a in assigned), default=-1)
        if low >= 0 and high < math.inf and source in starts:
            assigned[node] = max(int(high), floor)
        elif low < 0:
            if source in starts or (source in in_loop and node.meta.get("stack_trace")):
                assigned[node] = 0
        elif node in left or any(a in left for a in node.all_input_nodes):
            left.add(node)
        elif low < count - 1:
            assigned[node] = max(low, floor)
        elif source in between - starts:
            assigned[node] = count - 1


def _boundary(members: list[list[fx.Node]], k: int, reach: _Reach) -> Boundary:
    """What crosses from iteration `k` to `k + 1`, directly or through nodes between the two."""
    edges = nx.DiGraph()
    edges.add_edges_from((a, node) for node in reach.low for a in node.all_input_nodes if a in reach.low)
    source, target = set(members[k]), set(members[k + 1])
    beyond = {node for node in edges if node not in source and reach.low[node] >= k and reach.high[node] <= k + 1}
    leaving = {a for a, _ in nx.edge_boundary(edges, source & set(edges), beyond) if _is_state(a)}
    behind = {node for node in edges if node not in target and reach.low[node] == k} | source
    arriving = {b for a, b in nx.edge_boundary(edges, behind & set(edges), target) if _is_state(a)}
    return Boundary(
        k,
        k + 1,
        tuple(node.name for node in members[k] if node in leaving),
        tuple(node.name for node in members[k + 1] if node in arriving),
    )


def _is_state(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or (isinstance(value, Tensor) and value.is_floating_point())


def _blocks(graph: fx.Graph, weights: set[str]) -> tuple[str, ...]:
    """Names of the modules that the loop alone uses: those of its repeated weights, and of norms and gates between."""
    roots = weight_roots(graph)
    iterations: dict[str, set[LoopTag | None]] = defaultdict(set)
    for node in graph.nodes:
        if node not in roots and node.op != "output":
            for name in {name for argument in node.all_input_nodes for name in roots.get(argument, ())}:
                iterations[name].add(get_tag(node))
    parts = {part for weight in weights for part in weight.split("+")}
    loops = {tag.loops for part in parts for tag in iterations[part] if tag}
    members = [
        name
        for name, tags in iterations.items()
        if name in parts or (len(tags) > 1 and all(tag and tag.loops in loops for tag in tags))
    ]
    return common_blocks(members, [name for name in iterations if name not in members])


def _call_sites(graph: fx.Graph) -> dict[int, list[CallSite]]:
    """Uses of every weight inside loops, by number of the top-level loop."""
    roots = weight_roots(graph)
    calls: dict[tuple[int, str], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        tag = get_tag(node)
        if tag is None or node in roots:
            continue
        for argument in node.all_input_nodes:
            for weight in sorted(roots.get(argument, ())):
                calls[tag.loops[0], weight].append(node)
    sites: dict[int, list[CallSite]] = defaultdict(list)
    for (loop, weight), users in calls.items():
        made = tuple(Call(tag.label, user.name) for user in users if (tag := get_tag(user)))
        sites[loop].append(CallSite(weight, str(users[0].target), made))
    return sites
