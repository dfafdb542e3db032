"""Integers as compressed-tensors stores them.

Its grid is `(code - zero_point) * scale` with codes from -2^(bits-1) to 2^(bits-1) - 1, a positive scale, and a zero
point only in the asymmetric form. Ours is `code * scale` with a scale that may be negative. A group with a negative
scale `s` becomes the same numbers on the other grid: `code * s = (-code) * |s|`. If no code of it is the lowest one,
negating is enough. Otherwise `-code` would be one too large, so it is stored as `-code - 1` with zero point -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32
"""Bits of the integers that hold packed codes."""


def fits_symmetric(codes: Tensor, scale: Tensor, bits: int) -> bool:
    """Whether codes `[N, K]` with scales `[N, groups]` have the same values with positive scales and no zero point."""
    lowest = (codes.unflatten(-1, (scale.shape[-1], -1)) == -(1 << (bits - 1))).any(-1)
    return not bool((lowest & (scale < 0)).any())


def positive(codes: Tensor, scale: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales above zero and zero points (0 or -1) of the same values.

    Args:
        codes: `[N, K]`, int8.
        scale: `[N, groups]`.
        symmetric: whether zero points have to be 0; see `fits_symmetric`.

    Returns:
        Codes `[N, K]`, scales and zero points `[N, groups]`; codes and zero points as int8.
    """
    turned = scale < 0
    groups = codes.unflatten(-1, (scale.shape[-1], -1))
    zero_point = torch.zeros_like(scale, dtype=torch.int8) if symmetric else -turned.to(torch.int8)
    negated = -groups.to(torch.int16) + zero_point.unsqueeze(-1)
    kept = torch.where(turned.unsqueeze(-1), negated, groups.to(torch.int16))
    return kept.to(torch.int8).flatten(-2), scale.abs(), zero_point


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]`, int8, in words `[N, ceil(K * bits / 32)]`, int32: the first one in the lowest bits.

    Args:
        codes: between -2^(bits-1) and 2^(bits-1) - 1; stored with 2^(bits-1) added.
        bits: 4 or 8.
    """
    each = _WORD // bits
    raised = codes.to(torch.int32) + (1 << (bits - 1))
    padded = torch.nn.functional.pad(raised, (0, -codes.shape[-1] % each))
    shifts = torch.arange(each, dtype=torch.int32, device=codes.device) * bits
    # The topmost code reaches the sign bit, so words are put together in 64 bits.
    words = (padded.unflatten(-1, (-1, each)).to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 1 << (_WORD - 1), words - (1 << _WORD), words).to(torch.int32)
