"""Calling an exported file like the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from loopq_compile.backends.onnx import OnnxExecutable, export, lower
from loopq_compile.errors import LoopQError
from tests.backends.onnx.graphs import Recurrent, captured, quantized, tokens


class Container(Recurrent):
    """Returns a tensor twice, an input, a weight and a plain value."""

    def forward(self, input_ids: Tensor) -> dict:
        logits = super().forward(input_ids)
        return {"logits": logits, "more": (logits, input_ids, None), "gain": self.norm.weight, "loops": self.loops}


@dataclass
class Unregistered:
    logits: Tensor
    gate: Tensor


@pytest.fixture(scope="module")
def executable():
    return lower(quantized(captured(Recurrent())), threads=1)


def test_structure_constants_and_shared_results(tmp_path) -> None:
    graph_module = captured(Container())
    report = export(graph_module, tmp_path)
    run = OnnxExecutable(report.path, threads=1)
    x = tokens(2, 5)
    result = run(x)
    assert run.output_names == ["logits", "more.1", "gain"]
    assert list(result) == ["logits", "more", "gain", "loops"]
    assert result["loops"] == 2
    assert result["more"][2] is None
    assert result["more"][0] is result["logits"]
    assert torch.equal(result["more"][1], x)
    assert torch.allclose(result["logits"], graph_module(x)[0], atol=1e-5)


def test_a_class_that_the_reader_does_not_know(tmp_path) -> None:
    class Odd(Recurrent):
        def forward(self, input_ids: Tensor) -> Unregistered:
            logits = super().forward(input_ids)
            return Unregistered(logits, logits.mean(-1))

    pytree.register_dataclass(Unregistered)
    run = OnnxExecutable(export(captured(Odd()), tmp_path).path, threads=1)
    assert run.output_names == ["logits", "gate"]
    result = run(tokens(2, 5))
    assert set(result) == {"logits", "gate"}, "a dict by field names stands in"
    assert result["logits"].shape == (2, 5, 80)


def test_numpy_in_numpy_out_and_keywords(executable) -> None:
    x = tokens(2, 5)
    by_keyword = executable(input_ids=x)
    as_numpy = executable(x.numpy())
    assert isinstance(as_numpy, np.ndarray)
    assert np.array_equal(by_keyword.numpy(), as_numpy)
    assert torch.equal(executable(x.int()), by_keyword)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 5),), "type"),
        ((tokens(2, 5)[0],), "unsqueeze"),
        ((), "missing"),
        (([1, 2],), "must be a tensor"),
        ((tokens(2, 5) + 1000,), "ONNX Runtime failed"),
    ],
)
def test_wrong_inputs(arguments, message, executable) -> None:
    with pytest.raises(LoopQError, match=message):
        executable(*arguments)


def test_files_that_cannot_be_opened(tmp_path) -> None:
    with pytest.raises(LoopQError, match="does not exist"):
        OnnxExecutable(tmp_path / "model.onnx")
    with pytest.raises(LoopQError, match=r"no \.onnx"):
        OnnxExecutable(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(LoopQError, match="damaged"):
        OnnxExecutable(tmp_path)


def test_a_foreign_file_and_missing_weights(tmp_path) -> None:
    report = export(captured(Recurrent()), tmp_path, external_data_threshold=0)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(LoopQError, match=r"model\.onnx\.data cannot be read: No such file"):
        OnnxExecutable(report.path)
    identity = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) {y = Identity(x)}'
    )
    onnx.save(identity, tmp_path / "model.onnx")
    with pytest.raises(LoopQError, match="not written by loopq_compile"):
        OnnxExecutable(report.path)


def test_options(tmp_path) -> None:
    path = export(captured(Recurrent()), tmp_path).path
    with pytest.raises(LoopQError, match="threads"):
        OnnxExecutable(path, threads=0)
    with pytest.raises(LoopQError, match="NoSuchProvider"):
        OnnxExecutable(path, providers=["NoSuchProvider"])
