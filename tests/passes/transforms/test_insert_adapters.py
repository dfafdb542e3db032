"""`insert-adapters`: what is rewired, what is not, and that an adapter can learn."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.calibration.states import adapter_names, loop_ends
from loopq_compile.calibration.student import Student
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.state import copy_graph, get_state, get_tensor
from loopq_compile.operators import ops
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.transforms.insert_adapters import PARTS, InsertAdapters
from loopq_compile.pipeline import Pipeline
from tests import zoo
from tests.calibration.tools import captured
from tests.tiny import tokens


def adapted(source=None, *passes):
    graph_module = copy_graph(source or captured(3))
    get_state(graph_module).scheme = lq.Scheme.parse("w4a4")
    return Pipeline([TagLoops(), AnnotateLinears(), InsertAdapters(), *passes]).run(graph_module)


def adapters(graph_module):
    return [node for node in graph_module.graph.nodes if node.target is ops.transition_adapter.default]


def test_insertion_changes_no_result():
    before, after = captured(3), adapted()
    with torch.no_grad():
        for first, second in zip(before(tokens(5)), after(tokens(5)), strict=True):
            assert first.equal(second)


def test_each_transition_reads_its_row_and_shares_the_low_rank_part():
    graph_module = adapted()
    found = adapters(graph_module)
    assert len(found) == 2, "three loops, two transitions"
    for row, node in enumerate(found):
        assert [argument.args[1:] for argument in node.args[1:5]] == [(0, row)] * 4
        assert get_tag(node).index == (row + 1,), "it belongs to the loop that reads it"
    assert found[0].args[5:] == found[1].args[5:]
    shapes = {part: tuple(get_tensor(graph_module, f"adapter.0.{part}").shape) for part in (*PARTS, "down", "up")}
    assert shapes == {"gate": (2, 1), "gain": (2, 64), "shift": (2, 64), "mix": (2, 8), "down": (64, 8), "up": (64, 8)}


def test_only_the_edge_into_the_next_loop_is_rewired():
    """The norm's output goes to the next loop, the exit gate and, after the last loop, the head."""
    graph_module = adapted()
    for node in adapters(graph_module):
        state = node.args[0]
        others = [user for user in state.users if user is not node]
        assert others and all(user.meta["loopq_site"] == "exit_gate" for user in others)
        assert all(get_tag(user).index == get_tag(node).index for user in node.users)
    head = next(node for node in graph_module.graph.nodes if node.meta.get("loopq_site") == "head")
    assert head.args[0].target is not ops.transition_adapter.default


def test_collected_states_are_read_unadapted():
    source = zoo.tagged("heads-behind").graph_module
    graph_module = adapted(source)
    found = adapters(graph_module)
    assert len(found) == 2
    for node in found:
        readers = [user for user in node.args[0].users if user is not node]
        assert readers, "the head after the loop reads the state itself"
        assert all(get_tag(user) != get_tag(node) for user in readers)


def test_the_ends_of_loops_are_the_unadapted_states():
    graph_module = adapted()
    ends = loop_ends(graph_module)
    assert ends[:-1] == [node.args[0].name for node in adapters(graph_module)] and len(ends) == 3
    assert adapter_names(graph_module, ends) == [node.name for node in adapters(graph_module)]
    assert adapter_names(captured(3), []) == []


def test_an_adapter_that_changes_nothing_can_learn():
    graph_module = adapted()
    student = Student(graph_module)
    names = [f"adapter.0.{part}" for part in (*PARTS, "down", "up")]
    leaves = {name: get_tensor(graph_module, name).clone().requires_grad_() for name in names}

    def gradients():
        student.run([tokens(5)], leaves)[0][0].square().mean().backward()
        found = {name.rpartition(".")[2]: leaf.grad.abs().max() for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
        return found

    first = gradients()
    assert all(first[part] > 0 for part in ("gain", "shift", "mix"))
    assert first["down"] == first["up"] == 0, "the mix between them is still zero"
    with torch.no_grad():
        for part in ("gain", "shift", "mix"):
            leaves[f"adapter.0.{part}"] += 0.01
    second = gradients()
    assert all(value > 0 for value in second.values())


@pytest.mark.parametrize("name", ["once", "plain", "siamese"])
def test_without_loops_nothing_is_inserted(name):
    graph_module = adapted(zoo.tagged(name).graph_module)
    assert not adapters(graph_module)
    assert get_state(graph_module).log[-1].modified is False


@pytest.mark.parametrize(
    ("name", "count"), [("nested-last", 2), ("nested-only", 2), ("two-loops", 3), ("gated-stack", 2), ("skip", None)]
)
def test_other_shapes_of_loops(name, count):
    source = zoo.tagged(name).graph_module
    graph_module = adapted(source)
    assert count is None or len(adapters(graph_module)) == count
    example = zoo.example(zoo.model_of(name))
    with torch.no_grad():
        for first, second in zip(source(*example), graph_module(*example), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_second_run_changes_nothing():
    graph_module = adapted(None, InsertAdapters())
    assert len(adapters(graph_module)) == 2
    assert not get_state(graph_module).log[-1].modified


def test_the_rank_is_an_option():
    from loopq_compile.graph.options import CalibrationOptions

    graph_module = copy_graph(captured(3))
    state = get_state(graph_module)
    state.options = CalibrationOptions(transition_rank=3)
    Pipeline([TagLoops(), InsertAdapters()]).run(graph_module)
    assert get_tensor(graph_module, "adapter.0.down").shape == (64, 3)
