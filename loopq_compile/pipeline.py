"""Pipelines: the order of passes as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase

from loopq_compile.calibration.overflow import Probe
from loopq_compile.debugging import DebugFolder, PassFailure, Snapshot
from loopq_compile.errors import InternalError, LoopQError, did_you_mean
from loopq_compile.graph.device import device_of, place
from loopq_compile.graph.keys import MADE_BY
from loopq_compile.graph.state import LogEntry, get_state
from loopq_compile.graph.verify import verify_tags
from loopq_compile.memory import trim
from loopq_compile.passes.base import Pass


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

    def __str__(self) -> str:
        """One line per pass: its number, its name, and what it does."""
        lines = [f"Pipeline {self.name!r}, {len(self.passes)} passes"]
        width = max((len(pass_name(item)) for item in self.passes), default=0)
        for number, item in enumerate(self.passes):
            about = (type(item).__doc__ or "").strip().split("\n")[0]
            lines.append(f"{number:3d}  {pass_name(item).ljust(width)}  {about}".rstrip())
        return "\n".join(lines)

    def insert_before(self, name: str, item: PassBase, occurrence: int = 0) -> Pipeline:
        """A pipeline with `item` before the pass called `name`.

        Args:
            name: name of a pass in this pipeline; `print(pipeline)` lists them.
            item: the pass.
            occurrence: which of several passes of that name, counted from 0; -1 for the last.

        Raises:
            LoopQError: there is no such pass. The other methods raise it, too.
        """
        index = self._find(name, occurrence)
        return Pipeline([*self.passes[:index], item, *self.passes[index:]], self.name)

    def insert_after(self, name: str, item: PassBase, occurrence: int = 0) -> Pipeline:
        """A pipeline with `item` after the pass called `name`."""
        index = self._find(name, occurrence) + 1
        return Pipeline([*self.passes[:index], item, *self.passes[index:]], self.name)

    def replace(self, name: str, item: PassBase, occurrence: int = 0) -> Pipeline:
        """A pipeline with `item` instead of the pass called `name`."""
        index = self._find(name, occurrence)
        return Pipeline([*self.passes[:index], item, *self.passes[index + 1 :]], self.name)

    def remove(self, name: str, occurrence: int = 0) -> Pipeline:
        """A pipeline without the pass called `name`."""
        index = self._find(name, occurrence)
        return Pipeline([*self.passes[:index], *self.passes[index + 1 :]], self.name)

    def run(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Applies all passes; after each one, lints and recompiles the graph and verifies its loop tags.

        With the environment variable `LOOPQ_COMPILE_DEBUG=DIR`, `DIR/<name>` gets the printed program after each pass,
        and after a failure the traceback and the last valid program.

        Raises:
            LoopQError: from a pass, about the input.
            InternalError: a pass broke the graph; the message names it and the passes before it.

        Both carry `error.failure`, a `loopq_compile.debugging.PassFailure`, whose `graph_module` is the last valid one.
        """
        done: list[str] = []
        debug = DebugFolder.from_environment(self.name)
        if debug:
            debug.dump(graph_module, "captured")
        probe = Probe(graph_module)
        for item in self.passes:
            snapshot = get_state(graph_module).run.snapshot = Snapshot(graph_module)
            try:
                graph_module = self._apply(item, graph_module, done, probe)
            except (LoopQError, InternalError) as error:
                error.failure = PassFailure(pass_name(item), done, snapshot)
                if debug:
                    debug.fail(error.failure, error)
                raise
            done.append(pass_name(item))
            if debug:
                debug.dump(graph_module, pass_name(item))
        return graph_module

    def _apply(self, item: PassBase, graph_module: fx.GraphModule, done: list[str], probe: Probe) -> fx.GraphModule:
        name = pass_name(item)
        state = get_state(graph_module)
        state.run.notes = []
        before, device = set(graph_module.graph.nodes), device_of(graph_module)
        try:
            result = item(graph_module)
            if result is None or not isinstance(result.graph_module, fx.GraphModule):
                raise InternalError("it must return PassResult(graph_module, modified)")
            graph_module = result.graph_module
            for node in graph_module.graph.nodes:
                if node not in before:
                    node.meta.setdefault(MADE_BY, name)
            if result.modified:
                get_state(graph_module).figures = []
                graph_module.graph.lint()
                if device.type != "cpu":  # what the pass made may lie elsewhere
                    place(graph_module, device)
                graph_module.recompile()
            verify_tags(graph_module)
            if result.modified:
                probe.check(graph_module, name)
        except LoopQError:
            raise
        except Exception as error:
            history = ", ".join(done) or "none"
            raise InternalError(f"Pass {name!r} failed (passes before it: {history}): {error}") from error
        trim()
        get_state(graph_module).log.append(LogEntry(name, bool(result.modified), list(state.run.notes)))
        return graph_module

    def _find(self, name: str, occurrence: int) -> int:
        names = [pass_name(item) for item in self.passes]
        found = [index for index, other in enumerate(names) if other == name]
        if not found:
            raise LoopQError(f"Pipeline {self.name!r} has no pass {name!r}.{did_you_mean(name, set(names))}")
        if not -len(found) <= occurrence < len(found):
            raise LoopQError(f"Pipeline {self.name!r} has {name!r} {len(found)} times; occurrence is {occurrence}.")
        return found[occurrence]


def pass_name(item: PassBase) -> str:
    """Name of a pass in pipelines, printed graphs and errors."""
    return item.name if isinstance(item, Pass) else type(item).__name__


def _check_pass(item: object) -> None:
    if isinstance(item, type) and issubclass(item, PassBase):
        raise LoopQError(f"A pipeline takes pass objects; write {item.__name__}() instead of {item.__name__}.")
    if not isinstance(item, PassBase):
        raise LoopQError(f"A pipeline takes passes (loopq_compile.passes.Pass); got {type(item).__name__}.")
