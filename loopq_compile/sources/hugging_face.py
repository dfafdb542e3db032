"""Loads models from the Hugging Face hub or in its format; refuses if opening them could run code or fill the
memory."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopq_compile.errors import LoopQError, did_you_mean, first_line
from loopq_compile.memory import available_memory

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Types that weights can be loaded in, and their bytes."""
SOURCE_CONFIG = "source_config.json"
"""Configuration of the model from which a program or file was made: for instance, how long its texts may be."""
SETTINGS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", SOURCE_CONFIG,
)  # fmt: skip
"""Files, besides weights and tokenizer.json, that say how a model is used; programs and exports get copies."""
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class LoadOptions:
    """How a Hugging Face model is loaded.

    Args:
        trust_remote_code: let the repository run its own Python code. Keep it off unless you have read that code.
        allow_pickle: open weights that are not safetensors, with `torch.load(weights_only=True)`.
        dtype: type of the weights: "float32", "bfloat16", "float16".

    Raises:
        LoopQError: the dtype is another one.
    """

    trust_remote_code: bool = False
    allow_pickle: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise LoopQError(f"Unknown dtype {self.dtype!r}.{did_you_mean(self.dtype, list(DTYPES))}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a PyTorch type."""
        import torch

        return getattr(torch, self.dtype)


def load_hugging_face(name: str, options: LoadOptions, **more: Any) -> tuple[Any, Tokenizer | None, dict[str, str]]:
    """Loads model, tokenizer (None if there is no fast one) and settings by file name, from a folder or hub id.

    Weights are read tensor by tensor, each into its final type: memory stays near one copy. `more` goes to
    transformers.

    Raises:
        LoopQError: there is no such model, it would run code or does not fit into memory, or it cannot be read.
    """
    if not options.allow_pickle and not more:
        _refuse_pickles(name)
        more["use_safetensors"] = True
    config = _read_json(name, "config.json")
    _refuse_quantized(name, config)
    _check_memory(name, options.dtype, config)
    model = _from_pretrained(name, options, **more)
    more.pop("use_safetensors", None)
    tokenizer, settings = _tokenizer(name, **more)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        settings[SETTINGS[0]] = generation.to_json_string()
    settings[SOURCE_CONFIG] = model.config.to_json_string(use_diff=False)
    return model.eval(), tokenizer, settings


def read_settings(folder: Path) -> dict[str, str]:
    """The settings that were copied into `folder`, by file name."""
    return {name: (folder / name).read_text(encoding="utf-8") for name in SETTINGS if (folder / name).is_file()}


def _refuse_pickles(name: str) -> None:
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise LoopQError(_pickle_refusal(name, f"it has {', '.join(pickles[:3])}"))


def _pickle_refusal(name: str, reason: str) -> str:
    return (
        f"{name} has no weights in safetensors ({reason}); pickled files can run code when they are opened and are "
        "refused. Take a safetensors version, or, if you trust where it is from, allow it with allow_pickle=True "
        "(--allow-pickle)."
    )


def _read_json(name: str, file: str) -> dict[str, Any]:
    """Reads a file of a folder or hub id, before anything large is loaded; empty if it is not available."""
    try:
        from transformers.utils import cached_file

        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        return dict(json.loads(Path(found).read_text(encoding="utf-8"))) if found else {}
    except (ImportError, OSError, ValueError, TypeError):
        return {}


def _refuse_quantized(name: str, config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "an unknown method") if isinstance(settings, Mapping) else settings
        raise LoopQError(
            f"{name} is already quantized ({method}); what was rounded once cannot be rounded better. Take the "
            "original weights, in floating point."
        )


def _check_memory(name: str, dtype: str, config: Mapping[str, Any]) -> None:
    """Refuses models that would have to be spread over several devices (`device_map`)."""
    stored, available = _stored_bytes(name, config), available_memory()
    if stored is None:
        return
    needed = stored[0] * DTYPES[dtype] // stored[1]
    if needed > available:
        half = f" dtype='bfloat16' (--dtype bfloat16) would need {needed / 2e9:.1f} GB." if DTYPES[dtype] == 4 else ""
        raise LoopQError(
            f"{name} needs {needed / 1e9:.1f} GB of memory in {dtype}, {available / 1e9:.1f} GB are free.{half} Models "
            "spread over devices or disk (device_map) cannot be captured: use a machine with more memory."
        )


def _stored_bytes(name: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Bytes of the weight files, and of one number in them; None if that cannot be known before loading."""
    folder = Path(name)
    size = _read_json(name, "model.safetensors.index.json").get("metadata", {}).get("total_size")
    if size is None and folder.is_dir():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return (int(size), DTYPES.get(stored, 4)) if size and config else None


def _from_pretrained(name: str, options: LoadOptions, **more: Any) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise LoopQError(
            f"{name!r} is taken for a Hugging Face model, and those need transformers: pip install transformers."
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides its retries; the error reports the result
    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=options.torch_dtype, trust_remote_code=options.trust_remote_code, output_loading_info=True,
            ignore_mismatched_sizes=True, **more,
        )  # fmt: skip
    except Exception as error:  # transformers raises many kinds of errors, all about the model it was asked to load
        raise LoopQError(_explain(name, str(error))) from error
    model, found = loaded
    _check_complete(name, found)
    return model


def _check_complete(name: str, found: Mapping[str, Any]) -> None:
    """Refuses models in which transformers would fill weights with random numbers: weights missing in the files, or
    stored in another shape."""
    wrong = sorted(found.get("mismatched_keys") or ())
    if wrong:
        key, stored, wanted = wrong[0]
        raise LoopQError(
            f"{name} does not fit its config.json: weight {key!r} is stored as {list(stored)}, the configuration makes "
            f"it {list(wanted)}{_and_others(wrong)}. Take the config.json that came with the weights."
        )
    missing = sorted(found.get("missing_keys") or ())
    if missing:
        raise LoopQError(
            f"The files of {name} lack weight {missing[0]!r}{_and_others(missing)}, which would be left random. "
            "Download the checkpoint again, or take the config.json that came with it."
        )


def _and_others(names: Sequence[Any]) -> str:
    return f" ({len(names) - 1} others likewise)" if len(names) > 1 else ""


def _explain(name: str, text: str) -> str:
    if "trust_remote_code" in text:
        return (
            f"{name} brings its own Python code, which would run on this machine with all your rights. Read the .py "
            "files of its repository first; then allow it with trust_remote_code=True (--trust-remote-code)."
        )
    if "No such file" in text and ".safetensors" in text:
        return f"A part of the weights of {name} is missing; download it again: {first_line(text)}"
    if "safetensors" in text:
        return _pickle_refusal(name, first_line(text))
    if "connect" in text or "not a local folder" in text or "not a valid model identifier" in text:
        return f"{name!r} is not a file or folder here, and the Hugging Face hub could not give it: {first_line(text)}"
    return f"{name} cannot be loaded: {first_line(text)}"


def _tokenizer(name: str, **more: Any) -> tuple[Tokenizer | None, dict[str, str]]:
    """The fast tokenizer and its settings; without one, tokens can be scored but texts cannot."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **more)
        fast = tokenizer.backend_tokenizer
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return fast, read_settings(Path(folder))
    except Exception:  # no tokenizer at all, a slow one, or one that needs the repository's code
        return None, {}
