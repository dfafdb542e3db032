"""Parcae: prelude, a looped core into which the prelude's result is injected, and a coda (sandyresearch/parcae).

    e = prelude(wte(ids)); x = initial state
    for t in range(T):
        x = core_block(adapter(x, e))
    logits = softcap(lm_head(ln_f(coda(C(x)))))

The adapter is one of three. `diagonal` is a discretised linear system that cannot diverge, as its decay is below one:
`exp(-dt * exp(A_log)) * x + dt * B e` with `dt = softplus(dt_bias)`; `linear` is `W [x, e]`; `add` is `x + e`. Every
other layer adds *value embeddings* to its values: a separate table, looked up by token, times a gate of the first 32
channels. A core layer has one table for all loops.

Published models draw the initial state at random in every call. A compiled model must be a function of its inputs, so
here the state is a constant vector from a seed for all positions, zero, or an argument. Parameter names are those of
the public checkpoints. Against the public code (commit dee8363; random weights, float32, the same initial state, all
adapters, both kinds of MLP) the largest difference of a logit is 3.5e-6 where the largest logit is 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.models.parts import Context, RecurrentDepth, check_loops, split_heads

GATE_CHANNELS = 32
"""Channels of a layer's input that the gate of its value embeddings reads."""
INJECTIONS = ("diagonal", "linear", "add")


@dataclass(frozen=True)
class ParcaeConfig:
    """Sizes and variants of a `Parcae` model, by the names of its own configuration; the defaults are the 140M model's.

    `embedding_scale` and `logit_scale` follow from the public code's `init_strategy` (1 for the published models).
    `state_init` is "like-init" (a constant vector, distributed like an embedding) or "zero". `mean_backprop_depth`
    matters only because the public code derives from it which layers have a gate for value embeddings.
    """

    block_size: int = 2048
    padded_vocab_size: int = 32768
    n_embd: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 2
    n_layers_in_coda: int = 2
    mean_recurrence: int = 8
    mean_backprop_depth: int = 4
    recurrent_embedding_dimension: int = 768
    recurrent_intermediation_embedding_dimension: int = 3072
    recurrent_num_attention_heads: int | None = None
    injection_type: str = "diagonal"
    state_init: str = "like-init"
    prelude_norm: bool = True
    mlp_class_name: str = "BaseMLP"
    nonlin_name: str = "ReLU2"
    norm_eps: float = 1e-5
    qk_norm: bool = True
    qk_bias: bool = False
    clip_qkv: float | None = None
    bias: bool = False
    tie_embeddings: bool = True
    rope_base: float = 50_000.0
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("injection_type", self.injection_type, INJECTIONS),
            ("state_init", self.state_init, ("like-init", "zero")),
            ("mlp_class_name", self.mlp_class_name, ("BaseMLP", "GatedMLP")),
            ("nonlin_name", self.nonlin_name, tuple(NONLINEARITIES)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        check_loops("mean_recurrence", self.mean_recurrence)
        head = split_heads("n_embd", self.n_embd, self.num_attention_heads)
        core = self.core
        core_head = split_heads("recurrent_embedding_dimension", core.n_embd, core.num_attention_heads)
        if self.injection_type == "add" and core.n_embd != self.n_embd:
            raise ValueError("injection_type='add' needs recurrent_embedding_dimension == n_embd")
        if head != core_head or core.num_attention_heads != self.key_value_heads:
            raise ValueError("core and prelude must agree on head size and number of value heads: they share positions")

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads outside the core, which never groups them."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def layers(self) -> int:
        """Number of layers with separate weights."""
        return self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda

    @property
    def core(self) -> _LayerSizes:
        """Sizes of a layer in the core."""
        heads = self.recurrent_num_attention_heads or self.num_attention_heads
        width, inner = self.recurrent_embedding_dimension, self.recurrent_intermediation_embedding_dimension
        return _LayerSizes(width, inner, heads, heads)

    @property
    def outer(self) -> _LayerSizes:
        """Sizes of a layer in prelude and coda."""
        return _LayerSizes(self.n_embd, self.intermediate_size, self.num_attention_heads, self.key_value_heads)

    @classmethod
    def published(cls, name: str) -> ParcaeConfig:
        """The configuration "140m", "370m", "770m" or "1.3b".

        Raises:
            ValueError: there is no such model.
        """
        sizes = {"140m": (768, 6, 2), "370m": (1024, 8, 4), "770m": (1280, 10, 6), "1.3b": (1536, 12, 8)}
        if name not in sizes:
            raise ValueError(f"{name!r} must be one of {', '.join(sizes)}")
        width, heads, layers = sizes[name]
        return replace(
            cls(),
            n_embd=width,
            recurrent_embedding_dimension=width,
            intermediate_size=4 * width,
            recurrent_intermediation_embedding_dimension=4 * width,
            num_attention_heads=heads,
            n_layers_in_prelude=layers,
            n_layers_in_recurrent_block=layers,
            n_layers_in_coda=layers,
        )


@dataclass(frozen=True)
class _LayerSizes:
    n_embd: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int


def _relu2(x: Tensor) -> Tensor:
    """Half the square of `relu(x)`: the published models are trained with this factor."""
    return 0.5 * F.relu(x).square()


NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"ReLU2": _relu2, "GELU": F.gelu, "SiLU": F.silu}


def _alternates(layer: int, layers: int) -> bool:
    """Every other layer, the last one included."""
    return layer % 2 == (layers - 1) % 2


class ParcaeAttention(nn.Module):
    """Causal attention with rotary positions, normed queries and keys, and gated value embeddings."""

    def __init__(self, config: ParcaeConfig, sizes: _LayerSizes, number: int) -> None:
        super().__init__()
        self.config, self.head_dim = config, sizes.n_embd // sizes.num_attention_heads
        width, kv_width = sizes.n_embd, sizes.num_key_value_heads * self.head_dim
        self.c_q = nn.Linear(width, width, bias=config.bias)
        self.c_k = nn.Linear(width, kv_width, bias=config.bias)
        self.c_v = nn.Linear(width, kv_width, bias=config.bias)
        self.c_proj = nn.Linear(width, width, bias=config.bias)
        if config.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, sizes.num_attention_heads, self.head_dim))
        gated = _alternates(number, config.n_layers_in_recurrent_block * config.mean_backprop_depth)
        self.ve_gate = nn.Linear(GATE_CHANNELS, sizes.num_key_value_heads, bias=False) if gated else None

    def forward(self, x: Tensor, context: Context, value_embedding: Tensor | None) -> Tensor:
        """`x` `[batch, seq, width]` to the same shape; `value_embedding` `[batch, seq, kv heads * head size]`."""
        config = self.config
        query, key, value = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None and self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            value = value + gate.unsqueeze(-1) * value_embedding.unflatten(-1, (-1, self.head_dim))
        if config.clip_qkv is not None:
            query, key, value = (part.clamp(-config.clip_qkv, config.clip_qkv) for part in (query, key, value))
        if config.qk_bias:
            query, key = query + self.qk_bias[0], key + self.qk_bias[1]
        query, key = context.rotate(query), context.rotate(key)
        if config.qk_norm:
            query, key = F.rms_norm(query, (self.head_dim,)), F.rms_norm(key, (self.head_dim,))
        return self.c_proj(context.attend(query, key, value))


class ParcaeMLP(nn.Module):
    """`proj(f(fc(x)))`, or `proj(f(a) * b)` with `a, b = fc(x)` for `GatedMLP`."""

    def __init__(self, config: ParcaeConfig, sizes: _LayerSizes) -> None:
        super().__init__()
        self.gated, self.nonlinearity = config.mlp_class_name == "GatedMLP", NONLINEARITIES[config.nonlin_name]
        self.fc = nn.Linear(sizes.n_embd, sizes.intermediate_size * (2 if self.gated else 1), bias=config.bias)
        self.proj = nn.Linear(sizes.intermediate_size, sizes.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, width]` to the same shape."""
        if not self.gated:
            return self.proj(self.nonlinearity(self.fc(x)))
        first, second = self.fc(x).chunk(2, dim=-1)
        return self.proj(self.nonlinearity(first) * second)


class ParcaeBlock(nn.Module):
    """A pre-norm layer; its `number` counts the layers that run, which decides whether it gates value embeddings."""

    def __init__(self, config: ParcaeConfig, sizes: _LayerSizes, number: int) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(sizes.n_embd, eps=config.norm_eps)
        self.attn = ParcaeAttention(config, sizes, number)
        self.norm_2 = nn.RMSNorm(sizes.n_embd, eps=config.norm_eps)
        self.mlp = ParcaeMLP(config, sizes)

    def forward(self, x: Tensor, context: Context, value_embedding: Tensor | None) -> Tensor:
        """`[batch, seq, width]` to the same shape."""
        x = x + self.attn(self.norm_1(x), context, value_embedding)
        return x + self.mlp(self.norm_2(x))


class DiagonalInjection(nn.Module):
    """`exp(-dt * exp(A_log)) * x + dt * B e` with `dt = softplus(dt_bias)`: one step of a stable system."""

    def __init__(self, config: ParcaeConfig) -> None:
        super().__init__()
        width = config.recurrent_embedding_dimension
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.B = nn.Parameter(torch.eye(width, config.n_embd))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """State `[batch, seq, state width]` and injected `[batch, seq, n_embd]` to the shape of the state."""
        step = F.softplus(self.dt_bias)
        return x * torch.exp(-step * self.A_log.exp()) + step * F.linear(e, self.B)


class LinearInjection(nn.Module):
    """`adapter([x, e])`."""

    def __init__(self, config: ParcaeConfig) -> None:
        super().__init__()
        width = config.recurrent_embedding_dimension
        self.adapter = nn.Linear(width + config.n_embd, width, bias=config.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """As in `DiagonalInjection`."""
        return self.adapter(torch.cat([x, e], dim=-1))


class AdditiveInjection(nn.Module):
    """`x + e`."""

    def __init__(self, config: ParcaeConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """As in `DiagonalInjection`, with equal widths."""
        return x + e


_ADAPTERS = {"diagonal": DiagonalInjection, "linear": LinearInjection, "add": AdditiveInjection}


class Parcae(RecurrentDepth):
    """The looped language model: ids `[batch, seq]` in, logits `[batch, seq, padded_vocab_size]` out.

    `loops` (None: the configuration's `mean_recurrence`) sets how often the core runs; `seed` makes the initial state.
    """

    config: ParcaeConfig

    def __init__(self, config: ParcaeConfig, loops: int | None = None, seed: int = 0) -> None:
        before, after = config.n_layers_in_prelude, config.n_layers_in_recurrent_block
        coda = before + after * config.mean_recurrence
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
            "prelude": nn.ModuleList(ParcaeBlock(config, config.outer, i) for i in range(before)),
            "adapter": _ADAPTERS[config.injection_type](config),
            "core_block": nn.ModuleList(ParcaeBlock(config, config.core, before + i) for i in range(after)),
            "C": nn.Linear(config.recurrent_embedding_dimension, config.n_embd, bias=config.bias),
            "coda": nn.ModuleList(ParcaeBlock(config, config.outer, coda + i) for i in range(config.n_layers_in_coda)),
            "ln_f": nn.RMSNorm(config.n_embd, eps=config.norm_eps),
        }
        if config.prelude_norm:
            parts["ln_prelude"] = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        std = config.embedding_scale * math.sqrt(2 / (5 * config.n_embd)) if config.state_init == "like-init" else 0.0
        width, tied = config.recurrent_embedding_dimension, config.tie_embeddings
        super().__init__(config, parts, tied, loops, state_width=width, state_std=std, seed=seed)
        kv_width = config.key_value_heads * (config.n_embd // config.num_attention_heads)
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): nn.Embedding(config.padded_vocab_size, kv_width)
                for layer in range(config.layers)
                if _alternates(layer, config.layers)
            }
        )

    def forward(
        self, input_ids: Tensor, initial_state: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of all positions.

        initial_state: `[batch, seq, recurrent_embedding_dimension]`, instead of the constant one. attention_mask: 0/1
        `[batch, seq]`, 0 on padding, left or right (the published code takes one and does not use it).
        """
        config, parts = self.config, self.transformer
        head_dim = config.n_embd // config.num_attention_heads
        context = Context.of(input_ids, attention_mask, head_dim, config.rope_base)
        injected = self._run("prelude", 0, parts["wte"](input_ids) * config.embedding_scale, input_ids, context)
        if config.prelude_norm:
            injected = parts["ln_prelude"](injected)
        first = config.n_layers_in_prelude

        def core(state: Tensor) -> Tensor:
            return self._run("core_block", first, parts["adapter"](state, injected), input_ids, context)

        state = self.recur(input_ids, initial_state, core)
        after = first + config.n_layers_in_recurrent_block
        logits = self.lm_head(parts["ln_f"](self._run("coda", after, parts["C"](state), input_ids, context)))
        logits = logits.float() * config.logit_scale
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _run(self, stack: str, first: int, x: Tensor, input_ids: Tensor, context: Context) -> Tensor:
        """Runs a stack of layers; value embeddings, if any, are counted from number `first`."""
        for layer, block in enumerate(self.layers(stack), first):
            has_values = str(layer) in self.value_embeds
            x = block(x, context, self.value_embeds[str(layer)](input_ids) if has_values else None)
        return x
