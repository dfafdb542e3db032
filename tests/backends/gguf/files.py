"""Tiny models, and what is in the files that are written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from torch import Tensor

from loopq_compile.models import repeat_layers

VOCABULARY = 128


def looped_llama(kind: str = "Llama", **options: Any) -> Any:
    """A tiny model of transformers with layers 0, 1, 1, 2 of random weights; `kind` is `Llama`, `Qwen2` or `Qwen3`."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256} | options
    config = getattr(transformers, f"{kind}Config")(initializer_range=0.1, **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, value in model.named_parameters():
        if value.ndim == 1:  # gains and biases that a swapped name would show
            value.data += 0.2 * torch.randn_like(value)
    return repeat_layers(model, 1, 1, 2)


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
