"""What remains when a pass fails, and a folder with the program after each pass (`LOOPQ_COMPILE_DEBUG=DIR`)."""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.graph.state import RunContext, attach_state, copy_nodes, get_state
from loopq_compile.processes import leads
from loopq_compile.storage.artifact import save

VARIABLE = "LOOPQ_COMPILE_DEBUG"


class Snapshot:
    """A program at one moment. Nodes are copied and tensors shared, since passes replace tensors and never change them.

    Args:
        graph_module: a valid graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph = copy_nodes(graph_module.graph)
        self._parts: dict[str, Any] = {
            str(node.target): _part(graph_module, str(node.target))
            for node in graph_module.graph.nodes
            if node.op in ("get_attr", "call_module")
        }
        state = get_state(graph_module)
        sites = {name: copy.copy(site) for name, site in state.sites.items()}
        self._state = replace(state, sites=sites, log=list(state.log), run=RunContext())

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Holds these equal tensors, by dotted name, in the place of its own, which can then be freed."""
        self._parts.update(tensors)

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The graph; it runs, prints and can be saved."""
        graph_module = fx.GraphModule(self._parts, self._graph)
        attach_state(graph_module, self._state)
        return graph_module


@dataclass
class PassFailure:
    """What is known about a failed pass; kept in `error.failure`.

    Args:
        pass_name: the pass that failed.
        passes_before: the passes that had run, in order.
        snapshot: the graph before the failed pass.
        program: the last valid `Program`, if the pass ran in `compile` or in a method of a program: print it, run it,
            or `save` it. With `release_model`, `pack-weights` frees tensors in place; after a failure there, the
            program still prints but no longer runs. None if `Pipeline.run` was called with a graph.
    """

    pass_name: str
    passes_before: list[str]
    snapshot: Snapshot
    program: Any = None

    @property
    def graph_module(self) -> fx.GraphModule:
        """The last valid graph."""
        return self.snapshot.graph_module


class DebugFolder:
    """Writes `NN-pass.py` after each pass, and what remains after a failure.

    Args:
        folder: created if needed; numbers continue after those of an earlier run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise LoopQError(f"{VARIABLE}: cannot write to {folder}: {error.strerror or error}.") from error

    @staticmethod
    def from_environment(name: str) -> DebugFolder | None:
        """The folder for a run of the pipeline `name`; None if `LOOPQ_COMPILE_DEBUG` is not set, and in all
        processes but the first."""
        where = os.environ.get(VARIABLE)
        if not where or not leads():
            return None
        folder, number = Path(where) / name, 2
        while folder.exists():
            folder, number = Path(where) / f"{name}-{number}", number + 1
        return DebugFolder(folder)

    def dump(self, graph_module: fx.GraphModule, name: str) -> None:
        """The printed program, with types where shapes can be inferred."""
        from loopq_compile.graph.printer import print_graph
        from loopq_compile.graph.shapes import infer_shapes

        head = ""
        try:
            infer_shapes(graph_module)
        except Exception as error:  # a reader of this file wants to know that a pass broke shapes
            head = f"# shapes cannot be inferred: {str(error).splitlines()[0]}\n"
        self._write(f"{self._count:02d}-{name}.py", head + print_graph(graph_module))
        self._count += 1

    def fail(self, failure: PassFailure, error: Exception) -> None:
        """Writes the traceback to `failure.txt`, and the last valid program to `last-valid/`."""
        self._write("failure.txt", f"{failure.pass_name}\n\n{''.join(traceback.format_exception(error))}")
        with contextlib.suppress(Exception):  # the failure itself matters more: a full disk, tensors freed in place
            save(failure.graph_module, self.folder / "last-valid")

    def _write(self, name: str, text: str) -> None:
        try:
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise LoopQError(f"{VARIABLE}: cannot write to {self.folder}: {error.strerror or error}.") from error


def _part(graph_module: fx.GraphModule, name: str) -> Any:
    owner: Any = graph_module
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner
