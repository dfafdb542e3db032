"""Speculative decoding: proposals of several kinds, read by the whole model in one call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from loopq_compile.generation.expectation import best_length
from loopq_compile.generation.lookup import LONGEST, Repeats
from loopq_compile.generation.speculation import AUTO, LOOKUP, LOOPS, PLAIN, Speculation
from loopq_compile.generation.text_reader import TextReader

MOST = 16
"""Tokens that are proposed at most."""
_AGAIN = 24
"""After so many steps, `auto` tries once more what seemed slow."""


class Chooser(Protocol):
    """Chooses tokens by greedy search or at random."""

    def token(self, logits: Tensor, number: int) -> Tensor:
        """New token `number` of a text, `[batch]`, from logits `[batch, vocabulary]`.

        The same logits and number give the same token, whoever computed them.
        """
        ...

    def probability(self, logits: Tensor, token: int) -> float:
        """The probability that `logits` `[1, vocabulary]` give `token`."""
        ...


class SpeculativeSteps:
    """Generates a text; `run` yields its tokens.

    Every new token has a number and, if tokens are drawn at random, random numbers of its own. A proposal is what the
    proposing model draws with these; it is accepted if the whole model draws the same with the same. So the text does
    not depend on proposals, and is the one that plain decoding gives for this seed.

    Args:
        reader: the model.
        chooser: chooses tokens.
        speculation: the method; counts what happens.
        count: number of tokens to make.
        ends: tokens that end the text.
    """

    def __init__(
        self, reader: TextReader, chooser: Chooser, speculation: Speculation, count: int, ends: set[int]
    ) -> None:
        self.reader, self.chooser, self.speculation, self.count, self.ends = reader, chooser, speculation, count, ends
        self.made = 0
        self.seen = reader.experience

    def run(self, ids: Tensor, attention_mask: Tensor) -> Iterator[int]:
        """Tokens after the prompt `[1, sequence]`."""
        logits = self.reader.start(ids, attention_mask)
        self.repeats = Repeats(ids[0].tolist())
        token = self._choose(logits, 0)
        yield from self._emit([token])
        while self.made < self.count and token not in self.ends:
            found = self._step(token)
            token = found[-1]
            self.speculation.tokens += len(found)
            yield from self._emit(found)

    def _emit(self, tokens: list[int]) -> Iterator[int]:
        for token in tokens:
            self.repeats.append(token)
            self.made += 1
            yield token

    def _choose(self, logits: Tensor, number: int) -> int:
        return int(self.chooser.token(logits, self.made + number)[0])

    def _step(self, token: int) -> list[int]:
        """One step after `token`, which is not read yet: at least one new token."""
        most = min(MOST, self.count - self.made - 1)
        method, proposal, size = self._method(most)
        began = time.perf_counter()
        found, accepted, proposed = self._loops(token) if method == LOOPS else self._read(token, proposal, size)
        seconds = time.perf_counter() - began
        counts = self.speculation.count(method)
        counts.steps += 1
        counts.proposed += proposed
        counts.accepted += accepted
        counts.seconds += seconds
        self.seen.add_step(method, len(found), seconds)
        return found

    def _method(self, most: int) -> tuple[str, list[int], int]:
        """The way to propose in the next step, and what lookup proposes."""
        name, can_loop = self.speculation.name, self.reader.first_loops > 0
        if name == LOOPS:
            return LOOPS, [], 0
        proposal, size = self.repeats.propose(most) if most else ([], 0)
        if not self.seen.reading:
            return PLAIN, [], 0  # the first step tells what a step costs
        shares = [self.seen.by_match.share(min(size + place, 2 * LONGEST)) for place in range(len(proposal))]
        length, rate = best_length(shares, self.seen.reading.of)
        if name == AUTO and can_loop and (self._is_due(LOOPS) or self.seen.rate(LOOPS) > rate):
            return LOOPS, [], 0
        if length == 0 and proposal and self._is_due(LOOKUP):
            length = min(2, len(proposal))
        return (LOOKUP, proposal[:length], size) if length else (PLAIN, [], 0)

    def _is_due(self, method: str) -> bool:
        """Whether to try a method though it does not look best: it was never used, or not for long."""
        return self.seen.idle.get(method, _AGAIN) >= _AGAIN

    def _read(self, token: int, proposal: list[int], size: int) -> tuple[list[int], int, int]:
        """Reads a token and what lookup proposes after it; returns new tokens, how many were accepted, proposed."""
        began = time.perf_counter()
        logits = self.reader.read([token, *proposal])
        found = self._accept(logits, proposal)
        self.seen.reading.add(1 + len(proposal), time.perf_counter() - began)
        accepted = self._accepted(found, proposal)
        for place, proposed in enumerate(proposal[: len(found)]):
            self.seen.by_match.add(min(size + place, 2 * LONGEST), found[place] == proposed)
        self.reader.keep(len(found))
        return found, accepted, len(proposal)

    def _loops(self, token: int) -> tuple[list[int], int, int]:
        """Proposes tokens by the first loops until it is better to look; runs the last loops for all of them."""
        proposal: list[int] = []
        keys: list[int] = []
        likely = 1.0
        while True:
            began = time.perf_counter()
            logits = self.reader.propose(token)
            proposed = self._choose(logits, len(proposal))
            probability = self.chooser.probability(logits, proposed)
            self.seen.proposing.add(1, time.perf_counter() - began)
            proposal.append(proposed)
            keys.append(min(int(probability * 10), 9))
            likely *= self.seen.by_probability.share(keys[-1])
            if len(proposal) >= self.count - self.made or proposed in self.ends or not self._go_on(proposal, likely):
                break
            token = proposed
        began = time.perf_counter()
        found = self._accept(self.reader.verify(), proposal)[: len(proposal)]
        self.seen.verifying.add(len(proposal), time.perf_counter() - began)
        for key, proposed, actual in zip(keys, proposal, found, strict=False):
            self.seen.by_probability.add(key, actual == proposed)
        self.reader.keep(len(found))
        return found, self._accepted(found, proposal), len(proposal)

    def _go_on(self, proposal: list[int], likely: float) -> bool:
        """Whether one more proposal pays: it saves a call of the last loops if those before are right, or is lost."""
        if len(proposal) >= MOST:
            return False
        if not self.seen.verifying:
            return len(proposal) < 2
        lost = self.seen.proposing.of(1)
        saved = self.seen.verifying.of(1) - (self.seen.verifying.of(2) - self.seen.verifying.of(1))
        return likely * saved > (1 - likely) * lost

    def _accept(self, logits: Tensor, proposal: list[int]) -> list[int]:
        """The tokens that the whole model chooses, up to the first that was not proposed, or that ends the text."""
        found: list[int] = []
        for number in range(len(logits)):
            found.append(self._choose(logits[number : number + 1], number))
            if found[-1] in self.ends or number >= len(proposal) or found[-1] != proposal[number]:
                break
        return found

    @staticmethod
    def _accepted(found: list[int], proposal: list[int]) -> int:
        return sum(a == b for a, b in zip(found, proposal, strict=False))
