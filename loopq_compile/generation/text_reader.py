"""A text in a key-value cache that can forget its end: what speculation reads and proposes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.generation.expectation import Experience
from loopq_compile.graph.caches import PAST_PREFIX, STATE_PREFIX, cache_inputs, empty_cache, present_name
from loopq_compile.graph.signature import PAST, Signature
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


@dataclass
class Part:
    """A callable graph with a cache: the whole program, its first or its last loops."""

    run: Callable[..., Any]
    signature: Signature
    axes: dict[str, int] = field(init=False)
    """By name of a cache, the axis that counts tokens."""
    states: dict[str, int] = field(init=False)
    """By name of an input of the last loops, the axis that counts tokens."""

    def __post_init__(self) -> None:
        inputs = self.signature.inputs
        self.axes = {spec.name: spec.shape.index(PAST) for spec in inputs if spec.name.startswith(PAST_PREFIX)}
        self.states = {s.name: s.shape.index("sequence") for s in inputs if s.name.startswith(STATE_PREFIX)}

    def __call__(self, ids: Tensor, mask: Tensor, caches: Mapping[str, Tensor], **states: Tensor) -> Any:
        first, second = self.signature.inputs[:2]
        past = {name: caches[name] for name in self.axes}
        return self.run(**{first.name: ids, second.name: mask}, **states, **past)


class CachedText:
    """A text read by a program with a cache.

    Args:
        whole: the program.
        prompt: the same, perhaps with logits of only the last token.
        loops: iterations of a loop whose caches are in one tensor.
        first, last: the program in two parts, after `first_loops` loops.
        experience: of earlier texts.
    """

    def __init__(
        self, whole: Part, prompt: Part, loops: int, first: Part | None = None, last: Part | None = None,
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
        _, _, specs = cache_inputs(self.whole.signature)
        self.ids, self.mask = ids[:, :0], attention_mask
        empty = {spec.name: empty_cache(spec, 1, self.loops) for spec in specs}
        result = self.prompt(ids, attention_mask, empty)
        self.caches = _presents(result, self.prompt)
        self.begun = ids.shape[1]
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
        states = {
            name: torch.cat([result[name] for result in self.states], axis) for name, axis in self.last.states.items()
        }
        result = self.last(self._ids(self.pending), self.mask, self.caches, **states)
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
