"""The order of lowerings is a list that prints and that can be cut."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from loopq_compile.backends.onnx import export
from loopq_compile.backends.onnx.lowering import Lowering, Lowerings, lowerings
from loopq_compile.errors import InternalError, LoopQError
from tests.backends.onnx import graphs


def test_a_list_prints_what_its_items_do() -> None:
    lines = str(lowerings("onnxruntime", head_bits=8)).splitlines()
    assert lines[0] == f"{len(lines) - 1} lowerings"
    assert any("merge-products" in line and "Merges packed products that read one tensor" in line for line in lines)
    assert all(len(line.split(maxsplit=2)) == 3 for line in lines[1:])
    assert lowerings("onnxruntime").names[-8:] == lowerings("qdq").names[-8:]  # both end in standard operators


def test_a_list_can_be_cut() -> None:
    whole = lowerings("onnxruntime")
    assert whole.without(["merge-products", "keep-rows"]).names == [
        name for name in whole.names if name not in ("merge-products", "keep-rows")
    ]
    with pytest.raises(LoopQError, match=r"'merge-product'.*merge-products"):
        whole.without(["merge-product"])
    with pytest.raises(LoopQError, match="lower-linears"):  # without it there is no file
        whole.without(["lower-linears"])


def test_export_names_what_it_cannot_leave_out(tmp_path) -> None:
    graph_module = graphs.captured(graphs.Recurrent())
    with pytest.raises(LoopQError, match="fuse-rotary"):
        export(graph_module, tmp_path, target="qdq", skip=("fuse-rotary",))
    assert not list(tmp_path.iterdir())


def test_what_should_be_gone_is_looked_for() -> None:
    x = ir.Value(name="x")
    graph = ir.Graph([x], [], nodes=[ir.node("Row", [x], domain="loopq", name="left")], opset_imports={"": 21})

    def lower_nothing(graph: ir.Graph) -> None:
        """Does nothing."""

    with pytest.raises(InternalError, match=r"lower-nothing left \['left'\]"):
        Lowerings([Lowering(lower_nothing, "Row")]).run(ir.Model(graph, ir_version=10))
