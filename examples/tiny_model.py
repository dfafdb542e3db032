"""A small looped model with random weights, which the other examples quantize. Replace it by your own."""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.models import Ouro, OuroConfig

VOCABULARY = 96


def tiny_model(loops: int = 3) -> Ouro:
    """One sandwich-normed layer that runs `loops` times."""
    torch.manual_seed(0)
    config = OuroConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        total_ut_steps=loops,
    )
    return Ouro(config).eval()


def tokens(seed: int = 0, batch: int = 2, length: int = 16) -> Tensor:
    """Stand-in for tokenized text, `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
