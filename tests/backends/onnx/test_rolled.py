"""Form `rolled` and target `onnxruntime`: fidelity, one copy of every weight, a loop count chosen at run time."""

from __future__ import annotations

import copy
import re

import onnx
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import attach_state, copy_graph, get_state, get_tensor, set_tensor
from loopq_compile.passes.loops.roll_loops import RollLoops
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from tests import zoo
from tests.backends.onnx import graphs
from tests.decoding import ids
from tests.passes.loops.test_exit_early import ouro
from tests.tiny import tiny_model, tiny_program, tokens


def difference(expected: object, given: object) -> float:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(given), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def learned() -> lq.Program:
    data = [tokens(seed) for seed in range(3)]
    return lq.compile(tiny_model(3), tokens(), scheme="w4a4", method="loopq", calibration=data, steps=2)


@pytest.mark.parametrize("name", ["gated-stack", "inject-add", "inject-later", "time", "rotary-once", "two-loops"])
def test_shapes_of_loops(name: str, tmp_path) -> None:
    program = zoo.tagged(name)
    run = OnnxExecutable(export(program.graph_module, tmp_path, form="rolled").path, threads=1)
    inputs = zoo.example(zoo.model_of(name), 3, 9)
    assert difference(program(*inputs), run(*inputs)) < 1e-5


@pytest.mark.parametrize("target", ["qdq", "onnxruntime"])
@pytest.mark.parametrize(
    ("scheme", "method", "activation", "tolerance"),
    [
        ("w4a8", "las", "dynamic", 1e-5),
        # Static scales are not those that ONNX Runtime chooses for its own 8 bits.
        ("w4a8", "las", "static", 0.03),
        ("w8a8", "las", "dynamic", 1e-5),
        ("w4a16", "symmetric", "dynamic", 1e-5),
        # 4-bit activations are rounded once more, to 8 bits, which flips codes of later layers.
        ("w4a4", "las", "static", 0.15),
    ],
)
def test_fidelity_of_rolled_files(scheme, method, activation, tolerance, target, tmp_path) -> None:
    program = tiny_program(scheme, method, activation)
    report = export(program.graph_module, tmp_path, target=target, form="rolled")
    run = OnnxExecutable(report.path, threads=1)
    assert run.input_names == ["input_ids", "loops"]
    limit = tolerance if target == "onnxruntime" else 1e-5
    assert difference(program(tokens(5, 3, 11)), run(tokens(5, 3, 11))) < limit


@pytest.mark.parametrize("target", ["qdq", "onnxruntime"])
def test_weights_per_loop_and_default_session_options(learned, target, tmp_path) -> None:
    report = export(learned.graph_module, tmp_path, target=target, form="rolled")
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    given = session.run(None, {"input_ids": tokens(5).numpy(), "loops": torch.tensor(3).numpy()})
    expected = pytree.tree_leaves(learned(tokens(5)))
    limit = 0.15 if target == "onnxruntime" else 1e-5
    assert difference(expected, [torch.from_numpy(value) for value in given]) < limit


@pytest.mark.parametrize("target", ["qdq", "onnxruntime"])
@pytest.mark.parametrize("part", ["codes", "scale"])
def test_weights_per_loop_that_are_equal_in_part(learned, part, target, tmp_path) -> None:
    graph_module = copy_graph(learned.graph_module)
    attach_state(graph_module, get_state(learned.graph_module))
    names = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    later = [name for name in names if re.search(rf"_loop[12]_{part}$", name)]
    assert later
    for name in later:
        set_tensor(graph_module, name, get_tensor(graph_module, re.sub(r"_loop\d_", "_loop0_", name)).clone())
    path = export(graph_module, tmp_path, target=target, form="rolled").path
    run = OnnxExecutable(graphs.in_float32(path), threads=1)
    program = lq.Program(graph_module)
    # On a single text a last bit may decide a four-bit code; a wrong weight shows in all of them.
    apart = [difference(list(pytree.tree_leaves(program(x))), run(x)) for x in (tokens(5), tokens(6), tokens(7))]
    assert min(apart) < 1e-5


def test_a_loop_count_beyond_the_calibrated_one_holds_the_last_rows(learned, tmp_path) -> None:
    run = OnnxExecutable(export(learned.graph_module, tmp_path, form="rolled").path, threads=1)
    graph_module = copy_graph(learned.graph_module)
    attach_state(graph_module, get_state(learned.graph_module))
    state = get_state(learned.graph_module)
    loops, tags = state.loops, state.tags
    RollLoops()(graph_module)
    graph_module.recompile()
    state.loops, state.tags = loops, tags
    (loop,) = rolled_loops(graph_module)
    for count in (1, 2, 5):
        loop.count = count
        with torch.no_grad():
            expected = graph_module(tokens(5))
        given = run(tokens(5), loops=count)
        assert given["gates"].shape[-1] == count
        assert difference(list(expected), list(given.values())) < 1e-5
    with pytest.raises(lq.LoopQError, match="whole number from 1"):
        run(tokens(5), loops=0)


def test_text_is_generated_with_as_many_loops_as_asked_for(tmp_path) -> None:
    """A file of three loops gives the same text as the program compiled with five."""

    def with_loops(count: int) -> Program:
        model = copy.deepcopy(ouro())  # shared with other tests
        model.loops = count
        return Program(Pipeline([TagLoops()]).run(capture(model, ids(2, 6))))

    three, five = with_loops(3), with_loops(5)
    exports = {"cached": ("rolled", True), "recomputing": ("rolled", False), "fixed": ("unrolled", True)}
    cached, recomputing, fixed = (
        OnnxExecutable(three.export_onnx(tmp_path / name, form=form, cache=cache).path, threads=1)
        for name, (form, cache) in exports.items()
    )
    for run in (cached, recomputing):
        assert torch.equal(run.generate(ids(2, 6), 6, loops=5), five.generate(ids(2, 6), 6))
        assert torch.equal(run.generate(ids(2, 6), 6), fixed.generate(ids(2, 6), 6))
    assert not torch.equal(fixed.generate(ids(2, 6), 6), five.generate(ids(2, 6), 6))
    with pytest.raises(lq.LoopQError, match=r"unrolled.*form='rolled'"):
        fixed.generate(ids(2, 6), 6, loops=5)
    with pytest.raises(lq.LoopQError, match="whole number from 1"):
        cached.generate(ids(2, 6), 6, loops=0)


@pytest.mark.parametrize("form", ["unrolled", "rolled"])
def test_packed_weights_stand_in_the_file_once(form: str, tmp_path) -> None:
    program = tiny_program("w4a8", "las")
    path = export(program.graph_module, tmp_path, target="onnxruntime", form=form).path
    graph = onnx.load(path).graph
    packed = [tensor for tensor in graph.initializer if tensor.name.endswith(".packed")]
    assert len(packed) == 4  # query, key and value are one product, gate and up another
    sizes = {tensor.name: list(tensor.dims) for tensor in packed}
    assert sizes["layers.0.gate.weight_codes.packed+layers.0.up.weight_codes.packed"] == [256, 2, 16]
    body = [node for node in graph.node if node.op_type == "Loop"]
    nodes = body[0].attribute[0].g.node if body else graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == (4 if body else 12)
    assert all(attribute.i == 4 for p in products for attribute in p.attribute if attribute.name == "accuracy_level")


def test_weights_that_do_not_fit_stay_standard(tmp_path) -> None:
    """The operator does not support blocks of 24."""
    graph_module = graphs.quantized(graphs.captured(graphs.Recurrent()), group_size=24)
    report = export(graph_module, tmp_path, target="onnxruntime", form="rolled")
    assert "MatMulNBits" not in report.nodes and report.nodes["Loop"] == 1
    assert difference(graph_module(graphs.tokens(2, 9)), OnnxExecutable(report.path)(graphs.tokens(2, 9))) < 1e-5


def test_a_program_without_loops_says_so(tmp_path) -> None:
    with pytest.raises(lq.LoopQError, match="no loop to roll"):
        export(zoo.tagged("plain").graph_module, tmp_path, form="rolled")


def test_the_size_of_a_rolled_file_does_not_depend_on_the_number_of_loops(tmp_path) -> None:
    reports = {}
    for loops in (2, 6):
        program = lq.compile(tiny_model(loops), tokens(), scheme="w4a8", method="symmetric", calibration=[tokens()])
        for form in ("unrolled", "rolled"):
            reports[form, loops] = export(program.graph_module, tmp_path / f"{form}{loops}", form=form)
    assert reports["rolled", 2].node_count == reports["rolled", 6].node_count
    assert abs(reports["rolled", 2].bytes - reports["rolled", 6].bytes) < 100
    assert reports["unrolled", 6].node_count > 2 * reports["unrolled", 2].node_count
