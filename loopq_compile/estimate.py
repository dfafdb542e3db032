"""What a compilation will cost, before it is done: size on disk, memory, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loopq_compile.bench.trajectory import reference_graph
from loopq_compile.options import CalibrationOptions
from loopq_compile.passes.calibrate import Calibrate
from loopq_compile.passes.calibrate_blocks import CalibrateBlocks
from loopq_compile.pipeline import Pipeline
from loopq_compile.scheme import Scheme
from loopq_compile.state import get_state, get_tensor

_STUDENT = 3.0
"""Cost of a student's step in forward passes of the model: forward, recomputation and backward."""
_LEARNED = 4
"""Numbers of single precision kept for a learned one: itself, its gradient, two moments of Adam."""


@dataclass(frozen=True)
class Estimate:
    """Predicted cost.

    Args:
        loops: structure in words.
        quantized, linears: how many linears are quantized, of how many.
        parameters: of the model.
        bytes: of `tensors.safetensors`, weights packed; tables of learned transforms come on top.
        memory: largest of the process beyond what is loaded already, in bytes; a rough upper guess.
        seconds: of calibration; None where nothing was timed, for lack of calibration data.
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
    """Predicts from the captured graph; one calibration batch is run to be timed.

    Args:
        captured: the model's graph; it is not changed.
        scheme, pipeline, options: as for `loopq_compile.compile`.
        calibration: token batches; none leaves the time open.

    Raises:
        LoopQError: the scheme does not fit the model.
    """
    options = options or CalibrationOptions()
    graph_module = reference_graph(captured, scheme)
    state = get_state(graph_module)
    quantized = [site for site in state.sites.values() if site.reason is None]
    names = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    tensors = {name: get_tensor(graph_module, name) for name in names}
    full = sum(tensor.nbytes for tensor in tensors.values())
    integers = {site.weight for site in quantized}
    size = sum(tensor.nbytes for name, tensor in tensors.items() if name not in integers)
    size += sum(_weight_bytes(scheme, *site.shape) for site in quantized)
    size += sum(4 * state.loops.count * _groups(scheme, site.shape[1]) for site in quantized)
    learns = any(isinstance(item, Calibrate | CalibrateBlocks) for item in pipeline)
    weights = sum(outputs * inputs for outputs, inputs in (site.shape for site in quantized))
    memory = size + 4 * weights * (_LEARNED + 1 if learns else 2)
    return Estimate(
        loops=state.loops.describe(),
        quantized=len(quantized),
        linears=len(state.sites),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=size,
        memory=max(memory, full),
        seconds=_seconds(captured, pipeline, calibration, options, learns),
    )


def _weight_bytes(scheme: Scheme, outputs: int, inputs: int) -> int:
    packed = scheme.weight_bits <= 4 and inputs % 2 == 0
    return outputs * inputs // (2 if packed else 1) + 4 * outputs * _groups(scheme, inputs)


def _groups(scheme: Scheme, inputs: int) -> int:
    return max(1, inputs // scheme.group_size) if scheme.group_size != -1 else 1


def _seconds(
    captured: fx.GraphModule, pipeline: Pipeline, calibration: Any, options: CalibrationOptions, learns: bool
) -> float | None:
    batches = list(calibration)
    if not batches:
        return None
    signature = get_state(captured).signature
    start = time.perf_counter()
    with torch.no_grad():
        captured(*signature.bind((batches[0],), {}))
    row = (time.perf_counter() - start) / len(batches[0])
    seconds = row * sum(map(len, batches))
    if learns:
        steps = options.steps or max(getattr(item, "default_steps", 0) for item in pipeline)
        seconds += row * options.batch_rows * steps * (1 + _STUDENT)
    return seconds
