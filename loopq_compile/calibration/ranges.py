"""Activation statistics of constant size, and the ranges derived from them.

A tensor's magnitudes are counted in logarithmic bins, 16 per octave from 2^-24 to 2^24. Any number of batches can then
be merged by addition, and the range of least squared rounding error can be found without the data. For dynamic scales
the rounding error of a fixed list of clip ratios is summed directly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopq_compile.calibration import distributed
from loopq_compile.graph.device import CPU
from loopq_compile.graph.scheme import quantized_range
from loopq_compile.operators.fusion import fused
from loopq_compile.operators.quantize import bounded, peak

BINS_PER_OCTAVE = 16
_OCTAVES = (-24, 24)
BINS = BINS_PER_OCTAVE * (_OCTAVES[1] - _OCTAVES[0])
CLIP_RATIOS = tuple(1.0 - 0.025 * i for i in range(21))
"""Candidates for dynamic clip ratios, 1 down to 0.5."""
_CHUNK = 1 << 22
_CLIP_TOKENS = 256
"""Clip ratios are tried on about this many tokens of an update, since trying them costs far more than counting."""


def _upper_edges(device: torch.device) -> Tensor:
    exponents = torch.arange(1, BINS + 1, dtype=torch.float64, device=device) / BINS_PER_OCTAVE + _OCTAVES[0]
    return torch.exp2(exponents)


@dataclass
class Statistics:
    """What is known of one activation tensor, per group of features.

    Args:
        largest: largest magnitude, `[G]`.
        counts: histogram of magnitudes, `[G, BINS]`; magnitudes below 2^-24 fall into the first bin.
        clip_errors: summed squared rounding error with dynamic scales for each of `CLIP_RATIOS`, `[C, G]`.
        tokens: number of tokens seen.
    """

    largest: Tensor
    counts: Tensor
    clip_errors: Tensor
    tokens: int = 0

    @staticmethod
    def empty(groups: int, device: torch.device = CPU) -> Statistics:
        """Empty statistics for `groups` groups of activations on `device`."""
        errors = torch.zeros(len(CLIP_RATIOS), groups, dtype=torch.float64, device=device)
        return Statistics(torch.zeros(groups, device=device), torch.zeros(groups, BINS, device=device), errors)

    def update(self, x: Tensor, group_size: int, bits: int, limit: int) -> None:
        """Adds the activations `x`, `[..., K]`, measured for integers of `bits` bits; `limit` as in `dynamic_scale`."""
        rows = x.detach().reshape(-1, x.shape[-1] // group_size, group_size).float()
        self.tokens += rows.shape[0]
        for part in rows.split(max(1, _CHUNK // x.shape[-1])):
            self._count(part.abs())
        self._add_clip_errors(rows[:: max(1, rows.shape[0] // _CLIP_TOKENS)], quantized_range(bits), limit)

    def _count(self, magnitudes: Tensor) -> None:
        self.largest = torch.maximum(self.largest, magnitudes.amax(dim=(0, 2)))
        bins = torch.log2(magnitudes).sub_(_OCTAVES[0]).mul_(BINS_PER_OCTAVE).clamp_(0, BINS - 1).long()
        offsets = torch.arange(bins.shape[1], device=bins.device).unsqueeze(-1) * BINS
        counted = torch.bincount((bins + offsets).flatten(), minlength=self.counts.numel())
        self.counts += counted.view_as(self.counts)

    def _add_clip_errors(self, x: Tensor, limits: tuple[int, int], limit: int) -> None:
        largest = peak(x, limit).unsqueeze(-1)
        for i, ratio in enumerate(CLIP_RATIOS):
            scale = bounded(largest * (ratio / limit))
            error = (x / scale).round_().clamp_(*limits).mul_(scale).sub_(x)
            self.clip_errors[i] += error.square_().sum(dim=2).sum(dim=0, dtype=torch.float64)

    def merged(self, other: Statistics) -> Statistics:
        """The sum of both statistics."""
        return Statistics(
            torch.maximum(self.largest, other.largest),
            self.counts + other.counts,
            self.clip_errors + other.clip_errors,
            self.tokens + other.tokens,
        )

    def merge(self) -> None:
        """Adds what all other processes have measured."""
        tokens = torch.tensor(self.tokens, device=self.counts.device)
        distributed.largest([self.largest])
        distributed.total([self.counts, self.clip_errors, tokens])
        self.tokens = int(tokens)

    def pooled(self) -> Statistics:
        """Statistics of all groups merged into one."""
        return Statistics(
            self.largest.amax(0, keepdim=True),
            self.counts.sum(0, keepdim=True),
            self.clip_errors.sum(1, keepdim=True),
            self.tokens,
        )


def static_range(statistics: Statistics, bits: int, method: str, percentile: float) -> Tensor:
    """The range `alpha` of each group, `[G]`: values beyond it are clipped, and `scale = alpha / q_max` (LoopQ 4.1).

    Args:
        statistics: statistics of the groups.
        bits: width of the integers.
        method: "minmax" (the largest magnitude), "percentile", or "mse" (least squared rounding error).
        percentile: share of magnitudes inside, in percent.
    """
    largest = statistics.largest.clamp_min(1e-12)
    edges = _upper_edges(largest.device)
    if method == "minmax":
        return largest
    if method == "percentile":
        share = statistics.counts.double().cumsum(1) / statistics.counts.double().sum(1, keepdim=True).clamp_min(1)
        edge = (share < percentile / 100).sum(1).clamp_max(BINS - 1)
        return torch.minimum(edges[edge].to(largest.dtype), largest)
    ratios = torch.exp2(-torch.arange(64, dtype=torch.float64, device=largest.device) / 8)
    centers = (edges * 2 ** (-0.5 / BINS_PER_OCTAVE)).expand(1, -1)
    best = torch.empty_like(largest)
    for group in range(len(largest)):
        alpha = largest[group].double() * ratios.unsqueeze(1)
        scale = alpha / quantized_range(bits)[1]
        error = torch.where(centers < scale / 2, centers.square(), scale.square() / 12)
        error = torch.where(centers > alpha + scale / 2, (centers - alpha).square(), error)
        best[group] = alpha[(error @ statistics.counts[group].double()).argmin(), 0]
    return best


def dynamic_clip(statistics: Statistics) -> Tensor:
    """The clip ratio of each group with the least squared rounding error under dynamic scales, `[G]`."""
    return torch.tensor(CLIP_RATIOS, device=statistics.clip_errors.device)[statistics.clip_errors.argmin(0)]


@fused
def rounding_errors(groups: Tensor, scale: Tensor, importance: Tensor | None, q_min: int, q_max: int) -> Tensor:
    """Squared errors of rounding `[outputs, groups, size]` with `scale` `[outputs, groups]`, summed over each group.

    Args:
        groups: what is rounded, float32.
        scale: not zero.
        importance: factors on the squares, `[groups, size]`; None for equal ones.
        q_min, q_max: range of the integers.
    """
    steps = scale.unsqueeze(-1)
    squares = (groups / steps).round_().clamp_(q_min, q_max).mul_(steps).sub_(groups).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(-1)


def weight_scale(weight: Tensor, group_size: int, bits: int, method: str, limit: int) -> Tensor:
    """Scales of a weight `[outputs, inputs]`, `[outputs, inputs / group_size]`.

    Args:
        weight: the weight.
        group_size: neighbouring inputs that share a scale.
        bits: width of the integers.
        method: "minmax" or "mse"; the latter tries ranges from the largest magnitude down to half of it.
        limit: as in `dynamic_scale`; negative for scales with a sign.
    """
    q_min, q_max = quantized_range(bits)
    scales = []
    for rows in weight.detach().float().split(max(1, _CHUNK // weight.shape[1])):
        groups = rows.unflatten(-1, (-1, group_size))
        full = bounded(peak(groups, limit) / limit)
        best, least = full, torch.full_like(full, float("inf"))
        for ratio in weight_ratios(limit, q_max) if method == "mse" else (1.0,):
            scale = full * ratio
            error = rounding_errors(groups, scale, None, q_min, q_max)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        scales.append(best)
    return bounded(torch.cat(scales).to(weight.dtype))


def weight_ratios(limit: int, q_max: int) -> tuple[float, ...]:
    """Candidates for a weight group's range, relative to what `limit` gives; one of them clips nothing."""
    return CLIP_RATIOS if limit > 0 else (-limit / q_max, *CLIP_RATIOS)
