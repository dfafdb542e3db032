"""Files with a key-value cache: decoding equals the program on all tokens, in both forms and targets."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.capture import capture
from loopq_compile.graph.state import attach_state, copy_graph, get_state
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from tests import token_models, zoo
from tests.decoding import captured, check_decoding, decode, ids, quantized


@pytest.mark.parametrize(
    ("form", "target"), [("unrolled", "onnxruntime"), ("rolled", "onnxruntime"), ("rolled", "qdq"), ("unrolled", "qdq")]
)
def test_quantized_files(form: str, target: str, tmp_path) -> None:
    program = quantized()
    report = export(program.graph_module, tmp_path, target=target, form=form, cache=True)
    run = OnnxExecutable(report.path, threads=1)
    check_decoding(program, run, run.signature, tolerance=1e-4)
    heads = "batch, 2, past, 16" if form == "unrolled" else "loops, batch, 2, past, 16"
    assert report.inputs[2] == f"past_key_values.0.key: FLOAT[{heads}]"
    tokens = ids(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    assert torch.equal(run.generate(tokens, 5, attention_mask=mask), program.generate(tokens, 5, attention_mask=mask))
    torch.testing.assert_close(run(tokens)["logits"], program(tokens)["logits"], rtol=1e-3, atol=1e-3)
    assert ("Loop" in report.nodes) == (form == "rolled")


def test_the_last_token_and_the_number_of_loops_of_a_rolled_file(tmp_path) -> None:
    _, program = captured("ouro-mask")
    report = export(program.graph_module, tmp_path, form="rolled", cache=True, last_token=True)
    run = OnnxExecutable(report.path, threads=1)
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for loops in (2, 4):
        model, _ = captured("ouro-mask")
        model.loops = loops
        with torch.no_grad():
            whole = model(tokens, mask).logits
        model.loops = None

        def call(loops: int = loops, **given: torch.Tensor):
            result = run(**given, loops=loops)
            assert result["present.0.key"].shape[0] == loops
            return result

        given = decode(call, run.signature, tokens, mask, [6, 1, 3], loops)
        torch.testing.assert_close(given, whole[:, [5, 6, 9]], rtol=1e-4, atol=1e-4)


def test_a_hugging_face_model(tmp_path) -> None:
    model, program = captured("llama")
    report = export(program.graph_module, tmp_path, target="onnxruntime", cache=True)
    run = OnnxExecutable(report.path, threads=1)
    check_decoding(model, run, run.signature)
    assert report.nodes["RotaryEmbedding"] == 4 * 2
    graph = onnx.load(report.path).graph
    assert [value.name for value in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    layers = len([value for value in graph.output if value.name.endswith(".key")])
    assert layers > 1
    assert f"present.0..{layers - 1}.key: FLOAT[batch, 2, past + sequence, 8]" in str(report), (
        "said once, not per layer"
    )
    sums = {
        size.dim_param for value in graph.output for size in value.type.tensor_type.shape.dim if "+" in size.dim_param
    }
    assert sums == {"past + sequence"}


@pytest.mark.parametrize("form", ["unrolled", "rolled"])
def test_a_layer_that_views_what_attention_gives(form: str, tmp_path) -> None:
    """`nn.TransformerEncoderLayer` relies on the memory layout of the fused operator's result."""
    model, program = captured("encoder-layer")
    report = export(program.graph_module, tmp_path, target="onnxruntime", form=form, cache=True)
    run = OnnxExecutable(report.path, threads=1)
    check_decoding(model, run, run.signature)


def test_rotary_embeddings_in_complex_numbers(tmp_path) -> None:
    """They pass through complex tensors, which ONNX does not have; the cache holds real ones."""
    model = token_models.Model(token_models.complex_rotary).eval()
    program = Program(Pipeline([TagLoops()]).run(capture(model, ids(2, 11))))
    report = program.export_onnx(tmp_path, target="onnxruntime", form="rolled", cache=True)
    run = OnnxExecutable(report.path, threads=1)
    check_decoding(model, run, run.signature)


def test_what_is_refused(tmp_path) -> None:
    with pytest.raises(lq.LoopQError, match="no attention"):
        export(zoo.tagged("inject-later").graph_module, tmp_path, cache=True)
    with pytest.raises(lq.LoopQError, match="cache=True"):
        export(captured("tiny")[1].graph_module, tmp_path, last_token=True)


def test_a_step_of_a_file_is_short(tmp_path) -> None:
    """ONNX Runtime makes one node of each norm, target shapes are constants, and 8-bit activations cost no nodes."""
    report = export(quantized().graph_module, tmp_path, target="onnxruntime", cache=True)
    assert "QuantizeLinear" not in report.nodes
    assert report.nodes.get("Shape", 0) < 6  # a few that all loops share
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(report.path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("SimplifiedLayerNormalization") == 9  # 3 loops of 2 norms in the block and one after it
    assert "Reciprocal" not in operators


def test_clipped_activations_keep_their_nodes(tmp_path) -> None:
    """The same scheme with clip ratios below one rounds differently from ONNX Runtime's own 8 bits."""
    program = lq.Program(copy_graph(quantized().graph_module))
    attach_state(program.graph_module, get_state(quantized().graph_module))
    name = next(n for n, _ in program.graph_module.named_buffers() if n.startswith("activation_clip"))
    owner, _, leaf = name.rpartition(".")
    clip = program.graph_module.get_buffer(name)
    setattr(program.graph_module.get_submodule(owner), leaf, 0.5 * clip)
    report = export(program.graph_module, tmp_path, target="onnxruntime")
    assert report.nodes["QuantizeLinear"] == 3  # that group's, once per loop
    run = OnnxExecutable(report.path, threads=1)
    expected = program(ids())["logits"]
    assert (run(ids())["logits"] - expected).abs().max() < 0.02 * expected.abs().max()


def test_an_integer_head(tmp_path) -> None:
    program = quantized()
    report = export(program.graph_module, tmp_path, target="onnxruntime", cache=True, head_bits=8)
    assert report.nodes["MatMulNBits"] == 3 * 4 + 1
    expected = program(ids())["logits"]
    given = OnnxExecutable(report.path, threads=1)(ids())["logits"]
    difference = (given - expected).abs().max() / expected.abs().max()
    assert 1e-5 < difference < 0.02
    with pytest.raises(lq.LoopQError, match="head_bits must be 4 or 8"):
        export(program.graph_module, tmp_path, target="qdq", head_bits=8)


@pytest.mark.parametrize(("form", "kv_bits"), [("unrolled", None), ("rolled", None), ("unrolled", 8)])
def test_a_prompt_is_read_in_parts(form: str, kv_bits: int | None, tmp_path) -> None:
    """With padding that fills the first part of a row, and a last part of a different length."""
    file = export(quantized().graph_module, tmp_path, form=form, cache=True, last_token=True, kv_bits=kv_bits).path
    run = OnnxExecutable(file, threads=1)
    tokens = ids(3, 11)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    calls: list[int] = []
    decoder = run.decoder(prefill_chunk=4)
    read = decoder.read
    decoder.read = lambda new, seen: calls.append(new.shape[1]) or read(new, seen)
    whole = run.decoder(prefill_chunk=11)
    torch.testing.assert_close(decoder(tokens, mask), whole(tokens, mask), rtol=1e-4, atol=1e-4)
    assert calls == [3, 4, 4]
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    torch.testing.assert_close(decoder(tokens[:, :1], longer), whole(tokens[:, :1], longer), rtol=1e-4, atol=1e-4)
    assert calls == [3, 4, 4, 1]
    with pytest.raises(lq.LoopQError, match="prefill_chunk must be a positive number"):
        run.generate(tokens, 1, prefill_chunk=0)
