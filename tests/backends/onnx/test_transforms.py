"""Transforms, transition adapters and weights per loop in the exported file."""

import onnx
import pytest
import torch
from safetensors.torch import load_file

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.state import get_tensor, set_tensor
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.passes.quantize.insert_activation_qdq import InsertActivationQdq
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from loopq_compile.passes.quantize.set_ranges import SetRanges
from loopq_compile.passes.transforms.fold_diagonals import FoldDiagonals
from loopq_compile.passes.transforms.insert_adapters import InsertAdapters
from loopq_compile.passes.transforms.insert_las import InsertLas
from loopq_compile.passes.transforms.insert_transforms import InsertTransforms
from loopq_compile.passes.transforms.smooth_activations import SmoothActivations
from loopq_compile.program import Program
from tests.passes.test_rewriting import prepared
from tests.passes.transforms.test_insert_transforms import scattered
from tests.tiny import tiny_model, tokens

TRANSFORMS = {
    "kronecker": [InsertTransforms(init="orthogonal", diagonal=True, learn="transform")],
    "per-loop": [InsertTransforms(init="orthogonal", diagonal=True, learn="transform", per_loop="*.down")],
    "hadamard": [InsertTransforms("hadamard", diagonal="gain"), FoldDiagonals()],
    "full": [InsertTransforms("full", init="orthogonal", learn="orthogonal", shared=True)],
    "smoothed": [SmoothActivations(), FoldDiagonals()],
    "adapters": [InsertAdapters()],
    "everything": [
        SmoothActivations(learn=True),
        InsertTransforms(init="hadamard", learn="transform", per_loop="*.gate+up"),
        InsertAdapters(),
    ],
}


def with_moving_parts(graph_module):
    """Transforms and adapters away from the identity."""
    generator = torch.Generator().manual_seed(3)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target.startswith("adapter."):
            old = get_tensor(graph_module, node.target)
            set_tensor(graph_module, node.target, old + 0.1 * torch.randn(old.shape, generator=generator))
    return scattered(graph_module, amount=0.3)


def compiled(name, activation="dynamic", scheme="w4a8", learnable=False):
    """Eight bits for activations: a code that rounds the other way has little effect."""
    graph_module = with_moving_parts(prepared(*TRANSFORMS[name], scheme=scheme, activation=activation))
    for item in (
        CollectRanges(),
        QuantizeWeights(learnable=learnable),
        InsertActivationQdq(),
        InsertLas(),
        SetRanges(),
        PackWeights(),
    ):
        graph_module = item(graph_module).graph_module
    graph_module.recompile()
    return graph_module


@pytest.mark.parametrize("name", TRANSFORMS)
def test_without_quantization_the_file_computes_the_program(name, tmp_path):
    graph_module = with_moving_parts(prepared(*TRANSFORMS[name]))
    report = export(graph_module, tmp_path)
    run = OnnxExecutable(report.path, threads=1)
    for batch, length in ((3, 7), (1, 1)):
        x = tokens(1, batch, length)
        with torch.no_grad():
            expected = graph_module(x)[0]
        assert (run(x)["logits"] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert {node.domain for node in onnx.load(report.path).graph.node} == {""}


@pytest.mark.parametrize("activation", ["dynamic", "static"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_quantized_programs(name, activation, tmp_path):
    graph_module = compiled(name, activation, learnable=activation == "static")
    report = export(graph_module, tmp_path)
    run = OnnxExecutable(report.path, threads=1)
    x = tokens(2, 2, 9)
    with torch.no_grad():
        expected = graph_module(x)[0]
    # A code that rounds the other way changes its token and later ones; the others agree to the last digits.
    difference = (run(x)["logits"] - expected).abs().amax(-1)
    assert difference.max() < 0.1 * expected.abs().max()
    assert difference.min() < 1e-5 * expected.abs().max()
    weights = {"per-loop": 7 + 2, "everything": 7 + 2 * 2}.get(name, 7)
    assert report.integer_weights == {"INT4": weights}


def test_rows_of_tables_are_constants_named_after_their_loop(tmp_path):
    graph = onnx.load(export(compiled("everything"), tmp_path).path).graph
    names = {initializer.name for initializer in graph.initializer}
    for loop in range(3):
        assert f"transform.layers_0_gate_up.right_loop{loop}" in names
        assert any(name.startswith(f"layers.0.up.weight_loop{loop}_codes") for name in names)
    assert "transform.layers_0_down.right_all_loops" in names
    assert "adapter.0.mix_loop0" in names or "adapter.0.mix_row0" in names
    assert not {"transform.layers_0_down.right", "layers.0.down.weight", "layers.0.down.weight_rounding"} & names


@pytest.mark.parametrize("name", ["everything", "hadamard"])
def test_saved_programs_hold_all_of_it(name, tmp_path):
    graph_module = compiled(name)
    program = Program(graph_module)
    program.save(tmp_path / "program")
    loaded = lq.load(tmp_path / "program")
    x = tokens(4)
    assert torch.equal(loaded(x)["logits"], program(x)["logits"])
    assert loaded.summary() == program.summary()
    export(graph_module, tmp_path / "a"), loaded.export_onnx(tmp_path / "b")
    one, other = (OnnxExecutable(tmp_path / side, threads=1)(x)["logits"] for side in "ab")
    assert torch.equal(one, other)
    stored = load_file(tmp_path / "program" / "tensors.safetensors")
    codes = {name: tensor for name, tensor in stored.items() if name.endswith("_codes")}
    assert all(tensor.dtype == torch.uint8 for tensor in codes.values()), "two to the byte"
    assert ("layers.0.up.weight_loop1_codes" in codes) == (name == "everything")


def test_the_summary_counts_every_part():
    text = Program(compiled("everything")).summary()
    for part in (
        "integer weights 20,480",
        "per-loop weights 49,152",
        "transforms ",
        "adapters ",
        "condition numbers up",
    ):
        assert part in text, part
    plain = Program(capture(tiny_model(), tokens())).summary()
    assert "transforms" not in plain and "adapters" not in plain
