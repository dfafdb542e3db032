"""Speculation with exported files: the same tokens, caches of all kinds cut back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.errors import LoopQError
from loopq_compile.generation.speculation import Speculation
from tests.decoding import captured, ids

PROMPT = ids(1, 7).repeat(1, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "rolled"}, {"target": "onnxruntime", "form": "rolled", "kv_bits": 8}],
    ids=["unrolled", "rolled", "rolled int8 cache"],
)
def test_the_same_tokens_in_fewer_steps(options: dict[str, Any], tmp_path: Path) -> None:
    run = OnnxExecutable(captured("tiny")[1].export_onnx(tmp_path, cache=True, **options).path, threads=1)
    speculation = Speculation("lookup")
    for prompt in (PROMPT, PROMPT.flip(1)):
        assert torch.equal(run.generate(prompt, 24, speculate=speculation), run.generate(prompt, 24))
        assert speculation.steps < 23 and speculation.accepted > 0
    sampled, speculation = {"do_sample": True, "seed": 3}, Speculation("auto")
    found = run.generate(PROMPT, 24, speculate=speculation, **sampled)
    assert torch.equal(found, run.generate(PROMPT, 24, **sampled))
    assert speculation.accepted < speculation.proposed, "some caches were cut back"
    with pytest.raises(LoopQError, match="a file runs all its loops"):
        run.generate(PROMPT, 4, speculate="loops")


def test_a_file_without_all_logits_is_refused(tmp_path: Path) -> None:
    made = captured("tiny")[1].export_onnx(tmp_path, cache=True, last_token=True)
    with pytest.raises(LoopQError, match="last_token=False"):
        OnnxExecutable(made.path, threads=1).generate(PROMPT, 24, speculate="lookup")
