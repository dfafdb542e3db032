"""Quantize a looped model of your own, look at it, export it, and run the file in ONNX Runtime.

    python examples/quantize_your_model.py --out my-model

Replace `MyLoopedModel` by your model, and `random_tokens` by token ids of text that it was trained for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import onnxruntime
import torch
from torch import Tensor, nn

import loopq_compile as lq

VOCABULARY = 128


class Block(nn.Module):
    """A gated MLP over a running mean: a causal model small enough to read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        y = self.norm(x + x.cumsum(1) / steps)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class MyLoopedModel(nn.Module):
    """Two blocks that run `loops` times over the same state."""

    def __init__(self, width: int = 64, loops: int = 3) -> None:
        super().__init__()
        self.loops = loops
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
        return self.head(x)


def random_tokens(seed: int, batch: int = 2, length: int = 24) -> Tensor:
    """Stand-in for tokenized text, `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--out", default="my-model")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = MyLoopedModel().eval()
    calibration = [random_tokens(seed) for seed in range(8)]

    # One example input tells the compiler what a call looks like; batch and sequence may have any size later.
    # Random weights have little to learn; real models deserve the default number of steps, or more.
    program = lq.compile(model, random_tokens(100), scheme=options.scheme, calibration=calibration, steps=30)
    print(program.summary())
    print(f"The model runs {program.loops.count} loops: {program.loops.describe()}")

    ids = random_tokens(101, batch=1, length=40)
    with torch.no_grad():
        expected = model(ids)
    error = (program(ids) - expected).norm() / expected.norm()
    print(f"relative error of the quantized program: {error:.3f}")

    program.save(f"{options.out}/program")  # lq.load() reads it
    report = program.export_onnx(f"{options.out}/onnx")
    print(report)

    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    difference = (torch.from_numpy(logits) - program(ids)).abs().max()
    print(f"largest difference between ONNX Runtime and the program: {difference:.2e}")


if __name__ == "__main__":
    main()
