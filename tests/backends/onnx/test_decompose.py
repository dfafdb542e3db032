"""Operators written with those that torch.onnx knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.capture import capture


class Attention(nn.Module):
    """Attention over tensors with `axes` axes before the sequence, under a mask of `masked` axes (0: none)."""

    def __init__(self, axes: int, masked: int) -> None:
        super().__init__()
        self.axes, self.masked, self.embed = axes, masked, nn.Embedding(64, 24)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        batch, length = input_ids.shape
        if self.axes == 3:
            x = x.view(batch, length, 2, 3, 4).permute(0, 2, 3, 1, 4)
        mask = torch.ones(length, length, dtype=torch.bool).tril() if self.masked else None
        if mask is not None and self.masked > 2:
            real = (input_ids > 3).view(batch, *[1] * (self.masked - 2), length)
            mask = mask & real | torch.eye(length, dtype=torch.bool)
        return F.scaled_dot_product_attention(x, x * 2, x + 1, mask, is_causal=mask is None)


@pytest.mark.parametrize(("axes", "masked"), [(1, 0), (1, 2), (1, 3), (3, 0), (3, 5)])
def test_attention_of_any_rank(axes: int, masked: int, tmp_path) -> None:
    torch.manual_seed(0)
    model = Attention(axes, masked).eval()
    ids = torch.randint(0, 64, (2, 7))
    run = OnnxExecutable(export(capture(model, ids), tmp_path).path, threads=1)
    for batch, length in ((2, 7), (3, 1), (1, 12)):
        ids = torch.randint(0, 64, (batch, length))
        torch.testing.assert_close(run(ids), model(ids), rtol=1e-5, atol=1e-5)
