"""What the reference models share: positions, attention over heads, recurrent depth, reading configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Config = TypeVar("Config")


def read_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration of class `kind` from a published model's file; keys that are not fields of it are ignored."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})


def split_heads(name: str, width: int, heads: int, even: bool = True) -> int:
    """Channels of one head.

    Raises:
        ValueError: `width` (called `name`) does not split into `heads`, or not into an even size although `even` is
            set.
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
    """Rotates neighbouring channels `(2i, 2i + 1)` of `x` `[batch, seq, heads, head_dim]`, in fp32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def visible_keys(attention_mask: Tensor) -> Tensor:
    """Which keys a query may see: bool `[batch, 1, seq, seq]` from a 0/1 padding mask `[batch, seq]`.

    A position always sees itself, so that a padded query has something to attend to and its row is never NaN.
    """
    length = attention_mask.shape[1]
    index = torch.arange(length, device=attention_mask.device)
    distance = index[:, None] - index[None, :]
    real_key = (attention_mask != 0)[:, None, None, :]
    return (distance == 0) | ((distance > 0) & real_key)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention of `[batch, seq, heads, head_dim]`; keys may have fewer heads. Returns `[batch, seq, width]`.

    `visible` is as from `visible_keys`; None: plain causal attention.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=visible is None)
    return mixed.transpose(1, 2).flatten(2)


class Context(NamedTuple):
    """What every layer reads in addition to its input: rotary tables as from `pair_tables`, and `visible_keys` or
    None."""

    cos: Tensor
    sin: Tensor
    visible: Tensor | None

    @staticmethod
    def of(input_ids: Tensor, attention_mask: Tensor | None, head_dim: int, theta: float) -> Context:
        """The context of token ids `[batch, seq]` and a 0/1 mask of that shape; None: nothing is padding."""
        visible = None if attention_mask is None else visible_keys(attention_mask)
        return Context(*pair_tables(input_ids.shape[1], head_dim, theta, input_ids), visible)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`causal_attention` with this `visible`."""
        return causal_attention(query, key, value, self.visible)

    def rotate(self, x: Tensor) -> Tensor:
        """`rotate_pairs` with the tables."""
        return rotate_pairs(x, self.cos, self.sin)


def constant_state(width: int, std: float, seed: int) -> Tensor:
    """A vector `[width]` from a normal distribution cut off at three `std`; the same for the same seed."""
    state = torch.empty(width, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    return nn.init.trunc_normal_(state, std=std, a=-3 * std, b=3 * std, generator=generator) if std else state.zero_()


class RecurrentDepth(nn.Module):
    """A model whose core runs repeatedly from an initial state: a stack of layers by each name, and a head.

    Args:
        config: has `mean_recurrence`, how often the core runs.
        parts: the stacks and the modules between them; `wte`, the embedding, is also the head if `tied`.
        loops: how often the core runs instead; change it on the module to run it less or more often.
        state_width, state_std, seed: of the initial state, a constant vector that is not part of checkpoints.
    """

    initial_state: Tensor

    def __init__(
        self,
        config: Any,
        parts: Mapping[str, nn.Module],
        tied: bool,
        loops: int | None,
        *,
        state_width: int,
        state_std: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.loops = config, loops
        self.transformer = nn.ModuleDict(parts)
        embedding = parts["wte"].weight
        assert isinstance(embedding, nn.Parameter)
        self.lm_head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        if tied:
            self.lm_head.weight = embedding
        self.register_buffer("initial_state", constant_state(state_width, state_std, seed), persistent=False)
        self.register_load_state_dict_pre_hook(forget_rotary_table)

    def layers(self, stack: str) -> nn.ModuleList:
        """The layers of a stack."""
        layers = self.transformer[stack]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def recur(self, input_ids: Tensor, initial_state: Tensor | None, core: Callable[[Tensor], Tensor]) -> Tensor:
        """The state `[batch, seq, state_width]` after the last loop, starting from `initial_state` or the constant
        one."""
        state = self.initial_state.expand(*input_ids.shape, -1) if initial_state is None else initial_state
        for _ in range(self.loops or self.config.mean_recurrence):
            state = core(state)
        return state


def forget_rotary_table(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before loading: removes the table `freqs_cis` of published checkpoints, which is computed here."""
    state.pop(f"{prefix}freqs_cis", None)
