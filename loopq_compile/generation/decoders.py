"""Decoders give the logits of the next token, step by step, for `loopq_compile.generation.sampling`.

One kind reads the whole text again for every token; the other keeps keys and values of what it has read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn

from loopq_compile.errors import LoopQError
from loopq_compile.generation.speculation import Speculation
from loopq_compile.generation.text_reader import TextReader
from loopq_compile.graph.caches import cache_inputs, empty_cache, has_cache, present_name
from loopq_compile.graph.device import device_of
from loopq_compile.graph.early_exit import EXIT_THRESHOLD, check_early_exit, has_early_exit, spent_of, threshold_tensor
from loopq_compile.graph.signature import Signature
from loopq_compile.graph.texts import MADE_OF_MASK, given_logits, last_logits, logits_of, text_inputs

T = TypeVar("T")


class Decoder(Protocol):
    """Reads a prompt in the first call, and the appended tokens in each further call."""

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the next token.

        Args:
            new_ids: `[batch, new]`, the tokens that no call has read yet.
            attention_mask: `[batch, total]`, for all tokens so far; 0 on padding, which is on the left.
        """
        ...


class RecomputingDecoder:
    """Runs the whole sequence for every token.

    Args:
        model: maps ids `[batch, sequence]` (and, if `takes_mask`, an attention mask) to logits.

    `loops_spent` lists the loops of every call, if the model may stop early.
    """

    def __init__(self, model: Callable[..., Any], *, takes_mask: bool = False) -> None:
        self.model, self.takes_mask = model, takes_mask
        self.ids: Tensor | None = None
        self.loops_spent: list[int] = []

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.ids = new_ids if self.ids is None else torch.cat([self.ids, new_ids], 1)
        return last_logits(self._run(self.ids, attention_mask), len(self.ids))

    def read(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, sequence, vocabulary]` of a whole text.

        Raises:
            LoopQError: there is padding, and the model has no mask for it.
        """
        return logits_of(self._run(ids, attention_mask))

    def read_given(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As `read`; `[batch, 1, vocabulary]` of a model that gives only the logits of the last token."""
        return given_logits(self._run(ids, attention_mask), len(ids))

    def _run(self, ids: Tensor, attention_mask: Tensor) -> Any:
        if not self.takes_mask and not attention_mask.all():
            raise LoopQError("This model has no attention mask, so rows of a batch cannot be padded.")
        if isinstance(self.model, nn.Module):
            ids = ids.to(device_of(self.model))
        output = self.model(ids, attention_mask.to(ids.device)) if self.takes_mask else self.model(ids)
        self.loops_spent += spent_of(output)
        return output


def read_texts(run: Callable[..., Any], signature: Signature, **extra: Any) -> RecomputingDecoder:
    """A decoder that calls a program with token ids, and with inputs computed from an attention mask.

    Args:
        run: the program or file, called by keyword.
        signature: its calling convention.
        extra: further arguments of every call.

    Raises:
        LoopQError: the program takes more than token ids, an attention mask, position ids and token types.
    """
    inputs = [spec for spec in signature.inputs if spec.name not in extra]
    first, *others = inputs
    if {spec.name for spec in others} - set(MADE_OF_MASK) or first.dtype.is_floating_point:
        raise LoopQError(
            "generate feeds token ids, an attention mask, position ids and token types; this program takes "
            f"{[spec.name for spec in inputs]}."
        )
    if wide := [spec for spec in others if len(spec.shape) > 2]:
        raise LoopQError(f"generate feeds masks and positions [batch, sequence]; this program takes {wide[0]}.")

    def call(ids: Tensor, mask: Tensor | None = None) -> Any:
        return run(**text_inputs(signature, ids, mask), **extra)

    return RecomputingDecoder(call, takes_mask=bool(others))


def with_text_inputs(model: Callable[..., Any]) -> Callable[[Tensor], Any]:
    """`model` as a function of token ids `[batch, sequence]` of texts without padding.

    If a program or file takes an attention mask, position ids or token types, it gets ones, `0, 1, 2, ...` and zeros.
    Others are called with only the ids.
    """
    signature = getattr(model, "signature", None)
    if not isinstance(signature, Signature) or not set(MADE_OF_MASK) & {spec.name for spec in signature.inputs[1:]}:
        return model
    return model if has_cache(signature) or has_early_exit(signature) else read_texts(model, signature).model


class CachedDecoder:
    """Runs only new tokens, and passes on the keys and values of earlier tokens.

    Args:
        run: a program with a key-value cache, called by keyword.
        signature: its calling convention.
        loops: iterations of a loop whose caches are in one tensor.
        exit_threshold: for programs that may stop early; `loops_spent` lists the loops of every call.
    """

    def __init__(
        self, run: Callable[..., Any], signature: Signature, loops: int = 1, exit_threshold: float | None = None
    ) -> None:
        self.run, self.signature, self.loops = run, signature, loops
        self.extra = {EXIT_THRESHOLD: threshold_tensor(exit_threshold)} if has_early_exit(signature) else {}
        self.past: dict[str, Tensor] | None = None
        self.loops_spent: list[int] = []

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids, mask, caches = cache_inputs(self.signature)
        if self.past is None:
            self.past = {spec.name: empty_cache(spec, len(new_ids), self.loops) for spec in caches}
        result = self.run(**{ids.name: new_ids, mask.name: attention_mask}, **self.past, **self.extra)
        self.loops_spent += spent_of(result)
        self.past = {name: result[present_name(name)] for name in self.past}
        return last_logits(result, len(new_ids))


class Chosen:
    """A program or file together with options for its decoders, for `generate`.

    Args:
        model: has a method `decoder`.
        options: options of `decoder`. `last` is the newest decoder.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options
        self.last: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def decoder(self) -> Decoder:
        """A decoder of the model with the options."""
        self.last = self.model.decoder(**self.options)
        return self.last

    def text_reader(self, speculation: Speculation) -> TextReader:
        """What speculation reads and proposes with, with the options."""
        if not hasattr(self.model, "text_reader"):
            raise LoopQError("Speculation needs a program or an ONNX file with a key-value cache.")
        return self.model.text_reader(speculation, **self.options)


class Variants(Generic[T]):
    """Variants of a program made for decoding, by name; valid until a pass changes its graph or tensors.

    If several threads ask at once, one makes the variant and the others wait.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.made: dict[str, T | None] = {}
        self.lock = threading.RLock()

    def get(self, graph_module: fx.GraphModule, name: str, make: Callable[[], T]) -> T | None:
        """The result of `make`, made on the first request; None if `make` reports that it cannot."""
        tensors = [*graph_module.parameters(), *graph_module.buffers()]
        key = (graph_module.code, tuple(map(id, tensors)))
        with self.lock:
            if self.key != key:
                self.key, self.made = key, {}
            if name not in self.made:
                try:
                    self.made[name] = make()
                except LoopQError:
                    self.made[name] = None
            return self.made[name]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start empty, since a lock can be neither copied nor pickled."""
        return {}

    def __setstate__(self, _: Any) -> None:
        self.__init__()  # type: ignore[misc]


class TokenByToken:
    """Reads whole texts one token at a time, as in generation: for perplexity of early exits and integer caches.

    Args:
        model: has a method `decoder`.
        options: options of `decoder`. `loops_spent` lists the loops of every token, if the model may stop early.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options
        self.loops_spent: list[int] = []

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits `[batch, sequence, vocabulary]` of ids `[batch, sequence]`."""
        decoder = self.model.decoder(**self.options)
        mask = torch.ones_like(ids)
        logits = [decoder(ids[:, at : at + 1], mask[:, : at + 1]) for at in range(ids.shape[1])]
        self.loops_spent += getattr(decoder, "loops_spent", [])
        return torch.stack(logits, 1)


def complete(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], loops: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Completes a call with optional inputs: the threshold of an early exit, and an empty cache for a prompt.

    Raises:
        LoopQError: the program runs all its loops but a threshold is given, or the threshold is not a number.
    """
    check_early_exit(signature, kwargs.get(EXIT_THRESHOLD))
    if len(args) > len(signature.parameters):
        return tuple(args), dict(kwargs)  # this is refused where arguments are bound
    if has_early_exit(signature):
        given = dict(zip(signature.parameters, args, strict=False)) | dict(kwargs)
        args, kwargs = (), given | {EXIT_THRESHOLD: threshold_tensor(given.get(EXIT_THRESHOLD))}
    if has_cache(signature):
        args, kwargs = (), _with_empty_cache(signature, args, kwargs, loops)
    return tuple(args), dict(kwargs)


def _with_empty_cache(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], loops: int
) -> dict[str, Any]:
    """The arguments of a call by name. Without keys and values it reads a prompt: the cache is empty, and without an
    attention mask nothing is padding."""
    given = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
    ids, mask, caches = cache_inputs(signature)
    tokens = given.get(ids.name)
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and not any(spec.name in given for spec in caches):
        given.update({spec.name: empty_cache(spec, len(tokens), loops) for spec in caches})
        if given.get(mask.name) is None:
            given[mask.name] = torch.ones(tokens.shape, dtype=mask.dtype)
    return given
