"""Text generation by recomputation: the whole sequence runs again for every new token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError


def logits_of(output: Any) -> Tensor:
    """The logits `[batch, sequence, vocabulary]` in what a model, a program or an ONNX file returns.

    Raises:
        LoopQError: there is no such tensor.
    """
    found = output
    if not isinstance(found, Tensor):
        found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise LoopQError(
            f"The model returns {type(output).__name__} without logits [batch, sequence, vocabulary]; text cannot be "
            "scored or generated with it."
        )
    return found


def stream(
    model: Callable[[Tensor], Any],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | list[int] | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every sequence, `[batch]`, `max_new_tokens` times or until all have ended."""
    _check(input_ids, max_new_tokens, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    ends = torch.tensor([] if eos_token_id is None else eos_token_id, dtype=torch.int64).flatten()
    for _ in range(max_new_tokens):
        logits = logits_of(model(input_ids))[:, -1].float().cpu()
        if do_sample:
            token = torch.multinomial(_filtered(logits / temperature, top_k, top_p), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        if len(ends):
            token = torch.where(ended, ends[0], token)
            ended |= torch.isin(token, ends)
        yield token
        if ended.all():
            return
        input_ids = torch.cat([input_ids, token.to(input_ids).unsqueeze(1)], 1)


def generate(model: Callable[[Tensor], Any], input_ids: Tensor, max_new_tokens: int = 32, **options: Any) -> Tensor:
    """Continues token ids; parameter names are Hugging Face's.

    Args:
        model: maps ids `[batch, sequence]` to logits: a model, a program, or an ONNX executable.
        input_ids: `[batch, sequence]`, sequences of one length.
        max_new_tokens: number of tokens to add.
        options: `do_sample`, `temperature`, `top_k`, `top_p`, `seed`, `eos_token_id`. Greedy without `do_sample`.

    Returns:
        Ids `[batch, sequence + new]`, the given ones included.

    Raises:
        LoopQError: an option is out of range, or the model returns no logits.
    """
    tokens = list(stream(model, input_ids, max_new_tokens, **options))
    return torch.cat([input_ids, *(token.to(input_ids).unsqueeze(1) for token in tokens)], 1)


def _check(input_ids: Any, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise LoopQError(f"input_ids must be integer token ids [batch, sequence]; got {shape}.")
    if 0 in input_ids.shape:
        raise LoopQError("input_ids is empty: give at least one token to continue.")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise LoopQError(f"max_new_tokens must be at least 1; got {max_new_tokens!r}.")
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise LoopQError(f"{name} must be a number; got {value!r}.")
    if not temperature > 0:
        raise LoopQError(f"temperature must be positive; got {temperature!r} (for greedy text use do_sample=False).")
    if top_k is not None and top_k < 1:
        raise LoopQError(f"top_k must be at least 1; got {top_k!r}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise LoopQError(f"top_p must lie in (0, 1]; got {top_p!r}.")


def _filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.scatter(-1, index, ordered.masked_fill(outside, 0.0))
    return probabilities
