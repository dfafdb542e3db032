"""What holds for every reference model: the loop found, the w4a4 program, its ONNX file, dynamic shapes, sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.capture.to_graph import capture
from loopq_compile.models import (
    Huginn,
    HuginnConfig,
    LoopFormer,
    LoopFormerConfig,
    Nanbeige,
    NanbeigeConfig,
    Ouro,
    OuroConfig,
    Parcae,
    ParcaeConfig,
)
from loopq_compile.program import Program
from tests.looped_models import HUGINN, LOOPFORMER, NANBEIGE, OURO, PARCAE, VOCABULARY, with_random_weights

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ouro": (lambda: Ouro(OURO), "3 x (model.layers, model.norm, model.early_exit_gate)"),
    "loopformer": (lambda: LoopFormer(LOOPFORMER, (0.5, 0.3, 0.2)), "3 x (dt_embedder, transformer.h)"),
    "parcae": (lambda: Parcae(PARCAE), "3 x (transformer.adapter, transformer.core_block)"),
    "huginn": (lambda: Huginn(HUGINN), "3 x (transformer.adapter, transformer.core_block)"),
    "nanbeige": (lambda: Nanbeige(NANBEIGE), "2 x (model.layers, model.norm)"),
}
"""Tiny models, with the structure that must be found."""


def ids(batch: int, length: int) -> Tensor:
    """Token ids `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(output: object) -> Tensor:
    """The logits of a model that returns them alone or with other results."""
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Every tiny model, with its name."""
    return request.param, with_random_weights(MODELS[request.param][0]())


def test_the_captured_graph_equals_the_model_at_every_size(model: tuple[str, nn.Module]) -> None:
    program = Program(capture(model[1], ids(2, 12)))
    for batch, length in ((2, 12), (1, 1), (3, 20)):
        with torch.no_grad():
            expected = logits(model[1](ids(batch, length)))
        torch.testing.assert_close(logits(program(ids(batch, length))), expected, rtol=1e-4, atol=1e-4)


def test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree(model: tuple[str, nn.Module], tmp_path) -> None:
    """Tolerance: 3 % of the largest logit and 0.3 % in the mean, as for all small random models."""
    name, module = model
    program = lq.compile(module, ids(2, 12), scheme="w4a4", method="symmetric")
    assert program.loops.describe() == MODELS[name][1]
    runs = {
        form: OnnxExecutable(program.export_onnx(tmp_path / form, form=form).path, threads=1)
        for form in ("unrolled", "rolled")
    }
    assert "loops" in runs["rolled"].input_names
    for batch, length in ((2, 12), (1, 20)):
        expected = logits(program(ids(batch, length)))
        with torch.no_grad():
            exact = logits(module(ids(batch, length)))
        assert 1e-3 < (expected - exact).abs().mean() / exact.abs().mean() < 1  # it is quantized, but not noise
        for form, run in runs.items():
            difference = (logits(run(ids(batch, length))) - expected).abs()
            assert difference.max() < 3e-2 * expected.abs().max(), form
            assert difference.mean() < 3e-3 * expected.abs().mean(), form


@pytest.mark.parametrize(
    ("make", "billions"),
    [
        (lambda: Ouro(OuroConfig.ouro_1_4b()), 1.435),
        (lambda: Ouro(OuroConfig.ouro_2_6b()), 2.668),
        (lambda: Huginn(HuginnConfig()), 3.565),
        (lambda: LoopFormer(LoopFormerConfig()), 0.278),
        (lambda: Nanbeige(NanbeigeConfig()), 4.170),
        (lambda: Parcae(ParcaeConfig.published("140m")), 0.144),
        (lambda: Parcae(ParcaeConfig.published("370m")), 0.388),
        (lambda: Parcae(ParcaeConfig.published("770m")), 0.777),
        (lambda: Parcae(ParcaeConfig.published("1.3b")), 1.339),
    ],
    ids=[
        "ouro-1.4b",
        "ouro-2.6b",
        "huginn",
        "loopformer",
        "nanbeige",
        "parcae-140m",
        "parcae-370m",
        "parcae-770m",
        "parcae-1.3b",
    ],
)
def test_published_sizes(make: Callable[[], nn.Module], billions: float) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make().parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=5e-4)
