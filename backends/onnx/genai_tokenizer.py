"""How onnxruntime-genai reads a `tokenizer.json`: where its ids differ, and what makes them equal.

Facts (onnxruntime-genai 0.18): byte-level BPE gives equal ids, with any splits that keep the whole text. Normalizers, a
space before the text and spaces around added tokens are ignored. Post-processors are ignored, too, so no token is added
before or after a text. With `tokenizer.update_options(add_special_tokens="true")` it adds `bos_token` and `eos_token`
of `tokenizer_config.json` as `add_bos_token` and `add_eos_token` say, if both tokens are texts (for objects it also
adds tokens that it should not). No file can switch that on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Without a class, the runtime reads no other field."""
_KEEP_ALL = ("ByteLevel", "Digits", "Punctuation", "Split")
"""Steps before BPE that the runtime follows."""
_ADD = 'encode after `tokenizer.update_options(add_special_tokens="true")`, and its ids are the same'


def notes_for(tokenizer: Tokenizer | None, settings: Mapping[str, Any]) -> list[str]:
    """Sentences about texts for which the runtime and `tokenizer` differ; none if all ids are equal.

    Args:
        tokenizer: a tokenizer of the `tokenizers` library; None if the folder has none.
        settings: its `tokenizer_config.json`, as `with_special_tokens` completes it.
    """
    if tokenizer is None:
        return ["this folder has no tokenizer: give onnxruntime-genai token ids"]
    found = list(_differences(json.loads(tokenizer.to_str())))
    notes = [f"onnxruntime-genai gives other ids than this tokenizer: {'; '.join(found)}. Give it token ids"] * bool(
        found
    )
    before, after = added_tokens(tokenizer)
    if before or after:
        wanted = _fields(before, after)
        same = wanted is not None and all(settings.get(name) == value for name, value in wanted.items())
        same = same and not any(isinstance(settings.get(name), Mapping) for name in ("bos_token", "eos_token"))
        advice = _ADD if same else f"it cannot do so with this {TOKENIZER_CONFIG}: give it token ids"
        notes.append(
            f"this tokenizer adds {' '.join([*before, 'TEXT', *after])}, onnxruntime-genai does not by itself: {advice}"
        )
    return notes


def with_special_tokens(settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A `tokenizer_config.json` that also says what `tokenizer` adds to a text; existing fields stay."""
    before, after = added_tokens(tokenizer)
    if not before and not after:
        return dict(settings)
    return {"tokenizer_class": TOKENIZER_CLASS, **(_fields(before, after) or {}), **settings}


def added_tokens(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens that a tokenizer adds before and after a text."""
    text = "a"
    plain, full = (tokenizer.encode(text, add_special_tokens=added).tokens for added in (False, True))
    start = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
    return full[:start], full[start + len(plain) :]


def _fields(before: list[str], after: list[str]) -> dict[str, Any] | None:
    """The fields that make the runtime add these tokens; None if it cannot: it adds at most one on either side."""
    if len(before) > 1 or len(after) > 1:
        return None
    named = {"bos_token": before[0]} if before else {}
    named |= {"eos_token": after[0]} if after else {}
    return {**named, "add_bos_token": bool(before), "add_eos_token": bool(after)}


def _differences(parsed: Mapping[str, Any]) -> Iterator[str]:
    before = parsed.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if parsed["model"]["type"] != "BPE" or not levels:
        yield "it is not byte-level BPE"
        return
    if parsed.get("normalizer"):
        yield f"its normalizer ({parsed['normalizer']['type']}) changes texts"
    if any(level.get("add_prefix_space") for level in levels):
        yield "it puts a space before a text"
    if not levels[-1].get("use_regex", True) and not any(step.get("type") == "Split" for step in steps):
        yield "it does not split texts into words"
    for step in steps:
        cuts = step.get("type") == "Split" and (step.get("behavior") != "Isolated" or step.get("invert"))
        if step.get("type") not in _KEEP_ALL or cuts:
            yield f"its pre-tokenizer has a step {step.get('type')}" + (f" ({step['behavior']})" if cuts else "")
    for token in parsed.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            yield f"what is around its token {token['content']!r} decides how that is read"
            break
