"""Token ids are enough to measure and calibrate a program, even one that takes a mask, positions or token types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopq_compile as lq
from loopq_compile.analysis.report.measure import measure
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.capture.to_graph import capture
from loopq_compile.evaluation.perplexity import evaluate
from loopq_compile.program import Program

BESIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": torch.ones_like,
    "position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids),
    "token_type_ids": torch.zeros_like,
}
"""The other inputs for a text without padding."""
SIZES: dict[str, Any] = {"length": 16, "stride": 8, "batch": 2}


class Looped(nn.Module):
    """A layer that runs twice; without masks, positions and types they are those of a text without padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place, self.kind = nn.Embedding(64, 32), nn.Embedding(64, 32), nn.Embedding(2, 32)
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "token_type_ids": token_type_ids}
        mask, place, kind = (BESIDE[name](input_ids) if value is None else value for name, value in given.items())
        x = self.embed(input_ids) + self.place(place) + self.kind(kind)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for _ in range(2):
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)  # one head
            seen = nn.functional.scaled_dot_product_attention(q, k, v, causal & (mask != 0)[:, None, None])
            x = x + self.out(seen.squeeze(1))
        return self.head(x)


def ids(batch: int, length: int) -> Tensor:
    """Token ids `[batch, length]`."""
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def called(beside: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """`tokens` and the other inputs, by name."""
    return {"input_ids": tokens} | {name: BESIDE[name](tokens) for name in beside}


@pytest.mark.parametrize("beside", [["attention_mask"], ["attention_mask", "position_ids"], list(BESIDE)], ids=len)
def test_ids_give_the_perplexity_of_the_program_without_a_mask(beside: list[str]) -> None:
    plain, full = (Program(capture(Looped().eval(), called(names, ids(2, 11)))) for names in ([], beside))
    expected, found = evaluate(plain, ids(1, 45), **SIZES), evaluate(full, ids(1, 45), teacher=plain, **SIZES)
    assert found.nll == pytest.approx(expected.nll, abs=1e-5)
    assert found.kl == pytest.approx(0, abs=1e-5) and found.agreement == 1.0


def test_ids_are_enough_to_calibrate_report_and_export(tmp_path: Path) -> None:
    model, names = Looped().eval(), list(BESIDE)
    options: dict[str, Any] = {"scheme": "w8a8", "method": "smoothquant", "activation": "static"}
    program, same = (
        lq.compile(model, called(names, ids(2, 11)), calibration=[batch], **options)
        for batch in (ids(2, 12), called(names, ids(2, 12)))
    )
    assert torch.equal(program(**called(names, ids(1, 20))), same(**called(names, ids(1, 20))))
    expected, found = evaluate(model, ids(1, 45), **SIZES), evaluate(program, ids(1, 45), **SIZES)
    assert 0 < abs(found.nll - expected.nll) < 0.05
    values = measure(program, model, [ids(2, 12)], samples=1)
    assert values["fidelity"]["tokens"] == 24 and values["modules"] and len(values["samples"]) == 1
    run = OnnxExecutable(program.export_onnx(tmp_path).path, threads=1)
    assert evaluate(run, ids(1, 45), **SIZES).nll == pytest.approx(found.nll, abs=1e-3)
