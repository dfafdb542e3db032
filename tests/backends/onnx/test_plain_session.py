"""A file of target `qdq` is the program in a plain ONNX Runtime session, without options, at every level.

ONNX Runtime fuses weights with one reader: those before and after a loop, or of a model without a loop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from loopq_compile.backends.onnx import export
from loopq_compile.program import Program
from tests.backends.onnx.graphs import captured, quantized, tokens

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
FUSED = ("NBits", "Integer", "QLinear", "DynamicQuantize", "QGemm")
"""Parts of the names of operators that multiply integers, or might."""


class PreludeCoreCoda(nn.Module):
    """One layer before a loop, one in it, one after it, and a head: all but the loop's have one reader."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(80, 32), nn.RMSNorm(32)
        self.prelude, self.core, self.coda = (nn.Linear(32, 32, bias=bias) for _ in range(3))
        self.lm_head = nn.Linear(32, 80, bias=bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.prelude(self.embed(input_ids)))
        for _ in range(2):
            x = self.norm(x + torch.tanh(self.core(x)))
        return self.lm_head(x + self.coda(torch.relu(x)))


CASES = {
    "w4a16": {"activation_bits": 16},
    "w4a16-rows": {"activation_bits": 16, "group_size": -1},
    "w8a16": {"activation_bits": 16, "weight_bits": 8},
    "w4a8-static": {"activation_bits": 8},
    "w4a8-dynamic": {"activation_bits": 8, "activation": "dynamic"},
    "w8a8-static-tensor": {"activation_bits": 8, "weight_bits": 8, "group_size": -1, "per_tensor": True},
    "w4a4-static": {},
}


def run_at(level: str, path: Path, feed: dict[str, np.ndarray]) -> tuple[Tensor, set[str]]:
    """Logits, and the operators that ran."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(path.with_name("optimized.onnx"), load_external_data=False).graph.node
    return torch.from_numpy(session.run(None, feed)[0]), {node.op_type for node in nodes}


def distance(expected: Tensor, given: Tensor) -> float:
    return float((expected - given).abs().max() / expected.abs().max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_weights_with_one_reader(case: str, bias: bool, tmp_path: Path) -> None:
    graph_module = quantized(captured(PreludeCoreCoda(bias)), skip="nothing", **CASES[case])
    path, ids = export(graph_module, tmp_path).path, tokens(2, 9, seed=3)
    expected, feed = Program(graph_module)(ids), {"input_ids": ids.numpy()}
    for level in LEVELS:
        given, operators = run_at(level, path, feed)
        assert distance(expected, given) < 1e-5, level
        assert not [name for name in operators if any(part in name for part in FUSED)], level
    plain = onnxruntime.InferenceSession(str(path)).run(None, feed)[0]
    assert distance(expected, torch.from_numpy(plain)) < 1e-5


def test_rolled_files_with_layers_before_and_after_the_loop(tmp_path: Path) -> None:
    graph_module = quantized(captured(PreludeCoreCoda(False)), skip="nothing", activation_bits=8, shared=True)
    path, ids = export(graph_module, tmp_path, form="rolled").path, tokens(2, 9, seed=3)
    plain = onnxruntime.InferenceSession(str(path)).run(None, {"input_ids": ids.numpy(), "loops": np.array(2)})[0]
    assert distance(Program(graph_module)(ids), torch.from_numpy(plain)) < 1e-5


def test_the_reference_of_onnx(tmp_path: Path) -> None:
    graph_module = quantized(captured(PreludeCoreCoda(True)), skip="nothing", activation_bits=16)
    path, ids = export(graph_module, tmp_path).path, tokens(1, 5, seed=3)
    (given,) = ReferenceEvaluator(str(path)).run(None, {"input_ids": ids.numpy()})
    assert distance(Program(graph_module)(ids), torch.from_numpy(given)) < 1e-5
