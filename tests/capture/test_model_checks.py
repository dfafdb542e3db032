"""Models that cannot become programs are refused with one line that says what to do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile import LoopQError
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.graph.scheme import Scheme
from loopq_compile.methods import get_pipeline
from tests.small_models import IDS, Small, captured, ids, same


@pytest.mark.parametrize(
    "draw",
    [
        lambda self, x: x + torch.randn_like(x),
        lambda self, x: x + torch.rand(16),
        lambda self, x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda self, x: F.dropout(x, 0.1),
        lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    ],
    ids=["randn", "rand", "bernoulli", "dropout", "attention"],
)
def test_random_numbers_are_refused_with_the_line_that_draws_them(draw: Callable[[Small, Tensor], Tensor]) -> None:
    with pytest.raises(LoopQError, match=r"draws random numbers .*forward return self.lm_head.* make it an input"):
        quantize(capture(Small(draw), IDS), Scheme.parse("w8a8"), get_pipeline("smoothquant"), [IDS])


@pytest.mark.parametrize(
    "calm",
    [
        lambda self, x: self.drop(x),
        lambda self, x: F.dropout(x, 0.0),
        lambda self, x: F.dropout(x, 0.1, training=self.training),
        lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0),
    ],
    ids=["module", "rate-0", "evaluation", "attention"],
)
def test_operators_that_could_draw_and_do_not_are_fine(calm: Callable[[Small, Tensor], Tensor]) -> None:
    model = Small(calm)
    same(captured(model), model, ids(3, 5))


def test_lazy_weights_are_refused_by_name() -> None:
    model = Small()
    model.lm_head = nn.LazyLinear(64)  # type: ignore[assignment]
    with pytest.raises(LoopQError, match=r"'lm_head\.weight' has no shape yet .* run the model once"):
        capture(model, IDS)


def test_weights_that_another_library_quantized_are_refused_by_name() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = Small()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(LoopQError, match=r"'linear\.weight' is a \w+ of torchao: already quantized"):
        capture(model, IDS)


def test_a_failed_capture_prints_nothing_beside_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    def branch(self: Small, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(LoopQError, match=r"control flow depends on tensor values"):
        capture(Small(branch), IDS)
    captured_text = capfd.readouterr()
    assert captured_text.out == captured_text.err == ""


def test_programs_are_copied_and_not_pickled() -> None:
    program = captured(Small())
    for copied in (copy.deepcopy(program), copy.copy(program)):
        torch.testing.assert_close(copied(IDS), program(IDS))
    with pytest.raises(LoopQError, match=r"cannot be pickled.*program\.save\(folder\)"):
        pickle.dumps(program)
