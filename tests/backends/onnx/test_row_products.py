"""`products="int8"` of target `onnxruntime`: the products are those of the integers that the module's docstring
defines."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.backends.onnx.row_products import PRODUCT, to_rows
from loopq_compile.graph.state import copy_graph
from tests.backends.onnx import graphs
from tests.backends.onnx.graphs import Recurrent, captured, quantized
from tests.tiny import tiny_program, tokens


def in_rows(x: Tensor) -> Tensor:
    """Rounded to 8 bits per row; the same arithmetic as in the file, because 4-bit values are often ties."""
    step = (x.abs().amax(-1, keepdim=True) * torch.tensor(1 / 127)).clamp_min(1e-12)
    return torch.round(x / step) * step


def weight_in_rows(weight: Tensor) -> Tensor:
    """Rounded to 7 bits per output."""
    step = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 63
    return torch.round(weight / step) * step


def emulated(graph_module: fx.GraphModule, x: Tensor, *, twice: bool) -> Tensor:
    """The program, with both sides of quantized products rounded in rows; if `twice`, activations first in groups."""
    copied = copy_graph(graph_module)
    for node in copied.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        read, weight, *bias = node.args
        if weight.target is torch.ops.loopq.dequantize.default:
            source = read if twice else read.args[0].args[0]
            with copied.graph.inserting_before(node):
                call = copied.graph.call_function
                node.args = (call(in_rows, (source,)), call(weight_in_rows, (weight,)), *bias)
    copied.recompile()
    return copied(x)[0]


@pytest.mark.parametrize(("bits", "clip", "twice"), [(4, 1, True), (3, 0.9, True), (8, 1, False), (8, 0.75, True)])
def test_the_integers(bits: int, clip: float, twice: bool, tmp_path) -> None:
    """Eight-bit activations are rounded once, in rows; narrower or clipped ones in their groups first."""
    program = quantized(captured(Recurrent(loops=1)), 8, bits, activation="dynamic", signed=False)
    for name in ("up", "down"):
        program.get_buffer(f"{name}.weight_table").fill_(clip)
    run = OnnxExecutable(export(program, tmp_path, target="onnxruntime", products="int8").path, threads=1)
    for batch, length in ((3, 7), (1, 1)):
        x = graphs.tokens(batch, length, seed=length)
        torch.testing.assert_close(run(x), emulated(program, x, twice=twice), rtol=1e-4, atol=1e-5)


def test_weights_in_rows() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((2, 5, 12)).astype(np.float32)
    weight[0, 3] = 0
    codes, scale = to_rows(weight)
    assert codes.shape == (2, 12, 5) and codes.dtype == np.int8 and scale.shape == (2, 5)
    back = codes.swapaxes(-1, -2) * scale[..., None]
    assert np.abs(back - weight).max() <= np.abs(weight).max() / 126 + 1e-6
    assert (np.abs(codes).max(-2) == np.where(np.abs(weight).max(-1) > 0, 63, 0)).all()


def test_sums_of_two_products_fit_sixteen_bits() -> None:
    """Processors without VNNI saturate there (seen in CI: differences of 1.2 in every result)."""
    weight = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    assert 2 * 255 * int(np.abs(to_rows(weight)[0].astype(int)).max()) < 2**15


@pytest.mark.parametrize("form", ["unrolled", "rolled"])
@pytest.mark.parametrize(("scheme", "mean"), [("w4a4", 0.05), ("w4a8", 0.02)])
def test_a_model_near_to_its_program(scheme: str, mean: float, form: str, tmp_path) -> None:
    program = tiny_program(scheme)
    report = export(program.graph_module, tmp_path, target="onnxruntime", products="int8", form=form)
    assert report.nodes[PRODUCT] == 7 * (3 if form == "unrolled" else 1)
    assert "MatMulNBits" not in report.nodes
    got, want = (run(tokens())["logits"] for run in (OnnxExecutable(tmp_path, threads=1), program))
    assert (got - want).abs().mean() < mean * want.abs().mean()


def test_rounding_in_floating_point_is_the_same(tmp_path) -> None:
    """Four-bit activations: no integers in between, and bit-identical results."""
    graph_module = tiny_program("w4a4").graph_module
    spelled = export(graph_module, tmp_path / "spelled", target="onnxruntime", products="int8")
    options = {"target": "onnxruntime", "products": "int8", "skip": ("spell-out-pairs",)}
    plain = export(graph_module, tmp_path / "plain", **options)
    assert "DequantizeLinear" not in spelled.nodes and plain.nodes["DequantizeLinear"] == 4 * 3
    found, expected = (OnnxExecutable(file.path, threads=1)(tokens())["logits"] for file in (spelled, plain))
    assert torch.equal(found, expected)


def test_products_of_one_tensor_share_its_integers(tmp_path) -> None:
    report = export(tiny_program("w4a8").graph_module, tmp_path, target="onnxruntime", products="int8", head_bits=8)
    assert report.nodes["QuantizeLinear"] == 4 * 3  # q+k+v, o, gate+up, down
    assert report.nodes[PRODUCT] == 7 * 3 and report.integer_weights == {"INT8": 7}
    assert report.nodes["MatMulNBits"] == 1  # the head: its input has outliers, and is one row of a prompt


@pytest.mark.parametrize("float_bits", [32, 16])
def test_both_forms_in_a_file(float_bits: int, tmp_path) -> None:
    """Bit-identical to the chosen form: packed products for up to three tokens, whole rows for more."""
    options = {"target": "onnxruntime", "cache": True, "float_bits": float_bits, "head_bits": 8}
    runs = {}
    for products in ("packed", "int8", "both"):
        folder = tmp_path / products
        export(tiny_program("w4a8").graph_module, folder, products=products, **options)
        runs[products] = OnnxExecutable(folder, threads=1)
    for batch, length, same in ((1, 1, "packed"), (3, 1, "packed"), (1, 4, "int8"), (4, 1, "int8"), (2, 9, "int8")):
        x = tokens(2, batch, length)
        found, expected = runs["both"](x), runs[same](x)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    tensors = [x.raw_data for x in onnx.load(tmp_path / "both" / "model.onnx").graph.initializer]
    large = [data for data in tensors if len(data) > 1024]
    assert len(large) == len(set(large)) > 7  # tensors of both forms are stored once
    ids = tokens(1, 1, 6)
    assert runs["both"].generate(ids, 4).shape == (1, 10)


def test_both_forms_count_tokens(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
    program = lq.compile(model, torch.randn(2, 32), scheme="w4a8", method="symmetric")
    with pytest.raises(lq.LoopQError, match=r"finds no integer input \[batch, sequence\]"):
        program.export_onnx(tmp_path, target="onnxruntime", products="both")
    with pytest.raises(lq.LoopQError, match="products='both' is for form='unrolled'"):
        tiny_program().export_onnx(tmp_path, target="onnxruntime", products="both", form="rolled")
    assert not list(tmp_path.iterdir())


def test_activations_in_floating_point_are_refused(tmp_path) -> None:
    with pytest.raises(lq.LoopQError, match="quantized activations: compile it with a scheme such as 'w4a8'"):
        tiny_program("w4a16").export_onnx(tmp_path, target="onnxruntime", products="int8")
    with pytest.raises(lq.LoopQError, match="products='int8' goes with target='onnxruntime'"):
        tiny_program().export_onnx(tmp_path, products="int8")
    with pytest.raises(lq.LoopQError, match=r"Unknown ONNX products 'int9'.*'int8'"):
        tiny_program().export_onnx(tmp_path, target="onnxruntime", products="int9")
    assert not list(tmp_path.iterdir())
