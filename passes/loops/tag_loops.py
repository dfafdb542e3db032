"""`tag-loops`: gives every node its loop index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile

from torch import Tensor, fx, nn

from loopq_compile.graph.iterations import Region, assign_iterations
from loopq_compile.graph.loops import Boundary, Call, CallSite, Loop, LoopStructure, LoopTag, get_tag, set_tag
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.recurrence import Group, common_blocks, find_repeats, group_repeats, weight_roots
from loopq_compile.graph.state import get_tensor
from loopq_compile.passes.base import Pass, PassResult


class TagLoops(Pass):
    """Finds the loops of an unrolled graph and tags the nodes inside.

    Before: a captured graph. After: the same graph; `state.loops` holds its `LoopStructure`, and each node that
    computes something inside a loop has a `LoopTag`. Weights, inputs, prelude and coda have none.

    A node belongs to iteration `t` if it lies, in program order, between matrix products of iteration `t`, or in a
    module call that holds only such products. `loopq_compile.graph.iterations` assigns the rest, which lies between two
    iterations. Layers with weights of their own between two calls of a shared block (Zamba) stay outside.

    Does nothing to a graph without repeated weights, and to one that is already tagged.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        if state.tags is not None:
            return PassResult(graph_module, False)
        graph = graph_module.graph
        nodes = list(graph.nodes)
        roots = weight_roots(graph)
        region = Region([node for node in nodes if node.op not in ("placeholder", "get_attr", "output")], roots)
        groups = group_repeats(find_repeats(graph))
        found = [_find_loop(region, group, LoopTag((i,), ()), nodes) for i, group in enumerate(groups)]
        owners = _owners(graph_module, roots)
        loops = [_name_blocks(loop, (i,), owners) for i, loop in enumerate(found)]
        sites = _call_sites(graph, roots)
        state.loops = LoopStructure(
            tuple(replace(_shown(loop), call_sites=tuple(sites.get(number, ()))) for number, loop in enumerate(loops))
        )
        state.tags = {node.name: tag for node in graph.nodes if (tag := get_tag(node))}
        state.note(state.loops.describe() if loops else "no loop found: this is ordinary post-training quantization")
        return PassResult(graph_module, bool(loops))


def _shown(loop: Loop) -> Loop:
    """The loop with the model's names for its parts."""
    blocks, weights = (tuple(map(shown_name, names)) for names in (loop.blocks, loop.weights))
    return replace(loop, blocks=blocks, weights=weights, children=tuple(map(_shown, loop.children)))


def _find_loop(region: Region, group: Group, parent: LoopTag, nodes: Sequence[fx.Node]) -> Loop:
    """Tags the nodes of `region` that belong to `group` and describes it; `parent` ends with the group's own number."""
    use_of = {
        nodes[position]: iteration
        for repeat in group.repeats
        if repeat.token[0] == "weight"
        for iteration, part in enumerate(group.parts(repeat))
        for position in part
    }
    iteration_of = assign_iterations(region, use_of, group.count)
    members: list[list[fx.Node]] = [[] for _ in range(group.count)]
    for node, iteration in iteration_of.items():
        set_tag(node, LoopTag(parent.loops, (*parent.index, iteration)))
        members[iteration].append(node)
    children: list[Loop] = []
    for iteration in range(group.count):
        inside = Region(members[iteration], region.roots)
        nested = group_repeats(group.nested(iteration))
        found = [
            _find_loop(inside, inner, LoopTag((*parent.loops, number), (*parent.index, iteration)), nodes)
            for number, inner in enumerate(sorted(nested, key=lambda inner: inner.windows[0]))
        ]
        children = children or found
    theirs = {weight for loop in LoopStructure(tuple(children)).walk() for weight in loop.weights}
    calls = [r.token[1] for r in group.repeats if r.token[0] == "call" and len(r.uses) == group.count]
    return Loop(
        count=group.count,
        blocks=tuple(calls[:1]),
        weights=tuple(weight for weight in group.weights if weight not in theirs),
        boundaries=_boundaries(region, iteration_of, members),
        children=tuple(children),
    )


def _boundaries(
    region: Region, iteration_of: Mapping[fx.Node, int], members: Sequence[Sequence[fx.Node]]
) -> tuple[Boundary, ...]:
    """Finds what crosses from each iteration to the next, directly or through layers between the two."""
    order = {node: position for position, node in enumerate(region.nodes)}
    boundaries = []
    for k, (source, target) in enumerate(pairwise(members)):
        state, consumers = [], set()
        for node in source:
            readers = _readers(node, k + 1, iteration_of, order, order[target[-1]]) if _is_state(node) else set()
            if readers:
                state.append(node.name)
                consumers |= readers
        boundaries.append(Boundary(k, k + 1, tuple(state), tuple(n.name for n in target if n in consumers)))
    return tuple(boundaries)


def _readers(
    node: fx.Node, iteration: int, iteration_of: Mapping[fx.Node, int], order: Mapping[fx.Node, int], last: int
) -> set[fx.Node]:
    """Nodes of `iteration` that read `node`, or what nodes outside the loop compute from it before position `last`."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in seen or order.get(user, last + 1) > last:
            continue
        seen.add(user)
        if user not in iteration_of:
            stack.extend(user.users)
        elif iteration_of[user] == iteration:
            found.add(user)
    return found


def _is_state(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or (isinstance(value, Tensor) and value.is_floating_point())


def _name_blocks(
    loop: Loop, path: tuple[int, ...], owners: Mapping[str, tuple[int, ...]], taken: tuple[str, ...] = ()
) -> Loop:
    """Fills in the modules that only the loop at `path` has: repeated weights, and norms and gates between them.

    Names of the enclosing loops are `taken`.
    """
    parts = {part for weight in loop.weights for part in weight.split("+")}
    members = [name for name, owner in owners.items() if name in parts or owner == path]
    others = [name for name in owners if name not in members]
    blocks = common_blocks(members, [*others, *taken]) or loop.blocks
    children = tuple(
        _name_blocks(child, (*path, i), owners, (*taken, *blocks)) for i, child in enumerate(loop.children)
    )
    return replace(loop, blocks=blocks, children=children)


def _owners(graph_module: fx.GraphModule, roots: Mapping[fx.Node, frozenset[str]]) -> dict[str, tuple[int, ...]]:
    """For each parameter, in order of use, the innermost loop that holds all its uses; () if none repeats it."""
    order = {node.target: i for i, node in enumerate(graph_module.graph.nodes) if node.op == "get_attr"}
    tags: dict[str, list[LoopTag | None]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node not in roots and node.op != "output":
            for argument in node.all_input_nodes:
                for name in sorted(roots.get(argument, ()), key=order.__getitem__):
                    if isinstance(get_tensor(graph_module, name), nn.Parameter):
                        tags[name].append(get_tag(node))
    owners: dict[str, tuple[int, ...]] = {}
    for name, found in tags.items():
        levels = zip(*(tag.loops if tag else () for tag in found), strict=False)
        owner = tuple(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
        iterations = {tag.index[: len(owner)] for tag in found if tag}
        owners[name] = owner if len(iterations) > 1 else ()
    return owners


def _call_sites(graph: fx.Graph, roots: Mapping[fx.Node, frozenset[str]]) -> dict[int, list[CallSite]]:
    """Uses of every weight inside loops, by number of the top-level loop."""
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
        sites[loop].append(CallSite(shown_name(weight), str(users[0].target), made))
    return sites
