"""Writes a tokenizer with the helpers of the package `gguf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopq_compile.errors import LoopQError, first_line

_GPT2 = {"type": "ByteLevel", "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def add_tokenizer(writer: Any, folder: Path, vocabulary: int, pre_tokenizer: str | None) -> str:
    """Writes tokens, merges, special tokens and chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: has `tokenizer.json`, and settings beside it.
        vocabulary: rows of the embedding; missing tokens become `[PADn]`.
        pre_tokenizer: llama.cpp's name for how text is split before byte-level BPE; None recognises it.

    Returns:
        What was written, for people.

    Raises:
        LoopQError: llama.cpp has no such tokenizer, or not that way to split text.
    """
    from gguf import SpecialVocab, TokenType

    if not (folder / "tokenizer.json").is_file():
        raise LoopQError(f"{folder} has no tokenizer.json. Name a folder that has one, or leave tokenizer out.")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    found = _read(folder)
    special = {item["id"] for item in content.get("added_tokens") or () if item.get("special")}
    tokens: list[Any] = []
    scores: list[float] = []
    kinds: list[int] = []
    for token, score, kind in found.all_tokens():
        kinds.append(int(TokenType.CONTROL if len(tokens) in special else kind))
        tokens.append(token)
        scores.append(score)
    if len(tokens) > vocabulary:
        raise LoopQError(
            f"{folder} has {len(tokens)} tokens, the model {vocabulary}. Name the folder of the model's own tokenizer."
        )
    for number in range(len(tokens), vocabulary):
        tokens.append(f"[PAD{number}]")
        scores.append(-1000.0)
        kinds.append(int(TokenType.UNUSED))
    writer.add_tokenizer_model(found.tokenizer_model)
    split = "default"
    if found.tokenizer_model == "gpt2":
        split = pre_tokenizer or _recognise(folder, content)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    if found.tokenizer_model != "gpt2":
        writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=found.tokenizer_model == "gpt2", n_vocab=vocabulary).add_to_gguf(
        writer, quiet=True
    )
    return f"{found.tokenizer_model} ({split})"


def _read(folder: Path) -> Any:
    from gguf.vocab import BpeVocab, LlamaHfVocab

    reasons = []
    for kind in (BpeVocab, LlamaHfVocab):
        try:
            return kind(folder)
        except (FileNotFoundError, ValueError, TypeError, KeyError, ImportError) as error:
            reasons.append(f"{kind.__name__}: {first_line(error)}")
    raise LoopQError(
        f"The tokenizer in {folder} is none that llama.cpp has ({'; '.join(reasons)}). Leave tokenizer out "
        "(--pre-tokenizer none), name config=FOLDER, and pass token ids."
    )


def _recognise(folder: Path, content: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer."""
    whole = content.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", [whole])
    if not content.get("normalizer"):
        if len(steps) == 1 and _is(steps[0], _GPT2):
            return "gpt-2"
        if len(steps) == 2 and _is(steps[0], _DIGITS) and _is(steps[1], _GPT2):
            return "smollm"
    pattern = str((steps[0].get("pattern") or {}).get("Regex", ""))
    if len(steps) == 2 and steps[1].get("type") == "ByteLevel" and r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" in pattern:
        if r"|\p{N}{1,3}|" in pattern:
            return "llama-bpe"
        if r"|\p{N}|" in pattern and "\\p{M}" not in pattern:
            return "qwen2"
    raise LoopQError(
        f"How the tokenizer in {folder} splits text is not recognised, and llama.cpp knows it by name only. Give the "
        "name: pre_tokenizer='gpt-2', 'llama-bpe', 'qwen2' or another of llama.cpp's."
    )


def _is(step: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(step.get(key, True if key == "use_regex" else None) == value for key, value in wanted.items()) and not (
        step.get("add_prefix_space")
    )
