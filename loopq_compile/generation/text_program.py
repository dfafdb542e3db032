"""The interface of a program for generation and measurement."""

from __future__ import annotations

from typing import Any, Protocol

from torch import fx

from loopq_compile.generation.decoders import RecomputingDecoder
from loopq_compile.graph.loops import LoopStructure
from loopq_compile.graph.scheme import Scheme


class TextProgram(Protocol):
    """A `loopq_compile.program.Program`; this module is below that one and does not import it."""

    graph_module: fx.GraphModule

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @property
    def loops(self) -> LoopStructure: ...

    @property
    def scheme(self) -> Scheme | None: ...

    def cached(self, last_token: bool = ...) -> TextProgram | None: ...

    def reader(self) -> RecomputingDecoder: ...
