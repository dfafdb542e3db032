"""A text in a key-value cache that can forget its end: what speculation reads and proposes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.generation.expectation import Experience
from loopq_compile.graph.caches import PAST_PREFIX, STATE_PREFIX, cache_inputs, empty_cache, present_name
from loopq_compile.graph.device import device_of
from loopq_compile.graph.signature import PAST, result_names
from loopq_compile.graph.state import get_state
from loopq_compile.graph.texts import given_logits, last_logits


class TextReader(Protocol):
    """One text of which the newest token is not read yet."""

    first_loops: int
    """Loops that can propose tokens; 0 if the model cannot be cut."""
    experience: Experience
    """What earlier texts have shown."""

    def start(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Reads a prompt `[1, sequence]`; returns logits `[1, vocabulary]` of the next token."""
        ...

    def read(self, tokens: list[int]) -> Tensor:
        """Appends tokens; returns logits `[tokens, vocabulary]` of those that follow each."""
        ...

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` tokens of the last `read`, or of those proposed."""
        ...

    def propose(self, token: int) -> Tensor:
        """Appends a token by the first loops; returns their logits `[1, vocabulary]` of the next one."""
        ...

    def verify(self) -> Tensor:
        """Runs the last loops for all tokens of `propose`; returns logits `[tokens, vocabulary]`."""
        ...


class Part:
    """A graph with a cache: the whole program, its first or its last loops.

    Calls skip the checks of `Program.__call__`, since all inputs come from earlier calls.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.signature = get_state(graph_module).signature
        self.results = result_names(self.signature.outputs)
        self.device = device_of(graph_module)
        inputs = self.signature.inputs
        self.axes = {spec.name: spec.shape.index(PAST) for spec in inputs if spec.name.startswith(PAST_PREFIX)}
        """By name of a cache, the axis that counts tokens."""
        self.states = {s.name: s.shape.index("sequence") for s in inputs if s.name.startswith(STATE_PREFIX)}
        """By name of a tensor from the first loops, the axis that counts tokens."""

    def __call__(
        self, ids: Tensor, mask: Tensor, caches: Mapping[str, Tensor], states: Sequence[Tensor] = ()
    ) -> dict[str, Any]:
        """Results by name, for `ids` `[1, new]` and `mask` `[1, past + new]`."""
        past = (caches[name] for name in self.axes)
        given = [value.to(self.device) for value in (ids, mask, *states, *past)]
        with torch.no_grad():
            return dict(zip(self.results, self.graph_module(*given), strict=True))


class CachedText:
    """A text read by a program with a cache.

    Args:
        whole: the program.
        prompt: reads a prompt: the program, perhaps with logits of only the last token.
        loops: iterations of a loop whose caches are in one tensor.
        first, last: the program in two parts, after `first_loops` loops.
        experience: of earlier texts.
    """

    def __init__(
        self, whole: Part, prompt: Callable[..., Any], loops: int, first: Part | None = None, last: Part | None = None,
        first_loops: int = 0, experience: Experience | None = None,
    ) -> None:  # fmt: skip
        self.whole, self.prompt, self.first, self.last = whole, prompt, first, last
        self.loops, self.first_loops = loops, first_loops if first is not None else 0
        self.experience = experience or Experience()
        self.caches: dict[str, Tensor] = {}
        self.begun = 0
        self.pending: list[int] = []
        self.states: list[dict[str, Tensor]] = []
        self.scratch: dict[str, Tensor] = {}

    def start(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `TextReader`."""
        first, mask, specs = cache_inputs(self.whole.signature)
        self.ids, self.mask = ids[:, :0].long(), attention_mask.to(mask.dtype)
        empty = {spec.name: empty_cache(spec, 1, self.loops) for spec in specs}
        result = self.prompt(**{first.name: ids, mask.name: attention_mask}, **empty)
        self.caches = _presents(result, self.whole)
        return last_logits(result, 1)

    def read(self, tokens: list[int]) -> Tensor:
        """See `TextReader`.

        Raises:
            LoopQError: the program gives logits of only the last token.
        """
        self.begun = self.mask.shape[1]
        ids = self._append(tokens)
        result = self.whole(ids, self.mask, self.caches)
        self.caches = _presents(result, self.whole)
        return all_logits(result, len(tokens))

    def keep(self, count: int) -> None:
        """See `TextReader`."""
        length = self.begun + count
        if length < self.mask.shape[1]:
            self.mask = self.mask[:, :length]
            self.caches = {n: cache.narrow(self.whole.axes[n], 0, length) for n, cache in self.caches.items()}

    def propose(self, token: int) -> Tensor:
        """See `TextReader`."""
        assert self.first is not None
        if not self.pending:
            self.begun, self.scratch = self.mask.shape[1], dict(self.caches)
        ids = self._append([token])
        result = self.first(ids, self.mask, self.scratch)
        self.scratch.update(_presents(result, self.first))
        self.states.append(result)
        self.pending.append(token)
        return last_logits(result, 1)

    def verify(self) -> Tensor:
        """See `TextReader`."""
        assert self.first is not None and self.last is not None
        states = [torch.cat([result[name] for result in self.states], axis) for name, axis in self.last.states.items()]
        result = self.last(self._ids(self.pending), self.mask, self.caches, states)
        own = {name: self.scratch[name] for name in self.first.axes}
        self.caches |= own | _presents(result, self.last)  # layers after the loop: those of the whole program
        count, self.pending, self.states, self.scratch = len(self.pending), [], [], {}
        return all_logits(result, count)

    def _ids(self, tokens: list[int]) -> Tensor:
        return self.ids.new_tensor([tokens])

    def _append(self, tokens: list[int]) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(1, len(tokens))], 1)
        return self._ids(tokens)


def _presents(result: Any, part: Part) -> dict[str, Tensor]:
    return {name: result[present_name(name)] for name in part.axes}


def all_logits(result: Any, count: int) -> Tensor:
    """Logits `[count, vocabulary]` of all tokens of a call, from what a program or a file returns for one row.

    Raises:
        LoopQError: there are only those of the last token.
    """
    logits = given_logits(result, 1)[0]
    if len(logits) != count:
        raise LoopQError(
            "This program returns logits of only the last token, so several proposed ones cannot be read at once. Make "
            "its cache, or export it, with last_token=False."
        )
    return logits
