"""The models of llama.cpp that a program can be, by the class that was captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loopq_compile.errors import LoopQError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a model.

    Args:
        name: llama.cpp's name.
        member: name in `gguf.MODEL_ARCH`.
        turns_rows: rotary positions turn neighbouring channels: rows of queries and keys are stored in that order.
        loops: it runs the stack several times itself, so that a layer is stored once.
        rope_factors: it reads a factor for every rotary frequency (`rope_freqs.weight`).
    """

    name: str
    member: str
    turns_rows: bool = False
    loops: bool = False
    rope_factors: bool = False


_LLAMA = Architecture("llama", "LLAMA", turns_rows=True, rope_factors=True)
_NANBEIGE = Architecture("nanbeige", "NANBEIGE", turns_rows=True, loops=True, rope_factors=True)
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", "QWEN2"),
    "Qwen3ForCausalLM": Architecture("qwen3", "QWEN3"),
    "Nanbeige": _NANBEIGE,
    "NanbeigeForCausalLM": _NANBEIGE,
}
"""By name of the captured class, which fixes what is computed between the weights."""


def find_architecture(model_name: str) -> Architecture:
    """The architecture of a captured class.

    Raises:
        LoopQError: llama.cpp has none, or this export does not know it.
    """
    found = ARCHITECTURES.get(model_name)
    if found is None:
        raise LoopQError(
            f"{model_name} cannot be written as GGUF: it is not one of {', '.join(ARCHITECTURES)}. Export it as ONNX "
            "instead."
        )
    return found


def name_map(architecture: Architecture, layers: int) -> Any:
    """The package's own map of tensor names. Releases that do not know `nanbeige` know its tensors: those of Llama."""
    import gguf

    member = getattr(gguf.MODEL_ARCH, architecture.member, gguf.MODEL_ARCH.LLAMA)
    return gguf.get_tensor_name_map(member, layers)
