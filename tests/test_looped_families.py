"""Looped models as others write them: the parameter-golf records (restated), Dory and HRM-Text of transformers.

Each is captured unchanged, its loop is found, its w4a4 program runs, is exported, and decodes with a key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from loopq_compile import LoopQError
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import copy_graph, get_state
from loopq_compile.graph.texts import logits_of
from loopq_compile.methods import get_pipeline
from loopq_compile.program import Program
from tests.decoding import check_decoding
from tests.golf import GolfLM
from tests.looped_models import dory, hrm_text
from tests.test_public_models import differences, ids

SIZES = ((2, 11), (1, 1), (3, 30))


class Family(NamedTuple):
    """How a tiny model is made, whether it needs an example, its loop, and why it is not rolled (empty if it is)."""

    make: Callable[[], nn.Module]
    example: Any
    structure: str
    count: int
    not_rolled: str


FAMILIES = {
    "golf": Family(GolfLM, ids(2, 11), "3 x (layers.1, layers.2, skips, gates)", 3, "is not like the others"),
    "dory": Family(dory, None, "3 x (model.layers.1, model.layers.2)", 3, ""),
    "hrm-text": Family(hrm_text, None, "2 x (model.H_module, 2 x (model.L_module))", 2, ""),
}


Made = tuple[Family, nn.Module, Program, Program]
"""A family, its model, its program as captured and its program in w4a4."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Made:
    """Captured after a call, as in practice: tables that the model keeps are already computed."""
    family: Family = FAMILIES[request.param]
    model = family.make().eval()
    with torch.no_grad():
        model(ids(2, 11))
    captured = Program(capture(model, family.example))
    program = quantize(copy_graph(captured.graph_module), Scheme.parse("w4a4"), get_pipeline("symmetric"))
    return family, model, captured, program


def exact(model: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    """The model's own logits."""
    with torch.no_grad():
        return logits_of(model(ids(*size)))


def test_the_captured_graph_equals_the_model(family: Made) -> None:
    _, model, captured, _ = family
    for size in SIZES:
        torch.testing.assert_close(logits_of(captured(ids(*size))), exact(model, size), rtol=1e-5, atol=1e-5)


def test_the_loop_is_found_and_the_w4a4_program_is_near(family: Made) -> None:
    expected, model, _, program = family
    assert program.loops.describe() == expected.structure
    assert program.loops.count == expected.count
    for size in SIZES:
        distance = (logits_of(program(ids(*size))) - exact(model, size)).norm() / exact(model, size).norm()
        assert 1e-4 < distance < 0.6  # HRM-Text adds small changes to a large state


def test_unrolled_onnx(family: Made, tmp_path: Path) -> None:
    assert max(differences(family[3], tmp_path, form="unrolled")) < 3e-2


def test_rolled_onnx(family: Made, tmp_path: Path) -> None:
    expected, _, _, program = family
    if expected.not_rolled:
        with pytest.raises(LoopQError, match=expected.not_rolled):
            program.export_onnx(tmp_path, form="rolled")
    else:
        assert max(differences(program, tmp_path, form="rolled")) < 3e-2


def test_decoding_with_a_cache(family: Made) -> None:
    expected, model, captured, _ = family
    cached = captured.with_cache()
    check_decoding(model, cached, get_state(cached.graph_module).signature, loops=expected.count)


def test_generate(family: Made) -> None:
    program, tokens = family[3], ids(2, 5)
    expected = tokens
    for _ in range(4):
        expected = torch.cat([expected, logits_of(program(expected))[:, -1:].argmax(-1)], 1)
    assert torch.equal(program.generate(tokens, 4), expected)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(program.as_hugging_face().generate(tokens, **options), expected)


def test_a_gate_that_adds_the_token_before_has_no_cache() -> None:
    """Some of the records have one; a decoder would have to keep the last embedding."""
    program = Program(capture(GolfLM((0, 1, 1, 2), smear=True).eval(), ids(2, 11)))
    with pytest.raises(LoopQError, match="It works along the sequence"):
        program.with_cache()
