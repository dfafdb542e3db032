"""Key-value pairs of a GGUF file from a model's configuration, by Hugging Face's names."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loopq_compile.backends.gguf.architectures import Architecture
from loopq_compile.backends.gguf.stack import Stack
from loopq_compile.errors import LoopQError, first_line

CONFIG_FILES = "source_config.json", "config.json"
"""In the folder of a saved program, whose `config.json` is about the program, and in a model's."""
_ROTATIONS = "default", "llama3", "linear"


def read_config(config: Any, folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The configuration as plain values.

    Args:
        config: a mapping, a configuration of transformers, a dataclass, a file or folder; None looks into `folder`.
        folder: that of the tokenizer.

    Raises:
        LoopQError: there is none.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    place = Path(config if config is not None else folder or ".")
    files = [place] if place.is_file() else [place / name for name in CONFIG_FILES]
    found = next((file for file in files if file.is_file()), None)
    if (config is None and folder is None) or found is None:
        raise LoopQError(
            "A GGUF file states the model's sizes, and there is no config.json to read them from. Name the model's "
            "folder: tokenizer=FOLDER or config=FOLDER."
        )
    try:
        return json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoopQError(
            f"{found} is not a configuration: {first_line(error)}. Name the model's own config.json."
        ) from error


def check_config(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Checks that nothing in the configuration changes what llama.cpp computes.

    Raises:
        LoopQError: something does, or a size is missing.
    """
    wanted = ["hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps"]
    wanted += ["embedding_scale"] if architecture.loops == "cycles" else []
    if missing := [name for name in wanted if config.get(name) is None]:
        raise LoopQError(f"The configuration lacks {', '.join(missing)}. Name the config.json of the captured model.")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise LoopQError(f"llama.cpp's {architecture.name} has no hidden_act={config['hidden_act']!r}; export to ONNX.")
    windows = config.get("use_sliding_window", True) and config.get("sliding_window")
    if windows or "sliding_attention" in (config.get("layer_types") or ()):
        raise LoopQError("Layers with sliding windows are not written as GGUF. Export to ONNX.")
    kind = rotation(config)[1]
    if kind not in _ROTATIONS or (kind != "default" and not architecture.rope_factors):
        raise LoopQError(f"Rotary positions of type {kind!r} are not written for {architecture.name}. Export to ONNX.")


def rotation(config: Mapping[str, Any]) -> tuple[float, str]:
    """Base and type of rotary positions."""
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = settings.get("rope_theta") or config.get("rope_theta") or 10000.0
    return float(theta), settings.get("rope_type") or settings.get("type") or "default"


def head_size(config: Mapping[str, Any]) -> int:
    """Channels of an attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_factors(config: Mapping[str, Any], frequencies: np.ndarray | None, architecture: Architecture) -> Any:
    """What llama.cpp divides its rotary frequencies by, `[head_size / 2]`; None where that is 1 throughout.

    Raises:
        LoopQError: the program's frequencies are others than those of the configuration.
    """
    if frequencies is None:
        return None
    size = head_size(config)
    factors = rotation(config)[0] ** (-np.arange(0, size, 2) / size) / frequencies.astype(np.float64)
    if np.allclose(factors, 1, rtol=1e-5):
        return None
    if rotation(config)[1] == "default" or not architecture.rope_factors:
        raise LoopQError(
            "The program's rotary frequencies differ from its configuration. Name the model's own config.json."
        )
    return factors.astype(np.float32)


def add_metadata(writer: Any, config: Mapping[str, Any], architecture: Architecture, stack: Stack, name: str) -> None:
    """Writes sizes and constants of the model, and its loops."""
    heads, size = config["num_attention_heads"], head_size(config)
    writer.add_name(name)
    writer.add_context_length(config.get("max_position_embeddings") or 4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(stack.blocks)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rotation(config)[0])
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if architecture.loops == "cycles":
        writer.add_embedding_scale(float(config["embedding_scale"]))
        writer.add_bool(f"{architecture.name}.hrm.prefix_lm", bool(config.get("prefix_lm", True)))
    for key, value in stack.keys.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"{architecture.name}.{key}", value)
