"""Integers on the other grid stand for the same numbers, and words are those of the package compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from loopq_compile.backends.compressed_tensors.packing import fits_symmetric, pack, positive


def example(lowest: int = -8) -> tuple[Tensor, Tensor]:
    """Codes `[6, 64]` from `lowest` to 7 and scales `[6, 2]` of both signs."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(lowest, 8, (6, 64), generator=generator).to(torch.int8)
    codes[:, ::32] = lowest
    return codes, torch.randn(6, 2, generator=generator)


def values(codes: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    shift = zero_point if isinstance(zero_point, int) else zero_point.unsqueeze(-1).float()
    return (groups - shift) * scale.unsqueeze(-1)


@pytest.mark.parametrize("lowest", [-8, -7])
def test_negative_scales_become_positive_without_rounding(lowest: int) -> None:
    codes, scale = example(lowest)
    assert (scale < 0).any() and fits_symmetric(codes, scale, 4) == (lowest == -7)
    turned, positive_scale, zero_point = positive(codes, scale, symmetric=lowest == -7)
    assert (positive_scale > 0).all() and turned.min() >= -8 and turned.max() <= 7
    assert torch.equal(values(turned, positive_scale, zero_point), values(codes, scale))
    assert zero_point.any() == (lowest == -8)


def test_positive_scales_are_left_alone() -> None:
    codes, scale = example()
    assert fits_symmetric(codes, scale.abs(), 4)
    turned, kept, zero_point = positive(codes, scale.abs(), symmetric=True)
    assert torch.equal(turned, codes) and torch.equal(kept, scale.abs()) and not zero_point.any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 70])
def test_words_are_those_of_the_package(bits: int, columns: int) -> None:
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (5, columns), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)
    assert torch.equal(pack(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0))
