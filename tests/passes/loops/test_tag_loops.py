"""Every way of looping has the structure in the zoo's table, and every node the tag that its author meant."""

import copy
from collections import Counter
from pathlib import Path

import pytest
from torch import fx

from loopq_compile.graph.loops import Loop, LoopStructure, get_tag
from loopq_compile.graph.recurrence import matrix_weight, weight_roots
from loopq_compile.graph.state import get_state
from loopq_compile.graph.verify import verify_tags
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.program import Program
from tests import zoo
from tests.zoo import ZOO

NAMES = list(ZOO)
LOOPED = [name for name in NAMES if ZOO[name].products]
MARKED = [name for name in NAMES if name != "llama"]


def tagged(name: str) -> Program:
    return zoo.tagged(name)


def products(program: Program) -> list[fx.Node]:
    graph = program.graph_module.graph
    roots = weight_roots(graph)
    return [node for node in graph.nodes if matrix_weight(node, roots)]


@pytest.mark.parametrize("name", NAMES)
def test_the_structure_is_found(name):
    loops = tagged(name).loops
    assert loops.describe() == ZOO[name].structure
    assert loops.count == ZOO[name].count


@pytest.mark.parametrize("name", MARKED)
def test_every_node_has_the_tag_its_author_meant(name):
    wrong = {}
    for node in tagged(name).graph_module.graph.nodes:
        # Arithmetic on sizes belongs to the node that needed it first.
        if node.op == "call_function" and not isinstance(node.meta["val"], int | float) and not is_size(node):
            tag = get_tag(node)
            if (str(tag) if tag else None) != zoo.meant(node):
                wrong[node.name] = f"has {tag}, meant {zoo.meant(node)}"
    assert not wrong


def is_size(node: fx.Node) -> bool:
    return type(node.meta["val"]).__name__ in ("SymInt", "SymFloat", "SymBool")


@pytest.mark.parametrize("name", LOOPED)
def test_iterations_hold_equally_many_matrix_products(name):
    found = Counter((tag.loops[0], tag.index[0]) for node in products(tagged(name)) if (tag := get_tag(node)))
    expected = {}
    for number, (loop, inside) in enumerate(zip(tagged(name).loops.loops, ZOO[name].products, strict=True)):
        expected |= {(number, iteration): inside for iteration in range(loop.count)}
    for key, missing in ZOO[name].fewer.items():
        expected[key] -= missing
    assert found == expected


@pytest.mark.parametrize("name", LOOPED)
def test_one_tensor_crosses_from_each_iteration_to_the_next(name):
    program = tagged(name)
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    for loop in program.loops.loops:
        assert [(edge.source, edge.target) for edge in loop.boundaries] == [(t, t + 1) for t in range(loop.count - 1)]
        for edge in loop.boundaries:
            (state,) = (nodes[state] for state in edge.state)
            assert state.meta["val"].shape[-1] == zoo.m.DIM
            assert get_tag(state).index[0] == edge.source
            assert edge.consumers
            assert {get_tag(nodes[reader]).index[0] for reader in edge.consumers} == {edge.target}


@pytest.mark.parametrize("name", NAMES)
def test_the_verifier_accepts_what_the_pass_tagged(name):
    verify_tags(tagged(name).graph_module)


@pytest.mark.parametrize("name", ["gated-stack", "nested-middle", "zamba", "plain"])
def test_a_second_run_changes_nothing(name):
    graph_module = copy.deepcopy(tagged(name).graph_module)
    before = tags(graph_module)
    result = TagLoops()(graph_module)
    assert not result.modified
    assert tags(graph_module) == before


@pytest.mark.parametrize("name", ["gated-stack", "nested-middle", "zamba"])
def test_tags_do_not_depend_on_tags_that_are_there(name):
    graph_module = copy.deepcopy(tagged(name).graph_module)
    before, state = tags(graph_module), copy.copy(get_state(graph_module))
    state.tags = None
    graph_module.meta["loopq"] = state
    assert TagLoops()(graph_module).modified
    assert tags(graph_module) == before


def tags(graph_module: fx.GraphModule) -> dict[str, str]:
    return {node.name: str(get_tag(node)) for node in graph_module.graph.nodes}


def test_weights_inputs_and_output_have_no_tag():
    nodes = tagged("gated-stack").graph_module.graph.nodes
    outside = [node for node in nodes if node.op in ("get_attr", "placeholder", "output")]
    assert len(outside) > 5
    assert not any(get_tag(node) for node in outside)


def test_call_sites_list_the_uses_of_a_weight_in_order():
    sites = {site.weight: site for site in tagged("nested-last").loops.call_sites}
    assert [call.loop for call in sites["outer.before.up.weight"].calls] == ["0", "1", "2"]
    assert [call.loop for call in sites["outer.inner.up.weight"].calls] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert "lm_head.weight" not in sites


def test_a_model_without_loop_is_said_to_be_ordinary_quantization():
    graph_module = copy.deepcopy(tagged("plain").graph_module)
    state = copy.copy(get_state(graph_module))
    state.tags, state.run.notes = None, []
    graph_module.meta["loopq"] = state
    assert not TagLoops()(graph_module).modified
    assert state.run.notes == ["no loop found: this is ordinary post-training quantization"]


@pytest.mark.parametrize("name", ["nested-twice", "two-loops", "plain"])
def test_structures_survive_json(name):
    loops = tagged(name).loops
    assert LoopStructure.from_dict(loops.to_dict()) == loops


def test_rows_of_a_nested_loop_count_through():
    program = tagged("nested-last")
    inner = [tag for node in products(program) if (tag := get_tag(node)) and len(tag.index) == 2]
    assert sorted({program.loops.row(tag) for tag in inner}) == list(range(6))
    assert {program.loops.iterations(tag) for tag in inner} == {6}


def test_children_are_listed_in_program_order():
    (outer,) = tagged("nested-twice").loops.loops
    assert [child.blocks for child in outer.children] == [("first",), ("second",)]
    assert all(isinstance(child, Loop) and not child.children for child in outer.children)


def test_the_table_in_the_documentation_is_current():
    page = Path(__file__).parents[3] / "passes" / "README.md"
    between = page.read_text().split("<!-- structures -->")[1].split("<!-- /structures -->")[0]
    assert between.strip() == zoo.structure_table().strip(), "run `python -m tests.zoo` and paste its output"
