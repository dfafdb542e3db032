"""Pipelines: the order of passes as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase

from loopq_compile.errors import InternalError, LoopQError, did_you_mean
from loopq_compile.passes.base import Pass
from loopq_compile.passes.verify import verify_tags
from loopq_compile.state import LogEntry, get_state

MADE_BY = "loopq_pass"
"""Key in `node.meta` for the name of the pass that made a node."""


class Pipeline:
    """A named list of passes.

    Args:
        passes: in order.
        name: shown in logs and artifacts.

    Raises:
        LoopQError: something in the list is not a pass.
    """

    def __init__(self, passes: Iterable[PassBase], name: str = "custom") -> None:
        self.passes = list(passes)
        self.name = name
        for item in self.passes:
            _check_pass(item)

    def __iter__(self) -> Iterator[PassBase]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __repr__(self) -> str:
        return f"Pipeline({self.name}: {' -> '.join(map(pass_name, self.passes))})"

    def insert_before(self, name: str, item: PassBase) -> Pipeline:
        """A pipeline with `item` in front of the pass called `name`."""
        index = self._find(name)
        return Pipeline([*self.passes[:index], item, *self.passes[index:]], self.name)

    def insert_after(self, name: str, item: PassBase) -> Pipeline:
        """A pipeline with `item` behind the pass called `name`."""
        index = self._find(name) + 1
        return Pipeline([*self.passes[:index], item, *self.passes[index:]], self.name)

    def replace(self, name: str, item: PassBase) -> Pipeline:
        """A pipeline with `item` in place of the pass called `name`."""
        index = self._find(name)
        return Pipeline([*self.passes[:index], item, *self.passes[index + 1 :]], self.name)

    def remove(self, name: str) -> Pipeline:
        """A pipeline without the pass called `name`."""
        index = self._find(name)
        return Pipeline([*self.passes[:index], *self.passes[index + 1 :]], self.name)

    def run(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Applies all passes; after each the graph lints, is recompiled, and its loop tags are verified.

        Raises:
            LoopQError: from a pass, about the input.
            InternalError: a pass broke the graph; the message names it and the passes before it.
        """
        done: list[str] = []
        for item in self.passes:
            graph_module = self._apply(item, graph_module, done)
            done.append(pass_name(item))
        return graph_module

    def _apply(self, item: PassBase, graph_module: fx.GraphModule, done: list[str]) -> fx.GraphModule:
        name = pass_name(item)
        state = get_state(graph_module)
        state.notes = []
        before = set(graph_module.graph.nodes)
        try:
            result = item(graph_module)
            if result is None or not isinstance(result.graph_module, fx.GraphModule):
                raise InternalError("it must return PassResult(graph_module, modified)")
            graph_module = result.graph_module
            for node in graph_module.graph.nodes:
                if node not in before:
                    node.meta.setdefault(MADE_BY, name)
            if result.modified:
                graph_module.graph.lint()
                graph_module.recompile()
            verify_tags(graph_module)
        except LoopQError:
            raise
        except Exception as error:
            history = ", ".join(done) or "none"
            raise InternalError(f"Pass {name!r} failed (passes before it: {history}): {error}") from error
        get_state(graph_module).log.append(LogEntry(name, bool(result.modified), list(state.notes)))
        return graph_module

    def _find(self, name: str) -> int:
        names = [pass_name(item) for item in self.passes]
        if name not in names:
            raise LoopQError(f"Pipeline {self.name!r} has no pass {name!r}.{did_you_mean(name, names)}")
        return names.index(name)


def pass_name(item: PassBase) -> str:
    """Name of a pass in pipelines, printed graphs and errors."""
    return item.name if isinstance(item, Pass) else type(item).__name__


def _check_pass(item: object) -> None:
    if isinstance(item, type) and issubclass(item, PassBase):
        raise LoopQError(f"A pipeline takes pass objects; write {item.__name__}() instead of {item.__name__}.")
    if not isinstance(item, PassBase):
        raise LoopQError(f"A pipeline takes passes (loopq_compile.passes.Pass); got {type(item).__name__}.")
