"""Shapes are computed once for calls that are alike, and are those that PyTorch computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.propagation import Propagation
from loopq_compile.graph.shapes import symbolic_inputs
from loopq_compile.graph.state import get_state
from tests.decoding import captured


@pytest.mark.parametrize("name", ["ouro-mask", "llama-eager", "huginn", "sliced"])
def test_the_same_shapes_as_pytorch(name: str) -> None:
    graph_module = captured(name)[1].graph_module
    inputs = symbolic_inputs(get_state(graph_module).signature, 3)
    Propagation(graph_module, inputs[0].fake_mode).propagate(*inputs)  # type: ignore[attr-defined]
    found = {node.name: node.meta["val"] for node in graph_module.graph.nodes if "val" in node.meta}
    inputs = symbolic_inputs(get_state(graph_module).signature, 3)
    FakeTensorProp(graph_module, inputs[0].fake_mode).propagate_dont_convert_inputs(*inputs)  # type: ignore[attr-defined]
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            expected = node.meta["val"]
            assert str(found[node.name]) == str(expected), node.name
            if torch.is_tensor(expected):
                assert str(found[node.name].stride()) == str(expected.stride()), node.name


def test_calls_that_differ_only_in_a_number_are_not_alike() -> None:
    class Model(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x[:, :1], x[:, :2], x.sum(1), x.sum(1, keepdim=True), x * 1, x * 1.0, x * True

    graph_module = capture(Model(), torch.ones(2, 7, 3, dtype=torch.int64))
    inputs = symbolic_inputs(get_state(graph_module).signature, 1)
    results = Propagation(graph_module, inputs[0].fake_mode).propagate(*inputs)  # type: ignore[attr-defined]
    assert [result.ndim for result in results] == [3, 3, 2, 3, 3, 3, 3]
    assert [results[0].shape[1], results[1].shape[1]] == [1, 2]
    assert [result.dtype for result in results[4:]] == [torch.int64, torch.float32, torch.int64]
