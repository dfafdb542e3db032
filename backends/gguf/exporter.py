"""From a program to a GGUF file."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from loopq_compile.backends.gguf.architectures import find_architecture
from loopq_compile.backends.gguf.contents import read_contents
from loopq_compile.backends.gguf.metadata import add_metadata, check_config, read_config
from loopq_compile.backends.gguf.refuse import METHOD, check_program
from loopq_compile.backends.gguf.stack import EMBEDDINGS, HEAD, read_stack
from loopq_compile.backends.gguf.tensors import FLOATS, TensorWriter
from loopq_compile.backends.gguf.vocabulary import add_tokenizer
from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.state import get_state
from loopq_compile.storage.atomic import real_path, writing_file
from loopq_compile.storage.card import CARD_FILE, write_card


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
    stack = read_stack(contents, architecture)
    with writing_file(path) as part:
        writer = gguf.GGUFWriter(part, architecture.name)
        add_metadata(writer, settings, architecture, stack, state.model_name)
        vocabulary = len(contents.tensors[EMBEDDINGS].values)
        writer.add_vocab_size(vocabulary)
        made = TensorWriter(writer, architecture, settings, {EMBEDDINGS: embeddings, HEAD: head})
        made.add_all(contents, stack.stored)
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
        size = part.stat().st_size
    found = Path(path)
    others = (file for file in real_path(path).parent.iterdir() if not file.name.startswith((".", CARD_FILE)))
    if all(file.suffix == ".gguf" for file in others):  # a folder of GGUF files, as the hub has them
        write_card(found.parent, state, "gguf")
    types, change = dict(made.types), made.change
    return GgufExport(found, size, architecture.name, stack.runs, len(stack.stored), types, change, written)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LoopQError("GGUF files need the package gguf: pip install 'loopq-compile[gguf]'.") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf
