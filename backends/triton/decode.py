"""Decoding with fixed shapes, which a CUDA graph can capture: all loops of a step are one launch from the host.

A key-value cache that grows has other shapes in every step. Here it has room for `capacity` tokens from the start. The
tokens read so far lie at its end; what is in front of them counts as padding on the left, which programs with a cache
know by their attention mask. A step appends one token and drops the foremost entry, so that nothing but the contents of
the same buffers changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopq_compile.decoding import CachedDecoder, has_cache, logits_of, present_name
from loopq_compile.errors import LoopQError
from loopq_compile.signature import LOOPS_AXIS, PAST, InputSpec

if TYPE_CHECKING:
    from loopq_compile.backends.triton.executable import TritonExecutable

Step = Callable[[], None]
_WARM_UP = 2


class StaticDecoder:
    """A `loopq_compile.decoding.Decoder` over buffers that stay where they are.

    `loopq_compile.generation.generate(decoder, ids)` uses it. Buffers and graphs are kept for every batch size met, and
    serve one text at a time: a new one begins with `decoder()`.

    Args:
        run: a lowered program with a key-value cache.
        capacity: most tokens of prompt and continuation together.
        capture: makes a step something that replays it; None runs the step itself.
    """

    def __init__(
        self,
        run: TritonExecutable,
        capacity: int,
        capture: Callable[[Step, Sequence[Tensor]], Step] | None,
    ) -> None:
        if not has_cache(run.signature):
            raise LoopQError(
                "Decoding step by step needs a key-value cache: lower program.with_cache(last_token=True)."
            )
        if capacity < 2:
            raise LoopQError(f"capacity is the most tokens of prompt and continuation, at least 2; got {capacity}.")
        self.run, self.capacity, self.capture = run, capacity, capture
        self._steps: dict[int, _Step] = {}
        self._current: _Step | None = None
        self._length = 0

    def decoder(self) -> StaticDecoder:
        """This decoder, at the beginning of a text."""
        self._current = None
        return self

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the token behind the last; see `loopq_compile.decoding.Decoder`.

        Raises:
            LoopQError: the text is longer than `capacity`, or more than one token comes behind a prompt.
        """
        self._length = attention_mask.shape[1]
        if self._length > self.capacity:
            raise LoopQError(f"The text has {self._length} tokens; this decoder has room for {self.capacity}.")
        if self._current is None:
            return self._read(new_ids, attention_mask)
        if new_ids.shape[1] != 1:
            raise LoopQError(f"Behind a prompt comes one token at a time; got {new_ids.shape[1]}.")
        return self._current(new_ids)

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Reads a prompt, whose length may be any, and lays its keys and values into the buffers."""
        prompt = CachedDecoder(self.run, self.run.signature, self.run.loops)
        logits = prompt(ids, mask)
        batch = len(ids)
        if batch not in self._steps:
            self._steps[batch] = _Step(self.run, batch, self.capacity)
        step = self._current = self._steps[batch]
        assert prompt.past is not None
        step.begin(prompt.past, mask)
        if self.capture is not None and step.replay is None:
            step.replay = self.capture(step.advance, step.state())
        return logits


class _Step:
    """The buffers of one batch size, and the step that works on them."""

    def __init__(self, run: TritonExecutable, batch: int, capacity: int) -> None:
        ids, mask, *caches = run.signature.inputs
        self.run = run
        self.replay: Step | None = None
        sizes = {"batch": batch, PAST: capacity - 1, LOOPS_AXIS: run.loops}
        self.ids = torch.zeros(batch, 1, dtype=ids.dtype, device=run.device)
        self.mask = torch.zeros(batch, capacity, dtype=mask.dtype, device=run.device)
        self.past = {spec.name: _buffer(spec, sizes, run.device) for spec in caches}
        self.axis = {spec.name: spec.shape.index(PAST) for spec in caches}
        self.logits: Tensor | None = None

    def state(self) -> list[Tensor]:
        """The buffers that a step changes."""
        return [self.mask, *self.past.values()]

    def begin(self, past: dict[str, Tensor], mask: Tensor) -> None:
        """Keys and values of a prompt at the end of the buffers, and one place for the next token."""
        length = min(mask.shape[1], self.mask.shape[1] - 1)
        self.mask.zero_()
        self.mask[:, -1] = 1
        self.mask[:, -1 - length : -1] = mask[:, -length:].to(self.mask)
        for name, buffer in self.past.items():
            buffer.zero_()
            axis = self.axis[name]
            begin = buffer.shape[axis] - length
            buffer.narrow(axis, begin, length).copy_(past[name].narrow(axis, past[name].shape[axis] - length, length))

    def advance(self) -> None:
        """One step on the buffers: no value reaches the host, and no shape depends on one."""
        result = self.run.signature.restore(self.run.graph_module(self.ids, self.mask, *self.past.values()))
        logits = logits_of(result)[:, -1]
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        for name, buffer in self.past.items():
            axis = self.axis[name]
            buffer.copy_(result[present_name(name)].narrow(axis, 1, buffer.shape[axis]))
        self.mask.copy_(torch.cat([self.mask[:, 1:], self.mask[:, -1:]], 1))

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        with torch.no_grad():
            (self.replay or self.advance)()
        assert self.logits is not None
        return self.logits.clone()


def warm_up(step: Step, state: Sequence[Tensor]) -> None:
    """Runs a step until nothing in it happens for the first time, and puts back what it changed."""
    before = [buffer.clone() for buffer in state]
    with torch.no_grad():
        for _ in range(_WARM_UP):
            step()
        for buffer, content in zip(state, before, strict=True):
            buffer.copy_(content)


def capture_cuda_graph(step: Step, state: Sequence[Tensor]) -> Step:
    """The step as a CUDA graph; what it returns replays it.

    Raises:
        LoopQError: there is no GPU.
    """
    check_cuda_graphs()
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        warm_up(step, state)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        step()
    return graph.replay


def check_cuda_graphs() -> None:
    """Refuses where no CUDA graph can be captured.

    Raises:
        LoopQError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise LoopQError(
            "A CUDA graph needs an NVIDIA GPU, and none was found. cuda_graph=False runs the step launch by launch."
        )


def _buffer(spec: InputSpec, sizes: dict[str, int], device: torch.device) -> Tensor:
    shape: list[Any] = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.zeros(shape, dtype=spec.dtype, device=device)
