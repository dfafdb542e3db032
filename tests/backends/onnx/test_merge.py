"""Products that read one tensor are one product in target `onnxruntime`, and the file's results stay the same."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from tests.backends.onnx import graphs
from tests.tiny import tiny_program, tokens


class Uneven(nn.Module):
    """`a`, `b` and `c` read one tensor in every loop; `b` then also reads another one."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again = again
        self.embed, self.head = nn.Embedding(80, 64), nn.Linear(64, 80)
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 96)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for _ in range(2):
            a, b, c = self.a(x), self.b(x), self.c(x)
            x = torch.tanh(a + torch.cat([b, c[..., :32]], -1) * c[..., 32:])
            if self.again:
                x = torch.cat([self.b(x), x[..., :32]], -1)
        return {"logits": self.head(x)}


def products(path) -> list[onnx.NodeProto]:  # type: ignore[no-untyped-def]
    graph = onnx.load(path).graph
    loops = [node for node in graph.node if node.op_type == "Loop"]
    nodes = [*graph.node, *(node for loop in loops for node in loop.attribute[0].g.node)]
    return [node for node in nodes if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("form", ["unrolled", "rolled"])
@pytest.mark.parametrize(("scheme", "most", "mean"), [("w4a4", 0.1, 0.02), ("w4a8", 1e-5, 1e-6), ("w4a16", 1e-5, 1e-6)])
def test_the_same_results_from_fewer_products(scheme: str, most: float, mean: float, form: str, tmp_path) -> None:
    """At w4a4, a product that differs in its last bit sometimes rounds a code the other way."""
    graph_module = tiny_program(scheme).graph_module
    merged = export(graph_module, tmp_path / "merged", target="onnxruntime", form=form)
    plain = export(graph_module, tmp_path / "plain", target="onnxruntime", form=form, skip=("merge-products",))
    loops = 3 if form == "unrolled" else 1
    assert plain.nodes["MatMulNBits"] == 7 * loops
    assert merged.nodes["MatMulNBits"] == 4 * loops  # q+k+v, o, gate+up, down
    weights = {node.input[1] for node in products(merged.path)}
    assert len(weights) == 4 and sum("+" in name for name in weights) == 2
    stored = {tensor.name for tensor in onnx.load(merged.path).graph.initializer}
    assert weights == {name for name in stored if name.endswith(".packed")}
    given, expected = (OnnxExecutable(file.path, threads=1)(tokens())["logits"] for file in (merged, plain))
    difference = (given - expected).abs() / expected.abs().max()
    assert difference.max() < most and difference.mean() < mean


def test_biases_and_widths_stay_with_their_own(tmp_path) -> None:
    graph_module = lq.compile(Uneven(again=False), graphs.tokens(2, 9), scheme="w4a8", method="symmetric").graph_module
    merged = export(graph_module, tmp_path / "merged", target="onnxruntime")
    assert merged.nodes["MatMulNBits"] == 2
    plain = export(graph_module, tmp_path / "plain", target="onnxruntime", skip=("merge-products",))
    assert plain.nodes["MatMulNBits"] == 6
    given, expected = (OnnxExecutable(file.path, threads=1)(graphs.tokens(2, 9))["logits"] for file in (merged, plain))
    assert torch.allclose(given, expected, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_also_read_alone_stays_alone(tmp_path) -> None:
    """If merged, it would be in the file twice."""
    graph_module = lq.compile(Uneven(again=True), graphs.tokens(2, 9), scheme="w4a8", method="symmetric").graph_module
    report = export(graph_module, tmp_path, target="onnxruntime")
    assert report.nodes["MatMulNBits"] == 8
    assert not any("+" in node.input[1] for node in products(report.path))


def test_a_head_of_8_bits_takes_the_widest_blocks_that_divide_it(tmp_path) -> None:
    report = lq.Program(graphs.captured(Uneven(again=False))).export_onnx(tmp_path, target="onnxruntime", head_bits=8)
    (head,) = products(report.path)
    assert {a.name: a.i for a in head.attribute}["block_size"] == 64
