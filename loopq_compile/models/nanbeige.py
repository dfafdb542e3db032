"""A looped language model in the style of Nanbeige4.2 (arXiv 2607.22083).

A stack of Llama-like layers runs `num_loops` times, and the final norm follows every run, so that a loop passes its
*normed* state to the next one and to the head:

    h = embed_tokens(input_ids)
    for t in range(num_loops):
        h = norm(layers(h))           # the same weights each time
    logits = lm_head(h)

With `skip_loop_final_norm` the norm follows only the last run. Heads have their own size (`head_dim`), so that the
queries may be wider than the state; queries share keys and values in groups; rotary positions rotate the two halves of
a head as pairs. Parameter names are those of the published checkpoint (`Nanbeige/Nanbeige4.2-3B`). Other
features of the published code, which its configuration switches off, are refused: see `NanbeigeConfig.from_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.models.ouro import rotary_tables, rotate
from loopq_compile.models.parts import causal_attention, check_loops, read_config, visible_keys

_UNUSED = (
    "attention_bias", "mlp_bias", "qk_layernorm", "enable_double_loop_split", "loop_share_kv", "enable_depth_attention",
    "enable_hyper_connection", "enable_mhc", "emb_neighbor_num", "insert_ngram_layer_idx", "ngram_insert_all_layers",
    "loop_loss_weights", "rope_scaling",
)  # fmt: skip
"""Keys of the published configuration that change the model once they are set; the published checkpoint sets none."""


@dataclass(frozen=True)
class NanbeigeConfig:
    """Sizes of a `Nanbeige` model; names and defaults are those of the configuration file of Nanbeige4.2-3B."""

    vocab_size: int = 166_144
    hidden_size: int = 3072
    intermediate_size: int = 10_752
    num_hidden_layers: int = 22
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_loops: int = 2
    skip_loop_final_norm: bool = False
    rope_theta: float = 70_000_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_loops("num_loops", self.num_loops)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even, for rotary positions")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NanbeigeConfig:
        """Reads a published `config.json`; keys without a meaning here are ignored.

        Raises:
            ValueError: a variant of the published code is switched on that this model does not have.
        """
        if given := [name for name in _UNUSED if values.get(name)]:
            raise ValueError(
                f"{', '.join(given)}: not part of this reference model, which is Nanbeige4.2-3B as published"
            )
        return read_config(cls, values)


class NanbeigeAttention(nn.Module):
    """Causal attention with rotary positions and heads of `head_dim` channels."""

    def __init__(self, config: NanbeigeConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        """`[batch, seq, hidden]` to the same shape; `tables` as `[seq, 1, head_dim]`, `visible` as `visible_keys`."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(causal_attention(rotate(query, *tables), rotate(key, *tables), value, visible))


class NanbeigeMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: NanbeigeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NanbeigeLayer(nn.Module):
    """A Llama layer: a norm before attention and before the MLP, none after."""

    def __init__(self, config: NanbeigeConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = NanbeigeAttention(config), NanbeigeMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), tables, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class NanbeigeStack(nn.Module):
    """Embeddings, the loop and its norm: everything but the head."""

    def __init__(self, config: NanbeigeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NanbeigeLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, loops: int) -> Tensor:
        """The normed state `[batch, seq, hidden]` after the last of `loops` loops."""
        x = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        tables = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        visible = None if attention_mask is None else visible_keys(attention_mask)
        for _ in range(loops):
            for layer in self.layers:
                x = layer(x, tables, visible)
            if not self.config.skip_loop_final_norm:
                x = self.norm(x)
        return self.norm(x) if self.config.skip_loop_final_norm else x


class Nanbeige(nn.Module):
    """The looped language model: token ids `[batch, seq]` in, logits `[batch, seq, vocab_size]` out.

    `loops` (None: the configuration's `num_loops`) sets how often the stack runs; change it on the module to run it
    less or more often.
    """

    def __init__(self, config: NanbeigeConfig, loops: int | None = None) -> None:
        super().__init__()
        self.config, self.loops = config, loops
        self.model = NanbeigeStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits after the last loop.

        attention_mask: 0/1 `[batch, seq]`, 0 on padding, left or right (positions are relative, so padding does not
        change the logits of real tokens).
        """
        return self.lm_head(self.model(input_ids, attention_mask, self.loops or self.config.num_loops))
