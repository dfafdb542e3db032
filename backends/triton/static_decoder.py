"""Decoding with fixed shapes, which a CUDA graph can capture: the host launches all loops of a step at once.

A growing key-value cache has different shapes in every step. Here it has room for `capacity` tokens from the start. A
step writes its token at a position that is read from a buffer (pass `fix-cache`), which the host fills before every
step. No cache is copied; only the contents of the same buffers change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from loopq_compile.backends.triton.copies import on_device
from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import CachedDecoder
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.copies import private_copy
from loopq_compile.graph.early_exit import has_early_exit
from loopq_compile.graph.signature import LOOPS_AXIS, PAST, InputSpec, Signature
from loopq_compile.graph.texts import last_logits
from loopq_compile.passes.cache.fix_cache import FixCache
from loopq_compile.pipeline import Pipeline

Step = Callable[[], None]
_WARM_UP = 2


class Lowered(Protocol):
    """What a decoder needs of a lowered program with a key-value cache, a `TritonExecutable`."""

    graph_module: fx.GraphModule
    signature: Signature
    loops: int
    device: torch.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class StaticDecoder:
    """A `loopq_compile.generation.decoders.Decoder` over buffers that are never reallocated.

    `loopq_compile.generation.sampling.generate(decoder, ids)` uses it. Buffers and graphs are kept for every
    batch size used, and serve one text at a time; a new text begins with `decoder()`.

    Args:
        run: a lowered program with a key-value cache.
        capacity: most tokens of prompt and continuation together.
        capture: turns a step into something that replays it; None runs the step itself.
    """

    def __init__(
        self,
        run: Lowered,
        capacity: int,
        capture: Callable[[Step, Sequence[Tensor]], Step] | None,
    ) -> None:
        if not has_cache(run.signature):
            raise LoopQError(
                "Decoding step by step needs a key-value cache: lower program.with_cache(last_token=True)."
            )
        if has_early_exit(run.signature):
            raise LoopQError(
                "A step with fixed shapes runs all loops, and this program stops early, by a value that the host must "
                "read: lower program.with_cache(last_token=True) instead, or generate with the lowered program itself."
            )
        if capacity < 2:
            raise LoopQError(f"capacity is the most tokens of prompt and continuation, at least 2; got {capacity}.")
        self.run, self.capacity, self.capture = run, capacity, capture
        self._graph_module = step_of(run.graph_module)
        self._steps: dict[int, _Step] = {}
        self._current: _Step | None = None
        self._length = 0

    def decoder(self) -> StaticDecoder:
        """This decoder, reset to the beginning of a text."""
        self._current = None
        return self

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the next token; see `loopq_compile.generation.decoders.Decoder`.

        Raises:
            LoopQError: the text is longer than `capacity`, its length is not one that the program takes, or more than
                one token follows a prompt.
        """
        self._length = attention_mask.shape[1]
        if self._length > self.capacity:
            raise LoopQError(f"The text has {self._length} tokens; this decoder has room for {self.capacity}.")
        self.run.signature.check_sizes({"batch": len(new_ids), "sequence": self._length})
        with on_device(self.run.device):
            if self._current is None:
                return self._read(new_ids, attention_mask)
            if new_ids.shape[1] != 1:
                raise LoopQError(f"After a prompt comes one token at a time; got {new_ids.shape[1]}.")
            return self._current(new_ids, self._length - 1)

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Reads a prompt of any length, and writes its keys and values into the buffers."""
        prompt = CachedDecoder(self.run, self.run.signature, self.run.loops)
        logits = prompt(ids, mask)
        batch = len(ids)
        if batch not in self._steps:
            self._steps[batch] = _Step(self.run, self._graph_module, batch, self.capacity)
        step = self._current = self._steps[batch]
        assert prompt.past is not None
        step.begin(prompt.past, mask)
        if self.capture is not None and step.replay is None:
            step.replay = self.capture(step.advance, step.state())
        return logits


def step_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a lowered graph that reads one token, with the position as a last input.

    Raises:
        LoopQError: as `fix-cache`.
    """
    return Pipeline([FixCache()], "triton").run(private_copy(graph_module))


class _Step:
    """The buffers of one batch size, and the step that works on them."""

    def __init__(self, run: Lowered, graph_module: fx.GraphModule, batch: int, capacity: int) -> None:
        ids, mask, *caches = run.signature.inputs
        self.run, self.graph_module = run, graph_module
        self.replay: Step | None = None
        sizes = {"batch": batch, PAST: capacity, LOOPS_AXIS: run.loops}
        self.ids = torch.zeros(batch, 1, dtype=ids.dtype, device=run.device)
        self.mask = torch.zeros(batch, capacity, dtype=mask.dtype, device=run.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=run.device)
        self.past = {spec.name: _buffer(spec, sizes, run.device) for spec in caches}
        self.axis = {spec.name: spec.shape.index(PAST) for spec in caches}
        self.logits: Tensor | None = None

    def state(self) -> list[Tensor]:
        """The buffers that a step changes."""
        return list(self.past.values())

    def begin(self, past: dict[str, Tensor], mask: Tensor) -> None:
        """Puts keys and values of a prompt at the start; the next token follows it, and no later token is padding."""
        length = mask.shape[1]
        self.mask.fill_(1)
        self.mask[:, :length] = mask.to(self.mask)
        self.position.fill_(min(length, self.mask.shape[1] - 1))  # only for steps that warm up
        for name, buffer in self.past.items():
            buffer.zero_()
            buffer.narrow(self.axis[name], 0, length).copy_(past[name])

    def advance(self) -> None:
        """Runs one step on the buffers: no value reaches the host, and no shape depends on a value."""
        inputs = (self.ids, self.mask, *self.past.values(), self.position)
        logits = last_logits(self.run.signature.restore(self.graph_module(*inputs)), len(self.ids))
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Reads one more token per row, in column `position` of the cache; returns the logits after it."""
        self.ids.copy_(ids)
        self.position.fill_(position)
        with torch.no_grad():
            (self.replay or self.advance)()
        assert self.logits is not None
        return self.logits.clone()


def warm_up(step: Step, state: Sequence[Tensor]) -> None:
    """Runs a step until all first-time work is done, and restores what it changed."""
    before = [buffer.clone() for buffer in state]
    with torch.no_grad():
        for _ in range(_WARM_UP):
            step()
        for buffer, content in zip(state, before, strict=True):
            buffer.copy_(content)


def capture_cuda_graph(step: Step, state: Sequence[Tensor]) -> Step:
    """Captures the step as a CUDA graph; returns a step that replays it.

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
    """Refuses if no CUDA graph can be captured.

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
