"""Cuts a program into blocks, each about one call of a Transformer layer, for calibration block by block.

Names are not used. Between one quantized linear and the next there is a place where the fewest tensors cross. If no
more cross there than at both neighbours, only the residual stream crosses: the place is after a residual addition.
Stretches between such places are joined until a block has one that mixes tokens and the rest of its layer (two
stretches if none mixes). Iterations of loops are never joined.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from loopq_compile.calibration.student import Segment, fuse_pairs, make_segment
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.recurrence import weight_roots
from loopq_compile.graph.state import copy_nodes

_MIXERS = ("scaled_dot_product", "softmax", "bmm", "matmul", "conv", "cumsum")
"""Parts of the names of operators that mix information across tokens."""


@dataclass
class Call:
    """One run of a block.

    Args:
        segment: maps constants and values of the teacher to `outputs`, all by node name.
        inputs: names of the teacher's values that it reads.
        outputs: names of the values that it should reproduce.
    """

    segment: Segment
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class Block:
    """Calls that share weights: the runs of one layer in all loops.

    Args:
        sites: names of its quantized linears.
        calls: its runs in program order.
        prepare: computes constants (inverse transforms, quantized weights) once for all runs.
        attributes: names of the stored tensors that it reads, by node name.
    """

    sites: tuple[str, ...]
    calls: list[Call]
    prepare: Segment
    attributes: dict[str, str]


@dataclass
class _Stretch:
    """Nodes `start` to `end` of a graph's body, and the quantized linears among them."""

    start: int
    end: int
    linears: list[fx.Node]

    @property
    def sites(self) -> list[str]:
        return [linear.meta[SITE] for linear in self.linears]


def find_blocks(graph_module: fx.GraphModule, teacher: fx.GraphModule, sites: Iterable[str]) -> list[Block]:
    """The blocks of a program in the order of their first runs; empty if nothing is quantized.

    Args:
        graph_module: the program.
        teacher: the captured graph. Blocks begin and end at nodes that both have.
        sites: names of the quantized linears.
    """
    graph = copy_nodes(graph_module.graph)
    fuse_pairs(graph)
    known = {(node.name, str(node.target)) for node in teacher.graph.nodes}
    shared = {node for node in graph.nodes if (node.name, str(node.target)) in known}
    constant = set(weight_roots(graph))
    body = [node for node in graph.nodes if node not in constant and node.op == "call_function"]
    wanted = set(sites)
    linear = torch.ops.aten.linear.default
    linears = [node for node in body if node.target is linear and node.meta.get(SITE) in wanted]
    if not linears:
        return []
    stretches = _join(body, _stretches(body, shared, linears))
    calls = [_call(body, stretch, shared, constant, linears) for stretch in stretches]
    blocks = []
    for members in _by_weight([stretch.sites for stretch in stretches]):
        names = dict.fromkeys(site for i in members for site in stretches[i].sites)
        blocks.append(_block(graph, tuple(names), [calls[i] for i in members], constant))
    return blocks


def _stretches(body: Sequence[fx.Node], shared: set[fx.Node], linears: Sequence[fx.Node]) -> list[_Stretch]:
    """Cuts the body wherever only the residual stream crosses, and between iterations of loops."""
    position = {node: i for i, node in enumerate(body)}
    uses: list[list[fx.Node]] = []
    for linear in linears:
        if uses and uses[-1][0].args[0] is linear.args[0]:
            uses[-1].append(linear)
        else:
            uses.append([linear])
    # The last three produce the residual stream and its last branch.
    end = _end(body, [linear for use in uses[-3:] for linear in use], shared)
    last = [node for node in body[:end] if any(position.get(user, end) >= end for user in node.users)][-1:]
    ahead = _leading_to(body, {*linears, *last})
    # Tables and masks cross from the first layer to the last: they do not show where a layer ends.
    state = _depending_on(body, linears)
    first = position[uses[2][0]] if len(uses) > 2 else len(body)
    ahead = {node for node in ahead if node in state or all(position[user] < first for user in node.users)}
    readers = ahead | set(linears)
    crossing, foreign = _live(body, ahead, readers), _live(body, ahead - shared, readers)
    places: list[int | None] = []
    for before, after in itertools.pairwise(uses):
        allowed = [i for i in range(position[before[-1]] + 1, position[after[0]] + 1) if not foreign[i]]
        places.append(min(allowed, key=lambda i: (crossing[i], -i), default=None))
    width = [float("inf") if place is None else crossing[place] for place in places]
    around = [float("inf"), *width, float("inf")]
    found = [_Stretch(0, len(body), list(uses[0]))]
    for number, (place, after) in enumerate(zip(places, uses[1:], strict=True)):
        narrow = width[number] <= min(around[number], around[number + 2])
        if place is not None and (narrow or get_tag(after[0]) != get_tag(found[-1].linears[-1])):
            found[-1].end = place
            found.append(_Stretch(place, len(body), []))
        found[-1].linears += after
    found[-1].end = end
    return found


def _join(body: Sequence[fx.Node], stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """Stretches joined into blocks of about one layer."""
    found: list[_Stretch] = []
    parts, mixed = 0, False
    for stretch in stretches:
        mixes = any(part in str(node.target) for node in body[stretch.start : stretch.end] for part in _MIXERS)
        other = bool(found) and get_tag(found[-1].linears[-1]) != get_tag(stretch.linears[0])
        full = mixes if mixed else parts >= 2 and not mixes
        if not found or other or full:
            found.append(_Stretch(stretch.start, stretch.end, list(stretch.linears)))
            parts, mixed = 1, mixes
        else:
            found[-1].end = stretch.end
            found[-1].linears += stretch.linears
            parts, mixed = parts + 1, mixed or mixes
    return found


def _leading_to(body: Sequence[fx.Node], ends: set[fx.Node]) -> set[fx.Node]:
    found = set(ends)
    for node in reversed(body):
        if any(user in found for user in node.users):
            found.add(node)
    return found


def _live(body: Sequence[fx.Node], nodes: set[fx.Node], readers: set[fx.Node]) -> list[int]:
    """At each place of `body`, how many of `nodes` are computed before it and read by `readers` after it."""
    position = {node: i for i, node in enumerate(body)}
    change = [0] * (len(body) + 2)
    for node in nodes:
        last = max((position[user] for user in node.users if user in readers), default=position[node])
        change[position[node] + 1] += 1
        change[last + 1] -= 1
    for i in range(1, len(change)):
        change[i] += change[i - 1]
    return change


def _depending_on(body: Sequence[fx.Node], sources: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in body:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _end(body: Sequence[fx.Node], linears: Sequence[fx.Node], shared: set[fx.Node]) -> int:
    """Where the last block ends: the first place after its `linears` that the fewest of their results cross."""
    own = _depending_on(body, linears)
    crossing, foreign = (_live(body, nodes, set(body)) for nodes in (own, own - shared))
    behind = range(body.index(linears[-1]) + 1, len(body) + 1)
    places = [i for i in behind if not foreign[i] and crossing[i]]
    return min(places, key=lambda i: (crossing[i], i), default=len(body))


def _call(
    body: Sequence[fx.Node],
    stretch: _Stretch,
    shared: set[fx.Node],
    constant: set[fx.Node],
    linears: Sequence[fx.Node],
) -> Call:
    """Extracts the nodes between the values that enter a stretch and the floating-point values that leave it."""
    position = {node: i for i, node in enumerate(body)}
    own = _depending_on(body[stretch.start : stretch.end], stretch.linears)
    behind = set(body[stretch.end :])
    later = _leading_to(body, behind.intersection(linears))
    leaving = [node for node in body[: stretch.end] if node in own and node in shared]
    outputs = [node for node in leaving if any(user in behind and user in later for user in node.users)]
    outputs = outputs or [node for node in leaving if any(user not in own for user in node.users)][-1:]
    nodes: set[fx.Node] = set()
    inputs: dict[fx.Node, None] = {}
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in nodes or node in constant:
            continue
        if node.op == "placeholder" or (position[node] < stretch.start and node in shared):
            inputs[node] = None
            continue
        nodes.add(node)
        stack.extend(node.all_input_nodes)
    segment = make_segment([node for node in body if node in nodes], [], {node.name for node in outputs})
    return Call(segment, tuple(node.name for node in inputs), segment.outputs)


def _block(graph: fx.Graph, sites: tuple[str, ...], calls: list[Call], constant: set[fx.Node]) -> Block:
    by_name = {node.name: node for node in graph.nodes}
    read = {by_name[name] for call in calls for name in call.segment.inputs} & constant
    needed: set[fx.Node] = set()
    stack = list(read)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    computed = [node for node in graph.nodes if node in needed and node.op != "get_attr"]
    prepare = make_segment(computed, [], {node.name for node in read})
    return Block(
        sites, calls, prepare, {n.name: str(n.target) for n in graph.nodes if n in needed and n.op == "get_attr"}
    )


def _by_weight(sites: Sequence[Sequence[str]]) -> list[list[int]]:
    """Numbers of the calls that share weights, directly or through others, in order of the first."""
    classes: list[tuple[set[str], list[int]]] = []
    for number, names in enumerate(sites):
        merged, members = set(names), [number]
        for known in [item for item in classes if item[0] & merged]:
            classes.remove(known)
            merged, members = merged | known[0], known[1] + members
        classes.append((merged, sorted(members)))
    return sorted((members for _, members in classes), key=lambda members: members[0])
