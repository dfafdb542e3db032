"""Predicts the cost of a compilation: size on disk, memory, time.

Time is measured, not guessed. The passes before learning run on one batch, and one step and one evaluation are timed;
each time is multiplied by how often the method will need it. The model is not changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.analysis.residual_error import reference_graph
from loopq_compile.calibration.batches import bind_batch, count_tokens
from loopq_compile.calibration.learnable import Learnable
from loopq_compile.calibration.training import Training
from loopq_compile.graph.device import device_of
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import CompilerState, Site, copy_graph, get_state, get_tensor
from loopq_compile.passes.learn.calibrate import KEPT_BYTES, Calibrate, activation_bytes, find_learnables
from loopq_compile.passes.learn.calibrate_blocks import CalibrateBlocks
from loopq_compile.passes.learn.select_transforms import LEAST_GROUPS, SEQUENCES, SelectTransforms
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.passes.quantize.solve_weights import SolveWeights
from loopq_compile.passes.transforms.smooth_activations import SmoothActivations
from loopq_compile.pipeline import Pipeline

_LEARNED = 7
"""Single-precision numbers kept for a learned weight: its offset, the gradient, two moments of Adam, and what the
gradient of its rounding needs."""
_KEPT = 2.5
"""Memory of a quantized program for its backward pass, relative to the model's."""
_FIXED, _NODE = 20e6, 30e3
"""Bytes that the exporter needs once, and for each node of the graph."""
_NODE_SECONDS = 0.007
"""Seconds to capture a node, infer its shape and print it, on a core of 2024."""


@dataclass(frozen=True)
class Estimate:
    """Predicted cost.

    Args:
        loops: loop structure in words.
        quantized, linears: how many linears are quantized, and how many there are.
        parameters: parameters of the model.
        bytes: size of `tensors.safetensors` with packed weights; without tables of learned transforms.
        memory: peak memory of the process beyond what is already loaded, in bytes, with the model released in parts.
        seconds: time of the compilation on this machine at its present load; None without calibration data.
    """

    loops: str
    quantized: int
    linears: int
    parameters: int
    bytes: int
    memory: int
    seconds: float | None


def estimate(
    captured: fx.GraphModule,
    scheme: Scheme,
    pipeline: Pipeline,
    calibration: Sequence[Tensor] = (),
    options: CalibrationOptions | None = None,
) -> Estimate:
    """Predicts from the captured graph; runs the first calibration batches to time them.

    Args:
        captured: the model's graph; it is not changed.
        scheme, pipeline, options: as for `loopq_compile.compile`.
        calibration: token batches; without them the time is unknown.

    Raises:
        LoopQError: the scheme does not fit the model.
    """
    options = options or CalibrationOptions()
    graph_module = reference_graph(captured, scheme)
    state = get_state(graph_module)
    quantized = [site for site in state.sites.values() if site.reason is None]
    names = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    tensors = {name: get_tensor(graph_module, name) for name in names}
    integers = {site.weight for site in quantized}
    size = sum(tensor.nbytes for name, tensor in tensors.items() if name not in integers)
    size += sum(_weight_bytes(scheme, *site.shape) for site in quantized)
    size += sum(4 * state.loops.count * _groups(scheme, site.shape[1]) for site in quantized)
    size += round(
        _copies(pipeline, options, state, quantized) * sum(_weight_bytes(scheme, *s.shape) for s in quantized)
    )
    return Estimate(
        loops=state.loops.describe(),
        quantized=len(quantized),
        linears=len(state.sites),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=size,
        memory=_memory(graph_module, quantized, pipeline, calibration, options),
        seconds=_seconds(captured, scheme, pipeline, list(calibration), options) if len(calibration) else None,
    )


def _weight_bytes(scheme: Scheme, outputs: int, inputs: int) -> int:
    packed = scheme.weight_bits <= 4 and inputs % 2 == 0
    return outputs * inputs // (2 if packed else 1) + 4 * outputs * _groups(scheme, inputs)


def _groups(scheme: Scheme, inputs: int) -> int:
    return max(1, inputs // scheme.group_size) if scheme.group_size != -1 else 1


def _copies(pipeline: Pipeline, options: CalibrationOptions, state: CompilerState, sites: Sequence[Site]) -> float:
    """Share of additional weights that selected groups get per loop, if all groups had the same size."""
    groups = len({site.group for site in sites})
    if not groups or not options.selection_budget or not any(isinstance(item, SelectTransforms) for item in pipeline):
        return 0.0
    selected = min(groups, max(LEAST_GROUPS, round(options.selection_budget * groups)))
    return selected / groups * (state.loops.count - 1)


def _memory(
    graph_module: fx.GraphModule,
    sites: Sequence[Site],
    pipeline: Pipeline,
    calibration: Sequence[Tensor],
    options: CalibrationOptions,
) -> int:
    """Memory of graph, scales and work on the largest weight, plus that of learning or of one batch."""
    sizes = [outputs * inputs for outputs, inputs in (site.shape for site in sites)]
    total = _FIXED + _NODE * len(graph_module.graph.nodes) + sum(sizes) / 8 + 12 * max(sizes, default=0)
    if not len(calibration):
        return round(total)
    if not any(isinstance(item, Calibrate | CalibrateBlocks) for item in pipeline):
        return round(total + activation_bytes(graph_module, [calibration[0]]) / 16)
    kept = _KEPT * activation_bytes(graph_module, [calibration[0][:1].expand(options.batch_rows, -1)])
    return round(total + 4 * _LEARNED * sum(sizes) + min(kept, KEPT_BYTES))


def _seconds(
    captured: fx.GraphModule, scheme: Scheme, pipeline: Pipeline, batches: list[Tensor], options: CalibrationOptions
) -> float:
    graph_module = copy_graph(captured)
    state = get_state(graph_module)
    state.scheme, state.method, state.options = scheme, pipeline.name, replace(options, checkpoint=None)
    state.run.calibration, state.run.teacher = batches[:2], copy_graph(captured)
    tokens = sum(batch.numel() for batch in batches)
    seconds = _NODE_SECONDS * len(captured.graph.nodes)
    work: _Work | None = None
    for item in pipeline:
        if isinstance(item, Calibrate | CalibrateBlocks | SelectTransforms) or _solves(item, options):
            work = work or _Work(graph_module, options)
            seconds += work.cost(item, tokens)
        elif work is None:
            spent = _timed(lambda item=item: Pipeline([item]).run(graph_module))  # type: ignore[misc]
            if isinstance(item, CollectRanges | SmoothActivations):
                seen = sum(batch.numel() for batch in state.run.calibration)
                spent *= min(tokens, item.max_tokens or options.statistics_tokens) / seen
            seconds += spent
    return seconds


def _solves(item: Any, options: CalibrationOptions) -> bool:
    return isinstance(item, SolveWeights) and (options.weight_solver or item.options.solver) != "rtn"


class _Work:
    """The cost of learning and solving on a prepared graph: of a step, and of a token in a forward pass."""

    def __init__(self, graph_module: fx.GraphModule, options: CalibrationOptions) -> None:
        self.graph_module, self.options = graph_module, options
        state = get_state(graph_module)
        rows = state.run.calibration
        self.step = self.token = 0.0
        learnables = find_learnables(graph_module, Calibrate().kinds)
        if learnables:
            self._time(Calibrate().training(graph_module, learnables, options, 1, 0), learnables)
        else:
            tensors = bind_batch(rows[0], state.signature, device=device_of(graph_module))
            with torch.no_grad():
                self.token = _timed(lambda: graph_module(*tensors)) / count_tokens(tensors)

    def _time(self, training: Training, learnables: list[Learnable]) -> None:
        training.report.steps = 1  # the first step also sets shares of the loss
        numbers = [training.learn[0], *training.held]
        for number in numbers:
            training.teacher.targets(number, training.batches[number])
        training.backward(numbers[0])  # warms up
        self.step = _timed(lambda: training.backward(numbers[0]))
        held = sum(training.batches[number][0].numel() for number in training.held)
        self.token = _timed(lambda: training.validate({})) / held
        for item in learnables:
            item.forget_gradient()

    def cost(self, item: Any, tokens: int) -> float:
        """Seconds of a pass that learns or solves on `tokens`."""
        if isinstance(item, SelectTransforms):
            return SEQUENCES * self.step
        if isinstance(item, SolveWeights):
            return self._solving(min(tokens, item.max_tokens or self.options.statistics_tokens))
        steps = self.options.steps or item.default_steps
        if isinstance(item, CalibrateBlocks):
            return self.step * steps
        steps = max(1, round(steps * item.share))
        evaluations = 1 + math.ceil(steps / self.options.evaluate_every)
        return self.step * steps + self.token * tokens * self.options.validation * evaluations

    def _solving(self, tokens: int) -> float:
        """Two passes over the data with second moments at every call; a Cholesky factor and a sweep for every
        weight."""
        state = get_state(self.graph_module)
        sites = [site for site in state.sites.values() if site.reason is None]
        work = sum(2 * tokens * state.loops.count * k * k + 8 * n * k * k + k**3 for n, k in (s.shape for s in sites))
        x = torch.ones(512, 512)
        rate = 2 * 512**3 / _timed(lambda: x @ x)
        return 2 * self.token * tokens + work / rate


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
