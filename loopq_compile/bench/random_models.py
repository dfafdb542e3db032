"""Models of published size with random weights; sizes, times and speed do not depend on the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.models import Ouro, OuroConfig

SIZES: Mapping[str, Callable[[], OuroConfig]] = {"ouro-1.4b": OuroConfig.ouro_1_4b, "ouro-2.6b": OuroConfig.ouro_2_6b}
"""Configurations by name."""
_STEP = 4099
"""Odd: the first 2^20 blocks all differ."""


def sized(name: str, layers: int | None = None) -> OuroConfig:
    """The configuration called `name`, reduced to `layers` layers if given.

    Raises:
        LoopQError: there is no configuration with that name.
    """
    if name not in SIZES:
        raise LoopQError(f"Unknown model {name!r}.{did_you_mean(name, SIZES)}")
    config = SIZES[name]()
    return replace(config, num_hidden_layers=layers) if layers else config


def random_model(config: OuroConfig, dtype: torch.dtype = torch.float32) -> Ouro:
    """A model whose weights repeat one block of random numbers, since drawing a billion takes longer than compiling.

    Each repetition starts at another place in it, since ONNX Runtime would keep only one copy of equal weights.
    """
    with torch.device("meta"):
        model = Ouro(config).to(dtype)
    model = model.to_empty(device="cpu").eval()
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    starts = itertools.count(step=_STEP)
    with torch.no_grad():
        for weight in model.parameters():
            flat = weight.view(-1)
            for part in flat.split(len(block)):
                part.copy_(block.roll(next(starts))[: len(part)]) if weight.ndim > 1 else part.fill_(1.0)
            if weight.ndim > 1:
                flat.div_(weight.shape[-1] ** 0.5)
    return model
