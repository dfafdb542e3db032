"""Rotary positions in target `onnxruntime` are one node, if the tables allow it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.backends.onnx.rotary import fuse_rotary
from tests.decoding import captured, check_decoding


def test_a_program_with_a_cache(tmp_path) -> None:
    model, program = captured("ouro-mask")
    report = export(program.graph_module, tmp_path, target="onnxruntime", cache=True)
    assert report.nodes["RotaryEmbedding"] == 3 * 2 * 2  # queries and keys of two layers, three times
    assert "Neg" not in report.nodes
    run = OnnxExecutable(report.path, threads=1)
    check_decoding(model, run, run.signature)


def rotary(halves: str) -> ir.Model:
    """`x * cos + concat(-x2, x1) * sin` with tables made of two angles; `halves` selects which are joined."""

    def value(name: str, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    def make(op_type: str, inputs: list[ir.Value], shape: list[int | str], attributes: dict | None = None) -> ir.Value:
        result = value(f"{op_type}_{len(nodes)}", shape)
        nodes.append(ir.node(op_type, inputs, attributes, outputs=[result], name=f"{op_type}_{len(nodes)}"))
        return result

    nodes: list[ir.Node] = []
    x, angles, others = value("x", ["b", 2, "s", 8]), value("angles", ["s", 4]), value("others", ["s", 4])
    given = {"a": angles, "b": others}
    table = make("Concat", [given[half] for half in halves], ["s", 8], {"axis": -1})
    cos, sin = make("Cos", [table], ["s", 8]), make("Sin", [table], ["s", 8])
    first, second = value("first", ["b", 2, "s", 4]), value("second", ["b", 2, "s", 4])
    nodes.append(ir.node("Split", [x], {"axis": 3, "num_outputs": 2}, outputs=[first, second], name="split"))
    negative = make("Neg", [second], ["b", 2, "s", 4])
    turned = make("Concat", [negative, first], ["b", 2, "s", 8], {"axis": -1})
    products = [make("Mul", list(pair), ["b", 2, "s", 8]) for pair in ((cos, x), (turned, sin))]
    make("Add", products, ["b", 2, "s", 8])
    result = nodes[-1].outputs[0]
    graph = ir.Graph([x, angles, others], [result], nodes=nodes, opset_imports={"": 21, "com.microsoft": 1}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("halves", "fused"), [("aa", 1), ("ab", 0)])
def test_only_tables_of_equal_halves(halves: str, fused: int) -> None:
    rng = np.random.default_rng(0)
    feed = {
        name: rng.normal(size=shape).astype("f4")
        for name, shape in (("x", (3, 2, 5, 8)), ("angles", (5, 4)), ("others", (5, 4)))
    }
    plain, changed = rotary(halves), rotary(halves)
    assert fuse_rotary(changed.graph) == fused
    results = []
    for model in (plain, changed):
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        results.append(session.run(None, feed)[0])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)
    assert fuse_rotary(changed.graph) == 0
