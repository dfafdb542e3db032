"""Text generation: sampling, and a decoder that gives logits step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loopq_compile.decoding import Decoder, RecomputingDecoder, logits_of
from loopq_compile.errors import LoopQError

__all__ = ["generate", "logits_of", "stream"]


def stream(
    model: Callable[..., Any],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every sequence, `[batch]`, `max_new_tokens` times or until all have ended.

    A model with a method `decoder()` (a `Program`, an `OnnxExecutable`) is asked for one, which uses a key-value cache
    where it can; any other reads the whole text again for every token. Arguments are checked by the call itself, before
    the first token is asked for.
    """
    _check(input_ids, max_new_tokens, temperature, top_k, top_p)
    mask = _checked_mask(input_ids, attention_mask)
    decoder: Decoder = model.decoder() if hasattr(model, "decoder") else RecomputingDecoder(model)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ()))

    def choose(logits: Tensor) -> Tensor:
        if not do_sample:
            return logits.argmax(-1)
        return torch.multinomial(_filtered(logits / temperature, top_k, top_p), 1, generator=generator)[:, 0]

    return _steps(decoder, choose, input_ids, mask, ends, max_new_tokens)


def _steps(
    decoder: Decoder, choose: Callable[[Tensor], Tensor], input_ids: Tensor, mask: Tensor, ends: Tensor, count: int
) -> Iterator[Tensor]:
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    new = input_ids
    for step in range(count):
        token = choose(decoder(new, mask).float().cpu())
        if len(ends):
            token = torch.where(ended, torch.full_like(token, int(ends[0])), token)
            ended |= torch.isin(token, ends)
        yield token
        if ended.all() or step + 1 == count:
            return
        new = token.to(input_ids).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def generate(model: Callable[..., Any], input_ids: Tensor, max_new_tokens: int = 32, **options: Any) -> Tensor:
    """Continues token ids; parameter names are Hugging Face's.

    Args:
        model: maps ids `[batch, sequence]` to logits: a model, a program, or an ONNX executable.
        input_ids: `[batch, sequence]`, sequences of one length, shorter ones padded on the left.
        max_new_tokens: number of tokens to add.
        options: `attention_mask` `[batch, sequence]`, 0 on padding; `do_sample`, `temperature`, `top_k`, `top_p`,
            `seed`; `eos_token_id`, one or several, which end a sequence (the first fills up sequences that have ended).
            Greedy without `do_sample`.

    Returns:
        Ids `[batch, sequence + new]`, the given ones included.

    Raises:
        LoopQError: an option is out of range, or the model returns no logits.
    """
    tokens = list(stream(model, input_ids, max_new_tokens, **options))
    return torch.cat([input_ids, *(token.to(input_ids).unsqueeze(1) for token in tokens)], 1)


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise LoopQError(f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}; got {shape}.")
    mask = (attention_mask != 0).to(input_ids)
    if not mask[:, -1].all():
        raise LoopQError("Padding must stand on the left: the last column of attention_mask has zeros.")
    return mask


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
        raise LoopQError(f"temperature must be positive; got {temperature!r} (for greedy text leave out do_sample).")
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
