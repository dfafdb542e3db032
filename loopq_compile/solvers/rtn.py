"""The grid to which weights are rounded, and rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loopq_compile.calibration.ranges import rounding_errors, weight_ratios
from loopq_compile.operators.quantize import peak


@dataclass(frozen=True)
class Grid:
    """The values a quantized weight `[outputs, inputs]` can take: `code * scale`, `q_min <= code <= q_max`.

    Args:
        scale: `[outputs, inputs / size]`, float32, not zero.
        size: neighbouring inputs that share a scale.
        q_min, q_max: range of the integers.
    """

    scale: Tensor
    size: int
    q_min: int
    q_max: int

    @property
    def steps(self) -> Tensor:
        """The scale of every weight, `[outputs, inputs]`."""
        return self.scale.repeat_interleave(self.size, dim=1)

    @property
    def limit(self) -> int:
        """The limit as in `dynamic_scale`: negative if scales have signs."""
        return self.q_min if bool((self.scale < 0).any()) else self.q_max

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes of the grid points nearest to `weight`, as `loopq::quantize` rounds; floats `[outputs, inputs]`."""
        return (weight / self.steps).round_().clamp_(self.q_min, self.q_max)

    def values(self, codes: Tensor) -> Tensor:
        """The weights that `codes` represent."""
        return codes * self.steps

    def scaled(self, scale: Tensor) -> Grid:
        """The same integers with other scales."""
        return replace(self, scale=scale)


def searched(weight: Tensor, importance: Tensor, grid: Grid) -> Grid:
    """`grid` with the range of each group that rounds its weights best, measured by outputs.

    Tries ranges from the largest magnitude of a group down to half of it, and the scale of `grid`. The error is
    `Σ_j importance_j (w_j - q_j)²`, the output error if inputs were uncorrelated.

    Args:
        weight: `[outputs, inputs]`.
        importance: `[inputs]`, the diagonal of the Hessian.
        grid: the initial integers and scales.
    """
    groups, weights = weight.unflatten(1, (-1, grid.size)), importance.view(-1, grid.size)
    limit = grid.limit
    full = peak(groups, limit) / limit
    best, least = grid.scale, torch.full_like(grid.scale, torch.inf)
    for scale in (grid.scale, *(full * ratio for ratio in weight_ratios(limit, grid.q_max))):
        scale = torch.where(scale != 0, scale, grid.scale)
        error = rounding_errors(groups, scale, weights, grid.q_min, grid.q_max)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return grid.scaled(best)
