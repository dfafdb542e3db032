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
from loopq_compile.generation.speculation import Speculation
from loopq_compile.generation.speculative_steps import MOST, SpeculativeSteps
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
    speculate: str | Speculation | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every sequence, `[batch]`, `max_new_tokens` times or until all have ended.

    If the model has a method `decoder()` (a `Program`, an `OnnxExecutable`), that decoder is used; it has a key-value
    cache if possible. Other models read the whole text again for every token. With `speculate`, its `text_reader()` is
    used. Arguments are checked by the call itself, before the first token is requested.
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
    chooser = Chooser(whole_number("seed", seed, -(2**63), 2**64 - 1), do_sample, temperature, _filters(top_k, top_p))
    ends = _ends(eos_token_id)
    if speculate is not None:
        return _speculate(model, chooser, Speculation.of(speculate), input_ids, mask, ends, max_new_tokens)
    decoder: Decoder = model.decoder() if hasattr(model, "decoder") else RecomputingDecoder(model)
    return _steps(decoder, chooser, input_ids, mask, torch.tensor(ends, dtype=torch.int64), max_new_tokens)


class Chooser:
    """Chooses the next token: the most likely one, or one drawn at random.

    Every new token of a text has random numbers of its own, the same for whatever logits are given for it. They are
    those that `torch.multinomial` would use: of numbers `e` with an exponential distribution, one for each entry of the
    vocabulary, the token with the largest `probability / e` is drawn.

    Args:
        seed: of the random numbers.
        do_sample: whether to draw.
        temperature: divides logits.
        filters: of unlikely tokens, as transformers has them.
    """

    def __init__(self, seed: int, do_sample: bool, temperature: float, filters: Any) -> None:
        self.do_sample, self.temperature, self.filters = do_sample, temperature, filters
        self.generator = torch.Generator().manual_seed(seed)
        self.numbers: dict[int, Tensor] = {}
        self.drawn = 0

    def token(self, logits: Tensor, number: int) -> Tensor:
        """New token `number` of every row, `[batch]`, from logits `[batch, vocabulary]`.

        Numbers may be asked for again and ahead, up to `MOST_AHEAD` of them.
        """
        logits = logits.float().cpu()
        if not self.do_sample:
            return logits.argmax(-1)
        return (self.probabilities(logits) / self._random(number, logits)).argmax(-1)

    def probability(self, logits: Tensor, token: int) -> float:
        """The probability that `logits` `[1, vocabulary]` give `token`; without `do_sample` that of the model."""
        logits = logits.float().cpu()
        likely = self.probabilities(logits) if self.do_sample else logits.softmax(-1)
        return float(likely[0, token])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities `[batch, vocabulary]` from which tokens are drawn."""
        ids = torch.zeros(len(logits), 1, dtype=torch.int64)
        return self.filters(ids, _scaled(logits, self.temperature)).softmax(-1)

    def _random(self, number: int, like: Tensor) -> Tensor:
        while self.drawn <= number:
            self.numbers[self.drawn] = torch.empty_like(like).exponential_(1, generator=self.generator)
            self.numbers.pop(self.drawn - MOST_AHEAD, None)
            self.drawn += 1
        return self.numbers[number]


MOST_AHEAD = 2 * MOST
"""Tokens for which a `Chooser` keeps random numbers."""


def _speculate(
    model: Any,
    chooser: Chooser,
    speculation: Speculation,
    input_ids: Tensor,
    mask: Tensor,
    ends: list[int],
    count: int,
) -> Iterator[Tensor]:
    if len(input_ids) != 1:
        raise LoopQError(
            f"Speculation decodes one text, since rows would accept different numbers of tokens; input_ids has "
            f"{len(input_ids)} rows. Generate them one by one, or without speculate."
        )
    if not hasattr(model, "text_reader"):
        raise LoopQError(
            "Speculation needs a program or an ONNX file with a key-value cache; this is a model. Compile it first."
        )
    reader = model.text_reader(speculation)
    steps = SpeculativeSteps(reader, chooser, speculation, count, set(ends))
    return (torch.tensor([token]) for token in steps.run(input_ids, mask))


def _steps(
    decoder: Decoder, chooser: Chooser, input_ids: Tensor, mask: Tensor, ends: Tensor, count: int
) -> Iterator[Tensor]:
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    new = input_ids
    for step in range(count):
        token = chooser.token(decoder(new, mask), step)
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
            Greedy without `do_sample`. `speculate`: "lookup", "loops", "loops:K", "auto" or a `Speculation`, which
            then tells what came of it: several tokens in a step, with the same result, for one sequence.

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
