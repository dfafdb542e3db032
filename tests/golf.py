"""A tiny model with all unusual features of the depth-recurrent records of the public parameter-golf challenge.

Weights are cast at every use, rotary tables are kept from one call to the next, and every layer mixes in the embedding.
U-Net skips lead from the first half of all visits to the second, and so across the loops. Heads have gains, each
token's own value is removed from the result of attention, and the head is the embedding, with capped logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.looped_models import VOCABULARY

WIDTH, HEADS, KEY_HEADS = 32, 4, 2
SIZE = WIDTH // HEADS


def unit(x: Tensor) -> Tensor:
    """RMS norm without a gain, with the machine epsilon."""
    return F.rms_norm(x, x.shape[-1:])


class CastedLinear(nn.Linear):
    """Reads its weight in the type of its input, which changes nothing if the types agree."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class KeptRotary(nn.Module):
    """Cosine and sine `[1, length, 1, channels / 2]`, recomputed only if the length differs from the last call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        steps = torch.arange(0, channels, 2) / channels
        self.register_buffer("frequencies", 10_000.0**-steps, persistent=False)
        self._seq_len_cached = 0
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        if self._tables is None or self._seq_len_cached != length or self._tables[0].device != x.device:
            angles = torch.outer(torch.arange(length, device=x.device).float(), self.frequencies.float())
            self._tables = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
            self._seq_len_cached = length
        cosine, sine = self._tables
        return cosine.to(x.dtype), sine.to(x.dtype)


def turn(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first channels of `[batch, length, heads, size]`, two for every column of the tables."""
    cosine, sine = tables
    moved = 2 * cosine.shape[-1]
    first, second = x[..., :moved].chunk(2, -1)
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine, x[..., moved:]], -1)


class Attention(nn.Module):
    """Grouped queries of unit size, a gain for every head; the component along the token's own value is removed."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = CastedLinear(WIDTH, WIDTH), CastedLinear(WIDTH, KEY_HEADS * SIZE)
        self.value, self.out = CastedLinear(WIDTH, KEY_HEADS * SIZE), CastedLinear(WIDTH, WIDTH)
        self.q_gain = nn.Parameter(torch.full((HEADS,), 2.0))
        self.rotary = KeptRotary(SIZE // 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query = unit(self.query(x).reshape(batch, length, HEADS, SIZE))
        key = unit(self.key(x).reshape(batch, length, KEY_HEADS, SIZE))
        value = self.value(x).reshape(batch, length, KEY_HEADS, SIZE)
        tables = self.rotary(query)
        query = turn(query, tables) * self.q_gain.to(x.dtype)[:, None]
        heads = (part.transpose(1, 2) for part in (query, turn(key, tables), value))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
        grouped = mixed.reshape(batch, length, KEY_HEADS, HEADS // KEY_HEADS, SIZE)
        along = F.normalize(value, dim=-1)[..., None, :]
        return self.out((grouped - (grouped * along).sum(-1, keepdim=True) * along).reshape(batch, length, width))


class Layer(nn.Module):
    """Mixes the embedding `x0` into the state, then attention and a squared MLP, each scaled channel by channel."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(), CastedLinear(WIDTH, 2 * WIDTH), CastedLinear(2 * WIDTH, WIDTH)
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.2]]).expand(2, WIDTH).clone())
        self.scales = nn.Parameter(torch.ones(2, WIDTH))
        self.damping = (depth + 1) ** -0.5

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        old, new = self.resid_mix.to(x.dtype)
        x = old * x + new * x0
        attended, changed = self.scales.to(x.dtype)
        x = x + attended * self.attention(unit(x) * self.damping)
        inner = F.leaky_relu(self.up(unit(x) * self.damping), 0.5).square()
        return x + changed * self.down(inner)


class GolfLM(nn.Module):
    """Layers in the order of `visits`; `smear` also adds the token before to every embedding."""

    def __init__(self, visits: Sequence[int] = (0, 1, 2, 1, 2, 1, 2, 3), smear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visits, self.half = tuple(visits), len(visits) // 2
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(depth) for depth in range(max(visits) + 1))
        self.skips = nn.Parameter(torch.rand(self.half, WIDTH))
        self.gates = nn.Parameter(torch.randn(self.half, WIDTH))
        self.smear = nn.Parameter(torch.randn(WIDTH)) if smear else None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = unit(self.embed(input_ids))
        if self.smear is not None:
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
            x = torch.lerp(x, before, torch.sigmoid(self.smear))
        x0, kept = x, []
        for index in self.visits[: self.half]:
            x = self.layers[index](x, x0)
            kept.append(x)
        for at, index in enumerate(self.visits[self.half :]):
            if kept:
                gate = torch.sigmoid(self.gates[at].to(x.dtype))
                x = torch.lerp(self.skips[at].to(x.dtype) * kept.pop(), x, gate)
            x = self.layers[index](x, x0)
        return 30.0 * torch.tanh(F.linear(unit(x), self.embed.weight) / 30.0)
