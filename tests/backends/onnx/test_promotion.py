"""Casts that PyTorch's operators make themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.capture import capture


class Mixed(nn.Module):
    """Whole numbers, truth values, sizes and fractions in one expression each."""

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        real, place = ids > 3, torch.arange(ids.shape[1])
        weights = torch.where(real, ids, 0.5)
        return (
            ids / 2,
            ids * 0.25 + place,
            (real.sum(1) + real.cumsum(1)[:, -1]) / ids.shape[1],
            place / ids.shape[1] * weights,
            torch.sin(place) + torch.exp(ids % 3),
            torch.cat([ids, ids * 0.1], 1),
            torch.stack([real, ids], -1),
            (ids > 2.5) & (place >= ids) | (real == place),
            torch.pow(place, 0.5) + torch.clamp(ids, max=7.5),
            ids.masked_fill(real, -1) + real,
            ids.float().mean(1) * ids.shape[0],
        )


def test_results_and_types_are_those_of_pytorch(tmp_path) -> None:
    model = Mixed()
    ids = torch.randint(0, 12, (2, 6), generator=torch.Generator().manual_seed(0))
    run = OnnxExecutable(export(capture(model, ids), tmp_path).path, threads=1)
    for batch, length in ((2, 6), (3, 1), (1, 9)):
        ids = torch.randint(0, 12, (batch, length), generator=torch.Generator().manual_seed(length))
        for given, expected in zip(run(ids), model(ids), strict=True):
            assert given.dtype is expected.dtype
            torch.testing.assert_close(given, expected)
