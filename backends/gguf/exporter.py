"""From a program to a GGUF file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx

from loopq_compile.backends.gguf.architectures import Architecture, find_architecture, name_map
from loopq_compile.backends.gguf.blocks import BLOCK, SUPER_BLOCK, q4_0, q6_k, q8_0
from loopq_compile.backends.gguf.contents import LAYER, Contents, Stored, read_contents
from loopq_compile.backends.gguf.metadata import add_metadata, check_config, read_config, rope_factors
from loopq_compile.backends.gguf.refuse import METHOD, check_program
from loopq_compile.backends.gguf.vocabulary import add_tokenizer
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.state import get_state
from loopq_compile.passes.quantize.round_scales import largest_change, rounded
from loopq_compile.storage.atomic import writing_file

FLOATS = ("q8_0", "q6_k", "f16", "f32")
"""Types for embeddings and head, which schemes leave in floating point."""
EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_FREQUENCIES = "model.rotary_emb.inv_freq"
_OPENED = ("model.rotary_emb.original_inv_freq", "activation_clip.")
"""Stored tensors without a place in the file; `check_program` has looked at clip ratios."""
_TURNED = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class GgufExport:
    """What was written.

    Args:
        path, bytes: the file.
        architecture: llama.cpp's name.
        layers: as they run.
        stored_layers: as they stand in the file.
        types: how many tensors have which type.
        scale_change: the largest change of a scale that float16 made, relative to it; 0 if scales went in unchanged.
        tokenizer: which tokenizer was written; empty without one.
    """

    path: Path
    bytes: int
    architecture: str
    layers: int
    stored_layers: int
    types: dict[str, int]
    scale_change: float
    tokenizer: str

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))
        lines = [f"{self.path}: {self.architecture}, {self.bytes:,} bytes, {types}"]
        if self.stored_layers < self.layers:
            lines.append(f"{self.layers} layers run, {self.stored_layers} are stored")
        if self.scale_change:
            lines.append(
                f"scales were rounded to float16, by up to {self.scale_change:.1e}; {METHOD} needs no rounding"
            )
        return "\n".join([*lines, *([] if self.tokenizer else ["no tokenizer: llama.cpp takes token ids only"])])


def export(
    graph_module: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    config: Any = None,
    embeddings: str = "q8_0",
    head: str = "q8_0",
    pre_tokenizer: str | None = None,
) -> GgufExport:
    """Writes a program as a GGUF file; see `Program.export_gguf`."""
    for name, value in (("embeddings", embeddings), ("head", head)):
        if value not in FLOATS:
            raise LoopQError(f"{name}={value!r} is unknown.{did_you_mean(str(value), FLOATS)}")
    gguf = _package()
    state = get_state(graph_module)
    architecture = find_architecture(state.model_name)
    check_program(graph_module)
    settings = read_config(config, tokenizer)
    check_config(settings, architecture)
    contents = read_contents(graph_module)
    loops, order = _layers(contents, architecture)
    with writing_file(path) as part:
        writer = gguf.GGUFWriter(part, architecture.name)
        add_metadata(writer, settings, architecture, len(order), state.model_name)
        if architecture.loops:
            writer.add_uint32(f"{architecture.name}.num_loops", loops)
            writer.add_bool(f"{architecture.name}.skip_loop_final_norm", contents.uses[NORM] == 1)
        vocabulary = len(contents.tensors[EMBEDDINGS].values)
        writer.add_vocab_size(vocabulary)
        made = _Tensors(writer, architecture, settings, {EMBEDDINGS: embeddings, HEAD: head})
        made.add_all(contents, order)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if "Q4_0" in made.types else gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
            written = ""
        else:
            written = add_tokenizer(writer, Path(tokenizer), vocabulary, pre_tokenizer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = Path(path)
    types, change = dict(made.types), made.change
    size = found.stat().st_size
    return GgufExport(found, size, architecture.name, loops * len(order), len(order), types, change, written)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LoopQError("GGUF files need the package gguf: pip install 'loopq-compile[gguf]'.") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def _layers(contents: Contents, architecture: Architecture) -> tuple[int, tuple[int, ...]]:
    """How often the engine runs the stored layers, and which layers these are.

    Raises:
        LoopQError: the final norm does not run where the engine runs it, or a looping engine runs other layers.
    """
    for name in (EMBEDDINGS, NORM):
        if name not in contents.tensors:
            raise LoopQError(f"The program has no {name!r}, so it is not {architecture.name}. Export it as ONNX.")
    order, norms = contents.order, contents.uses[NORM]
    once = tuple(dict.fromkeys(order))
    loops = len(order) // max(len(once), 1)
    if architecture.loops and order == once * loops and norms in (1, loops):
        return loops, once
    if not architecture.loops and norms == 1:
        return 1, order
    raise LoopQError(
        f"llama.cpp's {architecture.name} does not run layers {list(order)} with the final norm {norms} times. Export "
        "the program as ONNX."
    )


class _Tensors:
    """Turns tensors of a program into those of a file."""

    def __init__(self, writer: Any, architecture: Architecture, config: dict[str, Any], floats: dict[str, str]) -> None:
        self.writer, self.architecture, self.config, self.floats = writer, architecture, config, floats
        self.types: Counter[str] = Counter()
        self.change = 0.0

    def add_all(self, contents: Contents, order: tuple[int, ...]) -> None:
        """Adds every tensor; those of a layer once for every position in `order`.

        Raises:
            LoopQError: a tensor has no place in the architecture.
        """
        names = name_map(self.architecture, len(order))
        positions: dict[int, list[int]] = {}
        for position, layer in enumerate(order):
            positions.setdefault(layer, []).append(position)
        for name, stored in contents.tensors.items():
            if name == _FREQUENCIES or name.startswith(_OPENED):
                continue
            part = LAYER.fullmatch(name)
            uses = [f"{part[1]}{at}.{part[3]}" for at in positions[int(part[2])]] if part else [name]
            targets = [names.get_name(use, try_suffixes=(".weight", ".bias")) for use in uses]
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
