"""LoopFormer: a looped language model whose block reads the time and the size of its step (armenjeddi/loopformer).

A shared stack of layers runs once for each entry of a step schedule `dt_1 ... dt_T`, whose sum is usually 1. Few large
steps are a shallow model, many small ones a deep one, with the same weights:

    x, t = wte(ids) + wpe(positions), 0
    for dt in steps:
        c = time_embedder(t) + dt_embedder(dt)
        x = h(x, c)                       # every layer scales its norms and gates its sublayers by c
        t = t + dt
    logits = lm_head(norm_f(x))           # the head is the embedding

In a layer, `gate, scale = chunks of W silu(c) + b` and `x <- x + gate * sublayer(norm(x) * (1 + scale))`. Parameter
names are those of the public checkpoints. Against the public code (commit 706c125; random weights, float32, schedules
of one to eight steps) the largest difference of a logit is 4.2e-6 where the largest logit is 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.models.parts import causal_attention, split_heads


@dataclass(frozen=True)
class LoopFormerConfig:
    """Sizes of a `LoopFormer`, by the names of its own configuration; the defaults are those published."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 3
    n_head: int = 32
    n_embd: int = 2048
    intermediate_dim: int = 5120
    bias: bool = False

    def __post_init__(self) -> None:
        split_heads("n_embd", self.n_embd, self.n_head, even=False)


class LoopFormerAttention(nn.Module):
    """Causal self-attention with query, key and value in one matrix; positions come from the embedding."""

    def __init__(self, config: LoopFormerConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, n_embd]` to the same shape."""
        query, key, value = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.c_proj(causal_attention(query, key, value))


class LoopFormerMLP(nn.Module):
    """`c_proj(gelu(c_fc(x)))`."""

    def __init__(self, config: LoopFormerConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.intermediate_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.intermediate_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, n_embd]` to the same shape."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class LoopFormerBlock(nn.Module):
    """A layer whose norms (without gains) are scaled, and whose sublayers are gated, by the condition `c`."""

    def __init__(self, config: LoopFormerConfig) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, elementwise_affine=False)
        self.attn = LoopFormerAttention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, elementwise_affine=False)
        self.mlp = LoopFormerMLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.n_embd, 4 * config.n_embd))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` `[batch, seq, n_embd]` and `condition` `[1, n_embd]` to the shape of `x`."""
        modulation = self.adaLN_modulation(condition).unsqueeze(1)
        gate_attention, gate_mlp, scale_attention, scale_mlp = modulation.chunk(4, dim=-1)
        x = x + gate_attention * self.attn(self.norm_1(x) * (1 + scale_attention))
        return x + gate_mlp * self.mlp(self.norm_2(x) * (1 + scale_mlp))


class LoopFormerStack(nn.Module):
    """The layers that all steps share."""

    def __init__(self, config: LoopFormerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LoopFormerBlock(config) for _ in range(config.n_layer))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`[batch, seq, n_embd]` to the same shape."""
        for block in self.blocks:
            x = block(x, condition)
        return x


class NumberEmbedding(nn.Module):
    """A number as a vector: cosines and sines of 128 frequencies from 1 down to 1/10,000, through a small MLP."""

    frequencies = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, number: Tensor) -> Tensor:
        """Numbers `[n]` to vectors `[n, width]`."""
        exponents = torch.arange(self.frequencies, device=number.device, dtype=torch.float32) / self.frequencies
        angles = number.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class LoopFormer(nn.Module):
    """The looped language model: ids `[batch, seq]` (at most `block_size` long) in, logits `[batch, seq, vocab]` out.

    `steps` is the schedule; change it on the module to run another one.

    Raises:
        ValueError: the schedule is empty.
    """

    def __init__(self, config: LoopFormerConfig, steps: Sequence[float] = (1 / 8,) * 8) -> None:
        super().__init__()
        if not steps:
            raise ValueError("steps must name the size of at least one step")
        self.config, self.steps = config, tuple(steps)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": LoopFormerStack(config),
                "norm_f": nn.RMSNorm(config.n_embd),
            }
        )
        self.time_embedder, self.dt_embedder = NumberEmbedding(config.n_embd), NumberEmbedding(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()
        self.transformer["wte"].weight = self.lm_head.weight

    def reset_parameters(self) -> None:
        """As published: normal weights of standard deviation 0.02, smaller ones after sublayers, zero biases."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                depth = 2 * self.config.n_layer if name.endswith("c_proj") else 1
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(depth))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of all positions, after the last step of the schedule."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](positions)
        time = torch.zeros(1, dtype=x.dtype, device=x.device)
        for step in self.steps:
            condition = self.time_embedder(time) + self.dt_embedder(torch.full_like(time, step))
            x = self.transformer["h"](x, condition)
            time = time + step
        return self.lm_head(self.transformer["norm_f"](x))
