"""How far a contestant of `bench speed` is from the model: KL of what it says when it reads a text token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loopq_compile.generation.decoders import Decoder

ROW = 256
"""Tokens of a row. Rows are read side by side, as in decoding with a batch."""


def rows(text: Sequence[int]) -> Tensor:
    """Token ids `[rows, tokens]` of a text: rows of `ROW` tokens, or one row of a shorter text."""
    length = min(ROW, len(text))
    return torch.tensor(text[: len(text) // length * length]).view(-1, length)


def divergence(make: Callable[[], Decoder], text: Sequence[int], reference: Path) -> float:
    """Mean KL(model || contestant) of a token's prediction, in nats.

    Args:
        make: makes fresh decoders.
        text: token ids.
        reference: file of logits `[rows, tokens, vocabulary]` that the model gives for the text.
    """
    ids, exact, total = rows(text), np.load(reference, mmap_mode="r"), 0.0
    decoder, mask = make(), torch.ones_like(ids)
    for at in range(ids.shape[1]):
        with torch.compiler.set_stance("default" if at else "force_eager"):  # the first call has an empty cache
            logits = decoder(ids[:, at : at + 1], mask[:, : at + 1])
        wanted = torch.from_numpy(np.array(exact[:, at])).log_softmax(-1)
        total += float(F.kl_div(logits.float().log_softmax(-1), wanted, log_target=True, reduction="batchmean"))
    return total / ids.shape[1]
