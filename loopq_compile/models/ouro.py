"""A looped language model in the style of Ouro (arXiv 2510.25741).

One stack of layers runs `total_ut_steps` times over the same state. The final norm is inside the loop, so loop `t`
passes its *normed* state to loop `t + 1`, to the exit gate and (in the last loop) to the head:

    h = embed(input_ids)
    for t in range(T):
        h = norm(layers(h))           # the same weights each time
        exit_logits[t] = early_exit_gate(h)
    logits = lm_head(h)

Each layer is sandwich-normed (RMSNorm before and after attention and MLP), with rotary positions and a SwiGLU MLP.
Parameter names are those of the public Ouro checkpoints. Against the public code (LoopedLMs/ouro_rl, commit 531187b, on
transformers 4.57.6; random weights, float32, with and without padding, grouped queries, tied and untied head) the
largest difference of a logit is 6.2e-6 where the largest logit is 4.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopq_compile.models.parts import visible_keys


@dataclass(frozen=True)
class OuroConfig:
    """Sizes of an `Ouro` model; the names are those of Ouro's own configuration file.

    `embedding_scale` multiplies the embeddings (1.0 in Ouro; a small tied model trains better with
    `sqrt(hidden_size)`, which gives the state unit size while the head, which shares the matrix, starts with logits
    of unit size).
    """

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    total_ut_steps: int = 4
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    embedding_scale: float = 1.0
    sandwich_norm_init: float = 0.15

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} must split into num_attention_heads={self.num_attention_heads} "
                "heads of even size"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.key_value_heads}"
            )
        if self.total_ut_steps < 1:
            raise ValueError(f"total_ut_steps={self.total_ut_steps} must be at least 1")

    @classmethod
    def ouro_1_4b(cls) -> "OuroConfig":
        """ByteDance/Ouro-1.4B: 24 layers, four loops, an untied head."""
        return cls(
            vocab_size=49152,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            rope_theta=1_000_000.0,
            tie_word_embeddings=False,
        )

    @classmethod
    def ouro_2_6b(cls) -> "OuroConfig":
        """ByteDance/Ouro-2.6B: the 1.4B model's sizes with 48 layers."""
        return replace(cls.ouro_1_4b(), num_hidden_layers=48)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads (`num_attention_heads` when not grouped)."""
        return self.num_key_value_heads or self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OuroConfig":
        """Read a dictionary as `to_dict` writes it; keys that are not fields are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass
class LoopedLMOutput:
    """What `Ouro` returns.

    logits: `[batch, seq, vocab]`, from the state after the last loop.
    exit_logits: `[batch, seq, loops]`; `sigmoid` of entry `t` is the probability of stopping after loop `t`, given
    that the token came that far.
    """

    logits: Tensor
    exit_logits: Tensor


torch.export.register_dataclass(LoopedLMOutput, serialized_type_name="loopq_compile.models.LoopedLMOutput")


def exit_distribution(exit_logits: Tensor) -> Tensor:
    """Probability `[..., loops]` that a token stops after each loop; the last loop takes the rest (sums to 1)."""
    log_stop = F.logsigmoid(exit_logits)
    log_go_on = F.logsigmoid(-exit_logits)
    log_reached = log_go_on.cumsum(-1) - log_go_on
    log_stop = torch.cat([log_stop[..., :-1], torch.zeros_like(log_stop[..., -1:])], dim=-1)
    return (log_stop + log_reached).exp()


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables `[seq, head_dim]` (fp32).

    Channels `i` and `i + head_dim / 2` of position `p` share the angle `p * theta^(-2i / head_dim)`.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(torch.float32)[:, None] * (theta**-exponents)[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs of `x` `[batch, heads, seq, head_dim]` by the angles of their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class OuroAttention(nn.Module):
    """Causal self-attention with rotary positions; queries share keys if `num_key_value_heads` is smaller."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.key_value_heads
        kv_size = config.key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        """`[batch, seq, hidden]` to the same shape; `bias` as from `visible_keys`; None: plain causal attention."""
        query = rotate(self._heads(self.q_proj(x)), cos, sin)
        key = rotate(self._heads(self.k_proj(x)), cos, sin)
        value = self._heads(self.v_proj(x))
        if self.groups > 1:
            key = key.repeat_interleave(self.groups, dim=1)
            value = value.repeat_interleave(self.groups, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class OuroMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OuroLayer(nn.Module):
    """Attention and MLP, each between two norms: `x + norm_2(sublayer(norm(x)))`."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.self_attn = OuroAttention(config)
        self.mlp = OuroMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm_2 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm_2 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), cos, sin, bias))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class OuroStack(nn.Module):
    """Embeddings and the loop: everything but the head."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OuroLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, loops: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The normed state `[batch, seq, hidden]` and the exit logit `[batch, seq, 1]` of each of the `loops` loops."""
        config = self.config
        hidden = self.embed_tokens(input_ids) * config.embedding_scale
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta)
        cos, sin = cos.to(hidden.dtype), sin.to(hidden.dtype)
        bias = None if attention_mask is None else visible_keys(attention_mask)
        states, exits = [], []
        for _ in range(loops):
            for layer in self.layers:
                hidden = layer(hidden, cos, sin, bias)
            hidden = self.norm(hidden)
            states.append(hidden)
            exits.append(self.early_exit_gate(hidden))
        return states, exits


class Ouro(nn.Module):
    """The looped language model: token ids `[batch, seq]` in, `LoopedLMOutput` out.

    `loops` (None: the configuration's `total_ut_steps`) sets how often the stack runs; change it on the module to run
    fewer or more loops.
    """

    def __init__(self, config: OuroConfig, loops: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.loops = loops
        self.model = OuroStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Initialise so that a small model trains: unit-size states, small norms after sublayers, gate at 0.5."""
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.normal_(self.model.embed_tokens.weight, std=1 / config.embedding_scale)
        for layer in self.model.layers:
            assert isinstance(layer, OuroLayer)
            nn.init.constant_(layer.input_layernorm_2.weight, config.sandwich_norm_init)
            nn.init.constant_(layer.post_attention_layernorm_2.weight, config.sandwich_norm_init)
        nn.init.zeros_(self.model.early_exit_gate.weight)
        nn.init.zeros_(self.model.early_exit_gate.bias)

    def loop_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, loops: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Normed states after each loop and the exit logits, for training and analysis.

        Returns a list of `loops` tensors `[batch, seq, hidden]` and one tensor `[batch, seq, loops]`. `lm_head` of
        any state gives the logits of a model that stops there.
        """
        count = loops or self.loops or self.config.total_ut_steps
        states, exits = self.model(input_ids, attention_mask, count)
        return states, torch.cat(exits, dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LoopedLMOutput:
        """Logits after the last loop.

        input_ids: int64 `[batch, seq]`. attention_mask: 0/1 `[batch, seq]`, 0 on padding, which may be left or right
        (positions are relative, so padding does not change the logits of real tokens; those of padding are finite but
        meaningless).
        """
        states, exit_logits = self.loop_states(input_ids, attention_mask)
        return LoopedLMOutput(logits=self.lm_head(states[-1]), exit_logits=exit_logits)
