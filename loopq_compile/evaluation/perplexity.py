"""Perplexity by sliding window, and the distance of a quantized model from its teacher.

The text is one long row of tokens. Windows of `length` tokens start every `stride` tokens. Each window scores only the
tokens that no earlier window contained. With `stride < length`, all tokens except the very first are scored once, each
with at least `length - stride` tokens of context. This is the recipe of the Hugging Face documentation ("Perplexity of
fixed-length models"). With `stride == length` it is the plain cross entropy of disjoint windows, whose first tokens
have no context and are left out.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import with_text_inputs
from loopq_compile.graph.device import device_of
from loopq_compile.graph.texts import logits_of
from loopq_compile.progress import progress

LENGTH, STRIDE, BATCH = 256, 128, 8
_LARGEST_OUTPUT = 1 << 25
"""Most numbers in the logits of one batch; larger batches are split."""


@dataclass(frozen=True)
class Score:
    """What `evaluate` measured.

    Args:
        perplexity: `exp(nll)`.
        nll: mean negative log likelihood of a token, in nats.
        tokens: number of tokens scored.
        kl: mean KL(teacher || student) of a token in nats; None without a teacher.
        agreement: share of tokens for which teacher and student rank the same token first; None without a teacher.
        seconds: wall-clock time.
    """

    perplexity: float
    nll: float
    tokens: int
    kl: float | None = None
    agreement: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float | int | None]:
        """Values for JSON; numbers that are not finite become None."""
        return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` (exclusive) of the text; tokens from position `first` of the window on are scored."""

    begin: int
    end: int
    first: int


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """The windows over a text of `tokens` tokens.

    Raises:
        LoopQError: there are fewer than two tokens, or the sizes would leave tokens out.
    """
    if tokens < 2:
        raise LoopQError(f"The text has {tokens} token(s); perplexity needs at least two.")
    if length < 2 or not 1 <= stride <= length:
        raise LoopQError(f"length={length} must be at least 2, and stride={stride} between 1 and length.")
    found, scored = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        first = max(scored - begin, 1)
        if first < end - begin:
            found.append(Window(begin, end, first))
        scored = end
        if end == tokens:
            break
    return found


def evaluate(
    model: Callable[[Tensor], Any],
    tokens: Tensor,
    *,
    teacher: Callable[[Tensor], Any] | None = None,
    length: int = LENGTH,
    stride: int = STRIDE,
    batch: int = BATCH,
    title: str = "perplexity",
) -> Score:
    """Perplexity of `tokens`, and the distance to `teacher` on the same windows.

    Args:
        model: maps ids `[batch, sequence]` to logits: a module, a `Program`, or an ONNX executable.
        tokens: ids, `[n]` or `[1, n]`.
        teacher: the full-precision model, for `Score.kl` and `Score.agreement`.
        length, stride: window size and step in tokens; see the top of this file.
        batch: windows that run together.
        title: text of the progress bar.

    Raises:
        LoopQError: there are too few tokens, tokens outside the vocabulary, or no logits.
    """
    tokens = _checked(tokens)
    start = time.perf_counter()
    spans = windows(len(tokens), length, stride)
    student_call, teacher_call = logits_caller(model), None if teacher is None else logits_caller(teacher)
    vocabulary = _check_vocabulary(student_call, tokens)
    if teacher_call is not None and _check_vocabulary(teacher_call, tokens) != vocabulary:
        raise LoopQError("Teacher and student have vocabularies of different size; their distance has no meaning.")
    batch = max(1, min(batch, _LARGEST_OUTPUT // (length * vocabulary)))
    groups = list(_batches(spans, batch))
    nll = kl = 0.0
    count = same = 0
    with torch.no_grad():
        for group in progress(groups, title, len(groups)):
            ids = torch.stack([tokens[window.begin : window.end] for window in group])
            scored = torch.stack([torch.arange(ids.shape[1] - 1) + 1 >= window.first for window in group])
            logp = _log_probabilities(student_call(ids), scored)
            nll -= float(logp.gather(-1, ids[:, 1:][scored].unsqueeze(-1)).double().sum())
            count += len(logp)
            if teacher_call is not None:
                target = _log_probabilities(teacher_call(ids), scored)
                kl += float((target.exp() * (target - logp)).sum(-1).double().sum())
                same += int((target.argmax(-1) == logp.argmax(-1)).sum())
    mean = nll / count
    return Score(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll=mean,
        tokens=count,
        kl=kl / count if teacher is not None else None,
        agreement=same / count if teacher is not None else None,
        seconds=time.perf_counter() - start,
    )


class Remembered:
    """A model that keeps its last outputs, for a teacher that gets the same windows repeatedly.

    Args:
        model: maps ids to logits.
        limit: memory for the logits in bytes; the oldest are dropped first.
    """

    def __init__(self, model: Callable[[Tensor], Any], limit: int = 1 << 29) -> None:
        self._call = logits_caller(model)
        self._limit = limit
        self._kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of `ids`."""
        key = (tuple(ids.shape), ids.cpu().numpy().tobytes())
        if key not in self._kept:
            logits = self._call(ids)
            while self._kept and sum(x.nbytes for x in self._kept.values()) + logits.nbytes > self._limit:
                self._kept.popitem(last=False)
            self._kept[key] = logits
        return self._kept[key]


def _checked(tokens: Tensor) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise LoopQError(f"tokens must be an integer tensor of token ids; got {kind}. Tokenize text first.")
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1:
        raise LoopQError(f"tokens must have shape [n] or [1, n]; got {list(tokens.shape)}.")
    return tokens.to("cpu", torch.int64)


def logits_caller(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """`model` as a function from ids to float32 logits, both on the CPU.

    A program or a file that was captured with an attention mask, position ids or token types gets those of a text
    without padding.
    """
    device = device_of(model) if isinstance(model, nn.Module) else None
    read = with_text_inputs(model)

    def call(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_of(read(ids.to(device) if device else ids)).float().cpu()

    return call


def _check_vocabulary(call: Any, tokens: Tensor) -> int:
    """Size of the vocabulary; token ids are checked against it before they reach an embedding."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        raise LoopQError(f"Token id {low} is negative.")
    logits = call(torch.zeros(1, 2, dtype=torch.int64))
    if logits.ndim != 3 or logits.shape[1] != 2:
        raise LoopQError(
            f"Perplexity needs logits for every token; two tokens gave {list(logits.shape)}. Programs and files made "
            "with last_token (`--last-token`) give those of the last: export without it."
        )
    vocabulary = logits.shape[-1]
    if high >= vocabulary:
        raise LoopQError(
            f"Token id {high} is outside the model's vocabulary of {vocabulary}: text and model need one tokenizer."
        )
    return vocabulary


def _batches(spans: list[Window], batch: int) -> Iterator[list[Window]]:
    """Batches of windows of one length, in order."""
    group: list[Window] = []
    for window in spans:
        if group and (len(group) == batch or window.end - window.begin != group[0].end - group[0].begin):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _log_probabilities(logits: Tensor, scored: Tensor) -> Tensor:
    """`[scored tokens, vocabulary]` from logits `[batch, length, vocabulary]`; position i predicts token i + 1."""
    return logits[:, :-1][scored].log_softmax(-1)
