"""Huginn: a recurrent-depth language model (arXiv 2502.05171, seal-rg/recurrent-pretraining).

    e = prelude(wte(ids) * sqrt(n_embd)); x = initial state
    for t in range(T):
        x = core_block(adapter([x, e]))
    logits = lm_head(ln_f(coda(ln_f(x))))        # the final norm is used twice, the head is the embedding

A layer has a norm before every sublayer and one after it, the latter *with* the residual: `x = norm_2(attn(norm_1(x)) +
x)`, `x = norm_4(mlp(norm_3(x)) + x)`.

The published model draws its initial state at random in every call. A compiled model must be a function of its inputs,
so here the state is a constant vector from a seed for all positions, or an argument. Parameter names are those of the
public checkpoint. Against the public code (commit 59e0b69, on transformers 4.57.6; random weights, float32, the same
initial state) the largest difference of a logit is 1.4e-5 where the largest logit is 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.models.parts import Context, RecurrentDepth, check_loops, split_heads


@dataclass(frozen=True)
class HuginnConfig:
    """Sizes of a `Huginn`, by the names of its own configuration; the defaults are the published 3.5B model's.

    `state_scale` is the standard deviation of the initial state in units of an embedding's; 0 starts from zero.
    """

    vocab_size: int = 65536
    n_embd: int = 5280
    n_heads: int = 55
    intermediate_size: int = 17920
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 4
    n_layers_in_coda: int = 2
    mean_recurrence: int = 32
    norm_eps: float = 1e-6
    qk_bias: bool = True
    bias: bool = False
    tie_embeddings: bool = True
    rope_base: float = 50_000.0
    state_scale: float = 1.0

    def __post_init__(self) -> None:
        check_loops("mean_recurrence", self.mean_recurrence)
        split_heads("n_embd", self.n_embd, self.n_heads)

    @property
    def embedding_scale(self) -> float:
        """The factor of embeddings."""
        return math.sqrt(self.n_embd)


class HuginnAttention(nn.Module):
    """Causal attention with rotary positions; query, key and value from one matrix, with separate biases."""

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.heads, width = config.n_heads, config.n_embd
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_bias = (
            nn.Parameter(torch.zeros(2, 1, config.n_heads, width // config.n_heads)) if config.qk_bias else None
        )
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, seq, n_embd]` to the same shape."""
        query, key, value = self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.qk_bias is not None:
            query, key = query + self.qk_bias[0], key + self.qk_bias[1]
        return self.proj(context.attend(context.rotate(query), context.rotate(key), value))


class HuginnMLP(nn.Module):
    """`proj(silu(a) * b)` with `a, b = fc(x)`."""

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, n_embd]` to the same shape."""
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class HuginnBlock(nn.Module):
    """A sandwich: norms before each sublayer, and after its sum with the residual."""

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.attn, self.mlp = HuginnAttention(config), HuginnMLP(config)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (
            nn.RMSNorm(config.n_embd, eps=config.norm_eps) for _ in range(4)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, seq, n_embd]` to the same shape."""
        x = self.norm_2(self.attn(self.norm_1(x), context) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


class Huginn(RecurrentDepth):
    """The recurrent-depth language model: ids `[batch, seq]` in, logits `[batch, seq, vocab_size]` out.

    `loops` (None: the configuration's `mean_recurrence`) sets how often the core runs; `seed` makes the initial state.
    """

    config: HuginnConfig

    def __init__(self, config: HuginnConfig, loops: int | None = None, seed: int = 0) -> None:
        def stack(layers: int) -> nn.ModuleList:
            return nn.ModuleList(HuginnBlock(config) for _ in range(layers))

        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "prelude": stack(config.n_layers_in_prelude),
            "adapter": nn.Linear(2 * config.n_embd, config.n_embd, bias=config.bias),
            "core_block": stack(config.n_layers_in_recurrent_block),
            "coda": stack(config.n_layers_in_coda),
            "ln_f": nn.RMSNorm(config.n_embd, eps=config.norm_eps),
        }
        std = config.state_scale * config.embedding_scale * math.sqrt(2 / (5 * config.n_embd))
        tied = config.tie_embeddings
        super().__init__(config, parts, tied, loops, state_width=config.n_embd, state_std=std, seed=seed)

    def forward(
        self, input_ids: Tensor, initial_state: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of all positions.

        initial_state: `[batch, seq, n_embd]`, instead of the constant one. attention_mask: 0/1 `[batch, seq]`, 0 on
        padding, left or right (the published code takes one and does not use it).
        """
        config, parts = self.config, self.transformer
        context = Context.of(input_ids, attention_mask, config.n_embd // config.n_heads, config.rope_base)
        injected = self._run("prelude", parts["wte"](input_ids) * config.embedding_scale, context)

        def core(state: Tensor) -> Tensor:
            return self._run("core_block", parts["adapter"](torch.cat([state, injected], dim=-1)), context)

        state = self.recur(input_ids, initial_state, core)
        return self.lm_head(parts["ln_f"](self._run("coda", parts["ln_f"](state), context))).float()

    def _run(self, stack: str, x: Tensor, context: Context) -> Tensor:
        for block in self.layers(stack):
            x = block(x, context)
        return x
