"""A tiny looped language model and inputs for it, shared by tests."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import loopq_compile as lq

VOCABULARY = 64


class TinyAttention(nn.Module):
    """Causal attention with grouped queries and a bias on queries only."""

    def __init__(self, width: int, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, groups * self.size, bias=False)
        self.v_proj = nn.Linear(width, groups * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.groups, self.size).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.groups, self.size).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, width))


class TinyBlock(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.RMSNorm(width), TinyAttention(width), nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class TinyLoopedLM(nn.Module):
    """`loops` runs of `layers` blocks, a norm inside the loop, an exit gate, and a head tied to nothing."""

    def __init__(self, loops: int = 3, layers: int = 1, width: int = 64) -> None:
        super().__init__()
        self.loops = loops
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(TinyBlock(width) for _ in range(layers))
        self.norm, self.exit_gate = nn.RMSNorm(width), nn.Linear(width, 1)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        gates = []
        for _ in range(self.loops):
            for layer in self.layers:
                x = layer(x)
            x = self.norm(x)
            gates.append(self.exit_gate(x))
        return {"logits": self.head(x), "gates": torch.cat(gates, -1)}


def tokens(seed: int = 0, batch: int = 2, length: int = 16) -> Tensor:
    """Random token ids `[batch, length]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def tiny_model(loops: int = 3, layers: int = 1) -> TinyLoopedLM:
    """The model with weights from a fixed seed."""
    torch.manual_seed(0)
    return TinyLoopedLM(loops, layers).eval()


@functools.cache
def tiny_program(scheme: str = "w4a4", method: str = "las", activation: str = "dynamic", loops: int = 3) -> lq.Program:
    """The model compiled; shared between tests, so do not change it."""
    data = [tokens(seed) for seed in range(3)]
    return lq.compile(
        tiny_model(loops), tokens(), scheme=scheme, method=method, activation=activation, calibration=data
    )
