"""Small causal models that write operations in different ways without mixing tokens, and similar ones that do mix
them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, SIZE = 64, 32, 4, 8
Step = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """A block of causal attention and a feed-forward layer, run three times.

    Args:
        attend: `(model, query, key, value)`, `[batch, heads, sequence, size]` each, to the same; one for every loop.
        step: what every loop additionally does to `[batch, sequence, width]`.
        end: what happens to the logits.
    """

    def __init__(
        self,
        *attend: Callable[..., Tensor],
        step: Step | None = None,
        end: Callable[[Tensor], Tensor] | None = None,
        groups: int = HEADS,
    ) -> None:
        super().__init__()
        self.attend, self.step, self.end, self.groups = attend or (fused,), step, end, groups
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.query, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * groups * SIZE, bias=False)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.start = nn.RMSNorm(WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.sink, self.relative = nn.Parameter(torch.randn(HEADS)), nn.Embedding(8, HEADS)
        self.register_buffer("triangle", torch.ones(1, 1, 32, 32).tril())
        angles = torch.outer(torch.arange(32.0), 100.0 ** -(torch.arange(SIZE // 2) / 4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for attend in (self.attend * 3)[:3]:
            b, t, _ = x.shape
            h = self.norm(x)
            q = self.query(h).view(b, t, HEADS, SIZE).transpose(1, 2)
            k, v = (part.view(b, t, self.groups, SIZE).transpose(1, 2) for part in self.kv(h).chunk(2, -1))
            x = x + self.out(attend(self, q, k, v).transpose(1, 2).reshape(b, t, WIDTH))
            x = x + self.down(self.up(x).relu().square())
            if self.step is not None:
                x = self.step(self, x)
        logits = self.head(x)
        return logits if self.end is None else self.end(logits)


def fused(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=model.groups < HEADS, scale=0.2)


def float_mask(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def cast_mask(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    mask = q.new_full((t, t), torch.finfo(q.dtype).min).triu(1)[None, None].expand(q.shape[0], 1, t, t).type_as(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def bool_mask(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(-3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def alibi(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    distance = (places[None] - places[:, None]) * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, distance.masked_fill(distance > 0, -math.inf))


def weighted(scores: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores.float(), -1).type_as(v) @ v


def nanogpt(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    return weighted(scores.masked_fill(model.triangle[:, :, :t, :t] == 0, -math.inf), v)


def multiplied(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    allowed = model.triangle[:, :, :t, :t]
    return weighted(q @ k.transpose(-2, -1) * allowed - 1e4 * (1 - allowed), v)


def like_scores(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 15 * torch.tanh(q @ k.mT / 15)
    return weighted(torch.where(torch.ones_like(scores, dtype=torch.bool).tril(), scores, -1e9), v)


def sinks(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT + torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1)
    sink = model.sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return F.softmax(torch.cat([scores, sink], -1), -1)[..., :-1] @ v


def relative(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    distance = (places[:, None] - places[None]).clamp(0, 7)
    bias = model.relative(distance).permute(2, 0, 1)[None]
    return weighted(q @ k.mT + bias + torch.full_like(bias, -math.inf).triu(1), v)


def einsums(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 3
    mask = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
    return torch.einsum("...hqk,...khd->...hqd", F.softmax(scores.masked_fill(mask, -1e9), -1), v)


def grouped_einsums(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, t = q.shape[0], q.shape[2]
    q = q.transpose(1, 2).reshape(b, t, model.groups, -1, SIZE)
    scores = torch.einsum("btgrd,bgsd->bgrts", q, k) + torch.full((t, t), -math.inf).triu(1)
    mixed = torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1), v)
    return mixed.reshape(b, HEADS, t, SIZE)


def merged_heads(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, t, _ = q.shape
    q, k, v = (x.reshape(b * HEADS, t, SIZE) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) + torch.full((t, t), -math.inf).triu(1)
    return torch.bmm(scores.softmax(-1), v).view(b, HEADS, t, SIZE)


def expanded_groups(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, g, t, d = k.shape
    k, v = (x[:, :, None].expand(b, g, HEADS // g, t, d).reshape(b, HEADS, t, d) for x in (k, v))
    return float_mask(model, F.rms_norm(q, (d,)), F.rms_norm(k, (d,)), v)


def complex_rotary(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turns = model.turns[: q.shape[2]].view(1, 1, q.shape[2], -1)
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * turns).flatten(3).type_as(x)
        for x in (q, k)
    )
    return fused(model, q, k, v)


def sequence_first(model: Model, x: Tensor) -> Tensor:
    """`[sequence, batch, width]`, and all tokens of all rows in one axis."""
    y = x.transpose(0, 1)
    return model.norm(y.reshape(-1, WIDTH)).reshape(y.shape).permute(1, 0, 2)


def heads_repeated(model: Model, x: Tensor) -> Tensor:
    b, t, d = x.shape
    parts = torch.stack(x.reshape(b * t, HEADS, SIZE).split(2, dim=1), 1).flatten(1, 2)
    return parts.repeat_interleave(2, 1)[:, ::2].repeat(1, 1, 2)[..., :SIZE].reshape(b, t, d)


def sinusoids(count: int, width: int) -> Tensor:
    angles = torch.arange(count)[:, None] * 0.3 ** torch.arange(width // 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def places(model: Model, x: Tensor) -> Tensor:
    """Absolute positions: added, sequence first, multiplied, joined, through a linear, chosen by, read from a table."""
    b, t, d = x.shape
    number = torch.arange(t)
    x = x + sinusoids(t, d)
    x = (x.transpose(0, 1) + sinusoids(t, d)[:, None]).transpose(0, 1)
    x = x * (1 + model.triangle[0, 0, :t, :d])
    x = torch.cat([x[..., :SIZE], sinusoids(t, SIZE).expand(b, t, SIZE), x[..., 2 * SIZE :]], -1)
    x = x + model.up(number[:, None] / torch.arange(1.0, d + 1))
    x = torch.where((number == 0)[:, None], model.start, x)
    return x + 0.5 * F.embedding(torch.ones(t, dtype=torch.int64).cumsum(0), model.embed.weight)


def scaled_queries(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(model, q * (torch.arange(q.shape[2]) + 1.0).log()[:, None], k, v)


def marked_keys(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(model, q, k + sinusoids(k.shape[2], SIZE), v)


def turned_values(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(model, q, k, v * sinusoids(k.shape[2], SIZE))


def layouts(model: Model, x: Tensor) -> Tensor:
    x = sequence_first(model, x) + heads_repeated(model, x) + model.start.expand_as(x)
    return torch.einsum("btd,fd->btf", x, model.up.weight)


GOOD: dict[str, Callable[[], nn.Module]] = {
    "masks": lambda: Model(float_mask, cast_mask, bool_mask),
    "scores": lambda: Model(nanogpt, multiplied, like_scores, end=lambda y: y[:, [-1]]),
    "biases": lambda: Model(alibi, sinks, relative, end=lambda y: y[:, -1:]),
    "products": lambda: Model(einsums, merged_heads, complex_rotary),
    "groups": lambda: Model(grouped_einsums, expanded_groups, fused, groups=2),
    "layouts": lambda: Model(step=layouts),
}
BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "roll": (lambda: Model(step=lambda m, x: x + x.roll(1, 1)), r"roll.*mixes tokens|roll.*works along"),
    "shift": (lambda: Model(step=lambda m, x: x + F.pad(x, (0, 0, 1, 0))[:, :-1]), "pad"),
    "last everywhere": (lambda: Model(step=lambda m, x: x + x[:, -1:]), "last token with those before it"),
    "first": (lambda: Model(step=lambda m, x: x + x[:, :1]), "works along the sequence"),
    "second to last": (lambda: Model(end=lambda y: y[:, [-2, -1]]), "may mix tokens"),
    "wrong view": (lambda: Model(step=lambda m, x: x.reshape(x.shape[0], WIDTH, -1).transpose(1, 2)), "with channels"),
    "wrong order": (
        lambda: Model(step=lambda m, x: x.transpose(0, 1).reshape(-1, WIDTH).view(x.shape)),
        "turns .* mixes tokens with channels",
    ),
    "length": (lambda: Model(step=lambda m, x: x / x.shape[1]), "depends on the length"),
    "batch norm": (lambda: Model(step=lambda m, x: F.layer_norm(x, x.shape[1:])), "layer_norm"),
    "noise": (lambda: Model(step=lambda m, x: x + torch.randn_like(x)), "is random"),
    "prefix": (
        lambda: Model(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, prefix_mask(q.shape[2]))),
        "lets tokens see later ones",
    ),
    "zeroed scores": (
        lambda: Model(lambda m, q, k, v: weighted(q @ k.mT * torch.ones(q.shape[2], q.shape[2]).tril(), v)),
        "lets tokens see later ones",
    ),
    "length in scores": (
        lambda: Model(lambda m, q, k, v: float_scores(q * math.log(2) / q.shape[2] ** 0.5, k, v)),
        "depends on the length",
    ),
    "over queries": (
        lambda: Model(
            lambda m, q, k, v: (q @ k.mT + torch.full((q.shape[2],) * 2, -math.inf).triu(1)).softmax(-1).softmax(-2) @ v
        ),
        "normalize|later ones|other queries",
    ),
}


def prefix_mask(length: int) -> Tensor:
    places = torch.arange(length)
    return (places[None] <= places[:, None]) | (places[None] < 3)


def float_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(q @ k.mT + torch.full((q.shape[2],) * 2, -math.inf).triu(1), v)


class Layer(nn.Module):
    """Causal attention with a float mask, over its own keys and, where given, those of an earlier pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.kv = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(
        self, x: Tensor, past: tuple[Tensor, ...] = (), joined: bool = True
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        b, t, _ = x.shape
        h = self.norm(x)
        q, *own = (part.view(b, t, HEADS, SIZE).transpose(1, 2) for part in (self.query(h), *self.kv(h).chunk(2, -1)))
        mask = torch.full((t, t), -math.inf).triu(1)
        read = own
        if past:
            read = [torch.cat(pair, 2) for pair in zip(past, own, strict=True)] if joined else list(past)
            mask = torch.cat([mask, mask], -1) if joined else mask
        mixed = F.scaled_dot_product_attention(q, *read, mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.silu(self.up(x))), tuple(own)


class Order(nn.Module):
    """Two layers, run in the order that `kind` names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList([Layer(), Layer()])
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.mix = nn.Parameter(torch.tensor([0.6, 0.4]))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = start = self.embed(input_ids)
        if self.kind == "each layer":
            for layer, count in zip(self.layers, (3, 2), strict=True):
                for _ in range(count):
                    x, _ = layer(x)
        elif self.kind == "skips":
            skips: list[Tensor] = []
            for t in range(4):
                for layer in self.layers:
                    x = x + 0.5 * skips.pop() if t >= 2 else x
                    x, _ = layer(self.mix[0] * x + self.mix[1] * start)
                    if t < 2:
                        skips.append(x)
        else:
            first: list[tuple[Tensor, ...]] = []
            for t in range(3):
                if self.kind == "cast" and t == 0:
                    x = x.to(torch.float32).expand(x.shape)
                for number, layer in enumerate(self.layers):
                    reads = t > 0 and self.kind in ("joined", "shared")
                    x = self.mix[0] * x + self.mix[1] * start if self.kind == "start" else x
                    x, own = layer(x, first[number] if reads else (), self.kind == "joined")
                    first += [own] if t == 0 else []
        return 30 * torch.tanh(self.head(x) / 30)


ORDERS = {
    kind: (lambda kind=kind: Order(kind)) for kind in ("each layer", "skips", "joined", "shared", "start", "cast")
}
"""Each layer looped before the next; skips across loops; a second pass that reads the first pass' keys and values, with
its own or without; the input in every layer; an iteration with a cast without effect."""
