"""`config.json` of a saved program, by which transformers recognizes it; see `loopq_compile.sources.auto_classes`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from loopq_compile.graph.state import CompilerState
from loopq_compile.storage.atomic import real_path
from loopq_compile.storage.manifest import PROGRAM, listed

HUB_CONFIG = "config.json"
MODEL_TYPE = "loopq_program"
"""The name of saved programs among transformers' types of models."""
_COPIED: Iterable[str] = (
    "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class",
)  # fmt: skip


def hub_config(state: CompilerState, directory: str | os.PathLike[str]) -> dict[str, str]:
    """The text of the file by its name; empty for a program of a model that is not of transformers, and in a folder
    that has a `config.json` of its own."""
    folder = real_path(directory)
    theirs = os.path.lexists(folder / HUB_CONFIG) and HUB_CONFIG not in listed(folder, PROGRAM)
    if theirs or not state.origin.config:
        return {}
    copied = {key: state.origin.config[key] for key in _COPIED if state.origin.config.get(key) is not None}
    content = {"model_type": MODEL_TYPE, "architectures": ["SavedProgramForCausalLM"], **copied}
    return {HUB_CONFIG: json.dumps(content, indent=2) + "\n"}
