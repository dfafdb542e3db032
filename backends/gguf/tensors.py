"""Tensors of a program as llama.cpp stores them: names, order of rows, block formats."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from torch import Tensor

from loopq_compile.backends.gguf.architectures import Architecture, name_map
from loopq_compile.backends.gguf.blocks import BLOCK, SUPER_BLOCK, q4_0, q6_k, q8_0
from loopq_compile.backends.gguf.contents import LAYER, Contents, Stored
from loopq_compile.backends.gguf.metadata import rope_factors
from loopq_compile.backends.gguf.refuse import METHOD
from loopq_compile.errors import LoopQError
from loopq_compile.passes.quantize.round_scales import largest_change, rounded

FLOATS = ("q8_0", "q6_k", "f16", "f32")
"""Types for embeddings and head, which schemes leave in floating point."""
_FREQUENCIES = "model.rotary_emb.inv_freq"
_OPENED = ("model.rotary_emb.original_inv_freq", "activation_clip.")
"""Stored tensors without a place in the file; `check_program` has looked at clip ratios."""
_TURNED = ("self_attn.q_proj", "self_attn.k_proj")


class TensorWriter:
    """Turns tensors of a program into those of a file."""

    def __init__(self, writer: Any, architecture: Architecture, config: dict[str, Any], floats: dict[str, str]) -> None:
        self.writer, self.architecture, self.config, self.floats = writer, architecture, config, floats
        self.types: Counter[str] = Counter()
        self.change = 0.0

    def add_all(self, contents: Contents, order: tuple[str, ...]) -> None:
        """Adds every tensor; those of a layer once for every position in `order`.

        Raises:
            LoopQError: a tensor has no place in the architecture.
        """
        names = name_map(self.architecture, len(order))
        suffixes = (".weight", ".bias") if self.architecture.biases else (".weight",)
        positions: dict[str, list[int]] = {}
        for position, layer in enumerate(order):
            positions.setdefault(layer, []).append(position)
        for name, stored in contents.tensors.items():
            if name == _FREQUENCIES or name.startswith(_OPENED):
                continue
            part = LAYER.fullmatch(name)
            uses = [f"model.layers.{at}.{part[2]}" for at in positions[part[1]]] if part else [name]
            targets = [names.get_name(use, try_suffixes=suffixes) for use in uses]
            if None in targets:
                raise LoopQError(
                    f"llama.cpp's {self.architecture.name} has no place for {name!r} {list(stored.values.shape)}. "
                    f"Compile with method={METHOD!r} if quantization made it; otherwise export the program as ONNX."
                )
            values, kind = self._encoded(name, stored)
            for target in targets:
                self._add(target, values, kind)
        self._add_factors(contents)

    def _add_factors(self, contents: Contents) -> None:
        stored = contents.tensors.get(_FREQUENCIES)
        frequencies = None if stored is None else _array(stored.values)
        factors = rope_factors(self.config, frequencies, self.architecture)
        if factors is not None:
            self._add("rope_freqs.weight", factors, "F32")

    def _add(self, name: str, values: np.ndarray, kind: str) -> None:
        from gguf import GGMLQuantizationType

        plain = values.dtype in (np.float32, np.float16)
        self.writer.add_tensor(name, values, raw_dtype=None if plain else GGMLQuantizationType[kind])
        self.types[kind] += 1

    def _encoded(self, name: str, stored: Stored) -> tuple[np.ndarray, str]:
        """Values as they are stored, and their type."""
        values = stored.values
        if self.architecture.turns_rows and name.rpartition(".")[0].endswith(_TURNED):
            heads = self.config["num_attention_heads"]
            heads = heads if "q_proj" in name else self.config.get("num_key_value_heads") or heads
            scale = None if stored.scale is None else turned(stored.scale, heads)
            stored = Stored(turned(values, heads), scale)
        if stored.scale is not None:
            return self._packed(name, stored.values, stored.scale)
        numbers = _array(stored.values.float())
        return _float(name, numbers, self.floats.get(name, "f32"))

    def _packed(self, name: str, codes: Tensor, scale: Tensor) -> tuple[np.ndarray, str]:
        half = rounded(scale.float(), name)
        self.change = max(self.change, largest_change(codes, scale, half))
        groups = codes.shape[1] // BLOCK
        scales, integers = _array(half).astype(np.float16), _array(codes)
        scales = np.repeat(scales, groups // scales.shape[1], axis=1)
        small = integers.min(initial=0) >= -8 and integers.max(initial=0) <= 7
        return (q4_0(integers, scales), "Q4_0") if small else (q8_0(integers, scales), "Q8_0")


def turned(rows: Tensor, heads: int) -> Tensor:
    """Rows `[heads * size, ...]` of a projection, the two halves of each head in turns, as llama.cpp rotates them."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _float(name: str, numbers: np.ndarray, kind: str) -> tuple[np.ndarray, str]:
    from gguf import GGMLQuantizationType, quants

    block = {"q8_0": BLOCK, "q6_k": SUPER_BLOCK}.get(kind, 1)
    if numbers.shape[-1] % block:
        raise LoopQError(
            f"{name!r} has rows of {numbers.shape[-1]}, no multiple of {block}, so it cannot be {kind}. Use f16."
        )
    if kind == "q8_0":
        return quants.quantize(numbers, GGMLQuantizationType.Q8_0), "Q8_0"
    if kind == "q6_k":
        return q6_k(numbers), "Q6_K"
    return (numbers.astype(np.float16), "F16") if kind == "f16" else (numbers, "F32")


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())
