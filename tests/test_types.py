"""Every method on float32, bfloat16, float16 and float64 models, through save, load and export."""

from __future__ import annotations

import copy
import functools
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile import LoopQError, pipelines
from loopq_compile.capture import capture
from loopq_compile.driver import quantize
from loopq_compile.options import CalibrationOptions
from loopq_compile.program import Program
from loopq_compile.scheme import Scheme
from loopq_compile.state import copy_graph
from tests.tiny import TinyLoopedLM, tokens

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
OTHERS = [name for name in TYPES if name != "float32"]
METHODS = sorted(pipelines.METHODS)
DATA = [tokens(seed, 2, 8) for seed in range(4)]
X = tokens(9, 2, 8)


@functools.cache
def model(dtype: str = "float32") -> nn.Module:
    torch.manual_seed(0)
    return TinyLoopedLM(3, 1, 32).eval().to(TYPES[dtype])


@functools.cache
def captured(dtype: str) -> Any:
    return capture(model(dtype), X)


@functools.cache
def program(dtype: str, method: str, activation: str = "dynamic", scheme: str = "w8a8", solver: str | None = None):
    options = CalibrationOptions(steps=2, weight_solver=solver, fused="off")
    parsed = Scheme.parse(scheme, activation=activation)
    return quantize(copy_graph(captured(dtype)), parsed, pipelines.get_pipeline(method), DATA, options)


def logits(program: Program) -> Tensor:
    return program(X)["logits"].detach()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def learned(method: str) -> bool:
    return method not in ("symmetric", "smoothquant", "quarot", "las")


@pytest.mark.parametrize("activation", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", OTHERS)
def test_every_method_gives_the_float32_program_up_to_rounding(dtype, method, activation):
    """At 8 bits integers hardly flip, so the distance is what the type rounds; learned steps may differ a little."""
    found = logits(program(dtype, method, activation))
    assert found.dtype is TYPES[dtype]
    bound = {"bfloat16": 0.03, "float16": 0.02, "float64": 0.02}[dtype]
    assert error(found, logits(program("float32", method, activation))) < bound


@pytest.mark.parametrize("solver", ["rtn", "gptq", "loaq"])
@pytest.mark.parametrize("dtype", OTHERS)
def test_weight_solvers_at_four_bits(dtype, solver):
    """Integers of 4 bits flip, so the distance is held against that of the float32 program to the model."""
    exact = model()(X)["logits"]
    whole = error(logits(program("float32", "symmetric", "dynamic", "w4a16", solver)), exact)
    assert error(logits(program(dtype, "symmetric", "dynamic", "w4a16", solver)), exact) < 1.25 * whole + 0.01


@pytest.mark.parametrize("dtype", OTHERS)
def test_the_default_method_at_four_bits(dtype):
    exact = model()(X)["logits"]
    whole = error(logits(program("float32", "loopq", "dynamic", "w4a4")), exact)
    assert error(logits(program(dtype, "loopq", "dynamic", "w4a4")), exact) < 1.5 * whole + 0.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", OTHERS)
def test_a_saved_program_computes_the_same_bits(dtype, method, tmp_path):
    saved = program(dtype, method)
    saved.save(tmp_path / "p")
    assert torch.equal(logits(lq.load(tmp_path / "p")), logits(saved))


@pytest.mark.parametrize("target", ["qdq", "onnxruntime"])
@pytest.mark.parametrize("dtype", TYPES)
def test_exported_files_run_or_are_refused_in_one_line(dtype, target, tmp_path):
    for method in ("symmetric", "loopq"):
        made = program(dtype, method)
        if dtype == "float64":
            with pytest.raises(LoopQError, match="float64"):
                made.export_onnx(tmp_path / method, target=target)
            continue
        made.export_onnx(tmp_path / method, target=target)
        session = onnxruntime.InferenceSession(str(tmp_path / method / "model.onnx"))
        found = session.run(["logits"], {"input_ids": X.numpy()})[0]
        assert error(torch.as_tensor(found).float(), logits(made)) < (0.02 if dtype == "float32" else 0.05)
