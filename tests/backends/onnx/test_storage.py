"""Files whose floating-point tensors take 16 bits."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.backends.onnx.storage import store_half
from loopq_compile.models import Ouro, OuroConfig
from tests.decoding import VOCABULARY, ids


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def program(request) -> lq.Program:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = OuroConfig(vocab_size=VOCABULARY, total_ut_steps=2, tie_word_embeddings=request.param, **sizes)
    return lq.compile(Ouro(config).eval(), ids(), scheme="w4a16", method="symmetric")


def test_large_tensors_are_stored_in_half_the_bytes(program: lq.Program, tmp_path) -> None:
    options = {"target": "onnxruntime", "form": "rolled", "cache": True}
    whole = export(program.graph_module, tmp_path / "whole", **options)
    half = export(program.graph_module, tmp_path / "half", float_bits=16, **options)
    tensors = {tensor.name: tensor for tensor in onnx.load(half.path).graph.initializer}
    kinds = {name: onnx.TensorProto.DataType.Name(tensor.data_type) for name, tensor in tensors.items()}
    assert kinds["model.embed_tokens.weight.half"] == "FLOAT16"
    large = [name for name, t in tensors.items() if kinds[name] == "FLOAT" and len(t.raw_data) >= 4 * 4096]
    assert not large and half.bytes < whole.bytes - 64 * VOCABULARY
    given, expected = (OnnxExecutable(report.path, threads=1)(ids())["logits"] for report in (half, whole))
    difference = (given - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 2e-3


def test_what_does_not_fit_is_refused(program: lq.Program, tmp_path) -> None:
    with pytest.raises(lq.LoopQError, match="16 or 32"):
        export(program.graph_module, tmp_path, float_bits=8)
    with pytest.raises(lq.LoopQError, match=r"huge holds 1e\+05.*leave out float_bits=16"):
        store_half(graph_of(huge=torch.full((4096,), 1e5)))


def graph_of(**tensors: torch.Tensor) -> ir.Graph:
    """A graph that stores `tensors`."""
    graph = ir.Graph([], [], nodes=[], name="graph")
    for name, tensor in tensors.items():
        shape, kind = ir.Shape(tensor.shape), ir.TensorType(ir.DataType.FLOAT)
        held = ir.tensor(tensor.numpy(), name=name)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=kind, const_value=held))
    return graph


@pytest.mark.parametrize(
    ("value", "stored"), [(1e-8, "scale"), (-1e-8, "scale"), (6e-8, "scale.half"), (0.0, "scale.half")]
)
def test_a_number_that_16_bits_would_make_0_stays_in_32(value: float, stored: str) -> None:
    scale = torch.ones(4096)
    scale[7] = value
    graph = graph_of(scale=scale, other=torch.ones(4096))
    store_half(graph)
    assert set(graph.initializers) == {stored, "other.half"}
    held = graph.initializers[stored].const_value
    assert held is not None and bool(held.numpy()[7]) == bool(value)
