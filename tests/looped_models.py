"""Tiny models of every architecture, for tests that hold for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loopq_compile.models import HuginnConfig, LoopFormerConfig, NanbeigeConfig, OuroConfig, ParcaeConfig

VOCABULARY = 64
LOOPFORMER = LoopFormerConfig(block_size=32, vocab_size=VOCABULARY, n_layer=1, n_head=2, n_embd=32, intermediate_dim=64)
PARCAE = ParcaeConfig(
    padded_vocab_size=VOCABULARY, n_embd=32, intermediate_size=64, num_attention_heads=2, n_layers_in_prelude=1,
    n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_recurrence=3, mean_backprop_depth=3,
    recurrent_embedding_dimension=32, recurrent_intermediation_embedding_dimension=64, logit_softcap=15.0,
)  # fmt: skip
HUGINN = HuginnConfig(
    vocab_size=VOCABULARY, n_embd=32, n_heads=2, intermediate_size=64, n_layers_in_prelude=1,
    n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_recurrence=3,
)  # fmt: skip
OURO = OuroConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    total_ut_steps=3,
)  # fmt: skip

NANBEIGE = NanbeigeConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rope_theta=10_000.0,
)  # fmt: skip
"""Queries are twice as wide as the state, as in the published model."""


def with_random_weights(model: nn.Module) -> nn.Module:
    """No gate is zero and no norm is one, so that an initialisation hides nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.3 * noise)
    return model.eval()


class UniversalTransformer(nn.Module):
    """`torch.nn.TransformerEncoderLayer` under a causal mask, several times, with a vector for every time."""

    def __init__(self, loops: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.time = nn.Parameter(torch.randn(loops, 32))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        padding = None if attention_mask is None else attention_mask == 0
        for vector in self.time:
            x = self.layer(x + vector, src_mask=causal, src_key_padding_mask=padding, is_causal=True)
        return self.head(x)


def zamba2(chunk_size: int) -> nn.Module:
    """A shared attention block before each of two Mamba layers."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="its Zamba2 has another configuration")
    torch.manual_seed(0)
    config = transformers.Zamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, layers_block_type=["hybrid", "hybrid"],
        hybrid_layer_ids=[0, 1], intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_mem_blocks=1,
        adapter_rank=32, use_mem_rope=True, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_expand=2,
        chunk_size=chunk_size, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.Zamba2ForCausalLM(config).eval()


def dory(**sizes: object) -> nn.Module:
    """Layers before and after the loop, of full and of sliding attention within it; the sliding window is short."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="has Dory")
    torch.manual_seed(0)
    config = transformers.DoryConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
        "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 3, "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"], **sizes,
    })  # fmt: skip
    return transformers.DoryForCausalLM(config).eval()


def hrm_text(**sizes: object) -> nn.Module:
    """Two stacks in nested cycles: the low one twice, then the high one, and all of this twice."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="has HRM-Text")
    torch.manual_seed(0)
    config = transformers.HrmTextConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "H_cycles": 2, "L_cycles": 2, **sizes,
    })  # fmt: skip
    model = transformers.HrmTextForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.z_L_init)
    return model
