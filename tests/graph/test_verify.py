"""The verifier finds every way of losing a loop tag, and the pipeline names the pass that did it."""

import copy

import pytest
import torch
from torch import fx

from loopq_compile.errors import InternalError
from loopq_compile.graph.loops import LoopTag, get_tag, set_tag
from loopq_compile.graph.verify import verify_tags
from loopq_compile.passes import Pass, PassResult
from loopq_compile.pipeline import Pipeline
from tests.zoo import tagged


def graph_of(name: str = "gated-stack") -> fx.GraphModule:
    return copy.deepcopy(tagged(name).graph_module)


def find(graph_module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in graph_module.graph.nodes if node.name == name)


def tagged_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if get_tag(node)]


def forget(graph_module: fx.GraphModule) -> None:
    """Drops the record of tags, so that only the graph itself can show that one is missing."""
    state = copy.copy(graph_module.meta["loopq"])
    state.tags = {}
    graph_module.meta["loopq"] = state


@pytest.mark.parametrize("name", ["gated-stack", "nested-middle"])
def test_every_single_lost_tag_is_found(name):
    graph_module = graph_of(name)
    for node in tagged_nodes(graph_module):
        tag = get_tag(node)
        set_tag(node, None)
        with pytest.raises(InternalError, match=f"{node.name!r} had the tag {tag} and now has none"):
            verify_tags(graph_module)
        set_tag(node, tag)
    verify_tags(graph_module)


def test_a_boundary_node_that_lost_its_tag_is_found():
    graph_module = graph_of()
    (state,) = graph_module.meta["loopq"].loops.boundaries[0].state
    set_tag(find(graph_module, state), None)
    with pytest.raises(InternalError, match=state):
        verify_tags(graph_module)


def test_a_tag_moved_to_another_loop_is_found():
    graph_module = graph_of()
    node = next(node for node in tagged_nodes(graph_module) if get_tag(node).index == (1,))
    set_tag(node, LoopTag((0,), (2,)))
    with pytest.raises(InternalError, match=rf"{node.name}' had the tag loop=1 and now has loop=2"):
        verify_tags(graph_module)


@pytest.mark.parametrize("wrong", [0, 2])
def test_an_iteration_that_reads_a_later_one_is_found_without_the_record(wrong):
    graph_module = graph_of()
    forget(graph_module)
    middle = [node for node in tagged_nodes(graph_module) if get_tag(node).index == (1,)]
    set_tag(middle[len(middle) // 2], LoopTag((0,), (wrong,)))
    with pytest.raises(InternalError, match="against the order of iterations"):
        verify_tags(graph_module)


def test_a_tag_of_an_iteration_that_does_not_exist_is_found():
    graph_module = graph_of()
    forget(graph_module)
    last = [node for node in tagged_nodes(graph_module) if get_tag(node).index == (2,)]
    for node in last:
        set_tag(node, LoopTag((0,), (7,)))
    with pytest.raises(InternalError, match=r"loop=7, which is not an iteration of 3 x"):
        verify_tags(graph_module)


@pytest.mark.parametrize("name", ["gated-stack", "nested-middle", "zamba", "two-loops"])
def test_an_untagged_node_inside_a_loop_is_found(name):
    graph_module = graph_of(name)
    target = next(node for node in tagged_nodes(graph_module) if node.target is torch.ops.aten.silu.default)
    with graph_module.graph.inserting_after(target):
        new = graph_module.graph.call_function(torch.ops.aten.neg.default, (target,))
    target.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    with pytest.raises(InternalError, match=rf"{new.name}'.*lies inside loop=0.* but has no loop tag"):
        verify_tags(graph_module)


def test_a_new_node_with_the_tag_of_its_neighbour_is_accepted():
    graph_module = graph_of()
    target = next(node for node in tagged_nodes(graph_module) if node.target is torch.ops.aten.silu.default)
    with graph_module.graph.inserting_after(target):
        new = graph_module.graph.call_function(torch.ops.aten.neg.default, (target,))
    set_tag(new, get_tag(target))
    target.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    verify_tags(graph_module)


def test_nodes_outside_of_loops_need_no_tag():
    graph_module = graph_of("zamba")
    product = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.linear.default and not get_tag(n))
    with graph_module.graph.inserting_after(product):
        new = graph_module.graph.call_function(torch.ops.aten.neg.default, (product,))
    product.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    verify_tags(graph_module)


class DoNothing(Pass):
    """Before and after: the same."""

    def call(self, graph_module):
        return PassResult(graph_module, False)


class LoseTags(Pass):
    """Before: tagged. After: the first tagged node has lost its tag."""

    def call(self, graph_module):
        set_tag(tagged_nodes(graph_module)[0], None)
        return PassResult(graph_module, True)


class NegateTwice(Pass):
    """Puts two untagged nodes after the first SiLU."""

    def call(self, graph_module):
        silu = next(node for node in graph_module.graph.nodes if node.target is torch.ops.aten.silu.default)
        with graph_module.graph.inserting_after(silu):
            first = graph_module.graph.call_function(torch.ops.aten.neg.default, (silu,))
        with graph_module.graph.inserting_after(first):
            second = graph_module.graph.call_function(torch.ops.aten.neg.default, (first,))
        silu.replace_all_uses_with(second, delete_user_cb=lambda user: user is not first)
        return PassResult(graph_module, True)


@pytest.mark.parametrize(("bad", "name"), [(LoseTags(), "lose-tags"), (NegateTwice(), "negate-twice")])
def test_the_pipeline_names_the_pass_that_lost_a_tag_and_those_before(bad, name):
    pipeline = Pipeline([DoNothing(), bad, DoNothing()])
    with pytest.raises(InternalError, match=rf"Pass '{name}' failed \(passes before it: do-nothing\): Node"):
        pipeline.run(graph_of())


def test_a_pass_that_returns_nothing_is_named():
    class Forgetful(Pass):
        """Returns None."""

        def call(self, graph_module):
            pass

    with pytest.raises(InternalError, match=r"'forgetful' failed \(passes before it: none\).*must return PassResult"):
        Pipeline([Forgetful()]).run(graph_of())
