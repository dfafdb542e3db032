"""Exported files in OpenVINO, compared with ONNX Runtime and the program: another reader of the same operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import loopq_compile as lq
from loopq_compile.graph.texts import logits_of
from tests.decoding import ids, ouro

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("target", ["onnxruntime", "qdq"])
def test_logits_are_those_of_the_program(target: str, tmp_path: Path) -> None:
    """Rotary positions, grouped queries, 4-bit weights. On some processors OpenVINO would compute in bfloat16 and round
    activations to 8 bits, unless it is told not to."""
    program = lq.compile(ouro().eval(), ids(2, 6), scheme="w4a16", method="symmetric")
    path, tokens = program.export_onnx(tmp_path, target=target).path, ids(2, 9)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {"input_ids": tokens.numpy()}
    in_onnxruntime = session.run(["logits"], feed)[0]
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(str(path), "CPU", exact)
    in_openvino = compiled(feed)[compiled.output("logits")]
    expected = logits_of(program(tokens)).detach().numpy()
    for given in (in_onnxruntime, in_openvino):
        assert np.abs(given - expected).max() < 1e-5 * np.abs(expected).max()
