"""Every method on float32, bfloat16, float16 and float64 models, through save, load and export."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import loopq_compile as lq
from loopq_compile import LoopQError, methods
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import copy_graph
from loopq_compile.program import Program
from tests.tiny import TinyLoopedLM, tokens

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
OTHERS = [name for name in TYPES if name != "float32"]
METHODS = sorted(methods.METHODS)
DATA = [tokens(seed, 2, 8) for seed in range(4)]
X = tokens(9, 2, 8)


@functools.cache
def model(dtype: str = "float32") -> nn.Module:
    torch.manual_seed(0)
    return TinyLoopedLM(2, 1, 32).eval().to(TYPES[dtype])


@functools.cache
def captured(dtype: str) -> Any:
    return capture(model(dtype), X)


@functools.cache
def program(dtype: str, method: str, activation: str = "dynamic", scheme: str = "w8a8", solver: str | None = None):
    options = CalibrationOptions(steps=2, weight_solver=solver, fused="off")
    parsed = Scheme.parse(scheme, activation=activation)
    return quantize(copy_graph(captured(dtype)), parsed, methods.get_pipeline(method), DATA, options)


def logits(program: Program) -> Tensor:
    return program(X)["logits"].detach()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


CASES = [(method, "dynamic") for method in METHODS]
CASES += [(method, "static") for method in ("symmetric", "spinquant", "flatquant", "flatquant-e2e", "loopq")]
"""Static scales differ from dynamic ones in the same way for similar methods."""


@pytest.mark.parametrize(("method", "activation"), CASES)
@pytest.mark.parametrize("dtype", OTHERS)
def test_every_method_gives_the_float32_program_up_to_rounding(dtype, method, activation):
    """At 8 bits integers hardly flip, so the distance is the rounding of the type; learned steps may differ a
    little."""
    found = logits(program(dtype, method, activation))
    assert found.dtype is TYPES[dtype]
    bound = {"bfloat16": 0.03, "float16": 0.02, "float64": 0.02}[dtype]
    assert error(found, logits(program("float32", method, activation))) < bound


@pytest.mark.parametrize("solver", ["rtn", "gptq", "loaq"])
@pytest.mark.parametrize("dtype", OTHERS)
def test_weight_solvers_at_four_bits(dtype, solver):
    """Integers of 4 bits flip, so the distance is compared with that of the float32 program from the model."""
    exact = model()(X)["logits"]
    whole = error(logits(program("float32", "symmetric", "dynamic", "w4a16", solver)), exact)
    assert error(logits(program(dtype, "symmetric", "dynamic", "w4a16", solver)), exact) < 1.25 * whole + 0.01


@pytest.mark.parametrize("dtype", OTHERS)
def test_the_default_method_at_four_bits(dtype):
    exact = model()(X)["logits"]
    whole = error(logits(program("float32", "loopq", "dynamic", "w4a4")), exact)
    assert error(logits(program(dtype, "loopq", "dynamic", "w4a4")), exact) < 1.5 * whole + 0.01


@pytest.mark.parametrize("method", ["quarot", "flatquant", "loopq"])
@pytest.mark.parametrize("dtype", OTHERS)
def test_a_saved_program_computes_the_same_bits(dtype, method, tmp_path):
    saved = program(dtype, method)
    saved.save(tmp_path / "p")
    assert torch.equal(logits(lq.load(tmp_path / "p")), logits(saved))


@pytest.mark.parametrize("target", ["qdq", "onnxruntime"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exported_files_compute_in_single_precision(dtype, target, tmp_path):
    made = program(dtype, "loopq")
    made.export_onnx(tmp_path / "onnx", target=target)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    found = session.run(["logits"], {"input_ids": X.numpy()})[0]
    assert found.dtype == numpy.float32
    assert error(torch.as_tensor(found), logits(made)) < (0.02 if dtype == "float32" else 0.05)
    assert {tensor.dtype for tensor in made.graph_module.parameters()} <= {TYPES[dtype]}


def test_double_precision_is_not_exported(tmp_path):
    with pytest.raises(LoopQError, match=r"computes in float64; ONNX files of this version are float32: compile model"):
        program("float64", "loopq").export_onnx(tmp_path / "onnx")


def test_a_program_in_half_precision_is_rolled_and_cached_in_its_file(tmp_path):
    program("bfloat16", "loopq").export_onnx(tmp_path / "onnx", target="onnxruntime", form="rolled", head_bits=8)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    loops = numpy.asarray(2)
    found = session.run(["logits"], {"input_ids": X.numpy(), "loops": loops})[0]
    assert error(torch.as_tensor(found), logits(program("bfloat16", "loopq"))) < 0.08


class Large(nn.Module):
    """Hidden values of 40,000 before the second linear: float16 holds them, but no rotation of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64)
        with torch.no_grad():
            self.up.bias.fill_(4e4)
            self.down.weight.mul_(1e-3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            x = torch.tanh(self.down(self.up(x)))
        return self.head(x)


@pytest.mark.parametrize("data", [None, DATA], ids=["without data", "with data"])
def test_overflow_is_named_with_the_pass_that_causes_it(data):
    large = Large().eval()
    with pytest.raises(LoopQError, match=r"Pass 'insert-transforms' .*float16 ends at 65504.*kronecker.*'down'.*loop="):
        lq.compile(large.half(), X, method="quarot", calibration=data)
    found = lq.compile(large.bfloat16(), X, method="quarot", calibration=data)
    assert found(X).isfinite().all()


def test_float16_keeps_scales_of_small_weights():
    weight = torch.randn(32, 32).mul(1e-4).half()
    codes_scale = torch.ops.loopq.dynamic_scale(weight, torch.ones(1), 32, -8)
    rounded = torch.ops.loopq.dequantize(torch.ops.loopq.quantize(weight, codes_scale, 32, -8, 7), codes_scale, 32)
    assert error(rounded, weight) < 0.15


def test_precision_goes_with_float32_and_bfloat16():
    for dtype in ("float16", "float64"):
        with pytest.raises(LoopQError, match=rf"precision='bfloat16' is for float32 models.*{dtype}"):
            quantize(
                copy_graph(captured(dtype)),
                Scheme(),
                methods.spinquant(),
                DATA,
                CalibrationOptions(steps=1, precision="bfloat16"),
            )
    options = CalibrationOptions(steps=1, precision="bfloat16", fused="off")
    made = quantize(copy_graph(captured("bfloat16")), Scheme(), methods.spinquant(), DATA, options)
    assert logits(made).isfinite().all()


def test_float8_weights_are_refused():
    stored = Large()
    stored.up.weight = nn.Parameter(stored.up.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(LoopQError, match=r"'up.weight' is stored in float8_e4m3fn.*Load the model in bfloat16"):
        lq.compile(stored, X, scheme="w4a16", method="symmetric")


class _Fails(lq.passes.Pass):
    """Before and after: nothing; it fails."""

    def call(self, graph_module):
        raise LoopQError("It failed.")


def test_an_error_after_a_phase_says_how_to_go_on_and_the_next_run_does(tmp_path):
    def run(pipeline: Any, folder: Any) -> Program:
        options = CalibrationOptions(steps=2, fused="off", checkpoint=folder)
        return quantize(copy_graph(captured("bfloat16")), Scheme(), pipeline, DATA, options)

    failing = methods.spinquant().insert_after("calibrate", _Fails())
    with pytest.raises(LoopQError, match=rf"It failed\. What was learned before is kept in {tmp_path}"):
        run(failing, tmp_path)
    assert (tmp_path / "phase-0.safetensors").is_file()
    resumed = run(methods.spinquant(), tmp_path)
    assert torch.equal(logits(resumed), logits(run(methods.spinquant(), None)))
    with pytest.raises(LoopQError, match=r"It failed\. With checkpoint='folder'"):
        run(failing, None)


@contextlib.contextmanager
def default_type(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def settings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@contextlib.contextmanager
def all_at_once():
    """Inference mode, autocast, and another default type and device."""
    meta = torch.device("meta")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), default_type(torch.bfloat16), meta:
        yield


def test_surroundings_change_nothing_and_are_left_alone():
    """With all of them on, and with parameters and data that were made in inference mode."""
    options = {"method": "flatquant", "steps": 1, "fused": "off"}
    expected = logits(lq.compile(model(), X, calibration=DATA, **options))
    with torch.inference_mode():
        made = TinyLoopedLM(2, 1, 32).eval()
        made.load_state_dict(model().state_dict())
        data = [batch.clone() for batch in DATA]
    with all_at_once():
        before = settings()
        found = lq.compile(made, X, calibration=data, **options)
        assert settings() == before
    assert torch.equal(logits(found), expected)
    assert all(p.is_inference() for p in made.parameters()), "the user's model holds its own tensors again"
    assert not any(tensor.is_inference() for tensor in found.graph_module.state_dict().values())
