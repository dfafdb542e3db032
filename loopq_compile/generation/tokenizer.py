"""Tokenizers of the `tokenizers` library: reading them, and token ids of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TOKENIZER_FILE = "tokenizer.json"

END_TOKENS = ("<|endoftext|>", "</s>", "<|im_end|>", "<|end_of_text|>", "<eos>")
"""Usual names of the token that ends a text."""


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder/tokenizer.json`; None if there is no such file."""
    return read_tokenizer(folder / TOKENIZER_FILE) if (folder / TOKENIZER_FILE).is_file() else None


def read_tokenizer(file: str | Path) -> Tokenizer:
    """A `tokenizer.json` as the `tokenizers` library writes it.

    Raises:
        LoopQError: the file is missing or holds no tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(file)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise LoopQError(f"There is no tokenizer file {path}.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise LoopQError(f"{path} is not a tokenizer of the tokenizers library: {first_line(error)}") from error


def end_token(tokenizer: Tokenizer | None) -> int | None:
    """Id of the token that ends a text; None if the tokenizer has none with a known name."""
    ids = [tokenizer.token_to_id(name) for name in END_TOKENS] if tokenizer is not None else []
    return next((token for token in ids if token is not None), None)


def without_limits(tokenizer: Any) -> Any:
    """`tokenizer` without the truncation and padding that a `tokenizer.json` may hold, which transformers ignores, too.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; it is not changed, and is returned itself if it has neither.
    """
    if tokenizer is None or (tokenizer.truncation is None and tokenizer.padding is None):
        return tokenizer
    copied = type(tokenizer).from_str(tokenizer.to_str())
    copied.no_truncation()
    copied.no_padding()
    return copied


def tokenize(tokenizer: Any, text: str, max_tokens: int | None = None) -> Tensor:
    """Token ids of `text`, `[n]`, cut to `max_tokens`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; truncation and padding stored in it do not apply.
        text: any text.
        max_tokens: None or 0 keeps all.

    Raises:
        LoopQError: there is no tokenizer, or the text has no token.
    """
    if tokenizer is None:
        raise LoopQError("This model came without a tokenizer; name a tokenizer.json with --tokenizer.")
    if max_tokens:
        text = text[: max_tokens * 64]  # no tokenizer makes longer tokens; this avoids encoding a long rest
    ids = without_limits(tokenizer).encode(text).ids[: max_tokens or None]
    if not ids:
        raise LoopQError("The text is empty: it has no token.")
    return torch.tensor(ids, dtype=torch.int64)
