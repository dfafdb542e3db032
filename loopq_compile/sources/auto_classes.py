"""Saved programs through transformers' `AutoModelForCausalLM.from_pretrained`.

    import loopq_compile as lq

    lq.register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained("my-program")

transformers' registry of quantizers (`register_quantizer`) does not fit: a quantizer changes modules of a model that
transformers builds, and a program is a graph that has none. Its registry of models does. A saved program has a
`config.json` of type `loopq_program`, and no code of its own, so `trust_remote_code` is not needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import GENERATION_CONFIG_NAME

from loopq_compile.compiler import load
from loopq_compile.errors import LoopQError, first_line
from loopq_compile.generation.transformers_model import ProgramConfig, ProgramForCausalLM

_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_IGNORED = ("trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "_from_auto", "adapter_kwargs", "_commit_hash")


class SavedProgramForCausalLM(ProgramForCausalLM):
    """A `ProgramForCausalLM` that `from_pretrained` reads from a folder or from the hub."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | os.PathLike[str], *_: Any, config: Any = None, **options: Any
    ) -> Any:
        """Reads a saved program.

        Args:
            name: the folder that `Program.save` wrote, or its id on the hub.
            config: not needed.
            options: `device_map`, one device for the whole program; `dtype`, which must be the program's; those of
                the hub, such as `revision`.

        Raises:
            LoopQError: it is not a saved program, or an option would change it.
        """
        place = _device(options.pop("device_map", None))
        wanted = options.pop("dtype", None) or options.pop("torch_dtype", None)
        wanted = wanted or getattr(config, "dtype", None)  # where transformers hands it over depends on the release
        info = options.pop("output_loading_info", False)
        hub = {key: options.pop(key) for key in _HUB if key in options}
        for key in _IGNORED:
            options.pop(key, None)
        if left := sorted(key for key, value in options.items() if value not in (None, "", False)):
            raise LoopQError(f"A saved program takes no {left[0]!r}: it is a finished graph. Leave that option out.")
        folder = _folder(name, hub)
        generation = folder if (folder / GENERATION_CONFIG_NAME).is_file() else None
        model = cls(load(folder, place), generation)
        if wanted not in (None, "auto") and model.dtype not in (wanted, getattr(torch, str(wanted), None)):
            raise LoopQError(f"{name} computes in {model.dtype}, not in {wanted}. Leave dtype out, or compile again.")
        model.config.update(config.to_dict() if config is not None else {})
        return (model, dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())) if info else model

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing is tied: a program's tensors stand in its graph."""


def register_with_transformers() -> None:
    """Lets `AutoModelForCausalLM.from_pretrained` and `AutoConfig.from_pretrained` read saved programs, in this
    process. A second call changes nothing."""
    AutoConfig.register(ProgramConfig.model_type, ProgramConfig, exist_ok=True)
    AutoModelForCausalLM.register(ProgramConfig, SavedProgramForCausalLM, exist_ok=True)


def _device(device_map: Any) -> str | torch.device:
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(places) > 1:
        raise LoopQError("A program lies on one device. Give one, such as device_map='cuda'.")
    (place,) = places
    if isinstance(place, int):
        return f"cuda:{place}"
    return "auto" if place in ("auto", "balanced", "sequential") else place or "cpu"


def _folder(name: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(os.fspath(name), **hub))
    except Exception as error:  # the hub raises many kinds of errors
        raise LoopQError(
            f"{name} is not a folder here, and the Hugging Face hub could not give it: {first_line(error)}"
        ) from error
