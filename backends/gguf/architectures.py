"""The models of llama.cpp that a program can be, by the class that was captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loopq_compile.errors import LoopQError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a model.

    Args:
        name: llama.cpp's name.
        member: name in `gguf.MODEL_ARCH`.
        turns_rows: rotary positions turn neighbouring channels: rows of queries and keys are stored in that order.
        loops: how it runs stored layers several times, so that each is stored once. "stack": all of them in turn.
            "cycles": a low stack some times, then a high stack, and all of this again. Empty: it runs each once.
        rope_factors: it reads a factor for every rotary frequency (`rope_freqs.weight`).
        biases: its linears can have them.
        norm: the final norm has a gain, `model.norm.weight`.
        names: tensors that the package's map lacks; `{bid}` stands for the number of a layer.
    """

    name: str
    member: str
    turns_rows: bool = False
    loops: Literal["", "stack", "cycles"] = ""
    rope_factors: bool = False
    biases: bool = True
    norm: bool = True
    names: Mapping[str, str] = field(default_factory=dict)


_LLAMA = Architecture("llama", "LLAMA", turns_rows=True, rope_factors=True)
_NANBEIGE = Architecture("nanbeige", "NANBEIGE", turns_rows=True, loops="stack", rope_factors=True)
_HRM_TEXT = Architecture(
    "hrm_text",
    "HRM_TEXT",
    loops="cycles",
    biases=False,
    norm=False,
    names={
        "model.z_L_init": "hrm.z_l_init",
        "model.layers.{bid}.self_attn.gate_proj": "blk.{bid}.attn_gate",
    },
)
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", "QWEN2"),
    "Qwen3ForCausalLM": Architecture("qwen3", "QWEN3"),
    "Nanbeige": _NANBEIGE,
    "NanbeigeForCausalLM": _NANBEIGE,
    "HrmTextForCausalLM": _HRM_TEXT,
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
    """The package's own map of tensor names. Architectures that a release does not know have the names of Llama."""
    import gguf

    member = getattr(gguf.MODEL_ARCH, architecture.member, gguf.MODEL_ARCH.LLAMA)
    found: Any = gguf.get_tensor_name_map(member, layers)
    for at in range(layers):
        for ours, theirs in architecture.names.items():
            found.mapping[ours.format(bid=at)] = (None, theirs.format(bid=at))
    return found
