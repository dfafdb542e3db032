"""The base class of every pass."""

from __future__ import annotations

import re

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from loopq_compile.graph.state import CompilerState, get_state

__all__ = ["Pass", "PassResult"]


class Pass(PassBase):
    """One rewrite of a graph.

    A subclass implements `call`, changes the graph in place and returns `PassResult(graph_module, modified)` with an
    honest `modified`. Its docstring says what the graph looks like *before* and *after*. `requires` and `ensures`
    raise `loopq_compile.LoopQError` for input that cannot be handled, and `loopq_compile.errors.InternalError` for
    graphs that an earlier pass should have prepared. Every node that the pass creates inside a loop must carry the
    loop's tag (`loopq_compile.graph.insert.inserting` sets it, or call `loopq_compile.graph.loops.set_tag`).

    The pipeline lints and recompiles the graph after each pass, verifies loop tags, and marks new nodes with the
    name of the pass. A pass need not do this itself.
    """

    name: str = ""
    """Name in pipelines, in the printed graph and in errors; by default the class name in kebab-case."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    def state(self, graph_module: fx.GraphModule) -> CompilerState:
        """Loop structure, scheme, calibration data and log of the graph."""
        return get_state(graph_module)

    def __repr__(self) -> str:
        return self.name
