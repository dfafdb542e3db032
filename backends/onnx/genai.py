"""Exported folders for onnxruntime-genai, which brings its own tokenizer, caches and search.

That runtime reads `genai_config.json`: names of inputs and outputs, and number and size of caches. It knows one form of
cache, a key and a value `[batch, heads, past, size]` per attention, all of one size. In a looped model an attention
runs once per loop, so `num_hidden_layers` is loops times layers here.

Facts (onnxruntime-genai 0.18): prompts of different length in a batch are padded on the right. Tokens before the prompt
always count as text, and the runtime expects positions of later tokens from the file's input `position_ids`. Our files
count columns instead, so a batch needs prompts of one length; `OnnxExecutable.generate` pads on the left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx

from loopq_compile.backends.onnx.folder import KIND, versions
from loopq_compile.backends.onnx.genai_tokenizer import TOKENIZER_CLASS, TOKENIZER_CONFIG, with_special_tokens
from loopq_compile.errors import LoopQError
from loopq_compile.generation.sampling import whole_number
from loopq_compile.generation.tokenizer import TOKENIZER_FILE, read_tokenizer
from loopq_compile.graph.caches import PAST_PREFIX, PRESENT_PREFIX
from loopq_compile.storage.atomic import add_files, settle

CONFIG_FILE = "genai_config.json"
ROLLED_REFUSAL = (
    "onnxruntime-genai keeps one cache [batch, heads, past, size] for every attention; a rolled file has one "
    "[loops, batch, heads, past, size] for every layer: export with form='unrolled'."
)

_FED = ("input_ids", "attention_mask", "position_ids")
"""What the runtime feeds in addition to caches."""
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def write_genai_config(
    directory: str | os.PathLike[str],
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int | None = None,
    context_length: int = 4096,
) -> Path:
    """Turns an export with a cache into a folder that `onnxruntime_genai.Model` opens.

    Writes `genai_config.json` and, if it is missing next to a `tokenizer.json`, a `tokenizer_config.json`. The model
    stays unchanged.

    Args:
        directory: where `export(..., cache=True, form="unrolled")` wrote `model.onnx`.
        eos_token_id: the token that ends a text, or several.
        pad_token_id: fills rows of a batch that have ended; the first end token by default.
        context_length: most tokens of prompt and answer together that the runtime allows; tables of learned positions
            may hold fewer.

    Returns:
        The path of `genai_config.json`.

    Raises:
        LoopQError: there is no such file, it has no cache or one of another form (such as rolled files), it needs
            inputs that the runtime does not feed, or an argument is out of range.
    """
    path = Path(directory).expanduser() / "model.onnx"
    settle(path.parent)
    if not path.is_file():
        raise LoopQError(f"There is no {path}; write it with program.export_onnx({str(directory)!r}, cache=True).")
    graph = onnx.load(path, load_external_data=False).graph
    decoder = _decoder(graph)
    vocabulary = _shape(next(value for value in graph.output if value.name == "logits"))[-1]
    several = eos_token_id if isinstance(eos_token_id, Iterable) else [eos_token_id]
    ends = list(dict.fromkeys(_token("eos_token_id", end, vocabulary) for end in several))
    if not ends:
        raise LoopQError("eos_token_id is empty: give at least one token that ends a text.")
    pad = ends[0] if pad_token_id is None else _token("pad_token_id", pad_token_id, vocabulary)
    config = {
        "model": {
            "type": "decoder",
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": pad,  # one number: the runtime refuses a folder with several
            "context_length": whole_number("context_length", context_length, 1),
            "vocab_size": vocabulary,
            "decoder": decoder,
        },
        # The file joins caches itself, so that its outputs are larger than its inputs.
        "search": {"do_sample": False, "past_present_share_buffer": False},
    }
    files: dict[str, Any] = {CONFIG_FILE: config}
    if (path.parent / TOKENIZER_FILE).is_file() and not (path.parent / TOKENIZER_CONFIG).exists():
        tokenizer = read_tokenizer(path.parent / TOKENIZER_FILE)
        files[TOKENIZER_CONFIG] = with_special_tokens({"tokenizer_class": TOKENIZER_CLASS}, tokenizer)
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    add_files(path.parent, KIND, texts, versions())
    return path.parent / CONFIG_FILE


def _decoder(graph: onnx.GraphProto) -> dict[str, Any]:
    """The section about the file: names, and number and size of caches."""
    inputs = {value.name: value for value in graph.input}
    caches = [value for name, value in inputs.items() if name.startswith(PAST_PREFIX)]
    if not caches or "logits" not in [value.name for value in graph.output]:
        raise LoopQError("onnxruntime-genai needs a file with a key-value cache and logits: export with cache=True.")
    others = [name for name in inputs if name not in _FED and not name.startswith(PAST_PREFIX)]
    shapes = {tuple(_shape(value)) for value in caches}
    if "loops" in others or any(len(shape) == 5 for shape in shapes):
        raise LoopQError(ROLLED_REFUSAL)
    if others:
        raise LoopQError(f"onnxruntime-genai feeds {', '.join(_FED)} and caches; this file also takes {others}.")
    if len(shapes) > 1 or any(len(shape) != 4 or shape[2] != "past" for shape in shapes):
        listed = ", ".join(map(str, sorted(shapes, key=str)))
        raise LoopQError(f"onnxruntime-genai needs caches of one size [batch, heads, past, size]; these are {listed}.")
    if any(value.type.tensor_type.elem_type not in _FLOATS for value in caches):
        raise LoopQError("onnxruntime-genai cannot read quantized caches of this file; export without quantizing them.")
    _, heads, _, size = next(iter(shapes))
    return {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "num_hidden_layers": len(caches) // 2,
        "num_key_value_heads": heads,
        "head_size": size,
        "inputs": {
            **{name: name for name in _FED if name in inputs},
            "past_key_names": f"{PAST_PREFIX}%d.key",
            "past_value_names": f"{PAST_PREFIX}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT_PREFIX}%d.key",
            "present_value_names": f"{PRESENT_PREFIX}%d.value",
        },
    }


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _token(name: str, value: Any, vocabulary: int | str) -> int:
    """A token id, any kind of scalar, as a Python integer."""
    try:
        return whole_number(name, value, 0, int(vocabulary) - 1)
    except (LoopQError, ValueError) as error:
        raise LoopQError(f"{name} must be a token id from 0 to {vocabulary} (excluded); got {value!r}.") from error
