"""Decoders: what gives the logits of the next token, step by step, for `loopq_compile.generation.sampling`.

One reads the whole text again for every token; the other keeps keys and values of what it has read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.early_exit import EXIT_THRESHOLD, check_early_exit, has_early_exit, spent_of, threshold_tensor
from loopq_compile.graph.signature import LOOPS_AXIS, PAST, InputSpec, Signature

T = TypeVar("T")
PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
"""What names of cache inputs and outputs begin with; a number and `.key` or `.value` follow."""


class Decoder(Protocol):
    """Reads a prompt with the first call, and what was appended to it with each further one."""

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the token behind the last.

        Args:
            new_ids: `[batch, new]`, the tokens that no call has had yet.
            attention_mask: `[batch, total]`, all tokens so far; 0 on padding, which stands on the left.
        """
        ...


def logits_of(output: Any) -> Tensor:
    """The logits `[batch, sequence, vocabulary]` in what a model, a program or an ONNX file returns.

    Raises:
        LoopQError: there is no such tensor.
    """
    found = _logits_in(output)
    if isinstance(found, Tensor) and found.ndim == 2:
        raise LoopQError(
            f"The model returns logits {list(found.shape)}, of one token of each row. Text is scored with those of all "
            "tokens: return logits [batch, sequence, vocabulary]."
        )
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise LoopQError(
            f"The model returns {type(output).__name__} without logits [batch, sequence, vocabulary]; text cannot be "
            "scored or generated with it."
        )
    return found


def last_logits(output: Any, batch: int) -> Tensor:
    """The logits `[batch, vocabulary]` of the last token in what a model, a program or an ONNX file returns.

    A model may return only these (`head(x[:, -1])`), or those of all tokens.

    Raises:
        LoopQError: there is no such tensor.
    """
    found = _logits_in(output)
    if isinstance(found, Tensor) and found.ndim == 2 and len(found) == batch:
        return found
    return logits_of(output)[:, -1]


def _logits_in(output: Any) -> Any:
    """What stands where logits are expected: the output itself, its `logits`, or its first element."""
    found = output
    if not isinstance(found, Tensor):
        found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    return found


class RecomputingDecoder:
    """Runs the whole sequence for every token.

    Args:
        model: maps ids `[batch, sequence]` (and, if `takes_mask`, an attention mask) to logits.

    `loops_spent` has the loops of every call, of a model that may stop early.
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

    def _run(self, ids: Tensor, attention_mask: Tensor) -> Any:
        if not self.takes_mask and not attention_mask.all():
            raise LoopQError("This model has no attention mask, so rows of a batch cannot be padded.")
        output = self.model(ids, attention_mask) if self.takes_mask else self.model(ids)
        self.loops_spent += spent_of(output)
        return output


def read_texts(run: Callable[..., Any], signature: Signature, **extra: Any) -> RecomputingDecoder:
    """A decoder that calls a program with token ids, and with what follows from an attention mask.

    Args:
        run: the program or file, called by keyword.
        signature: its calling convention.
        extra: further arguments of every call.

    Raises:
        LoopQError: the program takes more than token ids, an attention mask, position ids and token types.
    """
    inputs = [spec for spec in signature.inputs if spec.name not in extra]
    first, *others = inputs
    if {spec.name for spec in others} - set(_MADE_OF_MASK) or first.dtype.is_floating_point:
        raise LoopQError(
            "generate feeds token ids, an attention mask, position ids and token types; this program takes "
            f"{[spec.name for spec in inputs]}."
        )
    if wide := [spec for spec in others if len(spec.shape) > 2]:
        raise LoopQError(f"generate feeds masks and positions [batch, sequence]; this program takes {wide[0]}.")

    def call(ids: Tensor, mask: Tensor | None = None) -> Any:
        return run(**text_inputs(signature, ids, mask), **extra)

    return RecomputingDecoder(call, takes_mask=bool(others))


def text_inputs(signature: Signature, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Inputs of a program by name, from token ids `[batch, sequence]`: whatever stands beside them follows.

    Args:
        signature: the program's calling convention.
        ids: its first input.
        mask: `[batch, sequence]`, 0 on padding; without it there is none. Positions count what is not padding.
    """
    first, *others = signature.inputs
    mask = torch.ones(ids.shape[:2], dtype=torch.int64, device=ids.device) if mask is None else mask
    return {first.name: ids} | {spec.name: _made_of(spec, mask) for spec in others if spec.name in _MADE_OF_MASK}


def with_text_inputs(model: Callable[..., Any]) -> Callable[[Tensor], Any]:
    """`model` as a function of token ids `[batch, sequence]` of texts without padding.

    A program or file that takes an attention mask, position ids or token types gets ones, `0, 1, 2, ...` and zeros; any
    other is called with the ids only.
    """
    signature = getattr(model, "signature", None)
    if not isinstance(signature, Signature) or not set(_MADE_OF_MASK) & {spec.name for spec in signature.inputs[1:]}:
        return model
    return model if has_cache(signature) or has_early_exit(signature) else read_texts(model, signature).model


_MADE_OF_MASK: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": lambda mask: mask,
    "position_ids": lambda mask: (mask.cumsum(1) - 1).clamp_min(0),
    "token_type_ids": torch.zeros_like,
}
"""What may stand beside token ids, made of the attention mask."""


def _made_of(spec: InputSpec, mask: Tensor) -> Tensor:
    """One row stands for all where the program was captured so, such as with positions `[1, sequence]`."""
    value = _MADE_OF_MASK[spec.name](mask).to(spec.dtype)
    if len(spec.shape) == 1 or spec.shape[0] == 1:
        if not bool((value == value[:1]).all()):
            raise LoopQError(f"This program was captured with {spec}, one row for all: rows cannot be padded unlike.")
        value = value[0] if len(spec.shape) == 1 else value[:1]
    return value


class CachedDecoder:
    """Runs new tokens alone, and hands on the keys and values of those before.

    Args:
        run: a program with a key-value cache, called by keyword.
        signature: its calling convention.
        loops: iterations of a loop whose caches stand in one tensor.
        exit_threshold: for programs that may stop early; `loops_spent` has the loops of every call.
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


def has_cache(signature: Signature) -> bool:
    """Whether a program takes keys and values of earlier calls."""
    return any(spec.name.startswith(PAST_PREFIX) for spec in signature.inputs)


class Chosen:
    """A program or file whose decoders are made with options, for `generate`.

    Args:
        model: has a method `decoder`.
        options: for it. `last` is the newest decoder.
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


class Variants(Generic[T]):
    """Programs made of another one for decoding, by name, until a pass changes its graph or tensors.

    Threads that ask at once wait for one that makes it.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.made: dict[str, T | None] = {}
        self.lock = threading.RLock()

    def get(self, graph_module: fx.GraphModule, name: str, make: Callable[[], T]) -> T | None:
        """What `make` made when it was first asked for; None where it says that it cannot."""
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
        """Copies and pickles start empty; a lock has neither."""
        return {}

    def __setstate__(self, _: Any) -> None:
        self.__init__()  # type: ignore[misc]


class TokenByToken:
    """Whole texts read one token at a time, as they are written: for perplexity of early exits and integer caches.

    Args:
        model: has a method `decoder`.
        options: for it. `loops_spent` has the loops of every token, of a model that may stop early.
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


def cache_inputs(signature: Signature) -> tuple[InputSpec, InputSpec, list[InputSpec]]:
    """Of a program with a key-value cache: token ids, the attention mask, and the cache."""
    ids, mask, *others = signature.inputs
    return ids, mask, [spec for spec in others if spec.name.startswith(PAST_PREFIX)]


def complete(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], loops: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with what may be left out: the threshold of an early exit, and the cache of one that reads a prompt.

    Raises:
        LoopQError: a threshold for a program that runs all its loops, or one that is no number.
    """
    check_early_exit(signature, kwargs.get(EXIT_THRESHOLD))
    if len(args) > len(signature.parameters):
        return tuple(args), dict(kwargs)  # which is refused where arguments are bound
    if has_early_exit(signature):
        given = dict(zip(signature.parameters, args, strict=False)) | dict(kwargs)
        args, kwargs = (), given | {EXIT_THRESHOLD: threshold_tensor(given.get(EXIT_THRESHOLD))}
    if has_cache(signature):
        args, kwargs = (), _with_empty_cache(signature, args, kwargs, loops)
    return tuple(args), dict(kwargs)


def _with_empty_cache(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], loops: int
) -> dict[str, Any]:
    """The arguments of a call by name; where it brings no keys and values, it reads a prompt: the cache is empty, and
    without an attention mask nothing is padding."""
    given = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
    ids, mask, caches = cache_inputs(signature)
    tokens = given.get(ids.name)
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and not any(spec.name in given for spec in caches):
        given.update({spec.name: empty_cache(spec, len(tokens), loops) for spec in caches})
        if given.get(mask.name) is None:
            given[mask.name] = torch.ones(tokens.shape, dtype=mask.dtype)
    return given


def present_name(name: str) -> str:
    """The output whose value the input `name` takes in the next call."""
    return PRESENT_PREFIX + name.removeprefix(PAST_PREFIX)


def empty_cache(spec: InputSpec, batch: int, loops: int) -> Tensor:
    """The cache before the first token."""
    sizes = {"batch": batch, PAST: 0, LOOPS_AXIS: loops}
    return torch.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], dtype=spec.dtype)
