"""Tiny models, and what is in the files that are written of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import loopq_compile as lq
from loopq_compile.models import repeat_layers
from loopq_compile.models.nanbeige import Nanbeige, NanbeigeConfig
from loopq_compile.passes.quantize.round_scales import RoundScales
from tests.looped_models import hrm_text

VOCABULARY = 128


def looped_llama(kind: str = "Llama", **options: Any) -> Any:
    """A tiny model of transformers with layers 0, 1, 1, 2 of random weights; `kind` is `Llama`, `Qwen2` or `Qwen3`."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256} | options
    config = getattr(transformers, f"{kind}Config")(initializer_range=0.1, **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for value in model.parameters():
        if value.ndim == 1:  # gains and biases that a swapped name would show
            value.data += 0.2 * torch.randn_like(value)
    return repeat_layers(model, 1, 1, 2)


@cache
def compiled(kind: str = "Llama", scheme: Any = "w4a8", exact: bool = True) -> tuple[Any, lq.Program]:
    """A model and its program, rounded to nearest with float16 scales if `exact`; both are shared by tests."""
    model = looped_llama(kind)
    method = lq.pipelines.symmetric()
    return model, lq.compile(
        model, scheme=scheme, method=method.insert_after("pack-weights", RoundScales()) if exact else method
    )


def nanbeige(scheme: Any = "w4a8", **options: Any) -> tuple[NanbeigeConfig, lq.Program]:
    """The program of a tiny Nanbeige with two layers that run three times, and its configuration."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_loops": 3}
    config = NanbeigeConfig(initializer_range=0.1, **sizes, **options)
    method = lq.pipelines.symmetric().insert_after("pack-weights", RoundScales())
    return config, lq.compile(Nanbeige(config).eval(), tokens(2), scheme=scheme, method=method)


def hrm(scheme: Any = "w4a8", **options: Any) -> tuple[Any, lq.Program]:
    """A tiny HRM-Text, two layers in either stack, and its program: twice the low stack two times and the high one."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "head_dim": 32, "L_cycles": 2, "initializer_range": 0.1}
    model = hrm_text(**(sizes | {"embedding_scale": 7.5} | options))
    method = lq.pipelines.symmetric().insert_after("pack-weights", RoundScales())
    return model, lq.compile(model, scheme=scheme, method=method)


def tokens(rows: int = 1, length: int = 24, seed: int = 1) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as `gguf.quants` reads them."""
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


def field(path: Path, key: str) -> Any:
    """One value of a file's metadata."""
    return GGUFReader(path).fields[key].contents()


def unpacked(path: Path, goal: Path) -> Path:
    """The same file with every tensor in float32, so that llama.cpp has nothing to round activations for."""
    reader = GGUFReader(path)
    writer = GGUFWriter(goal, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = entry.types[0]
            writer.add_key_value(name, entry.contents(), kind, entry.types[-1] if kind == GGUFValueType.ARRAY else None)
    for name, values in tensors(path).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return goal


def save_tokenizer(folder: Path, digits: bool = False) -> Tokenizer:
    """Writes a byte-level BPE tokenizer of at most 300 tokens, with an end token, and its settings."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    tokenizer.pre_tokenizer = splits if digits else bytes_
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the loop runs the block again and again, 3 times in a row"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer
