"""Tiny models with random weights, one for every way of looping that the compiler knows.

Each model marks its loop iterations with `loop(t)`. The mark has no effect on the computation; the exporter copies it
to the nodes of the graph, so that a test can compare the tag of every node with what the model's author meant.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.fx import traceback
from torch.nn import functional as F

from loopq_compile.graph.loops import LoopTag

DIM, VOCABULARY = 32, 64
MARK = "zoo_loop"


def loop(*index: int, of: tuple[int, ...] | None = None) -> AbstractContextManager[None]:
    """Marks what follows as iteration `index` of the loops `of` (by default the first loop, and the first in it)."""
    return traceback.annotate({MARK: str(LoopTag(of or (0,) * len(index), index))})


def outside() -> AbstractContextManager[None]:
    """Marks what follows as outside every loop."""
    return traceback.annotate({MARK: ""})


class Mlp(nn.Module):
    """`x + down(silu(up(norm(x))))`."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.up = nn.Linear(DIM, 2 * DIM, bias=bias)
        self.down = nn.Linear(2 * DIM, DIM, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def rotary_tables(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[length, size]`."""
    angles = torch.arange(length)[:, None] * 100.0 ** -(torch.arange(0, size, 2) / size)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on `[batch, heads, length, size]`."""
    first, second = x.chunk(2, -1)
    return x * tables[0] + torch.cat([-second, first], -1) * tables[1]


class Attention(nn.Module):
    """Causal attention with a fused projection, four query heads and two key-value heads, biases, rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 2 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        size = DIM // 4
        tables = tables or rotary_tables(x.shape[1], size)
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = heads.split([4, 2, 2], dim=1)
        mixed = F.scaled_dot_product_attention(
            rotate(q, tables), rotate(k, tables), v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Looped(nn.Module):
    """Embedding, `run`, and a head; `T` loops."""

    T = 3

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.lm_head = nn.Linear(DIM, VOCABULARY, bias=False)

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.run(self.embed(input_ids)))


class Albert(Looped):
    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        self.T, self.block = loops, Mlp()

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.block(x)
        return x


class Once(Albert):
    def __init__(self) -> None:
        super().__init__(loops=1)

    def run(self, x: Tensor) -> Tensor:
        return self.block(x)


class Tied(Albert):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head.weight = self.embed.weight


class Plain(Looped):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp(), Mlp()])

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Stack(Looped):
    """A stack of layers, run `T` times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.first(), Mlp()])

    def first(self) -> nn.Module:
        """The first layer of the stack."""
        return Mlp(bias=True)

    def stack(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.stack(x)
        return x


class NormedStack(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)

    def stack(self, x: Tensor) -> Tensor:
        return self.norm(super().stack(x))


class GatedStack(NormedStack):
    """Returns the exit gate's result of every loop in addition to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 1)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x, exits = self.embed(input_ids), []
        for t in range(self.T):
            with loop(t):
                x = self.stack(x)
                exits.append(self.gate(x))
        return self.lm_head(x), torch.cat(exits, -1).sigmoid()


class OuterNorm(Stack):
    """The norm after each loop is also the final norm after a separate last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.RMSNorm(DIM), Mlp()

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.norm(self.stack(x))
        return self.norm(self.last(x))


class TimeModulated(Looped):
    """An embedding of the loop number scales and shifts the state before the shared block."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Embedding(8, DIM)
        self.time_mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.SiLU(), nn.Linear(DIM, 2 * DIM))
        self.block = Mlp()

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                scale, shift = self.time_mlp(self.times(torch.tensor([t]))).chunk(2, -1)
                x = self.block(x * (1 + scale) + shift)
        return x


class PreludeCoreCoda(Looped):
    """`state = core(state + e)`, where `e` is the prelude's output."""

    def __init__(self) -> None:
        super().__init__()
        self.prelude, self.core, self.coda = Mlp(), Mlp(), Mlp()

    def run(self, x: Tensor) -> Tensor:
        e = self.prelude(x)
        x = self.start(e)
        for t in range(self.T):
            with loop(t):
                x = self.core(self.inject(x, e, t))
        return self.coda(x)

    def start(self, e: Tensor) -> Tensor:
        return e

    def inject(self, x: Tensor, e: Tensor, t: int) -> Tensor:
        return x + e


class InjectConcat(PreludeCoreCoda):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(2 * DIM, DIM)

    def inject(self, x: Tensor, e: Tensor, t: int) -> Tensor:
        return self.adapter(torch.cat([x, e], -1))


class RecurrentDepth(InjectConcat):
    """The state starts from a learned constant, not from the prelude."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = nn.Parameter(torch.randn(DIM))

    def start(self, e: Tensor) -> Tensor:
        return self.initial.expand_as(e)


class InjectLater(PreludeCoreCoda):
    def inject(self, x: Tensor, e: Tensor, t: int) -> Tensor:
        return x + 0.5 * e if t else x


class SharedBetweenLayers(Looped):
    """Zamba: layer, shared block, layer, shared block, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.shared = nn.ModuleList([Mlp(), Mlp(), Mlp()]), Mlp(bias=True)

    def run(self, x: Tensor) -> Tensor:
        for t, layer in enumerate(self.layers):
            x = layer(x)
            with loop(t):
                x = self.shared(x)
        return x


class AlternatingShared(Looped):
    """Two shared blocks take turns, with a separate layer before each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp() for _ in range(6)])
        self.shared = nn.ModuleList([Mlp(), Mlp()])

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            x = self.layers[2 * t](x)
            with loop(t):
                x = self.shared[0](x)
                x = self.layers[2 * t + 1](x)
                x = self.shared[1](x)
        return x


class Alternating(Looped):
    """Two shared blocks take turns, with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleList([Mlp(), Mlp()])

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            with loop(t):
                x = self.shared[1](self.shared[0](x))
        return x


class Outer(nn.Module):
    """Runs `inner` twice; `where` is its place among the outer block's own layers."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.inner = where, Mlp()
        if where in ("last", "middle"):
            self.before = Mlp()
        if where in ("first", "middle"):
            self.after = Mlp()

    def forward(self, x: Tensor, t: int) -> Tensor:
        with loop(t):
            x = self.before(x) if self.where in ("last", "middle") else x
        for k in range(2):
            with loop(t, k):
                x = self.inner(x)
        with loop(t):
            return self.after(x) if self.where in ("first", "middle") else x


class Nested(Looped):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.outer = Outer(where)

    def run(self, x: Tensor) -> Tensor:
        for t in range(self.T):
            x = self.outer(x, t)
        return x


class NestedTwice(Looped):
    """Two inner loops of different length in one outer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.second = Mlp(), Mlp(), Mlp()

    def run(self, x: Tensor) -> Tensor:
        for t in range(2):
            for k in range(3):
                with loop(t, k, of=(0, 0)):
                    x = self.first(x)
            with loop(t):
                x = self.middle(x)
            for k in range(2):
                with loop(t, k, of=(0, 1)):
                    x = self.second(x)
        return x


class TwoLoops(Looped):
    """An encoder that loops three times, then a decoder that loops twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.between, self.decoder = Mlp(), Mlp(), Mlp()

    def run(self, x: Tensor) -> Tensor:
        for t in range(3):
            with loop(t, of=(0,)):
                x = self.encoder(x)
        x = self.between(x)
        for t in range(2):
            with loop(t, of=(1,)):
                x = self.decoder(x)
        return x


class ListedTwice(Looped):
    """One module listed at several positions of a `ModuleList`."""

    def __init__(self) -> None:
        super().__init__()
        pair = [Mlp(bias=True), Mlp()]
        self.layers = nn.ModuleList([*pair, *pair, *pair])

    def run(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers[:6]):
            with loop(i // 2):
                x = layer(x)
        return x
