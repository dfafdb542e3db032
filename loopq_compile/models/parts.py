"""What the reference models share: rotary positions, attention over heads, constant states, reading configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Config = TypeVar("Config")


def read_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration of class `kind` from a published model's file; keys that are no fields of it are ignored."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})


def split_heads(name: str, width: int, heads: int, even: bool = True) -> int:
    """Channels of one head.

    Raises:
        ValueError: `width` (called `name`) does not split into `heads`, or not into an even size where `even`.
    """
    if heads < 1 or width % heads or (even and width // heads % 2):
        raise ValueError(f"{name}={width} must split into {heads} heads{' of even size' if even else ''}")
    return width // heads


def check_loops(name: str, loops: int) -> None:
    """Refuses a model that never runs its core (a `ValueError`)."""
    if loops < 1:
        raise ValueError(f"{name}={loops} must be at least 1")


def pair_tables(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[length, 1, head_dim / 2]` (fp32): pair `i` turns by `position * theta^(-2i / head_dim)`."""
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    positions = torch.arange(length, device=like.device, dtype=torch.float32)
    angles = positions[:, None, None] * (theta**-exponents)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring channels `(2i, 2i + 1)` of `x` `[batch, seq, heads, head_dim]`, in fp32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of `[batch, seq, heads, head_dim]`; keys may have fewer heads. Returns `[batch, seq, width]`."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def constant_state(width: int, std: float, seed: int) -> Tensor:
    """A vector `[width]` from a normal distribution cut off at three `std`; the same for the same seed."""
    state = torch.empty(width, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    return nn.init.trunc_normal_(state, std=std, a=-3 * std, b=3 * std, generator=generator) if std else state.zero_()


def add_head_and_state(
    model: nn.Module, embedding: nn.Embedding, tied: bool, state_width: int, state_std: float, seed: int
) -> None:
    """Gives a recurrent-depth `model` what all of them have around their stacks.

    `lm_head`, which is the `embedding` where `tied`; the buffer `initial_state` `[state_width]`, which is no part of
    checkpoints; and a hook that lets published checkpoints load.
    """
    vocabulary, channels = embedding.weight.shape
    model.lm_head = nn.Linear(channels, vocabulary, bias=False)
    if tied:
        model.lm_head.weight = embedding.weight
    model.register_buffer("initial_state", constant_state(state_width, state_std, seed), persistent=False)
    model.register_load_state_dict_pre_hook(forget_rotary_table)


def forget_rotary_table(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before loading: published checkpoints hold the table `freqs_cis`, which is computed here."""
    state.pop(f"{prefix}freqs_cis", None)
