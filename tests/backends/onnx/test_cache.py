"""Files with a key-value cache: decoding equals the program on all tokens, in both forms and targets."""

from __future__ import annotations

import onnx
import pytest
import torch

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable, export
from tests import zoo
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
    graph = onnx.load(report.path).graph
    assert [value.name for value in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]


def test_what_is_refused(tmp_path) -> None:
    with pytest.raises(lq.LoopQError, match="no attention"):
        export(zoo.tagged("inject-later").graph_module, tmp_path, cache=True)
    with pytest.raises(lq.LoopQError, match="cache=True"):
        export(captured("tiny")[1].graph_module, tmp_path, last_token=True)
