"""Where the trajectory is observed: the tensors that every loop passes to the next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from loopq_compile.graph.loops import LoopTag, get_tag
from loopq_compile.graph.state import get_state
from loopq_compile.operators import ops


def loop_ends(graph_module: fx.GraphModule) -> list[str]:
    """Names of the nodes that hold the state at the end of each iteration of the main loop, `u_1 .. u_T`.

    The last iteration passes its state to no other; the node that corresponds to the state of the iteration before is
    taken. Empty without loops, or if the last iteration has no such node.
    """
    state = get_state(graph_module)
    by_name = {node.name: node for node in graph_module.graph.nodes}
    ends = [edge.state[0] for edge in state.loops.boundaries if edge.state and edge.state[0] in by_name]
    if not ends or len(ends) != state.loops.count - 1:
        return []
    model = by_name[ends[-1]]
    before, after = (_alike(graph_module, model, state.loops.count - back) for back in (2, 1))
    if model not in before or len(before) != len(after):
        return []
    return [*ends, after[before.index(model)].name]


def _alike(graph_module: fx.GraphModule, model: fx.Node, iteration: int) -> list[fx.Node]:
    """Nodes of an iteration of the main loop with the operator of `model`, in order."""
    tag = get_tag(model)
    assert tag is not None
    wanted = LoopTag(tag.loops, (iteration, *tag.index[1:]))
    return [node for node in graph_module.graph.nodes if node.target == model.target and get_tag(node) == wanted]


def adapter_names(graph_module: fx.GraphModule, ends: Sequence[str]) -> list[str]:
    """Names of the transition adapters after `ends`, in order; empty unless every transition has one."""
    found = {
        node.args[0].name: node.name
        for node in graph_module.graph.nodes
        if node.target is ops.transition_adapter.default and isinstance(node.args[0], fx.Node)
    }
    names = [found[end] for end in ends[:-1] if end in found]
    return names if ends and len(names) == len(ends) - 1 else []
