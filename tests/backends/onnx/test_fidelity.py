"""The exported file computes what the PyTorch graph computes.

Stated tolerance: `max |difference| < 3e-2 * max |logits|`, and `mean |difference| < 3e-3 * mean |logits|`. Sums in
another order differ by about 1e-7 relative. Sometimes this moves a value across a rounding boundary, and a difference
of a whole quantization step propagates. Otherwise the difference stays near 1e-7.
"""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch

from loopq_compile.backends.onnx import OnnxExecutable, export
from tests.backends.onnx.graphs import Recurrent, captured, quantized, tokens

SCHEMES = {
    "w4a4-static": {},
    "w4a4-dynamic": {"activation": "dynamic"},
    "w4a8-static-shared": {"activation_bits": 8, "shared": True},
    "w8a8-static-rows": {"weight_bits": 8, "activation_bits": 8, "group_size": -1},
    "w8a8-static-tensor": {"weight_bits": 8, "activation_bits": 8, "per_tensor": True},
    "w8a8-dynamic-rows": {"weight_bits": 8, "activation_bits": 8, "group_size": -1, "activation": "dynamic"},
    "w4a16": {"activation_bits": 16},
    "w3a3-static": {"weight_bits": 3, "activation_bits": 3, "group_size": 8},
    "w3a3-dynamic-tensor": {"weight_bits": 3, "activation_bits": 3, "activation": "dynamic", "per_tensor": True},
    "w6a5-dynamic": {"weight_bits": 6, "activation_bits": 5, "group_size": 24, "activation": "dynamic"},
    "w2a7-static-tensor": {"weight_bits": 2, "activation_bits": 7, "per_tensor": True},
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (actual - expected).abs()
    assert actual.shape == expected.shape
    assert difference.max() < 3e-2 * expected.abs().max()
    assert difference.mean() < 3e-3 * expected.abs().mean()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, tmp_path) -> None:
    graph_module = quantized(captured(Recurrent(bias=scheme != "w4a4-static")), **SCHEMES[scheme])
    report = export(graph_module, tmp_path)
    for optimize in (True, False):
        run = OnnxExecutable(report.path, threads=1, optimize=optimize)
        for batch, length in ((3, 7), (1, 1), (2, 30)):
            x = tokens(batch, length, seed=length)
            assert_close(run(x), graph_module(x)[0])

    graph = onnx.load(report.path).graph
    assert {node.domain for node in graph.node} == {""}
    expected = "INT4" if SCHEMES[scheme].get("weight_bits", 4) <= 4 else "INT8"
    assert report.integer_weights == {expected: 2}
    counts = Counter(node.op_type for node in graph.node)
    pairs = 0 if scheme == "w4a16" else 4
    assert counts["QuantizeLinear"] == pairs
    assert counts["DequantizeLinear"] == pairs + 2, "one per weight, one per activation of every loop"


def test_odd_widths_equal_the_definition(tmp_path) -> None:
    """Values far outside the range end at q_min and q_max exactly, static and dynamic."""
    for activation, signed in (("static", False), ("dynamic", False), ("dynamic", True)):
        graph_module = quantized(captured(Recurrent(loops=1)), 8, 3, activation=activation, signed=signed)
        table = graph_module.get_buffer("up.weight_table")
        table.mul_(0.01)
        run = OnnxExecutable(export(graph_module, tmp_path).path, threads=1)
        x = tokens(2, 9)
        assert torch.allclose(run(x), graph_module(x)[0], rtol=1e-4, atol=1e-5)


def test_all_zero_activations(tmp_path) -> None:
    model = Recurrent()
    model.embed.weight.data[5] = 0
    graph_module = quantized(captured(model), activation="dynamic")
    run = OnnxExecutable(export(graph_module, tmp_path).path, threads=1)
    x = torch.full((1, 3), 5)
    assert run(x).isfinite().all()
    assert_close(run(x) + 1, graph_module(x)[0] + 1)


def test_a_program_without_loops_or_quantization(tmp_path) -> None:
    graph_module = captured(Recurrent(loops=1, tied=False))
    report = export(graph_module, tmp_path)
    x = tokens(2, 5)
    assert torch.allclose(OnnxExecutable(report.path, threads=1)(x), graph_module(x)[0], atol=1e-5)
    assert report.integer_weights == {}


def test_a_weight_used_once_is_still_precise(tmp_path) -> None:
    """ONNX Runtime fuses such weights into MatMulNBits and may compute in 8 bits; the tolerance covers it."""
    graph_module = quantized(captured(Recurrent(loops=1, width=64)), 4, 16, group_size=32)
    run = OnnxExecutable(export(graph_module, tmp_path).path, threads=1)
    x = tokens(3, 11)
    assert_close(run(x), graph_module(x)[0])


def test_exporting_leaves_the_program_as_it_was(tmp_path) -> None:
    graph_module = quantized(captured(Recurrent()))
    nodes = [(node.name, node.args, sorted(node.meta)) for node in graph_module.graph.nodes]
    state = {name: tensor.data_ptr() for name, tensor in graph_module.state_dict().items()}
    before = graph_module(tokens(2, 6))[0]
    export(graph_module, tmp_path)
    assert nodes == [(node.name, node.args, sorted(node.meta)) for node in graph_module.graph.nodes]
    assert state == {name: tensor.data_ptr() for name, tensor in graph_module.state_dict().items()}
    assert torch.equal(before, graph_module(tokens(2, 6))[0])
