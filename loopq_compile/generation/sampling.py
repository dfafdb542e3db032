"""Text generation: sampling, and a decoder that gives logits step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import Decoder, RecomputingDecoder
from loopq_compile.graph.texts import logits_of

__all__ = ["generate", "logits_of", "stream"]
_LEAST_TEMPERATURE = 1e-300
"""Below this, quotients of logits leave the range of double precision; the most likely token is certain long before."""


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

    If the model has a method `decoder()` (a `Program`, an `OnnxExecutable`), that decoder is used; it has a key-value
    cache if possible. Other models read the whole text again for every token. Arguments are checked by the call itself,
    before the first token is requested.
    """
    _check_ids(input_ids)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    temperature = number("temperature", temperature)
    top_k = None if top_k is None else whole_number("top_k", top_k, 1)
    top_p = None if top_p is None else number("top_p", top_p)
    if not (0 < temperature < math.inf):
        raise LoopQError(
            f"temperature must be positive and finite; got {temperature!r} (for greedy text leave out do_sample)."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise LoopQError(f"top_p must lie in (0, 1]; got {top_p!r}.")
    mask = _checked_mask(input_ids, attention_mask)
    decoder: Decoder = model.decoder() if hasattr(model, "decoder") else RecomputingDecoder(model)
    generator = torch.Generator().manual_seed(whole_number("seed", seed, -(2**63), 2**64 - 1))
    ends = torch.tensor(_ends(eos_token_id), dtype=torch.int64)
    filters = _filters(top_k, top_p)

    def choose(logits: Tensor) -> Tensor:
        if not do_sample:
            return logits.argmax(-1)
        likely = filters(input_ids, _scaled(logits, temperature))
        return torch.multinomial(likely.softmax(-1), 1, generator=generator)[:, 0]

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
            `seed`; `eos_token_id`, one or several, which end a sequence (the first fills sequences that have ended).
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


def _check_ids(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise LoopQError(f"input_ids must be integer token ids [batch, sequence]; got {shape}.")
    if 0 in input_ids.shape:
        raise LoopQError("input_ids is empty: give at least one token to continue.")


def number(name: str, value: Any) -> float:
    """`value` as a Python number; scalars of NumPy and PyTorch count as the number they hold.

    Raises:
        LoopQError: it is not a single number.
    """
    held = _held(value)
    if isinstance(held, bool) or not isinstance(held, int | float):
        raise LoopQError(f"{name} must be a number; got {value!r}.")
    try:
        return float(held)
    except OverflowError:
        return math.copysign(math.inf, held)


def whole_number(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as a Python integer from `least` to `most`; `2.0` counts as 2, and scalars as the number they hold.

    Raises:
        LoopQError: it is not a whole number, or out of range.
    """
    held = _held(value)
    if isinstance(held, float) and held.is_integer():
        held = int(held)
    if isinstance(held, bool) or not isinstance(held, int):
        raise LoopQError(f"{name} must be a whole number; got {value!r}.")
    if held < least:
        raise LoopQError(f"{name} must be at least {least}; got {value!r}.")
    if held > most:
        raise LoopQError(f"{name} must be at most {most}; got {value!r}.")
    return held


def _held(value: Any) -> Any:
    """The one element of a scalar of NumPy or PyTorch, or of a tensor with one."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.item() if math.prod(value.shape) == 1 else value
    return value


def _ends(eos_token_id: Any) -> list[int]:
    """Ids of the tokens that end a text: none, one, or several in any sequence, array or tensor."""
    if eos_token_id is None:
        return []
    if isinstance(eos_token_id, Tensor | np.ndarray):
        eos_token_id = eos_token_id.tolist()
    several = list(eos_token_id) if isinstance(eos_token_id, Iterable) else [eos_token_id]
    return [whole_number("eos_token_id", token, -(2**63)) for token in several]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, minus their largest: this changes no probability and keeps them finite."""
    scaled = (logits.double() - logits.max(-1, keepdim=True).values.double()) / max(temperature, _LEAST_TEMPERATURE)
    return scaled.to(logits.dtype)


def _filters(top_k: int | None, top_p: float | None) -> Any:
    """transformers' filters of unlikely tokens, as one function of ids and logits `[batch, vocabulary]`."""
    from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    filters = LogitsProcessorList()
    if top_k is not None:
        filters.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        filters.append(TopPLogitsWarper(top_p))
    return filters
