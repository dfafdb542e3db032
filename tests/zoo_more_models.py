"""More tiny models: loops without modules, shared weights that are not a loop, and details of real transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo_models import DIM, Albert, Attention, Looped, Mlp, Stack, loop, rotary_tables


class Functional(Looped):
    """Weights without modules, multiplied in four ways; the loop is in one `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(DIM, DIM) / 6)
        self.second = nn.Parameter(torch.randn(DIM, DIM) / 6)
        self.third = nn.Parameter(torch.randn(DIM, DIM) / 6)
        self.fourth = nn.Parameter(torch.randn(DIM, DIM) / 6)
        self.bias = nn.Parameter(torch.randn(DIM))

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                y = F.linear(F.rms_norm(x, (DIM,)), self.first, self.bias)
                y = F.silu(y) @ self.second
                y = F.silu(y) @ self.third.t()
                y = torch.addmm(self.bias, F.silu(y).flatten(0, 1), self.fourth).view(x.shape)
                x = x + 0.3 * y
        return x


class OneMatrix(Looped):
    """The smallest loop: one matrix, no norm, no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(DIM, DIM) / 6)

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = torch.tanh(x @ self.w)
        return x


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight `[inputs, outputs]`, `addmm` on flattened rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 6)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.bias.numel())


class Gpt2(Looped):
    """A GPT-2 layer, looped, with a causal mask kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.c_attn, self.c_proj = Conv1D(DIM, 3 * DIM), Conv1D(DIM, DIM)
        self.register_buffer("mask", torch.ones(64, 64).tril().bool(), persistent=False)

    def run(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        for t in range(self.T):
            with loop(t):
                q, k, v = self.c_attn(self.norm(x)).chunk(3, -1)
                scores = (q @ k.transpose(1, 2) / DIM**0.5).masked_fill(~self.mask[:length, :length], float("-inf"))
                x = x + self.c_proj(scores.softmax(-1) @ v)
        return x


class RotaryOnce(Stack):
    """Rotary tables and mask are computed once, before the loop."""

    def first(self) -> nn.Module:
        return Attention()

    def run(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        tables = rotary_tables(length, DIM // 4)
        mask = torch.full((length, length), float("-inf")).triu(1)
        for t in range(self.T):
            with loop(t):
                x = self.layers[1](self.layers[0](x, tables, mask))
        return x


class DeepSupervision(Albert):
    """The head reads the state of every loop."""

    def forward(self, input_ids: Tensor) -> list[Tensor]:
        x, logits = self.embed(input_ids), []
        for t in range(self.T):
            with loop(t):
                x = self.block(x)
                logits.append(self.lm_head(x))
        return logits


class Siamese(nn.Module):
    """One encoder on two inputs side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(64, DIM), Mlp()

    def forward(self, input_ids: Tensor) -> Tensor:
        left, right = self.encoder(self.embed(input_ids)), self.encoder(self.embed(input_ids + 1))
        return (left * right).sum(-1)


class SharedQueryKey(Looped):
    """Queries and keys share a projection and a norm, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.norm, self.v = nn.Linear(DIM, DIM), nn.RMSNorm(DIM), nn.Linear(DIM, DIM)

    def run(self, x: Tensor) -> Tensor:
        q, k = self.norm(self.qk(x)), self.norm(self.qk(x + 1))
        return x + F.scaled_dot_product_attention(q, k, self.v(x), is_causal=True)


class LoopedQueryKey(SharedQueryKey):
    """The same attention, looped."""

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = super().run(x)
        return x


class LoopAdapters(Looped):
    """A shared block with an adapter for every loop."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.shared_out = Mlp(), nn.Linear(DIM, DIM)
        self.adapters = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(self.T)])

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.shared_out(self.adapters[t](self.block(x)))
        return x


class LoopNorms(Looped):
    """A shared block followed by a norm gain for every loop."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norms = Mlp(), nn.ModuleList([nn.RMSNorm(DIM) for _ in range(self.T)])

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.norms[t](self.block(x))
        return x


class SkipConnection(Looped):
    """Loop `t` also reads the state that loop `t - 2` left."""

    T = 4

    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp()

    def run(self, x: Tensor) -> Tensor:
        states = [x]
        for t in range(self.T):
            with loop(t):
                x = self.block(x + states[-2] if t > 1 else x)
                states.append(x)
        return x


class Padded(Stack):
    """A stack with an attention mask `[batch, sequence]` as second input."""

    def first(self) -> nn.Module:
        return Attention()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = causal & (attention_mask[:, None, None, :] != 0)
        x = self.embed(input_ids)
        for t in range(self.T):
            with loop(t):
                x = self.layers[1](self.layers[0](x, None, mask))
        return self.lm_head(x)


class Rotary(Looped):
    """Only attention, with its rotary tables recomputed in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.attention(x)
        return x


class Transition(Looped):
    """A linear layer between iterations only; the last state goes to the head unchanged."""

    T = 4

    def __init__(self) -> None:
        super().__init__()
        self.block, self.transition = Mlp(), nn.Linear(DIM, DIM)

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.block(self.transition(x) if t else x)
        return x


class TableInFirstLoop(Looped):
    """The rotary tables are computed in the first call and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def run(self, x: Tensor) -> Tensor:
        tables = None
        for t in range(self.T):
            if tables is None:
                x = x + 1
                tables = rotary_tables(x.shape[1], DIM // 4)
            with loop(t):
                x = self.attention(x, tables)
        return x


class LoopGates(Stack):
    """Every loop has its own gate, whose result is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Linear(DIM, 1) for _ in range(self.T)])

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x, exits = self.embed(input_ids), []
        for t in range(self.T):
            with loop(t):
                x = self.stack(x)
            exits.append(self.gates[t](x))
        return self.lm_head(x), torch.cat(exits, -1)


class HeadsBehind(Albert):
    """States are collected; the head reads them all after the loop."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x, states = self.embed(input_ids), []
        for t in range(self.T):
            with loop(t):
                x = self.block(x)
                states.append(x)
        return torch.stack([self.lm_head(state) for state in states], 1)


class FunctionalInjection(Looped):
    """Injection, residual and coda are plain operators, all in one helper method."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(DIM, DIM) / 6)

    def run(self, x: Tensor) -> Tensor:
        e = x
        for t in range(self.T):
            with loop(t):
                x = x + e
                x = x + torch.tanh(F.rms_norm(x, (DIM,)) @ self.w)
        return F.rms_norm(x + 1, (DIM,))


class SplitLoop(Albert):
    """The same block in two places of the program: two iterations, then a third elsewhere."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        with torch.no_grad():
            for t in range(2):
                with loop(t):
                    x = self.block(x)
        with loop(2):
            x = self.block(x)
        return self.lm_head(x)
