"""Finds the pass that broke numerics: compares the program with the model after every pass."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.compiler import quantize
from loopq_compile.errors import LoopQError
from loopq_compile.graph.evaluate import run
from loopq_compile.graph.loops import get_tag
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.printer import site_of
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import copy_graph
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.pipeline import Pipeline, pass_name

_NOTICED = 1e-6
"""Relative errors up to this come from the order of summation."""


@dataclass(frozen=True)
class Place:
    """A node whose value a pass changed: its name, its module or linear, its loop, and its relative error."""

    node: str
    site: str
    loop: str
    error: float


@dataclass(frozen=True)
class Step:
    """The effect of one pass on numbers.

    Args:
        pass_name: the pass.
        number: its position in the pipeline.
        error: `|y - y'| / |y|` of the program's results after the pass, against the captured model; infinite for NaN.
        change: by how much the error grew.
        first: the first node in program order that this pass moved by more than `limit` (by a thousandth of its
            norm, if there is none); None if there is no such node.
        seconds: time of the pass.
    """

    pass_name: str
    number: int
    error: float
    change: float
    first: Place | None
    seconds: float


@dataclass(frozen=True)
class Bisection:
    """All steps, and the one to look at: the first above the limit or, without a limit, the one that added most
    error."""

    steps: tuple[Step, ...]
    culprit: Step | None


def bisect(
    captured: fx.GraphModule,
    scheme: Scheme,
    pipeline: Pipeline,
    probe: Sequence[Tensor],
    calibration: Any = None,
    *,
    limit: float | None = None,
    options: CalibrationOptions | None = None,
) -> Bisection:
    """Runs `pipeline` on a copy of a captured graph and measures the results after every pass.

    Args:
        captured: the model's graph, from `loopq_compile.capture.to_graph.capture`; it is not changed.
        scheme, pipeline, calibration, options: as for `loopq_compile.compile`.
        probe: inputs of the graph, such as `[token_ids]`. All node values for them are kept in memory; one short row is
            enough.
        limit: largest acceptable relative error of the results. None names the pass that added most error, which with
            quantization is the one that quantizes.

    Raises:
        LoopQError: the probe does not fit, or a pass refuses the model; `error.failure` then names the pass.
    """
    if limit is not None and not limit >= 0:
        raise LoopQError(f"limit must be a relative error of at least 0; got {limit!r}.")
    graph_module = copy_graph(captured)
    watch = _Watch(graph_module, probe, 1e-3 if limit is None else limit)
    passes: list[Any] = []
    for number, item in enumerate(pipeline):
        passes += [item, _Measure(watch, pass_name(item), number)]
    quantize(graph_module, scheme, Pipeline(passes, pipeline.name), calibration, options)
    return Bisection(tuple(watch.steps), _culprit(watch.steps, limit))


def _culprit(steps: Sequence[Step], limit: float | None) -> Step | None:
    if limit is not None:
        return next((step for step in steps if step.error > limit), None)
    worst = max(steps, key=lambda step: step.change, default=None)
    return worst if worst and worst.change > _NOTICED else None


class _Watch:
    """Compares values with those of the captured graph (results) and those before a pass (nodes)."""

    def __init__(self, graph_module: fx.GraphModule, probe: Sequence[Tensor], limit: float) -> None:
        self.probe, self.limit = list(probe), limit
        self.steps: list[Step] = []
        self.expected, self.before = self._run(graph_module)
        self.clock = time.perf_counter()

    def measure(self, graph_module: fx.GraphModule, name: str, number: int) -> None:
        seconds = time.perf_counter() - self.clock
        results, values = self._run(graph_module)
        error = max((relative_error(y, x) for y, x in zip(self.expected, results, strict=True)), default=0.0)
        last = self.steps[-1].error if self.steps else 0.0
        change = error - last if math.isfinite(last) else 0.0
        self.steps.append(Step(name, number, error, change, self._first(graph_module, values), seconds))
        self.before, self.clock = values, time.perf_counter()

    def _run(self, graph_module: fx.GraphModule) -> tuple[list[Tensor], dict[str, Tensor]]:
        values: dict[str, Tensor] = {}

        def keep(node: fx.Node, value: Any) -> None:
            if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
                values[node.name] = value

        results = run(graph_module, self.probe, keep)
        return [value for value in results if isinstance(value, Tensor)], values

    def _first(self, graph_module: fx.GraphModule, values: dict[str, Tensor]) -> Place | None:
        for node in graph_module.graph.nodes:
            if node.name in values and node.name in self.before:
                error = relative_error(self.before[node.name], values[node.name])
                if error > self.limit:
                    return Place(node.name, site_of(node), str(get_tag(node) or "outside"), error)
        return None


class _Measure(Pass):
    """Runs after every pass. Before and after: the same graph."""

    def __init__(self, watch: _Watch, after: str, number: int) -> None:
        super().__init__()
        self.watch, self.after, self.number = watch, after, number

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.watch.measure(graph_module, self.after, self.number)
        return PassResult(graph_module, False)


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """`|y - y'| / |y|` of two tensors; infinite where shapes differ or `y'` is not finite where `y` is."""
    if expected.shape != actual.shape:
        return math.inf
    y, x = expected.double(), actual.double()
    same = torch.isfinite(y)
    if not torch.isfinite(x[same]).all():
        return math.inf
    norm = float(y[same].norm())
    difference = float((x[same] - y[same]).norm())
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)
