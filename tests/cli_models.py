"""Tiny untrained models with a tokenizer, for tests of loading, measuring and the command line."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from loopq_compile.models import Ouro, OuroConfig

WORDS = ["<|endoftext|>", *(f"w{i}" for i in range(63))]
TEXT = " ".join(f"w{(7 * i * i + i) % 63}" for i in range(300))


def tokenizer() -> Tokenizer:
    """One token per word `w0` to `w62`."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    made.pre_tokenizer = Whitespace()
    return made


def tiny_ouro(loops: int = 2) -> Ouro:
    """One looped layer."""
    torch.manual_seed(0)
    config = OuroConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        total_ut_steps=loops,
        tie_word_embeddings=False,
    )
    return Ouro(config).eval()


def tiny_llama(layers: int = 2, config: str = "LlamaConfig") -> Any:
    """A model of transformers, from the name of its configuration class."""
    torch.manual_seed(0)
    made = getattr(transformers, config)(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(made).eval()
