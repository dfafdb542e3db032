"""Readers of texts for speculation with a program: its graphs by rows and cut in two, made once and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import Variants
from loopq_compile.generation.expectation import Experience
from loopq_compile.generation.speculation import AUTO, LOOKUP, Speculation, default_loops
from loopq_compile.generation.text_reader import CachedText, Part
from loopq_compile.graph.state import attach_state, copy_graph, get_state
from loopq_compile.passes.base import Pass
from loopq_compile.passes.cache.read_rows import ReadRows
from loopq_compile.passes.loops.first_loops import FirstLoops
from loopq_compile.passes.loops.last_loops import LastLoops
from loopq_compile.pipeline import Pipeline


class ProgramTexts:
    """Makes readers for one program with a cache, and remembers what texts have shown, by loops that propose."""

    def __init__(self) -> None:
        self.variants: Variants[Part] = Variants()
        self.experience: dict[int, Experience] = {}

    def reader(self, whole: fx.GraphModule, prompt: Callable[..., Any], speculation: Speculation) -> CachedText:
        """A reader of a new text.

        Args:
            whole: the program's graph, with a cache.
            prompt: the program, perhaps with logits of only the last token.
            speculation: says which loops propose.

        Raises:
            LoopQError: `speculation` asks for loops, and the program cannot be cut.
        """
        count = get_state(whole).loops.count
        reads = self._part(whole, "whole", [ReadRows()])
        first, head, rest = 0, None, None
        if speculation.name != LOOKUP:
            wanted = speculation.loops or default_loops(count)
            try:
                rest = self._part(whole, f"last {wanted}", [LastLoops(wanted), ReadRows()])
                head = self._part(whole, f"first {wanted}", [FirstLoops(wanted)])
                first = wanted
            except LoopQError as error:
                if speculation.name != AUTO:
                    raise
                speculation.notes.append(str(error))
        experience = self.experience.setdefault(first, Experience())
        return CachedText(reads, prompt, count, head, rest, first_loops=first, experience=experience)

    def _part(self, whole: fx.GraphModule, name: str, passes: list[Pass]) -> Part:
        def make() -> Part:
            copied = copy_graph(whole)
            attach_state(copied, replace(get_state(whole), log=[*get_state(whole).log]))
            return Part(Pipeline(passes, "speculation").run(copied))

        return self.variants.get(whole, name, make) or make()  # the second call raises why it failed
