"""Predicts the cost of a compilation: size on disk, memory, time.

Time and memory are those of a rehearsal (`loopq_compile.planning.rehearsal`). The model is not changed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from loopq_compile.analysis.machine import Machine, predict
from loopq_compile.calibration.batches import bind_batch, count_tokens
from loopq_compile.errors import LoopQError
from loopq_compile.graph.device import device_of
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import CompilerState, Site, get_state, get_tensor
from loopq_compile.memory import Peak, available_memory
from loopq_compile.methods import reference_graph
from loopq_compile.passes.learn.requirements import Work, check_fits
from loopq_compile.passes.learn.select_transforms import LEAST_GROUPS, SelectTransforms
from loopq_compile.passes.transforms.insert_compensation import InsertCompensation
from loopq_compile.pipeline import Pipeline
from loopq_compile.planning.budget import Budget, check_learns, fit, rehearsal_options
from loopq_compile.planning.costs import Cost
from loopq_compile.planning.rehearsal import Rehearsal


@dataclass(frozen=True)
class Estimate:
    """Predicted cost.

    Args:
        loops: loop structure in words.
        quantized, linears: how many linears are quantized, and how many there are.
        parameters: parameters of the model.
        bytes: size of `tensors.safetensors` with packed weights; without tables of learned transforms.
        memory: peak memory beyond what is already loaded, in bytes.
        seconds: time of the compilation on this machine at its present load; None without calibration data.
        passes: memory and time of every pass.
        budget: the steps that fit, if the options give minutes.
    """

    loops: str
    quantized: int
    linears: int
    parameters: int
    bytes: int
    memory: int
    seconds: float | None
    passes: list[Cost]
    budget: Budget | None = None


def estimate(
    captured: fx.GraphModule,
    scheme: Scheme,
    pipeline: Pipeline,
    calibration: Sequence[Tensor] = (),
    options: CalibrationOptions | None = None,
    peak: Peak | None = None,
    machine: Machine | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Estimate:
    """Predicts from the captured graph by a rehearsal, which takes a few steps' time and a compilation's memory.

    Args:
        captured: the model's graph; it is not changed.
        scheme, pipeline, options: as for `loopq_compile.compile`.
        calibration: token batches; without them, time and memory of learning are unknown.
        peak: since when memory counts; None for now.
        machine: predict by formula for this machine; None to rehearse on this one.
        say: called with the name of every pass before it is rehearsed.

    Raises:
        LoopQError: the scheme does not fit the model, the calibration does not fit into memory, or too few minutes are
            given.
    """
    options = options or CalibrationOptions()
    if options.minutes is not None:
        if machine is not None:
            raise LoopQError("minutes needs a rehearsal, which is of this machine; with another, give steps.")
        check_learns(pipeline, options.minutes, len(calibration) > 0)
    graph_module = reference_graph(captured, scheme)
    state = get_state(graph_module)
    quantized = [site for site in state.sites.values() if site.reason is None]
    names = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    tensors = {name: get_tensor(graph_module, name) for name in names}
    integers = {site.weight for site in quantized}
    size = sum(tensor.nbytes for name, tensor in tensors.items() if name not in integers)
    size += sum(_weight_bytes(scheme, *site.shape) for site in quantized)
    size += sum(4 * state.loops.count * _groups(scheme, site.shape[1]) for site in quantized)
    ranks = [item.rank for item in pipeline if isinstance(item, InsertCompensation)]
    size += sum(4 * rank * (sum(site.shape) + state.loops.count) for rank in ranks[:1] for site in quantized)
    size += round(
        _copies(pipeline, options, state, quantized) * sum(_weight_bytes(scheme, *s.shape) for s in quantized)
    )
    parameters = sum(tensor.numel() for tensor in tensors.values())
    costs: list[Cost] = []
    budget: Budget | None = None
    if len(calibration):
        batches = [bind_batch(batch, state.signature) for batch in calibration]
        work = Work.of(graph_module, batches, options)
        if machine is not None:
            model_bytes = sum(tensor.nbytes for tensor in tensors.values())
            costs = predict(work, pipeline, options, sum(map(count_tokens, batches)), machine, model_bytes)
        else:
            warning = check_fits(work, list(pipeline), options, available_memory(device_of(captured)))
            if warning:
                warnings.warn(warning, stacklevel=2)
    elif machine is not None:
        raise LoopQError("A prediction for another machine needs calibration data: how long its rows are.")
    if not costs:
        costs, budget = _rehearsed(captured, scheme, pipeline, list(calibration), options, peak, say)
    return Estimate(
        loops=state.loops.describe(),
        quantized=len(quantized),
        linears=len(state.sites),
        parameters=parameters,
        bytes=size,
        memory=max(size, *(cost.memory for cost in costs)),
        seconds=sum(cost.seconds for cost in costs) if len(calibration) else None,
        passes=costs,
        budget=budget,
    )


def _rehearsed(
    captured: fx.GraphModule,
    scheme: Scheme,
    pipeline: Pipeline,
    calibration: list[Tensor],
    options: CalibrationOptions,
    peak: Peak | None,
    say: Callable[[str], None],
) -> tuple[list[Cost], Budget | None]:
    start = time.perf_counter()
    if options.minutes is None:
        return Rehearsal(captured, scheme, pipeline, calibration, options, peak, say).run().costs(), None
    found = Rehearsal(captured, scheme, pipeline, calibration, rehearsal_options(options), peak, say).run()
    budget = fit(found, options.minutes, time.perf_counter() - start)
    return found.costs(budget.steps), budget


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
