"""What `inspect` reports about a model before anything is compiled."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from loopq_compile.analysis.feasibility import feasibility
from loopq_compile.capture import capture
from loopq_compile.cli import app
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program
from tests.tiny import tiny_model, tokens


def tried(model: nn.Module) -> tuple[Program, dict[str, str | None], list[str]]:
    program = Program(Pipeline([TagLoops()]).run(capture(model, (tokens(),))))
    found = feasibility(program)
    return program, found.obstacles, found.describe()


def test_a_model_that_works() -> None:
    program, obstacles, lines = tried(tiny_model())
    assert obstacles == {"quantization": None, "key-value cache": None, "rolled form": None}
    assert lines[0] == "w4a4 would quantize 7 of 9 products, 36,864 weights"
    assert "exit_gate stays in floating point: a gate with 1 output" in lines
    assert program.scheme is None and [entry.pass_name for entry in program.log] == ["tag-loops"]


class Backwards(nn.Module):
    """Mixes tokens, and each loop does something different."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.extra = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for loop in range(3):
            x = torch.tanh(self.layer(x.flip(1)))
            x = self.extra(x) if loop == 1 else x
        return x


def test_what_stands_in_the_way() -> None:
    _, obstacles, lines = tried(Backwards())
    assert obstacles["quantization"] is None
    assert "no attention" in str(obstacles["key-value cache"])
    assert obstacles["rolled form"]
    assert any(line.startswith("key-value cache: This model has no attention") for line in lines)


def test_nothing_to_quantize() -> None:
    model = nn.Sequential(nn.Embedding(64, 16), nn.LayerNorm(16)).eval()
    _, obstacles, lines = tried(model)
    assert "nothing to quantize" in str(obstacles["quantization"]) and lines[0].startswith("w4a4 would quantize 0 of 0")


def test_the_command(tmp_path: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["inspect", "bundled", "--json"]).stdout)["feasibility"]
    assert len(found["quantized"]) == 21 and found["obstacles"]["rolled form"] is None
