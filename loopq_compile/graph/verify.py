"""The verifier of loop tags, run after every pass of a pipeline."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from loopq_compile.errors import InternalError
from loopq_compile.graph.loops import Loop, LoopTag, get_tag
from loopq_compile.graph.state import get_state

_Place = tuple[tuple[int, ...], tuple[int, ...]]
"""A loop and the iteration of its parent; within one place, a single number counts the iterations."""


def verify_tags(graph_module: fx.GraphModule) -> None:
    """Proves that loop tags are intact: no node inside an iteration lost its tag, and no iteration reads a later one.

    Does nothing before `tag-loops` ran.

    Raises:
        InternalError: names the first node whose tag is missing or wrong.
    """
    state = get_state(graph_module)
    if state.tags is None:
        return
    for node in graph_module.graph.nodes:
        tag = get_tag(node)
        expected = state.tags.get(node.name)
        if expected is not None and tag != expected:
            raise InternalError(f"Node {node.name!r} had the tag {expected} and now has {tag or 'none'}.")
        if tag is not None and not _exists(tag, state.loops.loops):
            raise InternalError(
                f"Node {node.name!r} has the tag {tag}, which is not an iteration of {state.loops.describe()}."
            )
    for place, members in _places(graph_module.graph).items():
        _verify_place(place, members)


def _exists(tag: LoopTag, loops: tuple[Loop, ...]) -> bool:
    """Whether the iteration of `tag` exists."""
    if len(tag.loops) != len(tag.index) or not tag.index:
        return False
    for number, position in zip(tag.loops, tag.index, strict=True):
        if not 0 <= number < len(loops) or not 0 <= position < loops[number].count:
            return False
        loops = loops[number].children
    return True


def _places(graph: fx.Graph) -> dict[_Place, dict[fx.Node, int | None]]:
    """Iteration numbers by place; nodes of the place outside its iterations have None."""
    tags = {node: get_tag(node) for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")}
    keys: dict[_Place, None] = {}
    for found in filter(None, tags.values()):
        for depth in range(len(found.index)):
            keys[found.loops[: depth + 1], found.index[:depth]] = None
    by_parent: dict[_Place, list[tuple[fx.Node, LoopTag | None]]] = defaultdict(list)
    for node, tag in tags.items():
        for depth in range(len(tag.index) + 1 if tag else 1):
            by_parent[tag.loops[:depth] if tag else (), tag.index[:depth] if tag else ()].append((node, tag))
    places: dict[_Place, dict[fx.Node, int | None]] = {}
    for loops, parent in keys:
        depth = len(parent)
        places[loops, parent] = {
            node: tag.index[depth] if tag and tag.loops[: depth + 1] == loops and len(tag.index) > depth else None
            for node, tag in by_parent[loops[:depth], parent]
        }
    return places


def _verify_place(place: _Place, members: dict[fx.Node, int | None]) -> None:
    low: dict[fx.Node, int | None] = {}
    high: dict[fx.Node, int | None] = {}
    for node, iteration in members.items():
        inputs = [low[a] for a in node.all_input_nodes if low.get(a) is not None]
        low[node] = max([value for value in [*inputs, iteration] if value is not None], default=None)
    for node, iteration in reversed(members.items()):
        users = [high[u] for u in node.users if high.get(u) is not None]
        high[node] = min([value for value in [*users, iteration] if value is not None], default=None)
    prefix = "".join(f"{position}." for position in place[1])
    for node, iteration in members.items():
        first, last = low[node], high[node]
        if iteration is None and first is not None and first == last:
            raise InternalError(
                f"Node {node.name!r} ({node.target}) lies inside loop={prefix}{first} but has no loop tag."
            )
        if first is not None and last is not None and first > last:
            raise InternalError(
                f"Node {node.name!r} ({node.target}) is tagged against the order of iterations: it depends on "
                f"iteration {first} and iteration {last} depends on it."
            )
